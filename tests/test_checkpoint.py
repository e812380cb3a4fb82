"""Checkpoints: whole at every kill, trusted only whole and of the same code; runs go on from them
as if they had never stopped."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import BACKENDS, tiny

from implementations import parameters
from implementations.engine import OptimizerConfig, load_engine
from suites import language_modeling
from suites.harness import checkpoint, measure, plan, stop, train
from suites.harness import trained as trained_parameters
from suites.harness.run import DataConfig, Run, Workload

STEPS = 8
RUN = Run(
    suite="language_modeling",
    model=tiny("griffin", pattern=("rg_lru", "mqa"), num_layers=2),
    backend="jax",
    dtype="float32",
    workload=Workload(
        phase="train", batch_size=2, seq_len=16, num_steps=STEPS, num_held_out_batches=2
    ),
    data=DataConfig(name="random", source="random"),
    optimizer=OptimizerConfig(num_steps=STEPS, num_warmup_steps=1),
)
# Saves once whole; then, for every line of Python that a second save runs, a forked copy of this
# process that is killed there must leave the first checkpoint or the second.
KILLS = """
import os, signal, sys
from pathlib import Path
import numpy as np
from suites.harness import checkpoint
path = Path(sys.argv[1]) / "checkpoint"
save = lambda step: checkpoint.write(path, {"step": step}, {"x": np.full(9999, step)})
seen, kill_at = 0, 0
def trace(frame, event, argument):
    global seen
    seen += 1
    if seen == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace
found, points = {1: 0, 2: 0}, 0
while True:
    save(1)
    kill_at += 1
    if (pid := os.fork()) == 0:
        sys.settrace(trace)
        save(2)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    head, arrays = checkpoint.read(path)
    assert (arrays["x"] == head["step"]).all() and len(arrays["x"]) == 9999
    if not os.WIFSIGNALED(status):
        break
    found[head["step"]] += 1
print(found[1], found[2], head["step"])
"""


class Counting:
    """An engine whose training state is a number that grows by one a step."""

    def __init__(self):
        self.value = np.zeros(3)

    def training_state(self):
        return {"value": self.value.copy(), "step": np.array(int(self.value[0]), np.int32)}

    def load_training_state(self, state):
        self.value = state["value"]

    def step(self):
        self.value += 1


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """A process that works on RUN: what an earlier one was told or knew is gone."""
    monkeypatch.setattr(checkpoint, "_keeper", None)
    monkeypatch.setenv(checkpoint.INTERVAL_VARIABLE, "0")

    def begin(run=RUN, host="a"):
        monkeypatch.setattr(stop, "_is_told", False)
        return checkpoint.keep(tmp_path, run, {"host": host})

    return begin


def saved(keep, step=2):
    """A checkpoint after so many steps, and its file."""
    keeper, engine = keep(), Counting()
    keeper.resume(engine)
    for number in range(1, step + 1):
        engine.step()
        keeper.save_if_due(engine, number, [], [0.5, float("nan")])
    return keeper.path


def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, last = map(int, done.stdout.split())
    assert first > 30  # many points before the rename
    assert second > 0  # and some after it
    assert last == 2


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *a, **k: calls.append("rename") or rename(*a, **k))
    checkpoint.write(tmp_path / "new" / "checkpoint", {"step": 1}, {})
    assert calls == ["fsync", "rename", "fsync"]


def test_what_is_saved_is_what_is_read(tmp_path):
    arrays = {
        "a": np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "number": np.array(7, np.int32),
        "empty": np.zeros((0, 4)),
        "nan": np.array([np.nan, -0.0]),
    }
    checkpoint.write(tmp_path / "checkpoint", {"step": 3}, arrays)
    head, read = checkpoint.read(tmp_path / "checkpoint")
    assert head == {"step": 3}
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read[name], array)


def test_every_torn_or_damaged_file_is_refused(tmp_path):
    path = tmp_path / "checkpoint"
    checkpoint.write(path, {"step": 3}, {"x": np.arange(20.0)})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:n] for n in range(len(whole))]
    damaged += [whole + b"\0", b"\0" * len(whole)]
    for place in range(len(whole)):
        flipped = whole[place] ^ int(rng.integers(1, 256))
        damaged.append(whole[:place] + bytes([flipped]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="torn or damaged"):
            checkpoint.read(path)


@pytest.mark.parametrize("fault", ["torn", "code", "run", "unreadable"])
def test_what_cannot_be_trusted_is_not_used_and_the_record_says_so(keep, monkeypatch, fault):
    path = saved(keep)
    keeper, engine = keep(), Counting()
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:-1])
    elif fault == "unreadable":
        path.unlink()
        path.mkdir()
    elif fault == "code":
        monkeypatch.setattr(checkpoint.provenance, "build_key", lambda *_: "other")
    else:
        keeper.run = replace(RUN, seed=1)
    assert keeper.resume(engine) == (0, [], [])
    assert engine.value[0] == 0
    (note,) = keeper.found()["checkpoint_notes"]
    assert "started from nothing" in note
    assert len(keeper.found()["segments"]) == 1


def test_a_run_goes_on_on_another_device_of_its_kind(keep, monkeypatch):
    saved(keep)
    monkeypatch.setattr(checkpoint.provenance, "device_name", lambda kind: "another CPU")
    assert keep().resume(Counting())[0] == 2


def test_losses_that_wait_come_back_whatever_they_are(keep):
    saved(keep)
    losses = keep().resume(Counting())[2]
    np.testing.assert_array_equal(losses, [0.5, float("nan")])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_save_keeps_the_one_before_and_the_run_goes_on(keep, monkeypatch, number):
    path = saved(keep)
    before = path.read_bytes()
    keeper, engine = keep(), Counting()
    keeper.resume(engine)

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for step in (3, 4):
            engine.step()
            keeper.save_if_due(engine, step, [], [])
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint"]
    (note,) = keeper.found()["checkpoint_notes"]  # once, however often
    assert os.strerror(number) in note
    engine.step()
    keeper.save_if_due(engine, 5, [], [])
    assert checkpoint.read(path)[0]["step"] == 5


def test_a_file_that_may_not_grow_is_left_whole(tmp_path):
    """A real short write, in a process of its own: the limit is on the size of files."""
    code = f"""
