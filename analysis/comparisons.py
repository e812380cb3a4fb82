"""Matched pairs of cells that differ in one setting: both values, paired rounds, verdict."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from analysis import noise, settings
from analysis.derive import outcomes, summary
from analysis.judging import TOLD, Facts, Rows, is_wanted, judged, rounds_of
from analysis.pairing import SETTINGS, SIDE, each, places_of
from analysis.remember import remembered
from analysis.vocabulary import HEADLINES, family_order
from suites.harness.record import METRICS

_PAIR_COLUMNS = ["by", "ours", "baseline", *SETTINGS, "metric", "at", "unit",
                 *(f"{name}_{side}" for name in SIDE for side in ("ours", "baseline")),
                 *TOLD]  # fmt: skip
_TEXTS = ["by", "ours", "baseline", "suite", "family", "size", "backend", "dtype", "device_kind",
          "op", "work_phase", "data", "task", "variant", "metric", "unit", "verdict", "reason",
          *(f"{name}_{side}" for name in ("outcome", "status", "parity", "cell_id", "flags",
                                          "linear_scan")
            for side in ("ours", "baseline"))]  # fmt: skip
_PAIR_NUMBERS = ["speedup", "speedup_low", "speedup_high", "margin", "difference",
                 "difference_low", "difference_high", "p", "detectable", "at",
                 *(f"{name}_{side}" for name in ("value", "low", "high", "num_rounds", "num_seeds")
                   for side in ("ours", "baseline"))]  # fmt: skip


def comparisons(
    frame: pd.DataFrame,
    by: str = "backend",
    ours: str = "jax",
    baseline: str | None = None,
    metrics: tuple[str, ...] = (),
) -> pd.DataFrame:
    """One row for each matched pair of cells and metric: both values, speedup, verdict, parity.

    `by` names the one setting in which the two cells differ, e.g. "backend", "family",
    "linear_scan" (what it resolved to) or "model.window_size". A cell that has no completed run,
    or no partner, keeps its row: its value is null and its outcome says why. `metrics` are those
    that are wanted; without, the headlines of each suite.
    """
    if baseline is None:
        others = (value for value in settings.values_of(frame, by) if value != ours)
        baseline = settings.baseline_of(by, others)
    rows, places = _comparisons(frame, by, ours, baseline, metrics)
    return rows.iloc[places].reset_index(drop=True)


def to_be_read(
    frame: pd.DataFrame, by: str, ours: str, baseline: str, metrics: tuple[str, ...] = ()
) -> pd.DataFrame:
    """comparisons(), in the order of reading."""
    rows, _ = _comparisons(frame, by, ours, baseline, metrics)
    return rows


@remembered
def _variants(frame: pd.DataFrame, by: str) -> np.ndarray:
    """By places in outcomes()."""
    variants = settings.variants(settings.asked(frame), by)
    return outcomes(frame)["cell_id"].map(variants).to_numpy(dtype=object)


@remembered
def _facts_of(frame: pd.DataFrame, wanted: tuple[str, ...]) -> Facts:
    rows = summary(frame)
    rows = rows[is_wanted(rows, wanted)]
    cells = outcomes(frame)["cell_id"].to_numpy(dtype=object)
    cell = pd.Index(cells).get_indexer(rows["cell_id"].to_numpy(dtype=object))
    order = np.argsort(cell, kind="stable")
    rows, cell = rows.iloc[order].reset_index(drop=True), cell[order]
    kept = ["metric", "at", "device_kind", *(name for name in SIDE if name in rows)]
    columns = {name: _plain(rows[name]) for name in kept}
    odd, numbers = noise.flags(frame).to_dict(), rounds_of(frame, wanted).numbers
    at = rows["at"].fillna(-1).to_list()
    names = zip(columns["cell_id"], columns["metric"], at, strict=True)
    columns["flags"] = np.array([odd.get(name, "") for name in names], dtype=object)
    what = [numbers[one] for one in zip(columns["metric"], at, strict=True)]
    start, end = (np.searchsorted(cell, np.arange(len(cells)), side) for side in ("left", "right"))
    return Facts(columns, np.array(what, dtype=int), np.append(start, 0), np.append(end, 0))


@remembered
def _cells_of(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """outcomes(), a column each, as far as they are compared."""
    cells = outcomes(frame)
    return {name: _plain(cells[name]) for name in cells if name in (*SETTINGS, *SIDE)}


def _plain(column: pd.Series) -> np.ndarray:
    """Floats, or plain objects; a count that is missing is None."""
    if column.dtype == "float64":
        return column.to_numpy()
    is_masked = getattr(column.dtype, "na_value", None) is pd.NA
    return column.to_numpy(dtype=object, **({"na_value": None} if is_masked else {}))


@remembered
def _comparisons(
    frame: pd.DataFrame, by: str, ours: str, baseline: str, wanted: tuple[str, ...]
) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows in the order of reading, and the place of each one as pairs come."""
    places, cells = places_of(frame, by, ours, baseline), _cells_of(frame)
    facts = _facts_of(frame, wanted)
    rows = _rows(frame, places, facts, wanted)
    left, right = places[:, rows.pair]
    keys = [key[np.where(left >= 0, left, right)] for key in _keys(frame)]
    order = _reading_order(keys, rows.metric, rows.at.astype(float))
    rows = Rows(*(column[order] for column in rows))
    left, right = places[:, rows.pair]
    one = np.where(left >= 0, left, right)
    columns = {"by": by, "ours": ours, "baseline": baseline, "metric": rows.metric.tolist(),
               "at": rows.at.tolist(), "unit": [METRICS[metric].unit for metric in rows.metric],
               "variant": _variants_of(frame, by, left, right)}  # fmt: skip
    columns |= {name: cells[name][one].tolist() for name in SETTINGS if name != "variant"}
    for side, cell, fact in (("ours", left, rows.ours), ("baseline", right, rows.baseline)):
        for name in SIDE:
            columns[f"{name}_{side}"] = _values_of(name, cells, cell, facts.columns, fact)
    told = judged(frame, by, places, facts, rows, wanted)
    columns |= dict(zip(TOLD, zip(*told, strict=True) if told else [()] * len(TOLD), strict=True))
    for name in _TEXTS:  # each held once, where pandas' own strings would be in every row
        columns[name] = pd.Series(columns[name], range(len(told)), dtype=object)
    made = pd.DataFrame(columns, columns=_PAIR_COLUMNS, index=range(len(told)))
    return made.astype({name: "float64" for name in _PAIR_NUMBERS}), np.argsort(order)


