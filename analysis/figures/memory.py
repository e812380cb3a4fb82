"""Memory: what training takes, and where it ends."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis import derive, style, vocabulary
from analysis.figures import drawing, labels
from suites.harness.record import METRICS

MAX_ROWS = 24
KINDS = {
    "largest batch": "Largest batch (sequences)",
    "longest context": "Longest context (tokens)",
}
# what ends a row: its marker, and what that says
ENDS = {
    "out_of_memory": ("x", "out of memory, tried"),
    "out_of_memory_predicted": ("+", "out of memory, predicted"),
    "bound": (">", "the search ended here, not memory"),
}


def peak_memory(frame: pd.DataFrame) -> Figure | None:
    """Peak memory in training by seq_len; a cross at the top edge is a run that did not end."""
    rows = drawing.summary(frame, "training_speed", "peak_memory_bytes")
    label = METRICS["peak_memory_bytes"].label
    asked = drawing.asked_of(frame, "training_speed")
    return drawing.lines(rows, "seq_len", "Sequence length (tokens)", label, asked=asked,
                         from_zero=True)  # fmt: skip


def memory_frontier(frame: pd.DataFrame) -> Figure | None:
    """How far memory reached: the largest batch and the longest context that completed, and the
    next one, that ran out of memory or was predicted to."""
    edge = derive.frontier(frame)
    kinds = [kind for kind in KINDS if (edge["frontier"] == kind).any()]
    if not kinds:
        return None
    edge = edge.assign(order=[vocabulary.family_order(name) for name in edge["family"]])
    edge["prompt_len"] = edge["prompt_len"].astype(float)
    edge["num_new_tokens"] = edge["num_new_tokens"].astype(float)
    sizes = ["suite", "size", "prompt_len", "num_new_tokens", "order", "backend"]
    edge = edge.sort_values(sizes, kind="stable")
    notes, parts = [], {}
    for kind in kinds:
        part = edge[edge["frontier"] == kind]
        if len(part) > MAX_ROWS:
            notes.append(f"{len(part) - MAX_ROWS} further rows are in the tables alone.")
        parts[kind] = part.head(MAX_ROWS)
    heights = [len(part) for part in parts.values()]
    figure = Figure(figsize=(drawing.WIDTH, 1.4 + 0.7 * len(kinds) + 0.3 * sum(heights)),
                    layout="constrained")  # fmt: skip
    grid = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=[n + 1 for n in heights])
    for axes, (kind, part) in zip(grid[:, 0], parts.items(), strict=True):
        _reached(axes, kind, part)
    labels.legend(figure, grid[:, 0])
    labels.note(figure, notes)
    return figure


def _reached(axes: Axes, kind: str, part: pd.DataFrame) -> None:
    """A row for each cell: how far it came, and what stopped it."""
    named = ["suite", "size", "dtype", "device_kind", "prompt_len", "num_new_tokens", "variant"]
    if kind == "longest context":
        named.remove("prompt_len")  # is the context there
    varied = [name for name in named if part[name].nunique() > 1]
    names, ends = [], []
    for place, row in enumerate(part.to_dict("records")):
        row = {name: vocabulary.plain(value) for name, value in row.items()}
        words = [labels.FURTHER[name].format(row[name]) if name in labels.FURTHER
                 else labels.text(row[name]) for name in varied if row[name]]  # fmt: skip
        names.append(", ".join([labels.name_of(row["family"], row["backend"]), *words]))
        look = style.line(row["family"], row["backend"]) | {"linestyle": "none"}
        reached, failed = row["reached"], row["out_of_memory_at"]
        if kind == "largest batch" and row["why"] != "bound":
            failed = 2 * reached  # the search doubles
        ends.append([reached or np.nan, failed or np.nan])
        if reached is not None:
            axes.plot([reached], [place], **look)
            axes.annotate(f"{reached:,.0f}", (reached, place), textcoords="offset points",
                          xytext=(-8, 0), ha="right", va="center", fontsize=8)  # fmt: skip
        if failed is not None:
            marker, _ = ENDS.get(row["why"], ENDS["out_of_memory"])
            axes.plot([failed], [place], marker, color=look["color"], mew=1.8, ms=8)
            if reached is not None:
                axes.plot([reached, failed], [place, place], color=look["color"], lw=1, ls=":")
        elif row["why"] == "bound":
            axes.annotate("", (reached * 1.6, place), (reached * 1.12, place),
                          arrowprops={"arrowstyle": "->", "color": look["color"]})  # fmt: skip
    axes.plot([], [], "o", color=style.GHOST, label="completed")
    for why, (marker, words) in ENDS.items():
        if (part["why"] == why).any():
            axes.plot([], [], marker, color=style.GHOST, mew=1.8, ms=7, label=words)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log", base=2)
    axes.set_xlim(np.nanmin(ends) / 2.2, np.nanmax(ends) * 2.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(KINDS[kind])
    axes.grid(visible=False, axis="y")
