"""Kernels: the recurrence alone by variant, and how near to the machine's limits runs come."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import checks, comparisons, derive, load, settings, style, vocabulary
from analysis.figures import drawing, labels, literature
from suites.harness.record import METRICS, PASSES

SEQ_LEN = "Sequence length (tokens)"
SEQUENTIAL = settings.BASELINE["linear_scan"]
# what a suite's time is the time of, and its seconds from one value of the metric
TIMED = {
    "training_speed": ("training step", "step_time_ms", 1e-3),
    "prefill_latency": ("prefill", "ttft_ms", 1e-3),
    "decode_latency": ("decoding", "decode_time_s", 1.0),
    "kernel_speed": ("scan alone", "op_time_ms", 1e-3),
}


def kernel_speed(frame: pd.DataFrame) -> Figure | None:
    """Time of the recurrence alone, by seq_len; variants are colours here. rg_lru starts at its
    gates' pre-activations."""
    rows, notes = _one_scan(frame, drawing.summary(frame, "kernel_speed", "op_time_ms"))
    return _scans(rows, METRICS["op_time_ms"].label, notes)


def relative_scan_time(frame: pd.DataFrame) -> Figure | None:
    """Time of the recurrence alone relative to the sequential scan of the same backend, by
    seq_len; variants are colours here."""
    rows = drawing.summary(frame, "kernel_speed", "op_time_ms")
    variants = sorted(set(rows["linear_scan"].dropna()) - {SEQUENTIAL}, key=style.variant_order)
    if not variants or SEQUENTIAL not in set(rows["linear_scan"]):
        return None
    found = pd.concat(
        [comparisons.comparisons(frame, by="linear_scan", ours=name) for name in variants]
    )
    found = found[(found["metric"] == "op_time_ms") & found["speedup"].notna()]
    rows, notes = _one_scan(frame, drawing.as_multiples(rows, found))
    return _scans(
        rows, f"Time relative to {SEQUENTIAL} (1)", notes, reference=1.0, decorate=literature.scan
    )


def roofline(frame: pd.DataFrame) -> Figure | None:
    """Achieved FLOP/s over arithmetic intensity, from exact model FLOPs and the bytes that must
    move, under the roof of the device: its peaks, and whose they are, as the runs recorded them."""
    points = _points(frame)
    if points.empty:
        return None
    panels, notes = drawing.panels_of(points, ["device_name", "dtype"], ())
    figure, grid = drawing.panel_grid(len(panels), 4.6)
    for axes, ((device, dtype), part) in zip(grid, panels, strict=True):
        notes.append(_roof(axes, frame, device, dtype, part))
        for (family, backend), line in _by_line(part):
            look = style.line(family, backend, is_verified=labels.is_verified(line))
            look["linestyle"] = "none"
            at, value, low, high = (
                line[name].to_numpy(dtype=float) for name in ("intensity", "value", "low", "high")
            )
            axes.plot(at, value, **look, label=labels.label(family, backend, line))
            drawing.draw_intervals(axes, at, value, low, high, look)
        for what, line in part.groupby("what"):
            top = line.sort_values("value").iloc[-1]
            axes.annotate(what, (top["intensity"], top["value"]), textcoords="offset points",
                          xytext=(0, 9), ha="center", fontsize=8, color=style.INK)  # fmt: skip
        tops = [line.get_ydata().max() for line in axes.get_lines()
                if not line.get_label().startswith("_")]  # fmt: skip
        axes.set_ylim(part["value"].min() / 4, 3 * max(tops))
        if (part["low"] < axes.get_ylim()[0]).any() or (part["high"] > axes.get_ylim()[1]).any():
            notes.append(drawing.CUT)
        axes.set_title(labels.text(f"{device}, {dtype}"))
        axes.set_xlabel("Arithmetic intensity (FLOP/byte)")
    for axis in (*(axes.xaxis for axes in grid), grid[0].yaxis):
        labels.log_values(axis)
    labels.label_rows(figure, "Achieved (FLOP/s)")
    labels.legend(figure, grid)
    notes.append(
        "Bytes are those of weights, optimizer and cache, each once; activations move too, so true "
        "intensities of training and prefill are lower."
    )
    labels.note(figure, notes, points)
    return figure


