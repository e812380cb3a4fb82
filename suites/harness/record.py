"""What a run leaves behind: samples and one Record, one JSON file an attempt, written atomically.

A record is published under a temporary name in its own folder, synced, renamed, and the folder
synced: a reader sees the whole file or none. Values that do not exist are null, never 0.
"""

import errno
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SCHEMA = 1
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or somebody's quota
PATIENCE_S = 600.0  # that a sweep waits for room: what was measured is worth more
PAUSE_S = 2.0

OUTCOMES = (
    "completed",
    "out_of_memory",
    "out_of_memory_predicted",
    "compile_error",
    "timed_out",
    "preempted",
    "diverged",
    "unsupported",
    "node_failure",
    "cancelled",
    "failed",
    "invalid_measurement",
)
PHASES = ("start", "import", "init", "compile", "measure", "evaluate", "write")

PASSES = {"evaluate": "forward", "train": "forward + backward"}  # of an op alone, by its phase


@dataclass(frozen=True)
class Metric:
    """How a metric reads: its unit, which way is better (None: neither), its label on an axis."""

    unit: str
    better: str | None
    label: str


METRICS = {
    "step_time_ms": Metric("ms", "lower", "Step time (ms)"),
    "tokens_per_s": Metric("tokens/s", "higher", "Throughput (tokens/s)"),
    "mfu": Metric("1", "higher", "MFU"),
    "mbu": Metric("1", "higher", "MBU"),
    "ttft_ms": Metric("ms", "lower", "TTFT (ms)"),
    "tpot_ms": Metric("ms", "lower", "TPOT (ms)"),
    "decode_time_s": Metric("s", "lower", "Decode time (s)"),
    "op_time_ms": Metric("ms", "lower", "Time of the op (ms)"),
    "op_bytes": Metric("B", None, "Bytes that must move (MiB)"),
    "bound_ms": Metric("ms", None, "Bound by bytes (ms)"),
    "init_time_s": Metric("s", "lower", "Initialization (s)"),
    "compile_time_s": Metric("s", "lower", "Compile time (s)"),
    "aot_compile_time_s": Metric("s", "lower", "Compile time, ahead of time (s)"),
    "collectives": Metric("1", "lower", "Collectives"),
    "num_bundles": Metric("1", None, "Instruction bundles"),
    "num_spills": Metric("1", "lower", "Spills"),
    "first_step_time_ms": Metric("ms", "lower", "First step (ms)"),
    "peak_memory_bytes": Metric("B", "lower", "Peak memory (GiB)"),
    "cache_bytes": Metric("B", "lower", "Cache (MiB)"),
    "peak_flops_per_s": Metric("FLOP/s", None, "Peak compute (FLOP/s)"),
    "peak_bytes_per_s": Metric("B/s", None, "Peak bandwidth (B/s)"),
    "max_batch_size": Metric("1", "higher", "Largest batch"),
    "train_loss": Metric("nats/token", "lower", "Training loss (nats per token)"),
    "loss": Metric("nats/token", "lower", "Held-out loss (nats per token)"),
    "bits_per_byte": Metric("bit/B", "lower", "Held-out bits per byte"),
    "unigram_bits_per_byte": Metric("bit/B", None, "Unigram entropy (bits per byte)"),
    "ngram_bits_per_byte": Metric("bit/B", None, "Order-3 n-grams (bits per byte)"),
    "held_out_loss": Metric("nats/token", "lower", "Held-out loss by step (nats per token)"),
    "loss_by_position": Metric("nats/token", "lower", "Loss by position (nats per token)"),
    "loss_beyond": Metric("nats/token", "lower", "Loss beyond its training (nats per token)"),
    "loss_up_to": Metric("nats/token", "lower", "Loss up to a position (nats per token)"),
    "loss_by_length": Metric("nats/token", "lower", "Loss by document length (nats per token)"),
    "loss_error": Metric("nats/token", None, "Standard error over documents (nats per token)"),
    "num_documents": Metric("1", None, "Documents"),
    "num_passes": Metric("1", None, "Passes over the training text"),
    "accuracy": Metric("1", "higher", "Accuracy"),
    "accuracy_over_lengths": Metric("1", "higher", "Mean accuracy over lengths"),
    "token_accuracy": Metric("1", "higher", "Accuracy of single tokens"),
    "token_accuracy_by_length": Metric("1", "higher", "Accuracy of single tokens by length"),
    "num_steps_to_accuracy": Metric("steps", "lower", "Steps to an accuracy"),
    "accuracy_by_length": Metric("1", "higher", "Accuracy by length"),
    "num_examples": Metric("1", None, "Examples"),
    "chance_accuracy": Metric("1", None, "Accuracy of guessing"),
    "num_cut_examples": Metric("1", None, "Examples whose beginning did not fit"),
    "relative_error": Metric("1", "lower", "Relative error"),
    "rms_error": Metric("1", "lower", "RMS relative error"),
    "tolerance": Metric("1", None, "Tolerance"),
    "rms_tolerance": Metric("1", None, "Tolerance of the RMS"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measured value; null: looked for, and there is none. `repeat` counts within the process;
    `at` is the step, position, length or percentage it belongs to; `field` names what was compared
    (a tensor, in parity)."""

    metric: str
    value: float | None
    unit: str
    repeat: int | None = None
    at: int | None = None
    field: str | None = None

    def __post_init__(self) -> None:
        known = METRICS.get(self.metric)
        assert known, f"metric {self.metric!r} is not in METRICS of suites/harness/record.py"
        assert known.unit == self.unit, f"{self.metric} is in {known.unit}, not {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One attempt of one run: what was asked, on what, and what came of it."""

    run_id: str
    cell_id: str
    build: str
    attempt: str  # time-host-pid-random, unique
    outcome: str
    reason: str | None = None  # one line, for outcomes other than completed
    phase: str | None = None  # where it ended, for outcomes other than completed
    run: dict[str, Any]  # Run.to_json()
    provenance: dict[str, Any]
    costs: dict[str, Any] = field(default_factory=dict)  # num_params, train_flops_per_token, ...
    samples: tuple[Sample, ...] = ()
    started_at: str  # UTC, ISO 8601
    seconds: float  # from the start of its process
    times: dict[str, float] = field(default_factory=dict)  # the same by phase, where it is known
    block: str | None = None  # the comparison this run was interleaved in
    order: int | None = None  # its place in that block
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        assert self.outcome in OUTCOMES, self.outcome

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        samples = tuple(Sample(**sample) for sample in values["samples"])
        return cls(**(values | {"samples": samples}))


def record_path(store: Path, run_id: str, attempt: str) -> Path:
    return store / "runs" / run_id / f"{attempt}.json"


def write(store: Path, record: Record, *, may_replace: bool = True) -> Path:
    path = record_path(store, record.run_id, record.attempt)
    text = json.dumps(record.to_json(), indent=1, allow_nan=False)
    write_atomically(path, text, may_replace=may_replace)
    return path


def write_atomically(path: Path, text: str, *, may_replace: bool = True) -> None:
    """The whole text, or nothing: temporary name, fsync, rename, fsync of the folder. What may not
    be replaced raises FileExistsError where it is there already, whoever wrote it."""
    temporary = path.parent / f".tmp-{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        write_synced(temporary, text)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if not may_replace:
        try:
            os.link(temporary, path)
        finally:
            temporary.unlink()
    else:
        temporary.replace(path)
    sync_folder(path.parent)


def with_room(write: Callable[[], T]) -> T:
    """Writes, as soon as there is room on the disk: then nothing that was measured is lost."""
    deadline, is_said = time.monotonic() + PATIENCE_S, False
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in FULL or time.monotonic() > deadline:
                raise
            if not is_said:
                with suppress(OSError):  # a log on the same disk
                    print(f"aerie: {error}; waiting for room", file=sys.stderr, flush=True)
                is_said = True
        time.sleep(PAUSE_S)


def write_synced(path: Path, text: str) -> None:
    """Under its final name at once: something else, written later, makes it count."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_all(store: Path) -> Iterator[Record]:
    """Every record of a store, oldest attempt first within a run; temporary files are none."""
    for path in sorted((store / "runs").glob("*/[!.]*.json")):
        yield Record.from_json(json.loads(path.read_text(encoding="utf-8")))
