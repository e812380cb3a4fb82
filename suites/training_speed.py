"""Training speed: time of one optimizer step, tokens per second and MFU, as sequences grow.

Question: what does a training token cost, and does that change with the length of its sequence?
The batch shrinks as sequences grow, so that a step is always the same number of tokens
(arXiv:2402.19427, figure 3). Tokens are random: speed does not depend on what they say.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from implementations import cost
from implementations.engine import Batch, Engine, OptimizerConfig
from suites.harness import data
from suites.harness.measure import (
    InvalidMeasurement,
    compile_samples,
    peak,
    peak_memory_bytes,
    phase,
    progress,
    sample,
    stopwatch,
)
from suites.harness.record import Sample
from suites.harness.run import Run, Workload

NUM_WARMUP_STEPS = 2  # after the first; discarded (allocators and clocks settle)


@dataclass(frozen=True, kw_only=True)
class Suite:
    seq_lens: tuple[int, ...]
    tokens_per_step: int
    repeats: int
    activation_checkpointing: bool
    num_devices: int
    rounds: int
    until_ci: float | None
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = True
    headline: ClassVar[str] = "step_time_ms"

    def __post_init__(self) -> None:
        for seq_len in self.seq_lens:
            if seq_len < 1:
                raise ValueError(f"suite.seq_lens={list(self.seq_lens)}; must be at least 1.")
            if self.tokens_per_step < seq_len:
                raise ValueError(
                    f"suite.tokens_per_step={self.tokens_per_step} is less than one sequence of "
                    f"suite.seq_lens={seq_len}; raise tokens_per_step, or drop that length."
                )
            batch_size = self.tokens_per_step // seq_len
            if self.num_devices > 1 and batch_size % self.num_devices:
                raise ValueError(
                    f"suite.tokens_per_step={self.tokens_per_step} makes {batch_size} sequences of "
                    f"suite.seq_lens={seq_len}, which suite.num_devices={self.num_devices} does "
                    "not divide; change one of them."
                )
        if self.repeats < 1:
            raise ValueError(f"suite.repeats={self.repeats}; must be at least 1.")

    def workloads(self) -> Iterator[Workload]:
        for seq_len in self.seq_lens:
            yield Workload(
                phase="train",
                batch_size=self.tokens_per_step // seq_len,
                seq_len=seq_len,
                repeats=self.repeats,
                activation_checkpointing=self.activation_checkpointing,
                num_devices=self.num_devices,
            )

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        return base


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    work = run.workload
    tokens_BT = data.random_tokens(
        work.batch_size, work.seq_len + 1, vocab_size=run.model.vocab_size, seed=run.seed
    )
    batch = Batch.of(tokens_BT)
    engine.start_training(run.optimizer, activation_checkpointing=work.activation_checkpointing)

    phase("compile")
    first_s, _ = _timed_step(engine, batch)
    phase("measure")
    seconds = []
    for repeat in range(-NUM_WARMUP_STEPS, work.repeats):
        step_s, loss = _timed_step(engine, batch)
        if repeat >= 0:
            seconds.append(step_s)
            progress(repeat + 1, work.repeats)
    if not math.isfinite(float(loss)):
        raise InvalidMeasurement(f"the loss of the last step is {float(loss)}: not the real work.")

    yield from compile_samples(first_s, seconds)
    if (memory := peak_memory_bytes(engine)) is not None:
        yield sample("peak_memory_bytes", memory)
    limit = peak(engine, run.dtype)
    yield from limit.samples()
    num_tokens = work.batch_size * work.seq_len
    flops = cost.train_flops_per_token(run.model, work.seq_len) * num_tokens / work.num_devices
    for repeat, step_s in enumerate(seconds):
        yield sample("step_time_ms", step_s * 1e3, repeat=repeat)
        yield sample("tokens_per_s", num_tokens / step_s, repeat=repeat)
    for repeat, step_s in enumerate(seconds):
        if (mfu := limit.mfu(flops, step_s)) is not None:  # of each device, as its peak is
            yield sample("mfu", mfu, repeat=repeat)


def _timed_step(engine: Engine, batch: Batch) -> tuple[float, object]:
    """Seconds of one step, and its loss, still on the device."""
    with stopwatch(engine.synchronize) as watch:
        loss = engine.train_step(batch)
    return watch.seconds, loss
