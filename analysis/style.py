"""Looks: family is colour, backend is marker and line style, in every figure.

Colours were searched for: far apart for readers with normal sight and with each kind of colour
blindness, and with a contrast of 3 on white and on near-black alike (WCAG 1.4.11; the tests hold
both). INK is replaced by `currentColor` in the SVG of a report, so that text and axes
follow the reader's light or dark theme.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INK = "#26323f"
GRID = "#8a949e"
ALARM = "#c2410c"

GHOST = "#7d8893"  # of the literature's numbers, which are not ours

FAMILY_COLORS = {
    "mqa": "#1858e8",
    "mqa_local": "#9c4697",
    "hawk": "#d06a14",
    "griffin": "#17a67b",
}
OTHER_COLORS = ("#e5034c", "#b376e3", "#347040", "#7d96a3")
VARIANT_COLORS = {  # of a scan that is timed alone, where there is no family
    "sequential": "#7d96a3",
    "associative": "#b376e3",
    "analytic": "#1858e8",
    "triton": "#d06a14",
    "triton_split": "#e5034c",
    "pallas_tpu": "#17a67b",
    "pallas_gpu": "#9c4697",
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


def variant_color(variant: str) -> str:
    return VARIANT_COLORS.get(variant, INK)


def variant_order(variant: str) -> tuple[int, str]:
    names = list(VARIANT_COLORS)
    return (names.index(variant) if variant in names else len(names), variant)


def family_label(family: str) -> str:
    return FAMILY_LABELS.get(family, family)


def backend_label(backend: str) -> str:
    return BACKEND_LABELS.get(backend, backend)


def line(
    family: str, backend: str, *, is_verified: bool = True, variant: str | None = None
) -> dict[str, Any]:
    """Keywords of one line, in its variant's colour where there is one; a hollow marker is a number
    without parity."""
    color = family_color(family) if variant is None else variant_color(variant)
    return {
        "color": color,
        "marker": BACKEND_MARKERS.get(backend, "D"),
        "linestyle": BACKEND_LINES.get(backend, ":"),
        "markerfacecolor": color if is_verified else "none",
        "markeredgecolor": color,
    }


def unpaired(look: dict[str, Any]) -> dict[str, Any]:
    """Of ratios that were not measured side by side: thin diamonds that nothing connects."""
    return look | {"marker": "d", "markersize": 5, "linestyle": "none"}
