"""Downstream tasks, through lm-evaluation-harness: local ones, answered as the engine's own logits
say. Tests of that library run where it is installed (extra: eval)."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import BACKENDS, tiny

from implementations.config import build
from implementations.engine import Batch, load_engine
from suites import compose, downstream
from suites.harness import data, lm_harness, plan, trained
from suites.harness.run import DataConfig, Run

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None and os.environ.get("AERIE_REQUIRE_EVAL") != "1",
    reason="lm_eval is not installed (extra: eval); AERIE_REQUIRE_EVAL=1 insists",
)
CONFIG = Path(__file__).parents[1] / "configs" / "suite" / "downstream.yaml"
PAPER = ("mmlu", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge")
BYTES = DataConfig(name="stdlib", source="stdlib")
MODEL = tiny(
    "griffin", pattern=("rg_lru", "mqa"), num_layers=2, window_size=8, d_model=16, d_rnn=24,
    d_mlp=32, num_heads=2, head_dim=8,
)  # fmt: skip
SEQ_LEN = 96
WORDS = ("red", "the", "a", "owl", "of", "or", "sea", "an", "in", "and", "it", "by", "as", "go")


def questions(count=24) -> list[dict]:
    """With answers of very different lengths, which likelihood alone would never choose."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        text = " ".join(rng.choice(WORDS, rng.integers(2, 40)))
        answers = [" ".join(rng.choice(WORDS, n)) for n in (1, 3, 6, 10)[: 2 + number % 3]]
        made.append({"text": text, "answers": answers, "label": int(rng.integers(len(answers)))})
    return made


