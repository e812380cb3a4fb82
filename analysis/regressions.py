"""One set of records beside another, of another day or machine: is anything worse?

Cells are matched by all their settings. Nothing was interleaved, so a ratio holds what changed
between the days and the machines too; its interval (Welch's t on the logarithms of per-process
medians) holds the spread of both sides alone. It is a gate, and no comparison of variants.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import settings, statistics, tables, wording
from analysis.comparisons import in_order
from analysis.derive import outcomes, processes, runs, summary
from analysis.judging import is_wanted
from analysis.load import COLUMNS
from analysis.vocabulary import plain
from suites.harness.record import METRICS

BETTER, WORSE, EQUIVALENT, UNKNOWN = "better", "worse", "equivalent", "inconclusive"
LOST = "lost"  # a smaller share of its runs completed than in the baseline
_NEAR = 3  # settings: cells that differ in more are no neighbours
_COLUMNS = ["cell_id", "suite", "family", "size", "backend", "dtype", "device_kind", "op",
            "work_phase", "seq_len", "batch_size", "prompt_len", "num_new_tokens", "num_steps",
            "num_devices", "data", "variant", "metric", "at", "unit",
            *(f"{name}_{side}" for name in ("value", "num_processes", "parity", "status")
              for side in ("ours", "baseline")),
            "ratio", "ratio_low", "ratio_high", "verdict", "reason",
            "is_regression"]  # fmt: skip


@dataclass(frozen=True)
class Found:
    """`rows`: a cell and metric that both have, each. `refused`: cells that both have on devices of
    other kinds. `lone`: cells that one side has alone, with the nearest of the other. `missing`:
    those of them that the baseline completed; ours has no run of them."""

    rows: pd.DataFrame
    refused: list[str]
    lone: list[str]
    missing: list[str]
    num_cells: int

    @property
    def regressions(self) -> pd.DataFrame:
        return self.rows[self.rows["is_regression"]]


def read(path: Path) -> pd.DataFrame:
    """A frame that was written as a file (by aerie collect, or a report); ValueError where it is
    none, or has not our columns."""
    from pyarrow import ArrowException

    try:
        frame = pd.read_parquet(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from None
    if missing := [name for name in COLUMNS if name not in frame]:
        raise ValueError(
            f"{path} lacks the column {missing[0]!r}: it holds no records, or those of another "
            "version of aerie; collect them again."
        )
    words = {
        name: frame[name].astype(object).where(frame[name].notna(), None)
        for name, kind in COLUMNS.items()
        if kind == "str" and not isinstance(frame[name].dtype, pd.CategoricalDtype)
    }
    # what is compiled alone never ran: nothing of it is a speed
    return frame[frame["suite"] != "compile"].assign(**words).reset_index(drop=True)


def compare(
    ours: pd.DataFrame,
    baseline: pd.DataFrame,
    *,
    metrics: tuple[str, ...] = (),
    limit: float | None = None,
    names: tuple[str, str] = ("ours", "baseline"),
) -> Found:
    """`limit` (0.03: worse by more than 3%) makes regressions of what is worse beyond it."""
    sides = (ours, baseline)
    cells = [_cells(frame) for frame in sides]
    shared = [cell for cell in cells[1] if cell in cells[0]]
    values = [_values(frame, metrics) for frame in sides]
    rows = []
    for cell in shared:
        points = [point for side in reversed(values) for point in side.get(cell, {})]
        for point in dict.fromkeys(points):
            found = [side.get(cell, {}).get(point, _Side(np.array([]))) for side in values]
            if METRICS[point[0]].better is not None:
                both = (cells[0][cell], cells[1][cell])
                rows.append(_row(*both, point, *found, limit))
    made = pd.DataFrame(rows, columns=_COLUMNS).astype({"is_regression": bool})
    refused, lone, missing = _unmatched(*cells, names)
    return Found(in_order(made), refused, lone, missing, len(shared))


def table(found: pd.DataFrame, names: tuple[str, str]) -> tables.Table:
    """As a table of people: what is the same in all rows is left out."""
    shown = [name for name in ("size", "dtype", "device_kind", "data", "variant")
             if found[name].nunique() > 1]  # fmt: skip
    shown = ["suite", "family", "backend", *shown]
    header = [*shown, "workload", "metric", *names, "ratio", "processes", "verdict", "parity"]
    rows = []
    for row in found.to_dict("records"):
        sides = {}
        for side in ("ours", "baseline"):
            value = wording.number(row[f"value_{side}"], row["metric"])
            is_ended = value == wording.NONE and row[f"status_{side}"] != "completed"
            sides[side] = f"{value} ({row[f'status_{side}']})" if is_ended else value
        counts = [f"{int(row[f'num_processes_{side}'])}" for side in ("ours", "baseline")]
        reason = plain(row["reason"])
        verdict = f"{row['verdict']} ({reason})" if reason else row["verdict"]
        rows.append(
            [
                *(str(row[name]) for name in shown),
                wording.workload(row),
                METRICS[row["metric"]].label,
                *sides.values(),
                _ratio(row),
                " / ".join(dict.fromkeys(counts)),
                verdict,
                wording.parity_mark(row, *names),
            ]
        )
    note = (
        f"The ratio is how many times better {names[0]} is than {names[1]} (above 1: faster, or "
        "less memory), with its 95% interval over the processes of both sides: they were not "
        "measured side by side."
    )
    return tables.Table("regressions", f"{names[0]} beside {names[1]}", header, rows, found, note)


def is_beyond(ratio: float | None, limit: float) -> bool:
    """Whether a ratio is worse by more: 1/1.04 beyond 0.03."""
    return plain(ratio) is not None and ratio < 1 / (1 + limit)


def worse_by(ratio: float) -> str:
    """1/1.08 is worse by 8.0%."""
    return f"{1 / ratio - 1:.1%}"


def machines(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Where and when the counted runs of a side were measured."""
    rows = runs(frame)
    rows = rows[rows["suite"] != "parity"]
    days = sorted(text[:10] for text in rows["started_at"].dropna())
    commits = [
        commit[:12] + plus + dirty
        for commit, plus, dirty in (
            text.partition("+") for text in set(rows["git_commit"].dropna())
        )
    ]
    return {
        "nodes": sorted(rows["node"].dropna().unique()),
        "devices": sorted(rows["device_name"].dropna().unique()),
        "days": list(dict.fromkeys([*days[:1], *days[-1:]])),
        "commits": sorted(commits),
    }


