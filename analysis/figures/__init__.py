"""Figures: one function each, a DataFrame of analysis.load in, a Figure out, None without data.

To add one: write it in the file of its subject, and name it in FIGURES.
"""

from collections.abc import Callable

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.decoding import (
    decode_latency,
    decode_throughput,
    latency_by_tokens,
    prefill_latency,
    throughput_by_tokens,
)
from analysis.figures.frameworks import framework_ratios
from analysis.figures.gates import gate_behaviour
from analysis.figures.kernels import kernel_speed, relative_scan_time, roofline
from analysis.figures.lengths import length_domains
from analysis.figures.memory import memory_frontier, peak_memory
from analysis.figures.parity import parity_by_layer, parity_error, training_parity
from analysis.figures.quality import (
    held_out_curves,
    learning_curves,
    learning_rates,
    loss_by_position,
    scaling,
    window_sizes,
)
from analysis.figures.tasks import accuracy_by_length, accuracy_by_step
from analysis.figures.training import relative_step_time, step_time_by_scan, training_throughput

FIGURES: dict[str, Callable[[pd.DataFrame], Figure | None]] = {
    function.__name__: function
    for function in (
        relative_step_time, training_throughput, step_time_by_scan, prefill_latency,
        latency_by_tokens, decode_latency, throughput_by_tokens, decode_throughput,
        framework_ratios, roofline, kernel_speed, relative_scan_time, learning_curves,
        held_out_curves, learning_rates, scaling, loss_by_position, length_domains, window_sizes,
        accuracy_by_step, accuracy_by_length, gate_behaviour, memory_frontier,
        peak_memory, parity_error, parity_by_layer, training_parity,
    )
}  # fmt: skip
MOST_SERIES = 12  # that a description names


def caption(name: str) -> str:
    return " ".join((FIGURES[name].__doc__ or "").split())


def describe(name: str, figure: Figure) -> str:
    """The figure in words, for who cannot see it: its caption, then axes, series and their ends."""
    words = [caption(name)]
    for number, axes in enumerate(figure.axes, start=1):
        series = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
        if not series:
            continue
        title = axes.get_title("left") or axes.get_title("center")
        panel = f"Panel {number}" + (f" ({title})" if title else "")
        words.append(f"{panel if len(figure.axes) > 1 else 'Plot'}: {axes.get_ylabel()} over "
                     f"{axes.get_xlabel()}." if axes.get_ylabel() else f"{panel}:")  # fmt: skip
        for line in series[:MOST_SERIES]:
            values = pd.Series(line.get_ydata(), dtype=object)
            values = pd.to_numeric(values, errors="coerce").dropna()
            if len(values):
                ends = dict.fromkeys(f"{v:.3g}" for v in (values.iloc[0], values.iloc[-1]))
                words.append(f"{line.get_label()}: {' to '.join(ends)}.")
        if len(series) > MOST_SERIES:
            words.append(f"{len(series) - MOST_SERIES} more.")
    return " ".join(words).replace(r"\$", "$")
