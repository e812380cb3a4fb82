"""The state machine: what Slurm said of a job, and for how long it has said nothing, give what is
true of it. Pure functions; records decide what is true of a run (plan.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from suites.harness.slurm import Seen

# How often a run that ended so is measured again without being asked for: per submission.
BUDGETS = {"preempted": 100, "node_failure": 3, "timed_out": 1}
FRESH_S = 120.0  # a sign of life that is younger says that a job lives
EARLY_S = 90.0  # that the warning before a time limit may come too soon: Slurm counts in minutes


class TaskState(StrEnum):
    PLANNED = "planned"  # intended, not known to Slurm
    QUEUED = "queued"
    RUNNING = "running"
    STOPPING = "stopping"  # about to end, or to be started again
    ENDED = "ended"
    LOST = "lost"  # out of the queue for long, and nobody says how


_QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING")
# After these Slurm may start a job again: an end only once it has stayed out of the queue.
_PASSING = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "COMPLETING", "STAGE_OUT", "REVOKED")
_FINAL = {
    "COMPLETED": "completed",
    "FAILED": "failed",
    "LAUNCH_FAILED": "failed",
    "RECONFIG_FAIL": "failed",
    "CANCELLED": "cancelled",
    "TIMEOUT": "timed_out",
    "DEADLINE": "timed_out",
    "OUT_OF_MEMORY": "out_of_memory",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node_failure",
    "BOOT_FAIL": "node_failure",
}


@dataclass(frozen=True)
class Memory:
    """What is remembered of a job between two looks."""

    absent_since: float | None = None  # it is not in the queue since then, whenever Slurm answered
    last: str = ""  # state that Slurm named last
    ended_at: float | None = None


def look(
    seen: Seen | None,
    memory: Memory,
    *,
    now: float,
    beat_age_s: float | None,
    lost_after_s: float,
    is_requeued: bool,
    is_answered: bool,
) -> tuple[TaskState, Memory]:
    """What is true of a job now. Without an answer nothing changes; a fresh sign of life of the
    job itself is worth more than its absence from the queue."""
    if not is_answered:
        return _state_of(memory), memory
    if seen is not None:
        memory = replace(memory, last=seen.state)
    state = memory.last
    if seen is not None and state not in _FINAL and state not in _PASSING:
        return _state_of(memory), replace(memory, absent_since=None, ended_at=None)
    if state in ("COMPLETING", "STAGE_OUT") and seen is not None:
        return TaskState.STOPPING, replace(memory, absent_since=None, ended_at=None)
    memory = replace(memory, absent_since=memory.absent_since or now)
    absent_s = now - memory.absent_since
    if seen is not None and state in _FINAL and not (state in _PASSING and is_requeued):
        return TaskState.ENDED, _ended(memory, now)
    is_alive = beat_age_s is not None and beat_age_s < FRESH_S
    if absent_s < lost_after_s or is_alive:
        return TaskState.STOPPING, memory
    return (TaskState.ENDED if state in _FINAL else TaskState.LOST), _ended(memory, now)


def verdict(seen: Seen | None) -> tuple[str, str]:
    """Outcome and reason for a run that was measured, or waited, in a job that has ended."""
    if seen is None:
        return "node_failure", "lost: its job left the queue, and no accounts say why"
    outcome = _FINAL.get(seen.state, "node_failure")
    words = {
        "completed": "its job ended without a word of this run",
        "failed": "its job failed",
        "cancelled": f"its job was cancelled by user {seen.by or 'unknown'}",
        "timed_out": "its job came to its time limit",
        "out_of_memory": "its job was killed: more memory than cluster.mem",
        "preempted": "its job was preempted",
        "node_failure": f"node {seen.node or 'unknown'} failed",
    }
    return outcome, f"{words[outcome]} ({seen.state})"


def stop_reason(
    *, elapsed_s: float, limit_s: float, warning_s: float, job: dict[str, Any]
) -> tuple[str, str]:
    """Outcome and reason when a job is told to stop: its time limit, somebody's wish, or another
    job in its place. `job` is what the controller says, if it does."""
    state = job.get("JobState", "")
    if state in ("CANCELLED",):
        return "cancelled", "its job was cancelled"
    if job.get("PreemptTime", "None") not in ("None", "") or state == "PREEMPTED":
        return "preempted", "its job was preempted"
    if elapsed_s >= limit_s - warning_s - EARLY_S:
        return "timed_out", f"its job came to its time limit of {limit_s / 60:g} min"
    return "preempted", "its job was told to stop, before its time limit"


def may_retry(outcomes: Sequence[str]) -> tuple[bool, str]:
    """Whether a run with these ends, none of them a result, is measured again unasked; and why."""
    last = outcomes[-1] if outcomes else ""
    if not last:
        return True, "new"
    budget, count = BUDGETS.get(last, 0), outcomes.count(last)
    return count <= budget, f"{last} {count} of {budget}"


def _state_of(memory: Memory) -> TaskState:
    if memory.ended_at is not None:
        return TaskState.ENDED
    if memory.absent_since is not None:
        return TaskState.STOPPING
    if memory.last in _QUEUED or not memory.last:
        return TaskState.QUEUED
    return TaskState.RUNNING  # also in a state that is not known here


def _ended(memory: Memory, now: float) -> Memory:
    return replace(memory, ended_at=memory.ended_at or now)
