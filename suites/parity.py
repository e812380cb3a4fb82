"""Parity: does a backend compute what the equations say, to the precision of its dtype?

One run holds one backend and climbs the ladder of suites/ladder with it: the parameter tree, every
op alone with its gradients, the whole model, optimizer steps. What is compared, and with which
truth, stands there; the tolerances in suites/ladder/tolerances.yaml. Where AERIE_TENSORS names a
file, what the backend gave is written there, for comparison with another one's.

The gate is what `suite.levels=[]` climbs: it alone verifies speeds.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from implementations.config import choose
from implementations.engine import Engine, OptimizerConfig
from suites.harness import stop
from suites.harness.executors import TENSORS_VARIABLE
from suites.harness.measure import InvalidMeasurement, phase, progress
from suites.harness.record import Sample
from suites.harness.run import Run, Workload
from suites.ladder import model, ops, steps, training, truth
from suites.ladder.check import LADDER, Check, level_of, limit_of, samples, words

# Near the size of the gradients of `tiny` once their norm is clipped to 1. With 1e-8 the first
# steps of AdamW are the signs of the gradients, and an element whose gradient is rounding noise
# moves as far as any other: float32 was then 2e-2 from the truth after three steps.
EPS = 1e-3
LONG = ("L5", "L6")  # on real text, minutes each: only where they are named
# What climbs, from the lowest rung up, and the levels it reaches.
RUNGS = {
    truth.checks: {"truth", "L0"},
    model.parameter_checks: {"L0"},
    ops.checks: {"L1", "L2", "L3", "L7"},
    model.checks: {"L4", "L7"},
    steps.checks: {"L5", "L7"},
}
# They hold what does not depend on kernels, the equations and the optimizer; runs with other ones
# than `auto` have them only where they are named.
WITHOUT_KERNELS = (truth.checks, steps.checks)
PEER_RUNGS = {model.document_checks: {"L4", "L7"}}  # whose ops cannot be called alone


@dataclass(frozen=True, kw_only=True)
class Suite:
    levels: tuple[str, ...]  # of the ladder; empty: the gate, all but the long ones
    batch_size: int
    seq_lens: tuple[int, ...]
    num_new_tokens: int
    num_steps: int
    text_batch_size: int  # L5 and L6, on the run's data
    text_seq_len: int
    num_text_steps: int
    num_held_out_batches: int
    activation_checkpointing: bool
    rounds: int
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for level in self.levels:
            choose("suite.levels", level, LADDER, "suite=parity")
        least = {"num_steps": 1, "num_new_tokens": 2, "num_text_steps": 1, "text_seq_len": 2}
        for key, low in least.items():
            if getattr(self, key) < low:
                raise ValueError(f"suite.{key}={getattr(self, key)}; must be at least {low}.")
        if any(seq_len <= self.num_new_tokens + 8 for seq_len in self.seq_lens):
            raise ValueError(
                f"suite.seq_lens={list(self.seq_lens)}: every length must exceed "
                f"suite.num_new_tokens={self.num_new_tokens} by more than 8."
            )

    def workloads(self) -> Iterator[Workload]:
        named = [level for level in LADDER if level in self.levels]  # in one order: one run_id
        levels = tuple(level for level in named if level not in LONG)
        for seq_len in self.seq_lens if levels or not self.levels else ():
            yield Workload(
                phase="evaluate",
                levels=levels,
                batch_size=self.batch_size,
                seq_len=seq_len,
                prompt_len=seq_len - self.num_new_tokens,
                num_new_tokens=self.num_new_tokens,
                num_steps=self.num_steps,
                activation_checkpointing=self.activation_checkpointing,
            )
        for level in (level for level in named if level in LONG):
            yield Workload(
                phase="train",
                levels=(level,),
                batch_size=self.text_batch_size,
                seq_len=self.text_seq_len,
                num_steps=self.num_text_steps,
                num_held_out_batches=self.num_held_out_batches if level == "L6" else 0,
                activation_checkpointing=self.activation_checkpointing,
            )

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        """The schedule ends with the run; the gate's few steps see warm-up and cosine, and EPS."""
        if workload.phase != "train":
            return replace(base, num_warmup_steps=1, num_steps=workload.num_steps + 1, eps=EPS)
        num_warmup_steps = min(base.num_warmup_steps, workload.num_steps // 10)
        return replace(base, num_warmup_steps=num_warmup_steps, num_steps=workload.num_steps)


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    if run.workload.phase == "train":
        yield from training.measure(run, engine)
        return
    phase("measure")
    kept: dict[str, np.ndarray] = {}
    red, num_checks = [], 0
    try:
        for check in climb(run, engine):
            stop.check()
            num_checks += 1
            if is_kept(check.field) and check.ours is not None:
                kept[check.field] = check.ours
            error, limit = check.error, limit_of(check.field, run)
            if error.exceeds(limit):
                red.append((check, error, limit))
            yield from samples(check, error, limit)
    finally:
        if path := os.environ.get(TENSORS_VARIABLE):
            save(Path(path), kept)
    if red:
        raise InvalidMeasurement(f"{words(*red[0])}; {len(red)} of {num_checks} checks are red.")


def climb(run: Run, engine: Engine) -> Iterator[Check]:
    """Every check of the run's levels, from the lowest rung up: the first red one tells most."""
    wanted = run.workload.levels
    rungs = RUNGS if hasattr(engine, "op") else PEER_RUNGS
    if run.kernels.chosen and not wanted:
        rungs = {rung: levels for rung, levels in rungs.items() if rung not in WITHOUT_KERNELS}
    for number, (rung, levels) in enumerate(rungs.items(), start=1):
        if not wanted or levels & set(wanted):
            yield from (c for c in rung(run, engine) if not wanted or level_of(c.field) in wanted)
        progress(number, len(rungs))


# Tensors on file, for comparison with another backend's -----------------------------------------


def is_kept(field: str) -> bool:
    """Of activations what a whole layer gives; of ops nothing: the file would be 60 MB."""
    level, what, *rest = field.split("/")
    if what == "activations":
        return rest[0].count(".") < 2
    return level in ("L4", "L5", "L7") and what in (
        "logits", "evaluate", "loss", "grad", "prefill in chunks", "train_loss", "steps"
    )  # fmt: skip


def save(path: Path, values: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # a name without .npz stays as it is
        np.savez(file, **values)


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)
