"""The parameter table: deterministic draws, the paper's initialization, files in and out."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import FAMILIES, tiny

from implementations.parameters import check, draw, load, param_specs, save

DRAWN = [
    [-0.061716311, 0.055775598],
    [-6.2466207, -4.822773],
]  # of griffin_tiny, seed 0: embedding.weight, a_param


@pytest.mark.parametrize("family", FAMILIES)
def test_draw_fills_the_table(family):
    config = tiny(family, num_kv_heads=2)
    params = draw(config, seed=0)
    assert list(params) == [spec.name for spec in param_specs(config)]
    check(config, params, "drawn")
    assert all(value.dtype == np.float32 for value in params.values())


def test_a_draw_depends_on_seed_and_name_alone():
    griffin, hawk = tiny("griffin"), tiny("hawk", num_layers=6, vocab_size=17)
    first, again, other_seed = draw(griffin, 0), draw(griffin, 0), draw(griffin, 1)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        if np.any(value != 0):
            assert np.any(value != other_seed[name]), name
    elsewhere = draw(hawk, 0)  # another model, other parameters before this one
    name = "layers.4.mixer.rg_lru.a_param"
    np.testing.assert_array_equal(first[name], elsewhere[name])
    assert np.any(first[name] != first["layers.3.mixer.rg_lru.a_param"])


def test_draws_never_change():
    """Runs are compared across versions of this code; a new draw is a new experiment."""
    params = draw(tiny("griffin"), seed=0)
    found = [params["embedding.weight"][0, :2], params["layers.0.mixer.rg_lru.a_param"][:2]]
    np.testing.assert_allclose(found, DRAWN, rtol=1e-6)


@pytest.mark.parametrize("lambda_init", ["paper", "code"])
def test_a_param_starts_where_the_paper_or_the_code_says(lambda_init):
    config = tiny("hawk", d_rnn=10_000, num_gate_blocks=1000, num_layers=1, lambda_init=lambda_init)
    a_param = draw(config, seed=0)["layers.0.mixer.rg_lru.a_param"].astype(np.float64)
    a = np.exp(-np.logaddexp(0, a_param))
    low, high = (0.9, 0.999) if lambda_init == "paper" else (0.9**2, 0.999**2)
    drawn = np.sort(a ** (8 if lambda_init == "paper" else 2))
    assert low - 1e-6 <= drawn[0]
    assert drawn[-1] <= high + 1e-6
    uniform = np.linspace(low, high, drawn.size)
    assert np.abs(drawn - uniform).max() < 0.02 * (high - low)  # Kolmogorov-Smirnov: 1.6 / sqrt(n)


def test_weights_have_the_variance_of_their_initialization():
    config = tiny("griffin", d_model=512, d_rnn=512, d_mlp=512, num_gate_blocks=4)
    params = draw(config, seed=0)
    stds = {
        "embedding.weight": 512**-0.5,
        "layers.0.mixer.linear_x.weight": 512**-0.5,
        "layers.0.mixer.linear_out.weight": (2 / 6 / 512) ** 0.5,  # before a residual sum
        "layers.0.mixer.conv_1d.weight": 0.05,
        "layers.0.mixer.rg_lru.a_gate.weight": 128**-0.5,
        "layers.2.mixer.linear_q.weight": 512**-0.5,
        "layers.2.mlp.linear_down.weight": (2 / 6 / 512) ** 0.5,
    }
    for name, std in stds.items():
        assert params[name].std() == pytest.approx(std, rel=0.05), name
        assert abs(params[name].mean()) < 0.05 * std, name
    for name, value in params.items():
        if name.endswith(("bias", "scale")):
            assert np.all(value == 0), name


def test_decay_applies_to_matrices_of_linear_layers_alone():
    decayed = {spec.name.split(".", 2)[-1] for spec in param_specs(tiny("griffin")) if spec.decayed}
    assert decayed == {
        *(f"mixer.linear_{name}.weight" for name in ("q", "k", "v", "x", "y", "out")),
        *(f"mlp.linear_{name}.weight" for name in ("gate", "up", "down")),
    }


def test_without_biases_only_biases_are_missing():
    config = tiny("griffin")
    names = {spec.name for spec in param_specs(config)}
    without = {spec.name for spec in param_specs(replace(config, biases=False))}
    assert without == {name for name in names if not name.endswith("bias")}
    assert without < names


def test_a_file_holds_the_same_values(tmp_path):
    config = tiny("griffin")
    params = draw(config, seed=0)
    params["embedding.weight"] = np.asfortranarray(params["embedding.weight"])
    save(tmp_path / "griffin.safetensors", params)
    loaded = load(tmp_path / "griffin.safetensors", config)
    assert loaded.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("final_norm.scale"), "'final_norm.scale' of .* is missing"),
        (lambda p: p.update(extra=np.zeros(2)), "'extra' is not one of"),
        (
            lambda p: p.update({"layers.0.mlp_norm.scale": np.zeros(3)}),
            r"'layers.0.mlp_norm.scale' has shape \(3,\), .* needs \(64,\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, change, words):
    config = tiny("griffin")
    params = draw(config, seed=0)
    change(params)
    path = tmp_path / "other.safetensors"
    save(path, params)
    with pytest.raises(ValueError, match=words) as error:
        load(path, config)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(path, tiny("griffin"))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
