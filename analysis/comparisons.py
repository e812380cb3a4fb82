"""Matched pairs of cells that differ in one setting: both values, paired rounds, verdict."""

import json
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import noise, settings, statistics
from analysis.derive import outcomes, processes, shown, summary
from analysis.remember import remembered
from analysis.vocabulary import HEADLINES, QUALITIES, TIMES, plain
from suites.harness.record import METRICS

KERNELS = ("linear_scan", "attention", "layers")  # settings that name a variant
OUR_KERNELS = ("triton", "pallas")  # the variants that are hand-written begin with it
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
    return _comparisons(frame, by, ours, baseline, metrics)


@remembered
def pairs(
    frame: pd.DataFrame, by: str, ours: str, baseline: str
) -> list[tuple[dict | None, dict | None]]:
    """Cells of `ours` beside cells of `baseline` that differ in nothing else. A cell without a
    partner stands alone: of a backend or a family any, else one of a suite and family in which
    both sides were asked for."""
    groups, sides, asked = _grouped(frame, by)
    made: list[tuple[dict | None, dict | None]] = []
    for group in groups:
        lefts = [cell for cell in group if sides[cell["cell_id"]] == ours]
        rights = [cell for cell in group if sides[cell["cell_id"]] == baseline]
        taken = set()
        for left in lefts:
            partners = _of_its_kernels(left, rights) if by == "backend" else rights
            taken |= {right["cell_id"] for right in partners}
            made += [(left, right) for right in partners] or [(left, None)]
        made += [(None, right) for right in rights if right["cell_id"] not in taken]
    if by in ("backend", "family"):
        return made
    return [
        (left, right)
        for left, right in made
        if (left and right)
        or asked[(left or right)["suite"], (left or right)["family"]] >= {ours, baseline}
    ]


@remembered
def _grouped(
    frame: pd.DataFrame, by: str
) -> tuple[list[list[dict]], dict[str, str | None], dict[tuple, set[str | None]]]:
    """Cells that share all but one setting; each one's value of that; and the values that were
    asked for in each suite and family."""
    table = settings.asked(frame)
    groups = settings.shared(table, by).to_dict()
    sides = table[by].to_dict()
    grouped: dict[int, list[dict]] = {}
    asked: dict[tuple, set[str | None]] = {}
    for cell in _cells(frame):
        if (name := cell["cell_id"]) in groups:
            grouped.setdefault(groups[name], []).append(cell)
            asked.setdefault((cell["suite"], cell["family"]), set()).add(sides[name])
    return list(grouped.values()), sides, asked


@remembered
def _variants(frame: pd.DataFrame, by: str) -> dict[str, str]:
    return settings.variants(settings.asked(frame), by).to_dict()


@remembered
def _cells(frame: pd.DataFrame) -> list[dict]:
    cells = outcomes(frame)
    names = {*_SETTINGS, *_SIDE, *KERNELS, "kernels"}
    return cells[[name for name in cells if name in names]].to_dict("records")


@remembered
def _facts_of(frame: pd.DataFrame, wanted: tuple[str, ...]) -> dict[str, dict[tuple, dict]]:
    """Cell to (metric, at) to its row of the summary."""
    cells = summary(frame)
    cells = cells[is_wanted(cells, wanted)]
    odd = noise.flags(frame).to_dict()
    places = zip(cells["cell_id"], cells["metric"], cells["at"].fillna(-1), strict=True)
    cells = cells.assign(flags=[odd.get(place, "") for place in places])
    made: dict[str, dict[tuple, dict]] = {}
    cells = cells[["metric", "at", "device_kind", *(name for name in _SIDE if name in cells)]]
    for row in cells.to_dict("records"):
        made.setdefault(row["cell_id"], {})[row["metric"], plain(row["at"])] = row
    return made


