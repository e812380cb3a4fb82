"""What every measurement needs: the stopwatch, the phase, memory, and the peaks of the machine.

Peaks are dense (no sparsity) rates of the vendors' data sheets. A CPU has no such sheet: its peak
is measured here, in NumPy, and named "measured". Where neither is possible there is no peak, and
no MFU or MBU.
"""

import json
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from implementations.engine import CPU, Engine
from implementations.rank import Rank
from suites.harness import stop
from suites.harness.record import METRICS, PHASES, Sample

MEASURED = "measured"


class InvalidMeasurement(Exception):
    """Numbers that cannot be true, or are not equal where they must be; the message is one line."""


class Diverged(Exception):
    """A loss that is not finite; the message is one line."""


class OutOfMemoryPredicted(MemoryError):
    """The workload needs more memory than is available, so it was not tried."""


# Where a run is, for typed outcomes, for its times, and for progress.

STARTED_VARIABLE = "AERIE_STARTED"  # when the process of a run was started, by the parent
SAY_S = 2.0  # between two words of progress
FILE_BYTES = 640  # of the file that says it: always the same, so that no reader finds it half there


@dataclass
class _Place:
    file: Path | None = None
    phase: str = PHASES[0]
    start: float = field(default_factory=time.monotonic)  # of the time not yet in `times`
    since: str = ""  # UTC
    times: dict[str, float] = field(default_factory=dict)  # seconds, by phase
    done: int | None = None
    total: int | None = None
    loss: float | None = None  # the last of training
    said: float = 0.0


_place = _Place()
_progress: Callable[[int, int], None] | None = None


def begin(file: Path | None, started: float | None = None) -> None:
    """A run begins, or its process began at `started` of time.monotonic(). From now on the file
    says where it is, for whoever asks, or finds this process dead."""
    global _place
    now = time.monotonic()
    _place = _Place(file, start=now if started is None else min(started, now), since=_utc_now())


def phase(name: str) -> None:
    """Records what the run does from now on: one of record.PHASES."""
    assert name in PHASES, name
    _count(_place.phase)
    _place.phase, _place.since = name, _utc_now()
    _say()


def current_phase() -> str:
    return _place.phase


@contextmanager
def counted_as(name: str) -> Iterator[None]:
    """The time of the block belongs to another phase than the one that goes on around it."""
    assert name in PHASES, name
    _count(_place.phase)
    try:
        yield
    finally:
        _count(name)


def times() -> dict[str, float]:
    """Seconds of each phase so far."""
    _count(_place.phase)
    return dict(_place.times)


def progress(done: int, total: int, loss: float | None = None) -> None:
    """Says how far the run is, to its file now and then, and to whoever listens; with the training
    loss where there is a new one."""
    _place.done, _place.total = done, total
    _place.loss = _place.loss if loss is None else loss
    if time.monotonic() - _place.said > SAY_S:
        _say()
    if _progress is not None:
        _progress(done, total)


def on_progress(callback: Callable[[int, int], None] | None) -> None:
    """Installs the listener of progress(); None removes it."""
    global _progress
    _progress = callback


def _count(name: str) -> None:
    now = time.monotonic()
    _place.times[name] = _place.times.get(name, 0.0) + now - _place.start
    _place.start = now


def _say() -> None:
    """One write of one size, in place: cheap, and never seen half done."""
    if _place.file is None:
        return
    _place.said = time.monotonic()
    values = {key: getattr(_place, key) for key in ("phase", "done", "total", "loss", "since")}
    values["times"] = {key: round(seconds, 3) for key, seconds in _place.times.items()}
    with suppress(OSError):  # a disk that is full stops no run
        descriptor = os.open(_place.file, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, json.dumps(values).ljust(FILE_BYTES).encode(), 0)
        finally:
            os.close(descriptor)


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# Time.


@dataclass
class Watch:
    seconds: float = float("nan")


@contextmanager
def stopwatch(synchronize: Callable[[], None]) -> Iterator[Watch]:
    """Wall time of the block: the device is idle at the start and done at the end. No measurement
    begins in a run that was told to stop."""
    stop.check()
    watch = Watch()
    synchronize()
    start = time.perf_counter()
    yield watch
    synchronize()
    watch.seconds = time.perf_counter() - start


