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
KERNELS = Kernels(linear_scan="triton", attention="triton", layers="triton")


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
    """A small model of the family against the equations in float64: loss, gradients, and logits of
    a prompt of 40 tokens, then of one token after another; past its window. In bfloat16 the errors
    are also divided by 4: those of its layers add up."""
    config = model_config("tiny", case.shape["family"])
    batch, prompt_len, T = batch_of(config, 2, 97), 40, 60
    engine = engine_of(config, case.dtype, kernels, device_kind)
    values = engine.parameters()
    loss, grads = engine.loss_and_grad(batch)
    true_loss, true_grads = reference.loss_and_grad(config, values, batch)
    tokens_BT, position_BT = batch.tokens_BT[:, :T], batch.position_BT[:, :T]
    true_BTV = reference.logits(config, values, tokens_BT, position_BT)
    cache, pieces = engine.empty_cache(2, capacity=T), []
    for start, stop in pairwise([0, *range(prompt_len, T + 1)]):
        logits_BTV, cache = engine.extend(tokens_BT[:, start:stop], cache)
        pieces.append(logits_BTV)
    pairs = [(np.concatenate(pieces, 1), true_BTV), (np.array(loss), np.array(true_loss))]
    pairs += [(grads[name], true_grads[name]) for name in true_grads]
    errors = [
        np.linalg.norm(found - true) / max(np.linalg.norm(true), 1e-30) for found, true in pairs
    ]
    worst = float(np.max(errors))  # NaN if any is
    return worst / 4 if case.dtype == "bfloat16" else worst


def measured(cases: list[Case], device_kind: str) -> Iterator[tuple[Case, dict]]:
    """(case, what a row holds of it), of cases of one model: they share an engine."""
    shape = cases[0].shape
    config = model_config(shape["size"], shape["family"])
    engine = engine_of(config, cases[0].dtype, KERNELS, device_kind)
    for case in cases:
        torch.cuda.reset_peak_memory_stats()
        found = train(case, engine) if case.op == "train" else decode(case, engine)
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
