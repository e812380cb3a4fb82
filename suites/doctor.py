"""`aerie doctor cluster=NAME`: whether a cluster takes our jobs, and how it treats them.

From the login node it asks Slurm, the store and the interpreters; then one short job, started as
every job is, tells what a node finds (suites/harness/talk.py). Nothing is guessed:
what could not be asked is said to be unknown.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from implementations.engine import CPU, TPUS
from suites import compose, display
from suites.commands import AS_PLANNED, NOT_AS_PLANNED, one_line
from suites.harness import examine, launch, provenance, slurm, snapshot, talk, worker
from suites.harness.cluster import Cluster
from suites.harness.slurm import Limits, Partition
from suites.harness.talk import Heard, Round

OK, WARNING, PROBLEM = "ok", "warning", "problem"
COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun")
OLDEST = (20, 11)  # Slurm whose answers are known here
BACKENDS = ("jax", "torch")
CHECKPOINT_S = 20.0  # for a last checkpoint; a shorter warning is not worth much
MIN_FREE_BYTES = 2**30
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "fhgfs", "ceph", "panfs", "wekafs", "pvfs", "orangefs",
          "glusterfs", "cifs", "smb", "afs", "9p", "virtiofs", "daos", "fuse.")  # fmt: skip
# What sbatch complains of -> the setting that says so.
CAUSES = {
    "account": "cluster.account or cluster.partition: sacctmgr show assoc user=$USER lists yours",
    "partition": "cluster.partition: sinfo lists them",
    "qos": "cluster.qos: sacctmgr show qos lists them",
    "time limit": "cluster.time",
    "feature": "cluster.constraint: sinfo -o '%P %f' lists them",
    "gres": "cluster.gres: sinfo -o '%P %G' lists them",
    "memory": "cluster.mem: sinfo -o '%P %m' lists what nodes have, in MB",
    "node": "cluster.gres, cpus_per_task, mem, constraint: no node has all of that; "
    "sinfo -o '%P %c %m %G %f' lists what they have",
}


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, what was found, and where it matters what to think of it."""

    what: str
    found: str
    verdict: str = ""
    advice: str = ""


def doctor(
    overrides: list[str],
    store: Path,
    *,
    timeout_s: float = 300.0,
    with_job: bool = True,
    as_json: bool = False,
) -> int:
    """Examines one cluster: 0 where nothing keeps runs from ending well, 1 where something does."""
    with one_line():
        cluster = _cluster(overrides)
        if timeout_s <= 0:
            raise ValueError(f"--timeout {timeout_s:g}; must be positive.")
        if store.exists() and not store.is_dir():
            raise ValueError(f"--results {store} is a file; name a folder.")
    here = list(_look_here(cluster, store))
    if not as_json:
        _print(f"cluster={cluster.name}, from here", here)
    there: list[Finding] = []
    report: dict[str, Any] | None = None
    if with_job:
        if _worst(here, "commands", "store", "request", "Slurm") == PROBLEM:
            there = [Finding("job", "not submitted: it could not run", "", "")]
        else:
            there, report = _examine(cluster, store.resolve(), timeout_s)
        if not as_json:
            _print("from a node", there)
    findings = [*here, *there]
    if as_json:
        rows = [{"place": "here", **asdict(one)} for one in here]
        rows += [{"place": "node", **asdict(one)} for one in there]
        display.print_json({"cluster": cluster.name, "verdict": _worst(findings),
                            "findings": rows, "node": report})  # fmt: skip
    else:
        print(_summary(findings))
    return NOT_AS_PLANNED if _worst(findings) == PROBLEM else AS_PLANNED


def _cluster(overrides: list[str]) -> Cluster:
    for key in compose.parse(overrides):
        if key != "cluster" and not key.startswith("cluster."):
            raise ValueError(f"doctor: {key}: it takes cluster=NAME and cluster.KEY=VALUE alone.")
    clusters = compose.read(overrides, bare=compose.BARE_PLAN).clusters
    if len(clusters) > 1:
        raise ValueError(f"doctor: {len(clusters)} clusters: name one.")
    return clusters[0]


# From here --------------------------------------------------------------------------------------


