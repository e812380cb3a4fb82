"""What the samples say together: processes, cells, how they ended, and how far they reached."""

import json
from typing import Any

import numpy as np
import pandas as pd

from analysis import statistics
from analysis.checks import PARITY_ORDER, mark_parity, parity
from analysis.load import SAMPLE_COLUMNS
from analysis.remember import remembered
from analysis.vocabulary import CURVES, HEADLINES


@remembered
def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a run: the attempt that counts, without its samples."""
    counted = frame[frame["is_counted"].fillna(False).astype(bool)]
    runs = counted.drop_duplicates("attempt").drop(columns=list(SAMPLE_COLUMNS))
    return runs.reset_index(drop=True)


@remembered
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


@remembered
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


@remembered
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


def shown(rows: pd.DataFrame) -> pd.Series:
    """Headline metrics; `at` is kept for throughput by batch size alone."""
    unknown = ~rows["suite"].isin(list(HEADLINES))
    wanted = [metric in HEADLINES.get(suite, ()) for suite, metric in
              zip(rows["suite"], rows["metric"], strict=True)]  # fmt: skip
    plain = rows["at"].isna() | (rows["suite"] == "decode_throughput")
    return (pd.Series(wanted, index=rows.index, dtype=bool) | (unknown & plain)) & ~rows[
        "metric"
    ].isin(CURVES)
