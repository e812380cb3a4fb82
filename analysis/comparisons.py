"""Matched pairs of cells that differ in one setting: both values, paired rounds, verdict."""

import json
from dataclasses import replace
from typing import Any

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
             "data", "variant")  # fmt: skip
_SIDE = ("value", "low", "high", "num_rounds", "num_seeds", "outcome", "status", "parity",
         "num_params", "num_params_non_embedding", "cell_id", "is_current",
         "num_outliers", "flags", "linear_scan")  # fmt: skip
_PAIR_COLUMNS = ["by", "ours", "baseline", *_SETTINGS, "metric", "at", "unit",
                 *(f"{name}_{side}" for name in _SIDE for side in ("ours", "baseline")),
                 "speedup", "speedup_low", "speedup_high", "margin", "difference",
                 "difference_low", "difference_high", "p", "detectable", "num_paired_rounds",
                 "num_paired_seeds", "verdict", "reason"]  # fmt: skip
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
    groups, asked = _grouped(frame, by)
    made: list[tuple[dict | None, dict | None]] = []
    for group in groups:
        lefts = [cell for cell in group if cell["side"] == ours]
        rights = [cell for cell in group if cell["side"] == baseline]
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
def _grouped(frame: pd.DataFrame, by: str) -> tuple[list[list[dict]], dict[tuple, set[str]]]:
    """Cells that share all but one setting, each with its value of that and with what else tells
    it apart; and the values that were asked for in each suite and family."""
    table = settings.asked(frame)
    groups = settings.shared(table, by).to_dict()
    sides = table[by].to_dict()
    variants = settings.variants(table, by).to_dict()
    grouped: dict[int, list[dict]] = {}
    asked: dict[tuple, set[str]] = {}
    for cell in _cells(frame):
        if (name := cell["cell_id"]) in groups:
            cell = cell | {"side": sides[name], "variant": variants[name]}
            grouped.setdefault(groups[name], []).append(cell)
            asked.setdefault((cell["suite"], cell["family"]), set()).add(sides[name])
    return list(grouped.values()), asked


@remembered
def _cells(frame: pd.DataFrame) -> list[dict]:
    return outcomes(frame).to_dict("records")


@remembered
def _facts_of(frame: pd.DataFrame, wanted: tuple[str, ...]) -> dict[str, dict[tuple, dict]]:
    """Cell to (metric, at) to its row of the summary."""
    cells = summary(frame)
    cells = cells[is_wanted(cells, wanted)]
    odd = noise.flags(frame)
    places = zip(cells["cell_id"], cells["metric"], cells["at"].fillna(-1), strict=True)
    cells = cells.assign(flags=[odd.get(place, "") for place in places])
    made: dict[str, dict[tuple, dict]] = {}
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
    columns: dict[str, list] = {name: [] for name in _PAIR_COLUMNS}
    for left, right in found:
        ours_facts, baseline_facts = (facts.get(_id(side), {}) for side in (left, right))
        points = [*ours_facts, *baseline_facts]
        if not points:
            first = HEADLINES.get((left or right)["suite"], ())[:1]
            points = [(name, None) for name in first if not wanted or name in wanted]
        for metric, at in dict.fromkeys(points):
            a, b = ours_facts.get((metric, at)), baseline_facts.get((metric, at))
            rounds = evidence.get((_id(left), _id(right), metric, at))
            row = {"by": by, "ours": ours, "baseline": baseline}
            compare = _differ if metric in QUALITIES else _compare
            compared = compare(rounds, a, b, METRICS[metric].better)
            row |= _pair_row(left, right, a, b, metric, at, compared)
            if by == "backend" and left and right and left["variant"] != right["variant"]:
                row["variant"] = f"{left['variant']} beside {right['variant']}"
            for name, values in columns.items():  # many: pandas would look for keys in each row
                values.append(row.get(name))
    rows = pd.DataFrame(columns)
    return rows.astype({name: "float64" for name in _PAIR_NUMBERS})


def _pair_row(
    left: dict | None,
    right: dict | None,
    a: dict | None,
    b: dict | None,
    metric: str,
    at: float | None,
    found: statistics.Comparison | statistics.Difference,
) -> dict[str, Any]:
    row = {name: (left or right)[name] for name in _SETTINGS}
    row |= {"metric": metric, "at": at, "unit": METRICS[metric].unit}
    for side, cell, fact in (("ours", left, a), ("baseline", right, b)):
        for name in _SIDE:
            source = fact if fact is not None and name in fact else (cell or {})
            row[f"{name}_{side}"] = source.get(name)
    low, high = found.interval or (None, None)
    if isinstance(found, statistics.Difference):
        return row | {
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
    return row | {
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
    rows = frame[frame["is_counted"].fillna(False).astype(bool) & frame["value"].notna()]
    rows = rows[rows["run_id"].isin({*wanted["run_id"], *wanted["run_id_2"]})]
    rows = rows[["run_id", "metric", "at", "value"]].astype({"run_id": object, "metric": object})
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


def _compare(
    rounds: dict[str, np.ndarray] | None, a: dict | None, b: dict | None, better: str | None
) -> statistics.Comparison:
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
    repeats = (rounds["repeats"][kept], rounds["repeats_2"][kept]) if "repeats" in rounds else None
    return statistics.compare(
        rounds["ours"][kept],
        rounds["baseline"][kept],
        better=better,
        margin=float(rounds["margin"][kept].max()),
        repeats=repeats,
    )


def _differ(
    rounds: dict[str, np.ndarray] | None, a: dict | None, b: dict | None, better: str
) -> statistics.Difference:
    """Of a quality, over seeds; on which node each was trained does not matter to it."""
    if a is None or b is None:
        return statistics.difference((), ())
    if rounds is None:
        return replace(statistics.difference((), ()), value=a["value"] - b["value"])
    _, places = np.unique(rounds["seed"], return_inverse=True)
    means = [
        np.bincount(places, weights=rounds[side]) / np.bincount(places)
        for side in ("ours", "baseline")
    ]
    return statistics.difference(*means, better=better)


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
