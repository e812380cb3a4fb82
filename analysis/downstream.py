"""Downstream tasks: what each model answers right, beside table 1 of arXiv:2402.19427."""

import json
from typing import Any

import pandas as pd

from analysis import derive, load, published, statistics, style
from analysis.tables import MAX_ROWS, RUNS, Table
from analysis.vocabulary import family_order
from analysis.wording import NONE

SUITE = "downstream"
PAPER = "table1"
# In the order of the paper's columns.
TASKS = {"mmlu": "MMLU", "hellaswag": "HellaSwag", "piqa": "PIQA", "winogrande": "WinoGrande",
         "arc_easy": "ARC-E", "arc_challenge": "ARC-C"}  # fmt: skip
AVERAGE = "average"
OURS, THEIRS = "measured", "other data"
NAMES = {"mamba": "Mamba", "llama_2": "Llama-2"}  # of others in the paper's table


def table(frame: pd.DataFrame) -> Table:
    """A row a model: the accuracy on each task with its binomial interval, in percent. Below them
    the published rows, of models that read other text."""
    models = _models(frame)
    tasks = list(TASKS) + sorted({task for one in models for task in one["tasks"]} - set(TASKS))
    theirs = _published() if models else []
    raw, rows = [], []
    for one in [*models, *theirs]:
        found = {task: one["tasks"].get(task, {}) for task in tasks}
        average = _average(found) if one["rows"] == OURS else one["tasks"][AVERAGE]["value"]
        raw.append(
            {name: one.get(name) for name in ("rows", *_MODEL)}
            | {
                f"{task}{ending}": values.get(name)
                for task, values in found.items()
                for ending, name in _ENDINGS.items()
            }
            | {AVERAGE: average, "run_ids": one.get("run_ids", "")}
        )
        rows.append(
            [
                one["rows"],
                NAMES.get(one["family"], style.family_label(one["family"])),
                *(NONE if one.get(name) is None else str(one[name]) for name in _MODEL[1:]),
                *(_share(found[task]) for task in tasks),
                NONE if average is None else f"{average:.1f}",
            ]
        )
    header = ["rows", *_MODEL, *(TASKS.get(task, task) for task in tasks), AVERAGE]
    columns = {TASKS.get(task, task): task for task in tasks} | {AVERAGE: AVERAGE}
    return Table(SUITE, "Downstream tasks", header, rows[:MAX_ROWS], pd.DataFrame(raw),
                 _note(models), numbers=columns, runs=RUNS)  # fmt: skip


_MODEL = ("family", "size", "tokens", "backend", "checkpoint", "examples")
_ENDINGS = {"": "value", "_low": "low", "_high": "high", "_num_questions": "num_questions",
            "_chance": "chance"}  # fmt: skip


def _models(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """What all runs of a model, with as many examples before a question, have answered."""
    runs = derive.runs(frame[frame["suite"] == SUITE])
    if runs.empty:
        return []
    values = load.words(derive.processes(frame[frame["suite"] == SUITE]))
    values = values.pivot_table(index="run_id", columns="metric", values="value")
    made: dict[str, dict[str, Any]] = {}
    for row in runs.to_dict("records"):
        asked = json.loads(row["settings"])
        work, start = asked["workload"], asked.get("checkpoint") or {}
        task = work["task"]
        for name in ("task", "task_folder", "task_digest", "batch_size"):  # one model
            work.pop(name, None)
        start.pop("path", None)
        one = made.setdefault(
            json.dumps(asked, sort_keys=True),
            {"rows": OURS, "family": row["family"], "size": row["size"], "tokens": None,
             "backend": style.backend_label(row["backend"]),
             "checkpoint": (start.get("digest") or "")[:8] or None,
             "examples": work.get("num_fewshot", 0), "tasks": {}, "run_ids": ""},
        )  # fmt: skip
        found = values.loc[row["run_id"]] if row["run_id"] in values.index else None
        one["tasks"].setdefault(task, {"outcome": row["outcome"], "runs": []})
        if found is not None:
            one["tasks"][task]["runs"].append(found)
        one["run_ids"] = f"{one['run_ids']} {row['run_id']}".strip()
    for one in made.values():
        one["tasks"] = {task: _answers(asked) for task, asked in one["tasks"].items()}
    return sorted(made.values(), key=lambda one: (one["size"], family_order(one["family"])))


def _answers(asked: dict[str, Any]) -> dict[str, Any]:
    """In percent. Seeds draw other examples before the same questions: they make no more of them,
    and the interval is that of one seed's."""
    if not asked["runs"]:
        return {"outcome": asked["outcome"]}
    values = pd.DataFrame(asked["runs"]).mean()
    n = round(values["num_examples"])
    low, high = statistics.accuracy_interval(round(values["accuracy"] * n), n)
    chance = values.get("chance_accuracy")
    return {
        "value": 100 * values["accuracy"],
        "low": 100 * low,
        "high": 100 * high,
        "num_questions": n,
        "chance": None if chance is None else 100 * chance,
        "num_cut": values.get("num_cut_examples", 0),
    }


def _published() -> list[dict[str, Any]]:
    made = []
    found = published.read(PAPER)
    for (family, size, tokens), rows in found.groupby(
        ["family", "size", "num_tokens"], sort=False, dropna=False
    ):
        tasks = {row["task"]: {"value": row["value"]} for row in rows.to_dict("records")}
        made.append({"rows": THEIRS, "family": family, "size": size, "tasks": tasks,
                     "tokens": f"{tokens / 1e9:,.0f}B"})  # fmt: skip
    return made


def _average(found: dict[str, dict[str, Any]]) -> float | None:
    """Of the paper's six, where all are there."""
    values = [found[task].get("value") for task in TASKS]
    return None if None in values else sum(values) / len(values)


def _share(values: dict[str, Any]) -> str:
    """ "31.2 [29.4, 33.1]": of the questions of the task in percent."""
    if "value" not in values:
        ended = values.get("outcome")
        return f"{NONE} ({ended})" if ended else NONE
    text = f"{values['value']:.1f}"
    return f"{text} [{values['low']:.1f}, {values['high']:.1f}]" if "low" in values else text


def _note(models: list[dict[str, Any]]) -> str:
    """How many questions, what guessing reaches, and what did not fit."""
    counts: dict[str, set[str]] = {}
    cut: dict[str, float] = {}
    for one in models:
        for task, values in one["tasks"].items():
            if "value" in values:
                told = f"{values['num_questions']:,}"
                if values["chance"] is not None:
                    told += f", by chance {values['chance']:.1f}"
                counts.setdefault(task, set()).add(told)
                if share := values["num_cut"] / values["num_questions"]:
                    cut[task] = max(share, cut.get(task, 0))
    asked = "; ".join(
        f"{TASKS.get(task, task)} {' or '.join(sorted(told))}" for task, told in counts.items()
    )
    note = (
        "Percent of the questions whose most likely answer is right, with Wilson's 95% interval. "
        "Likelihood is divided by the characters of the answer where the paper does so, on all of "
        "its tasks but WinoGrande, which has partial scoring. Examples are the answered questions "
        "before each; the paper does not report how many. Rows marked 'other data' are those of "
        "arXiv:2402.19427, table 1, trained on other text with another tokenizer: they show what "
        "is usual, and nothing is compared with them."
    )
    note += f" Questions: {asked}." if asked else ""
    if cut:
        told = ", ".join(f"{TASKS.get(task, task)} {share:.1%}" for task, share in cut.items())
        note += f" Questions whose beginning did not fit in suite.seq_len: {told}."
    return note
