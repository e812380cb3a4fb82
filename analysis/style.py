"""Looks: family is colour, backend is marker and line style, in every figure.

Colours are from Okabe and Ito's set (safe for colour-blind readers) and stand on white and on
near-black alike. INK is replaced by `currentColor` in the SVG of a report, so that text and axes
follow the reader's light or dark theme.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INK = "#26323f"
GRID = "#8a949e"
ALARM = "#c2410c"

FAMILY_COLORS = {
    "mqa": "#0072b2",
    "mqa_local": "#56b4e9",
    "hawk": "#e69f00",
    "griffin": "#009e73",
}
OTHER_COLORS = ("#cc79a7", "#d55e00", "#999933", "#8c8c8c")
VARIANT_COLORS = {  # of a scan that is timed alone, where there is no family
    "sequential": "#8c8c8c",
    "associative": "#cc79a7",
    "analytic": "#0072b2",
    "triton": "#e69f00",
    "triton_split": "#d55e00",
    "pallas_tpu": "#009e73",
    "pallas_gpu": "#56b4e9",
}
FAMILY_LABELS = {
    "mqa": "MQA-Transformer",
    "mqa_local": "MQA-Transformer, local",
    "hawk": "Hawk",
    "griffin": "Griffin",
}
BACKEND_MARKERS = {"jax": "o", "torch": "s"}
BACKEND_LINES = {"jax": "-", "torch": (0, (4, 2))}
BACKEND_LABELS = {"jax": "JAX", "torch": "PyTorch"}

RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "figure.dpi": 130,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "path.simplify": True,
}


@contextmanager
def looks(name: str = "aerie") -> Iterator[None]:
    """Our settings, within the block alone; `name` makes the ids of an SVG its own."""
    import matplotlib

    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        yield


def family_color(family: str) -> str:
    if family in FAMILY_COLORS:
        return FAMILY_COLORS[family]
    return OTHER_COLORS[sum(family.encode()) % len(OTHER_COLORS)]


def family_label(family: str) -> str:
    return FAMILY_LABELS.get(family, family)


def backend_label(backend: str) -> str:
    return BACKEND_LABELS.get(backend, backend)


def line(
    family: str, backend: str, *, is_verified: bool = True, variant: str | None = None
) -> dict[str, Any]:
    """Keywords of one line, in its variant's colour where there is one; a hollow marker is a number
    without parity."""
    color = family_color(family) if variant is None else VARIANT_COLORS.get(variant, INK)
    return {
        "color": color,
        "marker": BACKEND_MARKERS.get(backend, "D"),
        "linestyle": BACKEND_LINES.get(backend, ":"),
        "markerfacecolor": color if is_verified else "none",
        "markeredgecolor": color,
    }
