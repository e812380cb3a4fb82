"""What Slurm says of a cluster, asked on a login node: its limits, partitions, and our request."""

import re
import subprocess
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from suites import display
from suites.doctor import endings, talk
from suites.doctor.finding import OK, PROBLEM, WARNING, Finding
from suites.harness import launch, slurm
from suites.harness.cluster import Cluster
from suites.harness.slurm import Limits

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun")
OLDEST = (20, 11)  # Slurm whose answers are known here
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


def commands(missing: list[str]) -> Finding:
    if not missing:
        return Finding("commands", ", ".join(COMMANDS), OK)
    return Finding(
        "commands",
        f"no {', '.join(missing)}",
        PROBLEM,
        "run this on a login node of the cluster, where Slurm's commands are (module load slurm?)",
    )


def look(cluster: Cluster, limits: Limits) -> Iterator[Finding]:
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
            yield endings.preemption(name, found, cluster, limits)
    yield endings.requeue(cluster, limits)


def request(cluster: Cluster, store: Path) -> Finding:
    """Whether sbatch would take a job of this cluster now, by its own batch file."""
    made = talk.draft(cluster, store, store / "code" / "DIGEST")
    script = launch.launcher("slurm").script(made, 0)
    code, said = ask("sbatch", "--test-only", text=script)
    if code == 0:
        match = re.search(r"to start at (\S+) using .* on nodes (\S+)", said)
        when = f"; would start {match[1]} on {match[2]}" if match else ""
        return Finding("request", f"accepted{when}", OK)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    line = next((line for line in lines if "error:" in line), _last(said))
    reason = re.sub(r"^(sbatch: )?(error|allocation failure): ", "", line)
    advice = next((text for word, text in CAUSES.items() if word in reason.lower()), None)
    return Finding("request", f"refused: {reason}", PROBLEM, f"change {advice}" if advice else "")


def ask(*command: str, text: str | None = None) -> tuple[int, str]:
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
        code, said = ask(*command)
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
    own = {} if cluster.max_submit is None else {"cluster.max_submit": cluster.max_submit}
    known = own | limits.submit_limits
    words = [f"{name} {value}" for name, value in known.items()]
    found = f"{limits.num_queued} of yours; {', '.join(words) or 'no limit known'}"
    if limits.num_queued >= min(known.values(), default=float("inf")):
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
    code, said = ask("sinfo", "--noheader", "--format=%P")
    return [name[:-1] for name in said.split() if name.endswith("*")] if code == 0 else []


def _nodes(partition: str) -> str:
    """How many nodes it has, by state, as Slurm shortens them."""
    code, said = ask("sinfo", "--noheader", f"--partition={partition}", "--format=%D %t")
    counts = [line.strip() for line in said.splitlines() if line.strip()]
    return f"; nodes: {', '.join(counts)}" if code == 0 and counts else ""


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"
