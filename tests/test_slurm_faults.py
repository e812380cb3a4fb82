"""Faults of clusters on a real Slurm, through what a user does: nothing lost, nothing doubled."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from fault_suite import quality, timing, write_suites
from slurm_cluster import Node, Partition, SlurmCluster, require_slurm
from slurm_shims import NO_ACCOUNTING, Answer, SlurmShims

from suites.harness import reconcile, submission
from suites.harness.execute import Task, utc_now
from suites.harness.plan import FINISHED
from suites.harness.record import Record, read_all, write
from suites.harness.run import Run

USER = Path(__file__).with_name("slurm_user.py")
WAIT_S = 90.0  # until what a test waits for must have come


@pytest.fixture(autouse=True)
def suites_of_faults(stub, monkeypatch):
    folder = stub.parent / "site"
    write_suites(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@dataclass(frozen=True, eq=False)
class User:
    """Somebody with a results folder, at the login node of a cluster."""

    slurm: SlurmCluster
    store: Path
    prefix: tuple[str, ...] = ()  # of every command

    def submit(self, runs: Iterable[Run], *clusters: dict, die: str = "", code: int = 0) -> dict:
        """What `aerie submit --json` says. `runs` go to `clusters`, by default to one of CPUs."""
        request = {
            "runs": [asdict(run) for run in runs],
            "clusters": [cluster(**values) for values in clusters or [{}]],
            "die": die,
        }
        done = self.call([sys.executable, str(USER), str(self.store), "submit"], request)
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if done.stdout.startswith("{") else {}

    def wait(self, seconds: float = WAIT_S) -> dict[str, int]:
        """Outcomes and how many runs have them, when all that was submitted has ended."""
        command = [sys.executable, str(USER), str(self.store), "wait"]
        done = self.call(command, {"timeout_s": seconds})
        assert done.returncode in (0, 1), done.stderr
        said = json.loads(done.stdout)
        assert not said["is_over_time"], f"{done.stderr}\n{self.slurm._report()}"
        return said["outcomes"]

    def aerie(self, *words: str) -> subprocess.CompletedProcess:
        return self.call([sys.executable, "-m", "suites", *words, "--results", str(self.store)])

    def status(self) -> dict[str, Any]:
        done = self.aerie("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def call(self, command: list[str], request: dict | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*self.prefix, *command],
            input=json.dumps(request or {}),
            env=self.slurm.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    @property
    def jobs(self) -> list[str]:
        """Slurm's ids of the arrays, oldest first."""
        made = submission.read(self.store)
        ids = [one.job_id(array.number) for one in made for array in one.arrays]
        return [job_id for job_id in ids if job_id]

    def records(self, run: Run) -> list[Record]:
        return [record for record in read_all(self.store) if record.run_id == run.run_id]

    def outcomes(self, run: Run) -> list[str]:
        return [record.outcome for record in self.records(run)]

    def has_begun(self, run: Run) -> bool:
        """Whether the run is measured now, past its imports."""
        phases = (self.store / "runs" / run.run_id).glob(".phase-*.json")
        return any('"measure"' in path.read_text() for path in phases if path.exists())

    def wait_until_begun(self, *runs: Run, seconds: float = WAIT_S) -> None:
        self.slurm.wait_for(lambda: all(map(self.has_begun, runs)), seconds, "the runs begin")


def cluster(**values) -> dict:
    """Of a queue that forgets within seconds."""
    return {
        "name": "here",
        "executor": "slurm",
        "partition": "cpu",
        "time": 30,
        "mem": "400",
        "stop_warning_s": 30,
        "lost_after_s": 3.0,
        "view_s": 1.0,
        "checkpoint_s": 1.0,
    } | values


def block(what: str, *, rounds: int = 1, **values) -> list[Run]:
    """Timing runs that are compared, and so measured in one piece."""
    families = ("hawk", "mqa")
    return [timing(what, family=f, round=r, **values) for r in range(rounds) for f in families]


