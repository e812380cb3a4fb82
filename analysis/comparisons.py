"""Matched pairs of cells that differ in one setting: both values, paired rounds, verdict."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import noise, settings, statistics
from analysis.derive import outcomes, processes, shown, summary
from analysis.remember import remembered
from analysis.vocabulary import HEADLINES, QUALITIES, TIMES, family_order
from suites.harness.record import METRICS

_SETTINGS = ("suite", "family", "size", "backend", "dtype", "device_kind", "op", "work_phase",
             "seq_len", "batch_size", "prompt_len", "num_new_tokens", "num_steps", "num_devices",
             "data", "task", "variant")  # fmt: skip
_SIDE = ("value", "low", "high", "num_rounds", "num_seeds", "outcome", "status", "parity",
         "num_params", "num_params_non_embedding", "cell_id", "is_current",
         "num_outliers", "flags", "linear_scan")  # fmt: skip
_TOLD = ("speedup", "speedup_low", "speedup_high", "margin", "difference", "difference_low",
         "difference_high", "p", "detectable", "num_paired_rounds", "num_paired_seeds", "verdict",
         "reason")  # fmt: skip
_PAIR_COLUMNS = ["by", "ours", "baseline", *_SETTINGS, "metric", "at", "unit",
                 *(f"{name}_{side}" for name in _SIDE for side in ("ours", "baseline")),
                 *_TOLD]  # fmt: skip
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
def pairs(
    frame: pd.DataFrame, by: str, ours: str, baseline: str
) -> list[tuple[dict | None, dict | None]]:
    """Cells of `ours` beside cells of `baseline` that differ in nothing else. A cell without a
    partner stands alone: of a backend or a family any, else one of a suite and family in which
    both sides were asked for."""
    cells = outcomes(frame)
    names = {*_SETTINGS, *_SIDE, *settings.RESOLVED, "kernels"}
    cells = cells[[name for name in cells if name in names]].to_dict("records")
    cells.append(None)  # at -1
    return [(cells[left], cells[right]) for left, right in _places(frame, by, ours, baseline).T]


@remembered
def _places(frame: pd.DataFrame, by: str, ours: str, baseline: str) -> np.ndarray:
    """Of each pair the two places in outcomes(), in two rows; -1 where a cell stands alone."""
    cells, group, value = _grouped(frame, by)
    lefts, rights = (np.flatnonzero(value == side) for side in (ours, baseline))
    rights = rights[np.argsort(group[rights], kind="stable")]
    start, end = (np.searchsorted(group[rights], group[lefts], side) for side in ("left", "right"))
    whose, which = _each(start, end)
    left, right = lefts[whose], rights[which]
    if by == "backend":
        is_partner = _are_partners(outcomes(frame), cells[left], cells[right])
        left, right = left[is_partner], right[is_partner]
    alone = [np.setdiff1d(side, found) for side, found in ((lefts, left), (rights, right))]
    if by not in ("backend", "family"):
        table = settings.asked(frame)
        places = list(zip(table["suite"], table["family"], strict=True))
        both = {places[one] for one in lefts} & {places[one] for one in rights}
        alone = [
            np.array([one for one in side if places[one] in both], dtype=int) for side in alone
        ]
    none = [np.full(len(side), -1) for side in alone]
    left = np.concatenate([left, alone[0], none[1]])
    right = np.concatenate([right, none[0], alone[1]])
    is_lone_right = left < 0
    # group by group, as cells come; those of the baseline that stand alone are the last of each
    order = np.lexsort((np.where(is_lone_right, right, left), is_lone_right,
                        group[np.where(is_lone_right, right, left)]))  # fmt: skip
    cells = np.append(cells, -1)
    return cells[np.stack([left[order], right[order]])]


@remembered
def _grouped(frame: pd.DataFrame, by: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row of settings.asked() its place in outcomes(), the number of those that share all
    but one setting, as they come, and its value of that."""
    table = settings.asked(frame)
    cells = np.flatnonzero((outcomes(frame)["suite"] != "parity").to_numpy(dtype=bool))
    group, _ = pd.factorize(settings.shared(table, by).to_numpy())
    return cells, group, table[by].to_numpy(dtype=object)


