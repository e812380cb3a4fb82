"""Both backends are one thing twice: the same files, and every parameter of the same table."""

from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import BACKENDS, FAMILIES, tiny

import implementations
from implementations.engine import load_engine
from implementations.parameters import draw, param_specs

ROOM = Path(implementations.__file__).parent
SETTINGS = ({}, {"biases": False, "num_kv_heads": 2, "conv_width": 2})  # with and without biases


def files(backend: str) -> set[str]:
    room = ROOM / f"{backend}_backend"
    return {path.relative_to(room).as_posix() for path in room.rglob("*.py")}


# Without a twin: JAX compiles for TPUs, also those that are not here, and for GPUs, each from
# kernels of its own.
JAX_ALONE = ("ahead_of_time.py", "kernels/*_tpu.py", "kernels/*_gpu.py")


def test_both_backends_hold_the_same_files():
    alone = {name for name in files("jax") if any(fnmatch(name, pattern) for pattern in JAX_ALONE)}
    assert "mixers/rg_lru.py" in files("jax")
    assert "kernels/rg_lru_tpu.py" in alone
    assert files("jax") - alone == files("torch")


LAYERS = ("rms_norm", "gated_gelu", "causal_conv", "cross_entropy", "rope")


def test_each_kernel_file_offers_the_same_plain_variants():
    for name, variants in {
        "linear_scan": {"sequential", "associative", "analytic"},
        "attention": {"plain", "fused"},
        **{name: {"plain"} for name in LAYERS},
    }.items():
        for backend in BACKENDS:
            text = (ROOM / f"{backend}_backend" / "kernels" / f"{name}.py").read_text()
            for variant in variants:
                assert f'"{variant}"' in text, f"{backend}: {name} lacks {variant}"


@pytest.mark.parametrize("overrides", SETTINGS, ids=["biases", "no_biases"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_are_those_of_the_table(backend, family, overrides):
    config = tiny(family, **overrides)
    got = load_engine(backend)(config, seed=3).parameters()
    assert {name: value.shape for name, value in got.items()} == {
        spec.name: spec.shape for spec in param_specs(config)
    }
    for name, want in draw(config, 3).items():
        assert got[name].dtype == want.dtype
        assert (got[name] == want).all(), name
