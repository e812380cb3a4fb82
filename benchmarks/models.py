"""Whole models: the time of a training step and of a decoded token, through the engine as it is."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from unittest import mock

import numpy as np
import torch

from benchmarks import timing
from benchmarks.cases import NUM_NEW_TOKENS, Case, model_config
from implementations import cost, parameters, reference
from implementations.config import ModelConfig
from implementations.engine import Batch, Kernels, OptimizerConfig
from implementations.torch_backend.engine import Engine

NUM_WARMUP_STEPS, REPEATS = 3, 7
LEN_PROMPT, LEN_DECODED = 40, 60  # of the small model, whose window is 32
KERNELS = Kernels(linear_scan="triton", attention="triton", layers="triton")
PLAIN = Kernels(linear_scan="analytic", attention="plain", layers="plain")


def engine_of(config: ModelConfig, dtype: str, kernels: Kernels, device_kind: str) -> Engine:
    def draw(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
        """parameters.draw on all cores: NumPy's generators hold no lock."""
        specs = parameters.param_specs(config)
        with ThreadPoolExecutor() as pool:
            drawn = pool.map(lambda spec: parameters._draw(spec, seed), specs)
            return {spec.name: value for spec, value in zip(specs, drawn, strict=True)}

    with mock.patch.object(parameters, "draw", draw):
        return Engine(config, dtype=dtype, kernels=kernels, device_kind=device_kind)


def batch_of(config: ModelConfig, B: int, T: int) -> Batch:
    return Batch.of(np.random.default_rng(0).integers(config.vocab_size, size=(B, T + 1)))


def parity(case: Case, device_kind: str, kernels: Kernels = KERNELS) -> float:
    """A small model of the family against the equations in float64: the largest relative error, in
    norm, of loss, logits and gradients, beyond 1.5 times that of the plain variants in the same
    dtype: which of two roundings of one tensor is the luckier one varies by less."""
    config = model_config("tiny", case.shape["family"])
    batch = batch_of(config, 2, 97)
    params = parameters.draw(config, 0)
    loss, grads = reference.loss_and_grad(config, params, batch)
    tokens_BT, position_BT = (x[:, :LEN_DECODED] for x in (batch.tokens_BT, batch.position_BT))
    logits_BTV = reference.logits(config, params, tokens_BT, position_BT)
    true = {"loss": np.array(loss), "logits": logits_BTV} | grads
    ours, plain = (
        errors(engine_of(config, case.dtype, choice, device_kind), batch, true)
        for choice in (kernels, PLAIN)
    )
    return float(np.max([max(ours[name] - 1.5 * plain[name], 0 * ours[name]) for name in ours]))


def errors(engine: Engine, batch: Batch, true: dict[str, np.ndarray]) -> dict[str, float]:
    """Logits are those of a prompt, then of one token after another, past the window."""
    loss, grads = engine.loss_and_grad(batch)
    cache, pieces = engine.empty_cache(len(batch.tokens_BT), capacity=LEN_DECODED), []
    for start, stop in pairwise([0, *range(LEN_PROMPT, LEN_DECODED + 1)]):
        logits_BTV, cache = engine.extend(batch.tokens_BT[:, start:stop], cache)
        pieces.append(logits_BTV)
    found = {"loss": np.array(loss), "logits": np.concatenate(pieces, 1)} | grads
    norm = np.linalg.norm
    found = {name: norm(found[name] - true[name]) / max(norm(true[name]), 1e-30) for name in true}
    return found | {"decode": decode_error(engine, batch.tokens_BT[:, :LEN_PROMPT])}


def decode_error(engine: Engine, prompt_BT: np.ndarray) -> float:
    """How far the tokens of two greedy calls, as they are timed, lie below the highest logits of
    one pass over prompt and tokens, in norm: 0 but for near ties. The second call replays a graph
    that the first one may have captured."""
    B, num_tokens = len(prompt_BT), 8
    token_B, cache = engine.prefill(prompt_BT, capacity=LEN_DECODED)
    pieces = [np.asarray(token_B.cpu())[:, None]]
    for _ in range(2):
        tokens_BT, cache = engine.decode(token_B, cache, num_tokens=num_tokens)
        token_B = tokens_BT[:, -1]
        pieces.append(tokens_BT.cpu().numpy())
    chosen_BT = np.concatenate(pieces, 1).astype(np.int32)
    all_BT = np.concatenate([prompt_BT, chosen_BT], 1)
    logits_BTV, _ = engine.extend(all_BT, engine.empty_cache(B, capacity=all_BT.shape[1]))
    logits_BTV = logits_BTV[:, prompt_BT.shape[1] - 1 : -1]
    reached_BT1 = np.take_along_axis(logits_BTV, chosen_BT[:, :, None], axis=2)
    return float(np.linalg.norm(logits_BTV.max(2, keepdims=True) - reached_BT1)
                 / np.linalg.norm(logits_BTV))  # fmt: skip


def measured(cases: list[Case], device_kind: str) -> Iterator[tuple[Case, dict | Exception]]:
    """(case, what was measured or went wrong), of cases of one model: they share an engine."""
    shape = cases[0].shape
    config = model_config(shape["size"], shape["family"])
    engine = engine_of(config, cases[0].dtype, KERNELS, device_kind)
    for case in cases:
        torch.cuda.reset_peak_memory_stats()
        try:
            found = train(case, engine) if case.op == "train" else decode(case, engine)
        except TimeoutError:
            raise
        except Exception as error:
            yield case, error
            continue
        yield case, found | {"peak_memory_bytes": torch.cuda.max_memory_allocated()}


def train(case: Case, engine: Engine) -> dict:
    B, T = case.shape["B"], case.shape["T"]
    batch = batch_of(engine.config, B, T)
    engine.start_training(OptimizerConfig(learning_rate=1e-4))
    timing.wall_ms(lambda: engine.train_step(batch), engine.synchronize, NUM_WARMUP_STEPS)
    ms = timing.wall_ms(lambda: engine.train_step(batch), engine.synchronize, REPEATS)
    if not np.isfinite(loss := float(engine.train_step(batch))):
        raise FloatingPointError(f"the loss is {loss}: not the real work")
    return {"samples": ms, "flops": cost.train_flops_per_token(engine.config, T) * B * T}


def decode(case: Case, engine: Engine) -> dict:
    """Milliseconds a token, greedy, after a prompt; the bytes are those of the context halfway."""
    B, context = case.shape["B"], case.shape["context"]
    engine._optimizer = None  # its moments are not needed any more
    prompt_BT = batch_of(engine.config, B, context).tokens_BT
    per_token = []
    for repeat in range(-1, 5):
        token_B, cache = engine.prefill(prompt_BT, capacity=context + NUM_NEW_TOKENS + 1)
        state = (token_B, cache)

        def call(state: tuple = state) -> None:
            engine.decode(*state, num_tokens=NUM_NEW_TOKENS)

        [ms] = timing.wall_ms(call, engine.synchronize, 1)
        if repeat >= 0:
            per_token.append(ms / NUM_NEW_TOKENS)
    halfway = context + NUM_NEW_TOKENS // 2
    num_bytes = cost.decode_bytes(engine.config, batch_size=B, context=halfway, dtype=case.dtype)
    return {"samples": per_token, "bytes": num_bytes}
