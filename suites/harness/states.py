"""What is true of a job and of its runs: what Slurm says, and what was seen before. Pure functions.

Slurm's PREEMPTED and NODE_FAIL are no end while the job may be started again; a job that is not in
the queue is lost only after it was absent for a while without a break, Slurm answering and its
worker giving no sign of life. The record of a run decides; a verdict is for runs without one.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

from suites.harness import slurm
from suites.harness.plan import FINISHED
from suites.harness.slurm import Job, Seen

# How often a run is tried again after an end of each kind; ends that are not here: never.
BUDGETS = {"preempted": 100, "node_failure": 3, "timed_out": 1}

# Slurm's words for a job that it holds, because a node could not start it. It waits until somebody
# releases it.
NOT_LAUNCHED = "launch failed requeued held"
EARLY_S = 60.0  # Slurm may warn of a time limit this much earlier than it was asked to (sbatch(1))
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)  # that Slurm sends before it kills


class TaskState(StrEnum):
    """Where a job is. `stopping` may come back; `lost` has gone without a word."""

    PLANNED = "planned"  # the intent is written, and there is no job id
    QUEUED = "queued"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"
    LOST = "lost"


OVER = (TaskState.ENDED, TaskState.LOST)

_LIVE = {
    slurm.WAITING: TaskState.QUEUED,
    slurm.RUNNING: TaskState.RUNNING,
    slurm.STOPPING: TaskState.STOPPING,
}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is kept of a job between two looks; plain values, for a file. It has a job id."""

    state: str = TaskState.QUEUED
    absent_s: float = 0.0  # how long it was out of the queue, Slurm answering
    absent_at: float | None = None  # the last look, if it was absent there
    ended_at: float | None = None  # when it was first found to be over
    last: dict | None = None  # what Slurm said last
    num_released: int = 0  # after it was held, since it could not be started

    @property
    def seen(self) -> Seen | None:
        return Seen(**_known(Seen, self.last)) if self.last else None

    @classmethod
    def of(cls, kept: dict[str, Any]) -> "Memory":
        """Without what a later version keeps: jobs run from older copies of the code."""
        return cls(**_known(cls, kept))


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def look(
    seen: Seen | None,
    memory: Memory,
    *,
    now: float,
    beat_age_s: float | None,
    lost_after_s: float,
    is_requeued: bool,
    is_answered: bool = True,
) -> tuple[TaskState, Memory]:
    """Where a job is now. `seen` is what Slurm said of it, `beat_age_s` the age of its worker's
    last sign of life, `is_requeued` whether Slurm may start it again. Where Slurm did not answer,
    nothing changes, and the time since the last look does not count."""
    before = TaskState(memory.state)
    if not is_answered:
        return before, replace(memory, absent_at=None)
    if seen is not None and seen.is_in_queue:
        state = _LIVE.get(slurm.kind(seen.state), TaskState.STOPPING)
        number = memory.num_released + must_release(seen, memory)
        return state, Memory(state=state.value, last=vars(seen), num_released=number)
    if before in OVER:  # and not in the queue again
        return before, _learnt(memory, seen)
    kind = slurm.kind(seen.state) if seen is not None else None
    if kind == slurm.ENDED or (kind == slurm.INTERRUPTED and not is_requeued):
        return _over(TaskState.ENDED, _learnt(memory, seen), now)

    since = now if memory.absent_at is None else memory.absent_at
    absent_s = memory.absent_s + max(now - since, 0.0)
    memory = replace(_learnt(memory, seen), absent_s=absent_s, absent_at=now)
    is_beating = beat_age_s is not None and beat_age_s < lost_after_s
    if absent_s >= lost_after_s and not is_beating:
        is_known = memory.seen is not None and slurm.kind(memory.seen.state) == slurm.INTERRUPTED
        return _over(TaskState.ENDED if is_known else TaskState.LOST, memory, now)
    state = TaskState.STOPPING
    if kind != slurm.INTERRUPTED and is_beating:
        state = TaskState.RUNNING
    elif before == TaskState.QUEUED and seen is None:
        state = before
    return state, replace(memory, state=state.value)