def check(user: User, runs: Iterable[Run]) -> None:
    """Every run has one result that counts, its block is whole in the same sweep as those of the
    others, and nothing else is left. A block that restarts measures again what had ended."""
    sweeps: dict[str, set[str]] = {}
    for run in runs:
        finished = [record for record in user.records(run) if record.outcome in FINISHED]
        assert finished, f"{run.data.name}: {user.outcomes(run)}"
        if (sweep := finished[-1].block) is None:
            assert len(finished) == 1, f"{run.data.name}: {user.outcomes(run)}"
        else:
            assert [record.block for record in finished].count(sweep) == 1
            sweeps.setdefault(sweep.rpartition("-")[0], set()).add(sweep)
    assert all(len(found) == 1 for found in sweeps.values()), "one sweep measures a block"
    nothing_is_left(user)


def steps_of(user: User, run: Run) -> list[int]:
    """The step that each process of a run began at, as its result says."""
    return [part["start_step"] for part in user.records(run)[-1].provenance["segments"]]


def nothing_is_left(user: User) -> None:
    """No claim, no file of a run that is not measured any more, no half of a file."""
    left = [*user.store.glob("runs/*/.*"), *user.store.glob("claims/*")]
    assert [path for path in left if not path.name.startswith(".dead-")] == []


# Quick ones -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_told_to_restart_measures_a_block_anew_and_goes_on_with_training(slurm, stub):
    """`scontrol requeue` by hand, once each; what had ended is not measured again."""
    user, runs, train = User(slurm, stub), block("sleep 2"), quality("train 12")
    done = quality("sleep 0.1")
    user.submit([*runs, done, train], {"runs_per_job": 2})
    user.wait_until_begun(train, runs[1])
    time.sleep(1.5)  # a checkpoint
    for job in user.jobs:
        slurm.run("scontrol", "requeue", job)
    assert user.wait() == {"completed": 4}
    check(user, [*runs, done, train])
    assert user.outcomes(done) == ["completed"]
    assert user.outcomes(train) == ["preempted", "completed"]
    assert steps_of(user, train)[0] == 0 < steps_of(user, train)[1]
    # The first of the block had a result already: what is compared was measured in one sweep.
    assert user.outcomes(runs[1]) == ["preempted", "completed"]


# Jobs that are stopped --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_that_somebody_cancels_ends_for_good_and_no_other_with_it(slurm, stub):
    """By an admin: one task of an array that runs, one that waits; then by aerie cancel."""
    user = User(slurm, stub / "admin")
    first, running, waiting = block("sleep 2"), block("sleep 61"), block("sleep 62")
    user.submit([*first, *running, *waiting], {"max_parallel": 2})
    owner = User(slurm, stub / "owner")
    held = [*block("sleep 63"), quality("train 64"), *block("sleep 65")]
    owner.submit(held, {"max_parallel": 1})
    user.wait_until_begun(running[0])
    (job,) = user.jobs
    slurm.run("scancel", f"{job}_1", f"{job}_2")
    owner.wait_until_begun(held[0])
    assert owner.aerie("cancel", "--all").returncode == 0

    assert user.wait() == {"completed": 2, "cancelled": 4}
    check(user, first)
    assert [user.outcomes(run) for run in (*running, *waiting)] == [["cancelled"]] * 4
    bill = user.submit([*first, *running, *waiting], code=1)
    assert (bill["num_runs"], bill["given_up"]) == (0, {"cancelled": 4})

    assert owner.wait() == {"cancelled": len(held)}
    assert [owner.outcomes(run) for run in held] == [["cancelled"]] * len(held)
    nothing_is_left(owner)
    assert "nothing" in owner.aerie("cancel", "--all").stdout


@pytest.mark.slow
def test_a_node_that_fails_costs_an_attempt(slurm, stub):
    """Where Slurm starts the job again all is well by itself; else the next submit does it."""
    again, ended = User(slurm, stub / "requeued"), User(slurm, stub / "not")
    lost = {user: [*block("sleep 5"), quality("train 20")] for user in (again, ended)}
    for user, runs in lost.items():
        where = {"is_requeued": user is again, "sbatch": {"nodelist": "cpu2"}}
        user.submit(runs, where)
    again.wait_until_begun(lost[again][1], lost[again][2])
    ended.wait_until_begun(lost[ended][2])
    time.sleep(1.5)
    slurm.fail_node("cpu2")
    slurm.resume_node("cpu2")
    for user in lost:
        user.wait()
    for user, (_, _, train) in lost.items():
        assert "node_failure" in user.outcomes(train)
        if user is ended:
            assert user.submit(lost[user])["num_runs"] >= 1
            user.wait()
        assert user.outcomes(train) == ["node_failure", "completed"]
        assert steps_of(user, train)[-1] > 0, "it went on from its checkpoint"
        check(user, lost[user])
    assert again.outcomes(lost[again][1]) == ["node_failure", "completed"]


