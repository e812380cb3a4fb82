"""Gates: how much of a new input each gated recurrence lets in. Analytic: nothing is measured.

arXiv:2402.19427 appendix A: h_t = alpha(r) h_{t-1} + beta(r) x_t, and the share of x_t is
beta / (alpha + beta). The figure of the paper has c = 1 (its levels of the LRU, 0.634, 0.326 and
0.125, say so); models have c = 8.
"""

import json

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import derive, style
from analysis.figures import drawing, labels

DECAYS = (0.5, 0.9, 0.99)
LINES = {
    "RG-LRU": (style.FAMILY_COLORS["hawk"], "-"),
    "LRU": (style.OTHER_COLORS[3], (0, (1, 1.5))),
    "GRU": (style.FAMILY_COLORS["mqa"], (0, (6, 2))),
    "Mamba": (style.FAMILY_COLORS["mqa_local"], (0, (4, 1.5, 1, 1.5))),
}


def gate_behaviour(frame: pd.DataFrame) -> Figure | None:
    """Share of the input x_t in the new state over the gate r_t: analytic, from the equations of
    arXiv:2402.19427 appendix A with c = 1, as its figure 7; no run is in it."""
    if not _has_recurrence(frame):
        return None
    figure = Figure(figsize=(drawing.WIDTH, 3.3), layout="constrained")
    grid = figure.subplots(1, len(DECAYS), sharey=True)
    r = np.linspace(0, 1, 401)
    for axes, decay in zip(grid, DECAYS, strict=True):
        for name, (color, dashes) in LINES.items():
            axes.plot(r, share_of_input(name, decay, r), color=color, linestyle=dashes, label=name)
        axes.set_title(f"a = {decay}")
        axes.set_xlabel("Gate r (1)")
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_ylim(0, 1.02)
    grid[0].set_ylabel("Share of the input x (1)")
    labels.legend(figure, grid[:1])
    labels.note(figure, ["Analytic: equations, and no measurement. c = 1; models have c = 8. "
                          "Mamba with B = C = 1."])  # fmt: skip
    return figure


def share_of_input(name: str, a: float, r: np.ndarray) -> np.ndarray:
    """beta / (alpha + beta)."""
    with np.errstate(divide="ignore"):
        alpha, beta = {
            "RG-LRU": lambda: (a**r, np.sqrt(1 - a ** (2 * r))),
            "LRU": lambda: (np.full_like(r, a), np.full_like(r, np.sqrt(1 - a**2))),
            "GRU": lambda: (1 - r, r),
            "Mamba": lambda: ((1 - r) ** a, (1 - (1 - r) ** a) / a),
        }[name]()
    return beta / (alpha + beta)


def _has_recurrence(frame: pd.DataFrame) -> bool:
    models = derive.runs(frame)["model"].dropna().unique()
    return any("rg_lru" in (json.loads(model).get("pattern") or ()) for model in models)
