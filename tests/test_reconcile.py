"""What is settled, and what stays open: other machines, silence, and jobs that are not ours."""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from stub_suite import stub_run

from suites import jobs
from suites.harness import claims, launch, plan, provenance, reconcile, slurm, submission
from suites.harness.cluster import Cluster
from suites.harness.execute import Task, began, new_attempt
from suites.harness.pack import Job
from suites.harness.record import read_all, record_path, write_atomically
from suites.harness.run import Run
from suites.harness.slurm import Seen, Unreachable
from suites.harness.submission import Submission

CLUSTERS = {
    name: Cluster(name=name, executor=name, lost_after_s=0.01, view_s=0.0)
    for name in ("local", "slurm")
}


class Scheduler:
    """Stands in for both launchers: what it is asked, it answers."""

    def __init__(self) -> None:
        self.jobs: dict[str, Seen] = {}
        self.find: Callable[[Submission, int], str | None] = lambda made, array: None
        self.is_silent = False
        self.cancelled: list[str] = []

    def poll(self, job_ids: Iterable[str]) -> dict[str, Seen]:
        if self.is_silent:
            raise Unreachable("no answer")
        return dict(self.jobs)

    def cancel(self, job_ids: Iterable[str]) -> None:
        self.cancelled += job_ids


@pytest.fixture
def schedulers(monkeypatch) -> dict[str, Scheduler]:
    found = {name: Scheduler() for name in CLUSTERS}
    monkeypatch.setattr(launch, "launcher", found.get)
    return found


def submit(store: Path, *executors: str, job_id: str | None = "7@x") -> Submission:
    """An intent of an array of one job for each of these, with its number where it has one."""
    packed = []
    for number, name in enumerate(executors):
        (item,) = plan.plan(store, [stub_run("done", seed=number)])
        packed.append((CLUSTERS[name], [[Job([item])]]))
    made = submission.intend(
        store, title="stub", command="a test", snapshot=store, packed=packed, left=[]
    )
    for array in made.arrays:
        if job_id is not None:
            made.remember_job_id(array.number, job_id)
    return made


def states_of(store: Path) -> list[str]:
    return [str(job.state) for job in reconcile.reconcile(store).jobs]


def test_processes_of_another_machine_are_not_lost(stub, schedulers, monkeypatch, capsys):
    made = submit(stub, "local")
    here = provenance.node()
    monkeypatch.setattr(provenance, "node", lambda: "elsewhere")
    assert states_of(stub) == ["queued"]
    assert jobs.cancel(stub, [made.id]) == 1
    said = capsys.readouterr()
    assert said.out == "cancelled: nothing.\n"
    assert f"{made.id} runs on {here}; cancel it there." in said.err
    monkeypatch.setattr(provenance, "node", lambda: here)
    assert states_of(stub) == []


def test_the_last_word_of_another_machine_counts(stub, schedulers, monkeypatch):
    made = submit(stub, "local")
    made.beat_path(0, 0).parent.mkdir()
    made.beat_path(0, 0).write_text('{"at": 0, "ended_at": "now"}')
    monkeypatch.setattr(provenance, "node", lambda: "elsewhere")
    assert states_of(stub) == []


def test_a_scheduler_that_is_silent_leaves_the_other_alone(stub, schedulers):
    both, local, asked = submit(stub, "slurm", "local"), submit(stub, "local"), []
    schedulers["slurm"].is_silent = True
    view = reconcile.reconcile(stub)
    assert [(job.made.id, job.array) for job in view.jobs] == [(both.id, 0)]
    assert view.silent == "no answer"
    assert local.memory()["is_settled"]

    lost = submit(stub, "slurm", "local", job_id=None)

    def find(made: Submission, array: int) -> None:
        asked.append(made.id)
        raise Unreachable("no answer")

    schedulers["slurm"].find = find
    schedulers["local"].find = lambda made, array: "8@x"
    reconcile.reconcile(stub)
    assert (asked, lost.job_id(0), lost.job_id(1)) == ([lost.id], None, "8@x")


def test_a_job_that_cannot_be_closed_stays_open_and_the_next_is_settled(stub, schedulers):
    bad, good = submit(stub, "local"), submit(stub, "local")
    path = bad.folder / "jobs" / "0_0.json"
    path.rename(path.with_suffix(".away"))  # it cannot be read
    view = reconcile.reconcile(stub)
    assert [job.made.id for job in view.jobs] == [bad.id]
    (line,) = view.troubles
    assert line.startswith(f"{bad.id}: job 0_0 cannot be closed: ")
    assert good.memory()["is_settled"]
    path.with_suffix(".away").rename(path)
    view = reconcile.reconcile(stub)
    assert (view.jobs, view.troubles) == ([], [])


def test_an_array_that_is_found_and_cannot_be_written_down_stops_no_look(
    stub, schedulers, monkeypatch
):
    lost, other = submit(stub, "slurm", job_id=None), submit(stub, "local")
    schedulers["slurm"].find = lambda made, array: "9"
    running = Seen(state="RUNNING", is_in_queue=True, name=lost.job_name(0))
    schedulers["slurm"].jobs = {"9_0": running}

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(submission, "write_atomically", full)
        (job,) = reconcile.reconcile(stub).jobs
    assert (job.made.id, job.state) == (lost.id, "running")
    submission._load.cache_clear()  # as in another command
    reconcile.reconcile(stub)
    assert other.memory()["is_settled"]
    assert lost.answer(0)["job_id"] == "9"


