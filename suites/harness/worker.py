"""One job: `python -m suites.harness.worker SUBMISSION ARRAY [FIRST-LAST]`, started by Slurm.

It measures the runs that it was given and that are not finished, each in a process of its own, and
leaves a record for every one of them. Where it is told to stop, it lets quality runs write a
checkpoint, writes the records of the others, and asks Slurm to start it again.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from suites.harness import pack, plan, provenance, reconcile, rounds, slurm, states, submission
from suites.harness.cluster import Cluster
from suites.harness.execute import utc_now
from suites.harness.plan import Planned
from suites.harness.submission import Submission
from suites.harness.sweep import NEWS_S, Result, Stop, sweep, units

BEAT_S = 15.0  # between two signs of life
OTHERS_S = 30.0  # between two looks at runs that another job measures
RECORDS_S = 10.0  # of a warning that are kept for writing records
FAIR = 0.8  # of a job's time: a run that had it all and did not end has timed out
KILL_S = 20.0  # that a job has after SIGTERM, at least: Slurm's KillWait is 30 s


class Job:
    """One job as it runs: its place in its submission, and whether it was told to stop."""

    def __init__(self, made: Submission, array: int, index: int) -> None:
        self.made, self.array, self.index = made, array, index
        self.cluster = made.cluster(array)
        self.started_at, self.start = utc_now(), time.monotonic()
        self.signal: int | None = None
        self._stop: Stop | None = None
        self._beaten = -BEAT_S

    def listen(self) -> None:
        """From now on signals stop the job's sweeps. Handlers only take a note."""
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def watch(self) -> Stop | None:
        """A sign of life now and then; the stop, once there is one."""
        if time.monotonic() - self._beaten >= BEAT_S:
            self._beaten = time.monotonic()
            self.beat()
        if self.signal is not None and self._stop is None:
            self._stop = self._why()
        return self._stop

    @property
    def may_go_on(self) -> bool:
        """Whether Slurm may be asked to start this job again: nobody has cancelled it."""
        is_cancelled = self._stop is not None and self._stop.outcome == "cancelled"
        return self.cluster.executor == "slurm" and not is_cancelled

    def was_told_late(self, result: Result) -> bool:
        """Whether the job was told to stop as its sweep ended: a signal for all its processes may
        reach the last run, which then stops itself, before it reaches us."""
        end = time.monotonic() + (NEWS_S if "preempted" in result.outcomes.values() else 0.0)
        while self.watch() is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.watch() is not None

    def let_others(self, num_started: int) -> bool:
        """Waits a while for others that measure what is left of this job's runs, and gives back
        what dead ones have claimed. False where the job should rather be started again later: it is
        told to stop, or holds a node for nothing."""
        end = time.monotonic() + OTHERS_S
        while time.monotonic() < end and self.watch() is None:
            time.sleep(0.5)
        with contextlib.suppress(OSError, *reconcile.UNREADABLE):  # of others: whoever can, will
            reconcile.reconcile(self.made.store)
        return self.watch() is None and (num_started > 0 or self.cluster.executor == "local")

    def beat(self, **more: object) -> None:
        values = {
            "job": provenance.job_id(),
            "restart": provenance.num_restarts(),
            "node": provenance.node(),
            "pid": os.getpid(),
            "started_at": self.started_at,
            "at": time.time(),
        }
        path = self.made.beat_path(self.array, self.index)
        with contextlib.suppress(OSError):  # a sign of life is not worth a run
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}-{os.getpid()}")
            draft.write_text(json.dumps(values | more), encoding="utf-8")
            draft.replace(path)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None or number != signal.SIGUSR2:
            self.signal = number

    def _why(self) -> Stop:
        if self.cluster.executor == "local":  # has no time limit, and makes room for nobody
            return Stop(outcome="cancelled", reason="its job was cancelled", grace_s=0.0)
        elapsed = time.monotonic() - self.start
        outcome, reason = states.stop_reason(
            elapsed_s=elapsed,
            limit_s=self.cluster.time_s,
            warning_s=self.cluster.stop_warning_s,
            job=slurm.describe(provenance.job_id()),
            restarts=provenance.num_restarts(),
        )
        grace = self.cluster.stop_warning_s if self.signal == signal.SIGUSR2 else KILL_S
        if outcome == "cancelled":
            return Stop(outcome=outcome, reason=reason, grace_s=0.0)
        fair_s = FAIR * elapsed if outcome == "timed_out" else 0.0
        return Stop(
            outcome=outcome, reason=reason, grace_s=max(grace - RECORDS_S, 1.0), fair_s=fair_s
        )


