"""Records of a store as one tidy DataFrame: a row a sample, or one row where there is none.

Words are categories, in order, so that a row holds the number of a word alone: 100,000 records are
millions of rows of 70 columns. What derives from records alone does so before they are joined with
their samples (`read`, then `tidy`).
"""

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from analysis import index
from suites.harness.record import Record

FRAME_SCHEMA = 8  # raise it when columns change: older indexes are then rebuilt

# Fields of ModelConfig in which a speed and the parity that verifies it may differ; the others are
# architecture, which parity is about. So is head_dim, a size too: a kernel is compiled for it.
SIZE_FIELDS = ("size", "d_model", "d_rnn", "d_mlp", "num_layers", "num_heads", "num_gate_blocks",
               "vocab_size", "num_kv_heads", "window_size")  # fmt: skip

RECORD_COLUMNS = {
    # which run
    "run_id": "str", "cell_id": "str", "build": "str", "engine_build": "str",
    "attempt": "str", "block": "str", "order": "few", "outcome": "str", "reason": "str",
    "phase": "str", "is_counted": "bool", "is_current": "bool",
    "started_at": "str", "seconds": "float",
    # what was asked
    "suite": "str", "family": "str", "size": "str", "backend": "str", "dtype": "str",
    "device_kind": "str", "seed": "int", "round": "few", "data": "str", "window_size": "int",
    "work_phase": "str", "op": "str", "seq_len": "int", "batch_size": "int", "prompt_len": "int",
    "num_new_tokens": "int", "num_steps": "int", "num_devices": "few", "levels": "str",
    "task": "str",
    "model": "str", "kernels": "str", "optimizer": "str",
    "settings": "str",  # all of them, but seed and round, as JSON: one text a cell
    "architecture": "str",  # what parity must share with a speed that it verifies
    # on what
    "linear_scan": "str", "attention": "str", "layers": "str", "program": "str",
    "device_name": "str", "build_device": "str", "node": "str", "job": "str",
    "cpu_model": "str", "num_cores": "few", "num_threads": "few", "memory_bytes": "int",
    "platform": "str", "python": "str", "versions": "str", "git_commit": "str",
    "data_digest": "str", "init_digest": "str", "num_segments": "few", "load_average": "float",
    # what it must cost
    "num_params": "int", "num_params_non_embedding": "int", "train_flops_per_token": "float",
    "cache_bytes_predicted": "float", "predicted_peak_memory_bytes": "float",
    "model_flops": "float", "model_bytes": "float",
}  # fmt: skip
SAMPLE_COLUMNS = {"metric": "str", "value": "float", "unit": "str", "repeat": "few", "at": "int",
                  "field": "str"}  # fmt: skip
COLUMNS = RECORD_COLUMNS | SAMPLE_COLUMNS
KINDS = {
    "str": pa.dictionary(pa.int32(), pa.string()), "int": pa.int64(), "float": pa.float64(),
    "few": pa.int32(), "bool": pa.bool_(),
}  # fmt: skip
NULLABLE = {pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int32Dtype(), pa.bool_(): pd.BooleanDtype()}
PART = 2**19  # rows of a frame that are written at a time
RESOLVED = ("linear_scan", "attention", "layers", "program")  # of the engine, in its record


def load(store: Path) -> pd.DataFrame:
    """Every attempt of every run of a store; `is_counted` marks the attempt that stands for its
    run: the last completed one, else the last (`aerie` prefers one of the present build). Counts
    that a workload does not use are null."""
    return tidy(*read(store))


