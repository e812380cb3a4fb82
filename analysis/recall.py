"""Synthetic tasks: accuracies with their intervals, and in how many steps a task was learned."""

from typing import Any

import numpy as np
import pandas as pd

from analysis import derive, load, statistics, style
from analysis.tables import MAX_ROWS, RUNS, Table, run_ids
from analysis.vocabulary import family_order
from analysis.wording import NONE

SUITE = "recall"
LEVELS = (90, 95)  # percent, of num_steps_to_accuracy
INF = float("inf")


def accuracies(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Cells of one metric by step or length, with an interval that is binomial over the examples
    of all seeds, and no narrower than what the seeds say. A run that stopped before its last step,
    as it had learned the task, counts on as it ended."""
    rows = derive.summary(frame)
    rows = rows[(rows["suite"] == SUITE) & (rows["metric"] == metric) & rows["at"].notna()].copy()
    rows[["value", "low", "high"]] = rows[["value", "low", "high"]].astype(float)
    counts = derive.processes(frame)
    if metric == "accuracy":
        _count_on(rows, counts[(counts["suite"] == SUITE) & (counts["metric"] == metric)])
    counts = load.words(counts[counts["metric"] == "num_examples"])
    by_place = counts[counts["at"].notna()].groupby(["cell_id", "at"])["value"].sum()
    of_all = counts[counts["at"].isna()].groupby("cell_id")["value"].sum()
    for place, row in rows.iterrows():
        n = by_place.get((row["cell_id"], row["at"]), of_all.get(row["cell_id"], 0))
        ends = [(row["low"], row["high"])]
        if n:
            ends.append(statistics.accuracy_interval(round(row["value"] * n), int(n)))
        known = [end for end in ends if not pd.isna(end[0])]
        if known:
            rows.loc[place, "low"] = max(0.0, min(low for low, _ in known))
            rows.loc[place, "high"] = min(1.0, max(high for _, high in known))
    return rows


def _count_on(rows: pd.DataFrame, looks: pd.DataFrame) -> None:
    """Values and intervals of rows from the last look of every run, where it has none later."""
    for cell, part in load.words(looks).groupby("cell_id", sort=False):
        curves = part.pivot(index="at", columns="run_id", values="value").ffill()
        for place in rows.index[rows["cell_id"] == cell]:
            values = curves.loc[rows.loc[place, "at"]].dropna()
            low, high = statistics.median_interval(values, is_share=True) or (np.nan, np.nan)
            rows.loc[place, ["value", "low", "high"]] = values.median(), low, high


def steps_to_accuracy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a run that completed: its first look at 90 and at 95% accuracy (columns 90 and 95),
    infinity where it had none in all its steps."""
    rows = derive.runs(frame)
    rows = rows[(rows["suite"] == SUITE) & (rows["outcome"] == "completed")].set_index("run_id")
    found = derive.processes(frame)
    found = found[found["metric"] == "num_steps_to_accuracy"]
    for level in LEVELS:
        at = found[found["at"] == level]
        reached = pd.Series(at["value"].to_numpy(float), at["run_id"].astype(object))
        rows[level] = rows.index.map(reached).to_numpy(float)
    return rows.fillna(dict.fromkeys(LEVELS, INF)).reset_index()


def table(frame: pd.DataFrame) -> Table:
    """One row a cell: the task, steps to two accuracies, and accuracy at each length."""
    runs = steps_to_accuracy(frame)
    found = accuracies(frame, "accuracy_by_length")
    lengths = sorted(found["at"].astype(int).unique())
    by_place = {(row["cell_id"], int(row["at"])): row for row in found.to_dict("records")}
    ids = run_ids(frame)
    rows, raw = [], []
    order = sorted(
        runs.groupby("cell_id", sort=False),
        key=lambda one: (str(one[1]["data"].iloc[0]), *family_order(one[1]["family"].iloc[0])),
    )
    for cell, part in order:
        first = part.iloc[0]
        steps = {level: float(np.median(part[level])) for level in LEVELS}
        reached = {level: int(np.isfinite(part[level]).sum()) for level in LEVELS}
        raw.append(
            {name: first[name] for name in ("data", "family", "size", "backend", "seq_len")}
            | {"num_seeds": len(part), "num_steps": first["num_steps"]}
            | {f"num_steps_to_{level}": steps[level] for level in LEVELS}
            | {f"num_seeds_to_{level}": reached[level] for level in LEVELS}
            | {
                f"accuracy_{name}at_{length}": by_place.get((cell, length), {}).get(value)
                for length in lengths
                for name, value in (("", "value"), ("low_", "low"), ("high_", "high"))
            }
            | {"run_ids": ids.get(cell, "")}
        )
        rows.append(
            [
                first["data"], style.family_label(first["family"]), first["size"],
                style.backend_label(first["backend"]), f"{first['seq_len']:,}", f"{len(part)}",
                *(_steps(steps[one], reached[one], first["num_steps"], len(part))
                  for one in LEVELS),
                *(_share(by_place.get((cell, length))) for length in lengths),
            ]
        )  # fmt: skip
    header = ["task", "family", "size", "backend", "trained at", "seeds",
              *(f"steps to {level}%" for level in LEVELS),
              *(f"at {length:,}" for length in lengths)]  # fmt: skip
    note = (
        "Accuracy is the share of examples whose whole answer is right, by the length of the "
        "example, the median over seeds with its 95% interval. Steps are those of the first look "
        "at so high an accuracy, the median over seeds; one that did not get there counts as more "
        "than all its steps: that is true of this budget alone."
    )
    return Table("recall", "Synthetic tasks", header, rows[:MAX_ROWS], pd.DataFrame(raw), note,
                 runs=RUNS)  # fmt: skip


def _steps(steps: float, reached: int, num_steps: int, num_seeds: int) -> str:
    text = f"{steps:,.0f}" if np.isfinite(steps) else f"> {num_steps:,}"
    return text if reached in (0, num_seeds) else f"{text} ({reached} of {num_seeds} seeds)"


def _share(row: dict[str, Any] | None) -> str:
    if row is None:
        return NONE
    text = f"{row['value']:.2f}"
    return text if pd.isna(row["low"]) else f"{text} [{row['low']:.2f}, {row['high']:.2f}]"