def must_release(seen: Seen | None, memory: Memory) -> bool:
    """Whether a job is held since a node could not start it, and not for the last time: it is
    tried again as often as one whose node fails."""
    is_held = seen is not None and seen.is_in_queue and NOT_LAUNCHED in seen.reason.lower()
    return is_held and memory.num_released < BUDGETS["node_failure"]


def _over(state: TaskState, memory: Memory, now: float) -> tuple[TaskState, Memory]:
    return state, replace(memory, state=state.value, ended_at=now)


def _learnt(memory: Memory, seen: Seen | None) -> Memory:
    """Remembers an end; accounts that still show a job running, which has left the queue, are late
    or wrong, and hide no end that was seen."""
    last = memory.seen
    is_end = seen is not None and slurm.kind(seen.state) in slurm.OVER
    if seen is None or (last is not None and slurm.kind(last.state) in slurm.OVER and not is_end):
        return memory
    return replace(memory, last=vars(seen))


def verdict(
    seen: Seen | None, *, has_begun: bool = True, limit_s: float | None = None
) -> tuple[str | None, str]:
    """Outcome and reason of a run without a record, whose job is over; `seen` is what Slurm said
    last of the job, `limit_s` the time limit.

    A run that had not begun did not run out of memory or time: where nobody cancelled its job, and
    the job did not fail on its own, there was no attempt, its outcome is None, and it is still to
    be run.
    """
    outcome, reason = _end(seen, limit_s)
    is_in_order = seen is not None and seen.state == "COMPLETED"
    is_attempt = has_begun or (outcome in ("cancelled", "failed") and not is_in_order)
    return (outcome if is_attempt else None), reason


def _end(seen: Seen | None, limit_s: float | None) -> tuple[str, str]:
    if seen is None:
        return "node_failure", "the job has left the queue, and the cause is not known"
    state, more = seen.state, f" ({seen.reason})" if seen.reason else ""
    node = seen.node or "its node"
    simple = {
        "COMPLETED": ("failed", "the job ended as if in order, and this run has left no record"),
        "TIMEOUT": ("timed_out", "the time limit of the job was reached"),
        "DEADLINE": ("timed_out", "the deadline of the job was reached"),
        "OUT_OF_MEMORY": ("out_of_memory", "the memory of the job was used up (Slurm)"),
        "CANCELLED": ("cancelled", f"the job was cancelled{more}"),
        "PREEMPTED": ("preempted", "the job was preempted"),
        "REQUEUED": ("preempted", "the job was requeued; Slurm does not say why"),
        "REVOKED": ("preempted", "the job was revoked: a sibling in the federation runs"),
        "NODE_FAIL": ("node_failure", f"{node} failed{more}"),
        "BOOT_FAIL": ("node_failure", f"{node} did not start{more}"),
        "RECONFIG_FAIL": ("node_failure", f"{node} could not be set up{more}"),
        "LAUNCH_FAILED": ("node_failure", f"the job could not be started on {node}{more}"),
    }
    if state in simple:
        return simple[state]
    if state == "FAILED":
        return _failed(seen, limit_s)
    if limit_s is not None and (seen.elapsed_s or 0.0) >= limit_s:
        return "timed_out", f"last seen at its time limit of {limit_s:g} s"
    return "node_failure", f"last seen {state} on {node}, then gone; the cause is not known"


def _failed(seen: Seen, limit_s: float | None) -> tuple[str, str]:
    """A job that was told to stop, and died of it, has failed for Slurm. A shell says 128 + n of a
    signal n, and sacct takes the 128 away again."""
    code = seen.exit_code or 0
    number = -code if code < 0 else code - 128 if code > 128 else code * (code in STOP_SIGNALS)
    is_signal = number in signal.valid_signals()
    how = f"by {signal.Signals(number).name}" if is_signal else f"with exit code {code}"
    if seen.is_preempted:
        return "preempted", f"the job was preempted, and ended {how}"
    if is_signal and number in STOP_SIGNALS:
        if limit_s is not None and (seen.elapsed_s or 0.0) >= limit_s - EARLY_S:
            return "timed_out", f"the job ended {how} at its time limit"
        return "preempted", f"the job ended {how} before it could listen: it was told to stop"
    more = f" ({seen.reason})" if seen.reason not in ("", "NonZeroExitCode") else ""
    return "failed", f"the job ended {how}{more}"