def read(store: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The records of a store, a row each, and their samples, of which `record` is the place of
    theirs. Records may be marked or left out before `tidy` joins them."""
    version = f"{FRAME_SCHEMA} {_digest(COLUMNS)}"
    frames = _frames(index.table_of(Path(store), _table, version))
    pa.default_memory_pool().release_unused()
    return frames


def counted(records: pd.DataFrame, worth: pd.Series) -> pd.Series:
    """Which attempt stands for its run: the last of those that are worth most."""
    order = records.assign(worth=worth).sort_values("worth", kind="stable")
    return ~order.duplicated("run_id", keep="last").astype("boolean").reindex(records.index)


def tidy(records: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """A row a sample of these records, in their order, or one row where there is none."""
    first, end = (
        np.searchsorted(samples["record"], records.index, side) for side in ("left", "right")
    )
    rows = np.maximum(end - first, 1)
    whose = np.repeat(np.arange(len(rows)), rows)
    nth = np.arange(len(whose)) - (np.cumsum(rows) - rows)[whose]
    which = np.where(first[whose] < end[whose], first[whose] + nth, -1)
    columns = {name: records[name].array.take(whose) for name in RECORD_COLUMNS}
    for name in SAMPLE_COLUMNS:
        columns[name] = samples[name].array.take(which, allow_fill=True)
    return pd.DataFrame(columns, copy=False)


def frame_of(records: list[Record]) -> pd.DataFrame:
    """The tidy frame of records, which come oldest attempt first within a run."""
    return tidy(*_frames(_table(records)))


def words(frame: pd.DataFrame) -> pd.DataFrame:
    """Categories as the words that they stand for; what is missing is None."""
    made = {}
    for name, column in frame.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            known = np.append(column.cat.categories.to_numpy(dtype=object), None)
            column = pd.Series(known[column.cat.codes], index=frame.index, dtype=object)
        made[name] = column
    return pd.DataFrame(made, copy=False)


def write_parquet(frame: pd.DataFrame, path: Path) -> Path:
    """The frame as a file that pandas.read_parquet reads back."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.Schema.from_pandas(frame, preserve_index=False)
    # nobody filters by statistics of columns, which take a third of the time
    with parquet.ParquetWriter(path, schema, write_statistics=False) as writer:
        # in parts: the whole of a large frame would need its memory once more
        for start in range(0, len(frame), PART):
            part = frame.iloc[start : start + PART]
            writer.write_table(pa.Table.from_pandas(part, schema, preserve_index=False))
    return path


def read_parquet(path: Path) -> pd.DataFrame:
    """What write_parquet wrote, held as load holds it."""
    table = parquet.read_table(path).unify_dictionaries().combine_chunks()
    made = {}
    for name in table.column_names:
        values = table[name].combine_chunks()
        if COLUMNS.get(name) == "str" and not pa.types.is_dictionary(values.type):
            values = values.cast(pa.string()).dictionary_encode()  # nothing but missing ones
        made[name] = _values(values)
    return pd.DataFrame(made, copy=False)


def _row(record: Record) -> dict[str, Any]:
    run, seen, costs = record.run, record.provenance, record.costs
    model, work = run["model"], run["workload"]
    resolved = seen.get("resolved_kernels") or {}
    used = {
        name: work.get(name) or None
        for name in ("op", "task", "seq_len", "batch_size", "prompt_len", "num_new_tokens",
                     "num_steps", "num_devices")
    }  # fmt: skip
    given = {
        name: getattr(record, name)
        for name in ("run_id", "cell_id", "build", "attempt", "block", "order", "outcome",
                     "reason", "phase", "started_at", "seconds")
    }  # fmt: skip
    asked = {name: run[name] for name in ("suite", "backend", "dtype", "seed", "round")}
    found = {
        name: seen.get(name)
        for name in ("device_name", "build_device", "job", "cpu_model", "num_cores",
                     "num_threads", "memory_bytes", "platform", "python", "git_commit",
                     "data_digest", "init_digest")
    }  # fmt: skip
    cost = {
        name: costs.get(name)
        for name in ("num_params", "num_params_non_embedding", "train_flops_per_token",
                     "predicted_peak_memory_bytes", "model_flops", "model_bytes")
    }  # fmt: skip
    return (
        given
        | asked
        | used
        | found
        | cost
        | {
            # a build is "engine.question"; parity speaks for the engine alone
            "engine_build": record.build.partition(".")[0],
            "family": model["family"],
            "size": model["size"],
            "window_size": model.get("window_size"),
            "work_phase": work["phase"],
            "levels": ",".join(work.get("levels") or ()) or None,
            "data": run["data"]["name"],
            "device_kind": run["device_kind"],
            "model": _json({k: v for k, v in model.items() if k not in ("family", "size")}),
            "kernels": _json({"layers": "auto"} | run["kernels"]),  # a run leaves it out
            "optimizer": _words(run["optimizer"]),
            **{name: resolved.get(name) for name in RESOLVED},
            "node": seen.get("host"),
            "num_segments": len(seen["segments"]) if seen.get("segments") else None,
            "load_average": (seen.get("load_average") or [None])[0],  # as the run began
            "versions": _words(seen.get("versions")),
            "cache_bytes_predicted": costs.get("cache_bytes"),
        }
    )


def _digests(run: dict[str, Any]) -> dict[str, str]:
    """Of a cell: its settings, and what its parity must share with it."""
    model = run["model"]
    shape = {k: v for k, v in model.items() if k not in (*SIZE_FIELDS, "family")}
    shape["is_local"] = model.get("window_size") is not None
    heads = model.get("num_kv_heads", 1)
    shape["num_kv_heads"] = "all" if heads == model["num_heads"] else heads
    return {
        "settings": _json({k: v for k, v in run.items() if k not in ("seed", "round")}),
        "architecture": _digest(shape),
    }


def _digest(values: Any) -> str:
    return hashlib.blake2b(_json(values).encode(), digest_size=6).hexdigest()


def _json(values: Any) -> str:
    return json.dumps(values, sort_keys=True)


def _words(values: dict[str, Any] | None) -> str | None:
    """`name=value, name=value`, or None where there is nothing."""
    return ", ".join(f"{k}={v}" for k, v in values.items() if v is not None) if values else None


def _table(records: list[Record]) -> pa.Table:
    """A row a record; its samples are lists, a column each."""
    digests: dict[str, dict[str, str]] = {}
    rows = []
    for record in records:
        if record.cell_id not in digests:
            digests[record.cell_id] = _digests(record.run)
        rows.append(_row(record) | digests[record.cell_id])
    columns = {name: _array(name, [row.get(name) for row in rows]) for name in RECORD_COLUMNS}
    samples = [sample for record in records for sample in record.samples]
    ends = np.cumsum([0, *(len(record.samples) for record in records)])
    for name in SAMPLE_COLUMNS:
        values = _array(name, [getattr(sample, name) for sample in samples])
        columns[name] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values)
    return pa.table(columns)


