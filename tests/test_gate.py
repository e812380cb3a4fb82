"""No speed without parity: which proxy verifies what, that it runs first, and never twice."""

import json
from dataclasses import replace

import pytest
from synthetic_records import parity, training

from analysis import checks, derive
from analysis.load import _digests, frame_of
from suites import commands, compose, gate
from suites.__main__ import main
from suites.harness import plan
from suites.harness.execute import Task, new_attempt, seen
from suites.harness.record import read_all, write
from suites.harness.sweep import Result
from suites.ladder import plan as ladder

BIG = ("suite=training_speed", "family=hawk,griffin", "size=400m", "suite.rounds=2",
       "suite.seq_lens=[256]")  # fmt: skip


def runs_of(*overrides):
    settings = compose.read(overrides, bare=compose.BARE_PLAN).settings
    return [run for made in settings for run in plan.expand(made)]


def ids(runs):
    return [run.run_id for run in runs]


class Aerie:
    """The command on a store, where runs end at once: as `ends` says by run id, else completed.
    `started` are the runs of the last command, in their order."""

    def __init__(self, store, capsys):
        self.store, self.capsys = store, capsys
        self.ends, self.started = {}, []

    def __call__(self, *arguments):
        self.started = []
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--results", str(self.store)])
        return ended.value.code or 0, *self.capsys.readouterr()

    def sweep(self, store, todo, cluster, **_):
        for item in todo:
            task = Task(run=item.run, build=item.build, attempt=new_attempt(), parent_pid=0)
            end = self.ends.get(item.run.run_id, "completed")
            write(store, task.record(end, provenance=seen(item.run), started_at="", seconds=0.0))
            self.started.append(item.run)
        outcomes = {run.run_id: self.ends.get(run.run_id, "completed") for run in self.started}
        return Result(outcomes=outcomes, num_started=len(todo))


@pytest.fixture
def aerie(tmp_path, capsys, monkeypatch):
    made = Aerie(tmp_path, capsys)
    monkeypatch.setattr(commands, "sweep", made.sweep)
    for name in ("write", "print_side_by_side"):  # most of the time, and nothing of the gate
        monkeypatch.setattr(commands.reports, name, lambda *_, **__: None)
    return made


# proxies


def test_a_proxy_is_tiny_with_the_measured_head_dim():
    (big,), (tiny,) = runs_of("size=400m"), runs_of("size=tiny")
    (proxy,) = gate.proxies([big])
    assert big.model.head_dim != tiny.model.head_dim
    assert proxy.model == replace(tiny.model, head_dim=big.model.head_dim)
    assert (proxy.suite, proxy.dtype, proxy.seed, proxy.round) == ("parity", big.dtype, 0, 0)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["family=mqa,mqa_local,hawk", "size=100m,7b"],
        ["size=recurrentgemma_2b"],
        ["settings=released", "size=1b"],
        ["model.window_size=null", "size=100m"],
        ["model.num_kv_heads=4"],
        ["model.num_kv_heads=12", "size=400m"],
        ["model.num_kv_heads=2,3,4,6", "size=400m"],
        ["model.num_kv_heads=4", "model.num_heads=36", "size=400m"],
        ["model.num_heads=1"],
        ["model.conv_width=2", "model.biases=false", "model.d_rnn=130", "model.num_gate_blocks=5"],
        ["data=tokens", "data.paths=[x.bin]", "optimizer.learning_rate=1.0"],
        ["device_kind=h200", "dtype=float32", "kernels.linear_scan=triton", "backend=torch"],
    ],
    ids=" ".join,
)
def test_a_proxy_has_the_parity_key_of_what_it_verifies(overrides):
    key = ("family", "backend", "dtype", "kernels", "device_kind")
    for run in runs_of(*overrides):
        (proxy,) = gate.proxies([run])
        one, other = run.to_json(), proxy.to_json()
        assert _digests(one)["architecture"] == _digests(other)["architecture"]
        assert all(one.get(name) == other.get(name) for name in key)
        assert one["model"]["family"] == other["model"]["family"]
        assert other["model"]["size"] == checks.PARITY_SIZE
        assert proxy.model.d_model == 64


def test_at_tiny_the_proxies_are_the_runs_of_aerie_parity():
    settings = ("size=tiny", "family=mqa,mqa_local,hawk,griffin", "backend=jax,torch",
                "settings=paper,released", "model.num_kv_heads=1,2,4")  # fmt: skip
    measured = runs_of("suite=decode_latency,language_modeling", "dtype=float32", *settings)
    asked = ladder.gate([*settings, "dtype=float32", "kernels.linear_scan=auto"])
    assert len(asked) == 4 * 2 * 2 * 3
    assert sorted(ids(gate.proxies(measured))) == sorted(ids(asked))


