"""The papers' marks beside ours: ratios and differences to MQA or to the sequential scan, which no
device is in, and only where size and shape are the same. Absolute numbers stay in the tables.
"""

import json
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import published, style
from analysis.figures import drawing

MARKERS = {"mqa": "^", "mqa_local": ">", "hawk": "v", "griffin": "D", "associative": "v",
           "pallas_tpu": "D"}  # fmt: skip
SOURCE = "De et al. 2024, TPU-v3"
SOURCE_OF_LOSS = "De et al. 2024, their distance from MQA"


def step_time(axes: Axes, part: pd.DataFrame) -> None:
    """Figure 3, over MQA at the same length; the baseline of the paper's own is MQA at 2048."""
    found = published.read("figure3")
    found = found[found["metric"] == "relative_step_time"]
    key = ["size", "seq_len"]
    base = found[found["family"] == "mqa"][[*key, "value", "error"]]
    both = found.merge(base, on=key, suffixes=("", "_mqa"))
    value = both["value"] / both["value_mqa"]
    error = value * np.hypot(both["error"] / both["value"], both["error_mqa"] / both["value_mqa"])
    _marks(axes, both.assign(value=value, error=error), part, "family", "seq_len")


def latency(axes: Axes, part: pd.DataFrame) -> None:
    _marks(axes, published.relative("figure4"), part, "family", "num_new_tokens",
           source=f"{SOURCE}, prefill included", prompt_len=_one(part, "prompt_len"),
           batch_size=_one(part, "batch_size"))  # fmt: skip


def throughput(axes: Axes, part: pd.DataFrame) -> None:
    _marks(axes, published.relative("figure1b"), part, "family", "num_new_tokens",
           prompt_len=_one(part, "prompt_len"))  # fmt: skip


def scan(axes: Axes, part: pd.DataFrame) -> None:
    """Figure 8(a): a linear scan forward, of the shape and dtype that the panel has."""
    if _one(part, "op") == "linear_scan" and _one(part, "work_phase") == "evaluate":
        d_rnn = {json.loads(model).get("d_rnn") for model in part["model"]}
        found = published.relative("figure8a").assign(size=_one(part, "size"))
        _marks(axes, found, part, "linear_scan", "seq_len", dtype=_one(part, "dtype"),
               batch_size=_one(part, "batch_size"), d_rnn=d_rnn.pop())  # fmt: skip


def step_by_scan(axes: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    """Figure 8(b), in the rows of the same family and size; `rows` have their place in names."""
    found = published.relative("figure8b")
    places = rows.drop_duplicates("row")[["row", "family", "size"]]
    found = found.merge(places[places["row"].isin(names)], on=["family", "size"])
    for variant, marks in found[found["linear_scan"] != "sequential"].groupby("linear_scan"):
        y = [names.index(name) for name in marks["row"]]
        drawing.ghost(axes, marks["value"], y, marks["error"], variant, is_across=True,
                      marker=MARKERS.get(variant, "D"), source=SOURCE)  # fmt: skip


def windows(axes: Axes, part: pd.DataFrame) -> None:
    """Figure 9 as distances from global MQA, set off from our global MQA: losses on other text."""
    ours = part[(part["family"] == "mqa") & part["is_global"]]
    if ours.empty:
        return
    found = published.relative("figure9")
    found = found[(found["seq_len"] == _one(part, "seq_len")) & found["window_size"].notna()]
    found = found.assign(value=found["value"] + float(ours["value"].iloc[0]))
    lengths = part.assign(window_size=part["window"])
    _marks(axes, found, lengths, "family", "window_size", source=SOURCE_OF_LOSS)


def _marks(
    axes: Axes,
    found: pd.DataFrame,
    part: pd.DataFrame,
    name: str,
    x: str,
    *,
    source: str = SOURCE,
    **where: Any,
) -> None:
    """Draws the rows of a figure that have the panel's size, these settings, its names and a place
    that it has measured."""
    found = found[(found["size"] == _one(part, "size")) & found[x].isin(part[x].dropna())]
    for column, value in where.items():
        found = found[found[column] == value]
    for line, marks in found[found[name].isin(part[name])].groupby(name):
        drawing.ghost(axes, marks[x], marks["value"], marks["error"], _label(line),
                      marker=MARKERS.get(line, "D"), source=source)  # fmt: skip


def _label(name: str) -> str:
    return style.FAMILY_LABELS.get(name, name)


def _one(part: pd.DataFrame, column: str) -> Any:
    """The value that a whole panel has, or None."""
    values = part[column].dropna().unique()
    return values[0] if len(values) == 1 else None
