"""How a cluster ends jobs, by time, cancellation and preemption; whether they can save in time."""

from collections.abc import Iterator

from suites.doctor.finding import OK, WARNING, Finding
from suites.harness import worker
from suites.harness.cluster import Cluster
from suites.harness.slurm import Limits, Partition

CHECKPOINT_S = 20.0  # for a last checkpoint; a shorter warning is not worth much


def times(cluster: Cluster, limits: Limits | None) -> Iterator[Finding]:
    """Settings of the cluster file that cannot work together."""
    if cluster.executor != "slurm":
        return
    left = cluster.time_s - cluster.stop_warning_s
    found = (
        f"time {cluster.time_s} s, stop_warning_s {cluster.stop_warning_s}, "
        f"run_limit_s {cluster.run_limit_s:g}, checkpoint_s {cluster.checkpoint_s:g}"
    )
    advice = []
    if cluster.run_limit_s > left:
        advice.append(
            f"a run may take {cluster.run_limit_s:g} s, and its job is told to stop after {left}: "
            "raise cluster.time or lower cluster.run_limit_s"
        )
    if cluster.checkpoint_s >= left:
        advice.append(
            f"a job is told to stop after {left} s, before its first checkpoint: lower "
            "cluster.checkpoint_s"
        )
    if cluster.stop_warning_s < CHECKPOINT_S + worker.RECORDS_S:
        rest = max(cluster.stop_warning_s - worker.RECORDS_S, 1.0)
        advice.append(
            f"{rest:g} s for a last checkpoint: raise cluster.stop_warning_s to "
            f"{CHECKPOINT_S + worker.RECORDS_S:g} or more"
        )
    yield Finding("times", found, WARNING if advice else OK, "; ".join(advice))
    kill_wait = limits and limits.kill_wait_s
    if kill_wait is not None and kill_wait < worker.RECORDS_S:
        advice = (
            f"jobs count on {worker.RECORDS_S:g} s to write records once they are cancelled; those "
            "that are missing the next aerie status writes"
        )
        yield Finding("KillWait", f"{kill_wait:g} s", WARNING, advice)
    elif kill_wait is not None:
        yield Finding("KillWait", f"{kill_wait:g} s", OK)


def preemption(name: str, found: Partition, cluster: Cluster, limits: Limits) -> Finding:
    what, kind = f"preemption in {name}", limits.preempt_type or ""
    if kind.rpartition("/")[2] in ("", "none", "(null)"):
        return Finding(what, "none", OK)
    mode = found.preempt_mode or limits.preempt_mode or "mode unknown"
    by_qos = "; a QOS may have a mode and a grace of its own" if kind.endswith("qos") else ""
    if mode == "OFF" and not by_qos:
        return Finding(what, f"{kind}, OFF: jobs there stay", OK)
    grace = found.grace_s or 0.0
    sent = "the warning signal is sent" if limits.warns_of_preemption else "SIGTERM alone is sent"
    words = f"{kind}, {mode}, grace {grace:g} s; {sent}{by_qos}"
    if "SUSPEND" in mode or "GANG" in mode:
        advice = "a suspended job's timings are wrong: measure where nothing preempts"
        return Finding(what, words, WARNING, advice)
    has = grace + (limits.kill_wait_s or 0.0)
    needs = cluster.stop_warning_s if limits.warns_of_preemption else worker.KILL_S
    if has < needs:
        return Finding(what, words, WARNING, _short_grace(has, needs, cluster, limits))
    return Finding(what, words, OK)


def requeue(cluster: Cluster, limits: Limits) -> Finding:
    default = {True: "1", False: "0"}.get(limits.may_requeue, "unknown")
    if cluster.is_requeued:
        return Finding("JobRequeue", f"{default}; our jobs ask for it", OK)
    return Finding(
        "JobRequeue",
        f"{default}; our jobs ask not to be",
        OK,
        "after preemption and node failure, aerie submit sends what is missing",
    )


def _short_grace(has: float, needs: float, cluster: Cluster, limits: Limits) -> str:
    """What a preempted job loses where it is killed before it has done what it would."""
    lost = f"a quality run may go back to a checkpoint {cluster.checkpoint_s:g} s old"
    if limits.warns_of_preemption and has >= CHECKPOINT_S + worker.RECORDS_S:
        return f"killed after {has:g} s, and {lost}: set cluster.stop_warning_s={has:g}"
    return f"killed after {has:g} s instead of {needs:g}: {lost}; lower cluster.checkpoint_s"
