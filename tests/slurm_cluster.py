"""A throw-away Slurm for tests: real daemons, several nodes, all on loopback and under one folder.

munged, mariadbd and slurmdbd (only with accounting: without them sacct has nothing to say),
slurmctld, and one slurmd a node, which Debian's packages allow on one machine. GPUs are links to
/dev/null, which is enough for Slurm to count them, hand them out and set CUDA_VISIBLE_DEVICES.

Only a machine that is ours is asked to be short: what Slurm waits for by default (120 s until a
requeued job may start, 30 s before KILL, 60 s between looks at the queue) is seconds here. Time
limits are still counted in whole minutes and looked at every 30 s.
"""

import atexit
import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

COMMANDS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
DATABASE_COMMANDS = (
    "slurmdbd",
    "sacct",
    "mariadbd",
    "mariadb-install-db",
    "my_print_defaults",
)
PACKAGES = "munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core"
# Not pytest's tmp_path: a unix socket under it may have a path of 107 characters at most.
FOLDERS = Path("/tmp")
PREFIX = "aerie-slurm-"
PORTS = range(20000, 32000)  # below those that the kernel lends to clients (32768 on)
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Node:
    name: str
    num_gpus: int = 0
    gpu_type: str = ""
    num_tpus: int = 0  # a plain count, as sites declare TPUs: no device files
    num_cpus: int = 8  # believed by Slurm, whatever the machine has
    memory_mb: int = 16000

    @property
    def gres(self) -> str:
        gpus = f"gpu:{self.gpu_type}:{self.num_gpus}" if self.num_gpus else ""
        return gpus or (f"tpu:{self.num_tpus}" if self.num_tpus else "")


@dataclass(frozen=True)
class Partition:
    name: str
    nodes: str  # as Slurm writes it: cpu[1-2]
    priority_tier: int = 10  # a higher one preempts a lower one on the same nodes
    preempt_mode: str = "OFF"  # what happens to its jobs: OFF, REQUEUE, CANCEL
    options: str = ""


NODES = (
    Node("gpu1", num_gpus=4, gpu_type="h100"),
    Node("gpu2", num_gpus=4, gpu_type="a100"),
    Node("cpu1"),
    Node("cpu2"),
    Node("tpu1", num_tpus=4),
)
PARTITIONS = (
    Partition("cpu", "cpu[1-2]", options="Default=YES"),
    Partition("gpu", "gpu[1-2]", preempt_mode="REQUEUE"),
    Partition("gpu-cancel", "gpu[1-2]", preempt_mode="CANCEL"),
    Partition("gpu-urgent", "gpu[1-2]", priority_tier=100),
    Partition("tpu", "tpu1"),
)


