"""Every run ends as one record: typed outcomes, deaths, interruptions, and going on after them."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from stub_suite import stub_run

from suites.harness import claims, executors, measure, plan
from suites.harness.cluster import Cluster
from suites.harness.execute import Task, last_phase, new_attempt, running_progress, verdict
from suites.harness.executors import Ended
from suites.harness.record import read_all, record_path, write_atomically
from suites.harness.sweep import sweep

MIB = 2**20
OUTCOMES = {
    "done": "completed",
    "raise": "failed",
    "unsupported": "unsupported",
    "diverged": "diverged",
    "invalid": "invalid_measurement",
    "compile": "compile_error",
    "resource_exhausted": "out_of_memory",
    "abort": "out_of_memory",
    "segfault": "failed",
    "kill": "failed",  # by hand: the kernel counts no out-of-memory kill
}
# A parent as `aerie run` is one: it plans, sweeps, and says what it did.
PARENT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from stub_suite import stub_run
from suites.harness import plan
from suites.harness.cluster import Cluster
from suites.harness.sweep import sweep
runs = [stub_run({what!r}, seed=seed) for seed in range({count})]
planned = plan.plan(Path({store!r}), runs)
todo = [item for item in planned if item.is_pending]
result = sweep(Path({store!r}), todo, Cluster(name="here", executor="local"))
print(json.dumps([len(todo), result.num_started]))
sys.exit(result.is_interrupted)
"""


def go(store, runs, *, run_limit_s=30.0, parallelism=1, **options):
    planned = plan.plan(store, runs)
    todo = [item for item in planned if item.is_pending]
    cluster = Cluster(
        name="here", executor="local", runs_in_parallel=parallelism, run_limit_s=run_limit_s
    )
    return sweep(store, todo, cluster, **options)


def parent(store, what, count):
    tests = str(Path(__file__).parent)
    code = PARENT.format(tests=tests, what=what, count=count, store=str(store))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_every_end_is_a_record_with_its_reason(stub):
    runs = [stub_run(what) for what in OUTCOMES]
    result = go(stub, runs, parallelism=2)
    records = {record.run["data"]["name"]: record for record in read_all(stub)}
    assert {name: record.outcome for name, record in records.items()} == OUTCOMES
    assert result.outcomes == {run.run_id: OUTCOMES[run.data.name] for run in runs}
    for name, record in records.items():
        assert (record.reason is None) == (record.phase is None) == (name == "done"), name
    assert records["compile"].phase == "compile"
    assert records["kill"].phase == "measure"  # it could not say so itself
    assert [s.metric for s in records["raise"].samples] == ["init_time_s", "step_time_ms"]
    folder = stub / "runs" / records["raise"].run_id
    assert "a bug" in next(folder.glob("*.traceback.txt")).read_text()
    assert not list(stub.glob("runs/*/.[tp]*"))  # tasks, phases and temporary files
    assert not list((stub / "claims").glob("[!.]*"))


def test_a_record_says_where_it_ran_and_what_it_must_cost(stub):
    go(stub, [stub_run()])
    (record,) = read_all(stub)
    wanted = {"host", "device_name", "device_kind", "cpu_model", "num_cores", "memory_bytes",
              "python", "platform", "versions", "git_commit", "resolved_kernels", "num_threads",
              "data_digest", "init_digest", "load_average"}  # fmt: skip
    assert wanted <= set(record.provenance)
    assert set(record.costs) == {"num_params", "num_params_non_embedding", "train_flops_per_token",
                                 "model_flops", "model_bytes",
                                 "cache_bytes", "predicted_peak_memory_bytes"}  # fmt: skip
    assert record.block
    assert record.order == 0


def test_a_record_names_the_build_that_ran_and_not_the_planned_one(stub):
    (planned,) = plan.plan(stub, [stub_run()])
    sweep(stub, [replace(planned, build="older.code")], Cluster(name="here", executor="local"))
    (record,) = read_all(stub)
    assert record.build == planned.build


def test_a_child_runs_our_code_whatever_folder_it_is_started_in(stub, monkeypatch, tmp_path):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "__init__.py").write_text("raise ImportError('another checkout')")
    monkeypatch.chdir(tmp_path)
    assert list(go(stub, [stub_run()]).outcomes.values()) == ["completed"]


def test_a_stale_out_of_memory_proves_nothing_once_it_completes(stub):
    small, large = stub_run(seq_len=8), stub_run(seq_len=16)
    planned = plan.plan(stub, [small, large])
    result = sweep(stub, planned, Cluster(name="here", executor="local"), proven=[small])
    assert list(result.outcomes.values()) == ["completed", "completed"]


