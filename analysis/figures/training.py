"""Training: what a step costs as sequences grow, over MQA's, over the sequential scan's."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import checks, comparisons, settings, statistics, style, vocabulary
from analysis.figures import drawing, labels, literature
from suites.harness.record import METRICS

SEQ_LEN = "Sequence length (tokens)"
MAX_ROWS = 24


def relative_step_time(frame: pd.DataFrame) -> Figure | None:
    """Step time relative to MQA of the same backend, by seq_len, tokens per step constant."""
    rows = drawing.over_mqa(
        frame, drawing.summary(frame, "training_speed", "step_time_ms"), "step_time_ms"
    )
    return drawing.lines(
        rows,
        "seq_len",
        SEQ_LEN,
        "Step time relative to MQA",
        reference=1.0,
        decorate=literature.step_time,
        asked=drawing.asked_of(frame, "training_speed"),
    )


def training_throughput(frame: pd.DataFrame) -> Figure | None:
    """Tokens per second in training, by seq_len."""
    return drawing.metric_lines(frame, "training_speed", "tokens_per_s", "seq_len", SEQ_LEN)


def step_time_by_scan(frame: pd.DataFrame) -> Figure | None:
    """Time of a whole training step with each scan variant, relative to the same model's step with
    the sequential scan in the same backend."""
    rows = drawing.summary(frame, "training_speed", "step_time_ms")
    rows = rows[rows["linear_scan"].notna()]
    base = settings.BASELINE["linear_scan"]
    variants = sorted(set(rows["linear_scan"]) - {base}, key=style.variant_order)
    if not variants or base not in set(rows["linear_scan"]):
        return None
    found = pd.concat(
        [comparisons.comparisons(frame, by="linear_scan", ours=name) for name in variants]
    )
    found = found[(found["metric"] == "step_time_ms") & found["speedup"].notna()]
    rows = drawing.as_multiples(rows, found)
    if rows.empty:
        return None
    varied = [name for name in drawing.PANEL if rows[name].nunique() > 1]
    rows["row"] = [
        ", ".join(
            [labels.name_of(one["family"], one["backend"]), f"{one['seq_len']:,.0f} tokens"]
            + [labels.text(one[name]) for name in varied]
        )
        for one in rows.to_dict("records")
    ]
    rows["order"] = [vocabulary.family_order(name) for name in rows["family"]]
    rows = rows.sort_values(["order", "backend", "seq_len"], kind="stable")
    names = list(dict.fromkeys(rows["row"]))
    left_out, names = len(names) - MAX_ROWS, names[:MAX_ROWS]
    figure = Figure(figsize=(drawing.WIDTH, 1.5 + 0.34 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(1, color=style.variant_color(base), linewidth=1.2, label=base)
    for number, variant in enumerate(variants):
        shift = 0.16 * (number - (len(variants) - 1) / 2)
        part = rows[(rows["linear_scan"] == variant) & rows["row"].isin(names)]
        apart = labels.is_unpaired(part)
        for (backend, is_apart), line in part.groupby(["backend", apart]):
            verified = labels.is_verified(line)
            look = style.line("", backend, is_verified=verified, variant=variant)
            look = style.unpaired(look) if is_apart else look | {"linestyle": "none"}
            y = np.array([names.index(name) for name in line["row"]]) + shift
            value, low, high = (line[c].to_numpy(dtype=float) for c in ("value", "low", "high"))
            name = f"{labels.text(variant)}, {labels.text(style.backend_label(backend))}"
            name += "" if verified else f" {checks.UNVERIFIED}"
            name += f": {statistics.UNPAIRED}" if is_apart else ""
            axes.plot(value, y, **look, label=name)
            drawing.draw_intervals(axes, y, value, low, high, look, is_across=True)
    literature.step_by_scan(axes, rows, names)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"{METRICS['step_time_ms'].label.split(' (')[0]} relative to {base}")
    axes.grid(visible=False, axis="y")
    labels.legend(figure, [axes])
    more = [f"{left_out} further rows are in the tables alone."] if left_out > 0 else []
    labels.note(figure, more, rows)
    return figure
