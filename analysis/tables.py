"""Tables: raw values for CSV beside the texts that people read; a missing value is "-" and why."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis import (
    checks,
    comparisons,
    derive,
    factorial,
    load,
    matching,
    settings,
    statistics,
    style,
    vocabulary,
)
from analysis.remember import remembered
from suites.harness.record import METRICS, PASSES

NONE = "-"
EQUAL_POSITIONS = (
    "Losses are those at positions from {:,} on, where none of these was trained: the mean over "
    "their buckets, which weigh alike."
)
MAX_ROWS = 200  # texts of a table: a page of 100,000 records must still open; its CSV has every row
RUNS = {"": ("run_ids",)}
BASELINES = ("unigram_bits_per_byte", "ngram_bits_per_byte")  # what a language model must beat
# the labels in METRICS say GiB, MiB
SCALES = {"peak_memory_bytes": 2.0**30, "cache_bytes": 2.0**20, "op_bytes": 2.0**20}
SCAN_CLAIM = (
    "For comparison, not measured here: in arXiv:2402.19427, figure 8(a), the Pallas kernel is 2.3 "
    "to 2.8 times faster than JAX's sequential scan, forward in bfloat16 on a TPU-v3."
)


@dataclass(frozen=True)
class Table:
    """`rows` are texts for people, one list a row under `header`, at most MAX_ROWS; `frame` holds
    the raw values of every row, in the same order."""

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    frame: pd.DataFrame
    note: str = ""
    # header -> the column of `frame` by which it is sorted, where its texts do not say it
    numbers: Mapping[str, str] = field(default_factory=dict)
    # header -> the columns of `frame` with the run_ids behind it; "" stands for all other headers
    runs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    csv: str = ""  # the file of raw values, where that is another table's, of which this is a part

    @property
    def file(self) -> str:
        """Of the raw values, within the report."""
        return f"tables/{self.csv or self.name}.csv"

    @property
    def num_left_out(self) -> int:
        return len(self.frame) - len(self.rows)


@remembered
def side_by_side(
    frame: pd.DataFrame,
    by: str = "backend",
    ours: str = "jax",
    baseline: str | None = None,
    *,
    metrics: tuple[str, ...] = (),
    is_brief: bool = False,
    suite: str | None = None,
    max_rows: int | None = MAX_ROWS,
) -> Table:
    """Both sides of every matched pair: values with intervals, speedup, verdict, parity, size.
    A brief table has the first metric of each suite alone, or the rows of one suite, which is then
    no column; max_rows=None writes the texts of all rows."""
    if baseline is None:
        others = (value for value in settings.values_of(frame, by) if value != ours)
        baseline = settings.baseline_of(by, others)
    found = _pairs(frame, by, ours, baseline, metrics)
    # beside what is compared: what each row is of
    shown = ["suite", *(name for name in ("family", "backend") if name != by)]
    rest = ("size", "dtype", "device_kind", "data", "variant")
    shown += [name for name in rest if name != by and found[name].nunique() > 1]
    hidden = {by, *settings.ALONG.get(by, ())}
    ours, baseline = (settings.label(by, value) for value in (ours, baseline))
    name = csv = re.sub(r"[^\w.=-]", "-", f"{by}_{ours}_{baseline}")
    title = f"{_name(by, ours)} beside {_name(by, baseline)}"
    if is_brief:
        suites = found["suite"].to_list()
        first = [vocabulary.HEADLINES.get(suite, (None,))[0] for suite in suites]
        found, name = found[found["metric"] == first], f"headline_{name}"
    if suite is not None:
        places = np.flatnonzero((found["suite"] == suite).to_numpy(dtype=bool))
        found = found[places.min(initial=len(found)) : places.max(initial=-1) + 1]  # no copy
        name, title = f"{name}_{suite}", f"{title}: {suite}"
        shown.remove("suite")
    header = [*shown, "workload", "metric", ours, baseline, f"{ours} / {baseline}", "rounds",
              "verdict", "parity", "num_params", "num_params_non_embedding"]  # fmt: skip
    rows = []
    for row in found[:max_rows].to_dict("records"):
        along = {"batch_size"} if settings.is_shrinking(by, row["suite"]) else set()
        work = {name: value for name, value in row.items() if name not in hidden | along}
        rows.append(
            [
                *(_text(row[name]) for name in shown),
                workload(work),
                _metric_name(row["metric"]),
                _side(row, "ours"),
                _side(row, "baseline"),
                _ratio(row),
                _rounds(row),
                verdict(row, ours),
                parity_mark(row, ours, baseline),
                _both(row, "num_params"),
                _both(row, "num_params_non_embedding"),
            ]
        )
    note = (
        f"The ratio is how many times faster {ours} is than {baseline} (above 1: {ours} is "
        "faster; above 1 is better for memory too), the geometric mean over paired rounds with "
        "its 95% interval; losses are compared by their difference. Values are medians over "
        "processes of medians over repeats. Equivalent: the interval is within what processes of "
        "one cell differ by on this machine, 0.5 to 2%. Not resolved: too small a difference of "
        "losses for so few seeds; the one named would be found four times in five."
    )
    note += _detectable(found)
    if by == "linear_scan":
        note += f" {SCAN_CLAIM}"
    note = note if suite is None else ""  # the brief table has said it
    both = ("run_ids_ours", "run_ids_baseline")
    return Table(
        name,
        title,
        header,
        rows,
        found,
        note,
        numbers={ours: "value_ours", baseline: "value_baseline", f"{ours} / {baseline}": "ratio"},
        runs={ours: both[:1], baseline: both[1:], "": both},
        csv=csv,
    )


def parity(frame: pd.DataFrame) -> Table:
    status = checks.parity(frame)
    status = status[status["engine_build"].isin(set(derive.runs(frame)["engine_build"]))]
    if len(status):  # head_dim and architecture settings, as far as several were checked
        variant = derive.outcomes(frame).set_index("cell_id")["variant"]
        status = status.assign(variant=status["cell_id"].map(variant))
    names = ["family", "backend", "dtype", "linear_scan", "attention", "layers", "program",
             "device_kind"]  # fmt: skip
    names += ["variant"] if len(status) and status["variant"].any() else []
    header = [*(name.replace("device_kind", "device") for name in names),
              "build", "parity", "checks", "worst error / tolerance", "at"]  # fmt: skip
    rows = []
    for row in status[:MAX_ROWS].to_dict("records"):
        share, worst = row["worst"], NONE
        if share is not None and not pd.isna(share):
            limit = _text(row["tolerance"], "{:.1e}")
            worst = f"{row['worst_error']:.1e} / {limit}"
        verdict = row["status"].upper() if row["status"] == checks.RED else row["status"]
        if row["outcome"] != "completed":
            verdict += f" ({row['outcome']}: {_text(row['reason'])})"
        elif row["status"] == checks.PARTIAL:
            verdict += f" ({row['levels']})"
        rows.append(
            [
                *(_text(row[name]) for name in names),
                _text(row["engine_build"])[:8],
                verdict,
                f"{row['num_checks']:,}",
                worst,
                _text(row["worst_field"]),
            ]
        )
    note = (
        "Green: every relative error (to the float64 reference and to the other backend) is "
        "within its tolerance, at size=tiny with the measured head_dim. It verifies speed numbers "
        "of the same family, architecture settings, head_dim, backend, dtype, kernels, device kind "
        "and build."
    )
    numbers = {"worst error / tolerance": "worst"}
    return Table("parity", "Parity", header, rows, status, note, numbers, {"": ("run_id",)})


def certificate(frame: pd.DataFrame) -> Table:
    matches = matching.certificate(frame)
    names = matching.FACTS
    header = ["suite", "size", "compared", "matched", *names]
    common = _common([match.facts["optimizer"] for match in matches])
    rows, raw = [], []
    for match in matches:
        verdict = {True: "matched", False: "DIFFERS: ", None: "not established: "}[match.is_matched]
        verdict += ", ".join(match.differs)
        facts = {name: match.facts.get(name, NONE) for name in names}
        line = [match.suite, match.size, match.scope, verdict]
        full = dict(zip(header, [*line, *facts.values()], strict=True))
        raw.append(full | {"run_ids": " ".join(match.run_ids)})
        own = [word for word in facts["optimizer"].split(", ") if word not in common]
        facts["optimizer"] = ", ".join(own) or "as above"
        for name in ("data_digest", "init_digest"):
            facts[name] = facts[name][:12]
        rows.append([*line, *facts.values()])
    is_good = [match.is_matched for match in matches]
    matched = "All" if all(is_good) else f"{is_good.count(True)} of"
    note = (
        "Runs of one seed and round are held against each other. Across backends everything must "
        "be equal, and both scan with a kernel written by hand or neither; across families, and "
        "values of a setting of the model, tokens, optimizer, data order and kernels."
    )
    if matches:
        note = f"{matched} {len(matches)} comparisons are matched. {note}"
    if common:
        note += f" Optimizer of all: {', '.join(common)}."
    return Table(
        "certificate",
        "Matching certificate",
        header,
        rows,
        pd.DataFrame(raw, columns=[*header, "run_ids"]),
        note,
        runs=RUNS,
    )


def _common(texts: list[str]) -> list[str]:
    """The `name=value` words that all of these have; "3 values" has none."""
    words = [text.split(", ") for text in texts if "=" in text]
    return [word for word in words[0] if all(word in other for other in words)] if words else []


def failures(frame: pd.DataFrame) -> Table:
    lost = derive.failures(frame)
    header = ["suite", "family", "size", "backend", "workload", "seed", "round", "outcome", "phase",
              "reason", "run_id"]  # fmt: skip
    rows = [
        [
            *(_text(row[name]) for name in ("suite", "family", "size", "backend")),
            workload(row),
            *(_text(row[name]) for name in header[5:]),
        ]
        for row in lost[:MAX_ROWS].to_dict("records")
    ]
    work = ["op", "task", "work_phase", "seq_len", "prompt_len", "num_new_tokens", "num_steps",
            "batch_size", "num_devices"]  # fmt: skip
    raw = lost[["attempt", *work, *(name for name in header if name != "workload")]]
    runs = {"": ("run_id",)}
    return Table("failures", "Runs that did not complete", header, rows, raw, runs=runs)


def frontier(frame: pd.DataFrame) -> Table:
    edge = derive.frontier(frame)
    header = ["suite", "family", "size", "backend", "dtype", "prompt_len", "frontier", "reached",
              "out of memory at", "why"]  # fmt: skip
    names = [*header[:8], "out_of_memory_at", "why"]
    ids = run_ids(frame)
    found = [" ".join(ids.reindex(cells).dropna()) for cells in edge["cell_ids"]]
    edge = edge.drop(columns="cell_ids").assign(run_ids=found)
    rows = [
        [_text(row[name], "{:,.0f}") for name in names]
        for row in edge[:MAX_ROWS].to_dict("records")
    ]
    return Table("frontier", "Frontier", header, rows, edge, runs=RUNS)


def machines(frame: pd.DataFrame) -> Table:
    """One row for each node, device, build and set of versions that counted runs came from."""
    names = ["node", "device_kind", "device_name", "cpu_model", "num_cores", "num_threads",
             "memory_bytes", "platform", "python", "versions", "git_commit",
             "engine_build"]  # fmt: skip
    rows = derive.runs(frame)
    key = ["backend", *names]
    found = rows.groupby(key, dropna=False, sort=False)["run_id"]
    counts = found.agg(num_runs="size", run_ids=" ".join).reset_index()
    texts = []
    for row in counts[:MAX_ROWS].to_dict("records"):
        memory = row["memory_bytes"]
        row["memory_bytes"] = NONE if pd.isna(memory) else f"{memory / 2**30:.1f} GiB"
        commit, plus, dirty = _text(row["git_commit"]).partition("+")
        row["git_commit"] = commit[:12] + plus + dirty
        texts.append([_text(row[name]) for name in [*key, "num_runs"]])
    header = [name.replace("memory_bytes", "memory") for name in [*key, "num_runs"]]
    return Table("machines", "Machines and versions", header, texts, counts, runs=RUNS)


def peaks(frame: pd.DataFrame) -> Table:
    found = derive.peaks(frame)
    header = ["device", "backend", "dtype", "peak", "according to", "median", "range", "runs"]
    rows = [
        [
            *(_text(row[name]) for name in ("device_name", "backend", "dtype")),
            _metric_name(row["metric"]),
            _text(row["field"]),
            f"{row['median']:.3g}",
            f"{row['min']:.3g} to {row['max']:.3g}",
            f"{row['size']:,}",
        ]
        for row in found[:MAX_ROWS].to_dict("records")
    ]
    note = "MFU and MBU are shares of the peak that the same run found or was told."
    numbers = {"median": "median", "range": "min"}
    return Table("peaks", "Peaks", header, rows, found, note, numbers, RUNS)


def bounds(frame: pd.DataFrame) -> Table:
    """What moving an op's bytes takes on devices that nobody has asked: by their data sheets."""
    rows = load.words(frame[frame["metric"].isin(["bound_ms", "op_bytes"])])
    rows = rows.assign(of=rows["field"].where(rows["metric"] == "bound_ms", "op_bytes"))
    key = ["suite", "family", "size", "model", "dtype", "op", "work_phase", "batch_size",
           "seq_len"]  # fmt: skip
    found = rows.groupby([*key, "of"], sort=False)["value"].first().unstack("of")
    ids = rows.groupby(key, sort=False)["run_id"].agg(lambda ids: " ".join(dict.fromkeys(ids)))
    found = found.assign(run_ids=ids).sort_index().reset_index()
    devices = sorted(set(found) - {*key, "op_bytes", "run_ids"})
    found["variant"] = derive.variants(found, "model")
    shown = [name for name in ("family", "variant") if found[name].nunique() > 1]
    header = [*shown, "size", "dtype", "workload", METRICS["op_bytes"].label,
              *(f"bound, {name} (ms)" for name in devices)]  # fmt: skip
    texts = [
        [
            *(_text(row[name]) for name in (*shown, "size", "dtype")),
            workload(row),
            number(row["op_bytes"], "op_bytes"),
            *(number(row[name]) for name in devices),
        ]
        for row in found[:MAX_ROWS].to_dict("records")
    ]
    note = (
        "Bounds, not measurements: the bytes that the op must move, each once, over the bandwidth "
        "of the device's data sheet. No kernel can be faster there; none has been timed there."
    )
    return Table("bounds", "Bounds by bytes", header, texts, found, note, runs=RUNS)


