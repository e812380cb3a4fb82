"""The training loop of every quality suite: steps, their curve, and what ends or interrupts them.

A suite brings its batches, which depend on (seed, step) alone, and says what comes after training.
An interrupted run goes on from its checkpoint and ends bit for bit as one that was not.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np

from implementations.engine import Batch, Engine
from suites.harness import checkpoint, trained
from suites.harness.measure import Diverged, phase, progress, sample
from suites.harness.record import Sample
from suites.harness.run import Run

NUM_TRAIN_SAMPLES = 50  # points of the training curve, each the mean of the steps before it


def train(
    run: Run,
    engine: Engine,
    batches: Callable[[int], Iterator[Batch]],
    probe: Callable[[int], Iterable[Sample]] | None = None,
    is_enough: Callable[[list[Sample]], bool] = lambda curve: False,
) -> Generator[Sample, None, list[Sample]]:
    """Trains for run.workload.num_steps, or until the curve is_enough, on batches(first step, from
    0). Yields the training curve and, at each of its points, what probe(steps done) has to say;
    returns all of them. A run that starts from a checkpoint has been trained: it has no curve."""
    work = run.workload
    if run.checkpoint is not None:
        trained.load(run, engine)
        return []
    engine.start_training(run.optimizer, activation_checkpointing=work.activation_checkpointing)
    done, curve, pending = checkpoint.resume(engine)  # pending: losses still on the device
    yield from curve

    phase("compile")
    interval = max(1, work.num_steps // NUM_TRAIN_SAMPLES)
    loss = next((point.value for point in reversed(curve) if point.metric == "train_loss"), None)
    for step, batch in zip(range(done + 1, work.num_steps + 1), batches(done), strict=False):
        if is_enough(curve):
            break
        pending.append(engine.train_step(batch))
        if step == done + 1:
            engine.synchronize()
            phase("measure")
        if step % interval == 0 or step == work.num_steps:
            first = step - len(pending) + 1
            losses = [
                finite(float(loss), f"training step {number}")
                for number, loss in enumerate(pending, start=first)
            ]
            loss = float(np.mean(losses))
            point = [sample("train_loss", loss, at=step)]
            point += probe(step) if probe else []
            curve += point
            yield from point
            pending = []
        progress(step, work.num_steps, loss)
        checkpoint.save_if_due(engine, step, curve, pending)
    checkpoint.keep_parameters(engine)
    return curve


def scored(
    run: Run,
    engine: Engine,
    batches: Iterable[Any],
    num_batches: int,
    curve: list[Sample],
    score: Callable[[Batch], np.ndarray] | None = None,
) -> Iterator[tuple[Any, np.ndarray]]:
    """(batch, nats of each target [B, T], float64) of held-out batches, after training: as the
    engine scores them, or `score`. A batch may be the first of a tuple, and `curve` is what train()
    returned."""
    score = engine.evaluate if score is None else score
    phase("evaluate")
    for number, batch in enumerate(batches, start=1):
        nll_BT = score(batch[0] if isinstance(batch, tuple) else batch)
        yield batch, np.asarray(nll_BT, np.float64)
        progress(number, num_batches)
        checkpoint.save_if_due(engine, run.workload.num_steps, curve, [])


def finite(loss: float, where: str) -> float:
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at {where}.")
    return loss
