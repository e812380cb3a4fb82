"""`aerie doctor cluster=NAME`: whether a cluster takes our jobs, and how it treats them.

From the login node it asks Slurm, the store and the interpreters; then one short job, started as
every job is, tells what a node finds (talk.py). Nothing is guessed: what could not be asked is said
to be unknown.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from suites import compose, display
from suites.commands import AS_PLANNED, NOT_AS_PLANNED, one_line
from suites.doctor import endings, interpreters, node, site, storage
from suites.doctor.finding import PROBLEM, WARNING, Finding, worst
from suites.harness import slurm
from suites.harness.cluster import Cluster


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
        if worst(here, "commands", "store", "request", "Slurm") == PROBLEM:
            there = [Finding("job", "not submitted: it could not run", "", "")]
        else:
            there, report = node.look(cluster, store.resolve(), timeout_s)
        if not as_json:
            _print("from a node", there)
    findings = [*here, *there]
    if as_json:
        rows = [{"place": "here", **asdict(one)} for one in here]
        rows += [{"place": "node", **asdict(one)} for one in there]
        display.print_json({"cluster": cluster.name, "verdict": worst(findings),
                            "findings": rows, "node": report})  # fmt: skip
    else:
        print(_summary(findings))
    return NOT_AS_PLANNED if worst(findings) == PROBLEM else AS_PLANNED


def _cluster(overrides: list[str]) -> Cluster:
    for key in compose.parse(overrides):
        if key != "cluster" and not key.startswith("cluster."):
            raise ValueError(f"doctor: {key}: it takes cluster=NAME and cluster.KEY=VALUE alone.")
    clusters = compose.read(overrides, bare=compose.BARE_PLAN).clusters
    if len(clusters) > 1:
        raise ValueError(f"doctor: {len(clusters)} clusters: name one.")
    return clusters[0]


def _look_here(cluster: Cluster, store: Path) -> Iterator[Finding]:
    limits = None
    if cluster.executor == "slurm":
        missing = [name for name in site.COMMANDS if shutil.which(name) is None]
        yield site.commands(missing)
        if not missing:
            try:
                limits = slurm.limits(cluster.partition, cluster.account, cluster.qos)
            except slurm.Unreachable as error:
                advice = "nothing can be submitted now; ask again later: scontrol ping"
                yield Finding("Slurm", str(error), PROBLEM, advice)
    if limits is not None:
        yield from site.look(cluster, limits)
    yield from endings.times(cluster, limits)
    yield from storage.look(store)
    yield from interpreters.look(cluster)
    if limits is not None:
        yield site.request(cluster, store)


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
