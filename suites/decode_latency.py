"""Decode latency: seconds for n new tokens after a prompt of m, and time per token (TPOT).

Question: does a fixed-size state keep its pace where a KV cache slows down? Prefill, which ends
with the first new token, is outside the stopwatch: n new tokens are n - 1 decode steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from implementations import cost
from implementations.engine import Engine, OptimizerConfig
from suites.harness import data
from suites.harness.measure import (
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


@dataclass(frozen=True, kw_only=True)
class Suite:
    batch_sizes: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    num_new_tokens: tuple[int, ...]
    repeats: int
    rounds: int
    until_ci: float | None
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = True
    headline: ClassVar[str] = "tpot_ms"

    def __post_init__(self) -> None:
        least = {"batch_sizes": 1, "prompt_lens": 1, "num_new_tokens": 2}
        for key, low in least.items():
            if any(value < low for value in getattr(self, key)):
                raise ValueError(f"suite.{key}={list(getattr(self, key))}; must be at least {low}.")
        if self.repeats < 1:
            raise ValueError(f"suite.repeats={self.repeats}; must be at least 1.")

    def workloads(self) -> Iterator[Workload]:
        for batch_size, prompt_len, num_new_tokens in product(
            self.batch_sizes, self.prompt_lens, self.num_new_tokens
        ):
            yield Workload(
                phase="decode",
                batch_size=batch_size,
                prompt_len=prompt_len,
                num_new_tokens=num_new_tokens,
                repeats=self.repeats,
            )

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        return base


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    work = run.workload
    prompt_BT = data.random_tokens(
        work.batch_size, work.prompt_len, vocab_size=run.model.vocab_size, seed=run.seed
    )
    num_steps = work.num_new_tokens - 1

    phase("compile")
    first_s, num_cache_bytes = timed_decode(engine, prompt_BT, num_steps)
    phase("measure")
    seconds = []
    for repeat in range(work.repeats):
        decode_s, _ = timed_decode(engine, prompt_BT, num_steps)
        seconds.append(decode_s)
        progress(repeat + 1, work.repeats)

    yield from compile_samples(first_s, seconds)
    yield sample("cache_bytes", num_cache_bytes)
    if (memory := peak_memory_bytes(engine)) is not None:
        yield sample("peak_memory_bytes", memory)
    limit = peak(engine, run.dtype)
    yield from limit.samples()
    num_bytes = mean_decode_bytes(run)
    for repeat, decode_s in enumerate(seconds):
        yield sample("decode_time_s", decode_s, repeat=repeat)
        yield sample("tpot_ms", decode_s / num_steps * 1e3, repeat=repeat)
        if (mbu := limit.mbu(num_bytes, decode_s / num_steps)) is not None:
            yield sample("mbu", mbu, repeat=repeat)


def timed_decode(engine: Engine, prompt_BT: np.ndarray, num_steps: int) -> tuple[float, int]:
    """Seconds of num_steps decode steps after a fresh prefill (decoding uses up its cache), and
    the bytes of that cache."""
    capacity = prompt_BT.shape[1] + num_steps + 1
    token_B, cache = engine.prefill(prompt_BT, capacity=capacity)
    num_cache_bytes = engine.num_bytes(cache)
    with stopwatch(engine.synchronize) as watch:
        engine.decode(token_B, cache, num_tokens=num_steps)
    return watch.seconds, num_cache_bytes


def mean_decode_bytes(run: Run) -> float:
    """Bytes that a decode step must move, averaged over the contexts of the run."""
    work = run.workload
    contexts = range(work.prompt_len, work.prompt_len + work.num_new_tokens - 1)
    # Linear in the context between the ends of the windows: some hundred points are enough.
    contexts = contexts[:: max(1, len(contexts) // 128)]
    moved = [
        cost.decode_bytes(run.model, batch_size=work.batch_size, context=c, dtype=run.dtype)
        for c in contexts
    ]
    return float(np.mean(moved))
