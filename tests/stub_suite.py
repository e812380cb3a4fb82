"""A suite, an engine and a store for tests of the harness: no framework, milliseconds a run.

Child processes learn of them through a sitecustomize.py on PYTHONPATH (see stub_path).
"""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from implementations.engine import OptimizerConfig, Unsupported
from implementations.rank import Rank
from suites.harness import checkpoint
from suites.harness.measure import (
    Diverged,
    InvalidMeasurement,
    phase,
    progress,
    sample,
    stopwatch,
)
from suites.harness.record import Sample
from suites.harness.run import DataConfig, Run, Workload

SITE = """
import sys
sys.path.insert(0, {tests!r})
import implementations.engine, suites
suites.__path__.append({folder!r})
implementations.engine.ENGINES["jax"] = implementations.engine.ENGINES["torch"] = "stub_engine"
"""


@dataclass(frozen=True, kw_only=True)
class Suite:
    seq_lens: tuple[int, ...] = (8,)
    rounds: int = 1
    until_ci: float | None = None
    seeds: tuple[int, ...] = (0,)
    is_timing: ClassVar[bool] = True
    headline: ClassVar[str] = "step_time_ms"

    def workloads(self) -> Iterator[Workload]:
        for seq_len in self.seq_lens:
            yield Workload(phase="train", batch_size=1, seq_len=seq_len)

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        return base


class Engine:
    device_name = "cpu"

    def __init__(self, config, *, dtype, kernels, device_kind, seed, num_devices=1):
        self.config = config
        self.resolved_kernels = {"linear_scan": "stub", "attention": "stub"}
        self.value = np.zeros(())

    def parameters(self):
        return {"embedding.weight": np.zeros((2, 2), np.float32)}

    def training_state(self):
        return {"value": self.value}

    def load_training_state(self, state):
        self.value = state["value"]

    def synchronize(self):
        pass


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    """What a run does is named by its data: DataConfig.name."""
    phase("measure")
    yield sample("step_time_ms", 1.0, repeat=0)
    match run.data.name:
        case "sleep":
            time.sleep(0.2)
        case "second":
            time.sleep(1.0)
        case "repeat":
            for repeat in range(600):
                with stopwatch(engine.synchronize):
                    time.sleep(0.1)
                progress(repeat + 1, 600)
        case "train":
            yield from train(engine, int(run.workload.num_steps))
        case "second":
            time.sleep(1)
        case "hang":
            time.sleep(60)
        case "raise":
            raise KeyError("a bug")
        case "unsupported":
            raise Unsupported("pallas_tpu needs a TPU.")
        case "diverged":
            raise Diverged("the loss is nan at step 3.")
        case "invalid":
            raise InvalidMeasurement("MFU 1.20 is above 1.")
        case "compile":
            phase("compile")
            raise RuntimeError("cannot lower")
        case "resource_exhausted":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        case "memory":
            hog = []
            while True:
                hog.append(np.ones(2**22))  # 32 MiB each, until a limit stops it
        case "abort":
            os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
            os.abort()
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "ranks":
            yield sample("loss", float(os.environ["AERIE_CORES"].split(",")[0]), at=Rank.of().count)
        case "kill_rank_2" if Rank.of().index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise_rank_2" if Rank.of().index == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        case "exit_rank_2" if Rank.of().index == 2:
            os.write(2, b"cannot open shared object file\n")
            os._exit(3)
        case "lose_rank_2" if Rank.of().index == 2:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        case "lose_rank_2":
            raise RuntimeError("connection closed by peer")
        case "kill_rank_2" | "raise_rank_2" | "exit_rank_2":
            time.sleep(60)  # as in a collective
        case "kill_rank_0" if Rank.of().index == 0:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill_rank_0":
            time.sleep(60)


def train(engine: Engine, num_steps: int) -> Iterator[Sample]:
    """As language modeling does: a loss a step, 50 ms each, that depends on all steps before."""
    done, curve, _ = checkpoint.resume(engine)
    yield from curve
    for step in range(done + 1, num_steps + 1):
        time.sleep(0.05)
        engine.value = engine.value * 1.1 + step
        curve.append(sample("train_loss", float(engine.value), at=step))
        yield curve[-1]
        progress(step, num_steps, curve[-1].value)
        checkpoint.save_if_due(engine, step, curve, [])


def stub_path(folder: Path) -> Path:
    """A folder for PYTHONPATH that puts this suite under the name `stub` into any process."""
    tests = Path(__file__).resolve().parent
    (folder / "stub.py").write_text("from stub_suite import *\nfrom stub_suite import measure\n")
    # outside of our root: all files beside an engine count as its own, and are read for its build
    (folder / "stub_engine.py").write_text("from stub_suite import Engine\n")
    site = SITE.format(tests=str(tests), folder=str(folder))
    (folder / "sitecustomize.py").write_text(site)
    return folder


def stub_run(what: str = "done", *, family: str = "hawk", backend: str = "jax", **values) -> Run:
    from conftest import tiny  # imports pytest, which takes as long as all else that a child does

    seq_len = values.pop("seq_len", 8)
    work = {"phase": "train", "batch_size": 1, "seq_len": seq_len} | values.pop("workload", {})
    return Run(
        suite="stub",
        model=tiny(family),
        backend=backend,
        dtype="float32",
        workload=Workload(**work),
        data=DataConfig(name=what, source="random"),
        **values,
    )
