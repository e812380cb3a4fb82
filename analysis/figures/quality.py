"""Quality: how the loss falls over steps, compute, positions and windows; bands are over seeds."""

import json

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import derive, power_law, quality, statistics, style
from analysis.figures import drawing, labels, literature
from suites.harness.record import METRICS

SUITE = "language_modeling"
EXTRAPOLATION = "length_extrapolation"
SMOOTHED = 40  # parts of a run: the window of a learning curve's median
MAX_BINS = 24
MAX_POSITIONS = 64  # that are drawn as they are


def learning_curves(frame: pd.DataFrame) -> Figure | None:
    """Training loss by step; the median over seeds, smoothed over a fortieth of the run."""
    rows = drawing.summary(frame, SUITE, "train_loss", at=True)
    if rows.empty:
        return None
    rows = rows.sort_values("at")
    numbers = ["value", "low", "high"]
    windows = rows.groupby("cell_id", sort=False)["value"].transform("size") // SMOOTHED
    for window, part in rows[windows > 1].groupby(windows):
        curves = part.groupby("cell_id", sort=False)[numbers]
        smooth = curves.rolling(int(window), min_periods=1).median()
        rows.loc[part.index, numbers] = smooth.droplevel(0)
    label = METRICS["train_loss"].label
    return drawing.lines(rows, "at", "Optimizer step", label, is_log=False, is_curve=True)


def held_out_curves(frame: pd.DataFrame) -> Figure | None:
    """Held-out loss by step, of the same text at every point; the median over seeds."""
    rows = drawing.summary(frame, SUITE, "held_out_loss", at=True)
    if rows.empty:
        return None
    label = METRICS["loss"].label
    return drawing.lines(rows, "at", "Optimizer step", label, is_log=False, is_curve=True)


def learning_rates(frame: pd.DataFrame) -> Figure | None:
    """Held-out loss by learning rate, where it was searched, a line a weight decay."""
    searched = quality.searched(frame).set_index("cell_id")
    rows = drawing.summary(frame, SUITE, "loss")
    rows = rows[rows["cell_id"].isin(searched.index)]
    rate, decay = (rows["cell_id"].map(searched[name]) for name in quality.SEARCHED)
    if rate.nunique() < 2:
        return None
    rows = rows.assign(rate=rate)
    if decay.nunique() > 1:
        words = "weight_decay=" + decay.map("{:g}".format)
        rows["variant"] = [", ".join(filter(None, pair))
                           for pair in zip(rows["variant"], words, strict=True)]  # fmt: skip
    label = METRICS["loss"].label

    def in_plain_numbers(axes: Axes, part: pd.DataFrame) -> None:
        rates = sorted(part["rate"].unique())
        axes.set_xscale("log")
        axes.set_xticks(rates, labels=[f"{rate:g}" for rate in rates])
        axes.set_xticks([], minor=True)

    return drawing.lines(rows, "rate", "Learning rate", label, is_log=False,
                         decorate=in_plain_numbers)  # fmt: skip


def loss_by_position(frame: pd.DataFrame) -> Figure | None:
    """Held-out loss by position in the document, the length of training sequences marked; where
    positions are many, in 24 log-spaced bins. Beyond the training length a wide, pale band is the
    95% interval over documents."""
    parts = [drawing.summary(frame, suite, "loss_by_position", at=True)
             for suite in (SUITE, EXTRAPOLATION)]  # fmt: skip
    parts = [part for part in parts if not part.empty]
    if not parts:
        return None
    rows = pd.concat(parts, ignore_index=True)
    rows["half"] = _half_of_documents(frame, rows)
    rows["at"] = rows["at"] + 1  # positions count from 0; a log axis from 1
    if rows["at"].nunique() > MAX_POSITIONS:
        edges = np.unique(np.geomspace(1, rows["at"].max() + 1, MAX_BINS + 1).round())
        rows["bin"] = np.digitize(rows["at"], edges)
        numbers = ["at", "value", "low", "high", "half"]
        kept = [name for name in rows if name not in numbers]
        means = rows.groupby(["cell_id", "bin"], sort=False)[numbers].mean()
        rows = rows[kept].drop_duplicates(["cell_id", "bin"])
        rows = rows.merge(means.reset_index(), on=["cell_id", "bin"])
    label = METRICS["loss_by_position"].label
    return drawing.lines(rows, "at", "Position in the document, from 1", label, is_curve=True,
                         panel=[*drawing.PANEL, "suite"],
                         decorate=_mark_training_length)  # fmt: skip


