"""L0 and L4 (in bfloat16 L7): the parameter tree, and the whole model.

Packed documents longer than three windows; prefill cut at every place, decode from it. Every
parameter is first moved off its initial value, so that a bias of zero hides nothing.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, count, cycle, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from implementations import parameters, reference
from implementations.engine import IGNORED, Batch, Engine
from suites.harness.data import random_tokens
from suites.harness.run import Run
from suites.ladder.check import Check, to_bfloat16


def parameter_checks(run: Run, engine: Engine) -> Iterator[Check]:
    """L0: the drawn values, other values loaded, a file written and read: every name once."""
    drawn, moved = parameters.draw(run.model, run.seed), moved_parameters(run)
    if run.dtype == "float64":  # which float32 cannot hold
        moved = {name: value * np.float64(1 + 1e-9) for name, value in moved.items()}
    yield from _same("drawn", engine.parameters(), drawn)
    engine.load_parameters(moved)
    yield from _same("loaded", engine.parameters(), moved)
    if engine.parameters().keys() == moved.keys():  # else the file could not be read
        with TemporaryDirectory() as folder:
            path = Path(folder) / "parameters.safetensors"
            parameters.save(path, engine.parameters())
            engine.load_parameters(drawn)
            engine.load_parameters(parameters.load(path, run.model))
    yield from _same("saved", engine.parameters(), moved)


def _same(kind: str, ours: dict[str, np.ndarray], true: dict[str, np.ndarray]) -> Iterator[Check]:
    for name, value in true.items():
        yield Check(f"L0/{kind}/{name}", ours.get(name), value)
    extra = [name for name in ours if name not in true]
    yield Check(f"L0/{kind}", np.array(len(extra)), np.array(0), ", ".join(extra[:3]))


def checks(run: Run, engine: Engine) -> Iterator[Check]:
    """L4; the engine holds moved_parameters(run) after it."""
    level = "L7" if run.dtype == "bfloat16" else "L4"
    model, start = run.model, moved_parameters(run)
    batch = next(packed_batches(run))
    # What does not depend on kernels is left out where they are chosen.
    is_whole = not run.kernels.chosen
    if is_whole:
        engine.load_parameters(parameters.draw(model, run.seed + 1))
        engine.logits(batch)  # of other values: a copy that is kept of them must not outlive them
    engine.load_parameters(start)

    ours, true = engine.activations(batch), reference.activations(model, start, batch)
    for path, value in true.items():
        yield Check(f"{level}/activations/{path}", ours.get(path), value)
    yield Check(f"{level}/logits", engine.logits(batch), true["logits"])
    if is_whole:
        nll_BT = reference.cross_entropy(true["logits"], batch.targets_BT)
        yield Check(f"{level}/evaluate", engine.evaluate(batch), nll_BT)

    loss, grads = engine.loss_and_grad(batch)
    true_loss, true_grads = reference.loss_and_grad(model, start, batch)
    yield Check(f"{level}/loss", np.array(loss), np.array(true_loss))
    for name, grad in reversed(true_grads.items()):  # as the backward pass comes by them
        yield Check(f"{level}/grad/{name}", grads.get(name), grad)

    if is_whole:  # one alone is as many packed
        yield from document_checks(run, engine)
    document = one_document(batch)
    logits_BTV = reference.logits(model, start, document.tokens_BT, document.position_BT)
    is_eager = engine.resolved_kernels["program"] == "eager" and not run.kernels.chosen
    plans = chunk_plans(run, is_eager=is_eager)
    extended = (
        Check("", _extended(engine, batch.tokens_BT, stops), logits_BTV, f"cut at {stops[0]}")
        for stops in plans
    )
    found = max(extended, key=lambda check: max(check.error.largest, check.error.rms))
    yield replace(found, field=f"{level}/prefill in chunks")
    yield from _decode_checks(run, engine, batch.tokens_BT, level)


def document_checks(run: Run, engine: Engine) -> Iterator[Check]:
    """One document a row, whole, and token by token after its first window: what every
    implementation can compute, another's too."""
    level = "L7" if run.dtype == "bfloat16" else "L4"
    model, start = run.model, moved_parameters(run)
    engine.load_parameters(start)
    document = one_document(next(packed_batches(run)))
    tokens_BT = document.tokens_BT
    logits_BTV = reference.logits(model, start, tokens_BT, document.position_BT)
    yield Check(f"{level}/one document/logits", engine.logits(document), logits_BTV)
    loss, grads = engine.loss_and_grad(document)
    true_loss, true_grads = reference.loss_and_grad(model, start, document)
    yield Check(f"{level}/one document/loss", np.array(loss), np.array(true_loss))
    for name, grad in reversed(true_grads.items()):
        yield Check(f"{level}/one document/grad/{name}", grads.get(name), grad)
    ours = _extended(engine, tokens_BT, tuple(_one_by_one(run, _window(run) + 1)))
    yield Check(f"{level}/one document/token by token", ours, logits_BTV)