def sentences(count=12) -> list[dict]:
    rng = np.random.default_rng(1)
    made = []
    for number in range(count):
        left, right = (" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(2))
        options = rng.choice(WORDS, 2, replace=False).tolist()
        made.append({"left": left, "right": right, "options": options, "label": number % 2})
    return made


def local_task(name, folder, docs, **settings):
    lines = "".join(json.dumps(doc) + "\n" for doc in docs)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    made = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / f"{name}.jsonl")},
            "cache_dir": str(folder.parent / "cache"),
        },
        "output_type": "multiple_choice",
        "test_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    } | settings
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of our own: one like ARC, one like WinoGrande, with the context varied."""
    made = tmp_path_factory.mktemp("home") / "tasks"
    made.mkdir()
    ask = {"doc_to_text": "Question: {{text}}\nAnswer:", "doc_to_target": "label",
           "doc_to_choice": "{{answers}}"}  # fmt: skip
    local_task("own_arc", made, questions(), **ask)
    local_task("own_plain", made, questions(), **ask, metric_list=[{"metric": "acc"}])
    local_task(
        "own_partial", made, sentences(), doc_to_text="label", doc_to_target="{{right}}",
        doc_to_choice="{{[left + ' ' + options[0], left + ' ' + options[1]]}}",
        metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    local_task("own_nowhere", made, [], **ask, dataset_path="nobody/nothing", dataset_kwargs={})
    local_task("own_generation", made, questions(), **ask | {"doc_to_choice": None},
               output_type="generate_until", metric_list=[{"metric": "exact_match"}])  # fmt: skip
    return made


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request):
    return load_engine(request.param)(MODEL)


def suite_of(**settings) -> downstream.Suite:
    values = yaml.safe_load(CONFIG.read_text(encoding="utf-8")) | settings
    assert values.pop("name") == "downstream"
    return build(downstream.Suite, values, "configs/suite/downstream.yaml")


def run_of(task, folder, seed=0, **settings) -> Run:
    settings = {"tasks": [task], "task_folder": folder and str(folder), "batch_size": 2,
                "seq_len": SEQ_LEN} | settings  # fmt: skip
    (work,) = suite_of(**settings).workloads()
    return Run(suite="downstream", model=MODEL, backend="torch", dtype="float32", workload=work,
               data=BYTES, seed=seed)  # fmt: skip


def measured(run, engine) -> dict[str, float]:
    return {sample.metric: sample.value for sample in downstream.measure(run, engine)}


def log_likelihood(engine, context: str, continuation: str) -> float:
    """Alone, of bytes, from logits in float64; of what is too long the end. What stands behind, so
    that JAX compiles one length, no position before it can see."""
    tokens = np.frombuffer((context + continuation).encode(), np.uint8)[-(SEQ_LEN + 1) :]
    padded = np.pad(tokens, (0, SEQ_LEN + 1 - len(tokens)), constant_values=ord("."))
    logits_TV = engine.logits(Batch.of(padded[None]))[0].astype(np.float64)
    logits_TV -= np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    places = np.arange(len(tokens) - 1)[-len(continuation.encode()) :]
    return logits_TV[places, tokens[1:][places]].sum()


# The suite ---------------------------------------------------------------------------------------


def test_it_asks_the_six_tasks_of_table_1_without_examples():
    from analysis import published

    works = list(suite_of().workloads())
    assert tuple(work.task for work in works) == PAPER
    assert set(published.read("table1")["task"]) - {"average"} == set(PAPER)
    assert {(w.num_fewshot, w.max_questions, w.seq_len) for w in works} == {(0, 0, 2048)}
    is_divided = {task: downstream.TASKS[task].metric == "acc_norm" for task in PAPER}
    assert [task for task, divided in is_divided.items() if not divided] == ["winogrande"]


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"tasks": []}, r"suite\.tasks is empty; known: mmlu, hellaswag"),
        ({"num_fewshot": -1}, r"suite\.num_fewshot=-1; must be at least 0"),
        ({"max_questions": 0}, r"suite\.max_questions=0; must be at least 1"),
        ({"seq_len": 1}, r"suite\.seq_len=1; must be at least 2"),
        ({"task_folder": "/nowhere"}, r"suite\.task_folder=/nowhere is no folder"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, hint):
    with pytest.raises(ValueError, match=hint):
        suite_of(**settings)


def test_a_missing_extra_is_one_line_that_names_it(monkeypatch):
    monkeypatch.setattr(lm_harness, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^[^\n]*pip install 'aerie\[eval\]'\.$"):
        suite_of().check_data(BYTES)


@pytest.mark.parametrize("scale", [[], ["scale=cpu"]])
def test_table_1_is_an_experiment_that_asks_for_a_checkpoint(monkeypatch, scale):
    monkeypatch.setattr(lm_harness, "find_spec", lambda name: "somewhere")
    request = compose.read(["experiment=paper/table1", *scale])
    assert request.question.endswith("?")
    (settings,) = request.settings
    assert tuple(settings["suite"]["tasks"]) == PAPER
    assert settings["suite"]["num_fewshot"] == 0
    with pytest.raises(ValueError, match=r"suite=downstream .* checkpoint=DIR\.$"):
        list(plan.expand(settings))


def test_data_without_a_tokenizer_is_refused_before_anything_starts():
    (settings,) = compose.read(["suite=downstream", "data=tokens"]).settings
    with pytest.raises(ValueError, match=r"data 'tokens': its tokenizer is not known"):
        list(plan.expand(settings))


def test_of_data_the_tokenizer_alone_is_looked_for():
    """Its text may be on another machine, where the model was trained."""
    (settings,) = compose.read(["suite=downstream", "data=text"]).settings
    assert not plan.reads_corpus(settings)
    (settings,) = compose.read(["suite=language_modeling", "data=text"]).settings
    assert plan.reads_corpus(settings)


def test_a_checkpoint_is_what_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv(trained.KEEP_VARIABLE, "1")
    engine = load_engine("torch")(MODEL, seed=3)
    trained.keep(tmp_path, engine)
    monkeypatch.setattr(lm_harness, "ask", lambda *_: lm_harness.Answers(8, 2, 0, ()))
    run = replace(run_of("piqa", None), checkpoint=trained.find(str(tmp_path), MODEL))
    other = load_engine("torch")(MODEL, seed=0)
    assert measured(run, other)["accuracy"] == 0.25
    wanted = engine.parameters()
    assert all((value == wanted[name]).all() for name, value in other.parameters().items())


def test_a_run_is_the_files_of_its_task(tmp_path):
    (tmp_path / "one.yaml").write_text("task: one", encoding="utf-8")
    before = run_of("one", tmp_path)
    assert run_of("one", tmp_path).run_id == before.run_id
    assert run_of("one", tmp_path, num_fewshot=1).run_id != before.run_id
    (tmp_path / "one.jsonl").write_text("{}", encoding="utf-8")
    assert run_of("one", tmp_path).run_id != before.run_id


def test_runs_of_other_suites_keep_their_ids():
    work = replace(run_of("piqa", None).workload, task="")
    values = replace(run_of("piqa", None), workload=work).to_json()["workload"]
    assert not {"task", "task_folder", "task_digest", "num_fewshot", "max_questions"} & set(values)
    again = Run.from_json(run_of("piqa", None).to_json())
    assert again == run_of("piqa", None)


# Tasks, asked ------------------------------------------------------------------------------------


@needs_lm_eval
@pytest.mark.parametrize("task", ["own_arc", "own_plain"])
def test_the_most_likely_answer_counts(engine, folder, task):
    """Divided by its characters where the task has such a score: then others are chosen."""
    right = {"own_arc": 0, "own_plain": 0}
    num_cut = 0
    for doc in questions():
        context = f"Question: {doc['text']}\nAnswer:"
        nats = [log_likelihood(engine, context, f" {answer}") for answer in doc["answers"]]
        per_character = [x / len(a) for x, a in zip(nats, doc["answers"], strict=True)]
        right["own_plain"] += int(np.argmax(nats) == doc["label"])
        right["own_arc"] += int(np.argmax(per_character) == doc["label"])
        longest = max(len(f"{context} {answer}") for answer in doc["answers"])
        num_cut += longest > SEQ_LEN + 1
    assert right["own_arc"] != right["own_plain"]
    assert 0 < num_cut < 24
    found = measured(run_of(task, folder), engine)
    chance = np.mean([1 / len(doc["answers"]) for doc in questions()])
    assert found == {
        "accuracy": right[task] / 24,
        "num_examples": 24,
        "num_cut_examples": num_cut,
        "chance_accuracy": pytest.approx(chance),
    }


@needs_lm_eval
def test_partial_scoring_asks_for_the_same_words_after_other_ones(engine, folder):
    num_right = 0
    for doc in sentences():
        nats = [log_likelihood(engine, f"{doc['left']} {option}", f" {doc['right']}")
                for option in doc["options"]]  # fmt: skip
        num_right += int(np.argmax(nats) == doc["label"])
    assert 0 < num_right < 12
    found = measured(run_of("own_partial", folder), engine)
    assert (found["accuracy"], found["num_examples"]) == (num_right / 12, 12)


@needs_lm_eval
def test_answered_examples_stand_before_a_question(folder):
    settings = {"seq_len": 2048, "max_questions": 5}
    bare = lm_harness.requests(run_of("own_arc", folder, **settings), "own_arc")
    assert len(bare) == sum(len(doc["answers"]) for doc in questions()[:5])
    shot = run_of("own_arc", folder, num_fewshot=2, **settings)
    for one, more in zip(bare, lm_harness.requests(shot, "own_arc"), strict=True):
        assert more.num_scored == one.num_scored
        assert more.tokens[-len(one.tokens) :] == one.tokens
        assert bytes(more.tokens).count(b"Question:") == 3
    other = replace(shot, seed=1)
    assert lm_harness.requests(other, "own_arc") != lm_harness.requests(shot, "own_arc")


@needs_lm_eval
def test_what_was_asked_has_a_digest(folder):
    first, few, partial = (
        data.batch_digest(downstream.batches(run))
        for run in (
            run_of("own_arc", folder),
            run_of("own_arc", folder, max_questions=3),
            run_of("own_partial", folder),
        )
    )
    assert len({first, few, partial}) == 3
    other = replace(run_of("own_arc", folder), backend="jax", model=tiny("mqa"))
    assert data.batch_digest(downstream.batches(other)) == first


@needs_lm_eval
def test_a_missing_data_set_is_one_line_that_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        measured(run_of("own_nowhere", folder), None)
    for part in ("task own_nowhere", "nobody/nothing", "HF_HOME=DIR"):
        assert part in str(error.value)


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "hint"),
    [
        ("own_ark", r"'own_ark' is no task .* Did you mean 'own_arc'\?"),
        ("own_generation", r"own_generation is one of generate_until"),
    ],
)
def test_what_cannot_be_asked_is_named(folder, task, hint):
    with pytest.raises(ValueError, match=hint):
        measured(run_of(task, folder), None)


@needs_lm_eval
def test_an_unknown_task_is_refused_before_anything_starts(folder):
    with pytest.raises(ValueError, match="Did you mean 'own_arc'"):
        suite_of(tasks=["own_ark"], task_folder=str(folder)).check_data(BYTES)
    suite_of(tasks=["own_arc", "piqa"], task_folder=str(folder)).check_data(BYTES)


@needs_lm_eval
def test_the_papers_tasks_are_defined_as_they_are_scored():
    """In the library: one question with four texts, and so on; their data are not needed."""
    index = lm_harness._manager(None)._index
    for task, asked in downstream.TASKS.items():
        assert asked.name in index, task
    divided = set()
    for task in ("hellaswag", "piqa", "arc_easy", "winogrande"):
        metrics = index[downstream.TASKS[task].name].cfg["metric_list"]
        divided |= {task for metric in metrics if metric["metric"] == "acc_norm"}
    assert divided == {"hellaswag", "piqa", "arc_easy"}


@needs_lm_eval
def test_the_border_imports_no_framework():
    code = (
        "import sys\nfrom suites.harness import lm_harness\n"
        "from lm_eval import evaluator\nfrom lm_eval.tasks import TaskManager\n"
        "print(*{'torch', 'jax', 'transformers', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