def _half_of_documents(frame: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """Half the interval over documents of each row; NaN where nobody asked them."""
    found = [
        drawing.summary(frame, EXTRAPOLATION, metric, at=True).set_index(["cell_id", "at"])["value"]
        for metric in ("loss_error", "num_documents")
    ]
    places = pd.MultiIndex.from_frame(rows[["cell_id", "at"]])
    error, n = (values.reindex(places).to_numpy(dtype=float) for values in found)
    n = np.where(n > 1, n, np.nan)
    return statistics.student_half_width(n, error * np.sqrt(n))


def scaling(frame: pd.DataFrame) -> Figure | None:
    """Held-out loss over training FLOPs and over parameters without embeddings, both logarithmic;
    lines are power laws, as far as they were fitted, with bands over seeds."""
    rows = drawing.summary(frame, SUITE, "loss")
    flops = derive.runs(frame).drop_duplicates("cell_id").set_index("cell_id")
    tokens = [rows[name].astype(float) for name in ("batch_size", "seq_len", "num_steps")]
    per_token = rows["cell_id"].map(flops["train_flops_per_token"])
    rows["train_flops"] = per_token.astype(float) * tokens[0] * tokens[1] * tokens[2]
    rows["num_params_non_embedding"] = rows["num_params_non_embedding"].astype(float)
    keys = ["dtype", "device_kind", "data"]
    rows = rows[rows["train_flops"].notna()]
    # another sequence length is another task, not more of the same
    lines = rows.groupby([*keys, *drawing.LINE, "seq_len"], dropna=False)["train_flops"]
    if rows.empty or lines.nunique().max() < 2:
        return None
    panels, notes = drawing.panels_of(rows, keys, (), 1)
    (key, part), *_ = panels
    figure, grid = drawing.panel_grid(2)
    for axes, x in zip(grid, power_law.AGAINST, strict=True):
        for (family, backend, variant), line in sorted(
            part.groupby(drawing.LINE), key=lambda item: labels.order(item[0])
        ):
            look = style.line(family, backend, is_verified=labels.is_verified(line))
            look["linestyle"] = "none"
            extra = [labels.text(variant)] if variant else []
            name = labels.label(family, backend, line, extra)
            at, value, low, high = (line[c].to_numpy(dtype=float)
                                    for c in (x, "value", "low", "high"))  # fmt: skip
            axes.plot(at, value, **look, label=name)
            drawing.draw_intervals(axes, at, value, low, high, look)
        notes += _draw_laws(axes, frame, x, dict(zip(keys, key, strict=True)))
        labels.log_values(axes.xaxis)
    notes += drawing.keep_in_sight(grid[0], part)
    labels.log_values(grid[0].yaxis)
    grid[0].set_xlabel("Training compute (FLOPs)")
    grid[1].set_xlabel("Parameters without embeddings")
    labels.label_rows(figure, METRICS["loss"].label)
    if rows.groupby(keys, dropna=False).ngroups > 1:
        notes.append(f"Here: {', '.join(map(labels.text, key))}.")
    labels.legend(figure, grid[:1])
    labels.note(figure, notes, part)
    return figure


def _draw_laws(axes: Axes, frame: pd.DataFrame, x: str, panel: dict) -> list[str]:
    """The fits of one panel, between the sizes they were fitted to; returns their exponents."""
    words, spans = [], []
    laws = sorted(power_law.fits(frame, x), key=lambda item: labels.order(
        (item[0]["family"], item[0]["backend"])))  # fmt: skip
    for key, law in laws:
        if any(key[name] != value for name, value in panel.items()):
            continue
        look = style.line(key["family"], key["backend"])
        at = np.geomspace(law.least, law.most, 100)
        axes.plot(at, law.loss(at), color=look["color"], linestyle=look["linestyle"], linewidth=1)
        if (band := law.band(at)) is not None:
            axes.fill_between(at, *band, color=look["color"], alpha=0.15, linewidth=0)
        interval = f" [{-law.interval[1]:.3f}, {-law.interval[0]:.3f}]" if law.interval else ""
        name = labels.name_of(key["family"], key["backend"])
        words.append(f"{name} {-law.exponent:.3f}{interval}")
        spans.append(law.span_decades)
    if not words:
        return []
    return [f"Exponents over {power_law.AGAINST[x]}: {'; '.join(words)}; they span "
            f"{max(spans):.1f} decades and say nothing beyond."]  # fmt: skip


def window_sizes(frame: pd.DataFrame) -> Figure | None:
    """Held-out loss by window size, a panel for each training length; a model that sees all
    positions stands at the window of its training length, and as a line across."""
    rows = drawing.summary(frame, SUITE, "loss")
    if rows.empty:
        return None
    windows = [json.loads(model).get("window_size") for model in rows["model"]]
    has_attention = ["mqa" in (json.loads(model).get("pattern") or ("mqa",))
                     for model in rows["model"]]  # fmt: skip
    rows = rows.assign(window=np.array(windows, dtype=float), is_global=pd.isna(windows))
    rows = rows[has_attention]
    if rows["window"].nunique() < 2:
        return None
    # the window is the axis here: what else sets a cell apart stays in its name
    rows["variant"] = [", ".join(word for word in text.split(", ") if word
                                 and not word.startswith("window_size="))
                       for text in rows["variant"]]  # fmt: skip
    keys = [*drawing.PANEL, "seq_len"]
    panels, notes = drawing.panels_of(rows, keys, ())
    figure, grid = drawing.panel_grid(len(panels))
    for axes, (key, part) in zip(grid, panels, strict=True):
        everywhere = part[part["is_global"]]
        for (family, backend), extra, places in drawing.line_groups(everywhere, "seq_len"):
            line = everywhere.iloc[places]
            look = style.line(family, backend, is_verified=labels.is_verified(line))
            for row in line.to_dict("records"):
                axes.axhline(row["value"], color=look["color"], linestyle=look["linestyle"],
                             linewidth=1)  # fmt: skip
            name = labels.label(family, backend, line, [*extra, "all positions"])
            drawing.draw(axes, line, "seq_len", look | {"linestyle": "none"}, name)
        local = part[~part["is_global"]]
        drawing.draw_lines(axes, local, "window")
        literature.windows(axes, part)
        places = np.append(local["window"].to_numpy(dtype=float), float(key[-1]))
        labels.log_lengths(axes, places)
        axes.set_xlabel("Window size (tokens, itself included)")
        words = [f"Trained at {key[-1]:,.0f} tokens"]
        words += [labels.text(value) for name, value in zip(keys[:-1], key, strict=False)
                  if rows[name].nunique() > 1]  # fmt: skip
        axes.set_title(", ".join(words))
    notes += drawing.keep_in_sight(grid[0], rows)
    labels.label_rows(figure, METRICS["loss"].label)
    labels.legend(figure, grid)
    labels.note(figure, notes, rows)
    return figure


def _mark_training_length(axes: Axes, part: pd.DataFrame) -> None:
    for (family, backend), _, places in drawing.line_groups(part, "at")[: drawing.MAX_LINES]:
        line = part.iloc[places].sort_values("at")
        at, value, half = (line[name].to_numpy(dtype=float) for name in ("at", "value", "half"))
        if np.isnan(half).all():
            continue
        axes.fill_between(at, value - half, value + half, alpha=0.07, linewidth=0,
                          color=style.line(family, backend)["color"])  # fmt: skip
    for seq_len in sorted(part["seq_len"].dropna().unique()):
        axes.axvline(float(seq_len), color=style.GRID, linestyle=":", linewidth=1.3,
                     label=f"Trained at {seq_len:,.0f} tokens")  # fmt: skip
