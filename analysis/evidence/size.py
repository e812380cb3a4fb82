"""Evidence that needs no clock: parameters (table 2) and caches (section 5.1, appendix F)."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from analysis import derive, published
from analysis.evidence.groups import (
    PATTERNS,
    Finding,
    Quantity,
    label_of,
    lack_of_size,
    rows_of,
    shape_of,
    where,
    within,
)
from analysis.remember import remembered
from analysis.vocabulary import plain

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2}
BIASES = 0.005  # more than they add
SLACK = 0.01


def _models(frame: pd.DataFrame) -> pd.DataFrame:
    """The families and sizes of table 2 that our runs built, with their counts."""
    runs = derive.runs(frame)
    runs = runs[runs["num_params_non_embedding"].notna() & runs["model"].notna()]
    counts = ["family", "size", "num_params_non_embedding"]
    runs = runs.drop_duplicates([*counts, "model"])
    models = [shape_of(text) for text in runs["model"]]
    is_of_paper = [
        model["pattern"] == PATTERNS.get(family) and lack_of_size(size, model) is None
        for model, family, size in zip(models, runs["family"], runs["size"], strict=True)
    ]
    runs = runs[pd.Series(is_of_paper, runs.index, dtype=bool)]
    return runs.drop_duplicates(counts)  # each once


@cache
def _counts() -> dict[tuple[str, str], float]:
    table = published.read("table2")
    table = table[table["metric"] == "num_params_non_embedding"]
    return {(row.family, row.size_): row.value
            for row in table.rename(columns={"size": "size_"}).itertuples()}  # fmt: skip


def num_params(frame: pd.DataFrame) -> list[Finding]:
    """Of the sizes that were seen, which it names beside those that were not."""
    quantities, ids, seen = [], [], set()
    for (family, size), runs in _models(frame).groupby(
        ["family", "size"], sort=False, observed=True
    ):
        if (family, size) in _counts():
            for count in runs["num_params_non_embedding"].astype(float):
                label = f"{label_of(family)} {size} has {count:,.0f}, over the paper's"
                ratio = count / _counts()[family, size]
                quantities.append(_exact(label, ratio, 1.0, BIASES))
            ids += runs["run_id"].to_list()
            seen.add(size)
    if not quantities:
        return []
    sizes = list(dict.fromkeys(size for _, size in _counts()))
    where = f"at {', '.join(size for size in sizes if size in seen)}"
    if others := [size for size in sizes if size not in seen]:
        where += f", not seen at {', '.join(others)}"
    return [Finding(where, tuple(quantities), run_ids=tuple(ids))]


def param_ratios(frame: pd.DataFrame) -> list[Finding]:
    quantities, ids = [], []
    for size, runs in _models(frame).groupby("size", sort=False, observed=True):
        counts = runs.drop_duplicates("family").set_index("family")["num_params_non_embedding"]
        for family in ("hawk", "griffin"):
            if {family, "mqa"} <= set(counts.index):
                wanted = _counts()[family, size] / _counts()["mqa", size]
                label = f"parameters of {label_of(family)} over MQA at {size}"
                ratio = float(counts[family] / counts["mqa"])
                quantities.append(_exact(label, ratio, wanted, SLACK))
                ids += runs.loc[runs["family"].isin([family, "mqa"]), "run_id"].to_list()
    made = tuple(quantities)
    return [Finding("by its widths", made, run_ids=tuple(dict.fromkeys(ids)))] if made else []


def _exact(label: str, value: float, wanted: float, share: float) -> Quantity:
    return Quantity(label, value, (value, value), within(wanted, share))


@remembered
def _caches(frame: pd.DataFrame) -> pd.DataFrame:
    """Bytes of a cache for one sequence, as allocated, beside what the formulas say."""
    rows = rows_of(frame, "decode_latency", "cache_bytes").drop_duplicates("cell_id")
    capacity = rows["prompt_len"].astype(float) + rows["num_new_tokens"].astype(float)
    wanted = [
        _formula(shape_of(text), seen, ITEMSIZE[dtype], plain(window))
        for text, seen, dtype, window in zip(
            rows["model"], capacity, rows["dtype"], rows["window_size"], strict=True
        )
    ]
    return rows.assign(
        capacity=capacity,
        num_bytes=rows["value"] / rows["batch_size"].astype(float),
        wanted=np.array(wanted, dtype=float),
    )


def _formula(model: dict[str, Any], capacity: float, itemsize: int, window: float | None) -> float:
    """Keys and values of the visible positions; the recurrent state, which is float32, and the
    inputs that the convolution still needs."""
    pattern, num_layers = model["pattern"], model.get("num_layers", 0)
    mixers = [pattern[layer % len(pattern)] for layer in range(num_layers)]
    seen = capacity if window is None else min(capacity, window)
    attention = 2 * seen * model.get("head_dim", 0) * model.get("num_kv_heads", 1) * itemsize
    recurrent = model.get("d_rnn", 0) * (4 + (model.get("conv_width", 4) - 1) * itemsize)
    return sum(attention if mixer == "mqa" else recurrent for mixer in mixers)


def cache_formulas(frame: pd.DataFrame) -> list[Finding]:
    made = []
    rows = _caches(frame)
    rows = rows[rows["wanted"] > 0]
    for backend, cells in rows.groupby("backend", sort=False, observed=True):
        quantities = []
        for family, part in cells.groupby("family", sort=False, observed=True):
            ratios = part["num_bytes"] / part["wanted"]
            far = part.loc[np.log(ratios).abs().idxmax()]
            label = (
                f"{label_of(family)} {far['size']} at {far['capacity']:,.0f} tokens, "
                f"{far['num_bytes'] / 1e6:.3g} MB over the formula"
            )
            span = float(ratios.min()), float(ratios.max())
            ratio = float(far["num_bytes"] / far["wanted"])
            quantities.append(Quantity(label, ratio, span, within(1.0, SLACK)))
        where = f"{backend}, {len(cells):,} cell{'' if len(cells) == 1 else 's'}"
        lacks = _lacks_of_families(cells["family"])
        made.append(Finding(where, tuple(quantities), lacks, run_ids=tuple(cells["run_id"])))
    return made


def cache_growth(frame: pd.DataFrame) -> list[Finding]:
    """Between the shortest and the longest sequence of one setting, both beyond the window."""
    key = ["size", "backend", "dtype", "device_kind", "device_name", "shared_model"]
    rows = _caches(frame)
    window = rows["window_size"].astype("float64").fillna(0)
    rows = rows[rows["capacity"] >= window]
    number = rows.groupby(key, sort=False, dropna=False, observed=True).ngroup()
    names = [*key, "family", "window_size", "capacity", "num_bytes", "run_id"]
    groups: dict[int, list[dict[str, Any]]] = {}
    for place, cell in zip(number, rows[names].to_dict("records"), strict=True):
        groups.setdefault(place, []).append(cell)
    made = []
    for cells in groups.values():
        quantities, ids = [], []
        parts: dict[tuple, list[dict[str, Any]]] = {}
        for cell in cells:
            parts.setdefault((cell["family"], plain(cell["window_size"])), []).append(cell)
        for (family, _), part in parts.items():
            low, high = (end(part, key=lambda cell: cell["capacity"]) for end in (min, max))
            if low["capacity"] == high["capacity"]:
                continue
            growth = high["num_bytes"] / low["num_bytes"]
            wanted = high["capacity"] / low["capacity"] if family == "mqa" else 1.0
            label = (
                f"the cache of {label_of(family)} from {low['capacity']:,.0f} to "
                f"{high['capacity']:,.0f} tokens"
            )
            quantities.append(_exact(label, growth, wanted, SLACK))
            ids += [low["run_id"], high["run_id"]]
        if quantities:
            place = where({name: cells[0][name] for name in key})
            lacks = _lacks_of_families(cell["family"] for cell in cells)
            made.append(Finding(place, tuple(quantities), lacks, run_ids=tuple(ids)))
    return made


def _lacks_of_families(families: Iterable[str]) -> tuple[str, ...]:
    known = set(families)
    missing = [name for name in ("mqa", "hawk", "griffin") if name not in known]
    return (f"nothing of {' and '.join(map(label_of, missing))}",) if missing else ()
