"""What the samples say together: processes, cells, comparisons and parity."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd

from analysis import statistics
from analysis.load import SAMPLE_COLUMNS
from suites.harness.record import METRICS

# The metrics that tables show, by suite, the first being the suite's own question.
HEADLINES = {
    "training_speed": ("step_time_ms", "tokens_per_s", "mfu", "peak_memory_bytes",
                       "compile_time_s"),
    "prefill_latency": ("ttft_ms", "mfu", "peak_memory_bytes", "compile_time_s"),
    "decode_latency": ("tpot_ms", "decode_time_s", "mbu", "cache_bytes"),
    "decode_throughput": ("tokens_per_s", "max_batch_size"),
    "kernel_speed": ("op_time_ms", "mbu", "peak_memory_bytes"),
    "language_modeling": ("bits_per_byte", "loss", "unigram_bits_per_byte"),
}  # fmt: skip
SPEEDS = ("step_time_ms", "tokens_per_s", "ttft_ms", "tpot_ms", "decode_time_s", "op_time_ms",
          "mfu", "mbu", "init_time_s", "compile_time_s", "first_step_time_ms")  # fmt: skip
TIMES = ("step_time_ms", "tokens_per_s", "ttft_ms", "tpot_ms", "decode_time_s",
         "op_time_ms")  # fmt: skip
QUALITIES = ("bits_per_byte", "loss", "train_loss")  # compared by difference, not by ratio
CURVES = ("train_loss", "loss_by_position")  # one value for each `at`
BASELINE = {"backend": "torch", "family": "mqa", "linear_scan": "sequential"}
MATCHES = {"backend": "across_backends", "family": "across_families",
           "linear_scan": "across_scans"}  # fmt: skip
KERNELS = ("linear_scan", "attention", "layers")  # settings that name a variant
OUR_KERNELS = ("triton", "pallas")  # the variants that are hand-written begin with it
FAMILIES = ("mqa", "mqa_local", "hawk", "griffin")
PARITY_KEY = ["family", "architecture", "backend", "dtype", "linear_scan", "attention",
              "layers", "program", "device_kind", "engine_build"]  # fmt: skip
GREEN, RED, MISSING = "green", "red", "none"
PARTIAL = "partial"  # green, but of some levels alone: verifies nothing
WRONG = ("invalid_measurement", "failed", "diverged")
PARITY_ORDER = (GREEN, MISSING, RED)
UNVERIFIED = "UNVERIFIED"
PARITY_SIZE = "tiny"


_memory: dict[tuple, tuple[pd.DataFrame, Any]] | None = None


@contextmanager
def remembering() -> Iterator[None]:
    """Within the block, what is derived from one frame is derived once. Frames and results must
    not be changed in place there."""
    global _memory
    before, _memory = _memory, {} if _memory is None else _memory
    try:
        yield
    finally:
        _memory = before


def _remembered(function: Callable) -> Callable:
    @wraps(function)
    def recall(frame: pd.DataFrame, *args: Any) -> Any:
        if _memory is None:
            return function(frame, *args)
        key = (function.__name__, id(frame), args)
        if key not in _memory:
            _memory[key] = (frame, function(frame, *args))  # the frame kept: its id stays its own
        return _memory[key][1]

    return recall


@_remembered
def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a run: the attempt that counts, without its samples."""
    counted = frame[frame["is_counted"].fillna(False).astype(bool)]
    runs = counted.drop_duplicates("attempt").drop(columns=list(SAMPLE_COLUMNS))
    return runs.reset_index(drop=True)


