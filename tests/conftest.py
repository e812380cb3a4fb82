"""What several tests share: the tiny model of every family, JAX kept on the CPU, one thread for
PyTorch and NumPy, the worker that interprets kernels, and a real Slurm (started when the first test
asks for it)."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests run side by side, and the threads of tiny operations would wait for each other's cores: the
# parity ladder of Hawk took 75 s of CPU time beside other tests, and 13 s with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_records as synthetic
from interpreted import interpreted  # noqa: F401, a fixture
from slurm_cluster import (  # noqa: F401, fixtures
    _tidy_slurm,
    own,
    slurm,
    slurm_without_accounting,
)

from analysis import remember
from implementations.config import ModelConfig

FAMILIES = ("mqa", "mqa_local", "hawk", "griffin")
BACKENDS = ("jax", "torch")
LONGEST = ("test_prove", "test_quickstart", "test_slurm_faults")  # minutes each

PATTERNS = {
    "mqa": ("mqa",),
    "mqa_local": ("mqa",),
    "hawk": ("rg_lru",),
    "griffin": ("rg_lru", "rg_lru", "mqa"),
}


def pytest_configure(config: pytest.Config) -> None:
    """What JAX compiled for one test is read by all others and by their children, in this session
    and in later ones (`--cache-clear` deletes it): a climb of the ladder takes 16 s of CPU time
    instead of 79. A program that differs, or is for other devices, is another entry."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: what begins last is waited for by processes that have no more."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def remembering() -> Iterator[None]:
    """What a test derives of one frame is derived once, as by every command."""
    with remember.remembering():
        yield


@pytest.fixture
def in_32_bits() -> Iterator[None]:
    """As in every process that runs kernels of Pallas. An engine in float64 switches JAX to 64 bits
    for good: here, for all tests after it."""
    import jax

    with jax.enable_x64(False):
        yield


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The suite `stub`, known here and in every child; yields the place of a store."""
    from stub_suite import stub_path

    import suites
    from implementations import engine as engines
    from suites.harness import provenance

    folder = tmp_path / "site"
    folder.mkdir()
    stub_path(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(folder), str(provenance.ROOT))))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(suites, "__path__", [*suites.__path__, str(folder)])
    for backend in ("jax", "torch"):
        monkeypatch.setitem(engines.ENGINES, backend, "stub_engine")
    yield tmp_path / "store"
    sys.modules.pop("suites.stub", None)
    for cached in (provenance._build_key, provenance._origin):
        cached.cache_clear()


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


@pytest.fixture(scope="session")
def quickstart_report(tmp_path_factory) -> tuple[Path, Path]:
    """The store and the report of a whole quickstart, with one run that ran out of memory. Not to
    be changed: tests that must, copy it."""
    import analysis
    from suites.harness.record import write

    folder = tmp_path_factory.mktemp("quickstart")
    store = synthetic.quickstart(folder / "store")
    lost = synthetic.record("training_speed", "mqa", "jax", outcome="out_of_memory", seq_len=1024,
                            reason="killed at <7.9> GiB",
                            samples=(synthetic.sample("init_time_s", 0.016),))  # fmt: skip
    write(store, lost)
    write(store, synthetic.training("mqa", "torch", 0, 1024))
    path = analysis.write_report(
        store,
        folder / "report",
        title="Quickstart",
        command="aerie run experiment=quickstart",
        redraw="aerie report quickstart",
    )
    return store, path