import resource, signal, sys
from pathlib import Path
import numpy as np
from suites.harness import checkpoint
path = Path({str(tmp_path)!r}) / "checkpoint"
checkpoint.write(path, {{"step": 1}}, {{"x": np.zeros(9)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
try:
    checkpoint.write(path, {{"step": 2}}, {{"x": np.zeros(9999)}})
except OSError as error:
    print(error.errno, checkpoint.read(path)[0]["step"], len(list(path.parent.iterdir())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), "1", "1"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 5_000


def test_leftovers_of_a_kill_are_cleared_away_and_the_end_removes_all(keep):
    path = saved(keep)
    path.with_name(".tmp-1234").write_text("half")
    keeper = keep()
    assert keeper.resume(Counting())[0] == 2
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint"]
    keeper.remove()
    assert not path.parent.exists()


def test_nothing_is_saved_before_it_is_due(keep, monkeypatch):
    monkeypatch.setenv(checkpoint.INTERVAL_VARIABLE, "1000")
    keeper, engine = keep(), Counting()
    keeper.resume(engine)
    keeper.save_if_due(engine, 1, [], [])
    assert not keeper.path.exists()
    monkeypatch.setattr(stop, "_is_told", True)
    with pytest.raises(stop.Stopped, match="after step 2; step 2 is kept"):
        keeper.save_if_due(engine, 2, [], [])
    assert checkpoint.read(keeper.path)[0]["step"] == 2


def test_a_run_that_is_told_to_stop_on_a_full_disk_says_what_it_keeps(keep, monkeypatch):
    keeper = keep()
    keeper.resume(Counting())
    monkeypatch.setattr(stop, "_is_told", True)
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.close(10**6))  # an OSError
    with pytest.raises(stop.Stopped, match="nothing is kept"):
        keeper.save_if_due(Counting(), 1, [], [])


def test_only_segments_that_count_are_in_the_record(keep, monkeypatch):
    """The second process did a step that its death has lost."""
    for host, steps in (("a", 2), ("b", 3)):
        keeper, engine = keep(host=host), Counting()
        done, _, _ = keeper.resume(engine)
        for step in range(done + 1, steps + 1):
            keeper.save_if_due(engine, step, [], [])
        monkeypatch.setenv(checkpoint.INTERVAL_VARIABLE, "1000")
    keeper = keep(host="c")
    keeper.resume(Counting())
    keeper.step = 9
    segments = keeper.found()["segments"]
    assert [(s["host"], s["start_step"], s["end_step"]) for s in segments] == [
        ("a", 0, 2),
        ("c", 2, 9),
    ]


def trained(keep, monkeypatch, run, stop_at=()):
    """(parameters, samples, segments) of a run that is told to stop after these calls of the
    engine, in fresh engines each."""
    class_ = load_engine(run.backend)
    for calls in (*stop_at, None):
        keeper = keep(run)
        engine = class_(run.model, dtype=run.dtype, seed=run.seed)
        count = 0

        def counted(method, limit=calls):
            def call(batch):
                nonlocal count
                count += 1
                monkeypatch.setattr(stop, "_is_told", limit is not None and count >= limit)
                return method(batch)

            return call

        monkeypatch.setattr(engine, "train_step", counted(engine.train_step))
        monkeypatch.setattr(engine, "evaluate", counted(engine.evaluate))
        samples = []
        if calls is None:
            samples = list(language_modeling.measure(run, engine))
        else:
            with pytest.raises(stop.Stopped):
                samples.extend(language_modeling.measure(run, engine))
    found = keeper.found()["segments"]
    keeper.remove()
    kept = [sample for sample in samples if sample.metric != "peak_memory_bytes"]
    return engine.parameters(), kept, found


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_run_ends_as_one_that_was_not(keep, monkeypatch, backend):
    """Bit for bit, wherever it stops: at a step, as its curve is probed, in evaluation, and time
    and again."""
    monkeypatch.setattr(train, "NUM_TRAIN_SAMPLES", 3)  # some losses wait at a stop
    monkeypatch.setenv(checkpoint.INTERVAL_VARIABLE, "1000")
    run = replace(RUN, backend=backend)
    whole, samples, (segment,) = trained(keep, monkeypatch, run)
    assert (segment["start_step"], segment["end_step"]) == (0, STEPS)
    num_probes = sum(sample.metric == "held_out_loss" for sample in samples)
    stops = [(1,), (3,), (7,), (STEPS,), (STEPS + num_probes + 1,), (2, 1, 3, 1)]
    for stop_at in stops:
        again, also, segments = trained(keep, monkeypatch, run, stop_at)
        assert also == samples, stop_at
        assert len(segments) == len(stop_at) + 1
        assert segments[-1]["end_step"] == STEPS
        for name, value in whole.items():
            np.testing.assert_array_equal(again[name], value, err_msg=f"{stop_at} {name}")


class Killed(BaseException):
    """Nothing that a run could catch, or write a checkpoint at."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_run_ends_as_one_that_was_not(keep, monkeypatch, backend):
    """Bit for bit, with what a suite asks at the points of the curve: killed in any step and in
    evaluation, though the steps since the last checkpoint are lost."""
    monkeypatch.setattr(train, "NUM_TRAIN_SAMPLES", 3)
    run, clock, class_ = replace(RUN, backend=backend), [0], load_engine(backend)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv(checkpoint.INTERVAL_VARIABLE, "3")  # steps, on this clock

    def measured(kill_at):
        keep(run)
        engine, calls = class_(run.model, seed=run.seed), []

        def counted(method):
            def call(batch):
                calls.append(batch)
                if len(calls) == kill_at:
                    raise Killed
                clock[0] += 1
                return method(batch)

            return call

        monkeypatch.setattr(engine, "train_step", counted(engine.train_step))
        monkeypatch.setattr(engine, "evaluate", counted(engine.evaluate))
        first = next(language_modeling.batches(run))

        def probe(step):
            yield measure.sample("accuracy", engine.logits(first).mean(), at=step)

        def samples():
            curve = yield from train.train(
                run, engine, lambda done: language_modeling.batches(run, done), probe
            )
            held_out = [first, first]
            for _, nll_BT in train.scored(run, engine, held_out, 2, curve):
                yield measure.sample("loss", nll_BT.mean())

        return list(samples()), engine

    whole, engine = measured(None)
    assert [s.at for s in whole if s.metric == "accuracy"] == [2, 4, 6, 8]
    checkpoint._keeper.remove()
    for kill_at in range(1, STEPS + 3):
        with pytest.raises(Killed):
            measured(kill_at)
        with pytest.raises(Killed):
            measured(2)  # and once more, soon after it went on
        again, other = measured(None)
        start = checkpoint._keeper.start_step
        assert start == (min(kill_at - 1, STEPS) // 3) * 3 or kill_at > STEPS
        assert again == whole, kill_at
        for name, value in engine.training_state().items():
            np.testing.assert_array_equal(other.training_state()[name], value, err_msg=name)
        checkpoint._keeper.remove()


def test_the_signal_sets_a_flag_and_no_more():
    code = """
import os, signal
from suites.harness import stop
stop.listen()
stop.check()
os.kill(os.getpid(), signal.SIGUSR2)
try:
    stop.check()
except stop.Stopped as error:
    print(stop.is_told(), error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"True told to stop ({signal.SIGUSR2.name})"


# Trained parameters in a folder: cluster.keeps_parameters=true leaves them, checkpoint=DIR takes
# them.


@pytest.fixture
def left(keep, monkeypatch):
    """The folder that a whole run leaves, its engine, and what it measured."""
    monkeypatch.setenv(trained_parameters.KEEP_VARIABLE, "1")
    monkeypatch.setenv(checkpoint.INTERVAL_VARIABLE, "1000")
    keeper = keep()
    engine = load_engine(RUN.backend)(RUN.model)
    samples = list(language_modeling.measure(RUN, engine))
    keeper.remove()
    return keeper.folder, engine, samples


def settings_of(**values):
    suite = {"name": "language_modeling", "num_steps": STEPS, "batch_size": 2, "seq_len": 16,
             "num_held_out_batches": 2, "activation_checkpointing": False, "num_devices": 1,
             "rounds": 1, "seeds": [0, 1, 2]}  # fmt: skip
    return {
        "suite": suite, "model": asdict(RUN.model), "kernels": {}, "data": asdict(RUN.data),
        "optimizer": {}, "dtype": "float32", "device_kind": "cpu", "backend": "jax",
    } | values  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_from_a_checkpoint_measures_what_its_training_did(left, backend):
    folder, engine, samples = left
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    (run,) = plan.expand(settings_of(checkpoint=str(folder), backend=backend))
    assert (run.workload.num_steps, run.workload.phase) == (0, "evaluate")
    other = load_engine(backend)(run.model, seed=9)
    again = list(language_modeling.measure(run, other))
    for name, value in engine.parameters().items():
        np.testing.assert_array_equal(other.parameters()[name], value)
    found, expected = (
        {(s.metric, s.at): s.value for s in made if s.metric.startswith(("loss", "bits"))}
        for made in (again, samples)
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert not any(sample.metric == "train_loss" for sample in again)


def test_a_run_is_known_by_what_its_checkpoint_holds(left, tmp_path):
    folder, engine, _ = left
    (run,) = plan.expand(settings_of(checkpoint=str(folder)))
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run
    (without, *_) = plan.expand(settings_of())
    assert without.run_id != run.run_id
    assert "checkpoint" not in without.to_json()  # runs from before keep their ids
    (trains_otherwise,) = plan.expand(
        settings_of(checkpoint=str(folder), optimizer={"learning_rate": 1.0})
    )
    assert trains_otherwise.run_id == run.run_id
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert next(plan.expand(settings_of(checkpoint=str(moved)))).run_id == run.run_id
    values = engine.parameters()
    values["final_norm.scale"] = values["final_norm.scale"] + 1
    parameters.save(moved / "model.safetensors", values)
    (changed,) = plan.expand(settings_of(checkpoint=str(moved)))
    assert {changed.run_id, changed.cell_id}.isdisjoint({run.run_id, run.cell_id})


def test_a_checkpoint_that_has_changed_since_the_plan_is_not_measured(left):
    folder, engine, _ = left
    (run,) = plan.expand(settings_of(checkpoint=str(folder)))
    values = engine.parameters()
    values["final_norm.scale"] = values["final_norm.scale"] + 1
    parameters.save(folder / "model.safetensors", values)
    with pytest.raises(ValueError, match="has changed since this run was planned"):
        list(language_modeling.measure(run, engine))


def test_what_is_no_checkpoint_or_another_models_is_named(left, tmp_path):
    folder, _, _ = left

    def refused(settings, message):
        with pytest.raises(ValueError, match=message):
            list(plan.expand(settings))

    refused(settings_of(checkpoint=str(tmp_path / "none")), "no such folder")
    (tmp_path / "empty").mkdir()
    refused(settings_of(checkpoint=str(tmp_path / "empty")), r"has no config\.json")
    wide = asdict(replace(RUN.model, d_mlp=RUN.model.d_mlp * 2, window_size=7))
    refused(
        settings_of(checkpoint=str(folder), model=wide), "another model: it has d_mlp=.* 1 more"
    )
    suite = {"name": "parity"}
    refused(settings_of(checkpoint=str(folder), suite=settings_of()["suite"] | suite), "parity")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("[]")
    refused(settings_of(checkpoint=str(folder)), r"config\.json is no model's")
    (folder / "config.json").write_text(config)
    whole = (folder / "model.safetensors").read_bytes()
    for torn in (whole[:-1], whole[:100], b""):
        (folder / "model.safetensors").write_bytes(torn)
        refused(settings_of(checkpoint=str(folder)), "torn or no safetensors")


def test_nothing_is_left_where_nobody_asked_for_it(keep, monkeypatch):
    monkeypatch.delenv(trained_parameters.KEEP_VARIABLE, raising=False)
    keeper = keep()
    list(language_modeling.measure(RUN, load_engine(RUN.backend)(RUN.model)))
    assert keeper.path.exists()
    keeper.remove()
    assert not keeper.folder.exists()