def ablations(frame: pd.DataFrame, baseline: Mapping[str, str] | None = None) -> list[Table]:
    """Of each suite of qualities where two or more settings vary, and each backend: what each does
    beside its level in `baseline`, and what two do together."""
    made = []
    for suite, metrics in vocabulary.HEADLINES.items():
        if metrics[0] not in vocabulary.QUALITIES:
            continue
        varying = factorial.factors(frame, suite)
        if len(varying) < 2 or "task" in varying:
            continue  # questions of several tasks are no repetitions of one
        unit = METRICS[metrics[0]].unit
        first = {n: level for n, level in (baseline or {}).items() if level in varying.get(n, ())}
        found = factorial.ablations(frame, suite, baseline=first)
        for backend, one in found.items():
            title = f"{suite}, {style.backend_label(backend)}: what each setting does"
            base = ", ".join(f"{name}={level}" for name, level in one.baseline.items())
            note = (
                f"Differences of {_metric_name(metrics[0])} beside {base}, averaged over the other "
                f"settings, with 95% intervals; of two settings (x), beyond the sum of both. "
                f"Seeds are blocks ({one.num_seeds}); p is adjusted for all rows (Holm)."
            )
            if one.start is not None:
                note += f" {EQUAL_POSITIONS.format(one.start)}"
            note += _detectable(one.effects.assign(metric=metrics[0]))
            if one.num_missing:
                note += (
                    f" {one.num_missing} of {one.num_cells + one.num_missing} cells are missing."
                )
            header = ["effect", "levels", "difference", "p (Holm)", "verdict"]
            rows = [
                [row["effect"], _text(row["levels"]), _difference(row, unit),
                 _text(row["p_holm"], "{:.2g}"), _effect_verdict(row, unit)]
                for row in one.effects.to_dict("records")
            ]  # fmt: skip
            name, raw = f"{suite}_{backend}", one.effects.assign(run_ids=one.run_ids)
            made.append(Table(f"ablation_{name}", title, header, rows, raw, note,
                              numbers={"difference": "difference", "p (Holm)": "p_holm"},
                              runs=RUNS))  # fmt: skip
            header = ["effect", "degrees of freedom", "sum of squares", "F", "p"]
            rows = [
                [row["effect"], f"{row['freedom']}",
                 *(_text(row[name], "{:.3g}") for name in ("sum_of_squares", "F", "p"))]
                for row in one.variance.to_dict("records")
            ]  # fmt: skip
            title = f"{suite}, {style.backend_label(backend)}: analysis of variance"
            raw = one.variance.assign(run_ids=one.run_ids)
            made.append(Table(f"variance_{name}", title, header, rows, raw, runs=RUNS))
    return made


