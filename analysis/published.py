"""The literature's numbers: results/published/*.csv, and what of them may stand beside ours.

An absolute time of a device is a fact of that device: `read` gives it, named by `device`, and
nothing here hands it on for drawing. What may be drawn is `relative`: ratios of times to a
baseline of the same figure, and differences of losses to it, which no device and no text is in.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

FOLDER = Path(__file__).resolve().parents[1] / "results" / "published"
# Every file has these columns, after those that say what was varied.
COLUMNS = ("metric", "value", "unit", "error", "source", "how", "device", "note")
HOW = ("printed", "digitised", "computed")


@dataclass(frozen=True)
class Baseline:
    """What the values of a figure are held against, and how."""

    metric: str
    where: dict[str, Any]  # the rows of the baseline
    within: tuple[str, ...]  # columns in which a row and its baseline agree
    is_ratio: bool = True  # value / baseline; else value - baseline
    printed: str | None = None  # the metric of the same ratio where the paper prints it


MQA = {"family": "mqa"}
RELATIVE = {
    "figure1a": Baseline("loss", MQA, ("size",), is_ratio=False),
    "figure1b": Baseline(
        "tokens_per_s", MQA, ("size", "prompt_len", "num_new_tokens"), printed="speedup"
    ),
    "figure3": Baseline("relative_step_time", MQA | {"seq_len": 2048}, ("size",)),
    "figure4": Baseline(
        "latency_s", MQA, ("size", "batch_size", "prompt_len", "num_new_tokens")
    ),
    # to the same model at the length that it was trained at
    "figure5": Baseline(
        "mean_loss_so_far", {"position": 2048},
        ("panel", "family", "position_encoding", "size", "seq_len"), is_ratio=False,
    ),
    "figure8a": Baseline(
        "op_time_ms", {"linear_scan": "sequential"}, ("batch_size", "d_rnn", "seq_len")
    ),
    "figure8b": Baseline(
        "relative_step_time", {"linear_scan": "sequential"}, ("family", "size")
    ),
    "figure9": Baseline("loss", MQA, ("size", "seq_len"), is_ratio=False),
    "figure10": Baseline(
        "mean_loss_so_far", {"position": 2048},
        ("panel", "family", "position_encoding", "size", "seq_len"), is_ratio=False,
    ),
    "table1": Baseline("accuracy", MQA, ("size", "num_tokens", "task"), is_ratio=False),
}  # fmt: skip


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


def read(name: str) -> pd.DataFrame:
    """One figure or table: what was varied, then COLUMNS. `value` is null where the paper's plot
    ends before it; `device` names the device of an absolute time, and is null elsewhere."""
    return _read(name).copy()


def varied(name: str) -> list[str]:
    """The columns of a file that say what was varied."""
    return [column for column in _read(name).columns if column not in COLUMNS]


def relative(name: str) -> pd.DataFrame:
    """The same rows as ratios to a baseline of the same figure (of losses and accuracies: as
    differences), with the error that the errors of both leave: `value`, `error`, `unit` and what
    was varied. These may be drawn beside ours. ValueError where a figure has no baseline."""
    return _relative(name).copy()


@cache
def _read(name: str) -> pd.DataFrame:
    path = FOLDER / f"{name}.csv"
    if not path.exists():
        raise ValueError(f"nothing published is called {name!r}; known: {', '.join(names())}.")
    found = pd.read_csv(path, keep_default_na=False, na_values=[""])
    for column in ("note", "device"):  # a column that is empty throughout is text all the same
        found[column] = found[column].astype(object).where(found[column].notna(), None)
    return found.astype({"value": "float64", "error": "float64"})


@cache
def _relative(name: str) -> pd.DataFrame:
    rows = _read(name)
    if name not in RELATIVE:
        raise ValueError(
            f"results/published/{name}.csv has no baseline to be relative to; those that have: "
            f"{', '.join(RELATIVE)}."
        )
    base = RELATIVE[name]
    values = rows[rows["metric"] == base.metric].dropna(subset="value")
    is_base = pd.Series(True, index=values.index)
    for column, wanted in base.where.items():
        is_base &= values[column] == wanted
    within = list(base.within)
    held = values.loc[is_base, [*within, "value", "error"]].drop_duplicates(within)
    pairs = values.merge(held, on=within, suffixes=("", "_baseline"))
    if base.is_ratio:
        value = pairs["value"] / pairs["value_baseline"]
        share = np.hypot(
            pairs["error"] / pairs["value"], pairs["error_baseline"] / pairs["value_baseline"]
        )
        error, unit = value * share, "1"
    else:
        value = pairs["value"] - pairs["value_baseline"]
        error, unit = np.hypot(pairs["error"], pairs["error_baseline"]), pairs["unit"]
    # the baseline is itself, without an error
    own = (pairs[list(base.where)] == pd.Series(base.where)).all(axis=1)
    made = pairs.assign(value=value, error=error.where(~own, 0.0), unit=unit, how="computed")
    if base.is_ratio and (rows.loc[rows["metric"] == base.metric, "how"] == "printed").all():
        made = made.assign(how="printed", error=pairs["error"])
    if base.printed is not None:
        columns = varied(name)
        printed = rows[rows["metric"] == base.printed].set_index(columns)
        for place in made.index:
            key = tuple(made.loc[place, columns])
            if key in printed.index:
                row = printed.loc[key]
                made.loc[place, ["value", "error", "how"]] = [row["value"], row["error"], "printed"]
    return made[[*varied(name), "metric", "value", "unit", "error", "source", "how", "note"]]
