"""The processes of one run, where its backend needs several: rank 0 starts the others.

Rank 0 is the run's child, and alone writes its record. The others are the same command, in the same
process group, told apart by their environment; they die with rank 0. A rank that dies would leave
the rest waiting in a collective: rank 0 watches, and ends the run with a record that names it.

Imports no NumPy: threads are pinned before its own start.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from implementations.rank import Rank
from suites.harness import stop

PROCESS_PER_DEVICE = ("torch",)  # backends; the others' process holds all devices of its node
PARENT, REPORT_FD = "AERIE_RANK_PARENT", "AERIE_RANK_REPORT_FD"
# For rank 0 to end as a rank before it has ended: most often both fail alike, and its own reason
# is the better one.
GRACE_S = 5.0
# For a signal that ends all of the run's processes, as of a job that is over, to end rank 0 too:
# then the record is for whoever started it, and knows why.
SIGNALLED_S = 1.0


def num_processes(backend: str, num_devices: int) -> int:
    return num_devices if backend in PROCESS_PER_DEVICE else 1


def share(cores: list[int], index: int, count: int) -> list[int]:
    """Cores of one of several that run side by side; where they are too few, some have the same."""
    number = max(len(cores) // count, 1)
    return [cores[(index * number + i) % len(cores)] for i in range(number)]


def pinned(cores: list[int], num_threads: int | None = None) -> dict[str, str]:
    """What keeps a process to its cores, and to so many threads (None: one a core), read before any
    thread of it starts."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    threads = dict.fromkeys(names, str(num_threads or len(cores)))
    return {"AERIE_CORES": ",".join(map(str, cores))} | threads


Death = tuple[int, int, dict[str, Any]]  # rank, return code, and its report where it left one


@dataclass
class Others:
    """Ranks 1 and up, as rank 0 sees them."""

    processes: dict[int, subprocess.Popen]
    reports: dict[int, int]  # pipes, on which a rank that fails says how
    _deaths: list[Death] = field(default_factory=list)
    _is_dead: threading.Event = field(default_factory=threading.Event)
    _ending: threading.Lock = field(default_factory=threading.Lock)

    def watch(self, end: Callable[..., None]) -> None:
        """Once one has died, and this process has not ended by itself, ends it: `end` is given
        the death, and leaves the record."""
        for rank, process in self.processes.items():
            arguments = (rank, process, end)
            threading.Thread(target=self._watch, args=arguments, daemon=True).start()

    def death(self) -> Death | None:
        """What may have caused what this rank saw, waiting a little for it: of those that died
        one that was killed, as what the others report may come of that; else the first."""
        if not self._is_dead.wait(GRACE_S):
            return None
        time.sleep(SIGNALLED_S)
        return min(self._deaths, key=lambda death: death[1] >= 0)

    def let_go(self) -> None:
        """From now on their ends are of no concern."""
        self._ending.acquire()

    def _watch(self, rank: int, process: subprocess.Popen, end: Callable) -> None:
        if (returncode := process.wait()) == 0:
            return
        os.set_blocking(self.reports[rank], False)
        try:
            report = json.loads(os.read(self.reports[rank], 2**16) or "{}")
        except BlockingIOError:  # nothing, and a process that it has started still holds the pipe
            report = {}
        self._deaths.append((rank, returncode, report))
        self._is_dead.set()
        if report:
            time.sleep(GRACE_S)
        death = self.death()
        with self._ending:
            end(*death)
            os._exit(0)


def start(command: list[str], count: int) -> Others:
    """Starts ranks 1 and up; this process is rank 0 from now on."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    rank = Rank(count=count, port=server.getsockname()[1])
    inherited = dict(os.environ)
    processes, reports = {}, {}
    for index in range(1, count):
        reports[index], written = os.pipe()
        told = {PARENT: str(os.getpid()), REPORT_FD: str(written)}
        processes[index] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=inherited | environment(replace(rank, index=index), inherited) | told,
            pass_fds=[written],
        )
        os.close(written)
    # the socket stays ours, and open, until the backend listens on it
    os.environ.update(environment(replace(rank, listen_fd=server.detach()), inherited))
    return Others(processes, reports)


def environment(rank: Rank, environ: Mapping[str, str]) -> dict[str, str]:
    """Of one rank: who it is, and its share of the run's cores."""
    found = rank.to_environ()
    if cores := environ.get("AERIE_CORES"):
        found |= pinned(share([int(core) for core in cores.split(",")], rank.index, rank.count))
    if sys.platform == "linux":  # ranks of one node: no other network is asked, nor may refuse
        found["GLOO_SOCKET_IFNAME"] = "lo"
    return found


def heed_rank_0_alone() -> None:
    """Whoever stops a run signals all its processes: rank 0 says how it ends."""
    for number in (signal.SIGTERM, signal.SIGINT, stop.SIGNAL):
        signal.signal(number, signal.SIG_IGN)


def report(outcome: str, reason: str | None, phase: str) -> None:
    """Tells rank 0 how this rank failed."""
    text = json.dumps({"outcome": outcome, "reason": reason, "phase": phase})
    os.write(int(os.environ[REPORT_FD]), text.encode()[: 2**16])
