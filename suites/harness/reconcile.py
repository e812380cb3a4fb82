"""What is true of all submissions: what Slurm says, what records say, and a record for every run
that could not write its own. Any process may do it at any time, several at once too: a record of
theirs never replaces one that a run has written.
"""

import json
import re
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from suites.harness import (
    checkpoint,
    claims,
    launch,
    plan,
    provenance,
    rounds,
    slurm,
    states,
    submission,
)
from suites.harness.execute import (
    Task,
    began,
    last_phase,
    new_attempt,
    phase_path,
    times_of_killed,
    utc_now,
)
from suites.harness.plan import Planned
from suites.harness.record import Record, record_path, write
from suites.harness.slurm import Seen, Unreachable
from suites.harness.states import Memory, TaskState
from suites.harness.submission import Array, Submission
from suites.harness.sweep import block_claim, units

ORPHAN_S = 600.0  # from a submitter's last sign of life, until what it left is given up
UNREADABLE = (ValueError, TypeError, KeyError)  # what files of a later version may raise
GONE = ("node_failure", "its process is gone, and the cause is not known")
SBATCH_S = 120.0  # the same where it is known to be dead, and its sbatch may still talk
_OOM_KILL = re.compile(r"^slurmstepd\S* error: .*oom-kill event")


@dataclass
class JobView:
    """One job of a submission, as it is now."""

    made: Submission
    array: int
    index: int
    state: TaskState
    seen: Seen | None = None
    beat: dict[str, Any] | None = None

    @property
    def run_ids(self) -> list[str]:
        return self.made.run_ids(self.array, self.index)


@dataclass
class View:
    """All jobs that may still do something, and what could not be asked."""

    jobs: list[JobView] = field(default_factory=list)
    silent: str | None = None  # why Slurm did not answer
    troubles: list[str] = field(default_factory=list)  # what could not be written, a line each

    def active_run_ids(self) -> set[str]:
        return {run_id for job in self.jobs for run_id in job.run_ids}


def reconcile(store: Path) -> View:
    """Settles the jobs that have ended; returns those that have not. One query for all of Slurm's,
    none where nothing is left to ask about."""
    view, now = View(), time.time()
    kept = [(one, one.memory()) for one in submission.read(store)]
    open_ones = [
        (one, set(memory.get("settled", ())))
        for one, memory in kept
        if not memory.get("is_settled")
    ]
    seen: dict[str, Seen] = {}
    silent: dict[str, str] = {}
    others: list[str] = []
    for executor in ("local", "slurm"):
        try:
            for made, settled in open_ones:
                _adopt(made, settled, executor)
            job_ids = _job_ids(open_ones, executor)
            if executor == "slurm":
                others = _other_jobs(store, job_ids)
                job_ids += others
            if job_ids:
                seen |= launch.launcher(executor).poll(job_ids)
        except Unreachable as error:
            silent[executor] = str(error)
    view.silent = silent.get("slurm")
    for made, _ in open_ones:
        view.jobs += _settle(made, seen, now, silent, view.troubles)
    _release_dead(store, others, seen, now, is_answered="slurm" not in silent)
    claims.sweep_up(store)
    return view


def close_our_own(store: Path, run_ids: Iterable[str]) -> None:
    """The records of what an earlier start of our own job left open. Slurm is asked only where it
    left something: all jobs of an array begin at once."""
    tasks = [task for run_id in run_ids for task in open_attempts(store, run_id)]
    ours = [task for task in tasks if claims.is_earlier(task.owner)]
    earlier = slurm.earlier_end(provenance.job_id()) if ours else None
    for task in tasks:
        if task in ours:
            _write(store, task, *states.verdict(earlier))
        elif not claims.is_alive(task.owner):  # of a process of its own on this machine
            _write(store, task, *GONE)


def write_unsupported(store: Path, item: Planned, reason: str) -> None:
    """The record of a point that fits nowhere: it is not started."""
    task = Task(
        run=item.run, build=item.build, attempt=new_attempt(), parent_pid=0, costs=item.costs
    )
    record = task.record(
        "unsupported",
        reason=reason,
        phase="start",
        provenance={"device_kind": item.run.device_kind, "versions": provenance.versions()},
        started_at=utc_now(),
        seconds=0.0,
    )
    write(store, record)


def open_attempts(store: Path, run_id: str) -> Iterator[Task]:
    """Attempts that were begun, and have no record."""
    for path in sorted((store / "runs" / run_id).glob(".task-*.json")):
        with suppress(OSError, *UNREADABLE):  # it ends just now, or is a later version's
            task = Task.from_json(json.loads(path.read_text(encoding="utf-8")))
            if not record_path(store, run_id, task.attempt).exists():
                yield task


def _adopt(made: Submission, settled: set[str], executor: str) -> None:
    """Finds the arrays whose submitter was killed between sbatch and its bookkeeping, and those
    that were taken although sbatch says that they were not: its answer was too late. Slurm is asked
    for each, until it is settled that there is none."""
    for array in made.arrays:
        number = array.number
        if settled.issuperset(_names(array)):
            continue
        if made.cluster(number).executor != executor or made.job_id(number) is not None:
            continue
        if (job_id := launch.launcher(executor).find(made, number)) is not None:
            with suppress(OSError):  # a full disk, or another user's folder: others will find it
                made.remember_job_id(number, job_id)


