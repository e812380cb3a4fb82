"""Prefill and decoding: time to the first token and after it, and how many readers fit."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import checks, derive, load, settings, statistics, style, vocabulary
from analysis.figures import drawing, labels, literature
from suites.harness.record import METRICS

PROMPT_LEN = "Prompt length (tokens)"
NUM_NEW_TOKENS = "Tokens decoded"
MAX_COLUMNS = 2


def prefill_latency(frame: pd.DataFrame) -> Figure | None:
    """Time to first token, by prompt_len."""
    return drawing.metric_lines(frame, "prefill_latency", "ttft_ms", "prompt_len", PROMPT_LEN)


def decode_latency(frame: pd.DataFrame) -> Figure | None:
    """Time per output token, by prompt_len."""
    return drawing.metric_lines(frame, "decode_latency", "tpot_ms", "prompt_len", PROMPT_LEN,
                                panel=[*drawing.PANEL, "num_new_tokens", "batch_size"])  # fmt: skip


def decode_throughput(frame: pd.DataFrame) -> Figure | None:
    """Decoded tokens per second, by batch size."""
    rows = drawing.summary(frame, "decode_throughput", "tokens_per_s", at=True)
    label = METRICS["tokens_per_s"].label
    return drawing.lines(rows, "at", "Batch size (sequences)", label, decorate=_log_rate,
                         panel=[*drawing.PANEL, "prompt_len", "num_new_tokens"])  # fmt: skip


def latency_by_tokens(frame: pd.DataFrame) -> Figure | None:
    """Seconds for so many tokens after a prompt, and below as multiples of MQA's time. The prefill,
    which ends with the first new token, is not in it."""
    rows = drawing.summary(frame, "decode_latency", "decode_time_s")
    if rows["num_new_tokens"].nunique() < 2:
        return None
    ratios = drawing.over_mqa(frame, rows, "decode_time_s")
    notes = ["The time to the first token (TTFT) is not included."]
    return _by_tokens(rows, ratios, METRICS["decode_time_s"].label, "Time relative to MQA", notes,
                      asked=drawing.asked_of(frame, "decode_latency"),
                      ghosts=literature.latency)  # fmt: skip


def throughput_by_tokens(frame: pd.DataFrame) -> Figure | None:
    """Decoded tokens per second with the batch that is fastest, by tokens decoded, and below as
    multiples of MQA's."""
    rows = _best(drawing.summary(frame, "decode_throughput", "tokens_per_s", at=True))
    if rows["num_new_tokens"].nunique() < 2:
        return None
    notes = [_batches(rows)]
    ends = drawing.summary(frame, "decode_throughput", "max_batch_size")
    largest = ends.set_index("cell_id")[["value", "field"]].to_dict("index")
    bounded = [row for row in rows.to_dict("records") if (end := largest.get(row["cell_id"]))
               and end["field"] == "bound" and end["value"] == row["at"]]  # fmt: skip
    if bounded:
        notes.append(
            f"{len(bounded)} of {len(rows)} searches were still gaining at suite.max_batch_size, "
            "not at the end of memory: their most may be more."
        )
    return _by_tokens(rows, _best_over_mqa(frame, rows), "Most tokens/s over batch sizes",
                      "Tokens/s relative to MQA", notes,
                      asked=drawing.asked_of(frame, "decode_throughput"),
                      ghosts=literature.throughput)  # fmt: skip


