"""The process of one run: `python -m suites.harness.child <store> <task>`.

It dies with its parent, offers itself first to the kernel's out-of-memory killer, keeps to its
cores, and leaves one record. Where the run is several processes it is rank 0, and starts the others
(see ranks.py).
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from suites.harness import ranks, stop

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(store: Path, path: Path) -> bool:
    """Whether the run has ended as a record, or this rank as it should."""
    rank_0 = os.environ.get(ranks.PARENT)  # its process, which has started this one
    values = json.loads(path.read_text(encoding="utf-8"))
    if rank_0 is not None:
        ranks.heed_rank_0_alone()
    elif values["block"] is None:
        stop.listen()
    else:
        stop.ignore()
    _die_with(values["parent_pid"] if rank_0 is None else int(rank_0))
    with contextlib.suppress(OSError):  # no such file outside of Linux
        Path("/proc/self/oom_score_adj").write_text("1000")
    others = None
    num_devices = values["run"]["workload"].get("num_devices", 1)
    num_processes = ranks.num_processes(values["run"]["backend"], num_devices)
    if rank_0 is None and num_processes > 1:
        command = [sys.executable, "-m", "suites.harness.child", str(store), str(path)]
        others = ranks.start(command, num_processes)
    if cores := os.environ.get("AERIE_CORES"):  # set by the executor; before any thread starts
        os.sched_setaffinity(0, map(int, cores.split(",")))

    from suites.harness.execute import Task, execute  # NumPy's threads start here
    from suites.harness.measure import STARTED_VARIABLE

    started = os.environ.get(STARTED_VARIABLE)
    started = float(started) if started else None
    record = execute(store, Task.from_json(values), started=started, others=others)
    return rank_0 is None or record.outcome == "completed"


def _die_with(parent_pid: int) -> None:
    """A killed parent leaves no orphan that would measure on beside its successor."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died before we asked
            os._exit(1)


if __name__ == "__main__":
    is_well = main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(not is_well)  # the record is on disk; frameworks take long to tear down
