"""What figures share: panels, lines with intervals, what was lost, and ghosts (words: labels.py).

Family is colour, backend is marker and line style (analysis/style.py). An interval is drawn from
two processes on. A hollow marker, and a line under the plot, say UNVERIFIED. A line breaks where
a length was asked for and has no value: nothing is drawn that was not measured. A ratio of times
that were not measured side by side is a diamond on no line, and the note counts them.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis import checks, comparisons, derive, statistics, style, vocabulary, wording
from analysis.figures import labels
from analysis.remember import remembered
from suites.harness.record import METRICS

PANEL = ["size", "dtype", "device_kind", "data"]  # settings that are never drawn over each other
LINE = ["family", "backend", "variant"]
MAX_PANELS = 4
MAX_LINES = 12
WIDTH = 7.2  # inches: 700 pixels of a page, at which 9.5 points can still be read
CUT = "Some intervals reach beyond the axis; the tables have their ends."
TOP = 0.985  # of a panel: where what was lost is marked


# the numbers


def summary(frame: pd.DataFrame, suite: str, metric: str, at: bool = False) -> pd.DataFrame:
    """Cells of one metric of one suite, in the unit of its axis."""
    rows = derive.summary(frame)
    rows = rows.iloc[_places(frame).get((suite, metric), [])]
    rows = rows[rows["at"].notna() == at].copy()
    for column in ("value", "low", "high"):
        rows[column] = rows[column].astype(float) / wording.SCALES.get(metric, 1.0)
    return rows


@remembered
def _places(frame: pd.DataFrame) -> dict[tuple[str, str], np.ndarray]:
    """Of the summary, by suite and metric: every figure asks for one."""
    return derive.summary(frame).groupby(["suite", "metric"], sort=False).indices


def over_mqa(frame: pd.DataFrame, rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The other families' rows as multiples of the time of MQA with the same backend and
    workload, with the interval of the paired ratio; verified where both sides are."""
    others = sorted(set(rows["family"]) - {"mqa"}, key=vocabulary.family_order)
    if not others or "mqa" not in set(rows["family"]):
        return rows.iloc[:0]
    found = pd.concat([comparisons.comparisons(frame, by="family", ours=name) for name in others])
    found = found[(found["metric"] == metric) & found["speedup"].notna()]
    return as_multiples(rows, found)