def _look_here(cluster: Cluster, store: Path) -> Iterator[Finding]:
    limits = None
    if cluster.executor == "slurm":
        missing = [name for name in COMMANDS if shutil.which(name) is None]
        yield _commands(missing)
        if not missing:
            try:
                limits = slurm.limits(cluster.partition, cluster.account, cluster.qos)
            except slurm.Unreachable as error:
                advice = "nothing can be submitted now; ask again later: scontrol ping"
                yield Finding("Slurm", str(error), PROBLEM, advice)
    if limits is not None:
        yield from _site(cluster, limits)
    yield from _times(cluster, limits)
    yield from _store(store)
    yield from _interpreters(cluster)
    if limits is not None:
        yield _request(cluster, store)


def _commands(missing: list[str]) -> Finding:
    if not missing:
        return Finding("commands", ", ".join(COMMANDS), OK)
    return Finding(
        "commands",
        f"no {', '.join(missing)}",
        PROBLEM,
        "run this on a login node of the cluster, where Slurm's commands are (module load slurm?)",
    )


def _site(cluster: Cluster, limits: Limits) -> Iterator[Finding]:
    yield _version(limits.version)
    yield _accounting(limits)
    yield _array_size(cluster, limits)
    yield _queue(cluster, limits)
    names = cluster.partition.split(",") if cluster.partition else _default_partition()
    for name in names:
        yield _partition(name, cluster, limits)
    if not names:
        yield Finding("partition", "the site has no default", PROBLEM, "set cluster.partition")
    for name in names:
        if found := limits.partitions.get(name):
            yield _preemption(name, found, cluster, limits)
    yield _requeue(cluster, limits)


def _version(version: str | None) -> Finding:
    numbers = tuple(map(int, re.findall(r"\d+", version or "")[:2]))
    if not numbers:
        return Finding("Slurm", "version unknown")
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return Finding(
            "Slurm", version, WARNING, f"older than {oldest}: its answers may be misread"
        )
    return Finding("Slurm", version, OK)


def _accounting(limits: Limits) -> Finding:
    if limits.has_accounting is None:
        return Finding("accounting", "unknown")
    if limits.has_accounting:
        command = ("sacct", "--noheader", "--allocations", "--starttime=now-1minutes")
        code, said = _ask(*command)
        if code == 0:
            return Finding("accounting", "sacct answers", OK)
        found = f"sacct does not answer: {_last(said)}"
    else:
        found = "none"
    age = f"{limits.min_job_age_s:g} s" if limits.min_job_age_s is not None else "some minutes"
    return Finding(
        "accounting",
        found,
        WARNING,
        f"how a killed job ended is known for {age} (MinJobAge): keep aerie wait or aerie status "
        "--watch running. Asked for later its run ends as node_failure, and is run again",
    )


def _array_size(cluster: Cluster, limits: Limits) -> Finding:
    size, ours = limits.max_array_size, cluster.max_array_size
    if size is None:
        return Finding("MaxArraySize", "unknown")
    if size < 2:
        advice = "the site allows no arrays, and every job is one: ask its administrators"
        return Finding("MaxArraySize", str(size), PROBLEM, advice)
    if ours is not None and ours > size:
        advice = f"cluster.max_array_size={ours} is more: set it to {size} at most, or to null"
        return Finding("MaxArraySize", str(size), PROBLEM, advice)
    return Finding("MaxArraySize", str(size), OK)


def _queue(cluster: Cluster, limits: Limits) -> Finding:
    known = {
        "cluster.max_submit": cluster.max_submit,
        "MaxSubmitJobs": limits.max_submit_jobs,
        "MaxJobCount": limits.max_job_count,
    }
    words = [f"{name} {value}" for name, value in known.items() if value is not None]
    found = f"{limits.num_queued} of yours; {', '.join(words) or 'no limit known'}"
    least = min((value for value in known.values() if value is not None), default=None)
    if least is not None and limits.num_queued >= least:
        advice = "full: what does not fit is kept, and goes with the next aerie submit"
        return Finding("queue", found, WARNING, advice)
    return Finding("queue", found, OK)