# Preemption -------------------------------------------------------------------------------------

WHOLE_NODE = {"partition": "gpu", "device_kinds": ["cpu"], "gres": "gpu:h100:4"}


@pytest.mark.slow
def test_a_preempted_job_goes_on_by_itself(own, stub):
    """With and without grace; where the site sends the signal we asked for, or TERM alone; with
    accounts and without."""
    require_slurm()
    sites = [(15, True, True), (15, False, False), (0, True, False), (0, False, True)]

    def preempted(site: tuple[int, bool, bool]) -> None:
        grace_s, sends, accounting = site
        slurm = own(grace_time=grace_s, preempt_send_user_signal=sends, accounting=accounting)
        user = User(slurm, stub / f"{grace_s}-{sends}")
        runs, train = block("sleep 4"), quality("train 15")
        user.submit([*runs, train], WHOLE_NODE | {"gres": "gpu:h100:2"})
        user.wait_until_begun(runs[1], train)
        time.sleep(1.5)
        urgent = slurm.submit("sleep 1", "--partition=gpu-urgent", "--gres=gpu:h100:4")
        assert user.wait(150) == {"completed": 3}, site
        assert slurm.state(urgent) == "COMPLETED"
        check(user, [*runs, train])
        assert user.outcomes(train) == ["preempted", "completed"], site
        assert steps_of(user, train)[1] > 0, site
        # What was measured when the warning came ended as preempted, or within the grace.
        assert user.outcomes(runs[1]) in (["preempted", "completed"], ["completed"]), site

    with ThreadPoolExecutor(len(sites)) as pool:
        list(pool.map(preempted, sites))


@pytest.mark.slow
def test_a_job_whose_preemption_is_its_end_goes_with_the_next_submit(own, stub):
    """PreemptMode=CANCEL, of jobs that may start again and of those that may not; on a site with
    JobRequeue=0."""
    require_slurm()
    slurm = own(accounting=True, grace_time=0, requeue=False)
    users = {may: User(slurm, stub / str(may)) for may in (True, False)}
    runs, train = block("sleep 6"), quality("train 25")  # one at least goes on once both have begun
    where = WHOLE_NODE | {"partition": "gpu-cancel", "gres": "gpu:2"}

    def begins(may: bool) -> None:
        users[may].submit([*runs, train], where | {"is_requeued": may})
        users[may].wait_until_begun(runs[1], train)

    with ThreadPoolExecutor(len(users)) as pool:
        list(pool.map(begins, users))
    time.sleep(1.5)
    for kind in ("h100", "a100"):
        slurm.submit("sleep 1", "--partition=gpu-urgent", f"--gres=gpu:{kind}:4")
    for may, user in users.items():
        user.wait()
        if not may:
            assert user.outcomes(train) == ["preempted"]
        if "completed" not in user.outcomes(train):
            user.submit([*runs, train], where)
            user.wait()
        assert user.outcomes(train) == ["preempted", "completed"]
        assert steps_of(user, train)[1] > 0
        check(user, [*runs, train])


# Time -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_time_limit_is_the_fault_of_runs_that_had_the_time(slurm, stub):
    """Slurm counts whole minutes, looks every 30 s, and may warn as much too early."""
    short = {"time": 1, "stop_warning_s": 20}
    alone, trained, late = (User(slurm, stub / name) for name in ("alone", "trained", "late"))
    long, train = timing("sleep 200"), quality("train 70")
    alone.submit([long], short)
    trained.submit([train], short)
    before, after = timing("sleep 45"), timing("sleep 60")
    late.submit([before, after], {"time": 2, "stop_warning_s": 20, "runs_per_job": 2})
    assert len(late.jobs) == 1

    alone.wait(300)
    assert alone.outcomes(long) == ["timed_out"] * 2, "once again, then given up"
    nothing_is_left(alone)
    assert alone.submit([long], short, code=1)["given_up"] == {"timed_out": 1}

    assert trained.wait(300) == {"completed": 1}
    check(trained, [train])
    outcomes = trained.outcomes(train)
    assert outcomes == ["preempted"] * (len(outcomes) - 1) + ["completed"]
    assert len(outcomes) > 1
    assert steps_of(trained, train) == sorted(set(steps_of(trained, train)))

    assert late.wait(300) == {"completed": 2}
    check(late, [before, after])
    assert late.outcomes(before) == ["completed"]
    assert late.outcomes(after) == ["preempted", "completed"], "it began late: not its fault"


