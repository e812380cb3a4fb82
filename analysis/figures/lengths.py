"""Length as a domain: a heat map for each family, trained in one bucket, evaluated in another."""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis import checks, lengths
from analysis.figures import drawing, labels

FEW = 0.1  # nats: the colours reach at least as far, so that noise does not fill them
MOST = 6  # panels


def length_domains(frame: pd.DataFrame) -> Figure | None:
    """Held-out loss by the bucket of lengths that was trained and the one that is evaluated; the
    colour, and the number below, is what it is above the loss of the model that was trained in the
    evaluated bucket (framed)."""
    found = lengths.domains(frame)
    if found.empty:
        return None
    panels = list(found.groupby([*lengths.SHARED, *lengths.MODEL], sort=False, dropna=False))
    notes = [
        "Losses compare within a column alone: buckets differ in their text. Framed: trained in "
        "the bucket that is evaluated."
    ]
    if len(panels) > MOST:
        notes.append(f"{len(panels) - MOST} further panels are in the tables alone.")
    panels = panels[:MOST]
    widest = max(FEW, float(found["penalty"].abs().max()) if found["penalty"].notna().any() else 0)
    scale, colors = Normalize(-widest, widest), matplotlib.colormaps["PuOr_r"]
    size = max(found["trained"].nunique(), found["evaluated"].nunique())
    columns = min(2, len(panels))
    num_rows = -(-len(panels) // columns)
    height = 0.9 + num_rows * (0.8 + 0.5 * size)
    figure = Figure(figsize=(drawing.WIDTH, height), layout="constrained")
    grid = list(figure.subplots(num_rows, columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (key, part) in zip(grid, panels, strict=False):
        _draw(axes, part, scale, colors)
        values = dict(zip([*lengths.SHARED, *lengths.MODEL], key, strict=True))
        words = [labels.name_of(values["family"], values["backend"])]
        words += [labels.text(values[name]) for name in ("variant", *lengths.SHARED)
                  if found[name].nunique() > 1 and values[name]]  # fmt: skip
        axes.set_title(", ".join(words) + ("" if _is_green(part) else "*"))
    for axes in figure.axes:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("Trained up to (tokens)")
    if not _is_green(found):
        notes.append(f"* {checks.UNVERIFIED}: no green parity record.")
    labels.note(figure, notes)
    return figure


def _draw(axes: Axes, part: pd.DataFrame, scale: Normalize, colors: matplotlib.colors.Colormap):
    trained, evaluated = (sorted(part[name].unique()) for name in ("trained", "evaluated"))
    penalties = np.full((len(trained), len(evaluated)), np.nan)
    rows = part.to_dict("records")
    for row in rows:
        is_own = row["trained"] == row["evaluated"]
        place = trained.index(row["trained"]), evaluated.index(row["evaluated"])
        penalties[place] = 0.0 if is_own else row["penalty"]
    # a mesh and no image: it stays a drawing in the SVG
    axes.pcolormesh(np.ma.masked_invalid(penalties), cmap=colors, norm=scale,
                    edgecolors="white", linewidth=1.5)  # fmt: skip
    for row in rows:
        y, x = trained.index(row["trained"]), evaluated.index(row["evaluated"])
        is_own = row["trained"] == row["evaluated"]
        words = f"{row['loss']:.3f}" + (
            "" if is_own or pd.isna(row["penalty"]) else f"\n{row['penalty']:+.3f}"
        )
        shade = 0.0 if pd.isna(penalties[y, x]) else penalties[y, x]
        red, green, blue, _ = colors(scale(shade))
        is_light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45
        axes.text(x + 0.5, y + 0.5, words, ha="center", va="center", fontsize=8.5,
                  linespacing=1.15, color="#000000" if is_light else "#ffffff")  # fmt: skip
        if is_own:
            axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, fill=False, linewidth=1.6,
                                     edgecolor="#000000"))  # fmt: skip
    axes.set_xticks(np.arange(len(evaluated)) + 0.5, [f"{value:,}" for value in evaluated])
    axes.set_yticks(np.arange(len(trained)) + 0.5, [f"{value:,}" for value in trained])
    axes.set_xlabel("Evaluated up to (tokens)")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _is_green(rows: pd.DataFrame) -> bool:
    return bool((rows["parity"] == checks.GREEN).all())
