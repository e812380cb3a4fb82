"""The suite `recall`: what it counts as right, when it stops, and that it goes on as it began."""

import math
from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import BACKENDS, PATTERNS
from test_suites import suite_of

from implementations import cost
from implementations.config import ModelConfig
from implementations.engine import IGNORED, OptimizerConfig, load_engine
from suites import compose, recall
from suites.harness import checkpoint, execute, plan, stop, tasks
from suites.harness.measure import Diverged
from suites.harness.run import DataConfig, Run

INDUCTION = DataConfig(name="induction_heads", source="induction_heads", vocab_size=5)
COPYING = DataConfig(
    name="selective_copying", source="selective_copying", vocab_size=6, num_items=2
)
SMALL = {
    "num_steps": 8, "batch_size": 2, "seq_len": 12, "evaluated_seq_lens": [8, 24],
    "num_examples": 6,
}  # fmt: skip
MODEL = ModelConfig(
    family="griffin", size="synthetic", pattern=PATTERNS["griffin"], d_model=16, d_rnn=16,
    d_mlp=32, num_layers=3, num_heads=2, head_dim=8, num_gate_blocks=4, window_size=8,
    vocab_size=6,
)  # fmt: skip


def run_of(data=INDUCTION, backend="torch", **settings):
    suite = suite_of("recall", **(SMALL | settings))
    work = next(suite.workloads())
    return Run(
        suite="recall",
        model=MODEL,
        backend=backend,
        dtype="float32",
        workload=work,
        data=data,
        optimizer=suite.optimizer(OptimizerConfig(), work),
    )


def found(samples, metric):
    """{at: value} of a metric."""
    return {one.at: one.value for one in samples if one.metric == metric}


class Oracle:
    """Knows every answer, and gives a wrong one in place of those that `wrong` names: by look,
    {example: how many of its tokens}."""

    device_name = "cpu"
    resolved_kernels = {"attention": "fused"}  # noqa: RUF012

    def __init__(self, wrong=lambda step, example: 0, loss=lambda step: 1.0):
        self.wrong, self.loss, self.step, self.shown = wrong, loss, 0, []

    def start_training(self, optimizer, *, activation_checkpointing=False):
        self.step = 0

    def train_step(self, batch):
        self.step += 1
        return self.loss(self.step)

    def logits(self, batch):
        self.shown.append(batch.tokens_BT.shape)
        answers_BT = np.where(batch.targets_BT == IGNORED, 0, batch.targets_BT)
        for row in range(len(answers_BT)):
            seen = sum(B for B, T in self.shown[:-1] if batch.tokens_BT.shape[1] == T)
            example = (seen + row) % SMALL["num_examples"]
            asked = np.flatnonzero(batch.targets_BT[row] != IGNORED)
            answers_BT[row, asked[: self.wrong(self.step, example)]] = 0
        return np.eye(MODEL.vocab_size, dtype=np.float32)[answers_BT]

    def synchronize(self):
        pass

    def peak_memory_bytes(self):
        return 77


def test_accuracy_is_of_whole_answers_and_token_accuracy_of_tokens():
    """Of 6 examples of 2 tokens one has one wrong, one both: 4 of 6 answers, 9 of 12 tokens."""
    engine = Oracle(wrong=lambda step, example: {1: 1, 4: 2}.get(example, 0))
    samples = list(recall.measure(run_of(COPYING), engine))
    steps = set(range(1, 9))
    assert found(samples, "accuracy") == dict.fromkeys(steps, 4 / 6)
    assert found(samples, "token_accuracy") == dict.fromkeys(steps, 9 / 12)
    assert found(samples, "accuracy_by_length") == {8: 4 / 6, 24: 4 / 6}
    assert found(samples, "token_accuracy_by_length") == {8: 9 / 12, 24: 9 / 12}
    assert found(samples, "accuracy_over_lengths") == {None: pytest.approx(4 / 6)}
    assert found(samples, "train_loss") == dict.fromkeys(steps, 1.0)
    assert found(samples, "num_examples") == {None: 6}
    assert found(samples, "peak_memory_bytes") == {None: 77}


def test_what_is_right_where_nothing_is_asked_does_not_count():
    """A model that always answers 0: what is IGNORED is no answer."""
    engine = Oracle(wrong=lambda step, example: 2)
    samples = list(recall.measure(run_of(COPYING), engine))
    assert set(found(samples, "token_accuracy").values()) == {0.0}