def compile_samples(first_s: float, later_s: list[float]) -> Iterator[Sample]:
    """The first call, and what it took beyond a later one (never below 0: eager code has none)."""
    yield sample("first_step_time_ms", first_s * 1e3)
    yield sample("compile_time_s", max(first_s - float(np.median(later_s)), 0.0))


def sample(metric: str, value: float, **where) -> Sample:
    """A Sample in the metric's own unit."""
    return Sample(metric=metric, value=float(value), unit=METRICS[metric].unit, **where)


# Memory.

_OUT_OF_MEMORY = re.compile(
    r"out of memory|RESOURCE_EXHAUSTED|can't allocate memory|bad_alloc|Cannot allocate memory",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of either framework, of NumPy or of the system says so."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )


def peak_memory_bytes(engine: Engine) -> int | None:
    """Highest allocation on the device; on a CPU the process's VmHWM (null where there is none)."""
    counted = engine.peak_memory_bytes()
    return counted if counted is not None else _status_bytes("VmHWM")


def available_memory_bytes(engine: Engine) -> int | None:
    """What is left: on a CPU the least of machine, cgroup and `ulimit -v`; else the sheet's total.

    None: unknown.
    """
    if engine.device_name != CPU:
        known = find_device(engine.device_name)
        return known.memory_bytes if known else None
    left = [_meminfo_bytes("MemAvailable"), _cgroup_bytes_left()]
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], _status_bytes("VmSize")
    if limit != resource.RLIM_INFINITY and used is not None:
        left.append(limit - used)
    return min((value for value in left if value is not None), default=None)


def _status_bytes(key: str) -> int | None:
    return _kibibytes(Path("/proc/self/status"), key)


def _meminfo_bytes(key: str) -> int | None:
    return _kibibytes(Path("/proc/meminfo"), key)


def _kibibytes(path: Path, key: str) -> int | None:
    """The value of `key: N kB`, in bytes; None where the system has no such file."""
    if not path.exists():
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _cgroup_bytes_left() -> int | None:
    """Of a container's limit (version 2, then 1); None where there is none."""
    for folder, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        root = Path("/sys/fs/cgroup") / folder
        if (root / limit).exists() and (root / used).exists():
            text = (root / limit).read_text().strip()
            return int(text) - int((root / used).read_text()) if text.isdigit() else None
    return None


# Peaks.


@dataclass(frozen=True)
class Device:
    """Dense FLOP/s by dtype, bytes/s and bytes of one device."""

    name: str
    pattern: str  # of the name that JAX and PyTorch give it
    flops_per_s: dict[str, float]
    bytes_per_s: float
    memory_bytes: int


GIB = 2**30
DEVICES = (
    # NVIDIA H200 data sheet (SXM): compute as H100, 141 GB of HBM3e at 4.8 TB/s.
    Device("H200 SXM", r"H200", {"bfloat16": 989e12, "float32": 67e12, "float64": 34e12},
           4.8e12, int(141e9)),
    # NVIDIA H100 data sheet (SXM), dense is half of the sparse figure; float32 without TF32.
    Device("H100 SXM", r"H100 80GB HBM3",
           {"bfloat16": 989e12, "float32": 67e12, "float64": 34e12}, 3.35e12, 80 * GIB),
    # The same data sheet, PCIe card.
    Device("H100 PCIe", r"H100 PCIe", {"bfloat16": 756e12, "float32": 51e12, "float64": 26e12},
           2.0e12, 80 * GIB),
    # NVIDIA A100 data sheet: 80 GB SXM, then 40 GB SXM.
    Device("A100 SXM 80GB", r"A100-SXM4-80GB",
           {"bfloat16": 312e12, "float32": 19.5e12, "float64": 9.7e12}, 2.04e12, 80 * GIB),
    Device("A100 SXM 40GB", r"A100-SXM4-40GB",
           {"bfloat16": 312e12, "float32": 19.5e12, "float64": 9.7e12}, 1.555e12, 40 * GIB),
    # cloud.google.com/tpu/docs: v5e, v6e, v5p, v4, one chip; bfloat16 is all they state.
    Device("TPU v5e", r"TPU v5 ?lite|TPU v5e", {"bfloat16": 197e12}, 819e9, 16 * GIB),
    Device("TPU v6e", r"TPU v6 ?lite|TPU v6e", {"bfloat16": 918e12}, 1640e9, 32 * GIB),
    Device("TPU v5p", r"TPU v5p?$", {"bfloat16": 459e12}, 2765e9, 95 * GIB),
    Device("TPU v4", r"TPU v4$", {"bfloat16": 275e12}, 1228e9, 32 * GIB),
)  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """What a machine can do at most, in one dtype. None: not known."""

    name: str  # of the device whose data sheet says so, or MEASURED
    flops_per_s: float | None
    bytes_per_s: float | None

    def samples(self) -> Iterator[Sample]:
        if self.flops_per_s is not None:
            yield sample("peak_flops_per_s", self.flops_per_s, field=self.name)
        if self.bytes_per_s is not None:
            yield sample("peak_bytes_per_s", self.bytes_per_s, field=self.name)

    def mfu(self, flops: float, seconds: float) -> float | None:
        """Share of the peak; InvalidMeasurement above 1, where either the time or the peak lies."""
        if self.flops_per_s is None:
            return None
        mfu = flops / seconds / self.flops_per_s
        if mfu > 1:
            raise InvalidMeasurement(
                f"MFU {mfu:.2f} is above 1: {flops:.3g} FLOPs in {seconds:.3g} s, "
                f"peak {self.flops_per_s:.3g} FLOP/s ({self.name})."
            )
        return mfu

    def mbu(self, num_bytes: float, seconds: float) -> float | None:
        """Share of the bandwidth to memory. Above 1 is possible: small weights stay in caches."""
        return None if self.bytes_per_s is None else num_bytes / seconds / self.bytes_per_s


