"""What a cell of a table says: numbers in their unit, workloads, ratios, verdicts."""

from typing import Any

import pandas as pd

from analysis import checks, factorial, statistics, vocabulary
from suites.harness.record import METRICS, PASSES

NONE = "-"
BASELINES = ("unigram_bits_per_byte", "ngram_bits_per_byte")  # what a language model must beat
# the labels in METRICS say GiB, MiB
SCALES = {"peak_memory_bytes": 2.0**30, "cache_bytes": 2.0**20, "op_bytes": 2.0**20}


def number(value: Any, metric: str | None = None) -> str:
    """Three or four digits that matter, in the unit that the metric is read in."""
    if value is None or pd.isna(value):
        return NONE
    value = value / SCALES.get(metric, 1.0)
    if metric == "max_batch_size":
        return f"{value:,.0f}"
    size = abs(value)
    if metric in (*vocabulary.QUALITIES, *BASELINES) and size < 1000:
        return f"{value:.3f}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size < 100 else f"{value:.1f}"


def workload(row: dict[str, Any]) -> str:
    """`seq_len 512, batch 8`: the counts that this workload uses, after the op where it is one."""
    names = {"seq_len": "seq_len", "prompt_len": "prompt_len", "num_new_tokens": "new tokens",
             "num_steps": "steps", "batch_size": "batch", "num_devices": "devices"}  # fmt: skip
    words = [f"{label} {int(row[name]):,}" for name, label in names.items()
             if row.get(name) is not None and not pd.isna(row[name])]  # fmt: skip
    if row.get("task") is not None and not pd.isna(row["task"]):
        words = [row["task"], *words]
    if row.get("op") is not None and not pd.isna(row["op"]):
        words = [row["op"], PASSES[row["work_phase"]], *words]
    at = row.get("at")
    if at is not None and not pd.isna(at):
        if row.get("suite") == "decode_throughput":
            words[-1] = f"batch {int(at):,}"
        elif str(row.get("metric")).endswith("_by_length"):
            words.append(f"asked at {int(at):,}")
    return ", ".join(words)


def effect_verdict(row: dict[str, Any], unit: str) -> str:
    if row["verdict"] == factorial.NOT_RESOLVED and not pd.isna(row["detectable"]):
        least = in_unit(f"{row['detectable']:.2g}", unit)
        return f"{row['verdict']} ({least} would be)"
    return because(row)


def compared(row: dict[str, Any], ours: str, baseline: str) -> list[str]:
    """The cells of a comparison, from its metric on."""
    return [
        metric_name(row["metric"]),
        side(row, "ours"),
        side(row, "baseline"),
        ratio(row),
        rounds(row),
        verdict(row, ours),
        parity_mark(row, ours, baseline),
        both(row, "num_params"),
        both(row, "num_params_non_embedding"),
    ]


def verdict(row: dict[str, Any], ours: str) -> str:
    """ "jax faster", "inconclusive (3 of 6 rounds: too few for a verdict)", "unpaired (...)"."""
    if row["verdict"] is None or pd.isna(row["verdict"]):
        return NONE
    if row["metric"] in vocabulary.QUALITIES:
        return _quality_verdict(row, ours)
    if row["speedup"] is None or pd.isna(row["speedup"]):
        return NONE if row["verdict"] != statistics.UNPAIRED else because(row)
    if row["verdict"] in ("faster", "slower"):
        return f"{ours} {row['verdict']}"
    return because(row)


def _quality_verdict(row: dict[str, Any], ours: str) -> str:
    """ "jax better", "not resolved (0.0031 bit/B would be)": what is found 4 times in 5."""
    if row["verdict"] in ("better", "worse"):
        return f"{ours} {row['verdict']}"
    if row["verdict"] == statistics.UNPAIRED:
        return because(row)
    if pd.isna(row["detectable"]) or row["num_paired_seeds"] < statistics.MIN_SEEDS:
        return because(row)
    if row["detectable"] == 0:  # so is the difference: one model under two names
        return "not resolved (equal in every seed)"
    least = in_unit(f"{row['detectable']:.2g}", row["unit"])
    return f"not resolved ({least} would be)"