def _by_tokens(
    rows: pd.DataFrame,
    ratios: pd.DataFrame,
    label: str,
    ratio_label: str,
    notes: Iterable[str],
    *,
    asked: pd.DataFrame,
    ghosts: Callable[[Axes, pd.DataFrame], None],
) -> Figure | None:
    """A column for each prompt_len (and size, dtype, device): values above, multiples of MQA's
    below where there is an MQA."""
    keys = [*drawing.PANEL, "prompt_len"]
    if rows["suite"].iloc[0] == "decode_latency":
        keys.append("batch_size")
    columns, notes = drawing.panels_of(rows, keys, notes, MAX_COLUMNS)
    num_rows = 2 if len(ratios) else 1
    figure = Figure(figsize=(drawing.WIDTH, 1.6 + 2.5 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, len(columns), sharex="col", sharey="row", squeeze=False)
    for (key, part), column in zip(columns, grid.T, strict=True):
        mine = drawing.of_panel(asked, keys, key)
        places = pd.concat([part["num_new_tokens"], mine["num_new_tokens"]])
        drawing.draw_lines(column[0], part, "num_new_tokens", places=places)
        drawing.mark_lost(column[0], mine, "num_new_tokens")
        labels.log_lengths(column[0], places.to_numpy(dtype=float))
        over = drawing.of_panel(ratios, keys, key)
        if num_rows == 2:
            column[1].axhline(1, color=style.family_color("mqa"), linewidth=1.2)
            drawing.draw_lines(column[1], over, "num_new_tokens", places=places)
            ghosts(column[1], over)
        column[-1].set_xlabel(NUM_NEW_TOKENS)
        words = [f"{PROMPT_LEN.split(' (')[0]} {key[4]:,.0f}"]
        words += [f"batch {key[5]:,.0f}"] if "batch_size" in keys else []
        words += [labels.text(value) for name, value in zip(keys, key, strict=True)
                  if name in drawing.PANEL and rows[name].nunique() > 1]  # fmt: skip
        column[0].set_title(", ".join(words))
    labels.log_values(grid[0, 0].yaxis)
    grid[0, 0].set_ylabel(label)
    if num_rows == 2:
        notes += drawing.keep_in_sight(grid[1, 0], ratios, reference=1.0)
        notes += labels.count_unpaired(ratios)
        grid[1, 0].set_ylabel(ratio_label)
    labels.legend(figure, grid.flat)
    labels.note(figure, notes, rows)
    return figure


def _log_rate(axes: Axes, part: pd.DataFrame) -> None:
    labels.log_values(axes.yaxis)


def _best(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each cell the batch size with the most tokens per second."""
    ordered = rows.sort_values("value", kind="stable", ascending=False)
    return ordered.drop_duplicates("cell_id").sort_index()


def _batches(rows: pd.DataFrame) -> str:
    """Which batch was the fastest, by family and backend."""
    words = []
    order = [vocabulary.family_order(name) for name in rows["family"]]
    ordered = rows.assign(order=order).sort_values(["order", "backend"], kind="stable")
    for (family, backend), part in ordered.groupby(["family", "backend"], sort=False):
        sizes = sorted({int(at) for at in part["at"]})
        span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        words.append(f"{labels.name_of(family, backend)} {span}")
    return f"Batch sizes: {'; '.join(words)}."


def _best_over_mqa(frame: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Throughput at each family's own best batch over that of MQA at its own, paired by round
    where both were measured in one block, on one node and device; with the verdict."""
    processes = derive.processes(frame)
    processes = load.words(processes[processes["metric"] == "tokens_per_s"])
    shared = ["seed", "round", "block", "node", "device_name"]
    group = settings.shared(settings.asked(frame), "family")  # of one backend and all else
    of_mqa = {}
    for row in rows[rows["family"] == "mqa"].to_dict("records"):
        of_mqa.setdefault(group[row["cell_id"]], row)
    made = []
    for row in rows[rows["family"] != "mqa"].to_dict("records"):
        other = of_mqa.get(group[row["cell_id"]])
        if other is None:
            continue
        ours, theirs = (
            processes[(processes["cell_id"] == one["cell_id"]) & (processes["at"] == one["at"])]
            for one in (row, other)
        )
        both = ours.dropna(subset=["block", "node", "device_name"]).merge(
            theirs, on=shared, suffixes=("", "_mqa")
        )
        if len(both):
            found = statistics.compare(both["value"], both["value_mqa"], better="higher")
        else:
            found = statistics.unpaired(
                row["value"], other["value"], better="higher", reason="not of one block"
            )
        low, high = found.interval or (np.nan, np.nan)
        is_green = row["parity"] == other["parity"] == checks.GREEN
        made.append(
            row
            | {"value": found.speedup, "low": low, "high": high, "verdict": found.verdict}
            | {"parity": checks.GREEN if is_green else checks.MISSING}
        )
    return pd.DataFrame(made, columns=[*rows.columns, "verdict"])