def _detectable(found: pd.DataFrame) -> str:
    """Of the first quality in a table the least difference that so few seeds find."""
    rows = found[found["metric"].isin(vocabulary.QUALITIES) & found["detectable"].notna()]
    if rows.empty:
        return ""
    metric = rows["metric"].iloc[0]
    ends = rows.loc[rows["metric"] == metric, "detectable"]
    low, high = (f"{value:.2g}" for value in (ends.min(), ends.max()))
    span = low if low == high else f"{low} to {high}"
    return (
        f" Minimum detectable effect, found four times in five: {span} {METRICS[metric].unit} of "
        f"{_metric_name(metric)}."
    )


def _effect_verdict(row: dict[str, Any], unit: str) -> str:
    if row["verdict"] == factorial.NOT_RESOLVED and not pd.isna(row["detectable"]):
        return f"{row['verdict']} ({row['detectable']:.2g} {unit} would be)"
    return _because(row)


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
    if at is not None and not pd.isna(at) and row.get("suite") == "decode_throughput":
        words[-1] = f"batch {int(at):,}"
    return ", ".join(words)


def verdict(row: dict[str, Any], ours: str) -> str:
    """ "jax faster", "inconclusive (3 of 6 rounds: too few for a verdict)", "unpaired (...)"."""
    if row["verdict"] is None or pd.isna(row["verdict"]):
        return NONE
    if row["metric"] in vocabulary.QUALITIES:
        return _quality_verdict(row, ours)
    if row["speedup"] is None or pd.isna(row["speedup"]):
        return NONE if row["verdict"] != statistics.UNPAIRED else _because(row)
    if row["verdict"] in ("faster", "slower"):
        return f"{ours} {row['verdict']}"
    return _because(row)