def _partition(name: str, cluster: Cluster, limits: Limits) -> Finding:
    found = limits.partitions.get(name)
    what = "partition" if cluster.partition else "partition (default)"
    if found is None:
        close = get_close_matches(name, list(limits.partitions), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        advice = f"{hint}known: {', '.join(limits.partitions) or 'none'}"
        return Finding(what, f"{name}: there is none of this name", PROBLEM, advice)
    longest = "unlimited" if found.max_time_s is None else display.duration(found.max_time_s)
    words = f"{name}: {found.state or 'state unknown'}, MaxTime {longest}{_nodes(name)}"
    if found.state not in ("UP", None):
        advice = "jobs wait until it is up: choose another, cluster.partition"
        return Finding(what, words, PROBLEM, advice)
    if found.max_time_s is not None and cluster.time_s > found.max_time_s:
        asked = display.duration(cluster.time_s)
        advice = f"cluster.time asks for {asked}: set it to {found.max_time_s / 60:g} at most"
        return Finding(what, words, PROBLEM, advice)
    return Finding(what, words, OK)


def _default_partition() -> list[str]:
    code, said = _ask("sinfo", "--noheader", "--format=%P")
    return [name[:-1] for name in said.split() if name.endswith("*")] if code == 0 else []


def _nodes(partition: str) -> str:
    """How many nodes it has, by state, as Slurm shortens them."""
    code, said = _ask("sinfo", "--noheader", f"--partition={partition}", "--format=%D %t")
    counts = [line.strip() for line in said.splitlines() if line.strip()]
    return f"; nodes: {', '.join(counts)}" if code == 0 and counts else ""


def _preemption(name: str, found: Partition, cluster: Cluster, limits: Limits) -> Finding:
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


def _short_grace(has: float, needs: float, cluster: Cluster, limits: Limits) -> str:
    """What a preempted job loses where it is killed before it has done what it would."""
    lost = f"a quality run may go back to a checkpoint {cluster.checkpoint_s:g} s old"
    if limits.warns_of_preemption and has >= CHECKPOINT_S + worker.RECORDS_S:
        return f"killed after {has:g} s, and {lost}: set cluster.stop_warning_s={has:g}"
    return f"killed after {has:g} s instead of {needs:g}: {lost}; lower cluster.checkpoint_s"


def _requeue(cluster: Cluster, limits: Limits) -> Finding:
    default = {True: "1", False: "0"}.get(limits.may_requeue, "unknown")
    if cluster.is_requeued:
        return Finding("JobRequeue", f"{default}; our jobs ask for it", OK)
    return Finding(
        "JobRequeue",
        f"{default}; our jobs ask not to be",
        OK,
        "after preemption and node failure, aerie submit sends what is missing",
    )


def _times(cluster: Cluster, limits: Limits | None) -> Iterator[Finding]:
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


def _request(cluster: Cluster, store: Path) -> Finding:
    """Whether sbatch would take a job of this cluster now, by its own batch file."""
    made = talk.draft(cluster, store, store / "code" / "DIGEST")
    script = launch.launcher("slurm").script(made, 0)
    code, said = _ask("sbatch", "--test-only", text=script)
    if code == 0:
        match = re.search(r"to start at (\S+) using .* on nodes (\S+)", said)
        when = f"; would start {match[1]} on {match[2]}" if match else ""
        return Finding("request", f"accepted{when}", OK)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    line = next((line for line in lines if "error:" in line), _last(said))
    reason = re.sub(r"^(sbatch: )?(error|allocation failure): ", "", line)
    advice = next((text for word, text in CAUSES.items() if word in reason.lower()), None)
    return Finding("request", f"refused: {reason}", PROBLEM, f"change {advice}" if advice else "")


def _store(store: Path) -> Iterator[Finding]:
    try:
        store.mkdir(parents=True, exist_ok=True)
        kind, place = examine.file_system(store)
        usage = shutil.disk_usage(store)
    except OSError as error:
        advice = "name a folder that you may write: --results DIR"
        yield Finding("store", f"{store}: {error.strerror}", PROBLEM, advice)
        return
    shared = "shared" if kind.startswith(SHARED) else "local, by its type"
    found = f"{store.resolve()}: {kind} ({shared}) at {place}, {display.size(usage.free)} free"
    if usage.free < MIN_FREE_BYTES:
        yield Finding("store", found, WARNING, "little space is left: remove something")
    else:
        yield Finding("store", found, OK)
    if quota := _quota(kind, place):
        yield quota
    yield _operations(store)


def _operations(store: Path) -> Finding:
    """What records and claims are made of, tried."""
    trial, step = store / f".doctor-{uuid.uuid4().hex}", "a file"
    try:
        trial.mkdir()
        start = time.perf_counter()
        examine.publish(trial / "record", {})
        took = time.perf_counter() - start
        step = "a hard link"
        os.link(trial / "record", trial / "link")
        step = "a rename over a file"
        (trial / "link").replace(trial / "record")
        step = "the rename of a folder"
        (trial / "one").mkdir()
        (trial / "one").rename(trial / "two")
    except OSError as error:
        found, advice = f"{step} fails: {error.strerror}", "choose another file system: --results"
        return Finding("writing", found, PROBLEM, advice)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    words = f"atomic renames and hard links work; a small file takes {1000 * took:.1f} ms"
    return Finding("writing", words, OK)


def _quota(kind: str, place: str) -> Finding | None:
    """Of this user, in KiB, where the site's command tells."""
    user = ("-u", str(os.getuid()))
    lustre = kind.startswith("lustre")
    command = ("lfs", "quota", "-q", *user, place) if lustre else ("quota", "-w", "-f", place)
    if shutil.which(command[0]) is None:
        return None
    _, said = _ask(*command)
    for line in said.splitlines():
        if match := re.search(r"\s(\d+)\*?\s+(\d+)\s+(\d+)\s", line):
            used, *limits = (int(number) * 1024 for number in match.groups())
            limit = min(filter(None, limits), default=None)
            of = "no limit" if limit is None else f"of {display.size(limit)}"
            if limit is not None and limit - used < MIN_FREE_BYTES:
                advice = "little is left: remove something"
                return Finding("quota", f"{display.size(used)} {of}", WARNING, advice)
            return Finding("quota", f"{display.size(used)} {of}", OK)
    return None


def _interpreters(cluster: Cluster) -> Iterator[Finding]:
    missing = []
    for name in dict.fromkeys((*BACKENDS, *cluster.python)):
        python = cluster.interpreter(name)
        what, path = f"python for {name}", python or "that of this command"
        try:
            found = provenance.versions(python)
        except (ValueError, OSError, subprocess.TimeoutExpired) as error:
            line = " ".join(str(error).split())
            if name == "worker":  # of the nodes alone; those of backends say what is current, here
                yield Finding(what, f"{line} (here: the job tells of a node)")
                continue
            advice = f"set cluster.python.{name} to an interpreter that runs here and on the nodes"
            yield Finding(what, line, PROBLEM, advice)
            continue
        needed = "numpy" if name == "worker" else name
        kept = {key: found[key] for key in (needed, *provenance.LIBRARIES.get(name, ()))}
        words = ", ".join(f"{key} {version}" for key, version in kept.items() if version)
        if found.get(needed) is None:
            missing.append(name)
            verdict = PROBLEM if python or len(missing) == len(BACKENDS) else WARNING
            advice = (
                f"no {needed}: install it, or set cluster.python.{name} to a Python that has it"
            )
            yield Finding(what, f"{path}: {words or 'nothing that is needed'}", verdict, advice)
        else:
            yield Finding(what, f"{path}: {words}", OK)


# From a node ------------------------------------------------------------------------------------


def _examine(
    cluster: Cluster, store: Path, timeout_s: float
) -> tuple[list[Finding], dict[str, Any] | None]:
    try:
        code = snapshot.take(store)
        heard = talk.talk(cluster, store, code, _asked(cluster), timeout_s)
    except OSError as error:
        return [Finding("job", f"the store cannot be written: {error}", PROBLEM, "see store")], None
    except launch.Refused as error:
        return [Finding("job", f"refused: {error}", PROBLEM, "see request, above")], None
    findings = [_job(heard, cluster, store)]
    if heard.rounds or heard.is_whole:
        findings += _clocks(heard.rounds, cluster)
    if heard.report is not None:
        findings += _found(heard.report, cluster, code)
    return findings, heard.report


def _job(heard: Heard, cluster: Cluster, store: Path) -> Finding:
    job_id = heard.job_id.partition("@")[0]
    if heard.is_late:
        found = f"{job_id} did not begin in time: {heard.state}; cancelled"
        advice = "try again later, with a longer --timeout, or without: --no-job"
        return Finding("job", found, WARNING, advice)
    if heard.report is None:
        python = cluster.python.get("worker", sys.executable)
        inside = f" in {cluster.container}" if cluster.container else ""
        advice = f"the node must see {store} and {python}{inside}; cluster.setup must not fail"
        words = f"{job_id} did not begin: {heard.state}: {heard.last_words or 'no log'}"
        return Finding("job", words, PROBLEM, advice)
    where = f"{job_id} on {heard.report['node']}"
    if not heard.is_whole:
        step = heard.report.get("now", "files there and back")
        advice = heard.last_words or "it left no log"
        return Finding("job", f"{where} ended at {step}: {heard.state}", PROBLEM, advice)
    return Finding("job", f"{where}, {display.duration(heard.waited_s)} after its submission", OK)


def _asked(cluster: Cluster) -> dict[str, Any]:
    """What the node's side is to try: each backend's interpreter, in the environment of runs."""
    backends = [name for name in BACKENDS if name == "jax" or not _has_tpus(cluster)]
    is_cpu = set(cluster.device_kinds) == {CPU}
    return {
        "python": {name: cluster.interpreter(name) for name in backends},
        "environment": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if is_cpu else {},
    }


def _has_tpus(cluster: Cluster) -> bool:
    return set(cluster.device_kinds) <= set(TPUS)


def _found(report: dict[str, Any], cluster: Cluster, code: Path) -> Iterator[Finding]:
    steps: dict[str, Callable[[Any], Iterable[Finding]]] = {
        "worker": lambda found: _worker(found, cluster, code),
        "scratch": lambda found: _scratch(found, cluster),
        "scontrol": lambda found: _scontrol(found, cluster),
        **{name: lambda found, name=name: _engine(name, found, cluster) for name in BACKENDS},
    }
    for name, findings in steps.items():
        if name in report:
            yield from findings(report[name])


def _clocks(rounds: list[Round], cluster: Cluster) -> Iterator[Finding]:
    if not rounds:
        advice = f"raise cluster.view_s above {talk.ROUNDS_S:g}, or choose another file system"
        found = f"no answer to a file within {talk.ROUNDS_S:g} s"
        yield Finding("renames", found, PROBLEM, advice)
        return
    low, high = talk.skew(rounds)
    there = max(one.seen_at - one.sent_at - low for one in rounds)
    here = max(one.back_at - one.answered_at + high for one in rounds)
    found = f"{len(rounds)} there and back: seen there within {there:.2f} s, here within {here:.2f}"
    if here > cluster.view_s:
        advice = f"set cluster.view_s={2 * here:.0f}"
        yield Finding("renames", found, PROBLEM, advice)
    else:
        yield Finding("renames", found, OK)
    found = f"{(low + high) / 2:+.3f} s, at most {(high - low) / 2:.3f} s off"
    worst = max(abs(low), abs(high))
    advice, verdict = "", OK
    if worst + worker.BEAT_S + here > cluster.lost_after_s:
        advice, verdict = (
            "a living job may be taken for lost: the clocks must be set (NTP)",
            PROBLEM,
        )
    elif worst > cluster.view_s:
        advice, verdict = "times of records do not agree: the clocks should be set (NTP)", WARNING
    yield Finding("clock of the node", found, verdict, advice)


def _worker(found: dict[str, Any], cluster: Cluster, code: Path) -> Iterator[Finding]:
    if "error" in found:
        python = cluster.python.get("worker", sys.executable)
        advice = (
            f"{python} must have what aerie needs: pip install -e . there, or cluster.python.worker"
        )
        yield Finding("worker", found["error"], PROBLEM, advice)
        return
    if Path(found["code"]) != code:
        advice = "something on the node puts other code first: look at cluster.setup and PYTHONPATH"
        yield Finding("worker", f"runs from {found['code']}, not {code}", PROBLEM, advice)
    else:
        yield Finding("worker", f"sees the store, and runs from {code}", OK)
    yield _cores(found["num_cores"], found["cpu_model"], cluster)
    yield _memory(found["memory_bytes"], cluster)


def _cores(number: int, model: str, cluster: Cluster) -> Finding:
    words = f"{number} of {model}"
    if cluster.executor != "slurm" or number == cluster.cpus_per_task:
        return Finding("cores", words, OK)
    if number < cluster.cpus_per_task:
        advice = f"fewer than cluster.cpus_per_task={cluster.cpus_per_task}"
        return Finding("cores", words, WARNING, advice)
    advice = (
        f"more than cluster.cpus_per_task={cluster.cpus_per_task}: jobs are not kept apart, and "
        "disturb timings; ask for whole nodes: cluster.sbatch.exclusive=true"
    )
    return Finding("cores", words, OK if cluster.sbatch.get("exclusive") else WARNING, advice)


def _memory(number: int, cluster: Cluster) -> Finding:
    asked = mem_bytes(cluster.mem)
    if asked is not None and number < 0.95 * asked:
        advice = f"less than cluster.mem={cluster.mem}"
        return Finding("memory", display.size(number), WARNING, advice)
    if asked is not None and number > 1.5 * asked:
        found = f"{display.size(number)}: cluster.mem={cluster.mem} is no limit"
        return Finding("memory", found, OK)
    return Finding("memory", display.size(number), OK)


def mem_bytes(mem: str | None) -> int | None:
    """What 64G, or 64000 (MB), means to Slurm; None where nothing is asked for, or a whole node."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", str(mem or "").upper())
    if match is None or int(match[1]) == 0:
        return None
    return int(match[1]) * 1024 ** ("KMGT".index(match[2] or "M") + 1)


def _scratch(found: dict[str, Any], cluster: Cluster) -> Iterator[Finding]:
    words = f"{found['folder']}: {found['file_system']}, {display.size(found['free_bytes'])} free"
    if cluster.scratch and found["asked"] != found["folder"]:
        asked = found["asked"] or "nothing"
        advice = f"cluster.scratch={cluster.scratch} is {asked} there, and cannot be written"
        yield Finding("scratch", words, WARNING, advice)
    elif found["file_system"].startswith(SHARED):
        advice = "caches of compilers are slow there: set cluster.scratch to a folder of the node"
        yield Finding("scratch", words, WARNING, advice)
    elif found["free_bytes"] < MIN_FREE_BYTES:
        yield Finding("scratch", words, WARNING, "little space: set cluster.scratch")
    else:
        yield Finding("scratch", words, OK)


def _scontrol(found: dict[str, Any], cluster: Cluster) -> Iterator[Finding]:
    if cluster.executor != "slurm":
        return
    if "error" not in found:
        yield Finding("scontrol", "answers: jobs can ask to be started again", OK)
        return
    inside = f" (in {cluster.container})" if cluster.container else ""
    advice = (
        f"a job at its time limit cannot ask to be started again{inside}; aerie submit sends what "
        "is missing"
    )
    yield Finding("scontrol", found["error"], WARNING, advice)


def _engine(backend: str, found: dict[str, Any], cluster: Cluster) -> Iterator[Finding]:
    if "error" in found:
        advice = f"see cluster.python.{backend}, cluster.setup and cluster.container"
        yield Finding(backend, found["error"], PROBLEM, advice)
        return
    devices, kinds = found["devices"], [kind for kind in cluster.device_kinds if kind != CPU]
    counts = {name: devices.count(name) for name in devices}
    names = ", ".join(f"{count} x {name}" for name, count in counts.items())
    words = f"{found['version']}: {names}"
    here = _version_here(backend, cluster)
    if here and here != found["version"]:
        advice = f"here it is {here}: results would count as of an older build; one Python for both"
        yield Finding(backend, words, PROBLEM, advice)
    elif not kinds or CPU in cluster.device_kinds:
        yield Finding(backend, words, OK)
    elif found["platform"] == "cpu":
        advice = (
            f"it sees no accelerator of {', '.join(kinds)}: install {backend} with it, look at "
            "cluster.gres and JAX_PLATFORMS"
        )
        yield Finding(backend, words, PROBLEM, advice)
    elif len(devices) != cluster.num_devices:
        advice = f"cluster.num_devices={cluster.num_devices}: it must be what cluster.gres gives"
        yield Finding(backend, words, PROBLEM, advice)
    elif not _has_tpus(cluster) and not any(k in d.lower() for k in kinds for d in devices):
        advice = f"cluster.device_kinds says {', '.join(kinds)}: ask for that in cluster.gres"
        yield Finding(backend, words, PROBLEM, advice)
    else:
        yield Finding(backend, words, OK)


def _version_here(backend: str, cluster: Cluster) -> str | None:
    try:
        return provenance.versions(cluster.interpreter(backend)).get(backend)
    except (ValueError, OSError, subprocess.TimeoutExpired):
        return None  # said above


# Words ------------------------------------------------------------------------------------------


def _ask(*command: str, text: str | None = None) -> tuple[int, str]:
    """Exit code of a command of the site, and all that it printed."""
    try:
        done = subprocess.run(
            command,
            input=text or "",
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=slurm.COMMAND_S,
            env=slurm.environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, f"{done.stdout}\n{done.stderr}"


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"


def _worst(findings: Iterable[Finding], *names: str) -> str:
    """The worst verdict, of all or of those named."""
    found = {one.verdict for one in findings if not names or one.what in names}
    return next((verdict for verdict in (PROBLEM, WARNING) if verdict in found), OK)


def _print(title: str, findings: Iterable[Finding]) -> None:
    rows = [[one.what, one.found, one.verdict, one.advice] for one in findings]
    display.print_table(["what", "found", "verdict", "what to do"], rows, title=title)
    print()


def _summary(findings: list[Finding]) -> str:
    counts = [
        display.count(number, verdict)
        for verdict in (PROBLEM, WARNING)
        if (number := sum(one.verdict == verdict for one in findings))
    ]
    return f"{' and '.join(counts) or 'all is well'}."