def _one_scan(frame: pd.DataFrame, rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Of several models, dtypes or devices those of most cells: the others are in the tables; and
    one of those that ran the same scan: auto beside its name, other attention."""
    rows = rows[rows["linear_scan"].notna()]
    if rows.empty:
        return rows, []
    rows = rows.assign(shape=derive.variants(rows, "model"))
    places = [*drawing.PANEL, "family", "shape", "batch_size"]
    most = rows.groupby(places, sort=False).size().idxmax()
    left_out = len(rows)
    rows = rows[(rows[places] == list(most)).all(axis=1)]
    same = ["op", "work_phase", "linear_scan", "backend", "seq_len"]
    rows = rows.sort_values("variant", kind="stable").drop_duplicates(same)
    left_out -= len(rows)
    model = f" ({labels.text(most[-2])})" if most[-2] else ""
    size, dtype, device = (labels.text(name) for name in most[:3])
    notes = [f"Shown: size {size}{model}, {dtype}, {device}, batch {most[-1]}."]
    if left_out:
        notes.append(f"{left_out} further times are in the tables alone.")
    return rows, notes


def _scans(
    rows: pd.DataFrame,
    label: str,
    notes: list[str],
    *,
    reference: float | None = None,
    decorate: Callable[[Axes, pd.DataFrame], None] | None = None,
) -> Figure | None:
    """A panel for each op and pass, a line for each variant and backend."""
    if rows.empty:
        return None
    panels, notes = drawing.panels_of(rows, ["op", "work_phase"], notes)
    figure, grid = drawing.panel_grid(len(panels))
    for axes, ((op, phase), part) in zip(grid, panels, strict=True):
        if reference is not None:
            axes.axhline(reference, color=style.variant_color(SEQUENTIAL), linewidth=1.2,
                         label=SEQUENTIAL)  # fmt: skip
        places = np.unique(part["seq_len"].to_numpy(dtype=float))
        groups = part.groupby(["linear_scan", "backend"])
        for (variant, backend), line in sorted(
            groups, key=lambda item: (style.variant_order(item[0][0]), item[0][1])
        ):
            verified = labels.is_verified(line)
            look = style.line("", backend, is_verified=verified, variant=variant)
            name = f"{labels.text(variant)}, {labels.text(style.backend_label(backend))}"
            name += "" if verified else f" {checks.UNVERIFIED}"
            drawing.draw(axes, line, "seq_len", look, name, places=places)
        if decorate is not None:
            decorate(axes, part)
        axes.set_title(f"{labels.text(op)}, {PASSES[phase]}")
        axes.set_xlabel(SEQ_LEN)
        labels.log_lengths(axes, places)
    labels.log_values(grid[0].yaxis)
    labels.label_rows(figure, label)
    labels.legend(figure, grid)
    labels.note(figure, notes, rows)
    return figure


def _points(frame: pd.DataFrame) -> pd.DataFrame:
    """Timed cells whose records say what their work takes: FLOP/s of one device, and FLOP/byte."""
    runs = derive.runs(frame)
    work = runs[["cell_id", "model_flops", "model_bytes"]].dropna().drop_duplicates("cell_id")
    rows = derive.summary(frame).merge(work, on="cell_id")
    made = []
    for suite, (what, metric, seconds) in TIMED.items():
        part = rows[(rows["suite"] == suite) & (rows["metric"] == metric)].copy()
        devices = part["num_devices"].astype(float).fillna(1)
        flops = part["model_flops"] / devices
        part["intensity"] = part["model_flops"] / part["model_bytes"]
        value, low, high = (flops / (part[c].astype(float) * seconds)
                            for c in ("value", "high", "low"))  # fmt: skip
        made.append(part.assign(value=value, low=low, high=high, what=what))
    return pd.concat(made)


def _by_line(part: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    groups = part.groupby(["family", "backend"])
    return sorted(groups, key=lambda item: (vocabulary.family_order(item[0][0]), item[0][1]))


def _roof(axes: Axes, frame: pd.DataFrame, device: str, dtype: str, part: pd.DataFrame) -> str:
    """Draws what the peaks allow, with their range over runs, and returns whose peaks they are."""
    peaks = load.words(derive.peaks(frame))
    peaks = peaks[(peaks["device_name"] == device) & (peaks["dtype"] == dtype)]
    found = peaks.groupby("metric").agg(
        {"median": "median", "min": "min", "max": "max", "field": "first"}
    )
    name = labels.text(device)
    if not {"peak_flops_per_s", "peak_bytes_per_s"} <= set(found.index):
        return f"{name}, {dtype}: no peak is known, so no roof."
    flops, num_bytes = found.loc["peak_flops_per_s"], found.loc["peak_bytes_per_s"]
    ridge = flops["median"] / num_bytes["median"]
    least, most = part["intensity"].min(), part["intensity"].max()
    at = np.geomspace(min(least, ridge) / 4, max(most, ridge) * 4, 200)
    low, roof, high = (np.minimum(at * num_bytes[c], flops[c]) for c in ("min", "median", "max"))
    axes.plot(at, roof, color=style.INK, linewidth=1.4, label="Peak of the device")
    axes.fill_between(at, low, high, color=style.GRID, alpha=0.3, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    bounded = np.minimum(part["intensity"] * num_bytes["max"], flops["max"])
    above = int((part["value"] > bounded).sum())
    more = f" {above} above its range: small weights may stay in caches." if above else ""
    whose = labels.text(flops["field"])
    whose = (
        "measured; grey: its range over runs" if whose == "measured" else f"data sheet of {whose}"
    )
    return (
        f"Peaks of {name}, {dtype} ({whose}): {flops['median'] / 1e9:,.4g} GFLOP/s, "
        f"{num_bytes['median'] / 1e9:,.4g} GB/s.{more}"
    )
