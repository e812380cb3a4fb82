"""The process of one run: `python -m suites.harness.child <store> <task>`.

It dies with its parent, offers itself first to the kernel's out-of-memory killer, keeps to its
cores, and leaves one record.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from suites.harness import stop

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(store: Path, path: Path) -> None:
    stop.listen()
    values = json.loads(path.read_text(encoding="utf-8"))
    _die_with(values["parent_pid"])
    with contextlib.suppress(OSError):  # no such file outside of Linux
        Path("/proc/self/oom_score_adj").write_text("1000")
    if cores := os.environ.get("AERIE_CORES"):  # set by the executor; before any thread starts
        os.sched_setaffinity(0, map(int, cores.split(",")))

    from suites.harness.execute import Task, execute  # NumPy's threads start here
    from suites.harness.executors import STARTED_VARIABLE

    started = os.environ.get(STARTED_VARIABLE)
    execute(store, Task.from_json(values), started=float(started) if started else None)


def _die_with(parent_pid: int) -> None:
    """A killed parent leaves no orphan that would measure on beside its successor."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died before we asked
            os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the record is on disk; frameworks take long to tear down
