"""What the rounds of two cells say: both sides of each round, and the verdict of each row."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis import noise, positions, statistics
from analysis.derive import outcomes, processes, shown
from analysis.pairing import each
from analysis.remember import remembered
from analysis.vocabulary import QUALITIES, TIMES
from suites.harness.record import METRICS

TOLD = ("speedup", "speedup_low", "speedup_high", "margin", "difference", "difference_low",
        "difference_high", "p", "detectable", "num_paired_rounds", "num_paired_seeds", "verdict",
        "reason")  # fmt: skip


class Facts(NamedTuple):
    """Rows of the summary, cell by cell, a column each; `start` and `end` of each cell by its place
    in outcomes(), and last, at -1, of none."""

    columns: dict[str, np.ndarray]
    what: np.ndarray  # the number of the metric and `at` of each row
    start: np.ndarray
    end: np.ndarray


class Rows(NamedTuple):
    """What is compared, a row each: the place of its pair, those of both sides in Facts.rows (-1
    for none), its metric, `at`, and the number of both."""

    pair: np.ndarray
    ours: np.ndarray
    baseline: np.ndarray
    metric: np.ndarray
    at: np.ndarray
    what: np.ndarray


class _Rounds(NamedTuple):
    """The processes of each cell, cell by cell, as numbers that are fast to join: `what` stands for
    a metric and its `at`, `point` for these in one seed and round."""

    rows: pd.DataFrame
    numbers: dict[tuple[str, float], int]  # of each metric and `at`, which is -1 for none
    start: np.ndarray  # of each cell by its place in outcomes(), and last, at -1, of none
    end: np.ndarray


@remembered
def rounds_of(frame: pd.DataFrame, wanted: tuple[str, ...]) -> _Rounds:
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
    frame: pd.DataFrame, places: np.ndarray, rows: Rows, wanted: tuple[str, ...]
) -> _Evidence:
    known = rounds_of(frame, wanted)
    points = known.rows["point"].to_numpy()
    most = points.max(initial=0) + 1
    sides = []
    for side in places:
        whose, which = each(known.start[side], known.end[side])
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


def judged(
    frame: pd.DataFrame,
    by: str,
    places: np.ndarray,
    facts: Facts,
    rows: Rows,
    wanted: tuple[str, ...],
) -> list[tuple]:
    """What is told of each row; those of equally many rounds or seeds at once, as one by one takes
    NumPy ten times as long."""
    evidence = _evidence(frame, places, rows, wanted)
    elsewhere = _told(statistics.Difference(None, None, 0, None, None, statistics.UNPAIRED,
                                            "of other positions"), positions.BEYOND)  # fmt: skip
    told = [elsewhere if positions.are_other(by, metric) else None for metric in rows.metric]
    is_told = np.array([one is not None for one in told], dtype=bool)
    is_quality = np.array([metric in QUALITIES for metric in rows.metric], dtype=bool)
    for judge, mine in ((_differ, is_quality & ~is_told), (_compare, ~is_quality)):
        for place, one in judge(frame, facts, rows, evidence, np.flatnonzero(mine)):
            told[place] = _told(one, rows.metric[place])
    return told


def _differ(
    frame: pd.DataFrame, facts: Facts, rows: Rows, evidence: _Evidence, mine: np.ndarray
) -> Iterator[tuple[int, statistics.Difference]]:
    """Of a quality, over seeds; on which node each was trained does not matter to it."""
    none = statistics.difference((), ())
    value = facts.columns["value"]
    for place in mine[evidence.size[mine] == 0]:
        ours, baseline = rows.ours[place], rows.baseline[place]
        is_one = min(ours, baseline) < 0
        yield place, none if is_one else replace(none, value=float(value[ours] - value[baseline]))
    mine = mine[evidence.size[mine] > 0]
    whose, which = each(evidence.start[mine], evidence.start[mine] + evidence.size[mine])
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
    frame: pd.DataFrame, facts: Facts, rows: Rows, evidence: _Evidence, mine: np.ndarray
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
    repeats = _repeats(frame, kept, each(first[many], last[many])[1]) if len(many) else []
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


def _told(found: statistics.Comparison | statistics.Difference, metric: str) -> tuple:
    """In the order of TOLD."""
    low, high = found.interval or (None, None)
    if isinstance(found, statistics.Difference):
        is_apart = found.verdict == statistics.UNPAIRED
        verdict = found.verdict if found.value is not None or is_apart else None
        return (None, None, None, None, found.value, low, high, found.p, found.detectable, 0,
                found.num_seeds, verdict, found.reason)  # fmt: skip
    verdict = found.verdict if metric in TIMES else None
    return (found.speedup, low, high, found.margin, None, None, None, None, None, found.num_rounds,
            0, verdict, found.reason)  # fmt: skip


def is_wanted(rows: pd.DataFrame, metrics: tuple[str, ...]) -> pd.Series:
    return rows["metric"].isin(metrics) if metrics else shown(rows)