@remembered
def _comparisons(
    frame: pd.DataFrame, by: str, ours: str, baseline: str, wanted: tuple[str, ...]
) -> pd.DataFrame:
    found = pairs(frame, by, ours, baseline)
    evidence = _evidence(frame, [(_id(left), _id(right)) for left, right in found], wanted)
    facts = _facts_of(frame, wanted)
    made: list[_Row] = []
    for left, right in found:
        ours_facts, baseline_facts = (facts.get(_id(side), {}) for side in (left, right))
        points = [*ours_facts, *baseline_facts]
        if not points:
            first = HEADLINES.get((left or right)["suite"], ())[:1]
            points = [(name, None) for name in first if not wanted or name in wanted]
        for metric, at in dict.fromkeys(points):
            a, b = ours_facts.get((metric, at)), baseline_facts.get((metric, at))
            rounds = evidence.get((_id(left), _id(right), metric, at))
            made.append(_Row(left, right, a, b, metric, at, rounds))
    variants = _variants(frame, by)
    columns = _columns(made) | {"by": by, "ours": ours, "baseline": baseline}
    columns["variant"] = [_variant(variants, row, by) for row in made]
    rows = pd.DataFrame(columns, columns=_PAIR_COLUMNS, index=range(len(made)))
    return rows.astype({name: "float64" for name in _PAIR_NUMBERS})


class _Row(NamedTuple):
    """Two cells, what one metric of each is, and the rounds that both have."""

    left: dict | None
    right: dict | None
    ours: dict | None
    baseline: dict | None
    metric: str
    at: float | None
    rounds: dict[str, np.ndarray] | None


def _variant(variants: dict[str, str], row: _Row, by: str) -> str:
    """Backends may be paired although they differ in more: then both are named."""
    words = [variants[side["cell_id"]] for side in (row.left, row.right) if side]
    return " beside ".join(dict.fromkeys(words)) if by == "backend" else words[0]


def _columns(rows: list[_Row]) -> dict[str, Any]:
    """A list a column: a dict for each of 100,000 rows of 70 columns takes many times as long."""
    columns: dict[str, Any] = {
        "metric": [row.metric for row in rows],
        "at": [row.at for row in rows],
        "unit": [METRICS[row.metric].unit for row in rows],
    }
    ones = [row.left or row.right for row in rows]
    columns |= {name: [one[name] for one in ones] for name in _SETTINGS}
    for side, parts in (
        ("ours", [(row.left or {}, row.ours or {}) for row in rows]),
        ("baseline", [(row.right or {}, row.baseline or {}) for row in rows]),
    ):
        for name in _SIDE:
            columns[f"{name}_{side}"] = [
                fact[name] if name in fact else cell.get(name) for cell, fact in parts
            ]
    found = zip(_judged(rows), rows, strict=True)
    told = [_told(one, row.metric) for one, row in found]
    return columns | {name: [one.get(name) for one in told] for name in _TOLD}


def _told(found: statistics.Comparison | statistics.Difference, metric: str) -> dict[str, Any]:
    low, high = found.interval or (None, None)
    if isinstance(found, statistics.Difference):
        return {
            "difference": found.value,
            "difference_low": low,
            "difference_high": high,
            "p": found.p,
            "detectable": found.detectable,
            "num_paired_rounds": 0,
            "num_paired_seeds": found.num_seeds,
            "verdict": found.verdict if found.value is not None else None,
            "reason": found.reason,
        }
    return {
        "speedup": found.speedup,
        "speedup_low": low,
        "speedup_high": high,
        "margin": found.margin,
        "num_paired_rounds": found.num_rounds,
        "num_paired_seeds": 0,
        "verdict": found.verdict if metric in TIMES else None,
        "reason": found.reason,
    }


def is_wanted(rows: pd.DataFrame, metrics: tuple[str, ...]) -> pd.Series:
    return rows["metric"].isin(metrics) if metrics else shown(rows)