@dataclass(kw_only=True)
class SlurmCluster:
    """Daemons are named munged, mariadbd, slurmdbd, slurmctld and slurmd-NODE."""

    accounting: bool = True
    nodes: tuple[Node, ...] = NODES
    partitions: tuple[Partition, ...] = PARTITIONS
    # Without it preemption sends TERM alone, never the signal a job asked for with --signal.
    preempt_send_user_signal: bool = True
    grace_time: int = 15  # seconds between a job's warning and its end when it is preempted
    max_array_size: int = 1001
    max_job_count: int = 10000
    requeue: bool = True  # False: as on sites with JobRequeue=0
    # cgroup: memory limits hold and nothing outlives its job; needs root, cgroup v1, and that no
    # other cluster of this machine has nodes of these names. pgid: processes with a session of
    # their own outlive their job. auto: cgroup where it can be.
    proctrack: str = "auto"
    extra: tuple[str, ...] = ()  # lines of slurm.conf; the last one of a key wins

    folder: Path = field(init=False)
    has_memory_limits: bool = field(init=False, default=False)
    _ports: dict[str, int] = field(init=False, default_factory=dict)
    _processes: dict[str, subprocess.Popen] = field(init=False, default_factory=dict)
    _owner: int | None = field(init=False, default=None)

    def __enter__(self) -> "SlurmCluster":
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when every node takes jobs."""
        _remove_abandoned()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=FOLDERS))
        self._owner = os.getpid()
        atexit.register(self.stop)
        try:
            self._write_settings()
            for name in self.daemons:
                if not name.startswith("slurmd-"):
                    self.start_daemon(name)
            for node in self.nodes:
                self._launch(f"slurmd-{node.name}")
            self.wait_for(lambda: not self.nodes_not_ready(), 40, "every node takes jobs")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kills the daemons and every process of every job, and removes the folder."""
        if self._owner != os.getpid():  # never started, or a fork of who did
            return
        _tear_down(self.folder)
        for process in self._processes.values():
            process.wait()
        self._owner = None
        atexit.unregister(self.stop)

    @property
    def daemons(self) -> tuple[str, ...]:
        """In the order in which they start."""
        database = ("mariadbd", "slurmdbd") if self.accounting else ()
        nodes = (f"slurmd-{node.name}" for node in self.nodes)
        return ("munged", *database, "slurmctld", *nodes)

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    @property
    def jobs_folder(self) -> Path:
        """Where run() runs, and so where jobs leave slurm-ID.out by default."""
        return self.folder / "jobs"

    @property
    def environment(self) -> dict[str, str]:
        """All variables of a process that is to talk to this cluster."""
        ours = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_"))
        }
        return ours | {"SLURM_CONF": str(self.conf)}

    def run(self, *command: str, seconds: float = 60) -> str:
        """What a command prints; one that fails is a RuntimeError with what it complained of."""
        done = subprocess.run(
            command,
            cwd=self.jobs_folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip()
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {said}")
        return done.stdout

    def submit(self, script: str, *options: str) -> str:
        """The id of a job that runs lines of bash, with options of sbatch."""
        path = self.jobs_folder / "script.sh"  # sbatch sends its content
        path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        small = ("--mem=100", "--cpus-per-task=1")  # the last one of an option wins
        answer = self.run("sbatch", "--parsable", *small, *options, str(path))
        return answer.strip().partition(";")[0]

    def state(self, job: str) -> str:
        """What squeue says of one job or array element, an ended one too (for five minutes)."""
        return self.run("squeue", "--noheader", "--states=all", "--jobs", job, "-o", "%T").strip()

    def output(self, job: str) -> str:
        path = self.jobs_folder / f"slurm-{job}.out"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, predicate: Callable[[], object], seconds: float, what: str = "") -> object:
        """The first true value of the predicate; none in time is a TimeoutError with the queue."""
        end = time.monotonic() + seconds
        while not (value := predicate()):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s: {what or predicate}\n{self._report()}")
            time.sleep(0.05)
        return value

    def wait_for_state(self, job: str, *states: str, seconds: float = 30) -> str:
        def reached() -> str | None:
            state = self.state(job)
            return state if state in states else None

        return self.wait_for(reached, seconds, f"job {job} is {' or '.join(states)}")

    def is_alive(self, daemon: str) -> bool:
        process = self._processes.get(daemon)
        return process is not None and process.poll() is None

    def start_daemon(self, daemon: str) -> None:
        """Returns when it answers."""
        self._launch(daemon)
        self.wait_for(lambda: self._answers(daemon), 40, f"{daemon} answers")

    def wait_for_saved_state(self) -> None:
        """slurmctld writes down what it was told within 5 s; killed before, it forgets the job."""
        path, now = self.folder / "ctld" / "job_state", time.time()
        saved = lambda: path.exists() and path.stat().st_mtime > now  # noqa: E731
        self.wait_for(saved, 20, "slurmctld saved its jobs")

    def kill_daemon(self, daemon: str) -> None:
        """With SIGKILL. The jobs of a slurmd run on; slurmctld may forget the newest jobs, see
        wait_for_saved_state."""
        process = self._processes[daemon]
        process.kill()
        process.wait()

    def fail_node(self, node: str) -> None:
        """As when it loses power: its slurmd and its jobs' processes die, and it is DOWN."""
        self.kill_daemon(f"slurmd-{node}")
        _kill_until_gone(lambda: _processes_of(self.folder, node))
        # What slurmctld finds out by itself only after SlurmdTimeout.
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=crashed")

    def resume_node(self, node: str) -> None:
        """Returns when it takes jobs. Not while a job still runs on a node that was only set DOWN:
        Slurm would drain it again ("Duplicate jobid")."""
        if not self.is_alive(f"slurmd-{node}"):
            self.start_daemon(f"slurmd-{node}")

        def is_ready() -> bool:
            if node not in self.nodes_not_ready():
                return True
            with contextlib.suppress(RuntimeError):  # it came back by itself in between
                self.run("scontrol", "update", f"nodename={node}", "state=resume")
            return False

        self.wait_for(is_ready, 40, f"node {node} takes jobs")

    def nodes_not_ready(self) -> set[str]:
        lines = self.run("sinfo", "--noheader", "--Node", "-o", "%N %T").splitlines()
        ready = ("idle", "mixed", "allocated", "completing")  # "idle*" does not answer
        up = {name for name, state in map(str.split, lines) if state in ready}
        return {node.name for node in self.nodes} - up

    def tidy(self) -> None:
        """As new for the next test: daemons run, no jobs, nodes up."""
        for daemon in self.daemons:
            if not self.is_alive(daemon):
                self.start_daemon(daemon)
        if self.run("squeue", "--noheader"):
            self.run("scancel", "--user", _user())
            self.wait_for(lambda: not self.run("squeue", "--noheader"), 60, "no job is left")
        for node in sorted(self.nodes_not_ready()):
            self.resume_node(node)

    def _launch(self, daemon: str) -> None:
        if self.is_alive(daemon):
            raise ValueError(f"{daemon} runs already.")
        name, _, node = daemon.partition("-")
        if daemon not in self.daemons:
            raise ValueError(f"no daemon {daemon!r} in this cluster; there are {self.daemons}.")
        command = {
            "munged": self._munged,
            "mariadbd": self._mariadbd,
            "slurmdbd": lambda: ["slurmdbd", "-D"],
            "slurmctld": lambda: ["slurmctld", "-D", "-f", str(self.conf)],
            "slurmd": lambda: ["slurmd", "-D", "-N", node, "-f", str(self.conf)],
        }[name]()
        variables = {
            "PATH": _path(),
            "LC_ALL": "C",
            "MYSQL_UNIX_PORT": str(self.folder / "run" / "mariadb.sock"),
            # slurmstepd, which a job's processes descend from, inherits it.
            "SLURMD_NODENAME": node,
            _MARK: str(self.folder),
        }
        with (self.folder / "log" / f"{daemon}.err").open("ab") as errors:
            self._processes[daemon] = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=self.environment | variables,
                start_new_session=True,  # Ctrl-C is for pytest
            )

    def _munged(self) -> list[str]:
        key, run = self.folder / "etc" / "munge.key", self.folder / "run"
        if not key.exists():
            self._install("mungekey", "--create", f"--keyfile={key}")
        # The socket of one that was killed is in the way of the next: --force removes it.
        return ["munged", "--foreground", "--force", "--num-threads=4", f"--key-file={key}",
                f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid",
                f"--seed-file={run}/munge.seed"]  # fmt: skip

    def _mariadbd(self) -> list[str]:
        data, run = self.folder / "db", self.folder / "run"
        # Nobody minds if it is lost: no fsync, a small log; a socket, no port and no password.
        options = [f"--user={_user()}", f"--datadir={data}", "--innodb-flush-method=nosync",
                   "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0"]  # fmt: skip
        if not data.exists():
            self._install(
                "mariadb-install-db", "--no-defaults", *options, "--skip-test-db",
                "--skip-name-resolve", "--auth-root-authentication-method=socket",
                f"--auth-root-socket-user={_user()}",
                f"--tmpdir={run}",  # two at once are in each other's way in /tmp
            )  # fmt: skip
        (run / "mariadb.sock").unlink(missing_ok=True)
        return ["mariadbd", "--no-defaults", *options, "--skip-networking", "--skip-log-bin",
                f"--socket={run}/mariadb.sock", f"--pid-file={run}/mariadbd.pid",
                "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
                "--performance-schema=0", f"--tmpdir={run}"]  # fmt: skip

    def _install(self, *command: str) -> None:
        done = subprocess.run(
            command,
            env=self.environment | {"PATH": _path(), _MARK: str(self.folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr or done.stdout}")

    def _answers(self, daemon: str) -> bool:
        if not self.is_alive(daemon):
            raise RuntimeError(f"{daemon} ended at once.\n{self._report(daemon)}")
        run = self.folder / "run"
        question = {
            "munged": ["munge", "--no-input", f"--socket={run}/munge.sock"],
            "slurmdbd": ["sacctmgr", "--immediate", "add", "cluster", self._cluster_name],
            "slurmctld": ["scontrol", "ping"],
        }.get(daemon)
        if question is None:
            return self._accepts(daemon)
        try:
            self.run(*question, seconds=15)
        except subprocess.TimeoutExpired:
            return False
        except RuntimeError as error:
            return "already exists" in str(error)
        return True

    def _accepts(self, daemon: str) -> bool:
        if daemon == "mariadbd":
            family, address = socket.AF_UNIX, str(self.folder / "run" / "mariadb.sock")
        else:
            family, address = socket.AF_INET, (_address(), self._ports[daemon])
        with socket.socket(family) as connection:
            return connection.connect_ex(address) == 0

    def _report(self, daemon: str = "slurmctld") -> str:
        """For the message of a failure: the queue, the nodes, the end of a log."""
        parts = []
        for command in (["squeue", "--states=all"], ["sinfo", "-N", "-o", "%N %T %E"]):
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                parts.append(self.run(*command, seconds=10))
        log = self.folder / "log" / f"{daemon}.err"
        if log.exists():
            parts.append("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(parts)

    @property
    def _cluster_name(self) -> str:
        return _cluster_name(self.folder)

    def _write_settings(self) -> None:
        self.folder.chmod(0o755)  # munged insists: every user may ask it
        for name in ("etc", "run", "log", "ctld", "jobs"):
            (self.folder / name).mkdir()
        for node in self.nodes:
            (self.folder / "spool" / node.name).mkdir(parents=True)
            devices = self.folder / "dev" / node.name
            devices.mkdir(parents=True)
            for index in range(node.num_gpus):  # plain files would not do: not devices
                (devices / f"nvidia{index}").symlink_to("/dev/null")
        (self.folder / "owner").write_text(f"{os.getpid()} {_start_of(os.getpid())}")

        names = ["slurmctld", *(["slurmdbd"] if self.accounting else [])]
        names += [f"slurmd-{node.name}" for node in self.nodes]
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))

        if self.proctrack not in ("auto", "cgroup", "pgid"):
            raise ValueError(f"proctrack={self.proctrack!r}; known: auto, cgroup, pgid.")
        trouble = "not wanted" if self.proctrack == "pgid" else _claim_cgroups(self.nodes)
        if trouble and self.proctrack == "cgroup":
            raise RuntimeError(f"proctrack='cgroup' cannot be had: {trouble}.")
        self.has_memory_limits = not trouble
        if self.has_memory_limits:
            names = " ".join(node.name for node in self.nodes)
            (self.folder / "cgroups").write_text(names)
            (self.folder / "etc" / "cgroup.conf").write_text(_CGROUP_CONF)

        self.conf.write_text(self._slurm_conf())
        self.conf.with_name("gres.conf").write_text(self._gres_conf())
        # There must be one, or /etc/slurm/plugstack.conf is read.
        self.conf.with_name("plugstack.conf").write_text("")
        if self.accounting:
            path = self.conf.with_name("slurmdbd.conf")
            path.touch(mode=0o600)  # slurmdbd insists
            path.write_text(self._slurmdbd_conf())

    def _slurm_conf(self) -> str:
        socket_option = f"socket={self.folder}/run/munge.sock"
        if self.accounting:
            accounting = f"""
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={_address()}
AccountingStoragePort={self._ports["slurmdbd"]}
# AuthInfo does not reach slurmdbd: without this every question to it hangs.
AccountingStoragePass={socket_option}
AccountingStorageTRES=gres/gpu,gres/tpu
AccountingStoreFlags=job_comment"""
        else:
            accounting = "AccountingStorageType=accounting_storage/none"
        tracking = ("cgroup", "cgroup") if self.has_memory_limits else ("pgid", "none")
        nodes = "\n".join(
            f"NodeName={node.name} NodeHostname={_host()} NodeAddr={_address()} "
            f"Port={self._ports[f'slurmd-{node.name}']} CPUs={node.num_cpus} "
            f"Sockets=1 CoresPerSocket={node.num_cpus} ThreadsPerCore=1 "
            f"RealMemory={node.memory_mb} State=UNKNOWN"
            + (f" Gres={node.gres}" if node.gres else "")
            + (f" Feature={node.gpu_type}" if node.gpu_type else "")
            for node in self.nodes
        )
        partitions = "\n".join(
            f"PartitionName={part.name} Nodes={part.nodes} PriorityTier={part.priority_tier} "
            f"PreemptMode={part.preempt_mode} {part.options}"
            + ("" if part.preempt_mode == "OFF" else f" GraceTime={self.grace_time}")
            for part in self.partitions
        )
        sends_signal = ["SlurmctldParameters=preempt_send_user_signal"]
        extra = "\n".join([*sends_signal * self.preempt_send_user_signal, *self.extra])
        return f"""ClusterName={self._cluster_name}
SlurmctldHost={_host()}({_address()})
SlurmctldPort={self._ports["slurmctld"]}
SlurmUser={_user()}
SlurmdUser={_user()}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again.
AuthInfo={socket_option},cred_expire=5
# Listen on what the host name means, which is loopback, and nowhere else.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny

StateSaveLocation={self.folder}/ctld
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/run/slurmctld.pid
SlurmdPidFile={self.folder}/run/slurmd.%n.pid
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true

ProctrackType=proctrack/{tracking[0]}
TaskPlugin=task/{tracking[1]}
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
PropagateResourceLimits=NONE

SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu,tpu
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue={int(self.requeue)}
MaxArraySize={self.max_array_size}
MaxJobCount={self.max_job_count}
# Believe what is said of the nodes below, not what the machine has.
SlurmdParameters=config_overrides

KillWait=5
OverTimeLimit=0
InactiveLimit=0
MinJobAge=300
SlurmctldTimeout=60
SlurmdTimeout=120
ReturnToService=2
UnkillableStepTimeout=30

{accounting}

{nodes}

PartitionName=DEFAULT State=UP MaxTime=INFINITE DefaultTime=60
{partitions}

{extra}
"""

    def _gres_conf(self) -> str:
        lines = ["AutoDetect=off"]
        for node in self.nodes:
            if node.num_gpus:
                files = f"{self.folder}/dev/{node.name}/nvidia[0-{node.num_gpus - 1}]"
                kind = f"Name=gpu Type={node.gpu_type}"
                lines.append(f"NodeName={node.name} {kind} File={files}")
            elif node.num_tpus:
                lines.append(f"NodeName={node.name} Name=tpu Count={node.num_tpus} Flags=CountOnly")
        return "\n".join(lines) + "\n"

    def _slurmdbd_conf(self) -> str:
        return f"""AuthType=auth/munge
AuthInfo=socket={self.folder}/run/munge.sock
DbdHost={_host()}
DbdAddr={_address()}
DbdPort={self._ports["slurmdbd"]}
SlurmUser={_user()}
PidFile={self.folder}/run/slurmdbd.pid
DebugLevel=info
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StorageType=accounting_storage/mysql
# With MYSQL_UNIX_PORT: a unix socket.
StorageHost=localhost
StorageUser={_user()}
StorageLoc=slurm_acct
"""


def require_slurm(accounting: bool = True) -> None:
    """Skips the test where there is no Slurm, unless AERIE_REQUIRE_SLURM=1 says there must be."""
    trouble = _trouble(accounting)
    if trouble and os.environ.get("AERIE_REQUIRE_SLURM") == "1":
        pytest.fail(trouble)
    if trouble:
        pytest.skip(trouble)


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A cluster with accounting, one for all tests; tidied after each that asks for it."""
    require_slurm()
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_without_accounting() -> Iterator[SlurmCluster]:
    require_slurm(accounting=False)
    with SlurmCluster(accounting=False, proctrack="pgid") as cluster:
        yield cluster


@pytest.fixture
def own() -> Iterator[Callable[..., SlurmCluster]]:
    """Starts clusters of this test alone: stopped after it."""
    require_slurm(accounting=False)
    clusters = []

    def start(**options) -> SlurmCluster:
        cluster = SlurmCluster(**{"accounting": False, "proctrack": "pgid"} | options)
        clusters.append(cluster)
        cluster.start()
        return cluster

    yield start
    for cluster in clusters:
        cluster.stop()


@pytest.fixture(autouse=True)
def _tidy_slurm(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails leaves its jobs behind, and perhaps a dead node: not to the next one."""
    yield
    for name in ("slurm", "slurm_without_accounting"):
        if name in request.fixturenames:
            request.getfixturevalue(name).tidy()


_MARK = "AERIE_SLURM_FOLDER"  # in the environment of every daemon, and of slurmstepd
_NODE_MARK = "AERIE_SLURM_NODE"
_CGROUP_CONF = f"""CgroupPlugin=cgroup/v1
CgroupMountpoint={CGROUPS}
CgroupAutomount=no
ConstrainRAMSpace=yes
ConstrainSwapSpace=yes
AllowedSwapSpace=0
# Cores and devices are fake.
ConstrainCores=no
ConstrainDevices=no
"""


def _trouble(accounting: bool) -> str | None:
    commands = COMMANDS + (DATABASE_COMMANDS if accounting else ())
    missing = [command for command in commands if shutil.which(command, path=_path()) is None]
    if missing:
        return (
            f"Slurm is not installed (no {', '.join(missing)}): "
            f"apt-get install --no-install-recommends {PACKAGES}"
        )
    try:
        address = _address()
    except OSError:
        address = "nothing"
    if not address.startswith("127."):
        return (
            f"Slurm must find this machine on loopback, but the host name {_host()} means "
            f"{address}: put the line '127.0.0.1 {_host()}' on top of /etc/hosts."
        )
    return None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _address() -> str:
    return socket.gethostbyname(_host())


def _free_ports(number: int) -> list[int]:
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORTS, k=10 * number):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == number:
            return ports
    raise RuntimeError(f"no {number} free TCP ports among {PORTS}.")


