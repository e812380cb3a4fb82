"""Adaptive rounds: a block ends where its intervals are as narrow as asked, and whoever looks at
its records, before and after, finds the same."""

import json
import os
from dataclasses import replace

import pytest
from stub_suite import stub_run

from analysis import statistics
from suites import commands, compose, jobs, watching
from suites.harness import plan, provenance, reconcile, rounds, submission, sweep, worker
from suites.harness.cluster import Cluster
from suites.harness.execute import Task
from suites.harness.executors import Ended
from suites.harness.measure import sample
from suites.harness.pack import Job
from suites.harness.record import read_all, write
from suites.harness.rounds import Point
from suites.harness.sweep import Stop

pytestmark = pytest.mark.usefixtures("_without_fsync", "_looks")
FIRST_LOOK = statistics.FIRST_LOOK
NOISE = (1.0, -0.5, 0.2, -1.0, 0.5, -0.2)
HERE = Cluster(name="here", executor="local")
FACTS = {"versions": provenance.versions(), "device_name": provenance.cpu_model()}


@pytest.fixture
def _without_fsync(monkeypatch):
    """Hundreds of records: what a power cut would leave of them is asked elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def _looks(monkeypatch):
    """When intervals are looked at is asked of statistics: here after 8, 12, 16, ... rounds."""
    monkeypatch.setattr(statistics, "FIRST_LOOK", 8)
    monkeypatch.setattr(statistics, "LOOK_EVERY", 4)


class Instant:
    """An executor whose runs end at once: with a step time in ms, or with an outcome."""

    def __init__(self, store, says):
        self.store, self.says = store, says

    def submit(self, task, slot=0):
        made = Task.from_json(json.loads(task.read_text()))
        end = self.says(made.run)
        outcome, samples = (end, ()) if isinstance(end, str) else ("completed", timed(end))
        write(self.store, made.record(outcome, provenance=FACTS, samples=samples,
                                      started_at="", seconds=1.0))  # fmt: skip
        return task.name

    def poll(self, handle):
        return Ended(0)

    def wait(self, seconds):
        pass

    def logs(self, handle):
        return ""


def timed(value):
    return (sample("step_time_ms", value, repeat=0), sample("mfu", 0.5, repeat=0))


def uneven(run):
    """Intervals of 2.2% after 8 rounds, 1.6% after 12, 1.4% after 16."""
    return 1.0 if run.backend == "jax" else 2.0 + 0.036 * NOISE[run.round % 6]


def planned(store, until=0.02, *, most=20, sides=("jax", "torch"), families=("hawk",)):
    runs = [
        stub_run(backend=side, family=family, round=number)
        for number in range(most)
        for side in sides
        for family in families
    ]
    return rounds.settle(store, plan.plan(store, runs), {"stub": until})


def measured(store, items, says=uneven, **options):
    """What a sweep over all that is to be done has found."""
    todo = commands.todo(items)
    return sweep.sweep(store, todo, HERE, executor=Instant(store, says), **options)


def left(items):
    return sorted({item.run.round for item in items if item.is_pending})


def reasons(items):
    return {item.run.round: item.reason for item in items if item.is_needless}


def test_a_block_ends_where_its_interval_is_as_narrow_as_asked(stub):
    before = planned(stub)
    found = measured(stub, before)
    why = "not needed: settled after 12 rounds"
    assert found.num_started == 24
    assert set(found.not_needed.values()) == {why}
    assert len(found.not_needed) == 16
    assert not found.is_interrupted
    again = planned(stub)
    assert left(again) == []
    assert reasons(again) == dict.fromkeys(range(12, 20), why)
    assert {i.run.run_id for i in again if i.is_needless} == found.not_needed.keys()
    assert measured(stub, again).num_started == 0
    assert measured(stub, before).num_started == 0  # by whoever had planned the same
    assert commands.exit_code(again, sweep.Result()) == 0


def test_what_never_settles_uses_all_rounds(stub):
    found = measured(stub, planned(stub, 0.01))
    assert (found.num_started, found.not_needed) == (40, {})
    assert left(planned(stub, 0.01)) == []
    assert reasons(planned(stub, 0.01)) == {}
    assert rounds.num_unsettled(stub, planned(stub, 0.01)) == 1
    assert rounds.num_unsettled(stub, planned(stub, 0.02)) == 0


def test_a_wider_interval_later_needs_nothing_and_a_narrower_one_goes_on(stub):
    """In a sweep of its own: each round is paired within its sweep, and all of them count."""
    measured(stub, planned(stub))
    assert left(planned(stub, 0.03)) == []
    assert set(reasons(planned(stub, 0.03)).values()) == {"not needed: settled after 8 rounds"}
    assert left(planned(stub, 0.015)) == list(range(12, 20))
    assert measured(stub, planned(stub, 0.015)).num_started == 8
    assert left(planned(stub, 0.015)) == []
    assert set(reasons(planned(stub, 0.015)).values()) == {"not needed: settled after 16 rounds"}
    assert left(planned(stub, 0.02)) == []
    sweeps = {record.block for record in read_all(stub)}
    assert len(sweeps) == 2


@pytest.mark.parametrize("outcome", rounds.LOST)
def test_a_variant_that_cannot_run_is_left_out_of_later_rounds(stub, outcome):
    families = ("hawk", "griffin")

    def says(run):
        is_lost = run.model.family == "griffin" and run.backend == "torch"
        return outcome if is_lost else 1.0 + 1e-3 * (run.round % 2)

    found = measured(stub, planned(stub, families=families), says)
    assert found.num_started == 8 * 3 + 1
    again = planned(stub, families=families)
    assert left(again) == []
    assert {item.run.run_id for item in again if item.is_needless} == found.not_needed.keys()
    lost = [item.reason for item in again if item.run.model.family == "griffin"
            and item.run.backend == "torch"]  # fmt: skip
    assert lost == [f"finished: {outcome}", *[f"not needed: {outcome} in round 0"] * 19]


def test_a_variant_that_is_lost_later_is_left_out_with_the_rounds_that_it_had(stub):
    def says(run):
        return "diverged" if run.backend == "torch" and run.round == 2 else 1.0

    assert measured(stub, planned(stub), says).num_started == 8 + 3
    assert left(planned(stub)) == []


def test_a_variant_that_failed_once_is_tried_again_and_waits_for_nobody(stub):
    """A pair that lacks round 3 is looked at one round after the others."""
    families = ("hawk", "griffin")

    def says(run):
        is_failed = (run.round, run.backend, run.model.family) == (3, "jax", "griffin")
        return "failed" if is_failed else 1.0

    assert measured(stub, planned(stub, families=families), says).num_started == 9 * 4
    again = planned(stub, families=families)
    assert left(again) == [3]
    assert set(reasons(again).values()) == {"not needed: settled after 9 rounds"}
    assert measured(stub, again).num_started == 1  # alone: the others say nothing new
    assert left(planned(stub, families=families)) == []


def test_a_round_that_was_never_measured_holds_up_those_after_it(stub):
    lacking = [i for i in planned(stub) if (i.run.round, i.run.backend) != (5, "torch")]
    assert measured(stub, lacking, lambda run: 1.0).num_started == 9 * 2 - 1
    assert left(planned(stub)) == [5, *range(9, 20)]
    assert measured(stub, planned(stub), lambda run: 1.0).num_started == 1
    assert left(planned(stub)) == []


def test_where_nothing_completes_the_rounds_end_at_the_first_look(stub):
    found = measured(stub, planned(stub), lambda run: "failed")
    assert found.num_started == 16
    assert set(found.not_needed.values()) == {"not needed: none of 8 rounds completed"}
    assert left(planned(stub)) == list(range(8))  # as failed runs always are


def test_what_is_measured_of_a_settled_block_may_ask_for_further_rounds(stub):
    """torch failed throughout, and jax alone was settled; then torch is put right."""
    measured(stub, planned(stub), lambda run: 1.0 if run.backend == "jax" else "failed")
    again = planned(stub)
    assert left(again) == list(range(8))
    todo = commands.todo(again)
    assert {item.reason for item in todo} == {"failed", rounds.IF_NEEDED}
    found = measured(stub, again, lambda run: 1.0)
    assert found.num_started == 8 + 2 * 8  # of torch alone; then of both side by side
    assert left(planned(stub)) == []


def test_beside_a_new_variant_the_others_are_measured_again(stub):
    """Alone it could not be compared with them."""
    measured(stub, planned(stub))
    both = ("hawk", "griffin")
    again = planned(stub, families=both)
    assert sum(item.reason == rounds.BESIDE_NEW for item in again) == 24
    assert measured(stub, again, lambda run: 1.0).num_started == 8 * 4
    assert left(planned(stub, families=both)) == []
    assert len({record.block for record in read_all(stub)}) == 2


def test_a_variant_that_fits_nowhere_is_no_reason_to_measure_the_others_again(stub):
    sides = [[stub_run(backend=side, round=number, device_kind="v5e") for number in range(8)]
             for side in ("jax", "torch")]  # fmt: skip
    assert [plan.fits_nowhere(runs[0]) is None for runs in sides] == [True, False]
    for runs in (sides[0], [*sides[0], *sides[1]]):
        made = rounds.settle(stub, plan.plan(stub, runs), {"stub": 0.02})
        assert not [item for item in made if item.reason == rounds.BESIDE_NEW]
        measured(stub, made, lambda run: 1.0 if run.backend == "jax" else "unsupported")


def test_a_variant_alone_is_settled_by_its_own_interval(stub):
    def noisy(run):
        return 2.0 + 0.036 * NOISE[run.round % 6]

    assert measured(stub, planned(stub, sides=("jax",)), noisy).num_started == 12
    assert left(planned(stub, sides=("jax",))) == []


class Interrupted(Instant):
    """Of so many runs the last does not end; then the sweep is told to stop."""

    def __init__(self, store, says, number):
        super().__init__(store, says)
        self.number = number

    def submit(self, task, slot=0):
        self.number -= 1
        return super().submit(task, slot) if self.number else "slow"

    def poll(self, handle):
        return None if handle == "slow" else Ended(0)

    def cancel(self, handle):
        pass

    def watch(self):
        return None if self.number else Stop(outcome="preempted", reason="told to", grace_s=0.0)


def interrupted(store, items, number, says=uneven):
    executor = Interrupted(store, says, number)
    todo = commands.todo(items)
    return sweep.sweep(store, todo, HERE, executor=executor, watch=executor.watch)


def test_an_interrupted_block_restarts_whole_and_counts_its_own_rounds_alone(stub):
    assert interrupted(stub, planned(stub), 20).is_interrupted
    assert left(planned(stub)) == list(range(20))
    found = measured(stub, planned(stub), lambda run: 1.0 if run.backend == "jax" else 2.0)
    assert found.num_started == 16  # 8 rounds, although those of before would need 12
    assert left(planned(stub)) == []


def test_what_an_older_build_settled_is_stale_and_settled(stub):
    old = [replace(item, build="older.code") for item in planned(stub)]
    measured(stub, old)
    again = planned(stub)
    assert left(again) == []
    assert [item.run.round for item in again if item.is_stale] == sorted([*range(12), *range(12)])
    assert len(commands.todo(again)) == 0
    todo = commands.todo(again, rerun_stale=True)
    assert len(todo) == 40
    found = sweep.sweep(stub, todo, HERE, executor=Instant(stub, lambda run: 1.0))
    assert found.num_started == 16
    again = planned(stub)
    assert (left(again), sum(item.is_stale for item in again)) == ([], 0)
    assert len(reasons(again)) == 12


def test_a_rerun_of_a_stale_block_that_is_interrupted_is_stale_as_a_whole(stub):
    measured(stub, [replace(item, build="older.code") for item in planned(stub)])
    todo = commands.todo(planned(stub), rerun_stale=True)
    executor = Interrupted(stub, uneven, 5)
    sweep.sweep(stub, todo, HERE, executor=executor, watch=executor.watch)
    again = planned(stub)
    assert left(again) == []
    assert all(item.is_stale for item in again)


def job(store, items, monkeypatch, says=uneven):
    monkeypatch.setattr(sweep, "Local", lambda store, *_: Instant(store, says))
    made = submission.intend(store, title="stub", command="a test", snapshot=store,
                             packed=[(HERE, [[Job(commands.todo(items))]])], left=[])  # fmt: skip
    return worker.Job(made, 0, 0)


def test_a_job_ends_its_block_as_a_sweep_does(stub, monkeypatch):
    ours = job(stub, planned(stub), monkeypatch)
    given = ours.made.runs(0, 0)
    assert len(given) == 40
    found = worker.work(ours)
    assert (found.num_started, found.is_interrupted) == (24, False)
    assert worker.pending(stub, given, HERE) == []
    assert rounds.not_needed(stub, given) == found.not_needed
    assert left(planned(stub)) == []
    # narrower: the rest of the rounds is a job of its own, to which the first rounds count
    more = job(stub, planned(stub, 0.015), monkeypatch)
    assert len(more.made.runs(0, 0)) == 16
    assert worker.work(more).num_started == 8
    assert left(planned(stub, 0.015)) == []


def test_a_job_that_was_interrupted_measures_its_block_again(stub, monkeypatch):
    """Of 9 rounds the first 3 were noisy, and the second sweep began with quiet ones. A round of
    the first is none of the second: together they would seem settled."""
    ours = job(stub, planned(stub, 0.03), monkeypatch)
    given = ours.made.runs(0, 0)
    interrupted(stub, given, 20, lambda run: uneven(run) + (run.round < 3) * run.round)
    interrupted(stub, [replace(item, is_pending=True) for item in given], 6)
    assert rounds.not_needed(stub, given) == {}
    assert len(worker.pending(stub, given, HERE)) == 40
    assert worker.work(ours).num_started == 16
    assert worker.pending(stub, given, HERE) == []


def test_no_record_is_made_of_what_was_not_needed(stub, monkeypatch):
    """Also where the job is cancelled after its block has ended: of runs that it had not begun."""
    ours = job(stub, planned(stub), monkeypatch)
    worker.work(ours)
    cancelled = reconcile.Seen(state="CANCELLED", is_in_queue=False)
    reconcile._close(ours.made, 0, 0, cancelled, None)
    assert {record.outcome for record in read_all(stub)} == {"completed"}
    assert len(list(read_all(stub))) == 24


def test_a_submission_on_this_machine_ends_with_its_block(stub, capsys, monkeypatch):
    """In processes of their own, from submit to wait; the stub takes 1 ms in each round."""
    monkeypatch.setattr(statistics, "FIRST_LOOK", FIRST_LOOK)  # as in other processes
    items = planned(stub, sides=("jax",))
    here = replace(HERE, view_s=0.1)
    bill = jobs._bill(stub, commands.todo(items), items, [here], reconcile.reconcile(stub))
    assert jobs._submit(stub, bill, "stub", "a test", dry_run=False, as_json=True) == 0
    capsys.readouterr()
    assert watching.wait(stub, [], timeout_s=100, every_s=0.2, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    counts = {"completed": FIRST_LOOK, "not_needed": 20 - FIRST_LOOK}
    assert told == {"is_over_time": False, "outcomes": counts}
    assert left(planned(stub, sides=("jax",))) == []


def point(cell, number, value, *, sweep="s", outcome="completed", at=None):
    values = value if isinstance(value, dict) else {at: value}
    return Point(cell, number, 0, sweep, outcome, True, values)


def test_each_batch_size_must_be_settled():
    def pair(noise):
        ours = [point("a", n, {1: 1.0, 2: 1.0}) for n in range(8)]
        return ours + [point("b", n, {1: 1.0, 2: 1 + noise * (-1) ** n, 4: n}) for n in range(8)]

    assert rounds._is_settled(pair(0.001), 0.02)
    assert not rounds._is_settled(pair(0.1), 0.02)


def test_rounds_of_two_sweeps_are_no_pair():
    ours = [point("a", n, 1.0) for n in range(8)]
    assert rounds._is_settled([*ours, *(point("b", n, 2.0) for n in range(8))], 0.02)
    assert not rounds._is_settled([*ours, *(point("b", n, 2.0, sweep="t") for n in range(8))], 0.02)


def settings(*overrides):
    made = compose.read(overrides).settings
    return {one["suite"]["name"]: one["suite"] for one in made}, made


def test_an_interval_asked_for_alone_allows_20_rounds():
    suites, made = settings("experiment=quickstart", "suite.until_ci=0.02")
    assert {name: suite["rounds"] for name, suite in suites.items()} == {
        "parity": 1, "training_speed": 20, "decode_latency": 20, "language_modeling": 1
    }  # fmt: skip
    assert rounds.asked(made) == {"training_speed": 0.02, "decode_latency": 0.02}
    suites, made = settings("suite=training_speed", "suite.until_ci=0.02", "suite.rounds=12")
    assert suites["training_speed"]["rounds"] == 12
    suites, made = settings("suite=training_speed", "suite.until_ci=null")
    assert (suites["training_speed"]["rounds"], rounds.asked(made)) == (3, {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["suite.until_ci=0"], "suite.until_ci=0; must be above 0 and below 1"),
        (["suite.until_ci=2"], "0.02 is 2%"),
        (["suite.until_ci=0.01,0.02"], "takes one value"),
        (["suite.until_ci=0.02", "suite.rounds=7"], "after 8 rounds at the earliest"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(overrides, message):
    with pytest.raises(ValueError, match=r".") as caught:
        rounds.asked(settings("suite=training_speed", *overrides)[1])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