def test_training_stops_when_three_looks_in_succession_find_no_mistake():
    """Right from step 4 on, but for a mistake at step 6: learned at steps 7, 8 and 9."""
    engine = Oracle(wrong=lambda step, example: int(step < 4 or step == 6))
    samples = list(recall.measure(run_of(num_steps=40), engine))
    assert engine.step == 9
    assert max(found(samples, "accuracy")) == 9
    assert found(samples, "num_steps_to_accuracy") == {90: 4, 95: 4}
    engine = Oracle(wrong=lambda step, example: int(step < 4 or step == 6))
    list(recall.measure(run_of(num_steps=40, stops_when_learned=False), engine))
    assert engine.step == 40


def test_an_accuracy_that_is_not_reached_is_null_and_not_a_number_of_steps():
    engine = Oracle(wrong=lambda step, example: int(example == 0 or step < 5))
    samples = list(recall.measure(run_of(), engine))
    assert found(samples, "num_steps_to_accuracy") == {90: None, 95: None}  # 5 of 6 is 83%
    engine = Oracle(wrong=lambda step, example: int(step < 5 and example > 0))
    samples = list(recall.measure(run_of(num_steps=6), engine))
    assert found(samples, "num_steps_to_accuracy") == {90: 5, 95: 5}


def test_long_examples_are_asked_as_few_at_a_time_as_training_has_tokens():
    engine = Oracle()
    list(recall.measure(run_of(evaluated_seq_lens=[8, 24, 96]), engine))
    assert set(engine.shown) == {(2, 12), (3, 8), (1, 24), (1, 96)}


def test_a_length_without_memory_is_null_and_not_tried(monkeypatch):
    engine = Oracle()
    engine.resolved_kernels = {"attention": "plain"}
    model = MODEL
    room = 2 * 4 * model.num_heads * 96**2 + cost.inference_memory_bytes(
        model, batch_size=1, prompt_len=96, capacity=96, dtype="float32"
    )
    monkeypatch.setattr(recall, "available_memory_bytes", lambda engine: room)
    samples = list(recall.measure(run_of(evaluated_seq_lens=[24, 96]), engine))
    assert found(samples, "accuracy_by_length") == {24: 1.0, 96: None}
    assert found(samples, "accuracy_over_lengths") == {None: None}
    assert (1, 96) not in engine.shown
    engine.resolved_kernels = {"attention": "fused"}  # which keeps no scores
    samples = list(recall.measure(run_of(evaluated_seq_lens=[24, 96]), engine))
    assert found(samples, "accuracy_by_length") == {24: 1.0, 96: 1.0}


def test_a_diverged_run_says_at_which_step():
    engine = Oracle(loss=lambda step: math.nan if step == 7 else 1.0)
    with pytest.raises(Diverged, match="nan at training step 7"):
        list(recall.measure(run_of(num_steps=100, stops_when_learned=False), engine))


def test_what_ends_early_is_one_run_and_its_schedule_that_of_all_steps():
    run = run_of(num_steps=300)
    assert (run.optimizer.num_steps, run.optimizer.num_warmup_steps) == (300, 20)
    assert Run.from_json(run.to_json()) == run
    other = replace(run, workload=replace(run.workload, evaluated_seq_lens=(8,)))
    assert other.run_id != run.run_id


# Real engines.