def as_multiples(rows: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Of the baseline's time, by the speedups that comparisons found, with their verdicts."""
    found = found.drop_duplicates("cell_id_ours").set_index("cell_id_ours")
    rows = rows[rows["cell_id"].isin(found.index)].copy()
    found = found.loc[rows["cell_id"]]
    rows["value"] = 1 / found["speedup"].to_numpy(dtype=float)
    rows["low"] = 1 / found["speedup_high"].to_numpy(dtype=float)
    rows["high"] = 1 / found["speedup_low"].to_numpy(dtype=float)
    rows["verdict"] = found["verdict"].to_numpy()
    is_green = (found["parity_baseline"] == checks.GREEN).to_numpy()
    rows["parity"] = rows["parity"].where(is_green, checks.MISSING)
    return rows


# whole figures


def lines(
    rows: pd.DataFrame,
    x: str,
    x_label: str,
    y_label: str,
    *,
    is_log: bool = True,
    is_curve: bool = False,
    reference: float | None = None,
    asked: pd.DataFrame | None = None,
    from_zero: bool = False,
    limits: tuple[float, float] | None = None,
    panel: list[str] = PANEL,
    most: int = MAX_PANELS,
    notes: Iterable[str] = (),
    decorate: Callable[[Axes, pd.DataFrame], None] | None = None,
) -> Figure | None:
    """A panel for each size, dtype, device and data, a line for each family and backend. With one
    x alone the families stand side by side instead. `asked` holds all runs of the suite, those
    that did not end too: their places break the lines, and are marked at the top edge."""
    rows = rows[rows[x].notna()]
    if rows.empty:
        return None
    panels, notes = panels_of(rows, panel, notes, most)
    figure, grid = panel_grid(len(panels))
    is_single = rows[x].nunique() == 1 and not is_curve
    has_lost = False
    for axes, (key, part) in zip(grid, panels, strict=True):
        places = part[x]
        if asked is not None:
            mine = of_panel(asked, panel, key)
            mine = mine[mine[x].notna()]
            is_single = is_single and set(mine[x]) <= set(places)
            places = pd.concat([places, mine[x]])
        if reference is not None:
            axes.axhline(reference, color=style.family_color("mqa"), linewidth=1.2,
                         label=style.family_label("mqa"))  # fmt: skip
        if is_single:
            side_by_side(axes, part)
            only = int(part[x].iloc[0])
            axes.set_xlabel(f"Family; {x_label[0].lower()}{x_label[1:]}: {only:,}")
        else:
            left_out = draw_lines(axes, part, x, is_curve=is_curve, places=places)
            if left_out:
                notes.append(f"{left_out} further lines are in the tables alone.")
            axes.set_xlabel(x_label)
            if is_log:
                labels.log_lengths(axes, places.to_numpy(dtype=float))
            else:
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            if asked is not None:
                has_lost |= mark_lost(axes, mine, x)
        if decorate is not None:
            decorate(axes, part)
        labels.title(axes, rows, key, panel)
        labels.thousands(axes, rows)
    if limits is None:
        notes += keep_in_sight(grid[0], rows, from_zero, reference)
        if has_lost and grid[0].get_yscale() == "linear":  # room for the crosses
            bottom, top = grid[0].get_ylim()
            grid[0].set_ylim(bottom, top + 0.12 * (top - bottom))
    else:
        grid[0].set_ylim(limits)
    labels.label_rows(figure, y_label)
    labels.legend(figure, grid)
    labels.note(figure, notes, rows)
    return figure


def panels_of(
    rows: pd.DataFrame, keys: list[str], notes: Iterable[str], most: int = MAX_PANELS
) -> tuple[list[tuple[tuple, pd.DataFrame]], list[str]]:
    """The first panels, small models before large ones, and the notes with how many are left
    out."""
    panels = rows.groupby(keys, dropna=False)
    if {"size", "num_params"} <= {*keys, *rows}:
        params = rows.groupby("size", dropna=False)["num_params"].transform("min")
        places = np.lexsort((panels.ngroup(), params.astype("float64").fillna(0.0)))
        panels = rows.iloc[places].groupby(keys, sort=False, dropna=False)
    left_out = panels.ngroups - most
    more = [f"{left_out} further panels are in the tables alone."] if left_out > 0 else []
    return list(islice(panels, most)), [*notes, *more]


def of_panel(rows: pd.DataFrame, keys: list[str], key: tuple) -> pd.DataFrame:
    """Rows of one panel; what has no value is equal to what has none."""
    same = pd.Series(True, index=rows.index)
    for name, value in zip(keys, key, strict=True):
        same &= rows[name].isna() if pd.isna(value) else (rows[name] == value).fillna(False)
    return rows[same.astype(bool)]


def panel_grid(count: int, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """Two panels beside each other at most: more could not be read on a page."""
    columns = min(2, count)
    num_rows = -(-count // columns)
    figure = Figure(
        figsize=(WIDTH, height if num_rows == 1 else 0.8 + 0.72 * height * num_rows),
        layout="constrained",
    )
    grid = list(figure.subplots(num_rows, columns, sharey=True, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


# within a panel


def draw_lines(
    axes: Axes,
    part: pd.DataFrame,
    x: str,
    *,
    is_curve: bool = False,
    places: pd.Series | None = None,
) -> int:
    """A line for each family, backend and variant, broken at places that it has no value for;
    returns how many lines were too many to draw."""
    groups, part = line_groups(part, x), _drawn(part, x)
    known = np.unique((part[x] if places is None else places).to_numpy(dtype=float))
    seen: dict[tuple, int] = {}
    for (family, backend), extra, rows in groups[:MAX_LINES]:
        line = part.iloc[rows]
        number = seen[family, backend] = seen.get((family, backend), 0) + 1
        look = style.line(family, backend, is_verified=labels.is_verified(line))
        look["alpha"] = max(0.3, 1.3 - 0.3 * number)  # further variants of one colour pale
        draw(axes, line, x, look, labels.label(family, backend, line, extra),
             is_curve=is_curve, places=known)  # fmt: skip
    return max(0, len(groups) - MAX_LINES)


def _drawn(part: pd.DataFrame, *names: str) -> pd.DataFrame:
    """What a line needs of its rows; of 50 columns each one is looked up for itself."""
    return part[[name for name in ("value", "low", "high", "verdict", "parity", *names)
                 if name in part]]  # fmt: skip


def line_groups(part: pd.DataFrame, x: str) -> list[tuple[tuple[str, str], list[str], np.ndarray]]:
    """(family, backend), what else tells this line apart, the places of its rows; families in their
    order."""
    keys = [name for name in LINE if name in part]
    same = part.groupby([*keys, x], dropna=False)
    extra = [name for name in labels.FURTHER if name != x and name in part
             and (same[name].nunique() > 1).any()]  # fmt: skip
    if part.duplicated([*keys, *extra, x]).any():
        extra.append("cell_id")  # set apart by something that has no column
    keys = [*keys, *extra]
    number = part.groupby(keys, sort=True, dropna=False).ngroup().to_numpy()
    rows = np.argsort(number, kind="stable")
    groups = np.split(rows, np.flatnonzero(np.diff(number[rows])) + 1) if len(rows) else []
    known = {name: part[name].to_numpy(dtype=object) for name in keys}
    cells = {name: number for number, name in enumerate(part["cell_id"].unique(), start=1)}
    made = []
    for rows in groups:
        values = {name: column[rows[0]] for name, column in known.items()}
        words = [labels.text(values.get("variant") or "")]
        words += [labels.FURTHER[key].format(values[key]) for key in extra
                  if key != "cell_id" and not pd.isna(values[key])]  # fmt: skip
        if "cell_id" in extra:
            words.append(f"cell {cells[values['cell_id']]}")
        made.append(((values["family"], values["backend"]), list(filter(None, words)), rows))
    return sorted(made, key=lambda line: labels.order(line[0]))


def draw(
    axes: Axes,
    line: pd.DataFrame,
    x: str,
    look: dict[str, Any],
    name: str,
    *,
    is_curve: bool = False,
    places: np.ndarray | None = None,
) -> None:
    """One line with its intervals: bars, or a band along a curve. NaN at places without value, or
    with a ratio that is unpaired: those are marked beside the line."""
    apart = line[labels.is_unpaired(line)]
    if len(apart):
        axes.plot(apart[x].astype(float), apart["value"].astype(float), **style.unpaired(look),
                  label=f"{name}: {statistics.UNPAIRED}")  # fmt: skip
        line = line[~labels.is_unpaired(line)]
        if line.empty:
            return
        places = np.union1d([] if places is None else places, apart[x].astype(float))
    line = line.set_index(line[x].astype(float)).sort_index()[["value", "low", "high"]]
    line = line.astype(float)
    if places is not None and not is_curve and line.index.is_unique:
        inside = places[(places >= line.index.min()) & (places <= line.index.max())]
        line = line.reindex(np.union1d(inside, line.index))
    at, value, low, high = (line.index.to_numpy(), *(line[c].to_numpy() for c in line))
    if is_curve:
        axes.plot(at, value, **look, label=name, markevery=max(1, len(line) // 8))
        axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)
        return
    axes.plot(at, value, **look, label=name)
    draw_intervals(axes, at, value, low, high, look)


def draw_intervals(
    axes: Axes,
    at: np.ndarray,
    value: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    look: dict[str, Any],
    *,
    is_across: bool = False,
) -> None:
    """Bars up and down, or to the left and the right, where both ends are known."""
    is_known = ~(np.isnan(low) | np.isnan(high) | np.isnan(value))
    if not is_known.any():
        return
    reach = np.clip(np.stack([value - low, high - value])[:, is_known], 0, None)
    places = (value, at) if is_across else (at, value)
    axes.errorbar(places[0][is_known], places[1][is_known],
                  **{"xerr" if is_across else "yerr": reach}, fmt="none", capsize=3,
                  ecolor=look["color"], elinewidth=1.2, alpha=look.get("alpha"))  # fmt: skip


def side_by_side(axes: Axes, part: pd.DataFrame) -> None:
    """One place for each family, a marker for each backend beside the other."""
    families = sorted(part["family"].unique(), key=vocabulary.family_order)
    backends = sorted(part["backend"].unique())
    groups = line_groups(part.assign(place=0), "place")
    drawn = _drawn(part)
    names = [tuple(extra) for _, extra, _ in groups]
    variants = list(dict.fromkeys(names))
    step = 0.44 / max(1, len(backends) * len(variants) - 1)
    for (family, backend), extra, rows in groups[:MAX_LINES]:
        line = drawn.iloc[rows]
        slot = backends.index(backend) * len(variants) + variants.index(tuple(extra))
        place = families.index(family) + (slot - (len(backends) * len(variants) - 1) / 2) * step
        look = style.line(family, backend, is_verified=labels.is_verified(line)) | {
            "linestyle": "none"
        }
        draw(
            axes,
            line.assign(place=place),
            "place",
            look,
            labels.label(family, backend, line, extra),
        )
    axes.set_xticks(range(len(families)), [labels.text(style.family_label(f)) for f in families])
    axes.set_xlim(-0.6, len(families) - 0.4)
    axes.grid(visible=False, axis="x")


def mark_lost(axes: Axes, asked: pd.DataFrame, x: str) -> bool:
    """A cross at the top edge for each run that did not end, each line's in a row of its own;
    returns whether there was one."""
    lost = asked[~asked["outcome"].isin(["completed", "unsupported"])]
    groups = lost.groupby(["family", "backend", "outcome"], sort=True)
    for number, ((family, backend, outcome), part) in enumerate(groups):
        how = labels.text(outcome.replace("_", " "))
        places = part[x].drop_duplicates().to_numpy(dtype=float)
        axes.plot(places, np.full(len(places), TOP - 0.045 * number), "x",
                  color=style.family_color(family), mew=2,
                  transform=axes.get_xaxis_transform(), clip_on=False,
                  label=f"{labels.name_of(family, backend)}: {how}")  # fmt: skip
    return len(lost) > 0


def ghost(
    axes: Axes,
    x: Any,
    value: Any,
    error: Any,
    name: str,
    *,
    marker: str,
    source: str,
    is_across: bool = False,
) -> None:
    """What the literature reports, as grey, hollow, thin marks: not measured here. No line
    connects them, and their errors are those of reading them."""
    at, value, error = (np.asarray(values, dtype=float) for values in (x, value, error))
    axes.plot(at, value, marker=marker, markersize=7, mew=0.8, linestyle="none",
              color=style.GHOST, markerfacecolor="none", zorder=1.5,
              label=f"{labels.text(name)}: {labels.text(source)}")  # fmt: skip
    axes.errorbar(at, value, **{"xerr" if is_across else "yerr": np.nan_to_num(error)},
                  fmt="none", ecolor=style.GHOST, elinewidth=0.8, zorder=1.5)  # fmt: skip


def keep_in_sight(
    axes: Axes, rows: pd.DataFrame, from_zero: bool = False, reference: float | None = None
) -> list[str]:
    """Values and ghosts fill the axis; of an interval many times wider than their spread the ends
    run off. Returns a note where they do."""
    values = rows["value"].astype(float).to_numpy()
    marks = [line.get_ydata() for other in axes.figure.axes for line in other.get_lines()
             if line.get_color() == style.GHOST]  # fmt: skip
    values = np.concatenate([values, *marks])
    low, high = np.nanmin(values), np.nanmax(values)
    reach = max(high - low, 0.2 * abs(high))
    bottom, top = axes.get_ylim()
    low, high = low - reach, high + reach
    if reference is not None:
        low, high = min(low, reference - 0.05), max(high, reference + 0.05)
    bottom = 0 if from_zero else max(bottom, low)
    if (rows[["low", "value"]].min(axis=None) >= 0) and bottom < 0:
        bottom = 0
    top = min(top, high)
    axes.set_ylim(bottom, top)
    is_cut = (rows["low"] < bottom).any() or (rows["high"] > top).any()
    return [CUT] if is_cut else []


def metric_lines(
    frame: pd.DataFrame, suite: str, metric: str, x: str, x_label: str, **options: Any
) -> Figure | None:
    """One metric of one suite over one length, with what was asked and lost."""
    rows = summary(frame, suite, metric)
    return lines(rows, x, x_label, METRICS[metric].label, asked=asked_of(frame, suite), **options)


def asked_of(frame: pd.DataFrame, suite: str) -> pd.DataFrame:
    runs = derive.runs(frame)
    return runs[runs["suite"] == suite]