@_remembered
def processes(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each (run, metric, at): the median over repeats, with how many were odd."""
    rows = frame[
        frame["is_counted"].fillna(False).astype(bool)
        & (frame["outcome"] == "completed")
        & (frame["suite"] != "parity")
        & frame["value"].notna()
    ]
    rows = rows.assign(at=rows["at"].astype("float64"))
    key = ["run_id", "metric", "at"]
    grouped = rows.groupby(key, dropna=False, sort=False)["value"]
    median = grouped.transform("median")
    distance = (rows["value"] - median).abs()
    rows = rows.assign(median=median, distance=distance)
    grouped = rows.groupby(key, dropna=False, sort=False)
    count = grouped["value"].transform("size")
    spread = grouped["distance"].transform("median")
    odd = statistics.is_far(distance, median, spread, count)
    rows = rows.assign(num_repeats=count, odd=odd)
    rows["num_outliers"] = rows.groupby(key, dropna=False, sort=False)["odd"].transform("sum")
    rows = rows.drop_duplicates(key)
    rows["value"] = rows["median"]
    marked = mark_parity(runs(frame), parity(frame)).set_index("run_id")["parity"]
    rows["parity"] = rows["run_id"].map(marked)
    return rows.drop(columns=["median", "distance", "odd", "repeat"]).reset_index(drop=True)


@_remembered
def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each (cell, metric, at): the median over its processes, with its interval."""
    rows = processes(frame)
    settings = ["suite", "family", "size", "backend", "dtype", "device_kind", "device_name",
                "linear_scan", "op", "work_phase", "seq_len", "batch_size", "prompt_len",
                "num_new_tokens", "num_steps", "num_devices", "data", "model", "unit", "field",
                "across_backends", "across_families", "num_params",
                "num_params_non_embedding"]  # fmt: skip
    key = ["cell_id", "metric", "at"]
    least = rows.groupby(key, dropna=False, sort=False)["value"].transform("min")
    rows = rows.assign(scaled=np.log(rows["value"].where(least > 0)).fillna(rows["value"]))
    groups = rows.groupby(key, dropna=False, sort=False)
    made = groups[settings].first()
    made["value"] = groups["value"].median()
    made["num_processes"] = groups["value"].size()
    for name, column in (
        ("num_rounds", "round"),
        ("num_seeds", "seed"),
        ("num_builds", "engine_build"),
    ):
        made[name] = groups[column].nunique()
    made["num_outliers"] = groups["num_outliers"].sum()
    # Of several processes the least verified one speaks for the cell, and one stale is stale.
    made["parity"] = groups["parity"].agg(lambda marks: max(marks, key=PARITY_ORDER.index))
    made["is_current"] = groups["is_current"].min()
    # statistics.median_interval of fewer than 20 processes, of all groups at once
    n, is_log = made["num_processes"].to_numpy(dtype=int), (groups["value"].min() > 0).to_numpy()
    mean, deviation = groups["scaled"].mean().to_numpy(), groups["scaled"].std(ddof=1).to_numpy()
    half = statistics.student_half_width(np.maximum(n, 2), deviation)
    for name, end in (("low", mean - half), ("high", mean + half)):
        made[name] = np.where(
            n > 1, np.where(is_log, np.exp(np.where(is_log, end, 0)), end), np.nan
        )
    made = made.reset_index()
    is_many = (n >= statistics.BOOTSTRAP_ROUNDS) & ~made["metric"].isin(CURVES).to_numpy()
    numbers, values = groups.ngroup().to_numpy(), rows["value"].to_numpy()
    for place in np.flatnonzero(is_many):
        bounds = statistics.median_interval(values[numbers == place])
        made.loc[place, ["low", "high"]] = bounds
    variant = outcomes(frame).set_index("cell_id")["variant"]
    return made.assign(variant=made["cell_id"].map(variant))


@_remembered
def parity(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each PARITY_KEY: green when every error of a completed check is within its
    tolerance, and there is at least one; else red. Checks of some levels alone can make a key red,
    never green: without others it is partial. `worst` is the largest error / tolerance."""
    rows = _latest_checks(frame)
    # where nothing can run, nothing needs proof
    rows = rows[(rows["size"] == PARITY_SIZE) & (rows["outcome"] != "unsupported")]
    if rows.empty:
        return pd.DataFrame(columns=[*PARITY_KEY, "status", "num_checks", "worst", "worst_field"])
    errors = parity_errors(rows)
    checks = errors.groupby("attempt", sort=False)
    worst = errors.loc[checks["share"].idxmax()] if len(errors) else errors
    facts = worst.set_index("attempt").assign(
        num_checks=checks.size(), is_within=checks["is_within"].all()
    )
    made = []
    for run in rows.drop_duplicates("attempt").to_dict("records"):
        fact = facts.loc[run["attempt"]] if run["attempt"] in facts.index else None
        is_partial = _plain(run["levels"]) is not None
        # what a part of the ladder could not finish says nothing of the rest
        is_red = run["outcome"] in WRONG if is_partial else run["outcome"] != "completed"
        is_red |= not is_partial if fact is None else not fact["is_within"]
        made.append(
            {name: run[name] for name in PARITY_KEY}
            | {
                "status": RED if is_red else PARTIAL if is_partial else GREEN,
                "outcome": run["outcome"],
                "reason": run["reason"],
                "num_checks": 0 if fact is None else int(fact["num_checks"]),
                "worst": None if fact is None else float(fact["share"]),
                "worst_field": None if fact is None else fact["field"],
                "worst_error": None if fact is None else float(fact["value"]),
                "tolerance": None if fact is None else float(fact["tolerance"]),
                "levels": run["levels"],
                "run_id": run["run_id"],
                "cell_id": run["cell_id"],
            }
        )
    status = pd.DataFrame(made)
    status["family_order"] = [family_order(name) for name in status["family"]]
    # Several checks of one key (seeds, workloads, levels): one red makes it red.
    status["rank"] = status["status"].map((RED, GREEN, PARTIAL).index)
    status = status.sort_values(["rank", "worst"], ascending=[True, False], kind="stable")
    checks = status.groupby(PARITY_KEY, dropna=False, sort=False)["num_checks"].transform("sum")
    status = status.assign(num_checks=checks).drop_duplicates(PARITY_KEY)
    order = ["family_order", "backend", "dtype"]
    status = status.sort_values(order, kind="stable").drop(columns=["family_order", "rank"])
    return status.reset_index(drop=True)


@_remembered
def parity_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """Every relative error of the parity runs beside its tolerance. share: of the tolerance, by the
    largest error or by the root mean squares, whichever is more. An error without a tolerance is
    not within it.
    """
    rows = _latest_checks(frame).copy()
    rows["at"] = rows["at"].astype("float64").fillna(-1)
    rows["field"] = rows["field"].astype(object).where(rows["field"].notna(), "")
    key = ["attempt", "field", "at"]
    errors = rows[rows["metric"] == "relative_error"]
    for metric in ("tolerance", "rms_error", "rms_tolerance"):
        values = rows[rows["metric"] == metric].drop_duplicates(key)[[*key, "value"]]
        errors = errors.merge(values.rename(columns={"value": metric}), on=key, how="left")
    share = _share(errors["value"], errors["tolerance"])
    rms = _share(errors["rms_error"], errors["rms_tolerance"]).where(errors["rms_error"].notna(), 0)
    errors["share"] = np.maximum(share, rms).astype("float64")
    errors["is_within"] = errors["share"] <= 1
    return errors.reset_index(drop=True)


def _share(error: pd.Series, limit: pd.Series) -> pd.Series:
    """Of a limit; nothing of one that is 0 and kept, everything where there is none."""
    share = (error / limit.where(limit > 0)).where(limit != 0, np.where(error > 0, np.inf, 0.0))
    return share.where(share.notna(), np.inf)


def _latest_checks(frame: pd.DataFrame) -> pd.DataFrame:
    """Parity rows: of each run and engine the last attempt, whatever was run before or since with
    another engine. Attempts sort by time."""
    rows = frame[frame["suite"] == "parity"]
    latest = rows.groupby(["run_id", "engine_build"], dropna=False)["attempt"].transform("max")
    return rows[rows["attempt"] == latest]


def mark_parity(rows: pd.DataFrame, status: pd.DataFrame) -> pd.DataFrame:
    """`parity` of each row: green, red, or none where no whole parity record has its key."""
    known = {tuple(_plain(row[name]) for name in PARITY_KEY): row["status"]
             for row in status.to_dict("records") if row["status"] != PARTIAL}  # fmt: skip
    keys = zip(*(rows[name] for name in PARITY_KEY), strict=True)
    rows = rows.copy()
    rows["parity"] = [known.get(tuple(map(_plain, key)), MISSING) for key in keys]
    return rows


def comparisons(
    frame: pd.DataFrame, by: str = "backend", ours: str = "jax", baseline: str | None = None
) -> pd.DataFrame:
    """One row for each matched pair of cells and metric: both values, speedup, verdict, parity.

    `by` is "backend", "family" or "linear_scan" (what it resolved to): the one setting in which
    the two cells differ. A cell that has no completed run, or no partner, keeps its row: its value
    is null and its outcome says why.
    """
    return _comparisons(frame, by, ours, baseline or BASELINE[by])


@_remembered
def _comparisons(frame: pd.DataFrame, by: str, ours: str, baseline: str) -> pd.DataFrame:
    cells = summary(frame)
    cells = cells[_shown(cells)]
    pairs = _pairs(frame, by, ours, baseline)
    evidence = _evidence(frame, [(_id(left), _id(right)) for left, right in pairs])
    facts = {}
    metrics: dict[str, list[tuple[str, Any]]] = {}
    for row in cells.to_dict("records"):
        point = (row["metric"], _plain(row["at"]))
        facts[row["cell_id"], *point] = row
        metrics.setdefault(row["cell_id"], []).append(point)
    made = []
    for left, right in pairs:
        one = left or right
        wanted = [*metrics.get(_id(left), ()), *metrics.get(_id(right), ())]
        if not wanted:
            wanted = [(name, None) for name in HEADLINES.get(one["suite"], ())[:1]]
        for metric, at in dict.fromkeys(wanted):
            a, b = facts.get((_id(left), metric, at)), facts.get((_id(right), metric, at))
            rounds = evidence.get((_id(left), _id(right), metric, at))
            found = _compare(rounds, a, b, METRICS[metric].better)
            row = _pair_row(left, right, a, b, metric, at, found)
            if by == "backend" and left and right and left["variant"] != right["variant"]:
                row["variant"] = f"{left['variant']} beside {right['variant']}"
            made.append(row)
    found = pd.DataFrame(made, columns=_PAIR_COLUMNS)
    return found.astype({name: "float64" for name in _PAIR_NUMBERS})


_SETTINGS = ("suite", "family", "size", "backend", "dtype", "device_kind", "op", "work_phase",
             "seq_len", "batch_size", "prompt_len", "num_new_tokens", "num_steps", "num_devices",
             "data", "variant")  # fmt: skip
_SIDE = ("value", "low", "high", "num_rounds", "num_seeds", "outcome", "status", "parity",
         "num_params", "num_params_non_embedding", "cell_id", "is_current",
         "num_outliers", "linear_scan")  # fmt: skip
_PAIR_COLUMNS = [*_SETTINGS, "metric", "at", "unit",
                 *(f"{name}_{side}" for name in _SIDE for side in ("ours", "baseline")),
                 "speedup", "speedup_low", "speedup_high", "difference", "num_paired_rounds",
                 "verdict", "reason"]  # fmt: skip

_PAIR_NUMBERS = ["speedup", "speedup_low", "speedup_high", "difference", "at",
                 *(f"{name}_{side}" for name in ("value", "low", "high", "num_rounds", "num_seeds")
                   for side in ("ours", "baseline"))]  # fmt: skip


def _pair_row(
    left: dict | None,
    right: dict | None,
    a: dict | None,
    b: dict | None,
    metric: str,
    at: float | None,
    found: statistics.Comparison,
) -> dict[str, Any]:
    row = {name: (left or right)[name] for name in _SETTINGS}
    row |= {"metric": metric, "at": at, "unit": METRICS[metric].unit}
    for side, cell, fact in (("ours", left, a), ("baseline", right, b)):
        for name in _SIDE:
            source = fact if fact is not None and name in fact else (cell or {})
            row[f"{name}_{side}"] = source.get(name)
    low, high = found.interval or (None, None)
    difference = a["value"] - b["value"] if a and b and metric in QUALITIES else None
    return row | {
        "speedup": found.speedup,
        "speedup_low": low,
        "speedup_high": high,
        "difference": difference,
        "num_paired_rounds": found.num_rounds,
        "verdict": found.verdict if metric in TIMES else None,
        "reason": found.reason,
    }


def _evidence(frame: pd.DataFrame, pairs: list[tuple]) -> dict[tuple, dict[str, np.ndarray]]:
    """The rounds that both cells of a pair have, by (cell, cell, metric, at): values of both
    sides, and whether the two processes shared a block, a node and a device."""
    rows = processes(frame)
    rows = rows.loc[_shown(rows), ["cell_id", "metric", "at", "seed", "round", "value", "block",
                                   "node", "device_name"]]  # fmt: skip
    rows["at"] = rows["at"].fillna(-1)
    ids = pd.DataFrame([pair for pair in pairs if None not in pair], columns=["cell_id", "other"])
    ids = ids.drop_duplicates().astype(object)
    both = ids.merge(rows.astype({"cell_id": object}), on="cell_id").merge(
        rows.rename(columns={"cell_id": "other"}).astype({"other": object}),
        on=["other", "metric", "at", "seed", "round"],
        suffixes=("", "_2"),
    )
    both = both.sort_values(["seed", "round"], kind="stable").reset_index(drop=True)
    in_block = (both["block"].notna() & (both["block"] == both["block_2"])).to_numpy(dtype=bool)
    together = in_block.copy()
    for name in ("node", "device_name"):
        same = both[name].notna() & (both[name] == both[f"{name}_2"])
        together &= same.to_numpy(dtype=bool)
    columns = {
        "ours": both["value"].to_numpy(dtype=float),
        "baseline": both["value_2"].to_numpy(dtype=float),
        "in_block": in_block,
        "together": together,
    }
    key = ["cell_id", "other", "metric", "at"]
    groups = both.groupby(key, sort=False).indices if len(both) else {}
    return {
        (cell, other, metric, None if at < 0 else at): {
            name: values[places] for name, values in columns.items()
        }
        for (cell, other, metric, at), places in groups.items()
    }


def _compare(
    rounds: dict[str, np.ndarray] | None, a: dict | None, b: dict | None, better: str | None
) -> statistics.Comparison:
    if a is None or b is None:
        return statistics.Comparison(None, None, 0, "inconclusive", "one side has no value")
    if better is None:
        return statistics.Comparison(None, None, 0, "inconclusive", "neither way is better")
    if {a["device_kind"], b["device_kind"]} > {"cpu"}:
        reason = "CPU is never paired with an accelerator"
        return statistics.Comparison(None, None, 0, statistics.UNPAIRED, reason)
    if rounds is None or not rounds["together"].any():
        is_block = rounds is not None and rounds["in_block"].any()
        reason = "measured on different nodes or devices" if is_block else "not of one block"
        return statistics.unpaired(a["value"], b["value"], better=better, reason=reason)
    kept = rounds["together"]
    return statistics.compare(rounds["ours"][kept], rounds["baseline"][kept], better=better)


def _pairs(
    frame: pd.DataFrame, by: str, ours: str, baseline: str
) -> list[tuple[dict | None, dict | None]]:
    """Cells of `ours` beside cells of `baseline` that differ in nothing else; a cell without a
    partner stands alone."""
    match = MATCHES[by]
    groups: dict[str, list[dict]] = {}
    for cell in outcomes(frame).to_dict("records"):
        if cell["suite"] != "parity":
            groups.setdefault(cell[match], []).append(cell)
    made: list[tuple[dict | None, dict | None]] = []
    for group in groups.values():
        lefts = [cell for cell in group if cell[by] == ours]
        rights = [cell for cell in group if cell[by] == baseline]
        taken = set()
        for left in lefts:
            partners = _of_its_kernels(left, rights) if by == "backend" else rights
            taken |= {right["cell_id"] for right in partners}
            made += [(left, right) for right in partners] or [(left, None)]
        made += [(None, right) for right in rights if right["cell_id"] not in taken]
    return made


def _of_its_kernels(cell: dict, others: list[dict]) -> list[dict]:
    """The cells of another backend that asked for the same kernels, else those that ran kernels of
    the same name or, as this one, their backend's own. Unsupported cells are paired by equal
    kernels alone, and only where nothing else is."""
    equal = [other for other in others if other["kernels"] == cell["kernels"]]
    if cell["outcome"] == "unsupported":
        return equal
    can_run = [other for other in others if other["outcome"] != "unsupported"]
    return (
        [other for other in can_run if other["kernels"] == cell["kernels"]]
        or [other for other in can_run if _go_together(cell, other)]
        or equal
    )


def _go_together(cell: dict, other: dict) -> bool:
    for name in KERNELS:
        asked = [json.loads(c["kernels"]).get(name, "auto") for c in (cell, other)]
        ran = [c[name] if a == "auto" else a for a, c in zip(asked, (cell, other), strict=True)]
        are_own = all(a == "auto" or a.startswith(OUR_KERNELS) for a in asked)
        if not are_own and ran[0] != ran[1]:
            return False
    return True


@_remembered
def outcomes(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: its settings and how its runs ended, e.g. "2 completed, 1 timed_out"."""
    rows = mark_parity(runs(frame), parity(frame))
    groups = rows.groupby("cell_id", sort=False)
    made = groups.first()
    made["num_runs"] = groups.size()
    made["num_completed"] = (rows["outcome"] == "completed").groupby(rows["cell_id"]).sum()
    status: dict[str, list[str]] = {}
    for (cell, outcome), count in rows.groupby(["cell_id", "outcome"], sort=False).size().items():
        status.setdefault(cell, []).append(f"{count} {outcome}")
    # one run, or rounds that all ended alike: the outcome alone
    made["status"] = [
        ", ".join(ends) if len(ends := status[cell]) > 1 else ends[0].split(" ")[1]
        for cell in made.index
    ]
    # Where rounds ended differently, one that did not complete names the outcome.
    ended = rows.sort_values("outcome", key=lambda c: c == "completed", kind="stable")
    made["outcome"] = ended.groupby("cell_id")["outcome"].first()
    made["variant"] = variants(made, "model", "kernels")
    # A run that never came to its engine resolved nothing: what it asked for names its kernel.
    asked = made["kernels"].map(lambda text: json.loads(text).get("linear_scan", "auto"))
    made["linear_scan"] = made["linear_scan"].fillna(asked.where(asked != "auto"))
    return made.reset_index()


def variants(cells: pd.DataFrame, *columns: str) -> list[str]:
    """What sets a cell apart from others of its suite, family and size, of the settings in these
    columns: "lambda_init=code"."""
    settings = [
        {name: value for text in texts for name, value in json.loads(text).items()}
        for texts in zip(*(cells[column] for column in columns), strict=True)
    ]
    keys = list(zip(cells["suite"], cells["family"], cells["size"], strict=True))
    seen: dict[tuple, dict[str, set[str]]] = {}
    for key, values in zip(keys, settings, strict=True):
        for name, value in values.items():
            seen.setdefault(key, {}).setdefault(name, set()).add(str(value))
    return [
        ", ".join(f"{name}={value}" for name, value in values.items() if len(seen[key][name]) > 1)
        for key, values in zip(keys, settings, strict=True)
    ]


def failures(frame: pd.DataFrame) -> pd.DataFrame:
    """Runs whose counted attempt did not complete, with reason and phase."""
    rows = runs(frame)
    return rows[rows["outcome"] != "completed"].reset_index(drop=True)


def frontier(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest batch of each decode_throughput cell, and the longest context that completed
    beside the shortest that ran out of memory, where a sweep met one."""
    made = []
    cells = summary(frame)
    for row in cells[cells["metric"] == "max_batch_size"].to_dict("records"):
        made.append(_frontier_row(row, "largest batch", row["value"], None) | {"why": row["field"]})
    ends = outcomes(frame)
    lengths = [ends[name].astype("float64") for name in ("seq_len", "prompt_len")]
    # Training shrinks its batch as sequences grow; elsewhere another batch is another question.
    batch = ends["batch_size"].where(ends["suite"] != "training_speed")
    ends = ends.assign(length=lengths[0].fillna(lengths[1]), other_batch=batch)
    key = ["suite", "family", "size", "backend", "dtype", "device_kind"]
    same = [*key, "op", "work_phase", "variant", "num_new_tokens", "other_batch"]
    for _, group in ends[ends["length"].notna()].groupby(same, sort=False, dropna=False):
        is_out = group["outcome"].isin(["out_of_memory", "out_of_memory_predicted"])
        if is_out.any():
            done = group.loc[group["outcome"] == "completed", "length"]
            first = group.loc[is_out, "length"].min()
            longest = done.max() if len(done) else None
            made.append(_frontier_row(group.iloc[0].to_dict(), "longest context", longest, first))
    columns = [*key, "prompt_len", "frontier", "reached", "out_of_memory_at", "why"]
    return pd.DataFrame(made, columns=columns)


def _frontier_row(row: dict, name: str, reached: Any, failed_at: Any) -> dict[str, Any]:
    key = ("suite", "family", "size", "backend", "dtype", "device_kind", "prompt_len")
    return {k: row.get(k) for k in key} | {
        "frontier": name,
        "reached": reached,
        "out_of_memory_at": failed_at,
        "why": None,
    }


def peaks(frame: pd.DataFrame) -> pd.DataFrame:
    """The peaks that MFU and MBU are shares of: by device, backend and dtype, with their name (a
    data sheet's device, or "measured"), the median over runs and the range."""
    names = ["peak_flops_per_s", "peak_bytes_per_s"]
    rows = frame[frame["metric"].isin(names) & frame["is_counted"].fillna(False).astype(bool)]
    key = ["device_name", "backend", "dtype", "metric", "unit", "field"]
    found = rows.groupby(key, dropna=False, sort=True)["value"]
    return found.agg(["median", "min", "max", "size"]).reset_index()


def _shown(rows: pd.DataFrame) -> pd.Series:
    """Headline metrics; `at` is kept for throughput by batch size alone."""
    unknown = ~rows["suite"].isin(list(HEADLINES))
    wanted = [metric in HEADLINES.get(suite, ()) for suite, metric in
              zip(rows["suite"], rows["metric"], strict=True)]  # fmt: skip
    plain = rows["at"].isna() | (rows["suite"] == "decode_throughput")
    return (pd.Series(wanted, index=rows.index, dtype=bool) | (unknown & plain)) & ~rows[
        "metric"
    ].isin(CURVES)


def _id(cell: dict | None) -> str | None:
    return None if cell is None else cell["cell_id"]


def _plain(value: Any) -> Any:
    """A value that is equal to itself: every kind of missing becomes None."""
    return None if pd.isna(value) else value


def family_order(name: str) -> tuple[int, str]:
    return (FAMILIES.index(name) if name in FAMILIES else len(FAMILIES), name)
