"""From planned runs to jobs: units that stay together, packed so that the site's limits hold."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from implementations.engine import CPU
from suites.harness.cluster import Cluster
from suites.harness.estimate import NOTHING, Seconds
from suites.harness.plan import Planned, load_suite
from suites.harness.run import Run
from suites.harness.sweep import units

MAX_ARRAY_SIZE = 1001  # Slurm's own default, where it is not known
FULL = 0.8  # of a job's time that its runs may need, as estimated


@dataclass
class Job:
    """What one task of an array will run."""

    runs: list[Planned] = field(default_factory=list)
    num_units: int = 0
    seconds: Seconds = NOTHING


@dataclass
class Packed:
    """Jobs by array, the runs that did not fit in the queue, and what all of it may take."""

    cluster: Cluster
    arrays: list[list[Job]]
    left: list[Planned]
    bound: str = ""  # why nothing more fits in the queue

    @property
    def runs(self) -> list[Planned]:
        return [item for array in self.arrays for job in array for item in job.runs]

    @property
    def is_at_most(self) -> bool:
        """Whether some of them may not be needed: adaptive rounds."""
        return any(item.until_ci is not None for item in self.runs)

    @property
    def device_seconds(self) -> Seconds:
        jobs = [job.seconds for array in self.arrays for job in array]
        return sum(jobs, NOTHING) * self.cluster.num_devices


def place(runs: Iterable[Planned], clusters: Iterable[Cluster]) -> dict[str, list[Planned]]:
    """Cluster name -> its runs: each goes to the first cluster that offers its device kind."""
    clusters = list(clusters)
    placed: dict[str, list[Planned]] = {cluster.name: [] for cluster in clusters}
    for item in runs:
        kind, needed = item.run.device_kind, num_devices(item.run)
        offered = [cluster for cluster in clusters if kind in cluster.device_kinds]
        if not offered:
            known = sorted({k for cluster in clusters for k in cluster.device_kinds})
            raise ValueError(
                f"device_kind={kind}: cluster={','.join(placed)} offers {', '.join(known)}; set "
                "device_kind, or name a further cluster."
            )
        if needed > max(cluster.num_devices for cluster in offered):
            raise ValueError(
                f"suite.num_devices={needed}: a job of cluster={offered[0].name} has "
                f"num_devices={offered[0].num_devices}; set cluster.num_devices and cluster.gres "
                "(devices of one node; several nodes are not offered yet)."
            )
        fitting = next(cluster for cluster in offered if cluster.num_devices >= needed)
        placed[fitting.name].append(item)
    return placed


def pack(
    runs: Iterable[Planned],
    cluster: Cluster,
    *,
    seconds: Callable[[Planned], Seconds],
    room: int | None = None,
    max_array_size: int | None = None,
) -> Packed:
    """Jobs of `runs_per_job` units, or more where `room`, the jobs that the queue still takes,
    demands it; never more than a job has time for, as far as the estimate knows. What is beyond
    the room is left. What runs on other devices or numbers of them, or times and does not time,
    does not share a job."""
    by_kind: dict[tuple, list[list[Planned]]] = {}
    for unit in units(list(runs)):
        run = unit[0].run
        kind = (load_suite(run.suite).is_timing, run.device_kind, run.workload.num_devices)
        by_kind.setdefault(kind, []).append(unit)
    num_units = sum(map(len, by_kind.values()))
    per_job = cluster.runs_per_job
    if room:
        per_job = max(per_job, math.ceil(num_units / max(room - len(by_kind) + 1, 1)))
    jobs = []
    for members in by_kind.values():
        lanes = num_lanes(cluster, members[0][0].run)
        jobs += _filled(members, cluster, per_job, lanes, seconds)
    room = len(jobs) if room is None else room
    kept, rest = jobs[:room], jobs[room:]
    size = max_array_size or MAX_ARRAY_SIZE
    arrays = [kept[first : first + size] for first in range(0, len(kept), size)]
    return Packed(cluster, arrays, [item for job in rest for item in job.runs])


def num_lanes(cluster: Cluster, run: Run) -> int:
    """Units like this one that a job runs side by side."""
    if load_suite(run.suite).is_timing and not cluster.is_exclusive:
        return 1
    if run.device_kind == CPU:
        return cluster.runs_in_parallel
    return max(min(cluster.runs_in_parallel, cluster.num_devices // num_devices(run)), 1)


def num_devices(run: Run) -> int:
    """Of a job's devices; those of a CPU are its cores."""
    return 1 if run.device_kind == CPU else run.workload.num_devices


def _filled(
    members: list[list[Planned]],
    cluster: Cluster,
    per_job: int,
    lanes: int,
    seconds: Callable[[Planned], Seconds],
) -> list[Job]:
    jobs: list[Job] = []
    limit = FULL * (cluster.time_s - cluster.stop_warning_s)
    for unit in members:
        needed = sum(map(seconds, unit), NOTHING) * (1 / lanes)
        is_full = not jobs or (
            jobs[-1].num_units >= per_job or jobs[-1].seconds.likely + needed.likely > limit
        )
        if is_full:
            jobs.append(Job())
        jobs[-1].runs += unit
        jobs[-1].num_units += 1
        jobs[-1].seconds += needed
    return jobs
