"""Downstream tasks in a report: accuracies with binomial intervals, and the paper's rows apart."""

from dataclasses import replace

import pytest
import synthetic_records as synthetic
from scipy.stats import binomtest
from synthetic_records import record, sample

import analysis
from analysis import downstream, load, published, tables
from analysis.verify import verify
from suites.harness.record import write

PAPER = ("mmlu", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge")


def answered(family, task, num_right, num_questions=400, *, num_cut=0, chance=0.25, **rest):
    samples = (
        sample("accuracy", num_right / num_questions),
        sample("num_examples", num_questions),
        sample("num_cut_examples", num_cut),
        sample("chance_accuracy", chance),
    )
    rest = {"samples": samples, "block": None} | rest
    made = record("downstream", family, rest.pop("backend", "torch"), phase="evaluate", task=task,
                  seq_len=2048, repeats=0, **rest)  # fmt: skip
    start = {"path": f"/home/{family}", "digest": f"{family:_<16}"}
    return replace(made, run=made.run | {"checkpoint": start})


@pytest.fixture(scope="module")
def records():
    """Two families on the six tasks, Griffin with some questions cut; Hawk has lost one task, and
    Griffin was asked with examples too, and on a task of our own."""
    made = []
    for number, task in enumerate(PAPER):
        made.append(answered("mqa", task, 100 + number))
        made.append(answered("griffin", task, 120 + number, num_cut=4 * (task == "piqa")))
    made.append(answered("hawk", "piqa", 210, chance=0.5))
    made.append(answered("hawk", "arc_easy", 1, samples=(), outcome="failed",
                         reason="ValueError: task arc_easy: its data set is not here"))  # fmt: skip
    made.append(answered("griffin", "piqa", 222, num_fewshot=5))
    made.append(answered("griffin", "own", 7, 10, num_fewshot=5, batch_size=1))
    return made


@pytest.fixture(scope="module")
def table(records):
    return downstream.table(load.frame_of(records))


def row_of(table, **where):
    found = table.frame
    for name, value in where.items():
        found = found[found[name] == value]
    (place,) = found.index
    return dict(zip(table.header, table.rows[place], strict=True)), found.loc[place]


def test_an_accuracy_has_the_interval_of_its_questions(table):
    texts, raw = row_of(table, rows="measured", family="mqa")
    wanted = binomtest(100, 400).proportion_ci(0.95, method="wilson")
    assert raw["mmlu"] == pytest.approx(25.0)
    assert (raw["mmlu_low"], raw["mmlu_high"]) == pytest.approx(
        (100 * wanted.low, 100 * wanted.high)
    )
    assert raw["mmlu_num_questions"] == 400
    assert texts["checkpoint"] == "mqa_____"
    assert texts["MMLU"] == f"25.0 [{100 * wanted.low:.1f}, {100 * wanted.high:.1f}]"
    assert raw["average"] == pytest.approx(sum((100 + n) / 4 for n in range(6)) / 6)


def test_a_task_that_failed_says_so_and_leaves_no_average(table):
    texts, raw = row_of(table, rows="measured", family="hawk")
    assert texts["ARC-E"] == "- (failed)"
    assert (texts["MMLU"], texts["average"]) == ("-", "-")
    assert raw["piqa"] == pytest.approx(52.5)


def test_models_with_examples_stand_apart_and_own_tasks_come_last(table):
    texts, raw = row_of(table, rows="measured", family="griffin", examples=5)
    assert texts["own"].startswith("70.0 [")
    assert raw["piqa"] == pytest.approx(55.5)
    bare, _ = row_of(table, rows="measured", family="griffin", examples=0)
    assert (bare["own"], bare["PIQA"][:4]) == ("-", "30.5")
    assert table.header[-3:] == ["ARC-C", "own", "average"]


def test_the_papers_rows_are_marked_and_are_those_of_the_paper(table):
    theirs = table.frame[table.frame["rows"] == "other data"]
    assert len(theirs) == 13
    assert list(table.frame["rows"]) == ["measured"] * 4 + ["other data"] * 13
    texts, raw = row_of(table, rows="other data", family="griffin", size="3b")
    found = published.read("table1")
    found = found[(found["family"] == "griffin") & (found["size"] == "3b")].set_index("task")
    assert {task: raw[task] for task in PAPER} == found["value"].drop("average").to_dict()
    assert (texts["average"], texts["tokens"], texts["backend"]) == ("60.7", "300B", "-")
    assert not raw["run_ids"]
    assert "other text" in table.note


def test_the_note_counts_questions_chance_and_what_did_not_fit(table):
    assert "MMLU 400, by chance 25.0" in table.note
    assert "PIQA 400, by chance 25.0 or 400, by chance 50.0" in table.note
    assert "did not fit in suite.seq_len: PIQA 1.0%." in table.note


def test_without_such_runs_there_is_no_table():
    frame = load.frame_of([synthetic.training("mqa", "torch", 0)])
    assert downstream.table(frame).rows == []


def test_families_are_compared_by_their_difference_on_one_task(records):
    found = tables.side_by_side(load.frame_of(records), "family", "griffin", "mqa").frame
    found = found[found["value_ours"].notna() & found["value_baseline"].notna()]
    pairs = found.set_index("task")["difference"]
    assert pairs.to_dict() == pytest.approx(dict.fromkeys(PAPER, 0.05))
    assert set(found["verdict"]) == {"not resolved"}  # one checkpoint each says nothing of others


def test_a_report_has_the_table_and_verifies(records, tmp_path):
    for one in records:
        write(tmp_path / "store", one)
    page = analysis.write_report(tmp_path / "store", tmp_path / "report", title="Downstream",
                                 command="aerie run suite=downstream")  # fmt: skip
    assert 'data-table="downstream"' in page.read_text(encoding="utf-8")
    assert not verify(tmp_path / "report", tmp_path / "store").differences
