"""Parity: does a backend compute what the equations say, to the precision of its dtype?

One run holds one backend and compares it with the float64 truth of implementations/reference.py:
logits, loss and every gradient on packed documents longer than three windows, three AdamW steps,
and prefill in chunks plus decode against one forward pass. Every parameter is first moved off its
initial value, so that a bias of zero hides nothing. Where AERIE_TENSORS names a file, the tensors
are written there; two such files, of two backends, are compared by compare_tensors.

An error is the largest difference over the largest true value of the same tensor.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import count, cycle, islice, pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np

from implementations import parameters, reference
from implementations.engine import IGNORED, Batch, Engine, OptimizerConfig
from suites.harness.data import random_tokens
from suites.harness.measure import InvalidMeasurement, phase, progress, sample
from suites.harness.record import Sample
from suites.harness.run import Run, Workload

TENSORS_VARIABLE = "AERIE_TENSORS"

# Near the size of the gradients of `tiny` once their norm is clipped to 1. With 1e-8 the first
# steps of AdamW are the signs of the gradients, and an element whose gradient is rounding noise
# moves as far as any other: float32 was then 2e-2 from the truth after three steps.
EPS = 1e-3

# By dtype and pattern of the field, the first that fits. float32 and float64 are what the project
# promises; measured (`tiny`, 4 families, 2 backends, seeds 0 to 3): float32 logits 1.4e-6 and
# gradients 3.6e-6, float64 3e-15 and 7e-14. What is wider, and why (measured, at most):
# - evaluate is float32 in every engine, and so is JAX's learning rate: float64 steps 1.9e-8 (torch
#   4e-13), and the losses after them 1.1e-10;
# - steps are what the parameters moved by: 2.1e-5 in float32, beyond the rounding of the parameters
#   themselves, of which up to 0.6 of what tolerances() allows for it was seen;
# - bfloat16 has 8 bits, so every product of six layers is rounded by 4e-3: logits 3e-2, one
#   gradient 6e-2; steps, which divide a gradient by its own size, 0.4; means of many losses 7e-4.
TOLERANCE = {
    "float64": {"evaluate": 1e-6, "steps/*": 1e-6, "train_loss": 1e-8, "*": 1e-11},
    "float32": {"steps/*": 1e-4, "*": 1e-5},
    "bfloat16": {
        "parameters/*": 1e-11,
        "grad/*": 0.15,
        "steps/*": 0.8,
        "*loss": 3e-3,
        "evaluate": 3e-2,
        "*": 6e-2,
    },
}


@dataclass(frozen=True, kw_only=True)
class Suite:
    batch_size: int
    seq_lens: tuple[int, ...]
    num_new_tokens: int
    num_steps: int
    activation_checkpointing: bool
    rounds: int
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        least = {"num_steps": 1, "num_new_tokens": 2}
        for key, low in least.items():
            if getattr(self, key) < low:
                raise ValueError(f"suite.{key}={getattr(self, key)}; must be at least {low}.")
        if any(seq_len <= self.num_new_tokens for seq_len in self.seq_lens):
            raise ValueError(
                f"suite.seq_lens={list(self.seq_lens)}: every length must exceed "
                f"suite.num_new_tokens={self.num_new_tokens}."
            )

    def workloads(self) -> Iterator[Workload]:
        for seq_len in self.seq_lens:
            yield Workload(
                phase="evaluate",
                batch_size=self.batch_size,
                seq_len=seq_len,
                prompt_len=seq_len - self.num_new_tokens,
                num_new_tokens=self.num_new_tokens,
                num_steps=self.num_steps,
                activation_checkpointing=self.activation_checkpointing,
            )

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        """Warm-up and the cosine, both within the steps compared; and EPS."""
        return replace(base, num_warmup_steps=1, num_steps=workload.num_steps + 1, eps=EPS)


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    phase("measure")
    ours = tensors(run, engine)
    if path := os.environ.get(TENSORS_VARIABLE):
        save(Path(path), ours)
    progress(1, 2)
    phase("evaluate")
    true = truth(run, ours["decode"])
    found = errors(ours, true)
    progress(2, 2)

    red = []  # (error over tolerance, field, what is wrong)
    limits = tolerances(run, true)
    for field, error in found.items():
        limit = limits[field]
        yield sample("tolerance", limit, field=field)
        if np.isfinite(error):
            yield sample("relative_error", error, field=field)
            if error > limit:
                red.append((error / limit, field, f"relative error {error:.2g} > {limit:.2g}"))
        else:
            red.append((np.inf, field, "not finite, or not of the right shape"))
    if red:
        _, field, wrong = max(red)
        raise InvalidMeasurement(
            f"{field}: {wrong} in {run.dtype}; {len(red)} of {len(found)} fields are red."
        )


def tolerances(run: Run, true: dict[str, np.ndarray]) -> dict[str, float]:
    """By field: TOLERANCE; of `steps`, more by what the parameters' own dtype cannot resolve of the
    true ones (of its own, a backend that hardly moves would be allowed anything).

    A parameter p that moves by d is rounded after each step, by at most eps / 2 |p|: for a_param,
    near 5 and moving by 3e-4, that is 3e-3 of d after three steps in float32.
    """
    start = moved_parameters(run)
    half_ulp = np.finfo(np.float64 if run.dtype == "float64" else np.float32).eps / 2
    found = {}
    for field, value in true.items():
        patterns = TOLERANCE[run.dtype].items()
        found[field] = next(limit for pattern, limit in patterns if fnmatch(field, pattern))
        kind, _, name = field.partition("/")
        if kind == "steps" and (moved := np.abs(value).max()) > 0:
            largest = np.abs(start[name]).max()
            found[field] += float(run.workload.num_steps * half_ulp * largest / moved)
    return found


def tensors(run: Run, engine: Engine) -> dict[str, np.ndarray]:
    """What one backend computes, by field, on the host."""
    work = run.workload
    values = {f"parameters/{name}": value for name, value in engine.parameters().items()}
    start = moved_parameters(run)
    engine.load_parameters(start)

    batch = next(packed_batches(run))
    values["logits"] = engine.logits(batch)
    values["evaluate"] = engine.evaluate(batch)
    loss, grads = engine.loss_and_grad(batch)
    values["loss"] = np.array(loss)
    values |= {f"grad/{name}": grad for name, grad in grads.items()}

    tokens_BT = batch.tokens_BT
    cache = engine.empty_cache(work.batch_size, capacity=work.seq_len)
    third = work.seq_len // 3
    parts = []
    for first, last in pairwise((0, third, third + 1, 2 * third + 1, work.seq_len)):
        logits_BTV, cache = engine.extend(tokens_BT[:, first:last], cache)
        parts.append(logits_BTV)
    values["extend"] = np.concatenate(parts, axis=1)

    prompt_BT = tokens_BT[:, : work.prompt_len]
    chunk_len = -(-work.prompt_len // 2)
    token_B, cache = engine.prefill(prompt_BT, capacity=work.seq_len, chunk_len=chunk_len)
    first_B = np.asarray(token_B).copy()  # decode may use its inputs up
    decoded_BT, _ = engine.decode(token_B, cache, num_tokens=work.num_new_tokens - 1)
    decoded_BT = np.concatenate([first_B[:, None], np.asarray(decoded_BT)], axis=1)
    values["decode"] = decoded_BT.astype(np.int32)

    engine.start_training(run.optimizer, activation_checkpointing=work.activation_checkpointing)
    batches = islice(packed_batches(run), work.num_steps)
    values["train_loss"] = np.array([float(engine.train_step(batch)) for batch in batches])
    after = engine.parameters()
    values |= {f"steps/{name}": after[name] - start[name] for name in after}
    return values


def truth(run: Run, decoded_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The same, in float64, by the equations; `decode` is the logits that choose decoded tokens."""
    work, model = run.workload, run.model
    values = {f"parameters/{n}": value for n, value in parameters.draw(model, run.seed).items()}
    start = moved_parameters(run)

    batch = next(packed_batches(run))
    values["logits"] = reference.logits(model, start, batch.tokens_BT, batch.position_BT)
    values["evaluate"] = reference.cross_entropy(values["logits"], batch.targets_BT)
    loss, grads = reference.loss_and_grad(model, start, batch)
    values["loss"] = np.array(loss)
    values |= {f"grad/{name}": grad for name, grad in grads.items()}

    position_BT = np.broadcast_to(np.arange(work.seq_len), (work.batch_size, work.seq_len))
    values["extend"] = reference.logits(model, start, batch.tokens_BT, position_BT)
    tokens_BT = np.concatenate([batch.tokens_BT[:, : work.prompt_len], decoded_BT], axis=1)
    logits_BTV = reference.logits(model, start, tokens_BT, position_BT)
    values["decode"] = logits_BTV[:, work.prompt_len - 1 : -1]

    batches = islice(packed_batches(run), work.num_steps)
    losses, after = reference.train(model, start, batches, run.optimizer)
    values["train_loss"] = np.array(losses)
    values |= {f"steps/{name}": after[name] - start[name] for name in after}
    return values