# Memory -----------------------------------------------------------------------------------------


@pytest.fixture
def slurm_with_memory(own):
    require_slurm()
    # Names of its own: another cluster of this machine may hold those of the default nodes.
    slurm = own(
        accounting=True,
        proctrack="auto",
        nodes=(Node("memory1"), Node("memory2")),
        partitions=(Partition("cpu", "memory[1-2]", options="Default=YES"),),
    )
    if not slurm.has_memory_limits:
        pytest.skip("no cgroup v1 that can be written, or not root: no memory limits")
    return slurm


@pytest.mark.slow
def test_memory_that_is_used_up_ends_a_run_and_not_its_neighbors(slurm_with_memory, stub):
    """The kernel kills the child, and the worker goes on; or the worker, and its job is over."""
    child, whole = (User(slurm_with_memory, stub / name) for name in ("child", "whole"))
    runs = [timing("hog"), timing("sleep 0.1"), quality("sleep 0.2"), quality("hog")]
    child.submit(runs, {"runs_per_job": 4})
    worker = [quality("sleep 0.3"), quality("hog_for_parent"), quality("sleep 0.4")]
    whole.submit(worker, {"runs_per_job": 3})
    child.wait()
    whole.wait()

    ends = [["out_of_memory"], ["completed"], ["completed"], ["out_of_memory"]]
    assert [child.outcomes(run) for run in runs] == ends
    check(child, runs)

    assert [whole.outcomes(run) for run in worker] == [["completed"], ["out_of_memory"], []]
    nothing_is_left(whole)
    assert whole.submit(worker)["num_runs"] == 1, "what had not begun is still to be run"
    whole.wait()
    check(whole, worker)


# Jobs that do not start -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_that_cannot_begin_leaves_one_failure_for_each_of_its_runs(slurm, stub):
    said = {"setup": "no such module", "python": "No such file or directory"}
    faults = {
        "setup": {"setup": ["echo no such module >&2; exit 3"]},
        "python": {"python": {"worker": "/nowhere/python"}},
    }
    runs = [*block("sleep 0.1"), quality("sleep 0.1")]
    users = {name: User(slurm, stub / name) for name in faults}
    for name, user in users.items():
        user.submit(runs, faults[name])
    for name, user in users.items():
        assert user.wait() == {"failed": 3}
        for run in runs:
            (record,) = user.records(run)
            assert said[name] in record.reason
        nothing_is_left(user)
        assert user.submit(runs, code=1)["given_up"] == {"failed": 3}
        assert user.aerie("retry", "--reason", "failed").returncode == 0, "as it was: fails again"
        user.wait()
        assert [user.outcomes(run) for run in runs] == [["failed"] * 2] * 3


# Slurm that is not there ------------------------------------------------------------------------


@pytest.mark.slow
def test_while_the_controller_is_down_nothing_is_concluded(own, stub):
    """It is killed and restarted in the middle; jobs run on, and some end meanwhile."""
    require_slurm()

    def survives(accounting: bool) -> None:
        slurm = own(accounting=accounting)
        user = User(slurm, stub / str(accounting))
        runs, train = block("sleep 4"), quality("train 80")
        user.submit([*runs, train])
        user.wait_until_begun(runs[0], train)
        slurm.wait_for_saved_state()
        slurm.kill_daemon("slurmctld")

        request = {"runs": [asdict(timing("sleep 1"))], "clusters": [cluster()]}
        with ThreadPoolExecutor(2) as pool:
            submit = [sys.executable, str(USER), str(user.store), "submit"]
            asked = [
                pool.submit(user.call, submit, request),
                pool.submit(user.aerie, "cancel", "--all"),
            ]
            before = user.status()
        assert "Unable to contact slurm controller" in before["silent"]
        assert sum(before["submissions"][0]["runs"].values()) == 3, "as it was seen last"
        for one in asked:
            assert (one.result().returncode, one.result().stdout) == (2, "")
            assert len(one.result().stderr.splitlines()) == 1
            assert "Unable to contact slurm controller" in one.result().stderr
        assert user.status()["silent"], "much later than lost_after_s and view_s: it takes 20 s"
        assert user.outcomes(train) == []
        slurm.wait_for(lambda: user.outcomes(runs[1]), WAIT_S, "a block ends meanwhile")

        slurm.start_daemon("slurmctld")
        assert user.wait() == {"completed": 3}
        check(user, [*runs, train])
        assert [user.outcomes(run) for run in (*runs, train)] == [["completed"]] * 3
        assert len(submission.read(user.store)) == 1

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(survives, (True, False)))