def work(job: Job) -> Result:
    """Measures what the job's runs still need; asks to be started again where it was stopped."""
    store, cluster = job.made.store, job.cluster
    job.beat()
    given = job.made.runs(job.array, job.index)
    reconcile.close_our_own(store, [item.run.run_id for item in given])
    result = Result()
    while todo := pending(store, given, cluster):
        lanes = replace(cluster, runs_in_parallel=pack.num_lanes(cluster, todo[0].run))
        result = sweep(store, todo, lanes, watch=job.watch)
        result.is_interrupted |= job.was_told_late(result)
        if result.is_interrupted or not result.elsewhere:
            break
        result.is_interrupted = not job.let_others(result.num_started)
        if result.is_interrupted:
            break
    if not result.is_interrupted:
        job.beat(ended_at=utc_now())
    elif job.may_go_on and pending(store, given, cluster):
        refusal = slurm.requeue(provenance.job_id())
        print(f"told to stop; to be started again: {refusal or 'yes'}", flush=True)
    return result


def pending(store: Path, given: list[Planned], cluster: Cluster) -> list[Planned]:
    """The runs that a job still has to measure. A block of timing runs is measured whole, in one
    sweep: rounds that were measured at different times are not compared. What has failed for good
    is not tried again, and the others are whole without it, as they are without rounds that are not
    needed."""
    todo, spared = [], rounds.not_needed(store, given)
    for unit in units(given):
        records = {item.run.run_id: _since(store, item) for item in unit}
        needed = [found for run_id, found in records.items() if run_id not in spared]
        if not _is_measured(needed) and _may_go_on(records.values()):
            members = [item for item in unit if not _is_given_up(records[item.run.run_id])]
            todo += [_here(store, item, cluster) for item in members]
    return todo


def _since(store: Path, item: Planned) -> list[dict[str, Any]]:
    """The attempts of a run since it was submitted: earlier ones are not counted against it."""
    records = plan.attempts(store, item.run.run_id)
    return [record for record in records if record["attempt"] not in item.attempts]


def _is_measured(unit: Collection[list[dict[str, Any]]]) -> bool:
    sweeps = {record["block"] for records in unit for record in records}
    return any(
        all(
            _is_given_up(records)
            or any(plan.is_finished(r) for r in records if r["block"] == sweep)
            for records in unit
        )
        for sweep in sweeps
    )


def _may_go_on(unit: Collection[list[dict[str, Any]]]) -> bool:
    """Whether a block is measured again, by how its sweeps were interrupted: one that is longer
    than its job's time would begin for ever."""
    ends: dict[str, str] = {}  # sweep -> how it was stopped, oldest first
    for record in sorted((r for records in unit for r in records), key=lambda r: r["attempt"]):
        if record["block"] is not None and record["outcome"] in states.BUDGETS:
            ends[record["block"]] = record["outcome"]
    return states.may_retry(list(ends.values()))[0]


def _is_given_up(records: list[dict[str, Any]]) -> bool:
    if not records or any(map(plan.is_finished, records)):
        return False
    return not states.may_retry([record["outcome"] for record in records])[0]


def _here(store: Path, item: Planned, cluster: Cluster) -> Planned:
    """As this node finds it: its build, and the attempts that are there."""
    run = item.run
    return replace(
        item,
        build=provenance.build_key(
            run.suite,
            run.backend,
            provenance.device_name(run.device_kind),
            provenance.versions_on_node(cluster.interpreter(run.backend)),
        ),
        attempts=tuple(record["attempt"] for record in plan.attempts(store, run.run_id)),
    )


def main(folder: Path, array: int, indices: range) -> None:
    made = submission.load(folder)
    is_interrupted = False
    if made.cluster(array).executor == "local" and made.cluster(array).max_parallel == 1:
        _queue_up()
    for index in indices:
        job = Job(made, array, index)
        job.listen()
        is_interrupted = work(job).is_interrupted or job.signal is not None
        if is_interrupted:
            break
    sys.exit(128 + signal.SIGTERM if is_interrupted else 0)  # as told: no failure of ours


def _queue_up() -> None:
    """Waits until no other array runs on this machine. The file is on its own disk, and free again
    when this process ends."""
    path = Path(tempfile.gettempdir()) / f"aerie-jobs-{os.getuid()}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def _indices(words: list[str]) -> range:
    """FIRST-LAST, or the one that Slurm names."""
    if not words:
        index = int(os.environ["SLURM_ARRAY_TASK_ID"])
        return range(index, index + 1)
    first, _, last = words[0].partition("-")
    return range(int(first), int(last) + 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), _indices(sys.argv[3:]))