def test_a_child_out_of_address_space_does_not_stop_the_sweep(stub, monkeypatch):
    real = executors.subprocess.Popen

    def limited(command, **options):
        preexec = lambda: resource.setrlimit(resource.RLIMIT_AS, (800 * MIB, 800 * MIB))  # noqa: E731
        return real(command, preexec_fn=preexec, **options)

    monkeypatch.setattr(executors.subprocess, "Popen", limited)
    result = go(stub, [stub_run("memory"), stub_run("done")])
    assert sorted(result.outcomes.values()) == ["completed", "out_of_memory"]


def test_a_larger_point_than_one_out_of_memory_is_predicted(stub):
    small, same, large = (stub_run("resource_exhausted", seq_len=n) for n in (8, 4, 16))
    result = go(stub, [small, large, same])
    assert result.outcomes[large.run_id] == "out_of_memory_predicted"
    assert result.outcomes[same.run_id] == "out_of_memory"
    assert result.num_started == 2
    todo = [p for p in plan.plan(stub, [large]) if not p.is_pending]
    cluster = Cluster(name="here", executor="local")
    tried = sweep(stub, todo, cluster, verify_frontier=True, proven=[small])
    assert tried.outcomes[large.run_id] == "out_of_memory"


def test_a_run_past_its_limit_is_timed_out_and_runs_again(stub):
    result = go(stub, [stub_run("hang")], run_limit_s=1.0)
    assert list(result.outcomes.values()) == ["timed_out"]
    (planned,) = plan.plan(stub, [stub_run("hang")])
    assert (planned.reason, planned.is_pending) == ("failed: timed_out", True)


@pytest.mark.parametrize("delay", [0.3, 1.0])
def test_kill_9_of_the_parent_loses_and_doubles_nothing(stub, delay):
    first = parent(stub, "sleep", 3)
    time.sleep(delay)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = parent(stub, "sleep", 3)
    told = json.loads(second.communicate(timeout=60)[0])
    assert second.returncode == 0
    records = list(read_all(stub))
    assert len(records) == len({record.run_id for record in records}) == 3
    assert {record.outcome for record in records} == {"completed"}
    assert told[0] == told[1] <= 3
    third = parent(stub, "sleep", 3)
    assert json.loads(third.communicate(timeout=60)[0]) == [0, 0]


def test_a_killed_child_fails_and_runs_again_and_orphans_die(stub):
    first = parent(stub, "hang", 2)
    child = _child_of(first.pid)
    os.kill(child, signal.SIGKILL)
    second = _child_of(first.pid, other_than=child)
    (record,) = read_all(stub)
    assert record.outcome == "failed"
    assert "SIGKILL" in record.reason
    first.send_signal(signal.SIGKILL)
    first.wait()
    deadline = time.time() + 5
    while claims.started(second) and time.time() < deadline:
        time.sleep(0.02)
    assert claims.started(second) is None


def test_an_interrupted_sweep_cancels_what_runs_and_leaves_the_rest(stub):
    first = parent(stub, "hang", 3)
    _child_of(first.pid)
    first.send_signal(signal.SIGINT)
    assert json.loads(first.communicate(timeout=30)[0]) == [3, 1]
    assert first.returncode == 1
    (record,) = read_all(stub)
    assert record.outcome == "cancelled"
    assert not list((stub / "claims").glob("[!.]*"))


def test_two_sweeps_at_once_measure_each_run_once(stub):
    both = [parent(stub, "sleep", 3) for _ in range(2)]
    told = [json.loads(p.communicate(timeout=60)[0]) for p in both]
    records = list(read_all(stub))
    assert len(records) == len({record.run_id for record in records}) == 3
    assert sum(started for _, started in told) == 3


def test_a_claim_is_exclusive_and_outlives_no_owner(tmp_path):
    assert claims.claim(tmp_path, "a")
    assert not claims.claim(tmp_path, "a")
    place = tmp_path / "claims" / "a" / "owner.json"
    dead = json.loads(place.read_text()) | {"started": "another boot 1"}
    place.write_text(json.dumps(dead))
    assert claims.claim(tmp_path, "a")
    token = claims.owner(tmp_path, "a")["token"]
    claims.release(tmp_path, "a", token)
    assert claims.claim(tmp_path, "a")


def test_a_claim_is_given_back_by_its_token_alone(tmp_path, monkeypatch):
    """Of two who release one claim, the slower leaves alone what was claimed meanwhile."""
    first = claims.claim(tmp_path, "a")
    claims.release(tmp_path, "a", first)
    second = claims.claim(tmp_path, "a")
    claims.release(tmp_path, "a", first)
    assert claims.owner(tmp_path, "a")["token"] == second

    look = claims._token
    monkeypatch.setattr(claims, "_token", lambda place: first if place.name == "a" else look(place))
    claims.release(tmp_path, "a", first)  # claimed between its look and its move
    assert claims.owner(tmp_path, "a")["token"] == second

    monkeypatch.undo()
    claims.release(tmp_path, "a", second)
    assert not list((tmp_path / "claims").iterdir())
    claims.claim(tmp_path, "b")
    (tmp_path / "claims" / ".dead-1").mkdir()
    claims.sweep_up(tmp_path)
    assert len(list((tmp_path / "claims").iterdir())) == 2
    monkeypatch.setattr(claims, "KEPT_S", 0.0)
    claims.sweep_up(tmp_path)
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["b"]


