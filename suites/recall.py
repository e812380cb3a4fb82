"""Recall: train a small model on a synthetic task, then ask it at lengths it did not train at.

Question: which architecture learns to copy and to look up, in how few steps, and how far beyond
its training length does it hold? `accuracy` is the share of examples whose whole answer is right
(figure 6(a) of arXiv:2402.19427 begins at 0.00, so that is most likely the paper's);
`token_accuracy` that of single tokens, which is zoology's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np

from implementations import cost
from implementations.engine import IGNORED, Batch, Engine, OptimizerConfig
from suites.harness import checkpoint, tasks, train
from suites.harness.measure import (
    available_memory_bytes,
    peak_memory_bytes,
    phase,
    progress,
    sample,
)
from suites.harness.record import METRICS, Sample
from suites.harness.run import DataConfig, Run, Workload

LOOKS_LEARNED = 3  # in succession without a mistake: the task is learned
LEVELS = (90, 95)  # percent of accuracy whose first step is told; figure 6(a) has both


@dataclass(frozen=True, kw_only=True)
class Suite:
    num_steps: int
    batch_size: int
    seq_len: int
    evaluated_seq_lens: tuple[int, ...]
    num_examples: int
    stops_when_learned: bool
    activation_checkpointing: bool
    rounds: int
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for key in ("num_steps", "seq_len", "num_examples"):
            if getattr(self, key) < 1:
                raise ValueError(f"suite.{key}={getattr(self, key)}; must be at least 1.")

    def check_data(self, data: DataConfig) -> None:
        if not tasks.is_task(data):
            known = ", ".join(tasks.TASKS)
            raise ValueError(f"data={data.name}: suite=recall asks a task; data is one of {known}.")
        tasks.check(data, (self.seq_len, *self.evaluated_seq_lens))

    def workloads(self) -> Iterator[Workload]:
        yield Workload(
            phase="train",
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            num_steps=self.num_steps,
            evaluated_seq_lens=self.evaluated_seq_lens,
            num_examples=self.num_examples,
            stops_when_learned=self.stops_when_learned,
            activation_checkpointing=self.activation_checkpointing,
        )

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        """The schedule ends with the run; warm-up is at most a tenth of it."""
        num_warmup_steps = min(base.num_warmup_steps, workload.num_steps // 10)
        return replace(base, num_steps=workload.num_steps, num_warmup_steps=num_warmup_steps)


def batches(run: Run, start_step: int = 0) -> Iterator[Batch]:
    work = run.workload
    shape = {"batch_size": work.batch_size, "seq_len": work.seq_len}
    return tasks.batches(run.data, **shape, seed=run.seed, start_step=start_step)


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    work = run.workload

    def look(step: int) -> Iterator[Sample]:
        whole, single = accuracies(run, engine, work.seq_len)
        yield sample("accuracy", whole, at=step)
        yield sample("token_accuracy", single, at=step)

    def is_enough(curve: list[Sample]) -> bool:
        return work.stops_when_learned and is_learned(curve)

    curve = yield from train.train(run, engine, partial(batches, run), look, is_enough)
    for level in LEVELS if curve else ():
        yield _null("num_steps_to_accuracy", first_step(curve, level / 100), at=level)
    phase("evaluate")
    yield sample("num_examples", work.num_examples)
    held = []
    for number, seq_len in enumerate(work.evaluated_seq_lens, start=1):
        found = accuracies(run, engine, seq_len) if _fits(run, engine, seq_len) else (None, None)
        held.append(found[0])
        for metric, value in zip(("accuracy", "token_accuracy"), found, strict=True):
            yield _null(f"{metric}_by_length", value, at=seq_len)
        progress(number, len(work.evaluated_seq_lens))
        checkpoint.save_if_due(engine, curve[-1].at if curve else 0, curve, [])
    if held:
        mean = None if None in held else float(np.mean(held))
        yield _null("accuracy_over_lengths", mean)
    if (memory := peak_memory_bytes(engine)) is not None:
        yield sample("peak_memory_bytes", memory)


def is_learned(curve: list[Sample]) -> bool:
    """Whether the last looks all found every answer right."""
    found = [one.value for one in curve if one.metric == "accuracy"]
    return len(found) >= LOOKS_LEARNED and min(found[-LOOKS_LEARNED:]) == 1


def first_step(curve: list[Sample], level: float) -> int | None:
    """The first look at which so many answers were right; None where none was."""
    reached = (one.at for one in curve if one.metric == "accuracy" and one.value >= level)
    return next(reached, None)


def accuracies(run: Run, engine: Engine, seq_len: int) -> tuple[float, float]:
    """Of whole answers and of single tokens, on the examples that are held out at this length."""
    all_ = tasks.held_out(run.data, num_examples=run.workload.num_examples, seq_len=seq_len)
    whole, single = [], []
    rows = _rows(run.workload, seq_len)
    for start in range(0, len(all_.tokens_BT), rows):
        part = slice(start, start + rows)
        batch = Batch(all_.tokens_BT[part], all_.targets_BT[part], all_.position_BT[part])
        is_scored_BT = batch.targets_BT != IGNORED
        is_right_BT = engine.logits(batch).argmax(axis=-1) == batch.targets_BT
        whole.append((is_right_BT | ~is_scored_BT).all(axis=1))
        single.append(is_right_BT[is_scored_BT])
    return float(np.concatenate(whole).mean()), float(np.concatenate(single).mean())


def _rows(work: Workload, seq_len: int) -> int:
    """Examples at a time: as many tokens as a step of training has, and one at least."""
    return min(max(1, work.batch_size * work.seq_len // seq_len), work.num_examples)


def _fits(run: Run, engine: Engine, seq_len: int) -> bool:
    """Whether this machine has the memory that examples of this length are predicted to need.
    Plain attention keeps scores of every pair of positions, before and after their softmax."""
    available = available_memory_bytes(engine)
    rows, model = _rows(run.workload, seq_len), run.model
    needed = cost.inference_memory_bytes(
        model, batch_size=rows, prompt_len=seq_len, capacity=seq_len, dtype=run.dtype
    )
    needed += 4 * rows * seq_len * model.vocab_size
    if engine.resolved_kernels["attention"] == "plain" and "mqa" in model.layer_mixers:
        needed += 2 * 4 * rows * model.num_heads * seq_len**2
    return available is None or needed < available


def _null(metric: str, value: float | None, at: int | None = None) -> Sample:
    """A sample that has a value, or is known to have none."""
    return Sample(metric=metric, value=value, unit=METRICS[metric].unit, at=at)
