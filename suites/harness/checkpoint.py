"""Checkpoints of quality runs: what a run that was killed or stopped goes on from.

STORE/checkpoints/RUN_ID/checkpoint holds the state of training after some step, what was sampled so
far, and the step: batches depend on (seed, step) alone. It is saved from time to time, replaces the
one before in one rename, and is trusted only whole, and of the same code and libraries.

The file is a line of JSON, the arrays that it names one after the other, and 16 bytes of blake2b
over all of that.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from implementations.engine import Engine
from suites.harness import measure, provenance, stop, trained
from suites.harness.record import Sample, sync_folder
from suites.harness.run import Run

INTERVAL_VARIABLE = "AERIE_CHECKPOINT_S"  # set by the parent: it does not affect the result
INTERVAL_S = 300.0
DIGEST_BYTES = 16
BLOCK_BYTES = 2**22


@dataclass
class Keeper:
    """The checkpoint of one run, and what its record says of it."""

    folder: Path
    run: Run
    segment: dict[str, Any]  # where and when this process runs
    saves: bool = True  # of several ranks the first; the others resume from what it saved
    segments: list[dict[str, Any]] = field(default_factory=list)  # of the processes before it
    notes: list[str] = field(default_factory=list)
    step: int = 0  # done so far
    saved_step: int = 0
    start_step: int | None = None  # that this process went on from; None: the run does not resume
    due: float = 0.0

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint"

    def resume(self, engine: Engine) -> tuple[int, list[Sample], list[float]]:
        if self.saves:
            for leftover in self.folder.glob(".tmp-*"):  # of a process that was killed while saving
                leftover.unlink(missing_ok=True)
        self.start_step, samples, losses = 0, [], []
        try:
            head, arrays = read(self.path)
            if head["run_id"] != self.run.run_id or head["code"] != self._code:
                raise ValueError("it is of other code or libraries")
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self.notes.append(f"started from nothing, the checkpoint was not used: {error}")
        else:
            engine.load_training_state(_named(arrays, "state/"))
            self.start_step = self.step = self.saved_step = head["step"]
            self.segments = head["segments"]
            samples = [Sample(**values) for values in head["samples"]]
            losses = arrays["losses"].tolist()
        self._wait()
        return self.start_step, samples, losses

    def save_if_due(
        self, engine: Engine, step: int, samples: Iterable[Sample], losses: Iterable[Any]
    ) -> None:
        self.step = step
        if not self.saves:
            return
        is_told = stop.is_told()
        if step > self.saved_step and (is_told or time.monotonic() >= self.due):
            with measure.counted_as("write"):
                self._save(engine, samples, losses)
            self._wait()
        if is_told:
            kept = f"step {self.saved_step} is kept" if self.saved_step else "nothing is kept"
            raise stop.Stopped(f"told to stop ({stop.SIGNAL.name}) after step {step}; {kept}")

    def found(self) -> dict[str, Any]:
        """For the record's provenance."""
        if self.start_step is None:
            return {}
        notes = {"checkpoint_notes": self.notes} if self.notes else {}
        return {"segments": [*self.segments, self._segment()]} | notes

    def keep_parameters(self, engine: Engine) -> None:
        """Where that was asked for; they stay when the run is over."""
        if not self.saves:
            return
        try:
            with measure.counted_as("write"):
                trained.keep(self.folder, engine)
        except OSError as error:  # what they are worth as a result is still to be measured
            self.notes.append(f"trained parameters could not be kept: {error.strerror}")

    def remove(self) -> None:
        """All that is for going on."""
        for path in (self.path, *self.folder.glob(".tmp-*")):
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):  # trained parameters are kept in it, or it is not there
            self.folder.rmdir()

    @property
    def _code(self) -> str:
        """The build without the device found: a run may go on on another one of the same kind."""
        run = self.run
        return provenance.build_key(run.suite, run.backend, run.device_kind)

    def _save(self, engine: Engine, samples: Iterable[Sample], losses: Iterable[Any]) -> None:
        """A disk that is full ends no run: the checkpoint before stays, and training goes on."""
        head = {
            "run_id": self.run.run_id,
            "code": self._code,
            "step": self.step,
            "samples": [asdict(sample) for sample in samples],
            "segments": [*self.segments, self._segment()],
        }
        arrays = {f"state/{name}": value for name, value in engine.training_state().items()}
        arrays["losses"] = np.array([float(loss) for loss in losses], np.float64)
        try:
            write(self.path, head, arrays)
            self.saved_step = self.step
        except OSError as error:
            note = f"a checkpoint could not be saved: {error.strerror}"
            if note not in self.notes:
                self.notes.append(note)

    def _segment(self) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return self.segment | {
            "ended_at": now,
            "start_step": self.start_step,
            "end_step": self.step,
        }

    def _wait(self) -> None:
        """Counted from the end of a save: slow disks do not fill the time of a run."""
        self.due = time.monotonic() + float(os.environ.get(INTERVAL_VARIABLE) or INTERVAL_S)


_keeper: Keeper | None = None


def keep(store: Path, run: Run, segment: dict[str, Any], *, saves: bool = True) -> Keeper:
    """From now on resume() and save_if_due() are about this run."""
    global _keeper
    _keeper = Keeper(store / "checkpoints" / run.run_id, run, segment, saves)
    return _keeper


def resume(engine: Engine) -> tuple[int, list[Sample], list[float]]:
    """(steps done, samples so far, losses since the last of them), and the engine's training in
    the state that it had then. Nothing where there is no checkpoint to be used."""
    return _keeper.resume(engine) if _keeper else (0, [], [])


def keep_parameters(engine: Engine) -> None:
    """Called after training."""
    if _keeper:
        _keeper.keep_parameters(engine)


def save_if_due(
    engine: Engine, step: int, samples: Iterable[Sample], losses: Iterable[Any]
) -> None:
    """Called after every step. Ends the run, saved, where it was told to stop."""
    if _keeper:
        _keeper.save_if_due(engine, step, samples, losses)
    else:
        stop.check()


# The file ----------------------------------------------------------------------------------------


def write(path: Path, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """The whole file, or the one that was there: temporary name, fsync, rename, fsync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}")
    shapes = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    line = json.dumps(head | {"arrays": shapes}).encode() + b"\n"
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        with temporary.open("wb") as file:
            for part in (line, *map(_bytes, arrays.values())):
                file.write(part)
                digest.update(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def curve(store: Path, run_id: str) -> tuple[Sample, ...]:
    """What was sampled of a run until its last checkpoint, for the record of one that was killed.
    Of the file its head alone is read: the arrays may be large."""
    try:
        with (store / "checkpoints" / run_id / "checkpoint").open("rb") as file:
            return tuple(Sample(**values) for values in json.loads(file.readline())["samples"])
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is damaged
        return ()


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """ValueError for a file that is torn or damaged: nothing in it is believed before its digest
    is right."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - DIGEST_BYTES
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for start in range(0, size, BLOCK_BYTES):
            digest.update(file.read(min(BLOCK_BYTES, size - start)))
        if file.read() != digest.digest():
            raise ValueError("it is torn or damaged")
        file.seek(0)
        head = json.loads(file.readline())
        arrays = {
            name: np.fromfile(file, dtype, int(np.prod(shape))).reshape(shape)
            for name, (dtype, shape) in head.pop("arrays").items()
        }
    return head, arrays


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _named(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