def _evidence(
    frame: pd.DataFrame, pairs: list[tuple], wanted: tuple[str, ...]
) -> dict[tuple, dict[str, np.ndarray]]:
    """The rounds that both cells of a pair have, by (cell, cell, metric, at): values of both
    sides, whether the two processes shared a block, a node and a device, and how noisy that is.
    From 20 rounds on the repeats of both too."""
    cells, rows = _rounds(frame, wanted)
    ids = pd.DataFrame([pair for pair in pairs if None not in pair], columns=["cell", "other"])
    ids = pd.DataFrame({side: cells.get_indexer(ids[side]) for side in ids}).drop_duplicates()
    ours, theirs = (rows[rows["cell"].isin(ids[side])] for side in ids)
    both = ids.merge(ours, on="cell").merge(
        theirs.rename(columns={"cell": "other"}), on=["other", "point"], suffixes=("", "_2")
    )
    pair = both["cell"].to_numpy() * len(cells) + both["other"].to_numpy()
    order = np.lexsort((both["round"], both["seed"], both["what"], pair))
    both, pair = both.iloc[order].reset_index(drop=True), pair[order]
    in_block, *on_one = (_is_same(both, name) for name in ("block", "node", "device_name"))
    columns = {
        "ours": both["value"].to_numpy(dtype=float),
        "baseline": both["value_2"].to_numpy(dtype=float),
        "seed": both["seed"].to_numpy(dtype=int),
        "in_block": in_block,
        "together": np.logical_and.reduce([in_block, *on_one]),
        "margin": both["margin"].to_numpy(dtype=float),
    }
    what = both["what"].to_numpy()
    starts = np.flatnonzero((np.diff(pair, prepend=-1) != 0) | (np.diff(what, prepend=-1) != 0))
    ends = [*starts[1:], len(both)][: len(starts)]
    parts = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    first = both.iloc[starts]
    keys = zip(cells[first["cell"]], cells[first["other"]], first["metric"], first["at"],
               strict=True)  # fmt: skip
    found = {
        (cell, other, metric, None if at < 0 else at): {
            name: values[part] for name, values in columns.items()
        }
        for (cell, other, metric, at), part in zip(keys, parts, strict=True)
    }
    many = [part for part in parts if part.stop - part.start >= statistics.BOOTSTRAP_ROUNDS]
    if many:
        columns |= _repeats(frame, both, np.concatenate([np.r_[part] for part in many]))
        for rounds, part in zip(found.values(), parts, strict=True):
            if part.stop - part.start >= statistics.BOOTSTRAP_ROUNDS:
                rounds |= {name: columns[name][part] for name in ("repeats", "repeats_2")}
    return found


@remembered
def _rounds(frame: pd.DataFrame, wanted: tuple[str, ...]) -> tuple[pd.Index, pd.DataFrame]:
    """The cells, and the processes of each by its place there, as numbers that are fast to join:
    `what` stands for a metric and its `at`, `point` for these in one seed and round."""
    rows = processes(frame)
    names = ["cell_id", "run_id", "metric", "at", "seed", "round", "value", "block", "node",
             "device_name"]  # fmt: skip
    rows = rows.loc[is_wanted(rows, wanted), names].reset_index(drop=True)
    rows["at"] = rows["at"].fillna(-1)
    rows["margin"] = _margins(frame, rows)
    for name, key in (("what", ["metric", "at"]), ("point", ["metric", "at", "seed", "round"])):
        rows[name] = rows.groupby(key, sort=False, observed=True).ngroup()
    rows["cell"], cells = pd.factorize(rows.pop("cell_id"))
    for name in ("block", "node", "device_name"):
        rows[name], _ = pd.factorize(rows[name])
    return pd.Index(np.asarray(cells, dtype=object)), rows


def _is_same(both: pd.DataFrame, name: str) -> np.ndarray:
    ours, theirs = both[name].to_numpy(), both[f"{name}_2"].to_numpy()
    return (ours >= 0) & (ours == theirs)