@pytest.mark.slow
def test_without_accounts_ends_are_known_from_the_queue_alone(slurm_without_accounting, stub):
    """Of a node that fails, a job that is cancelled, one that fails, and one that ends well."""
    slurm = slurm_without_accounting
    train, held, short = quality("train 25"), quality("sleep 61"), quality("sleep 0.1")
    asked = {
        "node": ([train], {"sbatch": {"nodelist": "cpu2"}}),
        "cancelled": ([held, quality("sleep 62")], {"max_parallel": 1}),
        "failed": ([short], {"setup": ["exit 3"]}),
        "killed": ([short, quality("kill_worker")], {"runs_per_job": 2}),
    }
    users = {name: User(slurm, stub / name) for name in asked}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: users[name].submit(*asked[name]), asked))
    users["node"].wait_until_begun(train)
    users["cancelled"].wait_until_begun(held)
    time.sleep(1.5)
    slurm.fail_node("cpu2")
    slurm.resume_node("cpu2")
    slurm.run("scancel", *users["cancelled"].jobs)
    with ThreadPoolExecutor(2) as pool:
        ends = dict(zip(users, pool.map(User.wait, users.values()), strict=True))

    assert ends["node"] == {"completed": 1}
    check(users["node"], [train])
    # The queue has forgotten why its start before this one ended: it was started again.
    assert users["node"].outcomes(train) == ["preempted", "completed"]
    assert ends["cancelled"] == {"cancelled": 2}
    assert ends["failed"] == {"failed": 1}
    assert ends["killed"] == {"completed": 1, "failed": 1}
    for user in users.values():
        nothing_is_left(user)


# Submitters -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_submitters_that_are_killed_or_at_once_submit_each_run_once(slurm, stub):
    runs = [*block("sleep 1", rounds=2), quality("sleep 1"), quality("train 3")]
    users = {name: User(slurm, stub / name) for name in ("before", "after", "both")}
    for name in ("before", "after"):
        users[name].submit(runs, die=f"{name} sbatch", code=-9)
        assert not users[name].jobs
    time.sleep(cluster()["lost_after_s"] + 1)  # until no sbatch can talk any more
    assert users["before"].submit(runs)["num_runs"] == len(runs)
    bill = users["after"].submit(runs)  # finds the job by its name
    assert bill["num_current"] + bill["num_finished"] >= 4
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: users["both"].submit(runs), range(2)))
    assert len(submission.read(users["both"].store)) == 2
    for user in users.values():
        user.wait()
        user.submit(runs)
        user.wait()
        check(user, runs)
        assert [user.outcomes(run) for run in runs] == [["completed"]] * len(runs), user.store
    assert users["after"].jobs, "adopted"


@pytest.mark.slow
def test_an_answer_of_sbatch_that_is_lost_loses_no_job(slurm, stub, tmp_path):
    """Slurm took the array, and its answer did not arrive in time."""
    user, runs = User(slurm, stub), [quality("sleep 0.1"), quality("train 2")]
    shims = SlurmShims(tmp_path / "shims", slurm.environment["PATH"])
    said = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    shims.answers("sbatch", Answer(is_silent=True, stderr=f"{said}\n", returncode=1))
    with mock.patch.dict(os.environ, {"PATH": shims.path}):
        assert user.submit(runs, code=1)["refused"] == [said]
    shims.answers("sbatch", Answer())
    assert user.submit(runs)["num_runs"] == 0, "the job was found by its name"
    assert user.wait() == {"completed": 2}
    check(user, runs)


