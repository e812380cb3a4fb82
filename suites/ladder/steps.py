"""L5 (in bfloat16 L7): some optimizer steps from the same parameters on the same batches."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from implementations import reference
from implementations.engine import Batch, Engine
from suites.harness.run import Run
from suites.ladder.check import Check
from suites.ladder.model import moved_parameters, packed_batches


def checks(run: Run, engine: Engine) -> Iterator[Check]:
    batches = list(islice(packed_batches(run), run.workload.num_steps + 1))
    if run.dtype == "bfloat16":
        yield _after_a_step(run, engine, batches[0])
        return
    yield from _steps(run, engine, batches[:-1])
    if run.dtype == "float64":
        yield from _steps_otherwise(run, engine, batches)


def _steps(run: Run, engine: Engine, batches: list[Batch]) -> Iterator[Check]:
    """The loss before each step, and what every parameter has moved by at the end."""
    start, checkpointing = moved_parameters(run), run.workload.activation_checkpointing
    engine.load_parameters(start)
    engine.start_training(run.optimizer, activation_checkpointing=checkpointing)
    losses = [float(engine.train_step(batch)) for batch in batches]
    true_losses, true_after = reference.train(run.model, start, batches, run.optimizer)
    yield Check("L5/train_loss", np.array(losses), np.array(true_losses))
    yield from _moved("L5/steps", start, engine.parameters(), true_after)


def _steps_otherwise(run: Run, engine: Engine, batches: list[Batch]) -> Iterator[Check]:
    """With what the steps above leave out: a warm-up of two steps, gradients too small to be
    clipped, layers computed again in the backward pass, and a state that is written and read."""
    optimizer = replace(
        run.optimizer, num_warmup_steps=2, num_steps=len(batches) + 1, clip_norm=1e3
    )
    start, checkpointing = moved_parameters(run), not run.workload.activation_checkpointing
    engine.load_parameters(start)
    engine.start_training(optimizer, activation_checkpointing=checkpointing)
    for batch in batches[:2]:
        engine.train_step(batch)
    state = engine.training_state()
    engine.load_parameters(start)
    engine.start_training(optimizer, activation_checkpointing=checkpointing)
    engine.load_training_state(state)
    for batch in batches[2:]:
        engine.train_step(batch)
    _, true_after = reference.train(run.model, start, batches, optimizer)
    yield from _moved("L5/steps otherwise", start, engine.parameters(), true_after)


def _moved(kind: str, start: dict, after: dict, true_after: dict) -> Iterator[Check]:
    for name, value in true_after.items():
        moved = after[name] - start[name] if name in after else None
        yield Check(f"{kind}/{name}", moved, value - start[name])


def _after_a_step(run: Run, engine: Engine, batch: Batch) -> Check:
    """A gradient that is wrong by 3e-2 moves some parameters by half as much again; but what is
    computed after a step must be of the new ones, float32, and not of a rounded copy of the old."""
    engine.load_parameters(moved_parameters(run))
    engine.evaluate(batch)
    optimizer = replace(run.optimizer, learning_rate=0.05)  # so far that it shows
    engine.start_training(optimizer)
    engine.train_step(batch)
    true_BT = reference.evaluate(run.model, engine.parameters(), batch)
    return Check("L7/evaluate after a step", engine.evaluate(batch), true_BT)