def test_an_array_that_was_refused_is_looked_for_until_that_is_settled(stub, schedulers):
    made, asked = submit(stub, "slurm", "slurm", job_id=None), []
    made.remember_refusal(0, LIMIT)
    made.remember_job_id(1, "9")
    running = Seen(state="RUNNING", is_in_queue=True, name=made.job_name(1))
    schedulers["slurm"].jobs = {"9_0": running}
    schedulers["slurm"].find = lambda made, array: asked.append(array)
    for _ in range(3):
        assert states_of(stub) == ["running"]
    assert asked == [0]


WAIT_S = 100.0
TIMEOUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
LIMIT = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy"


def test_an_array_whose_sbatch_may_still_talk_is_waited_for(stub, schedulers, monkeypatch):
    """Its submitter is dead, or was told nothing; on another machine it may be alive."""
    now = time.time()
    monkeypatch.setitem(CLUSTERS, "slurm", replace(CLUSTERS["slurm"], lost_after_s=WAIT_S))
    killed, slow, refused = (submit(stub, "slurm", "slurm", job_id=None) for _ in range(3))
    slow.remember_refusal(0, TIMEOUT)
    slow.remember_refusal(1, TIMEOUT)
    refused.remember_refusal(0, LIMIT)
    refused.remember_refusal(1, LIMIT)
    monkeypatch.setattr(claims, "is_alive", lambda owner: False)

    def open_ones(seconds: float) -> set[str]:
        monkeypatch.setattr(time, "time", lambda: now + seconds)
        return {job.made.id for job in reconcile.reconcile(stub).jobs}

    assert open_ones(WAIT_S - 5) == {killed.id, slow.id}
    assert refused.memory()["is_settled"]
    schedulers["slurm"].find = lambda made, array: "9" if (made.id, array) == (slow.id, 1) else None
    assert open_ones(WAIT_S + 5) == {slow.id}
    assert (slow.job_id(0), slow.job_id(1)) == (None, "9")
    with pytest.raises(launch.Refused, match="given up by a later command"):
        launch.Slurm().submit(killed, 0)


def test_an_intent_of_another_machine_counts_from_its_last_sign_of_life(
    stub, schedulers, monkeypatch
):
    made = submit(stub, "slurm", "slurm", job_id=None)
    old = datetime.now(UTC) - timedelta(seconds=2 * reconcile.ORPHAN_S)
    monkeypatch.setattr(Submission, "created_s", old.timestamp())
    made.remember_job_id(0, "9")  # just now: it submits array after array
    monkeypatch.setattr(provenance, "node", lambda: "elsewhere")
    assert states_of(stub) == ["queued", "planned"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + reconcile.ORPHAN_S + 5)
    assert states_of(stub) == []


def test_a_local_array_of_a_dead_submitter_was_never_submitted(stub, schedulers, monkeypatch):
    submit(stub, "local", job_id=None)
    assert states_of(stub) == ["planned"]
    monkeypatch.setattr(claims, "is_alive", lambda owner: False)
    assert states_of(stub) == []


def begin(store: Path, run: Run, **owner) -> Path:
    """An attempt as a killed worker leaves it: with no record."""
    task = Task(run=run, build="a.b", attempt=new_attempt(), parent_pid=0,
                owner=claims.ourselves() | owner)  # fmt: skip
    path = record_path(store, run.run_id, f".task-{task.attempt}")
    write_atomically(path, json.dumps(task.to_json()))
    return path


def test_a_job_asks_for_its_earlier_end_only_where_it_left_something(stub, monkeypatch):
    runs, asked = [stub_run("done", seed=seed) for seed in range(2)], []

    def earlier_end(job_id: str) -> Seen:
        asked.append(job_id)
        return Seen(state="TIMEOUT", is_in_queue=False)

    monkeypatch.setattr(slurm, "earlier_end", earlier_end)
    monkeypatch.setattr(provenance, "job_id", lambda: "7_0")
    monkeypatch.setattr(provenance, "num_restarts", lambda: 1)
    dead = begin(stub, runs[0], restart=1, started="another boot")
    begin(stub, runs[0], restart=1)  # alive
    reconcile.close_our_own(stub, [run.run_id for run in runs])
    assert (asked, dead.exists()) == ([], False)
    begin(stub, runs[1], restart=0)
    reconcile.close_our_own(stub, [run.run_id for run in runs])
    assert asked == ["7_0"]
    ends = {record.run_id: record.outcome for record in read_all(stub)}
    assert ends == {runs[0].run_id: "node_failure", runs[1].run_id: "timed_out"}


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("slurmstepd-n1: error: Detected 1 oom-kill event(s) in StepId=7.0.", "out_of_memory"),
        ("no oom-kill event", "failed"),
    ],
)
def test_a_job_whose_step_ran_out_of_memory_did_so_too(stub, schedulers, said, outcome):
    """The queue calls it FAILED, and without accounts nobody else is to be asked."""
    made = submit(stub, "slurm", job_id="7")
    (item,) = made.runs(0, 0)
    begin(stub, item.run, job="7_0")
    ended = Seen(state="FAILED", is_in_queue=False, exit_code=1, name=made.job_name(0))
    schedulers["slurm"].jobs = {"7_0": ended}
    log = launch.log_of(made, 0, 0)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"{said}\nsrun: error: n1: task 0: Out Of Memory\n")
    made.beat_path(0, 0).parent.mkdir()
    made.beat_path(0, 0).write_text(json.dumps({"at": 0, "ended_at": 0}))
    assert not states_of(stub)
    (record,) = read_all(stub)
    assert record.outcome == outcome, record.reason