def test_the_quickstart_has_its_proxies_among_its_runs(tmp_path):
    runs = runs_of("experiment=quickstart")
    own = [run.run_id for run in runs if run.suite == "parity"]
    assert sorted(ids(gate.proxies(runs))) == sorted(own)
    planned = plan.plan(tmp_path, runs)
    assert gate.ahead(tmp_path, planned, planned) == []


def test_parity_of_another_head_dim_leaves_a_speed_unverified():
    speed = training("griffin", "jax", 0, model={"size": "400m", "head_dim": 128})
    for head_dim, want in ((16, "none"), (128, "green")):
        frame = frame_of([parity("griffin", "jax", model={"head_dim": head_dim}), speed])
        assert set(derive.summary(frame)["parity"]) == {want}


# running


def test_missing_proxies_run_before_all_else_and_once(aerie):
    code, _, err = aerie("run", *BIG, "suite=parity,training_speed", "dtype=float32")
    assert code == 0
    assert "2 parity proxies run first: speeds without them would be UNVERIFIED." in err
    assert [run.suite for run in aerie.started] == ["parity"] * 6 + ["training_speed"] * 4
    assert [run.model.size for run in aerie.started] == ["tiny"] * 2 + ["400m"] * 8
    code, _, err = aerie("run", *BIG, "suite.rounds=3")
    assert (code, [run.round for run in aerie.started]) == (0, [2, 2])
    assert "prox" not in err
    assert aerie("run", *BIG)[0] == 0
    assert aerie.started == []


def test_proxies_are_counted_apart(aerie):
    _, out, _ = aerie("plan", *BIG)
    assert "4 runs, 4 would start" in out
    assert "aerie run adds 2 parity proxies" in out
    assert len(json.loads(aerie("plan", *BIG, "--json")[1])) == 4
    _, out, _ = aerie("run", *BIG)
    assert "4 runs: 4 completed." in out
    assert "2 parity proxies: 2 completed." in out
    told = json.loads(aerie("run", *BIG, "--json")[1])
    assert told["num_runs"] == len(told["runs"]) == 4
    assert {row["outcome"] for row in told["proxies"]} == {"completed"}
    assert {row["suite"] for row in told["proxies"]} == {"parity"}
    assert "prox" not in aerie("plan", *BIG)[1]


def test_a_red_proxy_is_told_and_not_repeated(aerie):
    griffin = gate.proxies(runs_of(*BIG))[1]
    aerie.ends = {griffin.run_id: "invalid_measurement"}
    for num_started in (6, 0):
        code, out, _ = aerie("run", *BIG)
        assert (code, len(aerie.started)) == (1, num_started)
        assert "2 parity proxies: 1 completed, 1 invalid_measurement." in out
        assert "Speeds of griffin jax float32 stay UNVERIFIED" in out
    aerie.ends = {}
    asked = ("suite=parity", "family=griffin", "model.head_dim=128")
    assert aerie("run", *asked)[0] == 0
    assert ids(aerie.started) == [griffin.run_id]
    assert aerie("run", *BIG)[0] == 0
    assert aerie.started == []


def test_a_stale_proxy_runs_again_for_speeds_that_are_current(aerie):
    aerie("run", *BIG)
    for record in read_all(aerie.store):
        if record.run["suite"] == "parity":
            write(aerie.store, replace(record, build="older.code"))
    assert aerie("run", *BIG)[0] == 0
    assert [run.suite for run in aerie.started] == ["parity"] * 2
    for record in read_all(aerie.store):
        write(aerie.store, replace(record, build="older.code"))
    _, _, err = aerie("run", *BIG)  # no speed of this build is there, or asked for
    assert aerie.started == []
    assert "4 stale" in err
    aerie("run", *BIG, "--rerun-stale")
    assert [run.suite for run in aerie.started] == ["parity"] * 2 + ["training_speed"] * 4


def test_parity_that_was_asked_for_and_is_stale_runs_where_a_speed_needs_it(aerie):
    both = ("suite=parity,training_speed", "family=hawk", "size=tiny", "suite.seq_lens=[112]")
    aerie("run", *both, "suite.rounds=1")
    for record in read_all(aerie.store):
        write(aerie.store, replace(record, build="older.code"))
    code, _, err = aerie("run", *both, "suite.rounds=2")
    assert code == 0
    assert [run.suite for run in aerie.started] == ["parity", "parity", "training_speed"]
    assert "1 stale" in err
