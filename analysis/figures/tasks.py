"""Synthetic tasks: accuracy as training goes on, and at lengths that training did not have."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import derive, load, statistics, style
from analysis.figures import drawing
from suites.harness.record import METRICS

SUITE = "recall"
LIMITS = (-0.03, 1.03)  # from none to all, and a marker's half


def accuracy_by_step(frame: pd.DataFrame) -> Figure | None:
    """Accuracy on held-out examples by training step, with binomial intervals."""
    rows = _accuracy(frame, "accuracy")
    label = METRICS["accuracy"].label
    return drawing.lines(rows, "at", "Optimizer step", f"{label} (1)", is_log=False,
                         limits=LIMITS)  # fmt: skip


def accuracy_by_length(frame: pd.DataFrame) -> Figure | None:
    """Accuracy by the length of the examples, with binomial intervals; the length of training
    examples marked."""
    rows = _accuracy(frame, "accuracy_by_length")
    label = METRICS["accuracy"].label
    return drawing.lines(rows, "at", "Length of the example (tokens)", f"{label} (1)",
                         limits=LIMITS, decorate=_mark_training_length)  # fmt: skip


def _accuracy(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Cells with an interval that is binomial over the examples of all seeds, and no narrower
    than what the seeds say."""
    rows = drawing.summary(frame, SUITE, metric, at=True)
    counts = derive.processes(frame)
    counts = load.words(counts[counts["metric"] == "num_examples"])
    by_place = counts[counts["at"].notna()].groupby(["cell_id", "at"])["value"].sum()
    of_all = counts[counts["at"].isna()].groupby("cell_id")["value"].sum()
    for place, row in rows.iterrows():
        n = by_place.get((row["cell_id"], row["at"]), of_all.get(row["cell_id"], 0))
        ends = [(row["low"], row["high"])]
        if n:
            ends.append(statistics.accuracy_interval(round(row["value"] * n), int(n)))
        known = [end for end in ends if not pd.isna(end[0])]
        if known:
            rows.loc[place, "low"] = max(0.0, min(low for low, _ in known))
            rows.loc[place, "high"] = min(1.0, max(high for _, high in known))
    return rows


def _mark_training_length(axes: Axes, part: pd.DataFrame) -> None:
    for seq_len in sorted(part["seq_len"].dropna().unique()):
        axes.axvline(float(seq_len), color=style.GRID, linestyle=":", linewidth=1.3,
                     label=f"Trained at {seq_len:,.0f} tokens")  # fmt: skip