def test_a_claim_that_was_not_written_whole_stops_nobody_for_long(tmp_path):
    """Its machine failed at once: the folder is there, and its file is empty."""
    place = tmp_path / "claims" / "a"
    place.mkdir(parents=True)
    (place / "owner.json").touch()
    assert claims.owner(tmp_path, "a") is None
    assert not claims.claim(tmp_path, "a")
    os.utime(place, (0, 0))
    assert claims.claim(tmp_path, "a")
    assert claims.owner(tmp_path, "a")["pid"] == os.getpid()


def train_run(num_steps=40):
    return stub_run("train", workload={"num_steps": num_steps})


def without_block(store, run):
    (planned,) = plan.plan(store, [run])
    return replace(planned, block=None, order=None)


def started(store, run, *, block=None, **options):
    """A child that has begun to measure, its task and its executor."""
    task = Task(run=run, build="planned", attempt=new_attempt(), parent_pid=os.getpid(),
                block=block)  # fmt: skip
    path = record_path(store, run.run_id, f".task-{task.attempt}")
    write_atomically(path, json.dumps(task.to_json()))
    executor = executors.Local(store, **options)
    handle = executor.submit(path)
    deadline = time.time() + 20
    while last_phase(store, task) != "measure" and time.time() < deadline:
        time.sleep(0.01)
    return executor, handle, task


def ended(executor, handle):
    deadline = time.time() + 20
    while (end := executor.poll(handle)) is None and time.time() < deadline:
        executor.wait(0.1)
    return end


def test_a_killed_training_goes_on_and_ends_as_if_it_was_not(stub):
    run, before = train_run(), None
    saved = stub / "checkpoints" / run.run_id / "checkpoint"
    for _ in range(2):
        executor, handle, task = started(stub, run, checkpoint_s=0.1)
        deadline = time.time() + 20
        while not saved.exists() or saved.read_bytes() == before:
            assert time.time() < deadline
            time.sleep(0.01)
        executor.cancel(handle)
        before = saved.read_bytes()
        assert last_phase(stub, task) == "measure"
    sweep(stub, [without_block(stub, run)], Cluster(name="here", executor="local"))
    (record,) = read_all(stub)
    value, want = 0.0, []
    for step in range(1, 41):
        value = value * 1.1 + step
        want.append((step, value))
    assert [(s.at, s.value) for s in record.samples if s.metric == "train_loss"] == want
    segments = record.provenance["segments"]
    assert len(segments) == 3
    assert [s["start_step"] for s in segments[1:]] == [s["end_step"] for s in segments[:-1]]
    assert 0 < segments[0]["end_step"] < segments[1]["end_step"] < segments[2]["end_step"] == 40
    assert {s["host"] for s in segments} == {plan.provenance.node()}
    assert len({s["attempt"] for s in segments}) == 3
    assert not (stub / "checkpoints" / run.run_id).exists()


def test_the_record_of_a_killed_training_keeps_its_curve_as_far_as_it_was_saved(stub):
    run = train_run(1000)
    cluster = Cluster(name="here", executor="local", run_limit_s=4.0, checkpoint_s=0.1)
    sweep(stub, [without_block(stub, run)], cluster)
    (record,) = read_all(stub)
    assert (record.outcome, record.phase) == ("timed_out", "measure")
    curve = [(s.at, s.value) for s in record.samples]
    assert len(curve) > 5
    assert [at for at, _ in curve] == list(range(1, len(curve) + 1))
    value = 0.0
    for step, loss in curve:
        value = value * 1.1 + step
        assert loss == value


@pytest.mark.parametrize("what", ["train", "repeat"])
def test_a_run_that_is_told_to_stop_ends_as_preempted(stub, what):
    run = train_run(1000) if what == "train" else stub_run("repeat")
    executor, handle, _ = started(stub, run)
    time.sleep(0.3)
    executor.stop(handle)
    assert ended(executor, handle).returncode == 0
    (record,) = read_all(stub)
    assert (record.outcome, record.phase) == ("preempted", "measure")
    assert "told to stop (SIGUSR2)" in record.reason
    kept = stub / "checkpoints" / run.run_id / "checkpoint"
    assert kept.exists() == (what == "train")
    if what == "train":
        (segment,) = record.provenance["segments"]
        assert f"step {segment['end_step']} is kept" in record.reason