def stop_reason(
    *,
    elapsed_s: float,
    limit_s: float | None,
    warning_s: float,
    job: Job | None,
    restarts: int | None = None,
) -> tuple[str, str]:
    """Why a worker is told to stop: outcome and reason of what it cannot finish.

    Slurm sends one signal for a time limit that is near, and for preemption. What the controller
    says of the job decides; where it says nothing, the time that is left: a warning comes at most
    EARLY_S too early. `restarts` is how often our own start was a restart.
    """
    if job is not None:
        elapsed_s, limit_s = max(elapsed_s, job.elapsed_s or 0.0), job.limit_s
        if job.is_preempted or job.state == "PREEMPTED":
            return "preempted", "the job is being preempted"
        if restarts is not None and job.restarts > restarts:
            return "preempted", "the job is being requeued"
        if job.state in ("CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", *_FAILING):
            return _end(Seen(state=job.state, is_in_queue=False, reason=job.reason), limit_s)
        if job.reason == "TimeLimit":
            return "timed_out", "the time limit of the job was reached"
        if job.state == "COMPLETING":
            return "cancelled", "the job is being ended"
    if limit_s is None:
        return "preempted", "told to stop, and the job has no time limit"
    near_s = limit_s - warning_s - EARLY_S
    left = f"{max(limit_s - elapsed_s, 0.0):.0f} of {limit_s:.0f} s were left"
    if elapsed_s >= limit_s or (elapsed_s >= near_s and (near_s > 0 or job is not None)):
        return "timed_out", f"the time limit of the job is near: {left}"
    return "preempted", f"told to stop long before the time limit: {left}"


_FAILING = ("NODE_FAIL", "BOOT_FAIL")


def may_retry(outcomes: Sequence[str]) -> tuple[bool, str]:
    """Whether a run is tried again, by the ends of its attempts with one build, oldest first; and
    why, or why not. The last end decides: what a user has asked for again is counted anew."""
    if not outcomes:
        return True, "new"
    if finished := next((end for end in reversed(outcomes) if end in FINISHED), None):
        return False, finished
    last = outcomes[-1]
    count, budget = outcomes.count(last), BUDGETS.get(last, 0)
    if not budget:
        return False, f"{last} is not tried again"
    if count > budget:
        return False, f"{last} {count} times, and tried again {budget}"
    return True, f"{last} {count} of {budget}"


def run_state(
    outcomes: Sequence[str],
    task: TaskState | None,
    *,
    is_claimed: bool,
    num_before: int = 0,
) -> str:
    """The state of one run: its outcome, or planned, queued, running, stopping, lost, to_retry (it
    goes again), given_up (its retries are used up).

    `outcomes` are the ends of its attempts, oldest first, of which `num_before` were there when it
    was submitted; `task` is where its job is, None where that is settled. What was there before
    counts only where the submission is over and has left no end.
    """
    outcomes, before = outcomes[num_before:], outcomes[:num_before]
    if task is None:
        outcomes = outcomes or before
    if finished := next((end for end in reversed(outcomes) if end in FINISHED), None):
        return finished
    is_open = task is not None and task not in OVER
    if is_claimed and task is not None:
        if task in OVER:
            return "lost" if task == TaskState.LOST else "stopping"  # its record is on its way
        return "running" if task == TaskState.RUNNING else "stopping"
    if is_open and not outcomes:
        return "planned" if task == TaskState.PLANNED else "queued"
    if not outcomes:
        return "lost" if task == TaskState.LOST else "planned"
    if may_retry(outcomes)[0]:
        return "to_retry"
    return "given_up" if outcomes[-1] in BUDGETS else outcomes[-1]