def _margins(frame: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    floors = noise.floors(frame)
    places = zip(rows["node"], rows["device_name"], rows["metric"], strict=True)
    unknown = statistics.noise_floor(())
    return np.array([floors.get(place, unknown) for place in places], dtype=float)


def _repeats(frame: pd.DataFrame, both: pd.DataFrame, places: np.ndarray) -> dict[str, np.ndarray]:
    """The values that each process of these rows was summed up from, for both sides."""
    wanted = both.iloc[places]
    is_kept = frame["is_counted"].fillna(False).astype(bool) & frame["value"].notna()
    is_kept &= frame["run_id"].isin({*wanted["run_id"], *wanted["run_id_2"]})
    rows = frame.loc[is_kept, ["run_id", "metric", "at", "value"]]
    rows = rows.astype({"run_id": object, "metric": object})
    rows = rows.assign(at=rows["at"].astype("float64").fillna(-1)).reset_index(drop=True)
    groups = rows.groupby(["run_id", "metric", "at"], sort=False).indices
    values, found = rows["value"].to_numpy(dtype=float), {}
    for side in ("", "_2"):
        column = np.empty(len(both), dtype=object)
        keys = zip(wanted[f"run_id{side}"], wanted["metric"], wanted["at"], strict=True)
        for place, key in zip(places, keys, strict=True):
            column[place] = values[groups[key]]
        found[f"repeats{side}"] = column
    return found


def _judged(rows: list[_Row]) -> list[statistics.Comparison | statistics.Difference]:
    """Those of equally many rounds or seeds at once: one by one takes NumPy ten times as long."""
    found: list[Any] = [
        _differ(row) if row.metric in QUALITIES else _compare(row, METRICS[row.metric].better)
        for row in rows
    ]
    few: dict[tuple, list[int]] = {}
    for place, (row, one) in enumerate(zip(rows, found, strict=True)):
        if isinstance(one, _Few):
            few.setdefault((row.metric, len(one.ours)), []).append(place)
    for (metric, _), places in few.items():
        ours, baseline = (
            np.array([getattr(found[place], side) for place in places])
            for side in ("ours", "baseline")
        )
        better = METRICS[metric].better
        if metric in QUALITIES:
            made = statistics.differences(ours - baseline, better=better)
        else:
            margins = [found[place].margin for place in places]
            made = statistics.compare_few(ours, baseline, margins, better=better)
        for place, one in zip(places, made, strict=True):
            found[place] = one
    return found


class _Few(NamedTuple):
    """Values of two sides, one a round or a seed, still to be compared."""

    ours: np.ndarray
    baseline: np.ndarray
    margin: float = 0.0


def _compare(row: _Row, better: str | None) -> statistics.Comparison | _Few:
    a, b, rounds = row.ours, row.baseline, row.rounds
    if a is None or b is None:
        return statistics.Comparison(None, None, 0, "inconclusive", "one side has no value")
    if better is None:
        return statistics.Comparison(None, None, 0, "inconclusive", "neither way is better")
    if {a["device_kind"], b["device_kind"]} > {"cpu"}:
        reason = "CPU is never paired with an accelerator"
        return statistics.Comparison(None, None, 0, statistics.UNPAIRED, reason)
    if rounds is None or not rounds["together"].any():
        is_block = rounds is not None and rounds["in_block"].any()
        reason = "measured on different nodes or devices" if is_block else "not of one block"
        return statistics.unpaired(a["value"], b["value"], better=better, reason=reason)
    kept = rounds["together"]
    ours, baseline = rounds["ours"][kept], rounds["baseline"][kept]
    margin = float(rounds["margin"][kept].max())
    if len(ours) < statistics.BOOTSTRAP_ROUNDS:
        return _Few(ours, baseline, margin)
    repeats = (rounds["repeats"][kept], rounds["repeats_2"][kept]) if "repeats" in rounds else None
    return statistics.compare(ours, baseline, better=better, margin=margin, repeats=repeats)


def _differ(row: _Row) -> statistics.Difference | _Few:
    """Of a quality, over seeds; on which node each was trained does not matter to it."""
    a, b, rounds = row.ours, row.baseline, row.rounds
    if a is None or b is None:
        return statistics.difference((), ())
    if rounds is None:
        return replace(statistics.difference((), ()), value=a["value"] - b["value"])
    _, places = np.unique(rounds["seed"], return_inverse=True)
    return _Few(*(
        np.bincount(places, weights=rounds[side]) / np.bincount(places)
        for side in ("ours", "baseline")
    ))  # fmt: skip


def _of_its_kernels(cell: dict, others: list[dict]) -> list[dict]:
    """The cells of another backend that asked for the same kernels, else those that ran kernels of
    the same name or, as this one, their backend's own. Unsupported cells are paired by equal
    kernels alone, and only where nothing else is."""
    equal = [other for other in others if other["kernels"] == cell["kernels"]]
    if cell["outcome"] == "unsupported":
        return equal
    can_run = [other for other in others if other["outcome"] != "unsupported"]
    return (
        [other for other in can_run if other["kernels"] == cell["kernels"]]
        or [other for other in can_run if _go_together(cell, other)]
        or equal
    )


def _go_together(cell: dict, other: dict) -> bool:
    for name in KERNELS:
        asked = [json.loads(c["kernels"]).get(name, "auto") for c in (cell, other)]
        ran = [c[name] if a == "auto" else a for a, c in zip(asked, (cell, other), strict=True)]
        are_own = all(a == "auto" or a.startswith(OUR_KERNELS) for a in asked)
        if not are_own and ran[0] != ran[1]:
            return False
    return True


def _id(cell: dict | None) -> str | None:
    return None if cell is None else cell["cell_id"]
