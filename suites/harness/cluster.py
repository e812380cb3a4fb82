"""A cluster: a place that runs, as a file of configs/cluster/ names it. README has every key."""

import math
import re
import shlex
import sys
from dataclasses import dataclass, field
from typing import Any

from implementations.config import choose
from suites.harness import provenance

EXECUTORS = ("local", "slurm")
# Options of sbatch that are ours: arrays, logs and restarts are counted by them.
OURS = ("array", "output", "error", "open-mode", "signal", "job-name", "requeue", "no-requeue",
        "parsable", "wrap", "nodes", "ntasks", "ntasks-per-node")  # fmt: skip
KEYS = ("partition", "account", "qos", "constraint", "gres", "mem", "time", "cpus-per-task")
_TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where runs of some device kinds go, what a job asks for, and how runs are packed into jobs.

    A job is one task of an array: one node, `num_devices` devices. Times are seconds, except for
    `time`, which is Slurm's own: minutes, or [days-]hours:minutes:seconds.
    """

    name: str
    executor: str
    device_kinds: tuple[str, ...] = ("cpu",)
    run_limit_s: float = 3600.0  # of one run
    checkpoint_s: float = 300.0  # between two checkpoints of a quality run
    keeps_parameters: bool = False  # that were trained, in STORE/checkpoints/RUN_ID

    runs_per_job: int = 1  # blocks of timing runs count as one; more where a limit demands it
    runs_in_parallel: int = 1  # within a job, each on devices and cores of its own
    is_exclusive: bool = False  # what runs in parallel does not disturb timings: they may, too
    max_parallel: int | None = None  # jobs of an array that run at once
    max_submit: int | None = None  # jobs in the queue at once; null: what Slurm allows
    max_array_size: int | None = None  # null: Slurm's MaxArraySize

    python: dict[str, str] = field(default_factory=dict)  # backend -> interpreter that has it
    setup: tuple[str, ...] = ()  # lines of shell before Python: module load ...
    container: str | None = None  # what stands before Python: apptainer exec --nv image.sif
    srun: tuple[str, ...] = ()  # further arguments of srun: --container-image=...
    scratch: str | None = None  # a folder local to the node, for caches: $SLURM_TMPDIR

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None  # of one job: gpu:h100:1
    num_devices: int = 1  # that `gres` gives a job
    cpus_per_task: int = 1
    mem: str | None = None
    time: int | str = 60
    sbatch: dict[str, Any] = field(default_factory=dict)  # any other option, passed through

    is_requeued: bool = True  # Slurm starts a job again after preemption and node failure
    stop_warning_s: int = 120  # before the time limit, when a job is told to stop
    lost_after_s: float = 600.0  # out of the queue, without a word
    view_s: float = 60.0  # until a file written on a node is surely seen here

    def __post_init__(self) -> None:
        where = f"cluster {self.name!r}"
        choose("executor", self.executor, EXECUTORS, where)
        for kind in self.device_kinds:
            choose("device_kinds", kind, provenance.DEVICE_KINDS, where)
        for name in ("runs_per_job", "runs_in_parallel", "num_devices", "cpus_per_task"):
            if getattr(self, name) < 1:
                raise ValueError(f"cluster: {name}={getattr(self, name)}; must be at least 1.")
        for name in ("max_parallel", "max_submit", "max_array_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"cluster: {name}={value}; must be at least 1, or null.")
        for name in ("run_limit_s", "checkpoint_s", "lost_after_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"cluster: {name}={getattr(self, name)}; must be positive.")
        if not 0 <= self.stop_warning_s < self.time_s:
            raise ValueError(
                f"cluster: stop_warning_s={self.stop_warning_s}; must be less than "
                f"time={self.time} ({self.time_s} s)."
            )
        for option in self.sbatch:
            key = str(option).replace("_", "-")
            if key in ("nodes", "ntasks", "ntasks-per-node"):
                raise ValueError(
                    f"cluster: sbatch.{option}: a run uses devices of one node; several nodes, and "
                    "models sharded over devices, are not offered yet."
                )
            if key in (*OURS, *KEYS):
                place = f"use cluster.{key.replace('-', '_')}" if key in KEYS else "it is set here"
                raise ValueError(f"cluster: sbatch.{option} cannot be passed through; {place}.")

    @property
    def time_s(self) -> int:
        """The time limit of a job; ValueError where `time` is not one of Slurm's forms."""
        if isinstance(self.time, int):
            seconds = self.time * 60
        elif match := _TIME.fullmatch(self.time):
            days, hours, minutes, rest = (int(part or 0) for part in match.groups())
            seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
        else:
            raise ValueError(
                f"cluster: time={self.time!r}; use minutes (90) or [days-]hours:minutes:seconds "
                "in quotes ('1-00:00:00')."
            )
        if seconds <= 0:
            raise ValueError(f"cluster: time={self.time!r}; must be positive.")
        return seconds

    @property
    def time_min(self) -> int:
        return math.ceil(self.time_s / 60)

    @property
    def environment(self) -> list[str]:
        """Lines of shell that a job begins with: the cluster's own, then what we need."""
        scratch = []
        if self.scratch:
            scratch = [f'export TMPDIR="{self.scratch}"', 'mkdir -p "$TMPDIR"']
        return [*self.setup, *scratch]

    def interpreter(self, backend: str) -> str | None:
        """The Python of a backend's runs, where it is not that of the command."""
        return self.python.get(backend)

    def command(self, *arguments: str) -> str:
        """A line of shell that runs Python of this cluster with these arguments."""
        words = [self.python.get("worker", sys.executable), *arguments]
        return " ".join(filter(None, (self.container, shlex.join(words))))
