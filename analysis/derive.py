"""What the samples say together: processes, cells, how they ended, and how far they reached."""

import json
from typing import Any

import numpy as np
import pandas as pd

from analysis import statistics
from analysis.checks import PARITY_ORDER, mark_parity, parity
from analysis.load import SAMPLE_COLUMNS, words
from analysis.remember import remembered
from analysis.vocabulary import CURVES, HEADLINES, SHARES

# Of an attempt and its machine: runs() says it once, and not for each of millions of medians.
_OF_RUNS = ("attempt", "outcome", "reason", "phase", "is_counted", "started_at", "seconds",
            "levels", "settings", "architecture", "build_device", "job", "cpu_model", "num_cores",
            "num_threads", "memory_bytes", "platform", "python", "versions", "git_commit",
            "data_digest", "init_digest", "num_segments", "load_average", "cache_bytes_predicted",
            "predicted_peak_memory_bytes", "model_flops", "model_bytes")  # fmt: skip


@remembered
def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a run: the attempt that counts, without its samples."""
    is_first = _is_counted(frame) & ~frame["attempt"].duplicated()
    return words(frame[is_first].drop(columns=list(SAMPLE_COLUMNS))).reset_index(drop=True)


@remembered
def processes(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each (run, metric, at): the median over repeats, with how many were odd."""
    first, facts = _medians(frame)
    kept = frame.columns.drop(["value", "repeat", *_OF_RUNS], errors="ignore")
    made = {name: frame[name].array.take(first) for name in kept}
    rows = pd.DataFrame(made | facts, copy=False)  # millions: assign would copy them
    rows["at"] = rows["at"].astype("float64")
    marked = mark_parity(runs(frame), parity(frame)).set_index("run_id")["parity"]
    ids = rows["run_id"].astype("category").cat
    marks = pd.Categorical(marked.reindex(ids.categories), PARITY_ORDER)
    rows["parity"] = marks.take(ids.codes)
    return rows


def _medians(frame: pd.DataFrame) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The place of the first repeat of each (run, metric, at), and what its repeats say."""
    is_wanted = (
        _is_counted(frame)
        & (frame["outcome"] == "completed")
        & (frame["suite"] != "parity")
        & frame["value"].notna()
    )
    places = np.flatnonzero(is_wanted)
    rows = frame[["run_id", "metric", "at", "value"]].iloc[places]
    groups = _Groups(rows, ["run_id", "metric", "at"])
    value = rows["value"].to_numpy()
    median = groups.median(value)
    distance = np.abs(value - median[groups.number])
    spread = groups.median(distance)[groups.number]
    odd = statistics.is_far(distance, median[groups.number], spread, groups.size[groups.number])
    return places[groups.first], {
        "value": median,
        "num_repeats": groups.size,
        "num_outliers": np.bincount(groups.number, weights=odd).astype(int),
    }


class _Groups:
    """Rows that agree in some columns, numbered as they come; for what pandas does slowly where
    groups are hundreds of thousands."""

    def __init__(self, rows: pd.DataFrame, key: list[str]) -> None:
        self.number = np.zeros(len(rows), dtype=int)
        for name in key:  # pandas would number all combinations of three columns at once: slower
            code, count = _codes(rows[name])
            self.number, _ = pd.factorize(self.number * count + code)
        self.size = np.bincount(self.number)
        self.start = np.cumsum(self.size) - self.size  # of each, where rows are in order
        self._order = np.argsort(self.number, kind="stable")
        self.first = self._order[self.start]

    def in_order(self, values: np.ndarray) -> np.ndarray:
        """Each group's from `start` on, the least first."""
        values = values[self._order]
        for size in np.unique(self.size[self.size > 1]):
            places = self.start[self.size == size][:, None] + np.arange(size)
            values[places] = np.sort(values[places], axis=1)
        return values

    def median(self, values: np.ndarray) -> np.ndarray:
        return self.middle(self.in_order(values))

    def middle(self, in_order: np.ndarray) -> np.ndarray:
        low, high = self.start + (self.size - 1) // 2, self.start + self.size // 2
        return (in_order[low] + in_order[high]) / 2