def _quality_verdict(row: dict[str, Any], ours: str) -> str:
    """ "jax better", "not resolved (0.0031 bit/B would be)": what is found 4 times in 5."""
    if row["verdict"] != "not resolved":
        return f"{ours} {row['verdict']}"
    if pd.isna(row["detectable"]) or row["num_paired_seeds"] < statistics.MIN_SEEDS:
        return _because(row)
    if row["detectable"] == 0:  # so is the difference: one model under two names
        return "not resolved (equal in every seed)"
    return f"not resolved ({row['detectable']:.2g} {row['unit']} would be)"


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


def _because(row: dict[str, Any]) -> str:
    reason = row["reason"]
    return f"{row['verdict']} ({reason})" if isinstance(reason, str) else row["verdict"]


def _side(row: dict[str, Any], side: str) -> str:
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


def _ratio(row: dict[str, Any]) -> str:
    if row["metric"] in vocabulary.QUALITIES:
        return _difference(row | {"low": row["difference_low"], "high": row["difference_high"]},
                           row["unit"])  # fmt: skip
    if row["speedup"] is None or pd.isna(row["speedup"]):
        return NONE
    text = f"{_times(row['speedup'])}x"
    low = row["speedup_low"]
    if low is not None and not pd.isna(low) and row["speedup_high"] > low:
        text += f" [{_times(low)}, {_times(row['speedup_high'])}]"
    return text


