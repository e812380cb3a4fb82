"""Parity: how far from the float64 equations each backend is, by level, by layer, over steps."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import checks, load, style, vocabulary
from analysis.figures import drawing, labels
from suites.harness.record import METRICS

FAR = 1e3  # where an error stands that has no tolerance
LAYER = r"^(?P<kind>.*)/layers\.(?P<layer>\d+)(?:\.|$)"  # of a field: L4/grad/layers.3.mlp...
DRAWN_ONCE = "L0/"  # parameters as they were drawn, not what a layer made of them


def parity_error(frame: pd.DataFrame) -> Figure | None:
    """The worst error of each level of the parity ladder as a share of its tolerance; an exact 0 at
    the left."""
    errors = _errors(frame)
    if errors.empty:
        return None
    names = zip(errors["dtype"], errors["field"], strict=True)
    errors["kind"] = [f"{field.split('/')[0]} {dtype}" for dtype, field in names]
    worst = _worst(errors, ["kind", "family", "backend"]).sort_values("kind", kind="stable")
    kinds = list(dict.fromkeys(worst["kind"]))[::-1]
    worst["shown"], _ = _on_a_log_axis(worst["share"])
    figure = Figure(figsize=(drawing.WIDTH, 1.5 + 0.36 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    groups = _groups(worst)
    for number, (family, backend) in enumerate(groups):
        part = worst[(worst["family"] == family) & (worst["backend"] == backend)]
        shift = 0.5 * (number - (len(groups) - 1) / 2) / max(1, len(groups))
        y = np.array([kinds.index(kind) for kind in part["kind"]]) - shift
        look = style.line(family, backend) | {"linestyle": "none"}
        axes.plot(part["shown"], y, **look, label=labels.name_of(family, backend))
    axes.axvline(1, color=style.ALARM, lw=2.5, label="Tolerance")
    labels.log_values(axes.xaxis)
    axes.set_yticks(range(len(kinds)), [labels.text(kind) for kind in kinds])
    axes.set_xlabel("Relative error of the worst tensor, over its tolerance (1)")
    axes.grid(visible=False, axis="y")
    labels.legend(figure, [axes])
    return figure


def parity_by_layer(frame: pd.DataFrame) -> Figure | None:
    """The worst error within each layer, over depth, as a share of its tolerance: activations,
    gradients and parameters after some steps; an exact 0 at the bottom."""
    errors = _errors(frame)
    if errors.empty:
        return None
    found = errors["field"].str.extract(LAYER)
    errors = errors.assign(kind=found["kind"], layer=found["layer"].astype(float))
    errors = errors[errors["layer"].notna() & ~errors["kind"].str.startswith(DRAWN_ONCE, na=False)]
    errors = errors[errors.groupby("kind")["layer"].transform("nunique") > 1]
    if errors.empty:
        return None
    worst = _worst(errors, ["kind", "dtype", "family", "backend", "layer"])
    worst["value"], floor = _on_a_log_axis(worst["share"])
    panels, notes = drawing.panels_of(worst, ["kind", "dtype"], ())
    figure, grid = drawing.panel_grid(len(panels), 3.6)
    for axes, ((kind, dtype), part) in zip(grid, panels, strict=True):
        axes.axhline(1, color=style.ALARM, lw=2, label="Tolerance")
        for family, backend in _groups(part):
            line = part[(part["family"] == family) & (part["backend"] == backend)]
            line = line.sort_values("layer")
            axes.plot(line["layer"], line["value"], **style.line(family, backend),
                      label=labels.name_of(family, backend))  # fmt: skip
        several = worst["dtype"].nunique() > 1
        axes.set_title(labels.text(f"{kind}, {dtype}" if several else kind))
        axes.set_xlabel("Layer, from 0")
        axes.xaxis.get_major_locator().set_params(integer=True)
    labels.log_values(grid[0].yaxis)
    labels.label_rows(figure, "Error over tolerance (1)")
    labels.legend(figure, grid)
    if (worst["share"] == 0).any():
        notes.append(f"At {labels.plain_number(floor)}: exactly 0.")
    labels.note(figure, notes)
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
    figure = Figure(figsize=(max(drawing.WIDTH, 2.6 * len(families)), 5.2), layout="constrained")
    panels = figure.subplots(
        2, len(families), sharex=True, sharey="row", squeeze=False, height_ratios=(1, 1.2)
    )
    for family, (above, below) in zip(families, panels.T, strict=True):
        part = rows[rows["family"] == family]
        curves = part.pivot_table(index="at", columns="curve", values="value", aggfunc="mean")
        color = style.family_color(family)
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
        above.set_title(labels.text(style.family_label(family)))
        below.set_yscale("log")
        below.set_xlabel("Optimizer step")
        for axes in (above, below):
            axes.legend(fontsize=7.5)
    panels[0, 0].set_ylabel(METRICS["train_loss"].label)
    panels[1, 0].set_ylabel("Largest relative difference so far (1)")
    return figure


def _errors(frame: pd.DataFrame) -> pd.DataFrame:
    """Of the runs that verify speeds."""
    errors = checks.parity_errors(frame)
    if errors.empty:
        return errors
    is_counted = errors["is_counted"].fillna(False).astype(bool)
    return load.words(errors[(errors["size"] == checks.PARITY_SIZE) & is_counted])


def _worst(errors: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    return errors.sort_values("share", kind="stable").drop_duplicates(key, keep="last").copy()


def _on_a_log_axis(share: pd.Series) -> tuple[pd.Series, float]:
    """Shares between the least above 0, over ten, where an exact 0 stands, and FAR."""
    share = share.clip(upper=FAR)
    floor = share[share > 0].min() / 10 if (share > 0).any() else 1e-3
    return share.clip(lower=floor), floor


def _groups(rows: pd.DataFrame) -> list[tuple[str, str]]:
    groups = set(zip(rows["family"], rows["backend"], strict=True))
    return sorted(groups, key=lambda name: (vocabulary.family_order(name[0]), name[1]))