@pytest.mark.parametrize("data", [INDUCTION, COPYING], ids=lambda data: data.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_engine_runs_the_suite(backend, data):
    run = run_of(data, backend)
    samples = list(recall.measure(run, load_engine(backend)(MODEL, seed=0)))
    curve = found(samples, "accuracy") | found(samples, "accuracy_by_length")
    assert set(curve) == {*range(1, 9), 8, 24}
    assert all(0 <= value <= 1 for value in curve.values())
    assert all(value * 6 % 1 == pytest.approx(0, abs=1e-9) for value in curve.values())
    assert all(math.isfinite(value) for value in found(samples, "train_loss").values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_model_learns_to_say_what_followed(backend):
    """Of two tokens, at length 4, where there is little to find: the answer is one of two."""
    data = replace(INDUCTION, vocab_size=3)
    run = run_of(data, backend, num_steps=150, batch_size=16, seq_len=4, num_examples=32,
                 evaluated_seq_lens=[4])  # fmt: skip
    run = replace(run, optimizer=replace(run.optimizer, learning_rate=1e-2))
    samples = list(recall.measure(run, load_engine(backend)(MODEL, seed=0)))
    assert found(samples, "accuracy_by_length") == {4: 1.0}
    assert found(samples, "num_steps_to_accuracy")[95] <= 150


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, monkeypatch, backend):
    """Told to stop at step 3 and, of the rest, after its evaluation began."""
    run = run_of(backend=backend, num_steps=6)
    monkeypatch.setattr(checkpoint, "_keeper", None)
    whole = list(recall.measure(run, load_engine(backend)(MODEL, seed=0)))

    monkeypatch.setenv(checkpoint.INTERVAL_VARIABLE, "0")
    samples = []
    for stop_at in (3, None):
        monkeypatch.setattr(stop, "_is_told", False)
        keeper = checkpoint.keep(tmp_path, run, {"host": "a"})
        engine = load_engine(backend)(MODEL, seed=0)
        samples = []
        try:
            for one in recall.measure(run, engine):
                samples.append(one)
                if one.at == stop_at and one.metric == "train_loss":
                    monkeypatch.setattr(stop, "_is_told", True)
        except stop.Stopped:
            assert keeper.saved_step == stop_at
    assert keeper.start_step == 3
    kept = [one for one in samples if one.metric != "peak_memory_bytes"]
    assert kept == [one for one in whole if one.metric != "peak_memory_bytes"]


def test_a_learned_task_is_not_trained_on_again_after_its_evaluation_was_stopped(monkeypatch):
    curve = list(recall.measure(run_of(num_steps=3), Oracle()))[:9]  # of three looks
    monkeypatch.setattr(checkpoint, "resume", lambda engine: (3, curve, []))
    engine = Oracle()
    samples = list(recall.measure(run_of(num_steps=40), engine))
    assert engine.step == 0
    assert found(samples, "num_steps_to_accuracy") == {90: 1, 95: 1}


def test_equal_seeds_have_equal_data_and_others_do_not():
    digests = [execute._data_digest(replace(run_of(backend=backend), seed=seed))
               for backend, seed in (("jax", 0), ("torch", 0), ("jax", 1))]  # fmt: skip
    assert digests[0] == digests[1] != digests[2]


# What is asked at the front door.


def runs_of(*overrides):
    request = compose.read(overrides)
    return [run for settings in request.settings for run in plan.expand(settings)]


def test_the_vocabulary_is_that_of_the_task():
    for run in runs_of("suite=recall", "data=induction_heads,phonebook", "size=synthetic"):
        assert run.model.vocab_size == {"induction_heads": 17, "phonebook": 256}[run.data.name]


@pytest.mark.parametrize("family", ["hawk", "griffin", "mqa"])
def test_the_size_is_that_of_the_papers_networks(family):
    run = runs_of("suite=recall", "data=induction_heads", "size=synthetic", f"family={family}")[0]
    layers = {"hawk": 0, "griffin": 1, "mqa": 5}[family]
    assert run.model.layer_mixers.count("mqa") == layers
    if family == "griffin":
        assert run.model.layer_mixers[2] == "mqa"
    assert {"hawk": 255_872, "mqa": 239_872}.get(family, 252_672) == cost.num_params(run.model)


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["suite=recall"], "data=stdlib: suite=recall asks a task; data is one of"),
        (["suite=recall", "data=induction_heads", "suite.seq_len=2"], "seq_len=2"),
        (["suite=recall", "data=phonebook", "suite.evaluated_seq_lens=[9]"], "seq_len=9"),
        (["suite=recall", "data=induction_heads", "suite.num_steps=0"], "suite.num_steps=0"),
        (["suite=recall", "data=induction_heads", "suite.num_examples=0"], "num_examples=0"),
        (["suite=recall", "data=induction_heads", "data.num_items=1"], "num_items=1"),
        (["suite=language_modeling", "data=phonebook"], "is a task, for suite=recall"),
        (["experiment=recall", "data=stdlib"], "known: induction_heads, selective_copying"),
    ],
)
def test_a_wrong_request_is_one_line(overrides, hint):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        runs_of(*overrides)
    assert hint in str(error.value)


def test_an_experiment_asks_each_task_in_its_own_way_and_one_alone_where_it_is_named():
    everything = runs_of("experiment=recall", "scale=cpu")
    assert {run.data.name for run in everything} == set(tasks.TASKS)
    alone = runs_of("experiment=recall", "scale=cpu", "data=induction_heads")
    assert alone == [run for run in everything if run.data.name == "induction_heads"]
    windows = {(run.model.family, run.workload.seq_len): run.model.window_size for run in alone}
    # global attention has none, which goes along with a length
    assert windows == {("mqa", 64): None, ("hawk", 64): 32, ("griffin", 64): 32,
                       ("mqa", 256): None, ("hawk", 256): 128, ("griffin", 256): 128}  # fmt: skip


def test_the_scale_of_an_experiment_names_tasks_that_it_has(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    (folder / "experiment").mkdir(parents=True)
    for path in compose.CONFIGS.iterdir():
        if path.name != "experiment":
            (folder / path.name).symlink_to(path)
    values = {"suites": {"recall": {"phonebook": []}},
              "scales": {"cpu": {"suites": {"recall": {"phonebok": []}}}}}  # fmt: skip
    (folder / "experiment" / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setattr(compose, "CONFIGS", folder)
    with pytest.raises(ValueError, match="Did you mean 'phonebook'"):
        compose.read(["experiment=mine", "scale=cpu"])