def errors(ours: dict[str, np.ndarray], true: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative error of every field; infinite where a value is not finite or a shape is another.

    `decode`: how far a decoded token lies below the largest true logit, at most.
    """
    fields = [field for field in true if field != "decode"]
    found = {field: relative_error(ours.get(field), true[field]) for field in fields}
    tokens_BT, logits_BTV = ours["decode"], true["decode"]  # token t is chosen by logits t
    if tokens_BT.min() < 0 or tokens_BT.max() >= logits_BTV.shape[-1]:
        return found | {"decode": float("inf")}
    chosen_BT1 = np.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)
    below_BT1 = logits_BTV.max(-1, keepdims=True) - chosen_BT1
    return found | {"decode": float(below_BT1.max() / np.abs(logits_BTV).max())}


def compare_tensors(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative difference of two backends by field; infinite where one of them lacks it."""
    fields = [*a, *(field for field in b if field not in a)]
    return {f: relative_error(a.get(f), b[f]) if f in b else np.inf for f in fields}


def relative_error(ours: np.ndarray | None, true: np.ndarray) -> float:
    """Largest difference over the largest true value (over 1, where all of them are 0)."""
    if ours is None or np.shape(ours) != np.shape(true):
        return float("inf")
    true = np.asarray(true, np.float64)
    difference = np.abs(np.asarray(ours, np.float64) - true).max()
    error = float(difference / (np.abs(true).max() or 1.0))
    return error if np.isfinite(error) else float("inf")


def save(path: Path, values: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # a name without .npz stays as it is
        np.savez(file, **values)


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def moved_parameters(run: Run) -> dict[str, np.ndarray]:
    """The initial values, float32; those that start at 0 are drawn, with deviation 0.1."""
    rng = np.random.default_rng([run.seed, 1])
    values = parameters.draw(run.model, run.seed)
    for spec in parameters.param_specs(run.model):
        if spec.init == "zeros":
            values[spec.name] = 0.1 * rng.standard_normal(spec.shape).astype(np.float32)
    return values


def packed_batches(run: Run) -> Iterator[Batch]:
    """Random tokens in packed documents: rows alternate between one long document with a short
    one at its end, and several that start early, the first of them one token long."""
    B, T = run.workload.batch_size, run.workload.seq_len
    starts_of_row = [(0, T - 2), (0, 1, T // 8, T // 8 + 3)]
    position_BT = np.empty((B, T), np.int32)
    is_last_BT = np.zeros((B, T), bool)
    for row, starts in zip(range(B), cycle(starts_of_row), strict=False):
        for start, stop in pairwise((*starts, T)):
            position_BT[row, start:stop] = np.arange(stop - start)
            is_last_BT[row, stop - 1] = stop < T
    for number in count():
        seed = run.seed + number * 1_000_003  # another batch for every step
        tokens_BT = random_tokens(B, T + 1, vocab_size=run.model.vocab_size, seed=seed)
        batch = Batch.of(tokens_BT)
        targets_BT = np.where(is_last_BT, np.int32(IGNORED), batch.targets_BT)
        yield Batch(batch.tokens_BT, targets_BT, position_BT)
