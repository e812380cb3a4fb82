"""Runs what a plan says is pending: claims, starts, watches, and leaves a record for every end."""

import contextlib
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from implementations.engine import Unsupported
from suites.harness import checkpoint, claims, plan, provenance, rounds
from suites.harness.cluster import Cluster
from suites.harness.execute import (
    Task,
    last_phase,
    new_attempt,
    phase_path,
    seen,
    times_of_killed,
    utc_now,
    verdict,
)
from suites.harness.executors import Ended, Executor, Local
from suites.harness.plan import Planned
from suites.harness.record import Record, record_path, with_room, write, write_atomically
from suites.harness.run import Run

POLL_S = 0.25  # between looks at a child's memory; its end is noticed at once
SIGNALS_OF_SLURM = (signal.SIGUSR2, signal.SIGTERM)  # it sends them to all processes of a job
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
BLOCK = "block-"  # claims to blocks begin with it; others are named after runs
NEWS_S = 2.0  # between a signal's effect on a child and the moment that we have it too


@dataclass
class Result:
    """How a sweep went. `outcomes` holds every run that has one, by run_id."""

    outcomes: dict[str, str] = field(default_factory=dict)
    num_started: int = 0
    elsewhere: list[str] = field(default_factory=list)  # runs that another process measures
    not_needed: dict[str, str] = field(default_factory=dict)  # run_id -> why, of adaptive rounds
    is_interrupted: bool = False

    def add(self, later: "Result") -> None:
        self.outcomes |= later.outcomes
        self.num_started += later.num_started
        self.elsewhere += later.elsewhere
        self.not_needed |= later.not_needed
        self.is_interrupted |= later.is_interrupted


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Why all runs must end now: their outcome where they leave none, and the time they have."""

    outcome: str
    reason: str
    grace_s: float
    fair_s: float = 0.0  # a run that was given less time than this did not fail: it is preempted

    def outcome_after(self, seconds: float) -> str:
        return self.outcome if seconds >= self.fair_s else "preempted"


@dataclass
class _Running:
    planned: Planned
    task: Task
    path: Path
    slot: int
    started_at: str
    start: float
    unit_start: float
    suspect: tuple[Ended, float] | None = None  # ended by a signal that may be for all of us


@dataclass
class _Slot:
    """What one share of the machine has still to measure of its unit, and the claim to it: a block
    that two sweeps shared run by run would be whole in neither."""

    unit: deque[Planned] = field(default_factory=deque)
    taken: list[Planned] = field(default_factory=list)  # the unit as it was
    round: int | None = None  # that is measured
    claim: tuple[str, str] | None = None  # its name and its token
    start: float = 0.0

    def take(self, store: Path, unit: list[Planned]) -> list[str]:
        """Run ids of a unit that another process has; none where it is ours now. What others have
        measured of a block since it was planned counts where it is all of it."""
        claim = block_claim(unit)
        token = _claim(store, claim) if claim else None
        if claim is not None and token is None:
            return [item.run.run_id for item in unit]
        self.start, self.round = time.perf_counter(), None
        self.claim = (claim, token) if claim else None
        spared = rounds.not_needed(store, unit)
        is_done = all(i.run.run_id in spared or _outcome_meanwhile(store, i) for i in unit)
        self.taken = [_anew(store, item) for item in unit] if claim and not is_done else unit
        self.unit = deque(self.taken)
        return []

    def spare(self, store: Path) -> list[tuple[Planned, str]]:
        """Where a round has ended, what is not needed any more of the unit, and why: it is left
        out."""
        if self.unit[0].run.round == self.round:
            return []
        self.round = self.unit[0].run.round
        spared = rounds.not_needed(store, self.taken)
        left_out = [(i, spared[i.run.run_id]) for i in self.unit if i.run.run_id in spared]
        self.unit = deque(item for item in self.unit if item.run.run_id not in spared)
        return left_out

    def leave(self, store: Path) -> None:
        if self.claim is not None:
            claims.release(store, *self.claim)
        self.claim = None


def block_claim(unit: list[Planned]) -> str | None:
    """The name of the claim to a block, or to any part of it; None for what is no block."""
    return f"{BLOCK}{unit[0].block}" if unit[0].block else None


def _anew(store: Path, item: Planned) -> Planned:
    """To be measured whatever others have measured of it until now."""
    known = (record["attempt"] for record in plan.attempts(store, item.run.run_id))
    return replace(item, attempts=tuple(known))


def units(todo: list[Planned]) -> list[list[Planned]]:
    """What one device measures in one piece: a block of timing runs, or one other run."""
    found: dict[str, list[Planned]] = {}
    for item in todo:
        found.setdefault(item.block or item.run.run_id, []).append(item)
    return list(found.values())


def sweep(
    store: Path,
    todo: list[Planned],
    cluster: Cluster,
    *,
    on_start: Callable[[Planned], None] = lambda planned: None,
    on_end: Callable[[Planned, Record], None] = lambda planned, record: None,
    on_spare: Callable[[list[tuple[Planned, str]]], None] = lambda spared: None,
    executor: Executor | None = None,
    verify_frontier: bool = False,
    proven: list[Run] | None = None,
    watch: Callable[[], Stop | None] | None = None,
) -> Result:
    """Runs every planned run of `todo`, in its order, units side by side where the cluster runs
    several at once. `proven` ran out of memory before. `watch` is called at every look, a few times
    a second, and may stop all; without it Ctrl-C and SIGTERM do."""
    executor = executor or Local(
        store,
        cluster.runs_in_parallel,
        dict(cluster.python),
        cluster.checkpoint_s,
        cluster.keeps_parameters,
    )
    proven = [] if proven is None else proven
    session = os.urandom(3).hex()  # rounds are paired within one sweep
    waiting, running, result = deque(units(todo)), {}, Result()
    slots = [_Slot() for _ in range(cluster.runs_in_parallel)]
    stop: Stop | None = None

    def end(handle: str, record: Record) -> None:
        job = running.pop(handle)
        job.path.unlink(missing_ok=True)
        phase_path(store, job.task).unlink(missing_ok=True)
        claims.release(store, record.run_id, job.task.owner["token"])
        _finish(job.planned, record)

    def _finish(planned: Planned, record: Record) -> None:
        result.outcomes[record.run_id] = record.outcome
        if record.outcome == "out_of_memory":
            proven.append(planned.run)
        elif planned.run in proven:
            proven.remove(planned.run)
        on_end(planned, record)

    def start(planned: Planned, slot: int) -> None:
        if not (token := _claim(store, planned.run.run_id)):
            result.elsewhere.append(planned.run.run_id)
            return
        if outcome := _outcome_meanwhile(store, planned):
            claims.release(store, planned.run.run_id, token)
            result.outcomes[planned.run.run_id] = outcome
            return
        task = _task(planned, session, cluster.interpreter(planned.run.backend), token)
        smaller = next((p for p in proven if plan.is_larger(planned.run, p)), None)
        if smaller and not verify_frontier:
            record = _predicted(task, smaller)
            _write(store, record)
            claims.release(store, record.run_id, token)
            _finish(planned, record)
            return
        on_start(planned)
        job = _job(store, planned, task, slot, slots[slot].start)
        try:
            running[executor.submit(job.path, slot)] = job
        except (OSError, Unsupported) as error:  # an interpreter or devices that are not there
            running[""] = job
            python = cluster.interpreter(planned.run.backend)
            end("", _not_started(store, job, error, python))
            return
        result.num_started += 1

    def look() -> None:
        for handle, job in list(running.items()):
            if (record := _look(store, handle, job, executor, cluster, stop)) is not None:
                end(handle, record)

    with _interruptible() if watch is None else contextlib.nullcontext(watch) as watch:
        while waiting or running or any(slot.unit for slot in slots):
            if (stop := watch()) is not None:
                break
            for number, slot in enumerate(slots):
                while number not in {job.slot for job in running.values()}:
                    if not slot.unit:
                        slot.leave(store)
                        if not waiting:
                            break
                        result.elsewhere += slot.take(store, waiting.popleft())
                    elif spared := slot.spare(store):
                        result.not_needed |= {item.run.run_id: why for item, why in spared}
                        on_spare(spared)
                    else:
                        start(slot.unit.popleft(), number)
            executor.wait(POLL_S)
            look()
        if stop is not None:
            result.is_interrupted = True
            _ask_to_stop(running, executor, stop, look)
            for handle, job in list(running.items()):
                executor.cancel(handle)
                end(handle, _stopped(store, job, stop))
        for slot in slots:
            slot.leave(store)
    return result


def _not_started(
    store: Path, job: _Running, error: OSError | Unsupported, python: str | None
) -> Record:
    is_unsupported = isinstance(error, Unsupported)
    reason = str(error) if is_unsupported else f"cannot be started: {error}"
    if python is not None and not is_unsupported and error.filename == python:
        reason = f"cluster.python.{job.task.run.backend}: {reason}"
    record = _killed(store, job, "unsupported" if is_unsupported else "failed", reason)
    _write(store, record)
    return record


def _stopped(store: Path, job: _Running, stop: Stop) -> Record:
    """The record of a job that is gone now: its own, if it came to that."""
    if (record := _read(store, job.task)) is not None:
        return record
    record = _killed(store, job, stop.outcome_after(_given(job)), stop.reason)
    _write(store, record)
    return record


def _ask_to_stop(
    running: dict[str, _Running], executor: Executor, stop: Stop, look: Callable[[], None]
) -> None:
    """Lets what can go on later (no timing run can) leave a checkpoint, for as long as there is."""
    resumable = {h for h, job in running.items() if job.planned.block is None and stop.grace_s > 0}
    for handle in resumable:
        executor.stop(handle)
    deadline = time.perf_counter() + stop.grace_s
    look()
    while resumable & running.keys() and time.perf_counter() < deadline:
        executor.wait(POLL_S)
        look()


def _look(
    store: Path,
    handle: str,
    job: _Running,
    executor: Executor,
    cluster: Cluster,
    stop: Stop | None,
) -> Record | None:
    """The record of a job that has ended, written by its child or here; None while it runs."""
    seconds = time.perf_counter() - job.start
    ended = job.suspect[0] if job.suspect else executor.poll(handle)
    if ended is not None:
        record = _read(store, job.task)
        is_signalled = -ended.returncode in SIGNALS_OF_SLURM
        if record is None and is_signalled and stop is None:
            job.suspect = job.suspect or (ended, seconds + NEWS_S)
            if seconds < job.suspect[1]:
                return None
        if record is None:
            outcome, reason = verdict(ended, executor.logs(handle))
            if is_signalled and stop is not None:
                outcome, reason = stop.outcome_after(_given(job)), stop.reason
            if outcome == "out_of_memory" and job.task.run.workload.topology is not None:
                outcome = "failed"  # of this machine's memory, not of the device's
            record = _killed(store, job, outcome, reason)
            _write(store, record)
        return record
    if seconds > cluster.run_limit_s:
        executor.cancel(handle)
        reason = f"longer than cluster.run_limit_s={cluster.run_limit_s:g}"
        record = _read(store, job.task) or _killed(store, job, "timed_out", reason)
        _write(store, record)
        return record
    return None


def _given(job: _Running) -> float:
    """Seconds that a run has had, or the block it is part of, which fits in a job or does not."""
    return time.perf_counter() - (job.unit_start if job.planned.block else job.start)


def _task(planned: Planned, session: str, python: str | None, token: str) -> Task:
    return Task(
        run=planned.run,
        build=planned.build,
        attempt=new_attempt(),
        parent_pid=os.getpid(),
        owner=claims.ourselves() | {"token": token},
        found={
            "build_device": provenance.device_name(planned.run.device_kind),
            "versions": provenance.versions_on_node(python),
        },
        costs=planned.costs,
        block=f"{planned.block}-{session}" if planned.block else None,
        order=planned.order,
    )


def _job(store: Path, planned: Planned, task: Task, slot: int, unit_start: float) -> _Running:
    path = record_path(store, task.run.run_id, f".task-{task.attempt}")
    text = json.dumps(task.to_json())
    with_room(lambda: write_atomically(path, text))
    return _Running(planned, task, path, slot, utc_now(), time.perf_counter(), unit_start)


def _claim(store: Path, name: str) -> str | None:
    return with_room(lambda: claims.claim(store, name))


def _write(store: Path, record: Record) -> None:
    with_room(lambda: write(store, record))


def _outcome_meanwhile(store: Path, planned: Planned) -> str | None:
    """Of a run that another sweep has finished between our plan and our claim."""
    ends = [
        record["outcome"]
        for record in plan.attempts(store, planned.run.run_id)
        if record["build"] == planned.build
        and plan.is_finished(record)
        and record["attempt"] not in planned.attempts
    ]
    return next((end for end in reversed(ends) if end != "out_of_memory_predicted"), None)


def _read(store: Path, task: Task) -> Record | None:
    path = record_path(store, task.run.run_id, task.attempt)
    if not path.exists():
        return None
    return Record.from_json(json.loads(path.read_text(encoding="utf-8")))


def _killed(store: Path, job: _Running, outcome: str, reason: str) -> Record:
    """The record of a child that could not write its own."""
    seconds = time.perf_counter() - job.start
    return job.task.record(
        outcome,
        reason=reason,
        phase=last_phase(store, job.task),
        provenance=seen(job.task.run) | job.task.found,
        samples=checkpoint.curve(store, job.task.run.run_id),
        started_at=job.started_at,
        seconds=seconds,
        times=times_of_killed(store, job.task, seconds),
    )


def _predicted(task: Task, smaller: Run) -> Record:
    return task.record(
        "out_of_memory_predicted",
        reason=f"run {smaller.run_id} ran out of memory with less work; --verify-frontier tries",
        phase="start",
        provenance=seen(task.run) | task.found,
        started_at=utc_now(),
        seconds=0.0,
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], Stop | None]]:
    """Ctrl-C and SIGTERM stop a sweep, at its next look: raised in the middle of a start, they
    would leave a child that nobody knows of. While it stops, further ones are of no effect."""
    noted: list[int] = []
    try:
        before = {n: signal.signal(n, lambda number, _: noted.append(number)) for n in INTERRUPTS}
    except ValueError:  # not the main thread: the caller's signals are not ours
        before = {}
    interrupted = Stop(outcome="cancelled", reason="interrupted", grace_s=0.0)
    try:
        yield lambda: interrupted if noted else None
    finally:
        for number, action in before.items():
            signal.signal(number, action)
