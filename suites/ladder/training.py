"""L5 and L6 on real text: a few hundred steps beside their float64 truth, and final losses.

Two trainings that differ by rounding alone drift apart: each step answers the difference of the one
before. What is right is therefore not a fixed tolerance but what rounding itself makes of the
truth. A twin of the float64 training is disturbed as float32 would be, and only so: its gradients
by the noise that tolerances.yaml measured of float32 ones, its parameters by rounding after every
step. A backend may be `growth` times as far from the truth as the twin has been so far.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from implementations import parameters, reference
from implementations.engine import Batch, Engine, Unsupported
from suites import language_modeling
from suites.harness import data, stop
from suites.harness.measure import InvalidMeasurement, phase, progress, sample
from suites.harness.record import Sample
from suites.harness.run import Run
from suites.ladder.check import Check, Error, error_of, kind_of, samples, section, tolerances

MARKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # steps at which every parameter is compared
EPS = float(np.finfo(np.float32).eps)


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    (level,) = run.workload.levels
    if level == "L6":  # what a seed ends at; two backends are compared in suites/reports.py
        yield from language_modeling.measure(run, engine)
    else:
        yield from compare_steps(run, engine)


def compare_steps(run: Run, engine: Engine) -> Iterator[Sample]:
    """Loss of every step and, at MARKS, every parameter: ours beside the truth's and the twin's."""
    if run.dtype != "float32":
        raise Unsupported(f"level L5 compares float32 trainings, not dtype={run.dtype}.")
    work = run.workload
    shape = {"batch_size": work.batch_size, "seq_len": work.seq_len}
    stream = data.batches(data.open_corpus(run.data), **shape, seed=run.seed)
    batches = list(islice(stream, work.num_steps))
    start = parameters.draw(run.model, run.seed)

    phase("measure")
    ours = list(_ours(run, engine, batches, start))
    phase("evaluate")
    true, twin = (_true(run, batches, start, is_disturbed=flag) for flag in (False, True))
    growth = tolerances()["training"]["growth"]
    envelopes: dict[str, Error] = {}
    red = []
    for step, (mine, truth, other) in enumerate(zip(ours, true, twin, strict=True), start=1):
        yield sample("train_loss", mine[0], at=step)
        yield sample("train_loss", truth[0], at=step, field="float64")
        yield sample("train_loss", other[0], at=step, field="float64, rounded")
        for check, noise in _pairs(start, mine, truth, other):
            envelope = envelopes[check.field] = _widened(envelopes.get(check.field), noise)
            error = check.error
            limit = Error(growth * envelope.largest, growth * envelope.rms)
            yield from samples(check, error, limit, at=step)
            if error.exceeds(limit):
                red.append((step, check.field, error, limit))
        progress(step, work.num_steps)
    if red:
        step, field, error, limit = red[0]
        raise InvalidMeasurement(
            f"{field} after step {step}: {error.largest:.2g} (RMS {error.rms:.2g}) from the truth, "
            f"{growth:g} times rounding allows {limit.largest:.2g} ({limit.rms:.2g})."
        )


def _ours(
    run: Run, engine: Engine, batches: list[Batch], start: dict[str, np.ndarray]
) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
    """(loss before the step, parameters after it where they are compared)."""
    engine.load_parameters(start)
    checkpointing = run.workload.activation_checkpointing
    engine.start_training(run.optimizer, activation_checkpointing=checkpointing)
    for step, batch in enumerate(batches, start=1):
        stop.check()
        loss = float(engine.train_step(batch))
        is_mark = step in MARKS or step == len(batches)
        yield loss, engine.parameters() if is_mark else {}


def _true(
    run: Run, batches: list[Batch], start: dict[str, np.ndarray], *, is_disturbed: bool
) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
    """(loss before the step, parameters after it) in float64, or of the twin."""
    rng = np.random.default_rng([run.seed, 4])
    noise = section(run, "float32")
    params = {name: value.astype(np.float64) for name, value in start.items()}
    zeros = {name: np.zeros_like(value) for name, value in params.items()}
    moments = (zeros, zeros)
    for step, batch in enumerate(batches):
        stop.check()
        loss, grads = reference.loss_and_grad(run.model, params, batch)
        if is_disturbed:
            for name, grad in grads.items():
                scale = noise[kind_of(f"L4/grad/{name}")]["measured_rms"] * np.sqrt(
                    np.mean(grad**2)
                )
                grads[name] = grad + scale * rng.standard_normal(grad.shape)
        params, moments = reference.adamw(run.model, run.optimizer, step, params, grads, moments)
        if is_disturbed:
            params = {n: value.astype(np.float32).astype(float) for n, value in params.items()}
        yield loss, params


def _pairs(start: dict, mine: tuple, truth: tuple, twin: tuple) -> Iterator:
    """(a check of ours, the twin's error of the same field): the loss, and where they were read
    the parameters."""
    loss = np.array(truth[0])
    yield Check("L5/train_loss", np.array(mine[0]), loss), error_of(np.array(twin[0]), loss)
    for name, first in start.items() if mine[1] else ():
        moved, also = truth[1][name] - first, twin[1][name] - first
        ours = mine[1][name] - first if name in mine[1] else None
        yield Check(f"L5/steps/{name}", ours, moved), error_of(also, moved)


def _widened(envelope: Error | None, noise: Error) -> Error:
    """The farthest that the twin has been so far; of a single number never under a float32 unit."""
    before = envelope or Error(EPS, EPS)
    return Error(max(before.largest, noise.largest), max(before.rms, noise.rms))