def parity_mark(row: dict[str, Any], ours: str, baseline: str) -> str:
    """`green`, or which side is UNVERIFIED; a side without a value needs no mark."""
    marks = {}
    for side, name in (("ours", ours), ("baseline", baseline)):
        if row[f"value_{side}"] is not None and not pd.isna(row[f"value_{side}"]):
            state = row[f"parity_{side}"]
            red = " (parity RED)" if state == checks.RED else ""
            marks[name] = "green" if state == checks.GREEN else checks.UNVERIFIED + red
    if not marks:
        return NONE
    if len(set(marks.values())) == 1:
        return next(iter(marks.values()))
    return ", ".join(f"{name} {mark}" for name, mark in marks.items())


def because(row: dict[str, Any]) -> str:
    reason = row["reason"]
    return f"{row['verdict']} ({reason})" if isinstance(reason, str) else row["verdict"]


def side(row: dict[str, Any], side: str) -> str:
    """The value with its interval, or "-" with how the runs ended."""
    value, metric = row[f"value_{side}"], row["metric"]
    status = row[f"status_{side}"]
    has_status = isinstance(status, str)
    if value is None or pd.isna(value):
        ended = has_status and "completed" not in status
        return f"{NONE} ({status})" if ended else NONE
    text = number(value, metric)
    low, high = row[f"low_{side}"], row[f"high_{side}"]
    if low is not None and not pd.isna(low) and high > low:
        text += f" [{number(low, metric)}, {number(high, metric)}]"
    if has_status and status != "completed":
        text += f" ({status})"
    current = row[f"is_current_{side}"]
    if current is not None and not pd.isna(current) and not current:
        text += " (stale)"
    odd = row[f"num_outliers_{side}"]
    if odd is not None and not pd.isna(odd) and odd > 0:
        text += f" ({int(odd)} outlying repeat{'s' if odd > 1 else ''})"
    if isinstance(flags := row[f"flags_{side}"], str) and flags:
        text += f" ({flags})"
    return text


def ratio(row: dict[str, Any]) -> str:
    if row["metric"] in vocabulary.QUALITIES:
        return difference(row | {"low": row["difference_low"], "high": row["difference_high"]},
                           row["unit"])  # fmt: skip
    if row["speedup"] is None or pd.isna(row["speedup"]):
        return NONE
    text = f"{times(row['speedup'])}x"
    low = row["speedup_low"]
    if low is not None and not pd.isna(low) and row["speedup_high"] > low:
        text += f" [{times(low)}, {times(row['speedup_high'])}]"
    return text


def difference(row: dict[str, Any], unit: str) -> str:
    if row["difference"] is None or pd.isna(row["difference"]):
        return NONE
    interval = "" if pd.isna(row["low"]) else f" [{row['low']:+.4f}, {row['high']:+.4f}]"
    return in_unit(f"{row['difference']:+.4f}{interval}", unit)


def in_unit(text: str, unit: str) -> str:
    """A share or a count has no unit to be read."""
    return text if unit == "1" else f"{text} {unit}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}" if 0.1 <= ratio < 1000 else f"{ratio:.2g}"


def rounds(row: dict[str, Any]) -> str:
    """Paired rounds of a time; seeds of a quality."""
    if row["suite"] == "language_modeling":
        counts = [row[f"num_seeds_{side}"] for side in ("ours", "baseline")]
        known = [int(count) for count in counts if count is not None and not pd.isna(count)]
        return f"{min(known)} seed{'s' if min(known) > 1 else ''}" if known else NONE
    paired = row["num_paired_rounds"]
    return f"{int(paired)}" if paired else NONE


def both(row: dict[str, Any], name: str) -> str:
    """One count, or both where the sides differ."""
    texts = [text(row[f"{name}_{side}"], "{:,.0f}") for side in ("ours", "baseline")]
    known = [text for text in texts if text != NONE]
    return " / ".join(dict.fromkeys(known)) if known else NONE


def metric_name(metric: str) -> str:
    return METRICS[metric].label if metric in METRICS else metric


def text(value: Any, form: str = "{}") -> str:
    if value is None or pd.isna(value):
        return NONE
    return value if isinstance(value, str) else form.format(value)
