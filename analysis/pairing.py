"""Which cells stand beside which: those that differ in one setting alone."""

import json

import numpy as np
import pandas as pd

from analysis import settings
from analysis.derive import outcomes
from analysis.remember import remembered

# What is known of a pair: what both sides share, and what each has of its own.
SETTINGS = ("suite", "family", "size", "backend", "dtype", "device_kind", "op", "work_phase",
            "seq_len", "batch_size", "prompt_len", "num_new_tokens", "num_steps", "num_devices",
            "data", "task", "variant")  # fmt: skip
SIDE = ("value", "low", "high", "num_rounds", "num_seeds", "outcome", "status", "parity",
        "num_params", "num_params_non_embedding", "cell_id", "is_current",
        "num_outliers", "flags", "linear_scan")  # fmt: skip


@remembered
def pairs(
    frame: pd.DataFrame, by: str, ours: str, baseline: str
) -> list[tuple[dict | None, dict | None]]:
    """Cells of `ours` beside cells of `baseline` that differ in nothing else. A cell without a
    partner stands alone: of a backend or a family any, else one of a suite and family in which
    both sides were asked for."""
    cells = outcomes(frame)
    names = {*SETTINGS, *SIDE, *settings.RESOLVED, "kernels"}
    cells = cells[[name for name in cells if name in names]].to_dict("records")
    cells.append(None)  # at -1
    return [(cells[left], cells[right]) for left, right in places_of(frame, by, ours, baseline).T]


@remembered
def places_of(frame: pd.DataFrame, by: str, ours: str, baseline: str) -> np.ndarray:
    """Of each pair the two places in outcomes(), in two rows; -1 where a cell stands alone."""
    cells, group, value = _grouped(frame, by)
    lefts, rights = (np.flatnonzero(value == side) for side in (ours, baseline))
    rights = rights[np.argsort(group[rights], kind="stable")]
    start, end = (np.searchsorted(group[rights], group[lefts], side) for side in ("left", "right"))
    whose, which = each(start, end)
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


def each(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every place of these ranges, one range after the other: whose it is, and which."""
    size = end - start
    whose = np.repeat(np.arange(len(size)), size)
    return whose, start[whose] + np.arange(len(whose)) - (np.cumsum(size) - size)[whose]


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
