"""Figures: one function each, a DataFrame of analysis.load in, a Figure out, None without data.

Families are colours, backends are markers and line styles (analysis/style.py); intervals are
drawn from two rounds; hollow markers and a line under the plot say UNVERIFIED.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from analysis import checks, comparisons, derive, load, style, tables, vocabulary
from suites.harness.record import METRICS, PASSES

PANEL = ["size", "dtype", "device_kind", "data"]  # settings that are never drawn over each other
LINE = ["family", "backend", "variant"]
MAX_PANELS = 4


def relative_step_time(frame: pd.DataFrame) -> Figure | None:
    """Step time relative to MQA of the same backend, by seq_len, tokens per step constant."""
    rows = _summary(frame, "training_speed", "step_time_ms")
    if rows.empty:
        return None
    others = sorted(set(rows["family"]) - {"mqa"}, key=vocabulary.family_order)
    if not others or "mqa" not in set(rows["family"]):
        return None
    found = pd.concat([comparisons.comparisons(frame, by="family", ours=name) for name in others])
    found = found[(found["metric"] == "step_time_ms") & found["speedup"].notna()]
    found = found.drop_duplicates("cell_id_ours").set_index("cell_id_ours")
    rows = rows[rows["cell_id"].isin(found.index)].copy()
    found = found.loc[rows["cell_id"]]
    rows["value"] = 1 / found["speedup"].to_numpy(dtype=float)
    rows["low"] = 1 / found["speedup_high"].to_numpy(dtype=float)
    rows["high"] = 1 / found["speedup_low"].to_numpy(dtype=float)
    of_mqa = (found["parity_baseline"] == checks.GREEN).to_numpy()
    rows["parity"] = rows["parity"].where(of_mqa, checks.MISSING)
    label = "Step time relative to MQA"
    return _lines(rows, "seq_len", "Sequence length (tokens)", label, reference=1.0)


def training_throughput(frame: pd.DataFrame) -> Figure | None:
    """Tokens per second in training, by seq_len."""
    return _metric(frame, "training_speed", "tokens_per_s", "seq_len", "Sequence length (tokens)")


def prefill_latency(frame: pd.DataFrame) -> Figure | None:
    """Time to first token, by prompt_len."""
    return _metric(frame, "prefill_latency", "ttft_ms", "prompt_len", "Prompt length (tokens)")


def decode_latency(frame: pd.DataFrame) -> Figure | None:
    """Time per output token, by prompt_len."""
    return _metric(frame, "decode_latency", "tpot_ms", "prompt_len", "Prompt length (tokens)")


def decode_throughput(frame: pd.DataFrame) -> Figure | None:
    """Decoded tokens per second, by batch size."""
    rows = _summary(frame, "decode_throughput", "tokens_per_s", at=True)
    return _lines(rows, "at", "Batch size (sequences)", METRICS["tokens_per_s"].label)


def kernel_speed(frame: pd.DataFrame) -> Figure | None:
    """Time of the recurrence alone, by seq_len; variants are colours here. rg_lru starts at its
    gates' pre-activations."""
    rows = _summary(frame, "kernel_speed", "op_time_ms")
    rows = rows[rows["linear_scan"].notna()]
    if rows.empty:
        return None
    # of several models, dtypes or devices those of most cells; the others are in the tables
    rows = rows.assign(model=derive.variants(rows, "model"))
    places = [*PANEL, "family", "model", "batch_size"]
    most = rows.groupby(places, sort=False).size().idxmax()
    left_out = len(rows)
    rows = rows[(rows[places] == list(most)).all(axis=1)]
    # and one of those that ran the same scan: auto beside its name, other attention
    same = ["op", "work_phase", "linear_scan", "backend", "seq_len"]
    rows = rows.sort_values("variant", kind="stable").drop_duplicates(same)
    left_out -= len(rows)
    panels = list(rows.groupby(["op", "work_phase"], sort=True))
    figure = Figure(figsize=(max(7.2, 3.4 * len(panels)), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, ((op, phase), part) in zip(grid, panels, strict=True):
        for (variant, backend), line in sorted(part.groupby(["linear_scan", "backend"])):
            is_verified = bool((line["parity"] == checks.GREEN).all())
            look = style.line("", backend, is_verified=is_verified, variant=variant)
            line = line.sort_values("seq_len")
            label = f"{variant}, {style.backend_label(backend)}"
            label += "" if is_verified else f" {checks.UNVERIFIED}"
            _draw(axes, line, line["seq_len"].to_numpy(dtype=float), look, label, is_curve=False)
        axes.set_title(f"{op}, {PASSES[phase]}")
        axes.set_xlabel("Sequence length (tokens)")
        axes.set_yscale("log")
        _log_lengths(axes, part["seq_len"].to_numpy(dtype=float))
    grid[0].set_ylabel(METRICS["op_time_ms"].label)
    _legend(figure, grid[0])
    model = f" ({most[-2]})" if most[-2] else ""
    notes = [f"size {most[0]}{model}, {most[1]}, {most[2]}, batch {most[-1]}."]
    if left_out:
        notes.append(f"{left_out} further times are in the tables alone.")
    _note(figure, notes, rows)
    return figure


def learning_curves(frame: pd.DataFrame) -> Figure | None:
    """Training loss by step; the median over seeds, smoothed over a fortieth of the run."""
    rows = _summary(frame, "language_modeling", "train_loss", at=True)
    if rows.empty:
        return None
    rows = rows.sort_values("at")
    curves = rows.groupby(["cell_id"], sort=False)
    for column in ("value", "low", "high"):
        rows[column] = curves[column].transform(
            lambda values: values.rolling(max(1, len(values) // 40), min_periods=1).median()
        )
    label = METRICS["train_loss"].label
    return _lines(rows, "at", "Optimizer step", label, is_log=False, is_curve=True)


def loss_by_position(frame: pd.DataFrame) -> Figure | None:
    """Held-out loss by position in the document; where there are many, in 24 log-spaced bins."""
    rows = _summary(frame, "language_modeling", "loss_by_position", at=True)
    if rows.empty:
        return None
    rows["at"] = rows["at"] + 1  # positions count from 0; a log axis from 1
    if rows["at"].nunique() > 32:
        edges = np.unique(np.geomspace(1, rows["at"].max() + 1, 25).round())
        rows["bin"] = np.digitize(rows["at"], edges)
        kept = [*PANEL, *LINE, "cell_id", "parity", "batch_size", "bin"]
        rows = rows.groupby(kept, sort=False, as_index=False).agg(
            at=("at", "mean"), value=("value", "mean"), low=("low", "mean"), high=("high", "mean"),
        )  # fmt: skip
    label = METRICS["loss_by_position"].label
    return _lines(rows, "at", "Position in the document, from 1", label, is_curve=True)


def parity_error(frame: pd.DataFrame) -> Figure | None:
    """The worst error of each level of the parity ladder as a share of its tolerance; an exact 0 at
    the left."""
    errors = checks.parity_errors(frame)
    if len(errors):
        is_counted = errors["is_counted"].fillna(False).astype(bool)
        errors = errors[(errors["size"] == checks.PARITY_SIZE) & is_counted]
    if errors.empty:
        return None
    names = zip(errors["dtype"], errors["field"], strict=True)
    errors["kind"] = [f"{field.split('/')[0]} {dtype}" for dtype, field in names]
    errors = errors.sort_values("share", kind="stable")
    key = ["kind", "family", "backend"]
    worst = errors.drop_duplicates(key, keep="last").sort_values("kind", kind="stable")
    kinds = list(dict.fromkeys(worst["kind"]))[::-1]
    share = worst["share"].clip(upper=1e3)  # without a tolerance there is no share: far out
    floor = share[share > 0].min() / 10 if (share > 0).any() else 1e-3
    worst["shown"] = share.clip(lower=floor)
    figure = Figure(figsize=(7.2, 1.5 + 0.36 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    groups = sorted(set(zip(worst["family"], worst["backend"], strict=True)), key=_order)
    for number, (family, backend) in enumerate(groups):
        part = worst[(worst["family"] == family) & (worst["backend"] == backend)]
        shift = 0.5 * (number - (len(groups) - 1) / 2) / max(1, len(groups))
        y = np.array([kinds.index(kind) for kind in part["kind"]]) - shift
        look = style.line(family, backend) | {"linestyle": "none"}
        axes.plot(part["shown"], y, **look,
                  label=_label(family, backend))  # fmt: skip
    axes.axvline(1, color=style.ALARM, lw=2.5, label="Tolerance")
    axes.set_xscale("log")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("Relative error of the worst tensor, over its tolerance")
    axes.grid(visible=False, axis="y")
    _legend(figure, axes)
    return figure


def training_parity(frame: pd.DataFrame) -> Figure | None:
    """Hundreds of steps on text in both backends (parity, level L5): the losses lie on each other,
    their distance from the float64 training grows as rounding alone lets it grow (grey: the same
    training, disturbed by float32's rounding and by nothing else)."""
    rows = frame[(frame["suite"] == "parity") & (frame["metric"] == "train_loss")]
    rows = load.words(rows[rows["levels"] == "L5"])
    if rows.empty:
        return None
    rows = rows.assign(curve=rows["field"].where(rows["field"].notna(), rows["backend"]))
    families = sorted(rows["family"].unique(), key=vocabulary.family_order)
    figure = Figure(figsize=(4.2 * len(families), 5.2), layout="constrained")
    panels = figure.subplots(
        2, len(families), sharex=True, sharey="row", squeeze=False, height_ratios=(1, 1.2)
    )
    for family, (above, below) in zip(families, panels.T, strict=True):
        part = rows[rows["family"] == family]
        curves = part.pivot_table(index="at", columns="curve", values="value", aggfunc="mean")
        color = style.FAMILY_COLORS.get(family, style.OTHER_COLORS[0])
        true = curves["float64"]
        named = [name for name in style.BACKEND_LABELS if name in curves]
        above.plot(curves.index, true, color=style.GRID, linewidth=4, alpha=0.5, label="float64")
        pairs = {"rounding alone": (curves["float64, rounded"], true, style.GRID, "-")}
        for name in named:
            look = {"color": color, "linestyle": style.BACKEND_LINES[name]}
            above.plot(curves.index, curves[name], label=style.BACKEND_LABELS[name], **look)
            label = f"{style.BACKEND_LABELS[name]} to float64"
            pairs[label] = (curves[name], true, color, style.BACKEND_LINES[name])
        if len(named) == 2:
            pairs["JAX to PyTorch"] = (curves["jax"], curves["torch"], style.INK, ":")
        for label, (one, other, ink, line) in pairs.items():
            # the largest so far: two curves may cross, and have then not come nearer
            distance = ((one - other).abs() / other).cummax()
            below.plot(curves.index, distance, label=label, color=ink, linestyle=line)
        above.set_title(style.FAMILY_LABELS.get(family, family))
        below.set_yscale("log")
        below.set_xlabel("Optimizer step")
        for axes in (above, below):
            axes.legend(fontsize=7.5)
    panels[0, 0].set_ylabel(METRICS["train_loss"].label)
    panels[1, 0].set_ylabel("Largest relative difference so far")
    return figure


def peak_memory(frame: pd.DataFrame) -> Figure | None:
    """Peak memory in training by seq_len; a cross at the top edge is a run that did not end."""
    rows = _summary(frame, "training_speed", "peak_memory_bytes")
    lost = derive.failures(frame)
    lost = lost[(lost["suite"] == "training_speed") & lost["seq_len"].notna()]
    label = METRICS["peak_memory_bytes"].label
    return _lines(rows, "seq_len", "Sequence length (tokens)", label, lost=lost, from_zero=True)


FIGURES: dict[str, Callable[[pd.DataFrame], Figure | None]] = {
    function.__name__: function
    for function in (relative_step_time, training_throughput, prefill_latency, decode_latency,
                     decode_throughput, kernel_speed, learning_curves, loss_by_position,
                     peak_memory, parity_error, training_parity)
}  # fmt: skip


def caption(name: str) -> str:
    return (FIGURES[name].__doc__ or "").strip().replace("\n    ", " ")


def _metric(frame: pd.DataFrame, suite: str, metric: str, x: str, x_label: str) -> Figure | None:
    return _lines(_summary(frame, suite, metric), x, x_label, METRICS[metric].label)


def _summary(frame: pd.DataFrame, suite: str, metric: str, at: bool = False) -> pd.DataFrame:
    """Cells of one metric of one suite, in the unit of its axis."""
    rows = derive.summary(frame)
    is_wanted = (rows["suite"] == suite) & (rows["metric"] == metric) & (rows["at"].notna() == at)
    rows = rows[is_wanted].copy()
    for column in ("value", "low", "high"):
        rows[column] = rows[column].astype(float) / tables.SCALES.get(metric, 1.0)
    return rows


def _lines(
    rows: pd.DataFrame,
    x: str,
    x_label: str,
    y_label: str,
    *,
    is_log: bool = True,
    is_curve: bool = False,
    reference: float | None = None,
    lost: pd.DataFrame | None = None,
    from_zero: bool = False,
) -> Figure | None:
    """A panel for each size, dtype and device, a line for each family and backend. With one x
    alone the families stand side by side instead."""
    rows = rows[rows[x].notna()]
    if rows.empty:
        return None
    panels = list(rows.groupby(PANEL, sort=True))
    left_out, panels = len(panels) - MAX_PANELS, panels[:MAX_PANELS]
    is_single = rows[x].nunique() == 1 and not is_curve
    figure = Figure(figsize=(max(7.2, 3.9 * len(panels)), 3.9), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (key, part) in zip(grid, panels, strict=True):
        if reference is not None:
            axes.axhline(reference, color=style.family_color("mqa"), linewidth=1.2,
                         label=style.family_label("mqa"))  # fmt: skip
        families = sorted(part["family"].unique(), key=vocabulary.family_order)
        lines = [*LINE, "batch_size"] if part.duplicated([*LINE, x]).any() else LINE
        groups = sorted(part.groupby(lines), key=lambda item: _order(item[0]))
        backends = sorted(part["backend"].unique())
        seen: dict[tuple, int] = {}
        for name, line in groups:
            family, backend = name[:2]
            verified = bool((line["parity"] == checks.GREEN).all())
            look = style.line(family, backend, is_verified=verified)
            number = seen[name[:2]] = seen.get(name[:2], 0) + 1
            look["alpha"] = max(0.25, 1.3 - 0.3 * number)  # further variants of one colour pale
            extra = [name[2], *(f"batch {size}" for size in name[3:])]
            label = ", ".join([_label(family, backend), *filter(None, extra)])
            label += "" if verified else f" {checks.UNVERIFIED}"
            line = line.sort_values(x)
            places = line[x].to_numpy(dtype=float)
            if is_single:
                step = (backends.index(backend) - (len(backends) - 1) / 2) * 0.22
                places = np.full(len(line), families.index(family) + step)
                look["linestyle"] = "none"
            _draw(axes, line, places, look, label, is_curve)
        if is_single:
            axes.set_xticks(range(len(families)), [style.family_label(f) for f in families])
            axes.set_xlim(-0.6, len(families) - 0.4)
            axes.grid(visible=False, axis="x")
            axes.set_xlabel(f"Family; {x_label.lower()}: {int(rows[x].iloc[0]):,}")
        else:
            axes.set_xlabel(x_label)
            if is_log:
                _log_lengths(axes, part[x].to_numpy(dtype=float))
        if from_zero:
            axes.set_ylim(bottom=0)
        if lost is not None and not is_single:
            _mark_lost(axes, lost, key, x)
        if len(panels) > 1:
            varied = [i for i, name in enumerate(PANEL) if rows[name].nunique() > 1]
            axes.set_title(", ".join(str(key[i]) for i in varied))
        if rows["value"].max() >= 10_000:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if not is_curve:
        _keep_in_sight(grid[0], rows, from_zero)
    grid[0].set_ylabel(y_label)
    _legend(figure, grid[0])
    _note(figure, [f"{left_out} further panels are in the tables alone."] * (left_out > 0), rows)
    return figure


def _note(figure: Figure, notes: list[str], rows: pd.DataFrame) -> None:
    """A line under the plots, an alarm where it begins with what is not verified of its rows."""
    is_bare = bool((rows["parity"] != checks.GREEN).any())
    if is_bare:
        hollow = (
            f"Hollow markers are {checks.UNVERIFIED}: no green parity record of the same "
            "kernels, head_dim, dtype, device and build."
        )
        notes = [hollow, *notes]
    if notes:
        color = style.ALARM if is_bare else style.INK
        figure.supxlabel(" ".join(notes), x=0.01, ha="left", fontsize=8, color=color)


def _draw(
    axes: Axes, line: pd.DataFrame, places: np.ndarray, look: dict, label: str, is_curve: bool
) -> None:
    value, low, high = (line[name].to_numpy(dtype=float) for name in ("value", "low", "high"))
    is_known = ~(np.isnan(low) | np.isnan(high))
    if is_curve:
        every = max(1, len(line) // 8)
        axes.plot(places, value, **look, label=label, markevery=every)
        if is_known.all():
            axes.fill_between(places, low, high, color=look["color"], alpha=0.15, linewidth=0)
        return
    axes.plot(places, value, **look, label=label)
    if is_known.any():
        reach = np.abs(np.stack([value - low, high - value]))[:, is_known]
        axes.errorbar(places[is_known], value[is_known], yerr=reach, fmt="none", capsize=3,
                      ecolor=look["color"], elinewidth=1.2)  # fmt: skip


def _keep_in_sight(axes: Axes, rows: pd.DataFrame, from_zero: bool) -> None:
    """Values fill the axis; of an interval many times wider than their spread the ends run off."""
    low, high = float(rows["value"].min()), float(rows["value"].max())
    reach = max(high - low, 0.2 * abs(high))
    bottom, top = axes.get_ylim()
    bottom = 0 if from_zero else max(bottom, low - reach)
    if (rows[["low", "value"]].min(axis=None) >= 0) and bottom < 0:
        bottom = 0
    axes.set_ylim(bottom, min(top, high + reach))


def _mark_lost(axes: Axes, lost: pd.DataFrame, key: tuple, x: str) -> None:
    same = (lost[PANEL] == list(key)).all(axis=1)
    for (family, backend, outcome), part in lost[same].groupby(["family", "backend", "outcome"]):
        places = part[x].drop_duplicates().to_numpy(dtype=float)
        axes.plot(places, np.ones(len(places)), "x", color=style.family_color(family), mew=2,
                  transform=axes.get_xaxis_transform(), clip_on=False,
                  label=f"{_label(family, backend)}: {outcome}")  # fmt: skip


def _log_lengths(axes: Axes, places: np.ndarray) -> None:
    """Base 2, with a tick at each length that was measured while they are few."""
    axes.set_xscale("log", base=2)
    ticks = np.unique(places)
    if len(ticks) <= 9:
        axes.set_xticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if len(labels) < 3 else min(3, (len(labels) + 1) // 2)
    figure.legend(handles, labels, loc="outside upper left", ncols=max(1, columns))


def _label(family: str, backend: str) -> str:
    return f"{style.family_label(family)}, {style.backend_label(backend)}"


def _order(name: tuple) -> tuple:
    return (*vocabulary.family_order(name[0]), *name[1:])