def _rows(frame: pd.DataFrame, places: np.ndarray, facts: Facts, wanted: tuple[str, ...]) -> Rows:
    """Of each pair what either side has, as ours has it; where neither has anything the first
    metric of its suite."""
    (left, ours), (right, theirs) = (each(facts.start[side], facts.end[side]) for side in places)
    most = facts.what.max(initial=0) + 1
    left_key, right_key = left * most + facts.what[ours], right * most + facts.what[theirs]
    found = pd.Index(right_key).get_indexer(left_key)
    baseline = np.append(theirs, -1)[found]
    is_alone = np.ones(len(right), dtype=bool)
    is_alone[found[found >= 0]] = False
    pair = np.concatenate([left, right[is_alone]])
    empty, first = [], []
    suites = _cells_of(frame)["suite"]
    for place in np.setdiff1d(np.arange(places.shape[1]), pair):
        left_cell, right_cell = places[:, place]
        name, *_ = HEADLINES.get(suites[left_cell if left_cell >= 0 else right_cell], (None,))
        if name is not None and (not wanted or name in wanted):
            empty.append(place)
            first.append(name)
    none = np.full(len(empty), -1)
    ours = np.concatenate([ours, np.full(is_alone.sum(), -1), none])
    baseline = np.concatenate([baseline, theirs[is_alone], none])
    pair = np.concatenate([pair, np.array(empty, dtype=int)])
    one = np.where(ours >= 0, ours, baseline)
    metric = np.append(facts.columns["metric"], None)[one]
    metric[one < 0] = first
    at = np.append(facts.columns["at"], np.nan)[one]
    at = np.where(np.isnan(at), None, at.astype(object))
    made = Rows(pair, ours, baseline, metric, at, np.append(facts.what, -1)[one])
    order = np.argsort(pair, kind="stable")
    return Rows(*(column[order] for column in made))


def _variants_of(frame: pd.DataFrame, by: str, left: np.ndarray, right: np.ndarray) -> list[str]:
    """Backends may be paired although they differ in more: then both are named."""
    words = np.append(_variants(frame, by), None)
    made = words[np.where(left >= 0, left, right)].tolist()
    if by == "backend":
        for place in np.flatnonzero((left >= 0) & (right >= 0) & (words[left] != words[right])):
            made[place] = f"{words[left[place]]} beside {words[right[place]]}"
    return made


def _values_of(
    name: str,
    cells: dict[str, np.ndarray],
    cell: np.ndarray,
    facts: dict[str, np.ndarray],
    fact: np.ndarray,
) -> list:
    """As the metric of a cell has it, else as the cell does; None where there is neither."""
    made = np.full(len(cell), None, dtype=object)
    for known, places in ((cells, cell), (facts, fact)):
        if name in known:
            is_there = places >= 0
            made[is_there] = known[name][places[is_there]]
    return made.tolist()


def in_order(found: pd.DataFrame) -> pd.DataFrame:
    """In the order of reading."""
    at = found["at"].astype("float64").to_numpy()
    return found.iloc[_reading_order(_keys_of(found), found["metric"], at)].reset_index(drop=True)


def _reading_order(cells: list[np.ndarray], metric: Iterable[str], at: np.ndarray) -> np.ndarray:
    """Of rows with these keys of their cells: metrics of one suite and size stand together."""
    metrics = dict.fromkeys(name for names in HEADLINES.values() for name in names)
    known = {name: place for place, name in enumerate(metrics)}
    place = np.array([known.get(name, len(known)) for name in metric], dtype=int)
    return np.lexsort([*cells[:3], place, *cells[3:], at][::-1])


@remembered
def _keys(frame: pd.DataFrame) -> list[np.ndarray]:
    return _keys_of(outcomes(frame))


def _keys_of(rows: pd.DataFrame) -> list[np.ndarray]:
    """The settings that rows are read by, as numbers in order; a missing one comes last."""
    texts = {}
    for name in ("suite", "size", "op", "work_phase", "backend"):
        codes, known = pd.factorize(rows[name], sort=True)
        texts[name] = np.where(codes < 0, len(known), codes)
    suites = {name: place for place, name in enumerate(HEADLINES)}
    suite = np.array([suites.get(name, len(suites)) for name in rows["suite"]], dtype=int)
    family = np.array([family_order(name)[0] for name in rows["family"]], dtype=int)
    numbers = [rows[name].astype("float64").to_numpy()
               for name in ("seq_len", "prompt_len", "batch_size")]  # fmt: skip
    return [suite, texts["suite"], texts["size"], texts["op"], texts["work_phase"], family,
            texts["backend"], *numbers]  # fmt: skip