@pytest.mark.slow
def test_what_exceeds_limits_is_left_for_the_next_submit(own, stub):
    slurm = own(max_array_size=4)
    user = User(slurm, stub)
    runs = [quality(f"sleep {0.1 * number:.1f}") for number in range(1, 9)]
    bill = user.submit(runs, {"max_submit": 6, "runs_per_job": 1})
    assert sum(array["num_jobs"] for array in bill["arrays"]) <= 6
    assert all(array["num_jobs"] <= 4 for array in bill["arrays"])
    assert bill["num_runs"] + bill["num_left"] == len(runs)
    user.wait()
    while sum(len(user.outcomes(run)) for run in runs) < len(runs):
        assert user.submit([])["num_runs"], "without being asked for"
        user.wait()
    check(user, runs)
    assert [user.outcomes(run) for run in runs] == [["completed"]] * len(runs)


# Devices ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_points_of_one_experiment_go_where_their_devices_are(slurm, stub):
    user, side = User(slurm, stub), {"runs_in_parallel": 4, "runs_per_job": 4, "num_devices": 4}
    kinds = {
        "cpu": [quality("sleep 1", device_kind="cpu", seed=seed) for seed in range(2)],
        "gpu": [quality("sleep 4", device_kind="h100", seed=seed) for seed in range(4)],
        "tpu": [quality("sleep 4", device_kind="v5e", seed=seed) for seed in range(4)],
    }
    nowhere = quality("sleep 1", device_kind="v5e", backend="torch")
    clusters = [
        {"name": "cpu"},
        {"name": "gpu", "partition": "gpu", "device_kinds": ["h100"], "gres": "gpu:h100:4"} | side,
        {"name": "tpu", "partition": "tpu", "device_kinds": ["v5e"], "gres": "tpu:4"} | side,
    ]
    runs = [run for members in kinds.values() for run in members]
    bill = user.submit([*runs, nowhere], *clusters)
    assert [array["cluster"] for array in bill["arrays"]] == ["cpu", "gpu", "tpu"]
    assert bill["num_unsupported"] == 1
    assert user.outcomes(nowhere) == ["unsupported"]
    user.wait()
    check(user, runs)
    for partition, members in kinds.items():
        seen = [json.loads(said_by(user, run).splitlines()[0]) for run in members]
        assert {one["SLURM_JOB_PARTITION"] for one in seen} == {partition}
        if partition != "cpu":
            name = {"gpu": "CUDA_VISIBLE_DEVICES", "tpu": "TPU_VISIBLE_CHIPS"}[partition]
            assert sorted(one[name] for one in seen) == ["0", "1", "2", "3"]
            began = [one["at"] for one in seen]
            assert max(began) - min(began) < 4, "side by side"


def said_by(user: User, run: Run) -> str:
    (log,) = (user.store / "runs" / run.run_id).glob("*.log")
    return log.read_text()


# The results folder -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_record_that_is_seen_late_is_never_replaced(slurm, stub):
    """As on NFS: a job has ended, and what it wrote last is not there yet."""
    user, run = User(slurm, stub), quality("kill_worker")
    user.submit([run], {"view_s": 20.0})  # looks of a loaded machine take seconds each
    (job,) = user.jobs
    slurm.wait_for_state(f"{job}_0", "FAILED", seconds=WAIT_S)
    user.status()
    ended = time.monotonic()
    (path,) = (stub / "runs" / run.run_id).glob(".task-*.json")
    task = Task.from_json(json.loads(path.read_text()))
    while time.monotonic() < ended + 5:
        assert user.status()["submissions"], "it waits for what may still come"
        assert user.outcomes(run) == []
    late = task.record("completed", provenance={}, started_at=utc_now(), seconds=1.0)
    write(stub, late)
    assert user.wait() == {"completed": 1}
    reconcile._write(stub, task, "node_failure", "of somebody who did not see it")
    assert user.outcomes(run) == ["completed"]
    path.unlink(missing_ok=True)
    nothing_is_left(user)


