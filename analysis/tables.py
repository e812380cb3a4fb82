"""Tables: raw values for CSV beside the texts that people read; a missing value is "-" and why."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

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
    style,
    vocabulary,
    wording,
)
from analysis.remember import remembered
from suites.harness.record import METRICS

EQUAL_POSITIONS = (
    "Losses are those at positions from {:,} on, where none of these was trained: the mean over "
    "their buckets, which weigh alike."
)
MAX_ROWS = 200  # texts of a table: a page of 100,000 records must still open; its CSV has every row
RUNS = {"": ("run_ids",)}
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
                *(wording.text(row[name]) for name in shown),
                wording.workload(work),
                *wording.compared(row, ours, baseline),
            ]
        )
    # the brief table has said it before that of a suite
    note = "" if suite else _how_to_read(found, by, ours, baseline)
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


def _how_to_read(found: pd.DataFrame, by: str, ours: str, baseline: str) -> str:
    note = (
        f"The ratio is how many times faster {ours} is than {baseline} (above 1: {ours} is "
        "faster; above 1 is better for memory too), the geometric mean over paired rounds with "
        "its 95% interval; losses are compared by their difference. Values are medians over "
        "processes of medians over repeats. Equivalent: the interval is within what processes of "
        "one cell differ by on this machine, 0.5 to 2%. Not resolved: too small a difference of "
        "losses for so few seeds; the one named would be found four times in five."
    )
    return note + _detectable(found) + (f" {SCAN_CLAIM}" if by == "linear_scan" else "")


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
        share, worst = row["worst"], wording.NONE
        if share is not None and not pd.isna(share):
            limit = wording.text(row["tolerance"], "{:.1e}")
            worst = f"{row['worst_error']:.1e} / {limit}"
        verdict = row["status"].upper() if row["status"] == checks.RED else row["status"]
        if row["outcome"] != "completed":
            verdict += f" ({row['outcome']}: {wording.text(row['reason'])})"
        elif row["status"] == checks.PARTIAL:
            verdict += f" ({row['levels']})"
        rows.append(
            [
                *(wording.text(row[name]) for name in names),
                wording.text(row["engine_build"])[:8],
                verdict,
                f"{row['num_checks']:,}",
                worst,
                wording.text(row["worst_field"]),
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
        facts = {name: match.facts.get(name, wording.NONE) for name in names}
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
            *(wording.text(row[name]) for name in ("suite", "family", "size", "backend")),
            wording.workload(row),
            *(wording.text(row[name]) for name in header[5:]),
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
        [wording.text(row[name], "{:,.0f}") for name in names]
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
        row["memory_bytes"] = wording.NONE if pd.isna(memory) else f"{memory / 2**30:.1f} GiB"
        commit, plus, dirty = wording.text(row["git_commit"]).partition("+")
        row["git_commit"] = commit[:12] + plus + dirty
        texts.append([wording.text(row[name]) for name in [*key, "num_runs"]])
    header = [name.replace("memory_bytes", "memory") for name in [*key, "num_runs"]]
    return Table("machines", "Machines and versions", header, texts, counts, runs=RUNS)


def peaks(frame: pd.DataFrame) -> Table:
    found = derive.peaks(frame)
    header = ["device", "backend", "dtype", "peak", "according to", "median", "range", "runs"]
    rows = [
        [
            *(wording.text(row[name]) for name in ("device_name", "backend", "dtype")),
            wording.metric_name(row["metric"]),
            wording.text(row["field"]),
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
            *(wording.text(row[name]) for name in (*shown, "size", "dtype")),
            wording.workload(row),
            wording.number(row["op_bytes"], "op_bytes"),
            *(wording.number(row[name]) for name in devices),
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
                f"Differences of {wording.metric_name(metrics[0])} beside {base}, averaged over "
                "the other settings, with 95% intervals; of two settings (x), beyond the sum of "
                f"both. Seeds are blocks ({one.num_seeds}); p is adjusted for all rows (Holm)."
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
                [row["effect"], wording.text(row["levels"]), wording.difference(row, unit),
                 wording.text(row["p_holm"], "{:.2g}"), wording.effect_verdict(row, unit)]
                for row in one.effects.to_dict("records")
            ]  # fmt: skip
            name, raw = f"{suite}_{backend}", one.effects.assign(run_ids=one.run_ids)
            made.append(Table(f"ablation_{name}", title, header, rows, raw, note,
                              numbers={"difference": "difference", "p (Holm)": "p_holm"},
                              runs=RUNS))  # fmt: skip
            header = ["effect", "degrees of freedom", "sum of squares", "F", "p"]
            rows = [
                [row["effect"], f"{row['freedom']}",
                 *(wording.text(row[name], "{:.3g}") for name in ("sum_of_squares", "F", "p"))]
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
    span = wording.in_unit(low if low == high else f"{low} to {high}", METRICS[metric].unit)
    return (
        f" Minimum detectable effect, found four times in five: {span} of "
        f"{wording.metric_name(metric)}."
    )


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


def _name(by: str, value: str) -> str:
    labels = {"backend": style.backend_label, "family": style.family_label}
    return labels[by](value) if by in labels else value
