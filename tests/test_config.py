"""ModelConfig and its strict door: bad input is one line that names the setting and the way out."""

import re
from dataclasses import asdict, replace

import pytest
from conftest import tiny

from implementations import sharding
from implementations.config import ModelConfig, build
from implementations.parameters import param_specs


def values(**overrides) -> dict:
    return {**asdict(tiny("griffin")), **overrides}


def test_plain_values_build_the_same_model():
    assert build(ModelConfig, values(pattern=["rg_lru", "rg_lru", "mqa"]), "here") == tiny(
        "griffin"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"d_modle": 64}, "here: unknown key 'd_modle'. Did you mean 'd_model'?"),
        ({"d_model": "64"}, "here: d_model='64' is not int."),
        ({"biases": 1}, "here: biases=1 is not bool."),
        ({"window_size": 1.5}, "here: window_size=1.5 is not int or null."),
        ({"d_rnn": 98}, "d_rnn=98 is not a multiple of num_gate_blocks=4; use 96 or 100."),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3."),
        ({"window_size": 0}, "window_size=0; must be at least 1, or null."),
        ({"rope_fraction": 0.3}, "rope_fraction=0.3 of head_dim=16 must be an even number"),
        (
            {"pattern": ["mqq"]},
            "pattern='mqq' is not known; known: mqa, rg_lru. Did you mean 'mqa'?",
        ),
        ({"lambda_init": "papper"}, "Did you mean 'paper'?"),
        ({"num_layers": 0}, "num_layers=0; must be at least 1."),
        ({"logit_soft_cap": 0}, "logit_soft_cap=0.0; must be positive, or null."),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build(ModelConfig, values(**overrides), "here")
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named():
    incomplete = values()
    del incomplete["d_rnn"]
    with pytest.raises(ValueError, match="here: missing key 'd_rnn'"):
        build(ModelConfig, incomplete, "here")


def test_the_pattern_repeats_and_is_cut_short():
    model = replace(tiny("griffin"), num_layers=5)
    assert model.layer_mixers == ("rg_lru", "rg_lru", "mqa", "rg_lru", "rg_lru")


def test_the_extra_key_of_the_released_code_is_visible():
    assert tiny("griffin", window_extra_key=True).num_visible_keys == 33
    assert tiny("mqa").num_visible_keys is None


@pytest.mark.parametrize("family", ["mqa", "hawk", "griffin"])
def test_every_axis_of_every_parameter_has_a_sharding_rule(family):
    for spec in param_specs(tiny(family)):
        assert len(spec.axes) == len(spec.shape)
        assert len(sharding.partition(spec.axes)) == len(spec.shape)