@pytest.mark.slow
def test_a_job_thought_lost_still_hands_in_its_results(slurm, stub, tmp_path):
    user, runs = User(slurm, stub), [quality("sleep 4"), quality("sleep 0.1")]
    user.submit(runs, {"runs_per_job": 2})
    user.wait_until_begun(runs[0])
    (beat,) = stub.glob("submissions/*/beats/[!.]*.json")
    worker = json.loads(beat.read_text())["pid"]
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    frozen = [worker, *map(int, children)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        shims = SlurmShims(tmp_path / "shims", slurm.environment["PATH"])
        said = "slurm_load_jobs error: Invalid job id specified\n"
        shims.answers("squeue", Answer(stdout="", stderr=said, returncode=1))
        shims.answers("sacct", NO_ACCOUNTING)
        with mock.patch.dict(os.environ, {"PATH": shims.path}):
            assert user.wait() == {"node_failure": 1, "left": 1}
        (record,) = user.records(runs[0])
        assert record.outcome == "node_failure"
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    slurm.wait_for(lambda: all(map(user.outcomes, runs)), WAIT_S, "the results come")
    slurm.wait_for(lambda: not slurm.run("squeue", "-h"), WAIT_S)
    assert [user.outcomes(run) for run in runs] == [["completed"]] * 2
    assert user.submit(runs)["num_runs"] == 0
    check(user, runs)


@pytest.fixture
def small_disk(stub):
    stub.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(stub)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield stub
    subprocess.run(["umount", "--lazy", str(stub)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_no_result(slurm, small_disk):
    user = User(slurm, small_disk)
    runs = [quality("sleep 2"), quality("train 3"), quality("sleep 0.1"), *block("sleep 1")]
    user.submit(runs, {"runs_per_job": 3})
    user.wait_until_begun(runs[0], runs[3])
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    time.sleep(6)
    assert not any(user.outcomes(run) for run in runs)
    assert user.aerie("status").returncode == 0
    ballast.unlink()
    assert user.wait() == {"completed": 5}
    check(user, runs)
    assert [user.outcomes(run) for run in runs] == [["completed"]] * 5


def as_user(uid: int) -> tuple[str, ...]:
    """Before a command: as another user of one group, who can read all, for Python may lie in a
    home, and write only what is theirs or the group's."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("not root, or no setpriv: nobody else to be")
    reads_all = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
    who = [f"--reuid={uid}", f"--regid={GROUP}", "--clear-groups"]
    return ("setpriv", *who, *reads_all, "sh", "-c", 'umask 002; exec "$@"', "sh")


GROUP = 65534


@pytest.fixture
def open_folder(stub):
    """The place of a store, below folders that everybody may enter."""
    for folder in stub.parents:
        if folder.name.startswith(("test_", "popen-", "pytest-")):  # those that pytest has made
            folder.chmod(folder.stat().st_mode | 0o011)
    stub.mkdir(mode=0o755)
    return stub


def test_a_folder_that_cannot_be_written_is_one_line_and_2(slurm, open_folder):
    user = User(slurm, open_folder, as_user(65534))
    request = {"runs": [asdict(quality("sleep 1"))], "clusters": [cluster()]}
    done = user.call([sys.executable, str(USER), str(open_folder), "submit"], request)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"aerie: --results {open_folder} cannot be written.\n"
    assert not list(open_folder.iterdir())
    assert not slurm.run("squeue", "-h")


@pytest.mark.slow
def test_users_share_a_results_folder(slurm, open_folder):
    """Of one group, with a setgid folder. Their jobs run here: a node may not let them in."""
    os.chown(open_folder, 0, GROUP)
    open_folder.chmod(0o2775)
    users = [User(slurm, open_folder, as_user(uid)) for uid in (65534, 65533)]
    common = [*block("sleep 1"), quality("train 2")]
    sets = [[*common, quality("sleep 0.1", seed=seed)] for seed in range(2)]
    here = {"executor": "local", "partition": None, "mem": None}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda user, runs: user.submit(runs, here), users, sets))
    runs = list({run.run_id: run for run in (*sets[0], *sets[1])}.values())
    for user in users:
        user.wait()
    assert [users[0].outcomes(run) for run in runs] == [["completed"]] * len(runs)
    check(users[0], runs)
    owners = {path.stat().st_uid for path in open_folder.glob("runs/*/[!.]*.json")}
    assert owners == {65534, 65533}
