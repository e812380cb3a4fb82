"""A job's way from Slurm's words to one end of every run, however Slurm stumbles."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suites.harness import slurm, states
from suites.harness.plan import FINISHED
from suites.harness.record import OUTCOMES
from suites.harness.slurm import Job, Seen
from suites.harness.states import BUDGETS, OVER, Memory, TaskState, look, may_retry, verdict

LOST_AFTER_S = 600.0
LIVE = sorted(state for state, kind in slurm.STATES.items() if kind not in slurm.OVER)
ENDED = sorted(state for state, kind in slurm.STATES.items() if kind == slurm.ENDED)
INTERRUPTED = sorted(state for state, kind in slurm.STATES.items() if kind == slurm.INTERRUPTED)


def seen(state: str, **more) -> Seen:
    """What squeue says; an end is no state of the queue."""
    return Seen(state=state, is_in_queue=slurm.kind(state) not in slurm.OVER, **more)


def at(one: Seen | None, memory: Memory, now: float, **more) -> tuple[TaskState, Memory]:
    asked = {"beat_age_s": None, "lost_after_s": LOST_AFTER_S, "is_requeued": True} | more
    return look(one, memory, now=now, **asked)


def follow(*words: str | None, step_s: float = 60.0, **more) -> list[str]:
    """The states of a job that Slurm says these words of, one a minute; None: it is absent."""
    memory, found = Memory(), []
    for number, word in enumerate(words):
        one = None if word is None else seen(word)
        state, memory = at(one, memory, number * step_s, **more)
        found.append(state.value)
    return found


def test_a_job_that_is_preempted_and_comes_back_is_completed():
    words = ("PENDING", "RUNNING", "COMPLETING", "PENDING", "RUNNING", "COMPLETED")
    assert follow(*words) == ["queued", "running", "stopping", "queued", "running", "ended"]
    words = ("RUNNING", "PREEMPTED", None, None, "PENDING", "RUNNING", "COMPLETED")
    stopping = ["stopping"] * 3
    assert follow(*words) == ["running", *stopping, "queued", "running", "ended"]


@pytest.mark.parametrize("state", INTERRUPTED)
def test_an_interruption_is_the_end_only_where_nothing_comes_back(state):
    assert follow("RUNNING", *[state] * 10)[-1] == "stopping"
    assert follow("RUNNING", *[state] * 11)[-1] == "ended"
    assert follow("RUNNING", state, is_requeued=False)[-1] == "ended"


@pytest.mark.parametrize("state", ENDED)
def test_an_end_is_one_at_once_and_stays_one(state):
    assert follow("RUNNING", state, None, None) == ["running", "ended", "ended", "ended"]


@pytest.mark.parametrize("state", LIVE)
def test_what_the_queue_shows_is_never_over(state):
    found = follow(*[state] * 40)
    assert not {"ended", "lost"} & set(found)


def test_a_state_that_is_not_known_is_taken_for_running():
    assert follow("HIBERNATING") == ["running"]


def test_a_job_is_lost_after_absence_without_a_break():
    assert follow("RUNNING", *[None] * 11)[-1] == "lost"
    assert follow("RUNNING", *[None] * 10)[-1] == "stopping"
    assert follow("RUNNING", *[None] * 9, "RUNNING", *[None] * 10)[-1] == "stopping"
    assert follow(*[None] * 5) == ["queued"] * 5  # squeue does not show it yet


def test_two_looks_far_apart_are_enough():
    assert follow("RUNNING", None, None, step_s=3600.0) == ["running", "stopping", "lost"]


def test_time_in_which_slurm_did_not_answer_does_not_count():
    _, memory = at(seen("RUNNING"), Memory(), 0.0)
    _, memory = at(None, memory, 60.0)
    for now in range(120, 6000, 60):
        state, memory = at(None, memory, float(now), is_answered=False)
        assert state == TaskState.STOPPING
    state, memory = at(None, memory, 6000.0)
    assert (state, memory.absent_s) == (TaskState.STOPPING, 0.0)
    assert at(None, memory, 6000.0 + LOST_AFTER_S)[0] == TaskState.LOST


def test_a_sign_of_life_beats_absence_and_no_end_that_slurm_names():
    _, memory = at(seen("RUNNING"), Memory(), 0.0)
    for now in range(60, 6000, 60):
        state, memory = at(None, memory, float(now), beat_age_s=30.0)
        assert state == TaskState.RUNNING
    assert at(None, memory, 6000.0, beat_age_s=LOST_AFTER_S)[0] == TaskState.LOST
    assert at(seen("FAILED"), memory, 6000.0, beat_age_s=1.0)[0] == TaskState.ENDED


def test_accounts_that_show_a_job_running_are_no_queue():
    """sacct keeps saying RUNNING of jobs whose end it never heard of, and REQUEUED of others."""
    for state in ("RUNNING", "REQUEUED", "PENDING"):
        late, memory = Seen(state=state, is_in_queue=False), Memory()
        for now in range(0, 660, 60):
            found, memory = at(late, memory, float(now))
        assert found == TaskState.LOST


def test_late_accounts_hide_no_end_that_was_seen():
    _, memory = at(seen("OUT_OF_MEMORY"), Memory(), 0.0)
    state, memory = at(Seen(state="RUNNING", is_in_queue=False), memory, 60.0)
    assert (state, memory.seen.state) == (TaskState.ENDED, "OUT_OF_MEMORY")


def test_a_job_that_no_node_could_start_is_released_a_few_times():
    held = seen("PENDING", reason="launch failed requeued held")
    memory, released = Memory(), []
    for number, one in enumerate((held, seen("RUNNING"), held, None, held, held)):
        released.append(states.must_release(one, memory))
        _, memory = at(one, memory, float(number))
    assert released == [True, False, True, False, True, False]
    assert memory.num_released == BUDGETS["node_failure"]
    assert not states.must_release(seen("PENDING", reason="JobHeldUser"), Memory())


def test_what_is_remembered_goes_through_a_file():
    _, memory = at(seen("NODE_FAIL", node="gpu1"), Memory(), 0.0)
    kept = json.loads(json.dumps(vars(memory)))
    assert Memory.of(kept) == memory
    later = kept | {"new": 1, "last": kept["last"] | {"new": 1}}
    assert Memory.of(later).seen == memory.seen
    assert memory.seen == seen("NODE_FAIL", node="gpu1")


@pytest.mark.parametrize(
    ("one", "outcome", "words"),
    [
        (seen("TIMEOUT"), "timed_out", "time limit"),
        (seen("DEADLINE"), "timed_out", "deadline"),
        (seen("PREEMPTED"), "preempted", "preempted"),
        (seen("NODE_FAIL", node="gpu2", reason="NodeDown"), "node_failure", r"gpu2 .*NodeDown"),
        (seen("BOOT_FAIL"), "node_failure", "did not start"),
        (seen("OUT_OF_MEMORY"), "out_of_memory", "memory"),
        (seen("CANCELLED", reason="by uid 1000"), "cancelled", "by uid 1000"),
        (seen("COMPLETED"), "failed", "no record"),
        (seen("FAILED", exit_code=3), "failed", "exit code 3"),
        (seen("FAILED", exit_code=-9), "failed", "SIGKILL"),
        (seen("FAILED", exit_code=1, reason="JobLaunchFailure"), "failed", "JobLaunchFailure"),
        (seen("FAILED", exit_code=13, is_preempted=True), "preempted", "13"),
        (seen("FAILED", exit_code=143, elapsed_s=90.0), "preempted", "SIGTERM"),
        (seen("FAILED", exit_code=15, elapsed_s=90.0), "preempted", "SIGTERM"),
        (seen("FAILED", exit_code=-12, elapsed_s=3590.0), "timed_out", "SIGUSR2"),
        (seen("RUNNING", elapsed_s=90.0), "node_failure", "not known"),
        (seen("RUNNING", elapsed_s=3601.0), "timed_out", "3600"),
        (None, "node_failure", "not known"),
    ],
)
def test_every_end_has_an_outcome_and_its_reason(one, outcome, words):
    found, reason = verdict(one, limit_s=3600.0)
    assert found == outcome
    assert re.search(words, reason), reason


@pytest.mark.parametrize("state", sorted(slurm.STATES))
def test_every_state_has_a_verdict(state):
    assert verdict(seen(state))[0] in OUTCOMES


def test_a_run_that_had_not_begun_is_not_to_blame():
    for state in ("OUT_OF_MEMORY", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "COMPLETED"):
        assert verdict(seen(state), has_begun=False)[0] is None
    for state, outcome in (("CANCELLED", "cancelled"), ("FAILED", "failed")):
        assert verdict(seen(state, exit_code=1), has_begun=False)[0] == outcome


def why(elapsed_s: float, limit_s: float | None = 600.0, job: Job | None = None, **more) -> str:
    told = {"elapsed_s": elapsed_s, "limit_s": limit_s, "warning_s": 60.0, "job": job} | more
    return states.stop_reason(**told)[0]


def test_a_signal_early_in_a_short_job_is_no_time_limit():
    """submitit 1.5.4 takes every signal to a job of at most 10 minutes for a time-out."""
    assert why(30.0) == "preempted"
    assert why(470.0) == "preempted"
    assert why(485.0) == "timed_out"
    assert why(30.0, limit_s=None) == "preempted"
    assert why(30.0, limit_s=100.0) == "preempted"  # any time is near the end: nobody knows


def test_the_controller_knows_why_a_job_is_stopped():
    running = Job(state="RUNNING", limit_s=600.0)
    assert why(595.0, job=replace(running, is_preempted=True)) == "preempted"
    assert why(30.0, limit_s=60.0, job=replace(running, limit_s=60.0)) == "timed_out"
    assert why(30.0, job=running) == "preempted"
    assert why(30.0, job=replace(running, state="CANCELLED")) == "cancelled"
    assert why(30.0, job=replace(running, state="NODE_FAIL")) == "node_failure"
    assert why(30.0, job=replace(running, state="COMPLETING", reason="TimeLimit")) == "timed_out"
    again = replace(running, state="COMPLETING", restarts=1)
    assert why(30.0, job=again, restarts=0) == "preempted"
    assert why(30.0, job=again, restarts=1) == "cancelled"


def test_budgets_are_by_reason():
    assert may_retry([]) == (True, "new")
    assert may_retry(["node_failure"] * 3) == (True, "node_failure 3 of 3")
    assert may_retry(["node_failure"] * 4)[0] is False
    assert may_retry(["timed_out"]) == (True, "timed_out 1 of 1")
    assert may_retry(["timed_out", "preempted", "timed_out"])[0] is False
    assert may_retry(["node_failure", "preempted", "node_failure"])[0] is True
    for outcome in set(OUTCOMES) - BUDGETS.keys():
        assert may_retry([outcome])[0] is False
    assert may_retry(["completed", "preempted"]) == (False, "completed")


def test_the_state_of_a_run():
    state, task = states.run_state, TaskState
    assert state([], None, is_claimed=False) == "planned"
    assert state([], task.PLANNED, is_claimed=False) == "planned"
    assert state([], task.QUEUED, is_claimed=False) == "queued"
    assert state([], task.RUNNING, is_claimed=False) == "queued"
    assert state([], task.RUNNING, is_claimed=True) == "running"
    assert state([], task.STOPPING, is_claimed=True) == "stopping"
    assert state([], task.LOST, is_claimed=True) == "lost"
    assert state([], task.ENDED, is_claimed=True) == "stopping"  # its record is not seen yet
    assert state([], task.ENDED, is_claimed=False) == "planned"
    assert state(["preempted"], task.QUEUED, is_claimed=False) == "to_retry"
    assert state(["preempted"], task.RUNNING, is_claimed=True) == "running"
    assert state(["failed"], task.RUNNING, is_claimed=False) == "failed"
    assert state(["failed"], task.QUEUED, is_claimed=False, num_before=1) == "queued"
    assert state(["node_failure"] * 4, task.ENDED, is_claimed=False) == "given_up"
    assert state(["preempted", "completed"], task.LOST, is_claimed=True) == "completed"


def test_an_earlier_result_is_not_the_state_of_a_run_that_is_submitted_again():
    state, task, again = states.run_state, TaskState, {"is_claimed": False, "num_before": 1}
    assert state(["completed"], task.QUEUED, **again) == "queued"
    assert state(["completed"], task.RUNNING, is_claimed=True, num_before=1) == "running"
    assert state(["completed", "preempted"], task.QUEUED, **again) == "to_retry"
    assert state(["completed", "failed"], task.RUNNING, **again) == "failed"
    assert state(["completed", "failed"], None, **again) == "failed"
    assert state(["completed"], None, **again) == "completed"


# Random histories: what Slurm may say of a job with three runs, at irregular times.
WORDS = st.one_of(
    st.sampled_from([*slurm.STATES, "NEW_WORD"]).map(seen),
    st.sampled_from(["RUNNING", "PENDING", "REQUEUED"]).map(
        lambda state: Seen(state=state, is_in_queue=False)  # of accounts that are late
    ),
    st.none(),
    st.just("silence"),
)
LOOKS = st.lists(
    st.tuples(
        WORDS,
        st.integers(0, 400),  # seconds since the last look
        st.sampled_from([None, 0.0, 599.0, 600.0, 1e6]),  # age of the last sign of life
        st.sampled_from([None, None, "completed", "failed", "preempted"]),  # a run's own record
    ),
    max_size=60,
)


class Sweep:
    """One job and its runs, settled as reconcile does: each run that has begun and left no record
    gets a verdict when its job is over; a job that comes back begins what may be tried again."""

    def __init__(self, is_requeued: bool) -> None:
        self.memory, self.now, self.is_requeued = Memory(), 0.0, is_requeued
        self.state = TaskState.QUEUED
        self.records: list[list[str]] = [[] for _ in range(3)]
        self.is_begun = [False] * 3
        self.absent_s, self.absent_since = 0.0, None

    def step(self, word, seconds: float, beat_age_s: float | None, record: str | None) -> None:
        self.now += seconds
        is_answered = word != "silence"
        one = word if is_answered else None
        before, old = self.state, self.memory
        self.state, self.memory = at(
            one, old, self.now, beat_age_s=beat_age_s, is_answered=is_answered,
            is_requeued=self.is_requeued,
        )  # fmt: skip
        self._check(before, old, one, beat_age_s, is_answered)
        if self.state == TaskState.RUNNING:
            self._run(record)
        elif self.state in OVER:
            self._settle()

    def _check(self, before, old, one, beat_age_s, is_answered) -> None:
        if not is_answered:
            self.absent_since = None
            assert self.state == before
            assert replace(self.memory, absent_at=None) == replace(old, absent_at=None)
            return
        if one is not None and one.is_in_queue:
            assert self.state not in OVER
        is_named = one is not None and slurm.kind(one.state) in slurm.OVER
        is_absent = one is None or not one.is_in_queue
        if not is_absent or before in OVER:
            self.absent_s, self.absent_since = 0.0, None
        else:
            self.absent_s += self.now - (
                self.now if self.absent_since is None else self.absent_since
            )
            self.absent_since = self.now
        if self.state in OVER and before not in OVER and not is_named:
            assert self.absent_s >= LOST_AFTER_S
            assert beat_age_s is None or beat_age_s >= LOST_AFTER_S
        if self.state == TaskState.ENDED and before not in OVER and is_named:
            is_final = slurm.kind(one.state) == slurm.ENDED or not self.is_requeued
            assert is_final or self.absent_s >= LOST_AFTER_S

    def _run(self, record: str | None) -> None:
        for number, outcomes in enumerate(self.records):
            if self.is_begun[number]:
                if record is not None:
                    self._end(number, record)
                return
            if may_retry(outcomes)[0]:
                self.is_begun[number] = True
                return

    def _settle(self) -> None:
        for number, is_begun in enumerate(self.is_begun):
            if is_begun:
                outcome, reason = verdict(self.memory.seen)
                assert reason
                self._end(number, outcome)

    def _end(self, number: int, outcome: str) -> None:
        assert self.is_begun[number]
        assert not set(self.records[number]) & set(FINISHED), "a finished run was tried again"
        assert outcome in OUTCOMES
        self.records[number].append(outcome)
        self.is_begun[number] = False


@settings(max_examples=300, deadline=None, derandomize=True)
@given(LOOKS, st.booleans(), st.sampled_from([None, *slurm.STATES]))
def test_every_history_is_settled_once_and_within_its_budgets(looks, is_requeued, last):
    sweep = Sweep(is_requeued)
    for word, step_s, beat_age_s, record in looks:
        sweep.step(word, step_s, beat_age_s, record)

    final = None if last is None or slurm.kind(last) not in slurm.OVER else seen(last)
    for _ in range(12):  # whatever came before, an end or absence is settled within its time
        sweep.step(final, 60.0, None, None)
    assert sweep.state in OVER
    assert not any(sweep.is_begun)

    settled = [list(outcomes) for outcomes in sweep.records]
    for word in (None, final, "silence"):
        sweep.step(word, 1e6, None, None)
    assert sweep.records == settled, "a second verdict"
    for outcomes in sweep.records:
        for outcome in OUTCOMES:
            assert outcomes.count(outcome) <= BUDGETS.get(outcome, 0) + 1
