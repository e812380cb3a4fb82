"""Where runs are started on a machine: one small protocol, and the executor of this machine.

A task is a file; an executor starts `python -m suites.harness.child <store> <task>` for it in an
environment that is set before the child begins, and says how it ended. It never reads records.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from implementations.engine import CPU
from suites.harness import provenance, ranks, topology
from suites.harness.checkpoint import INTERVAL_S, INTERVAL_VARIABLE
from suites.harness.devices import devices_environment
from suites.harness.measure import STARTED_VARIABLE
from suites.harness.run import Run
from suites.harness.trained import KEEP_VARIABLE

TENSORS_VARIABLE = "AERIE_TENSORS"  # where a run may leave its tensors: suites/parity.py does
NOT_INHERITED = (
    "TRITON_INTERPRET",  # read where a kernel is defined: the user's own would interpret all
    "AERIE_JOB",  # names the process of an array (see launch.py), which a run is not
)


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what was seen of it; negative return codes are signals."""

    returncode: int
    peak_rss_bytes: int = 0
    peak_virtual_bytes: int = 0
    num_out_of_memory_kills: int | None = None  # while it ran; None: the kernel does not tell


class Executor(Protocol):
    """Carries tasks to where they run. Handles are strings and stay valid until polled as ended."""

    def submit(self, task: Path, slot: int = 0) -> str:
        """Starts the task on the share of the machine that has this number. Raises Unsupported
        where that share lacks the devices that the run asks for."""

    def poll(self, handle: str) -> Ended | None:
        """None while it waits or runs."""

    def wait(self, seconds: float) -> None:
        """Returns when some task may have ended, or after the time given."""

    def stop(self, handle: str) -> None:
        """Asks the task to end soon, and to leave what it needs to go on later."""

    def cancel(self, handle: str) -> None:
        """Stops the task and all it started; returns when it is gone."""

    def logs(self, handle: str) -> str:
        """What it printed, also after its end."""


@dataclass
class _Child:
    process: subprocess.Popen
    pidfd: int | None
    kills_before: int | None
    dumps: tempfile.TemporaryDirectory | None = None
    peak_rss_bytes: int = 0
    peak_virtual_bytes: int = 0


@dataclass
class Local:
    """Runs tasks on this machine, each in a fresh process on its own share of the cores."""

    store: Path
    num_slots: int = 1
    python: dict[str, str] = field(default_factory=dict)  # backend -> interpreter
    checkpoint_s: float = INTERVAL_S  # between two checkpoints of a quality run
    keeps_parameters: bool = False
    _children: dict[str, _Child] = field(default_factory=dict)
    _logs: dict[str, Path] = field(default_factory=dict)

    def submit(self, task: Path, slot: int = 0) -> str:
        mine = ranks.share(provenance.cores(), slot, self.num_slots)
        log = task.with_name(task.name.removeprefix(".task-")).with_suffix(".log")
        run, dumps, seen = _run_of(task), None, {}
        if run.workload.topology is None:
            seen = devices_environment(run.device_kind, slot, run.workload.num_devices, os.environ)
        if run.workload.topology and run.workload.phase == "kernel":
            dumps = tempfile.TemporaryDirectory(prefix="aerie-dumps-")
        python = self.python.get(run.backend, sys.executable)
        command = [python, "-m", "suites.harness.child", str(self.store), str(task)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(mine, run, dumps and dumps.name)
                | seen
                | {
                    TENSORS_VARIABLE: str(log.with_suffix(".npz")),
                    INTERVAL_VARIABLE: str(self.checkpoint_s),
                    KEEP_VARIABLE: "1" if self.keeps_parameters else "",
                    STARTED_VARIABLE: repr(time.monotonic()),  # one clock for all processes here
                },
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
        handle = str(process.pid)
        kills = provenance.num_out_of_memory_kills()
        self._children[handle] = _Child(process, _pidfd(process.pid), kills, dumps)
        self._logs[handle] = log
        return handle

    def poll(self, handle: str) -> Ended | None:
        child = self._children[handle]
        _look_at_memory(child)
        returncode = child.process.poll()
        if returncode is None:
            return None
        self._forget(handle)
        if not self._logs[handle].stat().st_size:
            self._logs[handle].unlink()
        kills = provenance.num_out_of_memory_kills()
        if kills is not None and child.kills_before is not None:
            kills -= child.kills_before
        return Ended(returncode, child.peak_rss_bytes, child.peak_virtual_bytes, kills)

    def wait(self, seconds: float) -> None:
        pidfds = [c.pidfd for c in self._children.values() if c.pidfd is not None]
        if len(pidfds) < len(self._children) or not pidfds:
            time.sleep(min(seconds, 0.05))
            return
        select.select(pidfds, [], [], seconds)

    def stop(self, handle: str) -> None:
        if child := self._children.get(handle):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, signal.SIGUSR2)

    def cancel(self, handle: str) -> None:
        if (child := self._children.get(handle)) is None:  # it has ended
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()
        self._forget(handle)

    def logs(self, handle: str) -> str:
        log = self._logs[handle]
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def _forget(self, handle: str) -> None:
        child = self._children.pop(handle)
        if child.pidfd is not None:
            os.close(child.pidfd)
        if child.dumps is not None:
            child.dumps.cleanup()


def environment(cores: list[int], run: Run, dumps: str | None = None) -> dict[str, str]:
    """The child's environment: threads pinned, full float32 products, caches on local disk."""
    caches = Path(tempfile.gettempdir()) / f"aerie-cache-{os.getuid()}"
    # tensors of parity are tiny: more threads than one would wait for each other
    num_threads = 1 if run.suite == "parity" else None
    pinned = ranks.pinned(cores, num_threads) | {
        # our own code, and not another checkout's that the command was started in
        "PYTHONPATH": os.pathsep.join(filter(None, (str(provenance.ROOT), *_python_path()))),
        "PYTHONSAFEPATH": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "NVIDIA_TF32_OVERRIDE": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if run.workload.topology is not None:
        pinned |= topology.environment(dumps)
    if run.device_kind == CPU or run.workload.topology is not None:
        pinned |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    inherited = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    return inherited | pinned | ({"TRITON_INTERPRET": "1"} if run.kernels.interpret else {})


def _python_path() -> list[str]:
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


def _run_of(task: Path) -> Run:
    return Run.from_json(json.loads(task.read_text(encoding="utf-8"))["run"])


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _look_at_memory(child: _Child) -> None:
    """Keeps the highest memory seen of a child that still runs."""
    try:
        lines = Path(f"/proc/{child.process.pid}/status").read_text().splitlines()
    except OSError:
        return
    seen = {k: v for k, _, v in (line.partition(":") for line in lines) if k.startswith("Vm")}
    for key, name in (("VmHWM", "peak_rss_bytes"), ("VmPeak", "peak_virtual_bytes")):
        if key in seen:
            setattr(child, name, max(getattr(child, name), int(seen[key].split()[0]) * 1024))
