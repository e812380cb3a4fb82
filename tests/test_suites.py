"""Each suite: its configuration, the workloads it lists, and the samples it takes of an engine.

A fake engine with a clock of its own makes every time exact; real engines then run each suite
once, very small.
"""

import json
import math
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import BACKENDS, tiny

from implementations import cost
from implementations.config import build
from implementations.engine import IGNORED, OptimizerConfig, load_engine
from suites import decode_throughput, language_modeling
from suites.harness import data, measure, train
from suites.harness.measure import Diverged, InvalidMeasurement
from suites.harness.run import DataConfig, Run

CONFIGS = Path(__file__).parents[1] / "configs" / "suite"
TIMING = (
    "training_speed",
    "prefill_latency",
    "decode_latency",
    "decode_throughput",
    "kernel_speed",
)
SUITES = (*TIMING, "language_modeling", "parity")
SMALL = {
    "training_speed": {"seq_lens": [8, 16], "tokens_per_step": 32, "repeats": 2},
    "prefill_latency": {"prompt_lens": [8], "batch_sizes": [2], "repeats": 2},
    "decode_latency": {"prompt_lens": [8], "num_new_tokens": [5], "repeats": 2},
    "decode_throughput": {
        "prompt_lens": [8],
        "num_new_tokens": [5],
        "repeats": 2,
        "max_batch_size": 2,
    },
    "kernel_speed": {"batch_size": 2, "seq_lens": [8], "repeats": 2},
    "language_modeling": {"num_steps": 4, "batch_size": 2, "seq_len": 16},
    "parity": {"seq_lens": [28], "num_new_tokens": 4},
}
MODEL = tiny(
    "griffin",
    pattern=("rg_lru", "mqa"),
    num_layers=2,
    window_size=8,
    d_model=16,
    d_rnn=24,
    d_mlp=32,
    num_heads=2,
    head_dim=8,
)
RANDOM = DataConfig(name="random", source="random")


def suite_of(name, **settings):
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | settings
    assert values.pop("name") == name
    return build(import_module(f"suites.{name}").Suite, values, f"configs/suite/{name}.yaml")


def run_of(name, backend="torch", dtype="float32", **settings):
    suite = suite_of(name, **(SMALL[name] | settings))
    work = next(suite.workloads())
    return Run(
        suite=name,
        model=MODEL,
        backend=backend,
        dtype=dtype,
        workload=work,
        data=RANDOM,
        optimizer=suite.optimizer(OptimizerConfig(), work),
    )


def samples_of(run, engine):
    return list(import_module(f"suites.{run.suite}").measure(run, engine))


def taken(run, engine):
    """(samples, error): what a run yields until an end that is not completion."""
    samples = []
    try:
        for sample in import_module(f"suites.{run.suite}").measure(run, engine):
            samples.append(sample)
    except InvalidMeasurement as error:
        return samples, error
    return samples, None


def values_of(samples, metric, **where):
    return [
        s.value
        for s in samples
        if s.metric == metric and all(getattr(s, k) == v for k, v in where.items())
    ]


class FakeEngine:
    """Work takes exact time on a clock that only it moves, and only once synchronized."""

    device_name = "cpu"
    num_devices = 1
    resolved_kernels = {}  # noqa: RUF012

    def __init__(self, monkeypatch, *, memory=10**12, loss=1.0):
        self.now, self.pending, self.calls = 0.0, 0.0, Counter()
        self.memory, self.loss = memory, loss
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure, "measured_flops_per_s", lambda dtype: 1e12)
        monkeypatch.setattr(measure, "measured_bytes_per_s", lambda: 1e12)

    def work(self, kind, seconds):
        """The first call of a kind takes 10 s more."""
        self.calls[kind] += 1
        self.pending += seconds + (10.0 if self.calls[kind] == 1 else 0.0)

    def synchronize(self):
        self.now, self.pending = self.now + self.pending, 0.0

    def start_training(self, optimizer, *, activation_checkpointing=False):
        self.optimizer = optimizer

    def train_step(self, batch):
        self.work("train", 0.5)
        return self.loss

    def evaluate(self, batch):
        return np.where(batch.targets_BT == IGNORED, 0.0, 2.0).astype(np.float32)

    def prefill(self, prompt_BT, *, capacity, chunk_len=None):
        B = len(prompt_BT)
        if self.memory < B:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating the cache")
        self.work("prefill", 0.25)
        return np.zeros(B, np.int32), [B * capacity]

    def decode(self, token_B, cache, *, num_tokens):
        assert cache, "the cache was used up by another decode"
        cache.clear()
        self.work(f"decode {len(token_B)}", 0.125 * num_tokens)
        return np.zeros((len(token_B), num_tokens), np.int32), cache

    def prepare_op(self, name, inputs, doutputs=None):
        return lambda: self.work("op", 0.125 if doutputs is None else 0.25)

    def num_bytes(self, cache):
        return cache[0]

    def peak_memory_bytes(self):
        return 77


