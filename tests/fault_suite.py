"""Runs that last, go on from checkpoints, use up memory or say where they are: for tests of faults.

As suite `faults` they are timing runs, as suite `faults_quality` quality runs; the engine is that
of stub_suite.py. What a run does is named by its data: "sleep 3".
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from implementations.engine import OptimizerConfig
from suites.harness import checkpoint
from suites.harness.measure import phase, progress, sample
from suites.harness.record import Sample
from suites.harness.run import DataConfig, Run, Workload

SEEN = ("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS", "SLURMD_NODENAME", "SLURM_JOB_PARTITION")
STEP_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Suite:
    rounds: int = 1
    until_ci: float | None = None
    seeds: tuple[int, ...] = (0,)
    is_timing: ClassVar[bool] = True
    headline: ClassVar[str] = "step_time_ms"

    def workloads(self) -> Iterator[Workload]:
        yield Workload(phase="train", batch_size=1, seq_len=8)

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        return base


class Quality(Suite):
    is_timing = False


def measure(run: Run, engine) -> Iterator[Sample]:
    phase("measure")
    what, _, value = run.data.name.partition(" ")
    seen = {name: os.environ[name] for name in SEEN if name in os.environ}
    print(json.dumps(seen | {"at": time.time()}), flush=True)
    yield sample("step_time_ms", 1.0, repeat=0)
    match what:
        case "sleep":
            time.sleep(float(value))
        case "train":
            yield from train(engine, round(float(value) / STEP_S))
        case "hog":
            hog = []
            while True:
                hog.append(np.ones(2**20))  # 8 MiB each, until the job's memory is used up
        case "hog_for_parent":  # the kernel kills the worker in its place
            Path(f"/proc/{os.getppid()}/oom_score_adj").write_text("1000")
            Path("/proc/self/oom_score_adj").write_text("0")
            hog = []
            while True:
                hog.append(np.ones(2**20))
        case "kill_worker":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)


def train(engine, num_steps: int) -> Iterator[Sample]:
    """A loss a step, which depends on all steps before."""
    done, curve, _ = checkpoint.resume(engine)
    for step in range(done + 1, num_steps + 1):
        time.sleep(STEP_S)
        engine.value = engine.value * 0.9 + step
        if step % 10 == 0:
            curve.append(sample("train_loss", float(engine.value), at=step))
        progress(step, num_steps)
        checkpoint.save_if_due(engine, step, curve, [])
    yield from curve


def write_suites(folder: Path) -> None:
    """Puts both suites beside the suite `stub` of a folder on PYTHONPATH (see stub_path)."""
    text = "from fault_suite import *\nfrom fault_suite import measure, {} as Suite\n"
    (folder / "faults.py").write_text(text.format("Suite"))
    (folder / "faults_quality.py").write_text(text.format("Quality"))


def timing(what: str, **values) -> Run:
    """Runs of one `what` and several families or rounds are one block."""
    return _run("faults", what, **values)


def quality(what: str, **values) -> Run:
    return _run("faults_quality", what, **values)


def _run(suite: str, what: str, *, family: str = "hawk", backend: str = "jax", **values) -> Run:
    from conftest import tiny  # as in stub_suite.py: not in children

    return Run(
        suite=suite,
        model=tiny(family),
        backend=backend,
        dtype="float32",
        workload=Workload(phase="train", batch_size=1, seq_len=8),
        data=DataConfig(name=what, source="random"),
        **values,
    )