def _difference(row: dict[str, Any], unit: str) -> str:
    if row["difference"] is None or pd.isna(row["difference"]):
        return NONE
    interval = "" if pd.isna(row["low"]) else f" [{row['low']:+.4f}, {row['high']:+.4f}]"
    return f"{row['difference']:+.4f}{interval} {'' if unit == '1' else unit}".rstrip()


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if 0.1 <= ratio < 1000 else f"{ratio:.2g}"


def _rounds(row: dict[str, Any]) -> str:
    """Paired rounds of a time; seeds of a quality."""
    if row["suite"] == "language_modeling":
        counts = [row[f"num_seeds_{side}"] for side in ("ours", "baseline")]
        known = [int(count) for count in counts if count is not None and not pd.isna(count)]
        return f"{min(known)} seed{'s' if min(known) > 1 else ''}" if known else NONE
    paired = row["num_paired_rounds"]
    return f"{int(paired)}" if paired else NONE


def _both(row: dict[str, Any], name: str) -> str:
    """One count, or both where the sides differ."""
    texts = [_text(row[f"{name}_{side}"], "{:,.0f}") for side in ("ours", "baseline")]
    known = [text for text in texts if text != NONE]
    return " / ".join(dict.fromkeys(known)) if known else NONE


@remembered
def _pairs(
    frame: pd.DataFrame, by: str, ours: str, baseline: str, metrics: tuple[str, ...]
) -> pd.DataFrame:
    """The matched pairs in the order of reading, with the run_ids of both sides, and `ratio`: the
    difference of a quality, the speedup of all else."""
    found = comparisons.to_be_read(frame, by, ours, baseline, metrics)
    ids, sides = _run_ids(frame), {}
    for side in ("ours", "baseline"):
        texts = [ids.get(cell, "") for cell in found[f"cell_id_{side}"].to_list()]
        # objects: a text of all rounds is held once, and not in every row that has it
        sides[f"run_ids_{side}"] = pd.Series(texts, dtype=object)
    is_quality = found["metric"].isin(vocabulary.QUALITIES)
    return found.assign(**sides, ratio=found["difference"].where(is_quality, found["speedup"]))


@remembered
def run_ids(frame: pd.DataFrame) -> pd.Series:
    """The counted runs of each cell_id, by seed and round: their ids, a space between."""
    rows = derive.runs(frame).sort_values(["seed", "round"], kind="stable")
    return rows.groupby("cell_id", sort=False)["run_id"].agg(" ".join)


@remembered
def _run_ids(frame: pd.DataFrame) -> dict[str, str]:
    return run_ids(frame).to_dict()


def _metric_name(metric: str) -> str:
    return METRICS[metric].label if metric in METRICS else metric


def _name(by: str, value: str) -> str:
    labels = {"backend": style.backend_label, "family": style.family_label}
    return labels[by](value) if by in labels else value


def _text(value: Any, form: str = "{}") -> str:
    if value is None or pd.isna(value):
        return NONE
    return value if isinstance(value, str) else form.format(value)