# What a suite lists.


@pytest.mark.parametrize("name", SUITES)
def test_configuration_builds_strictly(name):
    suite = suite_of(name)
    assert suite.rounds >= 1
    assert suite.seeds
    assert suite.is_timing == (name in TIMING)
    assert list(suite.workloads())
    for workload in suite.workloads():
        assert suite.optimizer(OptimizerConfig(), workload).num_steps >= workload.num_steps
    with pytest.raises(ValueError, match="Did you mean 'rounds'"):
        suite_of(name, round=3)


def test_tokens_per_step_are_constant():
    suite = suite_of("training_speed", seq_lens=[256, 512, 1024], tokens_per_step=2048)
    assert [w.batch_size for w in suite.workloads()] == [8, 4, 2]
    assert {w.batch_size * w.seq_len for w in suite.workloads()} == {2048}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("training_speed", {"tokens_per_step": 128}, "tokens_per_step=128 is less than one"),
        ("training_speed", {"repeats": 0}, "repeats=0"),
        ("prefill_latency", {"prompt_lens": [0]}, "prompt_lens"),
        ("decode_latency", {"num_new_tokens": [1]}, "num_new_tokens"),
        ("decode_throughput", {"batch_size": 8, "max_batch_size": 4}, "max_batch_size=4"),
        ("kernel_speed", {"ops": ["rglru"]}, "Did you mean 'rg_lru'"),
        ("kernel_speed", {"phases": ["decode"]}, "decode"),
        ("kernel_speed", {"seq_lens": [0]}, "seq_lens"),
        ("kernel_speed", {"repeats": 0}, "repeats=0"),
        ("language_modeling", {"num_steps": 0}, "num_steps=0"),
        ("parity", {"seq_lens": [8], "num_new_tokens": 8}, "must exceed"),
    ],
)
def test_a_wrong_setting_is_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        suite_of(name, **settings)


def test_every_combination_is_a_workload():
    suite = suite_of(
        "decode_latency", batch_sizes=[1, 2], prompt_lens=[8, 16], num_new_tokens=[4, 8]
    )
    listed = {(w.batch_size, w.prompt_len, w.num_new_tokens) for w in suite.workloads()}
    assert len(listed) == 8


def test_the_schedule_of_language_modeling_ends_with_it():
    suite = suite_of("language_modeling", num_steps=50)
    optimizer = suite.optimizer(OptimizerConfig(), next(suite.workloads()))
    assert (optimizer.num_steps, optimizer.num_warmup_steps) == (50, 5)


# What a suite measures, on a clock that is exact.


def test_training_speed_is_exact(monkeypatch):
    engine = FakeEngine(monkeypatch)
    run = run_of("training_speed")
    samples = samples_of(run, engine)
    assert values_of(samples, "step_time_ms") == [500.0, 500.0]
    assert values_of(samples, "tokens_per_s") == [64.0, 64.0]  # 32 tokens in 0.5 s
    assert values_of(samples, "first_step_time_ms") == [10_500.0]
    assert values_of(samples, "compile_time_s") == [10.0]
    assert values_of(samples, "peak_memory_bytes") == [77]
    mfu = cost.train_flops_per_token(MODEL, 8) * 64 / 1e12
    np.testing.assert_allclose(values_of(samples, "mfu"), [mfu, mfu], rtol=1e-12)
    assert values_of(samples, "peak_flops_per_s", field="measured") == [1e12]
    assert engine.calls["train"] == 1 + 2 + 2  # first, warm-up, repeats