def _each(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every place of these ranges, one range after the other: whose it is, and which."""
    size = end - start
    whose = np.repeat(np.arange(len(size)), size)
    return whose, start[whose] + np.arange(len(whose)) - (np.cumsum(size) - size)[whose]


@remembered
def _variants(frame: pd.DataFrame, by: str) -> np.ndarray:
    """By places in outcomes()."""
    variants = settings.variants(settings.asked(frame), by)
    return outcomes(frame)["cell_id"].map(variants).to_numpy(dtype=object)


class _Facts(NamedTuple):
    """Rows of the summary, cell by cell, a column each; `start` and `end` of each cell by its place
    in outcomes(), and last, at -1, of none."""

    columns: dict[str, np.ndarray]
    what: np.ndarray  # the number of the metric and `at` of each row
    start: np.ndarray
    end: np.ndarray


@remembered
def _facts_of(frame: pd.DataFrame, wanted: tuple[str, ...]) -> _Facts:
    rows = summary(frame)
    rows = rows[is_wanted(rows, wanted)]
    cells = outcomes(frame)["cell_id"].to_numpy(dtype=object)
    cell = pd.Index(cells).get_indexer(rows["cell_id"].to_numpy(dtype=object))
    order = np.argsort(cell, kind="stable")
    rows, cell = rows.iloc[order].reset_index(drop=True), cell[order]
    kept = ["metric", "at", "device_kind", *(name for name in _SIDE if name in rows)]
    columns = {name: _plain(rows[name]) for name in kept}
    odd, numbers = noise.flags(frame).to_dict(), _rounds(frame, wanted).numbers
    at = rows["at"].fillna(-1).to_list()
    names = zip(columns["cell_id"], columns["metric"], at, strict=True)
    columns["flags"] = np.array([odd.get(name, "") for name in names], dtype=object)
    what = [numbers[one] for one in zip(columns["metric"], at, strict=True)]
    start, end = (np.searchsorted(cell, np.arange(len(cells)), side) for side in ("left", "right"))
    return _Facts(columns, np.array(what, dtype=int), np.append(start, 0), np.append(end, 0))


@remembered
def _cells_of(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """outcomes(), a column each, as far as they are compared."""
    cells = outcomes(frame)
    return {name: _plain(cells[name]) for name in cells if name in (*_SETTINGS, *_SIDE)}


def _plain(column: pd.Series) -> np.ndarray:
    """Floats, or plain objects; a count that is missing is None."""
    if column.dtype == "float64":
        return column.to_numpy()
    is_masked = getattr(column.dtype, "na_value", None) is pd.NA
    return column.to_numpy(dtype=object, **({"na_value": None} if is_masked else {}))


class _Rows(NamedTuple):
    """What is compared, a row each: the place of its pair, those of both sides in _Facts.rows (-1
    for none), its metric, `at`, and the number of both."""

    pair: np.ndarray
    ours: np.ndarray
    baseline: np.ndarray
    metric: np.ndarray
    at: np.ndarray
    what: np.ndarray


@remembered
def _comparisons(
    frame: pd.DataFrame, by: str, ours: str, baseline: str, wanted: tuple[str, ...]
) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows in the order of reading, and the place of each one as pairs come."""
    places, cells = _places(frame, by, ours, baseline), _cells_of(frame)
    facts = _facts_of(frame, wanted)
    rows = _rows(frame, places, facts, wanted)
    left, right = places[:, rows.pair]
    keys = [key[np.where(left >= 0, left, right)] for key in _keys(frame)]
    order = _reading_order(keys, rows.metric, rows.at.astype(float))
    rows = _Rows(*(column[order] for column in rows))
    left, right = places[:, rows.pair]
    one = np.where(left >= 0, left, right)
    columns = {"by": by, "ours": ours, "baseline": baseline, "metric": rows.metric.tolist(),
               "at": rows.at.tolist(), "unit": [METRICS[metric].unit for metric in rows.metric],
               "variant": _variants_of(frame, by, left, right)}  # fmt: skip
    columns |= {name: cells[name][one].tolist() for name in _SETTINGS if name != "variant"}
    for side, cell, fact in (("ours", left, rows.ours), ("baseline", right, rows.baseline)):
        for name in _SIDE:
            columns[f"{name}_{side}"] = _values_of(name, cells, cell, facts.columns, fact)
    told = _judged(frame, places, facts, rows, wanted)
    columns |= dict(zip(_TOLD, zip(*told, strict=True) if told else [()] * len(_TOLD), strict=True))
    for name in _TEXTS:  # each held once, where pandas' own strings would be in every row
        columns[name] = pd.Series(columns[name], range(len(told)), dtype=object)
    made = pd.DataFrame(columns, columns=_PAIR_COLUMNS, index=range(len(told)))
    return made.astype({name: "float64" for name in _PAIR_NUMBERS}), np.argsort(order)


def _rows(frame: pd.DataFrame, places: np.ndarray, facts: _Facts, wanted: tuple[str, ...]) -> _Rows:
    """Of each pair what either side has, as ours has it; where neither has anything the first
    metric of its suite."""
    (left, ours), (right, theirs) = (_each(facts.start[side], facts.end[side]) for side in places)
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
    made = _Rows(pair, ours, baseline, metric, at, np.append(facts.what, -1)[one])
    order = np.argsort(pair, kind="stable")
    return _Rows(*(column[order] for column in made))


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


def _told(found: statistics.Comparison | statistics.Difference, metric: str) -> tuple:
    """In the order of _TOLD."""
    low, high = found.interval or (None, None)
    if isinstance(found, statistics.Difference):
        verdict = found.verdict if found.value is not None else None
        return (None, None, None, None, found.value, low, high, found.p, found.detectable, 0,
                found.num_seeds, verdict, found.reason)  # fmt: skip
    verdict = found.verdict if metric in TIMES else None
    return (found.speedup, low, high, found.margin, None, None, None, None, None, found.num_rounds,
            0, verdict, found.reason)  # fmt: skip


def is_wanted(rows: pd.DataFrame, metrics: tuple[str, ...]) -> pd.Series:
    return rows["metric"].isin(metrics) if metrics else shown(rows)


class _Rounds(NamedTuple):
    """The processes of each cell, cell by cell, as numbers that are fast to join: `what` stands for
    a metric and its `at`, `point` for these in one seed and round."""

    rows: pd.DataFrame
    numbers: dict[tuple[str, float], int]  # of each metric and `at`, which is -1 for none
    start: np.ndarray  # of each cell by its place in outcomes(), and last, at -1, of none
    end: np.ndarray


@remembered
def _rounds(frame: pd.DataFrame, wanted: tuple[str, ...]) -> _Rounds:
    rows = processes(frame)
    names = ["cell_id", "run_id", "metric", "at", "seed", "round", "value", "block", "node",
             "device_name"]  # fmt: skip
    rows = rows.loc[is_wanted(rows, wanted), names].reset_index(drop=True)
    rows["at"] = rows["at"].fillna(-1)
    rows["margin"] = _margins(frame, rows)
    for name, key in (("what", ["metric", "at"]), ("point", ["metric", "at", "seed", "round"])):
        rows[name] = rows.groupby(key, sort=False, observed=True).ngroup()
    first = rows.drop_duplicates("what")
    numbers = dict(zip(zip(first["metric"], first["at"], strict=True), first["what"], strict=True))
    for name in ("block", "node", "device_name"):
        rows[name], _ = pd.factorize(rows[name])
    cells = outcomes(frame)["cell_id"].to_numpy(dtype=object)
    code, ids = pd.factorize(rows.pop("cell_id"))
    cell = pd.Index(cells).get_indexer(np.asarray(ids, dtype=object))[code]
    order = np.argsort(cell, kind="stable")
    start, end = (
        np.searchsorted(cell[order], np.arange(len(cells)), side) for side in ("left", "right")
    )
    rows = rows.iloc[order].reset_index(drop=True)
    return _Rounds(rows, numbers, np.append(start, 0), np.append(end, 0))


class _Evidence(NamedTuple):
    """The rounds that both cells of a pair have, one pair and metric after the other: values of
    both sides, whether the two processes shared a block, a node and a device, and how noisy that
    is. `start` and `size`: of each row that is compared; no rounds, no size."""

    rows: pd.DataFrame
    start: np.ndarray
    size: np.ndarray


def _evidence(
    frame: pd.DataFrame, places: np.ndarray, rows: _Rows, wanted: tuple[str, ...]
) -> _Evidence:
    known = _rounds(frame, wanted)
    points = known.rows["point"].to_numpy()
    most = points.max(initial=0) + 1
    sides = []
    for side in places:
        whose, which = _each(known.start[side], known.end[side])
        sides.append(pd.DataFrame({"key": whose * most + points[which], "row": which}))
    both = sides[0].merge(sides[1], on="key", suffixes=("", "_2"))
    ours, theirs = (known.rows.iloc[both[name].to_numpy()] for name in ("row", "row_2"))
    ours, theirs = (side.reset_index(drop=True) for side in (ours, theirs))
    in_block, *on_one = (_is_same(ours, theirs, name) for name in ("block", "node", "device_name"))
    pair, what = both["key"].to_numpy() // most, ours["what"].to_numpy()
    found = pd.DataFrame({
        "ours": ours["value"].to_numpy(dtype=float),
        "baseline": theirs["value"].to_numpy(dtype=float),
        "seed": ours["seed"].to_numpy(dtype=int),
        "in_block": in_block,
        "together": np.logical_and.reduce([in_block, *on_one]),
        "margin": ours["margin"].to_numpy(dtype=float),
        "run_id": ours["run_id"], "run_id_2": theirs["run_id"],
        "metric": ours["metric"], "at": ours["at"],
    })  # fmt: skip
    order = np.lexsort((ours["round"], ours["seed"], what, pair))
    most = what.max(initial=-1) + 1
    key = (pair * most + what)[order]
    asked = np.where((rows.ours >= 0) & (rows.baseline >= 0) & (rows.what < most),
                     rows.pair * most + rows.what, -1)  # fmt: skip
    start, end = (np.searchsorted(key, asked, side) for side in ("left", "right"))
    return _Evidence(found.iloc[order].reset_index(drop=True), start, end - start)


def _is_same(ours: pd.DataFrame, theirs: pd.DataFrame, name: str) -> np.ndarray:
    one, other = ours[name].to_numpy(), theirs[name].to_numpy()
    return (one >= 0) & (one == other)


def _margins(frame: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    floors = noise.floors(frame)
    key = ["node", "device_name", "metric"]
    number = rows.groupby(key, sort=False, dropna=False, observed=True).ngroup().to_numpy()
    first = rows.loc[~pd.Series(number).duplicated().to_numpy(), key]
    unknown = statistics.noise_floor(())
    known = [floors.get(place, unknown) for place in first.itertuples(index=False, name=None)]
    return np.array(known, dtype=float)[number]


def _repeats(frame: pd.DataFrame, rounds: pd.DataFrame, places: np.ndarray) -> list[np.ndarray]:
    """The values that each process of the rounds at these places was summed up from, for both
    sides."""
    wanted = rounds.iloc[places]
    is_kept = frame["is_counted"].fillna(False).astype(bool) & frame["value"].notna()
    is_kept &= frame["run_id"].isin({*wanted["run_id"], *wanted["run_id_2"]})
    rows = frame.loc[is_kept, ["run_id", "metric", "at", "value"]]
    rows = rows.astype({"run_id": object, "metric": object})
    rows = rows.assign(at=rows["at"].astype("float64").fillna(-1)).reset_index(drop=True)
    groups = rows.groupby(["run_id", "metric", "at"], sort=False).indices
    values, found = rows["value"].to_numpy(dtype=float), []
    for side in ("run_id", "run_id_2"):
        column = np.empty(len(rounds), dtype=object)
        keys = zip(wanted[side], wanted["metric"], wanted["at"], strict=True)
        for place, key in zip(places, keys, strict=True):
            column[place] = values[groups[key]]
        found.append(column)
    return found


def _judged(
    frame: pd.DataFrame, places: np.ndarray, facts: _Facts, rows: _Rows, wanted: tuple[str, ...]
) -> list[tuple]:
    """What is told of each row; those of equally many rounds or seeds at once, as one by one takes
    NumPy ten times as long."""
    evidence = _evidence(frame, places, rows, wanted)
    told: list[Any] = [None] * len(rows.pair)
    is_quality = np.array([metric in QUALITIES for metric in rows.metric], dtype=bool)
    for judge, mine in ((_differ, is_quality), (_compare, ~is_quality)):
        for place, one in judge(frame, facts, rows, evidence, np.flatnonzero(mine)):
            told[place] = _told(one, rows.metric[place])
    return told


def _differ(
    frame: pd.DataFrame, facts: _Facts, rows: _Rows, evidence: _Evidence, mine: np.ndarray
) -> Iterator[tuple[int, statistics.Difference]]:
    """Of a quality, over seeds; on which node each was trained does not matter to it."""
    none = statistics.difference((), ())
    value = facts.columns["value"]
    for place in mine[evidence.size[mine] == 0]:
        ours, baseline = rows.ours[place], rows.baseline[place]
        is_one = min(ours, baseline) < 0
        yield place, none if is_one else replace(none, value=float(value[ours] - value[baseline]))
    mine = mine[evidence.size[mine] > 0]
    whose, which = _each(evidence.start[mine], evidence.start[mine] + evidence.size[mine])
    rounds = evidence.rows.iloc[which]
    seed = rounds["seed"].to_numpy()
    is_first = (np.diff(whose, prepend=-1) != 0) | (np.diff(seed, prepend=-1) != 0)
    number = np.cumsum(is_first) - 1
    ours, baseline = (
        np.bincount(number, weights=rounds[side]) / np.bincount(number)
        for side in ("ours", "baseline")
    )
    counts = np.bincount(whose[is_first], minlength=len(mine))
    start = np.cumsum(counts) - counts
    for metric, count, some in _alike(rows.metric[mine], counts):
        seeds = start[some][:, None] + np.arange(count)
        apart = ours[seeds] - baseline[seeds]
        yield from zip(
            mine[some], statistics.differences(apart, better=METRICS[metric].better), strict=True
        )


def _compare(
    frame: pd.DataFrame, facts: _Facts, rows: _Rows, evidence: _Evidence, mine: np.ndarray
) -> Iterator[tuple[int, statistics.Comparison]]:
    """Of all else, over rounds of one block, node and device."""
    value = facts.columns["value"]
    is_cpu = np.append(facts.columns["device_kind"] == "cpu", False)  # the last: of none, at -1
    in_block, together = (  # how many there are before each round
        np.append(0, np.cumsum(evidence.rows[name].to_numpy(dtype=bool)))
        for name in ("in_block", "together")
    )
    end = evidence.start + evidence.size
    num_rounds = together[end] - together[evidence.start]
    ours, baseline = rows.ours[mine], rows.baseline[mine]
    has_way = np.array([METRICS[metric].better is not None for metric in rows.metric[mine]], bool)
    has_both = (ours >= 0) & (baseline >= 0)
    is_alike = has_both & (is_cpu[ours] == is_cpu[baseline])
    for is_it, verdict, reason in (
        (~has_both, "inconclusive", "one side has no value"),
        (has_both & ~has_way, "inconclusive", "neither way is better"),
        (has_both & has_way & ~is_alike, statistics.UNPAIRED,
         "CPU is never paired with an accelerator"),
    ):  # fmt: skip
        one = statistics.Comparison(None, None, 0, verdict, reason)
        yield from ((place, one) for place in mine[is_it])
    mine = mine[is_alike & has_way]
    is_paired = num_rounds[mine] > 0
    for place in mine[~is_paired]:
        is_block = in_block[end[place]] > in_block[evidence.start[place]]
        reason = "measured on different nodes or devices" if is_block else "not of one block"
        sides = float(value[rows.ours[place]]), float(value[rows.baseline[place]])
        better = METRICS[rows.metric[place]].better
        yield place, statistics.unpaired(*sides, better=better, reason=reason)
    mine = mine[is_paired]
    kept = evidence.rows[evidence.rows["together"].to_numpy(dtype=bool)]
    sides = [kept[side].to_numpy() for side in ("ours", "baseline")]
    margins = kept["margin"].to_numpy()
    first, last = together[evidence.start], together[end]
    many = mine[num_rounds[mine] >= statistics.BOOTSTRAP_ROUNDS]
    repeats = _repeats(frame, kept, _each(first[many], last[many])[1]) if len(many) else []
    for metric, count, some in _alike(rows.metric[mine], num_rounds[mine]):
        rounds = first[mine[some]][:, None] + np.arange(count)
        ours, baseline = (side[rounds] for side in sides)
        margin = margins[rounds].max(axis=1).tolist()
        better = METRICS[metric].better
        if count < statistics.BOOTSTRAP_ROUNDS:
            made = statistics.compare_few(ours, baseline, margin, better=better)
        else:
            again = zip(*(side[rounds] for side in repeats), strict=True)
            made = [
                statistics.compare(*values, better=better, margin=least, repeats=both)
                for *values, least, both in zip(ours, baseline, margin, again, strict=True)
            ]
        yield from zip(mine[some], made, strict=True)


def _alike(metrics: np.ndarray, counts: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
    """The places that have one metric and as many rounds or seeds."""
    for (metric, count), places in pd.Series(range(len(counts))).groupby([metrics, counts]):
        yield metric, int(count), places.to_numpy()


def _are_partners(cells: pd.DataFrame, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of cells of two backends, which are paired: those that asked for the same kernels, else
    those that ran kernels of the same name or, both, their backend's own. Unsupported cells are
    paired by equal kernels alone, and only where nothing else is."""
    kernels = cells["kernels"].to_numpy(dtype=object)
    can_run = (cells["outcome"] != "unsupported").to_numpy(dtype=bool)
    is_equal = kernels[left] == kernels[right]
    first = is_equal & can_run[left] & can_run[right]
    open_ = can_run[left] & can_run[right] & ~np.isin(left, left[first])
    second = np.zeros(len(left), dtype=bool)
    if open_.any():
        facts = cells[["kernels", *settings.RESOLVED]].to_dict("records")
        second[open_] = [
            _go_together(facts[one], facts[other])
            for one, other in zip(left[open_], right[open_], strict=True)
        ]
    some = first | second
    return some | (is_equal & ~np.isin(left, left[some]))


def _go_together(cell: dict, other: dict) -> bool:
    for name in settings.RESOLVED:
        asked = [json.loads(c["kernels"]).get(name, "auto") for c in (cell, other)]
        ran = [c[name] if a == "auto" else a for a, c in zip(asked, (cell, other), strict=True)]
        are_own = all(a == "auto" or a.startswith(settings.OUR_KERNELS) for a in asked)
        if not are_own and ran[0] != ran[1]:
            return False
    return True


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
