"""What a node said by its job, judged by the settings of its cluster."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from implementations.engine import CPU, TPUS
from suites import display
from suites.doctor import interpreters, talk
from suites.doctor.finding import OK, PROBLEM, WARNING, Finding
from suites.doctor.interpreters import BACKENDS
from suites.doctor.storage import MIN_FREE_BYTES, SHARED
from suites.doctor.talk import Heard, Round
from suites.harness import launch, snapshot, worker
from suites.harness.cluster import Cluster


def look(
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
    here = interpreters.version(backend, cluster)
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
