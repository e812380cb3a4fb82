"""Who guards the truth: finite differences, and definitions said a second time.

Both backends are held to reference.py; a fault there, or below it, would make them wrong alike. Its
values stand beside an implementation of others (model.document_checks). Its gradients stand here
beside differences of its own loss, along one random direction for every kind of parameter; and what
no gradient knows, initial values, decay and the order of mixers, beside the paper's words.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from implementations import parameters, reference
from implementations.config import GATES
from implementations.engine import IGNORED, Engine
from suites.harness.run import Run
from suites.ladder.check import Check, kind_of
from suites.ladder.model import moved_parameters, packed_batches

SEQ_LEN = 48  # longer than a window of tiny
MAX_DEVIATIONS = 6.0  # of a sample's width from its distribution's: once in 10^9
STEP = 1e-3  # of a central difference of fourth order, along a direction of norm 1


def checks(run: Run, engine: Engine) -> Iterator[Check]:
    """In float64 runs alone: the truth is one for all dtypes."""
    if run.dtype == "float64":
        yield from definitions(run)
        yield from differences(run)


def definitions(run: Run) -> Iterator[Check]:
    """L0: what both backends take from the floor as it is (arXiv:2402.19427, sections 2 to 4)."""
    model = run.model
    mixers = [model.pattern[index % len(model.pattern)] for index in range(model.num_layers)]
    wrong = sum(a != b for a, b in zip(mixers, model.layer_mixers, strict=True))
    yield Check("L0/mixers", np.array(wrong), np.array(0))
    specs = parameters.param_specs(model)
    is_linear = [".linear_" in spec.name and spec.name.endswith(".weight") for spec in specs]
    wrong = sum(spec.decayed != linear for spec, linear in zip(specs, is_linear, strict=True))
    yield Check("L0/decayed", np.array(wrong), np.array(0))

    gain = {
        "linear_out": 2 / model.num_layers,
        "linear_down": 2 / model.num_layers,
        "conv_1d": 0.01,
    }
    pools: dict[str, list[np.ndarray]] = {}
    for name, value in parameters.draw(model, run.seed).items():
        *_, module, leaf = name.split(".")
        if leaf == "weight":
            num_in = {"embedding": value.shape[-1]}.get(module, value.shape[-2])
            scale = np.sqrt(gain.get(module, 1.0) / num_in)
            pools.setdefault(kind_of(f"L0/{name}"), []).append((value / scale).ravel())
        elif leaf == "a_param" and model.gate == "mamba":
            one = np.full_like(value, np.log(np.expm1(1.0)))
            yield Check(f"L0/initial/{name}", value, one)
        elif leaf == "a_param":
            is_paper = model.lambda_init == "paper"
            power = model.decay_exponent if is_paper else 2
            a = np.exp(-power * np.logaddexp(0, value.astype(np.float64)))
            low, high = (0.9, 0.999) if is_paper else (0.9**2, 0.999**2)
            pools.setdefault(kind_of(f"L0/{name}"), []).append(_unit(a, low, high))
        elif leaf == "theta":
            pools.setdefault(kind_of(f"L0/{name}"), []).append(_unit(value, 0.0, 0.1 * np.pi))
        elif module == "a_gate" and GATES[model.gate].has_time_step:
            step = np.log(np.logaddexp(0, value.astype(np.float64)))
            unit = _unit(step, np.log(0.001), np.log(0.1))
            pools.setdefault(kind_of(f"L0/{name}"), []).append(unit)
        else:
            yield Check(f"L0/initial/{name}", value, np.zeros_like(value))
    for kind, values in pools.items():
        squares = np.concatenate(values).astype(np.float64) ** 2
        num_deviations = (np.sqrt(squares.mean()) - 1) * np.sqrt(2 * squares.size)
        too_many = max(abs(num_deviations) - MAX_DEVIATIONS, 0.0)
        yield Check(f"L0/initial/{kind}", np.array(too_many), np.array(0.0))


def _unit(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Of deviation 1 about 0, where it is uniform between the two."""
    return ((value - low) / (high - low) - 0.5) * np.sqrt(12)


def differences(run: Run) -> Iterator[Check]:
    work = replace(run.workload, seq_len=min(run.workload.seq_len, SEQ_LEN))
    batch = next(packed_batches(replace(run, workload=work)))
    start = {name: value.astype(np.float64) for name, value in moved_parameters(run).items()}
    _, grads = reference.loss_and_grad(run.model, start, batch)
    rng = np.random.default_rng([run.seed, 5])
    kinds: dict[str, dict[str, np.ndarray]] = {}
    for name, value in start.items():
        kinds.setdefault(kind_of(f"truth/{name}"), {})[name] = rng.standard_normal(value.shape)
    for kind, direction in kinds.items():
        norm = np.sqrt(sum(np.sum(value**2) for value in direction.values()))
        direction = {name: value / norm for name, value in direction.items()}
        losses = {}
        for step in (-2, -1, 1, 2):
            moved = {n: start[n] + step * STEP * value for n, value in direction.items()}
            nll_BT = reference.evaluate(run.model, start | moved, batch)
            losses[step] = nll_BT.sum() / np.count_nonzero(batch.targets_BT != IGNORED)
        true = (8 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])) / (12 * STEP)
        slope = sum(np.sum(grads[name] * value) for name, value in direction.items())
        size = np.sqrt(sum(np.sum(grads[name] ** 2) for name in direction))
        # relative to the gradient: a direction may happen to be level
        yield Check(
            f"truth/differences/{kind}", np.array(1 + (slope - true) / (size or 1.0)), np.array(1.0)
        )