def _array(name: str, values: list) -> pa.Array:
    kind = KINDS[COLUMNS[name]]
    if COLUMNS[name] == "float":  # FLOPs may be integers that no float64 holds exactly
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, kind)


def _frames(table: pa.Table) -> tuple[pd.DataFrame, pd.DataFrame]:
    columns = {name: table[name].combine_chunks() for name in COLUMNS}
    records = pd.DataFrame({name: _values(columns[name]) for name in RECORD_COLUMNS}, copy=False)
    records["is_counted"] = counted(records, records["outcome"] == "completed")
    counts = columns["value"].value_lengths().to_numpy()
    samples = {name: _values(columns[name].flatten()) for name in SAMPLE_COLUMNS}
    samples["record"] = np.repeat(np.arange(len(counts)), counts)
    return records, pd.DataFrame(samples, copy=False)


def _values(array: pa.Array) -> Any:
    """As pandas holds a column: words as categories in order, counts that may be missing."""
    if not pa.types.is_dictionary(array.type):
        return array.to_pandas(types_mapper=NULLABLE.get)
    codes = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    words = array.dictionary.to_numpy(zero_copy_only=False)
    used = np.flatnonzero(np.bincount(codes[codes >= 0], minlength=len(words)))
    used = used[np.argsort(words[used])]
    place = np.full(len(words) + 1, -1)  # the last one is that of -1: missing
    place[used] = np.arange(len(used))
    return pd.Categorical.from_codes(place[codes], pd.Index(words[used], dtype=object))


class _CallableModule(ModuleType):
    """`analysis.load(store)` works although `analysis.load` is this module."""

    def __call__(self, store: Path) -> pd.DataFrame:
        return load(store)


sys.modules[__name__].__class__ = _CallableModule
