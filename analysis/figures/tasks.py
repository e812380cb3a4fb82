"""Synthetic tasks: accuracy as training goes on, and at lengths that training did not have."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import recall, style
from analysis.figures import drawing
from suites.harness.record import METRICS

LIMITS = (-0.03, 1.03)  # from none to all, and a marker's half


def accuracy_by_step(frame: pd.DataFrame) -> Figure | None:
    """Accuracy on held-out examples by training step, with binomial intervals."""
    rows = recall.accuracies(frame, "accuracy")
    label = METRICS["accuracy"].label
    return drawing.lines(rows, "at", "Optimizer step", f"{label} (1)", is_log=False,
                         is_curve=True, limits=LIMITS)  # fmt: skip


def accuracy_by_length(frame: pd.DataFrame) -> Figure | None:
    """Accuracy by the length of the examples, with binomial intervals; the length of training
    examples marked."""
    rows = recall.accuracies(frame, "accuracy_by_length")
    label = METRICS["accuracy"].label
    return drawing.lines(rows, "at", "Length of the example (tokens)", f"{label} (1)",
                         limits=LIMITS, decorate=_mark_training_length)  # fmt: skip


def _mark_training_length(axes: Axes, part: pd.DataFrame) -> None:
    for seq_len in sorted(part["seq_len"].dropna().unique()):
        axes.axvline(float(seq_len), color=style.GRID, linestyle=":", linewidth=1.3,
                     label=f"Trained at {seq_len:,.0f} tokens")  # fmt: skip