def _claim_cgroups(nodes: tuple[Node, ...]) -> str | None:
    """Why they cannot be had. Slurm names them after the node alone, whatever the cluster: whoever
    makes the first folder has the name."""
    if os.geteuid() != 0:
        return "not root"
    claimed = []
    for node in nodes:
        for kind in ("freezer", "memory"):
            path = CGROUPS / kind / f"slurm_{node.name}"
            try:
                if not (CGROUPS / kind / "tasks").exists():
                    raise OSError(f"no cgroup v1 at {CGROUPS / kind}")
                path.mkdir()
            except OSError as error:
                for made in claimed:
                    made.rmdir()
                return str(error)
            claimed.append(path)
    return None


def _release_cgroups(folder: Path) -> None:
    claim = folder / "cgroups"
    for name in claim.read_text().split() if claim.exists() else ():
        for root in CGROUPS.glob(f"*/slurm_{name}"):
            for path, _, _ in os.walk(root, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(path)


def _cluster_name(folder: Path) -> str:
    return folder.name.replace("-", "").replace("_", "").lower()


def _start_of(pid: int) -> str | None:
    """Its start time in clock ticks tells a process from a later one with its number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _processes_of(folder: Path, node: str | None = None) -> set[int]:
    """Daemons, step daemons and all that jobs started, of one node or of all; never ourselves or
    who started us (we may ourselves be in a job of that cluster)."""
    marks = {f"{_MARK}={folder}", f"SLURM_CLUSTER_NAME={_cluster_name(folder)}"}
    node_marks = {f"{_NODE_MARK}={node}", f"SLURMD_NODENAME={node}"}
    parents: dict[int, int] = {}
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            variables = set((path / "environ").read_bytes().decode(errors="replace").split("\0"))
        except OSError:
            continue
        if fields[0] == "Z":
            continue
        parents[int(path.name)] = int(fields[1])
        if marks & variables and (node is None or node_marks & variables):
            found.add(int(path.name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more  # children with an environment of their own
    pid = os.getpid()
    while pid > 1:
        found.discard(pid)
        pid = parents.get(pid, 0)
    return found


def _kill_until_gone(processes: Callable[[], set[int]]) -> None:
    """Again and again: while one is killed another may start one more. First all are stopped, so
    that none sees another die and reports it."""
    end = time.monotonic() + 30
    while left := processes():
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        if time.monotonic() > end:
            raise TimeoutError(f"processes {sorted(left)} outlive SIGKILL.")
        time.sleep(0.02)


def _tear_down(folder: Path) -> None:
    _kill_until_gone(lambda: _processes_of(folder))
    _release_cgroups(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned() -> None:
    """What is left of test sessions that were killed."""
    for owner in FOLDERS.glob(f"{PREFIX}*/owner"):
        with contextlib.suppress(OSError, ValueError):
            pid, start = owner.read_text().split()
            if owner.stat().st_uid == os.geteuid() and _start_of(int(pid)) != start:
                _tear_down(owner.parent)


if __name__ == "__main__":  # a cluster to play with: python tests/slurm_cluster.py [COMMAND ...]
    with SlurmCluster() as here:
        shell = sys.argv[1:] or [os.environ.get("SHELL", "bash")]
        print(f"SLURM_CONF={here.conf}", flush=True)
        sys.exit(subprocess.run(shell, env=here.environment, check=False).returncode)