def test_an_impossible_speed_is_refused_and_its_times_kept(monkeypatch):
    engine = FakeEngine(monkeypatch)
    monkeypatch.setattr(measure, "measured_flops_per_s", lambda dtype: 1.0)
    samples, error = taken(run_of("training_speed"), engine)
    assert isinstance(error, InvalidMeasurement)
    assert "above 1" in str(error)
    assert len(values_of(samples, "step_time_ms")) == 2


def test_a_step_that_computes_nonsense_is_no_speed(monkeypatch):
    with pytest.raises(InvalidMeasurement, match="nan"):
        samples_of(run_of("training_speed"), FakeEngine(monkeypatch, loss=math.nan))


def test_prefill_latency_is_exact(monkeypatch):
    samples = samples_of(run_of("prefill_latency"), FakeEngine(monkeypatch))
    assert values_of(samples, "ttft_ms") == [250.0, 250.0]
    assert values_of(samples, "compile_time_s") == [10.0]
    assert values_of(samples, "cache_bytes") == [2 * (8 + 1)]


def test_decode_latency_leaves_prefill_out(monkeypatch):
    engine = FakeEngine(monkeypatch)
    run = run_of("decode_latency")
    samples = samples_of(run, engine)
    assert values_of(samples, "decode_time_s") == [0.5, 0.5]  # 5 tokens are 4 decode steps
    assert values_of(samples, "tpot_ms") == [125.0, 125.0]
    assert values_of(samples, "compile_time_s") == [10.0]
    moved = [
        cost.decode_bytes(MODEL, batch_size=1, context=c, dtype="float32") for c in range(8, 12)
    ]
    mbu = np.mean(moved) / 0.125 / 1e12
    np.testing.assert_allclose(values_of(samples, "mbu"), [mbu, mbu], rtol=1e-12)
    assert engine.calls["prefill"] == 3  # a fresh one for every decode


def test_throughput_doubles_the_batch_to_its_bound(monkeypatch):
    samples = samples_of(run_of("decode_throughput", max_batch_size=5), FakeEngine(monkeypatch))
    assert values_of(samples, "max_batch_size", field="bound") == [4]
    for batch_size in (1, 2, 4):
        assert values_of(samples, "tokens_per_s", at=batch_size) == [8.0 * batch_size] * 2


def test_throughput_ends_where_memory_does(monkeypatch):
    """An out-of-memory that the search meets is its result; one at its start is not."""
    run = run_of("decode_throughput", batch_size=1, max_batch_size=64)
    samples = samples_of(run, FakeEngine(monkeypatch, memory=5))
    assert values_of(samples, "max_batch_size", field="out_of_memory") == [4]
    assert not values_of(samples, "tokens_per_s", at=8)
    with pytest.raises(RuntimeError, match="Out of memory"):
        samples_of(run, FakeEngine(monkeypatch, memory=0))


def test_throughput_does_not_try_what_cannot_fit(monkeypatch):
    engine = FakeEngine(monkeypatch)
    run = run_of("decode_throughput", batch_size=1, max_batch_size=64)
    room = cost.inference_memory_bytes(
        MODEL, batch_size=2, prompt_len=8, capacity=13, dtype="float32"
    )
    monkeypatch.setattr(decode_throughput, "available_memory_bytes", lambda engine: room)
    samples = samples_of(run, engine)
    assert values_of(samples, "max_batch_size", field="out_of_memory_predicted") == [2]
    assert engine.calls["decode 4"] == 0


def test_another_error_is_not_taken_for_the_end_of_memory(monkeypatch):
    engine = FakeEngine(monkeypatch)

    def decode(token_B, cache, *, num_tokens):
        if len(token_B) > 1:
            raise RuntimeError("shapes do not match")
        return FakeEngine.decode(engine, token_B, cache, num_tokens=num_tokens)

    engine.decode = decode
    with pytest.raises(RuntimeError, match="shapes"):
        samples_of(run_of("decode_throughput"), engine)