def test_a_timing_run_leaves_its_end_to_who_started_it(stub):
    """It would call itself preempted where its job's time is over, and be tried again 100 times."""
    executor, handle, _ = started(stub, train_run(20), block="one")
    executor.stop(handle)
    assert ended(executor, handle).returncode == 0
    (record,) = read_all(stub)
    assert record.outcome == "completed"


def test_sigterm_ends_a_child_without_a_record(stub):
    executor, handle, _ = started(stub, train_run(1000))
    os.kill(int(handle), signal.SIGTERM)
    assert ended(executor, handle).returncode == -signal.SIGTERM
    assert not list(read_all(stub))


def test_times_add_up_to_the_life_of_the_process(stub):
    start = time.monotonic()
    executor, handle, _ = started(stub, train_run(20))
    ended(executor, handle)
    seconds = time.monotonic() - start
    (record,) = read_all(stub)
    assert {"start", "import", "init", "measure", "write"} <= set(record.times)
    assert sum(record.times.values()) == pytest.approx(record.seconds)
    assert 0 <= seconds - record.seconds < 0.25  # the record's own writing, and our looking
    assert record.times["measure"] == pytest.approx(20 * 0.05, abs=0.2)
    assert record.times["start"] > 0.02  # the interpreter and our imports


def test_the_times_of_a_child_that_is_killed_are_known(stub):
    go(stub, [stub_run("hang")], run_limit_s=5.0)
    (record,) = read_all(stub)
    assert record.outcome == "timed_out"
    assert sum(record.times.values()) == pytest.approx(record.seconds, abs=0.01)
    assert record.times["measure"] > 1.0


def test_a_record_from_before_times_can_be_read(stub):
    go(stub, [stub_run()])
    (record,) = read_all(stub)
    values = record.to_json()
    del values["times"]
    assert type(record).from_json(values) == replace(record, times={})


def test_a_running_child_says_how_far_it_is(stub):
    run = train_run(1000)
    assert running_progress(stub, run.run_id) is None
    executor, handle, task = started(stub, run)
    time.sleep(2.5)
    said = running_progress(stub, run.run_id)
    executor.cancel(handle)
    assert said["attempt"] == task.attempt
    assert (said["phase"], said["total"]) == ("measure", 1000)
    assert 20 < said["done"] < 100
    assert said["loss"] > said["done"]  # the last one: it grows faster than steps do
    assert said["since"].endswith("+00:00")


def test_progress_is_written_now_and_then_and_never_half(tmp_path):
    path, sizes = tmp_path / "phase.json", set()
    measure.begin(path)
    try:
        measure.phase("measure")
        before = path.stat().st_mtime_ns
        for number in range(1000):
            measure.progress(number, 1000)
        assert path.stat().st_mtime_ns == before
        for name in ("write", "evaluate"):
            measure.phase(name)
            sizes.add(path.stat().st_size)
            assert json.loads(path.read_text())["phase"] == name
    finally:
        measure.begin(None)
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("ended", "log", "outcome"),
    [
        (Ended(-9, num_out_of_memory_kills=1), "", "out_of_memory"),
        (Ended(-9, num_out_of_memory_kills=0), "", "failed"),
        (Ended(-9, peak_rss_bytes=2**60, num_out_of_memory_kills=None), "", "out_of_memory"),
        (Ended(-6), "LLVM ERROR: out of memory", "out_of_memory"),
        (Ended(1), "ImportError: x.so: failed to map segment from shared object", "out_of_memory"),
        (Ended(-11), "Fatal Python error", "failed"),
        (Ended(1), "", "failed"),
    ],
)
def test_a_death_without_a_record_is_judged_by_what_was_seen(ended, log, outcome):
    assert verdict(ended, log)[0] == outcome


def _child_of(pid: int, other_than: int = 0) -> int:
    """The measuring process of a parent, once it has begun: not git or another that it asks, nor
    the copy of itself, with its own arguments, that each of them is for a moment."""
    deadline = time.time() + 20
    while time.time() < deadline:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            try:
                arguments = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if int(child) != other_than and b"suites.harness.child" in arguments:
                return int(child)
        time.sleep(0.02)
    raise AssertionError(f"process {pid} has started no child")


def test_a_block_is_measured_by_one_sweep_alone(stub):
    """Shared run by run by two that were given it, it would be whole in neither."""
    both = [parent(stub, "sleep", 4) for _ in range(2)]
    told = [json.loads(p.communicate(timeout=60)[0]) for p in both]
    records = list(read_all(stub))
    assert sorted(started for _, started in told) == [0, 4]
    assert len(records) == 4
    assert len({record.block for record in records}) == 1
    assert not list((stub / "claims").glob("[!.]*"))