@dataclass(frozen=True)
class _Side:
    values: np.ndarray  # of each process, the median over its repeats
    parity: str | None = None


def _cells(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    cells = outcomes(frame)
    cells = cells[cells["suite"] != "parity"]
    if cells.empty:
        return {}
    variants = settings.variants(settings.asked(frame), "")
    cells = cells.assign(variant=cells["cell_id"].map(variants))
    return {cell["cell_id"]: cell for cell in cells.to_dict("records")}


def _values(frame: pd.DataFrame, metrics: tuple[str, ...]) -> dict[str, dict[tuple, _Side]]:
    """Cell to (metric, at) to its processes."""
    rows = processes(frame)
    rows = rows[is_wanted(rows, metrics)]
    cells = summary(frame).assign(at=lambda made: made["at"].astype("float64").fillna(-1))
    marks = cells.set_index(["cell_id", "metric", "at"])["parity"].to_dict()
    made: dict[str, dict[tuple, _Side]] = {}
    rows = rows.assign(at=rows["at"].fillna(-1))
    groups = rows.groupby(["cell_id", "metric", "at"], sort=False, observed=True)
    for (cell, metric, at), values in groups["value"]:
        side = _Side(values.to_numpy(dtype=float), marks.get((cell, metric, at)))
        made.setdefault(cell, {})[metric, None if at < 0 else at] = side
    return made


def _row(
    ours: dict, baseline: dict, point: tuple, a: _Side, b: _Side, limit: float | None
) -> dict[str, Any]:
    metric, at = point
    ratio, interval, verdict, reason = _judge(a.values, b.values, METRICS[metric].better, limit)
    shares = [cell["num_completed"] / cell["num_runs"] for cell in (ours, baseline)]
    if shares[0] < shares[1]:
        verdict, reason = LOST, ours["status"]
        if shares[0]:
            reason = f"{reason}; {_completed(ours)} completed, {_completed(baseline)} before"
    is_worse = verdict == WORSE and limit is not None and is_beyond(ratio, limit)
    row = {name: plain(ours.get(name)) for name in _COLUMNS}
    for side, cell, found in (("ours", ours, a), ("baseline", baseline, b)):
        row |= {
            f"value_{side}": float(np.median(found.values)) if len(found.values) else None,
            f"num_processes_{side}": len(found.values),
            f"parity_{side}": found.parity,
            f"status_{side}": cell["status"],
        }
    return row | {
        "metric": metric,
        "at": at,
        "unit": METRICS[metric].unit,
        "ratio": ratio,
        "ratio_low": interval and interval[0],
        "ratio_high": interval and interval[1],
        "verdict": verdict,
        "reason": reason,
        "is_regression": is_worse or (verdict == LOST and limit is not None),
    }


def _completed(cell: dict[str, Any]) -> str:
    return f"{cell['num_completed']} of {cell['num_runs']}"


def _judge(
    ours: np.ndarray, baseline: np.ndarray, better: str, limit: float | None
) -> tuple[float | None, statistics.Interval | None, str, str | None]:
    """Ratio, interval, verdict, and why there is none."""
    n = min(len(ours), len(baseline))
    if n == 0:
        return None, None, UNKNOWN, "one side has no value"
    if not ((ours > 0).all() and (baseline > 0).all()):
        return None, None, UNKNOWN, "a ratio needs positive values"
    sign = 1 if better == "higher" else -1
    apart, bounds = statistics.welch(sign * np.log(ours), sign * np.log(baseline))
    interval = bounds and (math.exp(bounds[0]), math.exp(bounds[1]))
    if n < statistics.MIN_ROUNDS or interval is None:
        few = f"{n} of {statistics.MIN_ROUNDS} processes"
        return math.exp(apart), interval, UNKNOWN, few
    margin = 1 + (statistics.MARGINS[1] if limit is None else limit)
    low, high = interval
    if high < 1 or low > 1:
        return math.exp(apart), interval, WORSE if high < 1 else BETTER, None
    if low >= 1 / margin and high <= margin:
        return math.exp(apart), interval, EQUIVALENT, None
    return math.exp(apart), interval, UNKNOWN, "the interval holds both better and worse"


def _unmatched(
    ours: dict[str, dict], baseline: dict[str, dict], names: tuple[str, str]
) -> tuple[list[str], list[str], list[str]]:
    """What is refused, what one side has alone, and what of it is missing in ours."""
    alone = [
        {key: settings.flat(cell["settings"]) for key, cell in side.items() if key not in other}
        for side, other in ((ours, baseline), (baseline, ours))
    ]

    def without_device(cell: dict[str, str | None]) -> tuple:
        return tuple(item for item in cell.items() if item[0] != "device_kind")

    elsewhere = {without_device(cell): key for key, cell in alone[1].items()}
    refused, lone, missing, taken = [], [], [], set()
    for key, cell in alone[0].items():
        if (partner := elsewhere.get(without_device(cell))) is not None:
            taken |= {key, partner}
            kinds = [side["device_kind"] for side in (ours[key], baseline[partner])]
            refused.append(
                f"{_words(ours[key])}: {kinds[0]} in {names[0]}, {kinds[1]} in {names[1]}"
            )
    for place, (side, cells) in enumerate(zip(alone, (ours, baseline), strict=True)):
        for key, cell in side.items():
            if key not in taken:
                nearest = _nearest(cell, alone[1 - place].values())
                there = f"; the nearest in {names[1 - place]} has {nearest}" if nearest else ""
                lone.append(f"{_words(cells[key])}: in {names[place]} alone{there}")
                if cells is baseline and cells[key]["num_completed"]:
                    missing.append(_words(cells[key]))
    return refused, lone, missing


def _nearest(cell: dict[str, str | None], others: Iterable[dict[str, str | None]]) -> str | None:
    """What the least different of the same suite has, where that is little."""
    found = [
        [
            f"{name}={other.get(name)}"
            for name in {**cell, **other}
            if cell.get(name) != other.get(name)
        ]
        for other in others
        if other["suite"] == cell["suite"]
    ]
    least = min(found, key=len, default=[])
    return ", ".join(least) if 0 < len(least) <= _NEAR else None


def _words(cell: dict[str, Any]) -> str:
    words = [cell["suite"], cell["family"], cell["size"], cell["backend"], cell["dtype"],
             wording.workload(cell), cell["variant"]]  # fmt: skip
    return ", ".join(word for word in words if word)


def _ratio(row: dict[str, Any]) -> str:
    if plain(row["ratio"]) is None:
        return wording.NONE
    text = f"{_digits(row['ratio'])}x"
    if plain(row["ratio_low"]) is not None and row["ratio_high"] > row["ratio_low"]:
        text += f" [{_digits(row['ratio_low'])}, {_digits(row['ratio_high'])}]"
    return text


def _digits(ratio: float) -> str:
    return f"{ratio:.3f}" if 0.1 <= ratio < 10 else f"{ratio:.3g}"
