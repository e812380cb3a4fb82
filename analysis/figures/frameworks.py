"""Frameworks: the same model in JAX and in PyTorch, over every workload that both have run."""

import textwrap

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from analysis import checks, comparisons, statistics, style, vocabulary, wording
from analysis.figures import drawing, labels
from suites.harness.record import PASSES

MOST = 4.0  # times faster or slower: the ends of the colours
MAX_ROWS = 20
# the counts of a workload, of which those that differ within a suite name its rows
COUNTS = {"seq_len": "{:,.0f} tokens", "prompt_len": "prompt {:,.0f}",
          "num_new_tokens": "{:,.0f} new", "num_devices": "{:,.0f} devices"}  # fmt: skip
NAMES = {
    "step_time_ms": "training step", "ttft_ms": "prefill", "tpot_ms": "decoded token",
    "tokens_per_s": "decoding", "op_time_ms": "scan alone",
}  # fmt: skip
MARKS = {"faster": "JAX faster", "slower": "JAX slower", "equivalent": "equivalent",
         "inconclusive": "inconclusive", statistics.UNPAIRED: "unpaired"}  # fmt: skip


def framework_ratios(frame: pd.DataFrame) -> Figure | None:
    """How many times as fast as PyTorch JAX is, by workload and family: the number and its verdict
    in each cell, purple where JAX is the faster, orange where PyTorch is."""
    found = comparisons.comparisons(frame, by="backend", ours="jax")
    first = [vocabulary.HEADLINES.get(suite, (None,))[0] for suite in found["suite"]]
    found = found[(found["metric"] == first) & found["metric"].isin(NAMES)]
    found = found[found["speedup"].notna()]
    if found.empty:
        return None
    varied = [name for name in drawing.PANEL if found[name].nunique() > 1]
    suites = list(vocabulary.HEADLINES)
    found = found.assign(order=[suites.index(suite) for suite in found["suite"]])
    order = ["order", "op", "work_phase", "seq_len", "prompt_len", "num_new_tokens", "at"]
    # of a search over batches the largest that both have run
    same = ["cell_id_ours", "cell_id_baseline", "metric"]
    found = found.sort_values("at", kind="stable").drop_duplicates(same, keep="last")
    found = found.sort_values([*order, *varied], kind="stable")
    found["row"] = _row_names(found, varied)
    families = sorted(found["family"].unique(), key=vocabulary.family_order)
    names = list(dict.fromkeys(found["row"]))
    left_out, names = len(names) - MAX_ROWS, names[:MAX_ROWS]
    figure = Figure(figsize=(drawing.WIDTH, 1.6 + 0.38 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    ratios = np.full((len(names), len(families)), np.nan)
    cells = found[found["row"].isin(names)].drop_duplicates(["row", "family"]).to_dict("records")
    for row in cells:
        ratios[names.index(row["row"]), families.index(row["family"])] = row["speedup"]
    colors = matplotlib.colormaps["PuOr"]
    scale = Normalize(-np.log2(MOST), np.log2(MOST))
    # a mesh and no image: it stays a drawing in the SVG
    axes.pcolormesh(np.ma.masked_invalid(np.log2(ratios)), cmap=colors, norm=scale,
                    edgecolors="white", linewidth=1.5)  # fmt: skip
    for row in cells:
        y, x = names.index(row["row"]), families.index(row["family"])
        red, green, blue, _ = colors(scale(np.log2(row["speedup"])))
        is_light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45
        axes.text(x + 0.5, y + 0.5, _words(row), ha="center", va="center", fontsize=8.5,
                  linespacing=1.15, color="#000000" if is_light else "#ffffff")  # fmt: skip
    heads = [textwrap.fill(labels.text(style.family_label(name)), 12) for name in families]
    axes.set_xticks(np.arange(len(families)) + 0.5, heads)
    axes.set_yticks(np.arange(len(names)) + 0.5, [labels.text(name) for name in names])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    notes = ["PyTorch's time over JAX's (1): above 1x JAX is the faster."]
    if left_out > 0:
        notes.append(f"{left_out} further workloads are in the tables alone.")
    if not all(_is_green(row) for row in found.to_dict("records")):
        notes.append(f"* {checks.UNVERIFIED}: no green parity record of one side or both.")
    labels.note(figure, notes)
    return figure


def _row_names(found: pd.DataFrame, varied: list[str]) -> list[str]:
    """The workload of each row, in what sets it apart from others of its suite."""
    names = []
    differ = {suite: [name for name in (*COUNTS, "op", "work_phase") if part[name].nunique() > 1]
              for suite, part in found.groupby("suite")}  # fmt: skip
    for row in found.to_dict("records"):
        words = [NAMES[row["metric"]]]
        for name in differ[row["suite"]]:
            if name in COUNTS and not pd.isna(row[name]):
                words.append(COUNTS[name].format(row[name]))
            elif name == "op":
                words.append(labels.text(row[name]))
            elif name == "work_phase":
                words.append(PASSES.get(row[name], row[name]))
        variant = row["linear_scan_ours"] if row["suite"] == "kernel_speed" else row["variant"]
        words += [labels.text(value) for value in (*(row[n] for n in varied), variant) if value]
        names.append(", ".join(words))
    return names


def _words(row: dict) -> str:
    star = "" if _is_green(row) else "*"
    return f"{wording.times(row['speedup'])}x{star}\n{MARKS.get(row['verdict'], row['verdict'])}"


def _is_green(row: dict) -> bool:
    return row["parity_ours"] == row["parity_baseline"] == checks.GREEN