def bounds(num_bytes: int) -> Iterator[Sample]:
    """Of each TPU of the list."""
    yield from (bound(device, num_bytes) for device in DEVICES if device.name.startswith("TPU"))


def bound(device: Device, num_bytes: int) -> Sample:
    """The least time that moving so many bytes takes, by the data sheet's bandwidth: a bound, and
    no measurement."""
    return sample("bound_ms", num_bytes / device.bytes_per_s * 1e3, field=device.name)


def find_device(device_name: str) -> Device | None:
    return next((d for d in DEVICES if re.search(d.pattern, device_name)), None)


def peak(engine: Engine, dtype: str) -> Peak:
    """The data sheet's peak of one of the engine's devices; a CPU's is measured, which takes about
    0.3 s. Devices that a process makes of its cores have each their share of what it measures.

    Measure it last: its buffers would count as the run's memory.
    """
    if engine.device_name == CPU:
        share = Rank.of().count / engine.num_devices
        flops_per_s = measured_flops_per_s(dtype)
        flops_per_s = None if flops_per_s is None else flops_per_s * share
        return Peak(MEASURED, flops_per_s, measured_bytes_per_s() * share)
    known = find_device(engine.device_name)
    if known is None:  # what NumPy could measure here is another device
        return Peak("unknown", None, None)
    return Peak(known.name, known.flops_per_s.get(dtype), known.bytes_per_s)


def measured_flops_per_s(dtype: str) -> float | None:
    """The best of several matrix products on this CPU, or None where NumPy has not that dtype."""
    if dtype not in ("float32", "float64"):
        return None
    size = 1024
    left, right = np.random.default_rng(0).standard_normal((2, size, size)).astype(dtype)
    out = np.empty_like(left)
    return 2 * size**3 / _best_seconds(lambda: np.matmul(left, right, out=out), repeats=6)


def measured_bytes_per_s() -> float:
    """The best of several large copies, bytes read and written, on all threads of the process."""
    from concurrent.futures import ThreadPoolExecutor  # as long as a tenth of a child's start

    num_threads = num_cpu_threads()
    size = 128 * 2**20 // num_threads  # 256 MiB in all: more than most last-level caches hold
    parts = [(np.ones(size, np.uint8), np.zeros(size, np.uint8)) for _ in range(num_threads)]
    with ThreadPoolExecutor(num_threads) as pool:
        seconds = _best_seconds(
            lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)), repeats=4
        )
    return 2 * size * num_threads / seconds


def num_cpu_threads() -> int:
    """Threads this process may use: its CPUs, or OMP_NUM_THREADS where that is fewer."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pinned = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(count or 1, int(pinned))) if pinned.isdigit() else count or 1


def _best_seconds(work: Callable[[], object], *, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up; being the slowest it never counts
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
