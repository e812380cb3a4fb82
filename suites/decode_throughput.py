"""Decode throughput: tokens per second as the batch grows, and the largest batch that fits.

Question: how many readers can one device serve, when every one of them costs a cache? The batch
is doubled from batch_size until max_batch_size, or until memory stops it: an out-of-memory met
by this search, or foreseen by it, is its result and not a failure.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

from implementations import cost
from implementations.engine import Engine, OptimizerConfig
from suites.decode_latency import mean_decode_bytes, timed_decode
from suites.harness import data
from suites.harness.measure import (
    OutOfMemoryPredicted,
    available_memory_bytes,
    is_out_of_memory,
    peak,
    peak_memory_bytes,
    phase,
    progress,
    sample,
)
from suites.harness.record import Sample
from suites.harness.run import Run, Workload


@dataclass(frozen=True, kw_only=True)
class Suite:
    batch_size: int
    max_batch_size: int
    prompt_lens: tuple[int, ...]
    num_new_tokens: tuple[int, ...]
    repeats: int
    rounds: int
    until_ci: float | None
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = True
    headline: ClassVar[str] = "tokens_per_s"

    def __post_init__(self) -> None:
        if self.max_batch_size < self.batch_size:
            raise ValueError(
                f"suite.max_batch_size={self.max_batch_size} is less than "
                f"suite.batch_size={self.batch_size}, where the search starts."
            )
        for key, low in {"prompt_lens": 1, "num_new_tokens": 2}.items():
            if any(value < low for value in getattr(self, key)):
                raise ValueError(f"suite.{key}={list(getattr(self, key))}; must be at least {low}.")
        if self.repeats < 1:
            raise ValueError(f"suite.repeats={self.repeats}; must be at least 1.")

    def workloads(self) -> Iterator[Workload]:
        for prompt_len, num_new_tokens in product(self.prompt_lens, self.num_new_tokens):
            yield Workload(
                phase="decode",
                batch_size=self.batch_size,
                max_batch_size=self.max_batch_size,
                prompt_len=prompt_len,
                num_new_tokens=num_new_tokens,
                repeats=self.repeats,
            )

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        return base


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    work = run.workload
    seconds: dict[int, list[float]] = {}  # by batch size
    batch_size, stopped_by = work.batch_size, "bound"
    while batch_size <= work.max_batch_size:
        try:
            _check_memory(run, engine, batch_size)
            seconds[batch_size] = yield from _measure_batch(run, engine, batch_size)
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error) or not seconds:
                raise
            is_predicted = isinstance(error, OutOfMemoryPredicted)
            stopped_by = "out_of_memory_predicted" if is_predicted else "out_of_memory"
            break
        batch_size *= 2

    yield sample("max_batch_size", max(seconds), field=stopped_by)
    if (memory := peak_memory_bytes(engine)) is not None:
        yield sample("peak_memory_bytes", memory)
    limit = peak(engine, run.dtype)
    yield from limit.samples()
    for batch_size, times in seconds.items():
        num_bytes = mean_decode_bytes(replace(run, workload=replace(work, batch_size=batch_size)))
        for repeat, decode_s in enumerate(times):
            mbu = limit.mbu(num_bytes, decode_s / (work.num_new_tokens - 1))
            if mbu is not None:
                yield sample("mbu", mbu, repeat=repeat, at=batch_size)


def _measure_batch(run: Run, engine: Engine, batch_size: int):
    """Yields the samples of one batch size, and returns the seconds of every repeat."""
    work = run.workload
    num_steps = work.num_new_tokens - 1
    prompt_BT = data.random_tokens(
        batch_size, work.prompt_len, vocab_size=run.model.vocab_size, seed=run.seed
    )
    phase("compile")
    _, num_cache_bytes = timed_decode(engine, prompt_BT, num_steps)
    phase("measure")
    times = [timed_decode(engine, prompt_BT, num_steps)[0] for _ in range(work.repeats)]
    progress(batch_size, work.max_batch_size)
    yield sample("cache_bytes", num_cache_bytes, at=batch_size)
    for repeat, decode_s in enumerate(times):
        rate = batch_size * num_steps / decode_s
        yield sample("tokens_per_s", rate, repeat=repeat, at=batch_size)
    return times


def _check_memory(run: Run, engine: Engine, batch_size: int) -> None:
    """OutOfMemoryPredicted where the batch needs more than is available."""
    work = run.workload
    available = available_memory_bytes(engine)
    needed = cost.inference_memory_bytes(
        run.model,
        batch_size=batch_size,
        prompt_len=work.prompt_len,
        capacity=work.prompt_len + work.num_new_tokens,
        dtype=run.dtype,
    )
    if available is not None and needed > available:
        raise OutOfMemoryPredicted(
            f"batch {batch_size} needs {needed / 2**30:.2f} GiB, "
            f"{available / 2**30:.2f} GiB are available."
        )
