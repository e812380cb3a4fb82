"""Prefill latency: time to the first new token (TTFT), as the prompt grows.

Question: how long does a reader wait before the first word? No queue, no network: the prompt is
on the host, and the clock stops when the first new token is ready.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

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

NUM_WARMUP_CALLS = 1  # after the first; discarded


@dataclass(frozen=True, kw_only=True)
class Suite:
    prompt_lens: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    repeats: int
    rounds: int
    until_ci: float | None
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = True
    headline: ClassVar[str] = "ttft_ms"

    def __post_init__(self) -> None:
        for key in ("prompt_lens", "batch_sizes"):
            if any(value < 1 for value in getattr(self, key)):
                raise ValueError(f"suite.{key}={list(getattr(self, key))}; must be at least 1.")
        if self.repeats < 1:
            raise ValueError(f"suite.repeats={self.repeats}; must be at least 1.")

    def workloads(self) -> Iterator[Workload]:
        for batch_size, prompt_len in product(self.batch_sizes, self.prompt_lens):
            yield Workload(
                phase="prefill",
                batch_size=batch_size,
                prompt_len=prompt_len,
                num_new_tokens=1,
                repeats=self.repeats,
            )

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        return base


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    work = run.workload
    prompt_BT = data.random_tokens(
        work.batch_size, work.prompt_len, vocab_size=run.model.vocab_size, seed=run.seed
    )
    capacity = work.prompt_len + work.num_new_tokens

    phase("compile")
    first_s = None
    seconds = []
    for repeat in range(-1 - NUM_WARMUP_CALLS, work.repeats):
        with stopwatch(engine.synchronize) as watch:
            _, cache = engine.prefill(prompt_BT, capacity=capacity)
        if first_s is None:
            first_s, num_cache_bytes = watch.seconds, engine.num_bytes(cache)
            phase("measure")
        elif repeat >= 0:
            seconds.append(watch.seconds)
            progress(repeat + 1, work.repeats)
        del cache  # before the next one is allocated

    yield from compile_samples(first_s, seconds)
    yield sample("cache_bytes", num_cache_bytes)
    if (memory := peak_memory_bytes(engine)) is not None:
        yield sample("peak_memory_bytes", memory)
    limit = peak(engine, run.dtype)
    yield from limit.samples()
    flops = cost.prefill_flops(run.model, work.batch_size, work.prompt_len)
    for repeat, prefill_s in enumerate(seconds):
        yield sample("ttft_ms", prefill_s * 1e3, repeat=repeat)
    for repeat, prefill_s in enumerate(seconds):
        if (mfu := limit.mfu(flops, prefill_s)) is not None:
            yield sample("mfu", mfu, repeat=repeat)
