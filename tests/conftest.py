"""What several tests share: the tiny model of every family, JAX kept on the CPU, the worker that
interprets kernels, and a real Slurm (started when the first test asks for it)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Iterator
from dataclasses import replace

import pytest
from interpreted import interpreted  # noqa: F401, a fixture
from slurm_cluster import (  # noqa: F401, fixtures
    _tidy_slurm,
    slurm,
    slurm_without_accounting,
)

from implementations.config import ModelConfig

FAMILIES = ("mqa", "mqa_local", "hawk", "griffin")
BACKENDS = ("jax", "torch")

PATTERNS = {
    "mqa": ("mqa",),
    "mqa_local": ("mqa",),
    "hawk": ("rg_lru",),
    "griffin": ("rg_lru", "rg_lru", "mqa"),
}


@pytest.fixture
def in_32_bits() -> Iterator[None]:
    """As in every process that runs kernels of Pallas. An engine in float64 switches JAX to 64 bits
    for good: here, for all tests after it."""
    import jax

    with jax.enable_x64(False):
        yield


def tiny(family: str, **overrides) -> ModelConfig:
    """The size `tiny` of configs/size/tiny.yaml, with some fields replaced."""
    model = ModelConfig(
        family=family,
        size="tiny",
        pattern=PATTERNS[family],
        d_model=64,
        d_rnn=96,
        d_mlp=192,
        num_layers=6,
        num_heads=4,
        head_dim=16,
        num_gate_blocks=4,
        window_size=None if family == "mqa" else 32,
    )
    return replace(model, **overrides)
