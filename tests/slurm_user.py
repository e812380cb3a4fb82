"""What a user does, in a process of its own: python slurm_user.py STORE submit|wait|..., with what
is submitted as JSON on stdin. The commands are ours; only what is planned does not come from YAML.
"""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from suites import commands, compose, gate, jobs, watching
from suites.harness import launch, plan, rounds
from suites.harness.cluster import Cluster
from suites.harness.run import Run


def submit(store: Path, request: dict) -> int:
    runs = [Run.from_json(values) for values in request["runs"]]
    asked = SimpleNamespace(
        clusters=tuple(Cluster(**values) for values in request["clusters"]),
        settings=[runs],
        title="faults",
    )
    compose.read = lambda overrides: asked
    plan.expand = lambda runs: runs
    rounds.asked = lambda settings: {}
    commands.data_configs = lambda settings: []
    gate.ahead = lambda *_: []
    if die := request.get("die"):
        _die(die)
    return jobs.submit([], store, as_json=True)


def wait(store: Path, request: dict) -> int:
    return watching.wait(store, [], every_s=0.3, as_json=True, **request)


def _die(when: str) -> None:
    """As if killed, right before or after sbatch."""
    submit = launch.Slurm.submit

    def deadly(self, submission, array):
        if when == "after sbatch":
            submit(self, submission, array)
        os.kill(os.getpid(), signal.SIGKILL)

    launch.Slurm.submit = deadly


if __name__ == "__main__":
    store, command = Path(sys.argv[1]), sys.argv[2]
    request = json.loads(sys.stdin.read() or "{}")
    sys.exit({"submit": submit, "wait": wait}[command](store, request))