def _names(array: Array) -> set[str]:
    return {f"{array.number}_{index}" for index in range(array.num_jobs)}


def _job_ids(open_ones: list[tuple[Submission, set[str]]], executor: str) -> list[str]:
    """Of Slurm's jobs that are not settled, by name: accounts are asked only about them. Elsewhere
    of their arrays."""
    found = []
    for made, settled in open_ones:
        for array in made.arrays:
            names = _names(array) - settled
            job_id = made.job_id(array.number)
            is_asked = made.cluster(array.number).executor == executor and job_id is not None
            if is_asked and executor == "slurm":
                found += [f"{job_id}_{name.partition('_')[2]}" for name in names]
            elif is_asked and names:
                found.append(job_id)
    return found


def _other_jobs(store: Path, job_ids: Container[str]) -> list[str]:
    """Jobs that have claims, and are not asked about: of no submission that is open."""
    jobs = {owner.get("job") for owner in claims.owners(store).values()}
    return sorted(job for job in jobs if job is not None and job not in job_ids)


def _release_dead(
    store: Path, others: Container[str], seen: dict[str, Seen], now: float, *, is_answered: bool
) -> None:
    """Gives back what no end of a job of ours will: the claims of commands that were killed, here
    or in a job that was the user's own (salloc), which has ended."""
    for name, owner in claims.owners(store).items():
        job, place = owner.get("job"), store / "claims" / name / "seen.json"
        is_over = job in others and _is_over(place, seen.get(job), now, is_answered)
        if is_over or not claims.is_alive(owner):
            with suppress(OSError):  # another user's
                claims.release(store, name, owner["token"])


def _is_over(place: Path, one: Seen | None, now: float, is_answered: bool) -> bool:
    """Whether a job of nobody's submission is over. What is remembered of it goes with its claim:
    the folder is never made here, as one without an owner is a claim, too."""
    kept: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        kept = json.loads(place.read_text(encoding="utf-8"))
    state, memory = states.look(
        one,
        Memory.of(kept),
        now=now,
        beat_age_s=None,
        lost_after_s=ORPHAN_S,
        is_requeued=True,  # perhaps: Slurm knows
        is_answered=is_answered,
    )
    if state not in states.OVER and vars(memory) != kept:
        with suppress(OSError):
            place.write_text(json.dumps(vars(memory)), encoding="utf-8")
    return state in states.OVER


def _settle(
    made: Submission,
    seen: dict[str, Seen],
    now: float,
    silent: Container[str],
    troubles: list[str],
) -> list[JobView]:
    """The jobs of a submission that have not ended; those that have are closed and remembered.
    `silent` are the executors that did not answer; `troubles` takes what could not be written."""
    kept = made.memory()
    settled, looks = set(kept.get("settled", ())), dict(kept.get("looks", {}))
    beats, open_jobs, held = made.beats(), [], []
    answers = {array.number: made.answer(array.number) for array in made.arrays}
    for array, index in made.places():
        name, cluster = f"{array}_{index}", made.cluster(array)
        job_id = made.job_id(array)
        if name in settled:
            continue
        is_answered = cluster.executor not in silent
        if job_id is None:
            if is_answered and _is_never_submitted(made, array, answers, now):
                settled.add(name)  # never submitted: its runs are as before
            else:
                open_jobs.append(JobView(made, array, index, TaskState.PLANNED))
            continue
        one = seen.get(f"{job_id}_{index}") or seen.get(job_id)
        if one is not None and one.name not in ("", made.job_name(array)):
            one = None  # of this number, and not ours
        if states.must_release(one, Memory.of(looks.get(name, {}))):
            held.append(f"{job_id}_{index}")
        beat = beats.get((array, index))
        has_said = beat is not None and "ended_at" in beat  # its last word: all is written
        is_here = cluster.executor == "local"  # whose processes are there, or are not
        state, memory = states.look(
            one,
            Memory.of(looks.get(name, {})),
            now=now,
            beat_age_s=None if beat is None or has_said or is_here else now - beat["at"],
            lost_after_s=0.0 if has_said or is_here else cluster.lost_after_s,
            is_requeued=cluster.is_requeued,
            is_answered=is_answered and (has_said or not made.is_elsewhere(array)),
        )
        looks[name] = vars(memory)
        is_seen = has_said or (memory.ended_at and now - memory.ended_at >= cluster.view_s)
        if state not in states.OVER or not is_seen:
            open_jobs.append(JobView(made, array, index, state, memory.seen, beat))
            continue
        try:
            _close(made, array, index, memory.seen, beat)
        except OSError as error:  # a full disk, or another user's folder: later, or somebody else
            troubles.append(f"{made.id}: job {name} cannot be closed: {error}")
            open_jobs.append(JobView(made, array, index, state, memory.seen, beat))
            continue
        settled.add(name)
        looks.pop(name)
    is_settled = not open_jobs
    fresh = {"settled": sorted(settled), "looks": looks, "is_settled": is_settled}
    if fresh != kept:
        with suppress(OSError):  # of another user: it is looked at again next time
            made.remember(fresh)
            with suppress(Unreachable):
                slurm.release(held)
    return open_jobs