def _codes(column: pd.Series) -> tuple[np.ndarray, int]:
    """Each value as a number, a missing one as 0; and how many there are."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.codes.to_numpy(dtype=int) + 1, len(column.cat.categories) + 1
    codes, known = pd.factorize(column)
    return codes + 1, len(known) + 1


def _is_counted(frame: pd.DataFrame) -> pd.Series:
    return frame["is_counted"].fillna(False).astype(bool)


@remembered
def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each (cell, metric, at): the median over its processes, with its interval."""
    rows = processes(frame)
    settings = ["suite", "family", "size", "backend", "dtype", "device_kind", "device_name",
                "linear_scan", "op", "work_phase", "seq_len", "batch_size", "prompt_len",
                "num_new_tokens", "num_steps", "num_devices", "data", "model", "unit", "field",
                "num_params", "num_params_non_embedding"]  # fmt: skip
    key = ["cell_id", "metric", "at"]
    numbers = _Groups(rows, key)
    value = rows["value"].to_numpy()
    groups = rows.groupby(numbers.number, sort=False)
    least = groups["value"].min().to_numpy()
    made = words(pd.concat([rows[key].iloc[numbers.first].reset_index(drop=True),
                            groups[settings].first()], axis=1))  # fmt: skip
    in_order = numbers.in_order(value)
    made["value"] = numbers.middle(in_order)
    made["num_processes"] = numbers.size
    for name, column in (
        ("num_rounds", "round"),
        ("num_seeds", "seed"),
        ("num_builds", "engine_build"),
    ):
        made[name] = groups[column].nunique()
    made["num_outliers"] = groups["num_outliers"].sum()
    # Of several processes the least verified one speaks for the cell, and one stale is stale.
    rank = rows["parity"].cat.codes.groupby(numbers.number, sort=False).max()
    made["parity"] = np.array(PARITY_ORDER, dtype=object)[rank]
    made["is_current"] = groups["is_current"].min()
    # statistics.median_interval, of all groups at once
    is_share = made["metric"].isin(SHARES).to_numpy()
    n, is_log = numbers.size, (least > 0) & ~is_share
    scaled = np.log(value, out=value.copy(), where=is_log[numbers.number])
    scaled = pd.Series(scaled).groupby(numbers.number, sort=False)
    mean, deviation = scaled.mean().to_numpy(), scaled.std(ddof=1).to_numpy()
    half = statistics.student_half_width(np.maximum(n, 2), deviation)
    is_many = n >= statistics.MEDIAN_PROCESSES
    counts, place = np.unique(n, return_inverse=True)  # a slow function of few numbers
    counts = np.maximum(counts, statistics.MEDIAN_PROCESSES)
    skipped = np.where(is_many, statistics.num_skipped(counts)[place], 0)
    for name, end, place, outer in (
        ("low", mean - half, numbers.start + skipped, np.minimum),
        ("high", mean + half, numbers.start + n - 1 - skipped, np.maximum),
    ):
        with np.errstate(over="ignore"):
            end = np.where(is_log, np.exp(np.where(is_log, end, 0)), end)
            few = outer(np.where(is_share, np.clip(end, 0, 1), end), made["value"])
        made[name] = np.where(is_many, in_order[place], np.where(n > 1, few, np.nan))
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
        cells = (row["cell_id"],)
        found = _frontier_row(row, "largest batch", row["value"], None, cells)
        made.append(found | {"why": row["field"]})
    ends = outcomes(frame)
    lengths = [ends[name].astype("float64") for name in ("seq_len", "prompt_len")]
    # Training shrinks its batch as sequences grow; elsewhere another batch is another question.
    batch = ends["batch_size"].where(ends["suite"] != "training_speed")
    ends = ends.assign(length=lengths[0].fillna(lengths[1]), other_batch=batch)
    key = ["suite", "family", "size", "backend", "dtype", "device_kind"]
    same = [*key, "op", "work_phase", "variant", "num_new_tokens", "other_batch"]
    ends = ends[ends["length"].notna()]
    is_out = ends["outcome"].isin(["out_of_memory", "out_of_memory_predicted"])
    sweep = ends.groupby(same, sort=False, dropna=False).ngroup()
    ends = ends.assign(is_out=is_out)[sweep.isin(sweep[is_out])]  # most sweeps meet none
    for _, group in ends.groupby(same, sort=False, dropna=False):
        done = group.loc[group["outcome"] == "completed", "length"]
        first = group.loc[group["is_out"], "length"].min()
        longest = done.max() if len(done) else None
        one, cells = group.iloc[0].to_dict(), tuple(group["cell_id"])
        row = _frontier_row(one, "longest context", longest, first, cells)
        why = group.loc[group["is_out"] & (group["length"] == first), "outcome"].iloc[0]
        made.append(row | {"why": why})
    columns = [*key, *_FRONTIER_WORK, "frontier", "reached", "out_of_memory_at", "why",
               "cell_ids"]  # fmt: skip
    return pd.DataFrame(made, columns=columns)


_FRONTIER_WORK = ("prompt_len", "num_new_tokens", "batch_size", "variant")


def _frontier_row(
    row: dict, name: str, reached: Any, failed_at: Any, cells: tuple[str, ...]
) -> dict[str, Any]:
    key = ("suite", "family", "size", "backend", "dtype", "device_kind", *_FRONTIER_WORK)
    return {k: row.get(k) for k in key} | {
        "frontier": name,
        "reached": reached,
        "out_of_memory_at": failed_at,
        "why": None,
        "cell_ids": cells,
    }


def peaks(frame: pd.DataFrame) -> pd.DataFrame:
    """The peaks that MFU and MBU are shares of: by device, backend and dtype, with their name (a
    data sheet's device, or "measured"), the median over runs and the range."""
    names = ["peak_flops_per_s", "peak_bytes_per_s"]
    rows = words(frame[frame["metric"].isin(names) & _is_counted(frame)])
    key = ["device_name", "backend", "dtype", "metric", "unit", "field"]
    found = rows.groupby(key, dropna=False, sort=True)
    made = found["value"].agg(["median", "min", "max", "size"])
    return made.assign(run_ids=found["run_id"].agg(" ".join)).reset_index()


def shown(rows: pd.DataFrame) -> pd.Series:
    """Headline metrics; `at` is kept for throughput by batch size alone."""
    plain = rows["at"].isna() | (rows["suite"] == "decode_throughput")
    is_shown = ~rows["suite"].isin(list(HEADLINES)) & plain
    for suite, metrics in HEADLINES.items():
        is_shown |= (rows["suite"] == suite) & rows["metric"].isin(metrics)
    return is_shown & ~rows["metric"].isin(CURVES)