def one_document(batch: Batch) -> Batch:
    """The same tokens and targets, positions counted through."""
    position_BT = np.broadcast_to(np.arange(batch.tokens_BT.shape[1]), batch.tokens_BT.shape)
    return replace(batch, position_BT=position_BT.astype(np.int32))


def _window(run: Run) -> int:
    """Of local attention; of other mixers a length to cut by."""
    T = run.workload.seq_len
    return min(run.model.num_visible_keys or T // 4, (T - 1) // 2)


def chunk_plans(run: Run, *, is_eager: bool) -> Iterator[tuple[int, ...]]:
    """Where a prompt is cut. Each of 1, W - 1, W, W + 1, 2 W + 1 and all of the last positions,
    in pieces of four lengths, as each length is compiled; where none is, also in two everywhere.
    In bfloat16 of two lengths: where states go wrong is seen in the other dtypes; and with other
    kernels than `auto`, whose states are those of the ops."""
    T = run.workload.seq_len
    W = _window(run)
    plans = ((1, W, W), (W - 1, 1, W + 1), (W, 1, W), (W + 1, W))
    is_short = run.dtype == "bfloat16" or run.kernels.chosen
    for lengths in ((1, W + 1, W + 1),) if is_short else plans:
        stops = tuple(stop for stop in accumulate(lengths) if 0 < stop < T)
        yield *stops, *_one_by_one(run, stops[-1] + 1)
    if is_eager:
        yield from ((stop,) for stop in range(1, T))


def _one_by_one(run: Run, start: int) -> range:
    """Cuts after every token from there on; where kernels are interpreted, after the last ones."""
    T = run.workload.seq_len
    return range(max(start, T - 8) if run.kernels.interpret else start, T)


def _extended(engine: Engine, tokens_BT: np.ndarray, stops: tuple[int, ...]) -> np.ndarray:
    """Logits of a prompt that is cut at `stops`."""
    B, T = tokens_BT.shape
    cache, parts = engine.empty_cache(B, capacity=T), []
    for start, stop in pairwise((0, *stops, T)):
        logits_BTV, cache = engine.extend(tokens_BT[:, start:stop], cache)
        parts.append(logits_BTV)
    return np.concatenate(parts, axis=1)


def _decode_checks(run: Run, engine: Engine, tokens_BT: np.ndarray, level: str) -> Iterator[Check]:
    """Near a tie two tokens are right: the true logit of the token chosen, beside the highest. And
    the logits that follow on the cache of the last one: tokens alone may repeat whatever it is."""
    work, model = run.workload, run.model
    prompt_BT = tokens_BT[:, : work.prompt_len]
    chunk_len = -(-work.prompt_len // 2)
    token_B, cache = engine.prefill(prompt_BT, capacity=work.seq_len, chunk_len=chunk_len)
    first_B = engine.to_numpy(token_B)  # decode may use its inputs up
    decoded_BT, cache = engine.decode(token_B, cache, num_tokens=work.num_new_tokens - 1)
    decoded_BT = np.concatenate([first_B[:, None], engine.to_numpy(decoded_BT)], axis=1)
    decoded_BT = decoded_BT.astype(np.int64)
    is_token = (decoded_BT >= 0) & (decoded_BT < model.vocab_size)
    tokens_BT = np.concatenate([prompt_BT, np.where(is_token, decoded_BT, 0)], axis=1)
    after_BTV, _ = engine.extend(tokens_BT[:, -1:].astype(np.int32), cache)
    position_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    logits_BTV = reference.logits(model, moved_parameters(run), tokens_BT, position_BT)
    choosing_BTV = logits_BTV[:, work.prompt_len - 1 : -1]  # token t is chosen by logits t
    chosen_BT = np.take_along_axis(choosing_BTV, tokens_BT[:, work.prompt_len :, None], axis=-1)
    chosen_BT = np.where(is_token, chosen_BT[..., 0], np.nan)
    yield Check(f"{level}/decode", chosen_BT, choosing_BTV.max(-1))
    yield Check(f"{level}/after decode", after_BTV, logits_BTV[:, -1:])


def moved_parameters(run: Run) -> dict[str, np.ndarray]:
    """The initial values, float32; those that start at 0 are drawn, with deviation 0.1. For a
    bfloat16 run, values that bfloat16 can hold: its error is then its arithmetic's alone."""
    rng = np.random.default_rng([run.seed, 1])
    values = parameters.draw(run.model, run.seed)
    for spec in parameters.param_specs(run.model):
        if spec.init == "zeros":
            values[spec.name] = 0.1 * rng.standard_normal(spec.shape).astype(np.float32)
    if run.dtype != "bfloat16":
        return values
    return {n: v if parameters.is_exact(n) else to_bfloat16(v) for n, v in values.items()}


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