def test_language_modeling_scores_every_target_once(monkeypatch):
    heard = []
    measure.on_progress(lambda *at: heard.append(at))
    try:
        samples = samples_of(run_of("language_modeling"), FakeEngine(monkeypatch, loss=3.0))
    finally:
        measure.on_progress(None)
    assert values_of(samples, "train_loss") == [3.0] * 4
    assert values_of(samples, "train_loss", at=4) == [3.0]
    assert values_of(samples, "loss") == [2.0]
    bytes_per_token = data.open_corpus(RANDOM).bytes_per_token
    if bytes_per_token is not None:
        expected = 2.0 / math.log(2) / bytes_per_token
        np.testing.assert_allclose(values_of(samples, "bits_per_byte"), [expected])
    assert (4, 4) in heard
    assert heard[-1][0] == heard[-1][1]  # evaluation says so too


def test_a_running_training_says_its_last_loss(monkeypatch, tmp_path):
    """Also of a step between two points of its curve."""
    said, say = [], measure.progress
    monkeypatch.setattr(train, "progress", lambda *at: (said.append(at), say(*at)))
    measure.begin(tmp_path / "phase.json")
    try:
        engine = FakeEngine(monkeypatch)
        losses = iter(range(100, 300))
        engine.train_step = lambda batch: float(next(losses))
        samples_of(run_of("language_modeling", num_steps=150), engine)
        measure.phase("write")
        kept = json.loads((tmp_path / "phase.json").read_text())
    finally:
        measure.begin(None)
    assert said[:4] == [(1, 150, None), (2, 150, None), (3, 150, 101.0), (4, 150, 101.0)]
    assert kept["loss"] == 248.0  # steps 148 to 150


def test_the_held_out_loss_is_asked_of_the_same_text_at_25_points(monkeypatch):
    engine = FakeEngine(monkeypatch, loss=3.0)
    run = run_of("language_modeling", num_steps=250, num_held_out_batches=16)
    asked = []

    def evaluate(batch):
        asked.append(batch.tokens_BT.tobytes())
        return np.full(batch.targets_BT.shape, 2.0)

    engine.evaluate = evaluate
    found = [s for s in samples_of(run, engine) if s.metric == "held_out_loss"]
    assert [s.at for s in found] == list(range(10, 251, 10))
    assert {s.value for s in found} == {2.0}
    assert len(asked) == 25 * 2 + 16  # a batch in each hundred steps
    assert len({tuple(asked[i : i + 2]) for i in range(0, 50, 2)}) == 1


def test_n_grams_are_of_bytes_alone(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i} is a line of text\n" for i in range(900)))
    monkeypatch.setenv("AERIE_CACHE", str(tmp_path / "cache"))
    text = DataConfig(name="text", source="text", paths=(str(tmp_path / "a.txt"),))
    run = replace(run_of("language_modeling"), data=text)
    (bits,) = values_of(samples_of(run, FakeEngine(monkeypatch)), "ngram_bits_per_byte")
    assert 0 < bits < 8
    assert not values_of(samples_of(run_of("language_modeling"), FakeEngine(monkeypatch)),
                         "ngram_bits_per_byte")  # fmt: skip


def test_loss_by_position_is_bucketed_by_powers_of_two():
    position = np.arange(9)
    found = dict(language_modeling.loss_by_position(position.astype(float), position))
    assert found == {0: 0.0, 1: 1.0, 2: 2.5, 4: 5.5, 8: 8.0}


def test_a_diverged_run_says_at_which_step(monkeypatch):
    engine = FakeEngine(monkeypatch)
    losses = iter([1.0, 1.0, math.nan, 1.0])
    engine.train_step = lambda batch: next(losses)
    with pytest.raises(Diverged, match="nan at training step 3"):
        samples_of(run_of("language_modeling"), engine)


# Real engines.

HEADLINE = {
    "training_speed": "step_time_ms",
    "prefill_latency": "ttft_ms",
    "decode_latency": "tpot_ms",
    "decode_throughput": "tokens_per_s",
    "kernel_speed": "op_time_ms",
    "language_modeling": "loss",
}


@pytest.mark.parametrize("name", [*TIMING, "language_modeling"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_engine_runs_the_suite(monkeypatch, backend, name):
    monkeypatch.setattr(measure, "measured_flops_per_s", lambda dtype: 1e13)  # saves a second
    monkeypatch.setattr(measure, "measured_bytes_per_s", lambda: 1e11)
    run = run_of(name, backend)
    samples = samples_of(run, load_engine(backend)(MODEL, seed=0))
    assert all(math.isfinite(s.value) for s in samples)
    found = values_of(samples, HEADLINE[name])
    assert found
    assert min(found) > 0
