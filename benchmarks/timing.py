"""Times of work on a CUDA device: events, a cold L2 cache, contenders in turn, and time limits."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

MIN_ROUNDS, MAX_ROUNDS = 8, 60
# The device waits so long before each measurement (about 1 ms) that the host has launched the work
# by then: what is measured is the device, unless a contender's launches take longer than this.
HEAD_START_CYCLES = 2_000_000
FLUSH_BYTES = 2**28  # more than the L2 cache of any device: H100 50 MB, MI300X 256 MB


def in_turn(names: list[str], round: int) -> list[str]:
    """A B, B A, A B, ...: drift of clocks and temperature meets all alike."""
    return names if round % 2 == 0 else names[::-1]


def quantiles(values: list[float]) -> dict[str, float]:
    p10, median, p90 = (float(np.quantile(values, q)) for q in (0.1, 0.5, 0.9))
    return {"ms": median, "p10_ms": p10, "p90_ms": p90, "num_samples": len(values)}


def num_rounds(first_ms: list[float], seconds: float) -> int:
    """As many as fit, by what one call of each contender took."""
    return int(min(max(seconds * 1e3 / sum(first_ms), MIN_ROUNDS), MAX_ROUNDS))


class Budget:
    """The time of the whole command, of which every section may take a part."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._clock, self.end = clock, clock() + seconds
        self.section_end = self.end

    def open_section(self, limit_s: float) -> None:
        self.section_end = min(self._clock() + limit_s, self.end)

    def left_s(self) -> float:
        return self.section_end - self._clock()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the block after so long; a call into C ends first."""

    def ring(*_) -> None:
        raise TimeoutError("not measured: the section's time was over")

    if seconds <= 0:
        ring()
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def device_ms(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call on the device, several of each in turn, after two discarded."""
    import torch

    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def one(call: Callable[[], object]) -> tuple:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call()
        end.record()
        return start, end

    def finish(events: tuple) -> float:
        events[1].synchronize()
        return events[0].elapsed_time(events[1])

    first = []
    for call in calls.values():
        call()
        first.append(finish(one(call)) + 1.5)  # the flush and the head start
    names, found = list(calls), {name: [] for name in calls}
    for round in range(num_rounds(first, seconds)):
        events = {name: one(calls[name]) for name in in_turn(names, round)}
        for name, pair in events.items():
            found[name].append(finish(pair))
    return found


def wall_ms(call: Callable[[], object], synchronize: Callable, repeats: int) -> list[float]:
    """For whole steps, whose launches count."""
    found = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def peak_bytes(call: Callable[[], object]) -> int:
    """What a call allocates at most, beyond what was there before it."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bytes_per_s() -> float:
    """Read and written, by a copy within the device's memory, of 2 GiB."""
    import torch

    source = torch.zeros(2**31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    ms = device_ms({"copy": lambda: target.copy_(source)}, 1.0)["copy"]
    return 2 * source.numel() / (np.median(ms) / 1e3)


def matmul_flops_per_s() -> float:
    """Of a product of bfloat16 matrices of 8192 squared."""
    import torch

    left, right = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind(0)
    ms = device_ms({"matmul": lambda: left @ right}, 1.0)["matmul"]
    return 2 * 8192**3 / (np.median(ms) / 1e3)
