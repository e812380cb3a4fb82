"""Runs what a plan says is pending: claims, starts, watches, and leaves a record for every end."""

import contextlib
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from suites.harness import claims, plan
from suites.harness.execute import (
    Task,
    last_phase,
    new_attempt,
    phase_path,
    seen,
    utc_now,
    verdict,
)
from suites.harness.executors import Cluster, Executor, Local
from suites.harness.plan import Planned
from suites.harness.record import Record, record_path, write, write_atomically
from suites.harness.run import Run

POLL_S = 0.25  # between looks at a child's memory; its end is noticed at once


@dataclass
class Result:
    """How a sweep went. `outcomes` holds every run that has one, by run_id."""

    outcomes: dict[str, str] = field(default_factory=dict)
    num_started: int = 0
    elsewhere: list[str] = field(default_factory=list)  # runs that another process measures
    is_interrupted: bool = False


@dataclass
class _Running:
    planned: Planned
    task: Task
    path: Path
    started_at: str
    start: float


def sweep(
    store: Path,
    todo: list[Planned],
    cluster: Cluster,
    *,
    on_start: Callable[[Planned], None] = lambda planned: None,
    on_end: Callable[[Planned, Record], None] = lambda planned, record: None,
    executor: Executor | None = None,
    verify_frontier: bool = False,
    proven: list[Run] | None = None,
) -> Result:
    """Runs every planned run of `todo`, in its order. `proven` ran out of memory before."""
    executor = executor or Local(store, cluster.parallelism)
    proven = list(proven or ())
    session = os.urandom(3).hex()  # rounds are paired within one sweep
    waiting, running, result = deque(todo), {}, Result()

    def end(handle: str, record: Record) -> None:
        job = running.pop(handle)
        job.path.unlink(missing_ok=True)
        phase_path(store, job.task).unlink(missing_ok=True)
        claims.release(store, record.run_id)
        _finish(job.planned, record)

    def _finish(planned: Planned, record: Record) -> None:
        result.outcomes[record.run_id] = record.outcome
        if record.outcome == "out_of_memory":
            proven.append(planned.run)
        elif planned.run in proven:
            proven.remove(planned.run)
        on_end(planned, record)

    with _terminable():
        try:
            while waiting or running:
                while waiting and len(running) < cluster.parallelism:
                    planned = waiting.popleft()
                    if not claims.claim(store, planned.run.run_id):
                        result.elsewhere.append(planned.run.run_id)
                        continue
                    if outcome := _outcome_meanwhile(store, planned):
                        claims.release(store, planned.run.run_id)
                        result.outcomes[planned.run.run_id] = outcome
                        continue
                    task = _task(planned, session)
                    smaller = next((p for p in proven if plan.is_larger(planned.run, p)), None)
                    if smaller and not verify_frontier:
                        record = _predicted(task, smaller)
                        write(store, record)
                        claims.release(store, record.run_id)
                        _finish(planned, record)
                        continue
                    on_start(planned)
                    job = _job(store, planned, task)
                    running[executor.submit(job.path)] = job
                    result.num_started += 1
                executor.wait(POLL_S)
                for handle, job in list(running.items()):
                    if (record := _look(store, handle, job, executor, cluster)) is not None:
                        end(handle, record)
        except KeyboardInterrupt:
            result.is_interrupted = True
            with _deaf():
                for handle, job in list(running.items()):
                    executor.cancel(handle)
                    record = _read(store, job.task)
                    record = record or _killed(store, job, "cancelled", "interrupted")
                    write(store, record)
                    end(handle, record)
    return result


def _look(
    store: Path, handle: str, job: _Running, executor: Executor, cluster: Cluster
) -> Record | None:
    """The record of a job that has ended, written by its child or here; None while it runs."""
    seconds = time.perf_counter() - job.start
    if (ended := executor.poll(handle)) is not None:
        record = _read(store, job.task)
        if record is None:
            outcome, reason = verdict(ended, executor.logs(handle))
            if outcome == "out_of_memory" and job.task.run.workload.topology is not None:
                outcome = "failed"  # of this machine's memory, not of the device's
            record = _killed(store, job, outcome, reason)
            write(store, record)
        return record
    if seconds > cluster.run_limit_s:
        executor.cancel(handle)
        reason = f"longer than cluster.run_limit_s={cluster.run_limit_s:g}"
        record = _read(store, job.task) or _killed(store, job, "timed_out", reason)
        write(store, record)
        return record
    return None


def _task(planned: Planned, session: str) -> Task:
    return Task(
        run=planned.run,
        build=planned.build,
        attempt=new_attempt(),
        parent_pid=os.getpid(),
        costs=planned.costs,
        block=f"{planned.block}-{session}" if planned.block else None,
        order=planned.order,
    )


def _job(store: Path, planned: Planned, task: Task) -> _Running:
    path = record_path(store, task.run.run_id, f".task-{task.attempt}")
    write_atomically(path, json.dumps(task.to_json()))
    return _Running(planned, task, path, utc_now(), time.perf_counter())


def _outcome_meanwhile(store: Path, planned: Planned) -> str | None:
    """Of a run that another sweep has finished between our plan and our claim."""
    ends = [
        record["outcome"]
        for record in plan.attempts(store, planned.run.run_id)
        if record["build"] == planned.build and plan.is_finished(record)
    ]
    return next((end for end in reversed(ends) if end != "out_of_memory_predicted"), None)


def _read(store: Path, task: Task) -> Record | None:
    path = record_path(store, task.run.run_id, task.attempt)
    if not path.exists():
        return None
    return Record.from_json(json.loads(path.read_text(encoding="utf-8")))


def _killed(store: Path, job: _Running, outcome: str, reason: str) -> Record:
    """The record of a child that could not write its own."""
    return job.task.record(
        outcome,
        reason=reason,
        phase=last_phase(store, job.task),
        provenance=seen(job.task.run),
        started_at=job.started_at,
        seconds=time.perf_counter() - job.start,
    )


def _predicted(task: Task, smaller: Run) -> Record:
    return task.record(
        "out_of_memory_predicted",
        reason=f"run {smaller.run_id} ran out of memory with less work; --verify-frontier tries",
        phase="start",
        provenance=seen(task.run),
        started_at=utc_now(),
        seconds=0.0,
    )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: the caller's signals are not ours
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """A second Ctrl-C does not stop us from leaving records."""
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
