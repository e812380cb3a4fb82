"""A submission survives its submitter: killed at any write, what it intended is run once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stub_suite import stub_run

from suites.harness import plan, reconcile, submission
from suites.harness.record import read_all

# A submitter as `aerie submit` is one, of the suite `stub`. It dies before write number KILL_AT:
# what it did before is there, and what makes that count may be missing.
SUBMITTER = """
import os, signal, subprocess, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from stub_suite import stub_run
from suites import jobs
from suites.harness import plan, reconcile
from suites.harness.cluster import Cluster

left = int(os.environ["KILL_AT"])
def deadly(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for name in ("replace", "rename", "link", "fsync"):
    setattr(os, name, deadly(getattr(os, name)))
subprocess.Popen = deadly(subprocess.Popen)
store = Path({store!r})
cluster = Cluster(name="here", executor="local", runs_per_job=2, view_s=0.1, lost_after_s=0.1)
planned = plan.plan(store, [stub_run("done", seed=seed) for seed in range(4)])
view = reconcile.reconcile(store)
todo = [item for item in planned if item.is_pending]
bill = jobs._bill(store, todo, planned, [cluster], view, unasked=jobs._left_over(store, view))
jobs._submit(store, bill, "stub", "a test", dry_run=False, as_json=True)
print(os.environ["KILL_AT"], "->", left)
"""


def submit(store: Path, kill_at: int = 0) -> int:
    """Exit code of a submitter: -9 where it was killed. With kill_at=0 it lives."""
    code = SUBMITTER.format(tests=str(Path(__file__).parent), store=str(store))
    environment = os.environ | {"KILL_AT": str(kill_at)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


def settle(store: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while reconcile.reconcile(store).jobs:
        assert time.monotonic() < deadline, "jobs that do not end"
        time.sleep(0.2)


@pytest.fixture
def num_writes(stub):
    """How many writes an undisturbed submitter makes."""
    code = SUBMITTER.format(tests=str(Path(__file__).parent), store=str(stub / "count"))
    environment = os.environ | {"KILL_AT": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    settle(stub / "count")
    return 1_000_000 - int(done.stdout.split("->")[1])


@pytest.mark.slow
def test_a_submitter_killed_at_any_write_loses_and_doubles_nothing(stub, num_writes):
    assert num_writes > 15
    ids = {stub_run("done", seed=seed).run_id for seed in range(4)}
    for kill_at in range(1, num_writes + 1):
        store = stub / str(kill_at)
        assert submit(store, kill_at) == -9
        assert submit(store) == 0
        settle(store)
        records = list(read_all(store))
        assert {record.run_id for record in records} == ids, kill_at
        assert len(records) == 4, kill_at
        assert {record.outcome for record in records} == {"completed"}
        assert submit(store) == 0
        assert len(submission.read(store)) <= 2  # the third had nothing to submit


def test_a_submission_runs_from_its_copy_of_the_code(stub):
    assert submit(stub) == 0
    settle(stub)
    (made,) = submission.read(stub)
    code = Path(made.snapshot)
    assert (code / "suites" / "harness" / "worker.py").is_file()
    assert json.loads((code / "snapshot.json").read_text()).keys() == {"git_commit"}
    assert [one.outcome for one in read_all(stub)] == ["completed"] * 4
    (planned,) = plan.plan(stub, [stub_run("done", seed=0)])
    assert not planned.is_pending


def test_what_fits_in_no_queue_is_not_lost(stub):
    """An intent whose submitter died before it submitted: the next one takes its runs."""
    assert submit(stub) == 0
    settle(stub)
    (made,) = submission.read(stub)
    assert made.memory()["is_settled"]
    assert not reconcile.reconcile(stub).jobs
