"""What a job still has to measure, by the records that are there; and how one on this machine is
stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from stub_suite import stub_run

from suites.harness import claims, launch, plan, reconcile, slurm, submission, worker
from suites.harness.cluster import Cluster
from suites.harness.execute import Task, new_attempt
from suites.harness.pack import Job
from suites.harness.record import read_all, write
from suites.harness.sweep import BLOCK, Result, Stop, sweep
from suites.harness.worker import pending

HERE = Cluster(name="here", executor="local")


@pytest.fixture
def block(stub):
    """Three runs that are compared, as a job is given them."""
    return plan.plan(stub, [stub_run(seed=seed) for seed in range(3)])


def record(store, item, attempt, outcome, sweep_name="s1"):
    task = Task(run=item.run, build=item.build, attempt=attempt, parent_pid=0, costs=item.costs,
                block=f"{item.block}-{sweep_name}", order=item.order)  # fmt: skip
    write(store, task.record(outcome, provenance={}, started_at="", seconds=1.0))


def left(store, block):
    return [item.run.seed for item in pending(store, block, HERE)]


def test_an_interrupted_block_is_measured_whole(stub, block):
    assert left(stub, block) == [0, 1, 2]
    record(stub, block[0], "a", "completed")
    record(stub, block[1], "b", "preempted")
    assert left(stub, block) == [0, 1, 2]
    for item, attempt in zip(block, "cde", strict=True):
        record(stub, item, attempt, "completed", "s2")
    assert left(stub, block) == []


def test_a_member_that_fails_for_good_leaves_the_others_whole(stub, block):
    record(stub, block[0], "a", "completed")
    record(stub, block[1], "b", "failed")
    assert left(stub, block) == [0, 2]
    record(stub, block[2], "c", "completed")
    assert left(stub, block) == []


def test_a_block_that_is_longer_than_its_jobs_time_is_given_up(stub, block):
    for number in (1, 2):
        record(stub, block[0], f"{number}a", "completed", f"s{number}")
        record(stub, block[1], f"{number}b", "timed_out", f"s{number}")
        assert left(stub, block) == ([0, 1, 2] if number == 1 else [])


def test_what_was_there_before_a_submission_does_not_count_against_it(stub, block):
    record(stub, block[0], "a", "failed")
    again = [replace(item, attempts=("a",)) for item in block]
    assert left(stub, again) == [0, 1, 2]


def test_a_stop_blames_what_had_the_time_of_the_job(stub):
    stop = Stop(outcome="timed_out", reason="", grace_s=0.0, fair_s=100.0)
    assert [stop.outcome_after(seconds) for seconds in (99, 100)] == ["preempted", "timed_out"]


def test_a_part_of_a_block_waits_for_the_rest_of_it(stub, block):
    """Whatever part: two that measured side by side would be compared, and disturb each other."""
    assert claims.claim(stub, f"{BLOCK}{block[0].block}")
    result = sweep(stub, block[1:], HERE)
    assert result.elsewhere == [item.run.run_id for item in block[1:]]
    assert not list(read_all(stub))


def test_what_others_measured_of_a_block_meanwhile_counts_where_it_is_all(stub, block):
    record(stub, block[0], "a", "completed")
    assert sweep(stub, block, HERE).num_started == 3
    assert sweep(stub, block, HERE).num_started == 0


def test_a_process_knows_what_its_build_is_made_of_where_it_runs(stub):
    """Also in the record of a run that could not say it itself: it counts against its budget."""
    (planned,) = plan.plan(stub, [stub_run("kill")])
    sweep(stub, [planned], HERE)
    (made,) = read_all(stub)
    assert made.provenance["build_device"] == plan.provenance.cpu_model()
    assert plan.outcomes_of_build(stub, planned) == ["failed"]


def test_an_interpreter_that_a_node_lacks_fails_its_own_runs_alone(stub):
    missing = "/no/such/python"
    here = replace(HERE, python={"torch": missing})
    given = plan.plan(stub, [stub_run(backend=name) for name in ("torch", "jax")])
    sweep(stub, pending(stub, given, here), here)
    ends = {made.run["backend"]: made for made in read_all(stub)}
    assert {name: made.outcome for name, made in ends.items()} == {
        "torch": "failed",
        "jax": "completed",
    }
    assert ends["torch"].reason.startswith("cluster.python.torch: cannot be started: ")
    assert missing in ends["torch"].reason
    (planned,) = [item for item in given if item.run.backend == "torch"]
    assert plan.outcomes_of_build(stub, planned) == ["failed"]
    with pytest.raises(ValueError, match=f"^cluster.python: {missing} does not run: "):
        plan.plan(stub, [planned.run], lambda run: missing)


def job(store, given, executor):
    cluster = replace(HERE, executor=executor)
    made = submission.intend(store, title="stub", command="a test", snapshot=store,
                             packed=[(cluster, [[Job(given)]])], left=[])  # fmt: skip
    return worker.Job(made, 0, 0)


def test_a_job_of_an_older_copy_of_the_code_outlives_files_of_a_later_one(stub, monkeypatch):
    monkeypatch.setattr(worker, "OTHERS_S", 0.0)
    given = plan.plan(stub, [stub_run()])
    ours, later = job(stub, given, "local"), job(stub, given, "local").made
    path = later.folder / "submission.json"
    values = json.loads(path.read_text())
    values["clusters"][0]["new"] = 1
    path.write_text(json.dumps(values))
    assert ours.let_others(0)
    task = stub / "runs" / given[0].run.run_id / ".task-later.json"
    task.parent.mkdir(parents=True)
    task.write_text(json.dumps(Task(run=given[0].run, build="", attempt="", parent_pid=0).to_json()
                               | {"new": 1}))  # fmt: skip
    assert not list(reconcile.open_attempts(stub, given[0].run.run_id))


def test_a_job_is_started_again_whose_last_run_was_told_to_stop_before_it(stub, monkeypatch):
    """A signal that is for all processes may reach the run first, which then stops itself."""
    given = plan.plan(stub, [stub_run()])
    ours, asked = job(stub, given, "slurm"), []

    def stopped(store, todo, cluster, watch):
        record(store, todo[0], new_attempt(), "preempted")
        threading.Timer(0.3, ours._note, (signal.SIGUSR2, None)).start()
        return Result(outcomes={todo[0].run.run_id: "preempted"}, num_started=1)

    monkeypatch.setattr(worker, "sweep", stopped)
    monkeypatch.setattr(slurm, "requeue", asked.append)
    assert worker.work(ours).is_interrupted
    assert len(asked) == 1


def test_a_run_is_not_taken_for_the_process_of_its_array(stub, monkeypatch):
    given, found = plan.plan(stub, [stub_run("second")]), []
    made = job(stub, given, "local").made
    monkeypatch.setenv("AERIE_JOB", made.job_name(0))

    def watch():
        found.append(launch.ThisMachine().find(made, 0))

    assert sweep(stub, given, HERE, watch=watch).num_started == 1
    assert len(found) > 2
    assert set(found) == {None}


@pytest.mark.parametrize("count", [1, 2])
def test_a_job_on_this_machine_that_is_cancelled_ends_as_cancelled(stub, count):
    """Also between two jobs of its array: the process is one, and none is begun any more."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from stub_suite import stub_run
from suites import jobs
from suites.harness import plan, reconcile
from suites.harness.cluster import Cluster
store = Path({str(stub)!r})
cluster = Cluster(name="here", executor="local", view_s=0.1)
todo = plan.plan(store, [stub_run("hang", seq_len=n) for n in range(8, 8 + {count})])
bill = jobs._bill(store, todo, todo, [cluster], reconcile.reconcile(store))
jobs._submit(store, bill, "stub", "a test", dry_run=False, as_json=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    (place,) = stub.glob("submissions/*/arrays/0.json")
    pid = int(place.read_text().split('"job_id": "')[1].split("@")[0])
    deadline = time.time() + 20
    while not list(stub.glob("runs/*/.phase-*")) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(pid, signal.SIGTERM)
    while claims.started(pid) and time.time() < deadline:
        time.sleep(0.05)
    (made,) = read_all(stub)
    assert (made.outcome, made.reason) == ("cancelled", "its job was cancelled")
    assert not list((stub / "claims").glob("[!.]*"))