def _is_never_submitted(
    made: Submission, array: int, answers: dict[int, dict[str, Any]], now: float
) -> bool:
    """Whether an array without a job id will not get one any more: Slurm may take it as long as an
    sbatch talks, which outlives its submitter, or after one that gave up waiting."""
    cluster = made.cluster(array)
    is_local, sbatch_s = cluster.executor == "local", min(SBATCH_S, cluster.lost_after_s)
    if refusal := answers[array].get("refusal"):
        is_told = is_local or not launch.may_be_taken(refusal)
        return is_told or now - submission.seconds(answers[array]["submitted_at"]) > sbatch_s
    is_dead = made.owner["host"] == provenance.node() and not claims.is_alive(made.owner)
    if is_dead and is_local:
        return True
    said = [submission.seconds(one["submitted_at"]) for one in answers.values() if one]
    return now - max([made.created_s, *said]) > (sbatch_s if is_dead else ORPHAN_S)


def _close(
    made: Submission, array: int, index: int, one: Seen | None, beat: dict[str, Any] | None
) -> None:
    """Records and claims of a job that has ended, for what it could not do itself."""
    key, limit_s = f"{made.job_id(array)}_{index}", made.cluster(array).time_s
    given, state = made.runs(array, index), one and one.state
    spared = rounds.not_needed(made.store, given)
    printed = [] if state == "COMPLETED" else _printed(made, array, index)
    if state == "FAILED" and any(map(_OOM_KILL.search, printed)):
        one = replace(one, state="OUT_OF_MEMORY")  # so says the step; the queue knows the job alone
    words = [line for line in printed if not line.startswith("srun:")] or printed  # it only reports
    for name in filter(None, map(block_claim, units(given))):
        _give_back(made.store, name, key)
    for item in given:
        run_id, has_begun = item.run.run_id, False
        for task in open_attempts(made.store, run_id):
            is_ours = task.owner.get("job") == key
            if is_ours or not claims.is_alive(task.owner):
                has_begun = True
                end = states.verdict(one, limit_s=limit_s) if is_ours else GONE
                _write(made.store, task, *end)
        _give_back(made.store, run_id, key)
        outcome, reason = states.verdict(one, has_begun=False, limit_s=limit_s)
        has_failed = outcome is not None and (one is None or one.state != "COMPLETED")
        if has_failed and not has_begun and run_id not in spared:
            # the last words of a job that did not even get as far as our code
            said = f"{reason}: {words[-1][:300]}" if words and beat is None else reason
            _never_began(made, array, index, item, outcome, said)


def _give_back(store: Path, name: str, key: str) -> None:
    """Releases what a job that has ended, or a process that is dead, had claimed."""
    owner = claims.owner(store, name)
    if owner is not None and (owner.get("job") == key or not claims.is_alive(owner)):
        claims.release(store, name, owner["token"])


def _printed(made: Submission, array: int, index: int) -> list[str]:
    """The lines of a job's log, as far as there is one and we may read it."""
    try:
        log = launch.log_of(made, array, index)
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def _never_began(
    made: Submission, array: int, index: int, item: Planned, outcome: str, reason: str
) -> None:
    """One record for a run that its job did not reach; its attempt is named after the job, so that
    of two who write it one does."""
    if any(r["attempt"] not in item.attempts for r in plan.attempts(made.store, item.run.run_id)):
        return
    attempt = f"{made.stamp}999999-{made.id}-{array}-{index}"
    task = Task(
        run=item.run, build=item.build, attempt=attempt, parent_pid=0, costs=item.costs,
        order=item.order,
    )  # fmt: skip
    record = task.record(
        outcome,
        reason=reason,
        phase="start",
        provenance={"device_kind": item.run.device_kind},
        started_at=utc_now(),
        seconds=0.0,
    )
    _write_once(made.store, record)


def _write(store: Path, task: Task, outcome: str, reason: str) -> None:
    """The record of an attempt that was killed, up to its last sign of life."""
    start, path, seconds = began(task.attempt), phase_path(store, task), 0.0
    with suppress(FileNotFoundError):  # it had said nothing yet
        seconds = max(path.stat().st_mtime - start.timestamp(), 0.0)
    record = task.record(
        outcome,
        reason=reason,
        phase=last_phase(store, task),
        provenance={"device_kind": task.run.device_kind, **task.owner},
        samples=checkpoint.curve(store, task.run.run_id),
        started_at=start.isoformat(timespec="seconds"),
        seconds=seconds,
        times=times_of_killed(store, task, seconds),
    )
    _write_once(store, record)
    record_path(store, task.run.run_id, f".task-{task.attempt}").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _write_once(store: Path, record: Record) -> None:
    with suppress(FileExistsError):  # the run's own, seen late
        write(store, record, may_replace=False)
