"""What figures say in words: names, ticks, titles, legends and the notes under the plots."""

import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from analysis import checks, statistics, style, vocabulary

# what else may tell two lines apart, and how it is said
FURTHER = {"seq_len": "{:,.0f} tokens", "batch_size": "batch {:,.0f}",
           "prompt_len": "prompt {:,.0f}", "num_new_tokens": "{:,.0f} new tokens",
           "num_steps": "{:,.0f} steps",
           "num_devices": "{:,.0f} devices"}  # fmt: skip
LONGEST = 60  # characters of a label


def text(value: Any) -> str:
    """A label as it is: of one line, not endless, no mathematics between dollars, and not hidden
    from the legend by a leading underscore."""
    words = "".join(c if c.isprintable() else " " for c in str(value)).split()
    words = " ".join(words)
    if len(words) > LONGEST:
        words = words[: LONGEST - 3] + "..."
    words = words.replace("$", r"\$")
    return f" {words}" if words.startswith("_") else words


def name_of(family: str, backend: str) -> str:
    return f"{text(style.family_label(family))}, {text(style.backend_label(backend))}"


def order(name: tuple) -> tuple:
    """Of (family, backend, ...)."""
    return (*vocabulary.family_order(name[0]), *name[1:])


def label(family: str, backend: str, line: pd.DataFrame, extra: Iterable[str] = ()) -> str:
    name = ", ".join([name_of(family, backend), *extra])
    return name if is_verified(line) else f"{name} {checks.UNVERIFIED}"


def is_verified(rows: pd.DataFrame) -> bool:
    return bool((rows["parity"] == checks.GREEN).all())


def is_unpaired(rows: pd.DataFrame) -> pd.Series:
    """Which of these ratios were not measured side by side; no row that is no ratio."""
    if "verdict" not in rows:
        return pd.Series(False, index=rows.index)
    return (rows["verdict"] == statistics.UNPAIRED).fillna(False).astype(bool)


def count_unpaired(ratios: pd.DataFrame) -> list[str]:
    """A note, where there are any."""
    count = int(is_unpaired(ratios).sum())
    if not count:
        return []
    return [f"{count} of {len(ratios)} ratios are unpaired: not measured side by side (diamonds)."]


def title(axes: Axes, rows: pd.DataFrame, key: tuple, keys: list[str]) -> None:
    """The settings of a panel that differ between panels."""
    varied = [(name, value) for name, value in zip(keys, key, strict=True)
              if rows[name].nunique() > 1]  # fmt: skip
    words = [FURTHER[name].format(value) if name in FURTHER else text(value)
             for name, value in varied]  # fmt: skip
    axes.set_title(", ".join(words))


def label_rows(figure: Figure, y_label: str) -> None:
    """On the first panel of each row."""
    for axes in figure.axes:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(y_label)


def thousands(axes: Axes, rows: pd.DataFrame) -> None:
    if rows["value"].max() >= 10_000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def log_lengths(axes: Axes, places: np.ndarray) -> None:
    """Base 2, with a tick at each length that was measured while they are few."""
    axes.set_xscale("log", base=2)
    ticks = np.unique(places)
    if len(ticks) <= 9:
        axes.set_xticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def log_values(axis: Axis) -> None:
    """A logarithmic axis with plain numbers: powers of ten, and between them on a short one."""
    name = axis.axis_name
    getattr(axis.axes, f"set_{name}scale")("log")
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low) if low > 0 else 10
    subs = (1,) if decades > 3 else (1, 2, 5)
    few = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    axis.set_major_locator(few if decades < 0.8 else LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    most = 1e4 if high >= 1e6 else 1e6
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value, most)))
    axis.set_minor_formatter(NullFormatter())


def plain_number(value: float, most: float = 1e6) -> str:
    if value == 0 or 1e-3 <= abs(value) < most:
        return f"{value:,.10g}"
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}"


def legend(figure: Figure, grid: Iterable[Axes]) -> None:
    """Above all panels, each line once, in as many columns as the longest name lets stand."""
    found: dict[str, Any] = {}
    for axes in grid:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if not found:
        return
    font = FontProperties(size=rcParams["legend.fontsize"])
    widest = max(text_to_path.get_text_width_height_descent(name, font, False)[0] for name in found)
    columns = max(1, int(figure.get_figwidth() / (widest / 72 + 0.57)))  # inches: line, and gaps
    num_rows = -(-len(found) // columns)
    figure.set_figheight(figure.get_figheight() + 0.18 * max(0, num_rows - 2))
    figure.legend(found.values(), found, loc="outside upper left", ncols=-(-len(found) // num_rows))


def note(figure: Figure, notes: Iterable[str], rows: pd.DataFrame | None = None) -> None:
    """Lines under the plots; an alarm where they begin with what is not verified of these rows."""
    notes = list(dict.fromkeys([*(() if rows is None else count_unpaired(rows)), *notes]))
    is_bare = rows is not None and not is_verified(rows)
    if rows is not None and "is_current" in rows and (rows["is_current"] == False).any():  # noqa: E712
        notes.insert(0, "Some of it was measured with an older build (stale).")
    if is_bare:
        hollow = (
            f"Hollow markers are {checks.UNVERIFIED}: no green parity record of the same "
            "kernels, head_dim, dtype, device and build."
        )
        notes.insert(0, hollow)
    if notes:
        color = style.ALARM if is_bare else style.INK
        width = int(16.5 * figure.get_figwidth())
        words = "\n".join(textwrap.fill(one, width) for one in notes)
        figure.set_figheight(figure.get_figheight() + 0.14 * words.count("\n"))
        figure.supxlabel(words, x=0.01, ha="left", fontsize=8, color=color)