def test_a_job_of_our_number_and_another_name_is_not_ours(stub, schedulers):
    """Of another cluster on the same file system, or of one that was set up anew."""
    made = submit(stub, "slurm", job_id="7")
    running = Seen(state="RUNNING", is_in_queue=True, name=made.job_name(0))
    schedulers["slurm"].jobs = {"7_0": running}
    assert states_of(stub) == ["running"]
    schedulers["slurm"].jobs = {"7_0": replace(running, state="FAILED", is_in_queue=False)}
    foreign = replace(schedulers["slurm"].jobs["7_0"], name="theirs")
    schedulers["slurm"].jobs = {"7_0": foreign}
    assert states_of(stub) == ["stopping"]
    made.beat_path(0, 0).parent.mkdir()
    made.beat_path(0, 0).write_text(json.dumps({"at": time.time() + 60}))  # it lives
    assert states_of(stub) == ["running"]
    assert not list(read_all(stub))


def test_a_killed_attempt_has_its_own_time_and_the_end_of_its_own_job(stub, schedulers):
    made = submit(stub, "slurm", job_id="7")
    (item,) = made.runs(0, 0)
    phase = {"phase": "measure", "times": {"init": 2.0}}
    for job in ("7_0", None):  # of this job, and of a process that died here before
        task = begin(stub, item.run, job=job, pid=2**22 + 1)
        path = task.with_name(task.name.replace(".task-", ".phase-"))
        path.write_text(json.dumps(phase))
        os.utime(path, 2 * (time.time() + 10,))
    end = Seen(state="TIMEOUT", is_in_queue=False, name=made.job_name(0))
    schedulers["slurm"].jobs = {"7_0": end}
    assert states_of(stub) == []
    ours, other = read_all(stub)
    assert (ours.outcome, other.outcome) == ("timed_out", "node_failure")
    for record in (ours, other):
        assert record.seconds == pytest.approx(10, abs=3)
        assert sum(record.times.values()) == pytest.approx(record.seconds)
        assert record.times["init"] == 2.0
        assert began(record.attempt).isoformat(timespec="seconds") == record.started_at


def change_owner(store: Path, name: str, **owner) -> None:
    path = store / "claims" / name / "owner.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | owner))


def claimed(store: Path) -> list[str]:
    reconcile.reconcile(store)
    return sorted(path.name for path in (store / "claims").glob("[!.]*"))


def test_claims_of_a_command_that_was_killed_are_given_back_by_who_knows(stub, monkeypatch):
    """Where it ran: a job on a node cannot know, and would be started again for ever."""
    for name in ("alive", "dead", "block-dead"):
        claims.claim(stub, name)
    for name in ("dead", "block-dead"):
        change_owner(stub, name, started="another boot")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(provenance, "node", lambda: "elsewhere")
        assert claimed(stub) == ["alive", "block-dead", "dead"]
    assert claimed(stub) == ["alive"]


def test_claims_of_a_job_that_was_the_users_own_end_with_it(stub, schedulers, monkeypatch):
    """`aerie run` in salloc. A job of a submission is for its own end to settle."""
    now, submitted = time.time(), submit(stub, "slurm", job_id="7")
    for name, job in (("a", "77"), ("b", "78"), ("c", "7_0")):
        claims.claim(stub, name)
        change_owner(stub, name, job=job)
    running = Seen(state="RUNNING", is_in_queue=True)
    ours = replace(running, name=submitted.job_name(0))
    schedulers["slurm"].jobs = {"7_0": ours, "77": running, "78": running}
    assert claimed(stub) == ["a", "b", "c"]
    ended = Seen(state="COMPLETED", is_in_queue=False)
    schedulers["slurm"].jobs = {"7_0": ours, "77": ended}
    assert claimed(stub) == ["b", "c"]
    schedulers["slurm"].is_silent = True
    monkeypatch.setattr(time, "time", lambda: now + 2 * reconcile.ORPHAN_S)
    assert claimed(stub) == ["b", "c"]  # that time does not count
    schedulers["slurm"].is_silent = False
    assert claimed(stub) == ["b", "c"]
    monkeypatch.setattr(time, "time", lambda: now + 3 * reconcile.ORPHAN_S + 1)
    assert claimed(stub) == ["c"]
