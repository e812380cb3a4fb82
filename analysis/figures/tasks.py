"""Synthetic tasks: accuracy as training goes on, and at lengths that training did not have."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import recall, style
from analysis.figures import drawing
from suites.harness.record import METRICS

LIMITS = (-0.03, 1.03)  # from none to all, and a marker's half
PANEL = [*drawing.PANEL, "seq_len"]  # a task, at one length of training
MOST = 8  # panels: four tasks, two lengths of training


def accuracy_by_step(frame: pd.DataFrame) -> Figure | None:
    """Accuracy on held-out examples by training step, with binomial intervals; a run that stopped
    early, as it had learned the task, counts on as it ended."""
    label = METRICS["accuracy"].label
    return drawing.lines(_rows(frame, "accuracy"), "at", "Optimizer step", f"{label} (1)",
                         is_log=False, is_curve=True, limits=LIMITS, panel=PANEL,
                         most=MOST)  # fmt: skip


def accuracy_by_length(frame: pd.DataFrame) -> Figure | None:
    """Accuracy by the length of the examples, with binomial intervals; the length of training
    examples marked."""
    label = METRICS["accuracy"].label
    return drawing.lines(_rows(frame, "accuracy_by_length"), "at", "Length of the example (tokens)",
                         f"{label} (1)", limits=LIMITS, panel=PANEL, most=MOST,
                         decorate=_mark_training_length)  # fmt: skip


def _rows(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Accuracies; what every line of a panel has in its own way, as its window, is no variant."""
    rows = recall.accuracies(frame, metric)
    lines = rows.groupby([*PANEL, "family", "backend"], dropna=False, observed=True)["cell_id"]
    return rows.assign(variant=rows["variant"].where(lines.transform("nunique") > 1, ""))


def _mark_training_length(axes: Axes, part: pd.DataFrame) -> None:
    (seq_len,) = part["seq_len"].unique()
    axes.axvline(float(seq_len), color=style.GRID, linestyle=":", linewidth=1.3,
                 label="Length of training")  # fmt: skip
