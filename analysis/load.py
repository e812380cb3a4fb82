"""Records of a store as one tidy DataFrame: a row a sample, or one row where there is none.

`index.parquet` in the store is a cache of that frame: it is rebuilt whenever the names, sizes or
times of the record files differ, and may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from suites.harness.record import Record, read_all

INDEX = "index.parquet"
FRAME_SCHEMA = 6  # raise it when columns change: older indexes are then rebuilt

# Fields of ModelConfig that make a family what it is; two families may differ in these alone.
FAMILY_FIELDS = ("family", "pattern", "window_size")
# Fields of ModelConfig in which a speed and the parity that verifies it may differ; the others are
# architecture, which parity is about. So is head_dim, a size too: a kernel is compiled for it.
SIZE_FIELDS = ("size", "d_model", "d_rnn", "d_mlp", "num_layers", "num_heads", "num_gate_blocks",
               "vocab_size", "num_kv_heads", "window_size")  # fmt: skip

RECORD_COLUMNS = {
    # which run
    "run_id": "str", "cell_id": "str", "build": "str", "engine_build": "str",
    "attempt": "str", "block": "str", "order": "int", "outcome": "str", "reason": "str",
    "phase": "str", "is_counted": "bool", "is_current": "bool",
    "started_at": "str", "seconds": "float",
    # what was asked
    "suite": "str", "family": "str", "size": "str", "backend": "str", "dtype": "str",
    "device_kind": "str", "seed": "int", "round": "int", "data": "str", "window_size": "int",
    "work_phase": "str", "op": "str", "seq_len": "int", "batch_size": "int", "prompt_len": "int",
    "num_new_tokens": "int", "num_steps": "int", "num_devices": "int", "levels": "str",
    "model": "str", "kernels": "str", "optimizer": "str",
    # digests of settings: equal between the runs that may be compared
    "across_backends": "str", "across_families": "str", "across_scans": "str",
    "architecture": "str",
    # on what
    "linear_scan": "str", "attention": "str", "layers": "str", "program": "str",
    "device_name": "str", "build_device": "str", "node": "str", "job": "str",
    "cpu_model": "str", "num_cores": "int", "num_threads": "int", "memory_bytes": "int",
    "platform": "str", "python": "str", "versions": "str", "git_commit": "str",
    "data_digest": "str", "init_digest": "str", "num_segments": "int",
    # what it must cost
    "num_params": "int", "num_params_non_embedding": "int", "train_flops_per_token": "float",
    "cache_bytes_predicted": "float", "predicted_peak_memory_bytes": "float",
}  # fmt: skip
SAMPLE_COLUMNS = {"metric": "str", "value": "float", "unit": "str", "repeat": "int", "at": "int",
                  "field": "str"}  # fmt: skip
COLUMNS = RECORD_COLUMNS | SAMPLE_COLUMNS
RESOLVED = ("linear_scan", "attention", "layers", "program")  # of the engine, in its record


def load(store: Path) -> pd.DataFrame:
    """Every attempt of every run of a store; `is_counted` marks the attempt that stands for its
    run: the last completed one, else the last (`aerie` prefers one of the present build). Counts
    that a workload does not use are null."""
    store = Path(store)
    fingerprint = _fingerprint(store)
    index = store / INDEX
    with contextlib.suppress(OSError, ValueError):  # absent, unreadable or damaged: rebuilt below
        if (frame := _read_index(index, fingerprint)) is not None:
            return frame
    frame = frame_of(list(read_all(store)))
    if len(frame):
        with contextlib.suppress(OSError):  # a store that cannot be written can still be read
            _write_index(frame, index, fingerprint)
    return frame


def frame_of(records: list[Record]) -> pd.DataFrame:
    """The tidy frame of records, which come oldest attempt first within a run."""
    counted: dict[str, int] = {}
    for number, record in enumerate(records):
        before = counted.get(record.run_id)
        if (
            before is None
            or record.outcome == "completed"
            or records[before].outcome != "completed"
        ):
            counted[record.run_id] = number
    digests: dict[str, dict[str, str]] = {}
    rows = []
    for number, record in enumerate(records):
        if record.cell_id not in digests:
            digests[record.cell_id] = _digests(record.run)
        is_counted = counted[record.run_id] == number
        rows.append(_row(record) | digests[record.cell_id] | {"is_counted": is_counted})
    counts = [max(1, len(record.samples)) for record in records]
    wide = _typed({name: [row.get(name) for row in rows] for name in RECORD_COLUMNS})
    frame = wide.take(np.repeat(np.arange(len(rows)), counts)).reset_index(drop=True)
    samples = [sample for record in records for sample in (record.samples or (None,))]
    columns = {name: [getattr(s, name, None) for s in samples] for name in SAMPLE_COLUMNS}
    return pd.concat([frame, _typed(columns)], axis=1)


def write_parquet(frame: pd.DataFrame, path: Path) -> Path:
    """The frame as a file that pandas.read_parquet reads back."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False)
    return path


def _row(record: Record) -> dict[str, Any]:
    run, seen, costs = record.run, record.provenance, record.costs
    model, work = run["model"], run["workload"]
    resolved = seen.get("resolved_kernels") or {}
    used = {
        name: work.get(name) or None
        for name in ("op", "seq_len", "batch_size", "prompt_len", "num_new_tokens", "num_steps",
                     "num_devices")
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
                     "predicted_peak_memory_bytes")
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
            "versions": _words(seen.get("versions")),
            "cache_bytes_predicted": costs.get("cache_bytes"),
        }
    )


def _digests(run: dict[str, Any]) -> dict[str, str]:
    """What two runs must share to be compared across backends, families and variants of the scan,
    and for parity."""
    model = run["model"]
    rest = {k: v for k, v in run.items() if k not in ("seed", "round")}
    same_model = {k: v for k, v in model.items() if k not in FAMILY_FIELDS}
    shape = {k: v for k, v in model.items() if k not in (*SIZE_FIELDS, "family")}
    shape["is_local"] = model.get("window_size") is not None
    heads = model.get("num_kv_heads", 1)
    shape["num_kv_heads"] = "all" if heads == model["num_heads"] else heads
    without = {k: v for k, v in rest.items() if k not in ("backend", "kernels")}
    other = {k: v for k, v in run["kernels"].items() if k != "linear_scan"}
    return {
        "across_backends": _digest(without),
        "across_scans": _digest(rest | {"kernels": other}),
        "across_families": _digest(rest | {"model": same_model}),
        "architecture": _digest(shape),
    }


def _digest(values: Any) -> str:
    return hashlib.blake2b(_json(values).encode(), digest_size=6).hexdigest()


def _json(values: Any) -> str:
    return json.dumps(values, sort_keys=True)


def _words(values: dict[str, Any] | None) -> str | None:
    """`name=value, name=value`, or None where there is nothing."""
    return ", ".join(f"{k}={v}" for k, v in values.items() if v is not None) if values else None


def _typed(columns: dict[str, list] | dict[str, pd.Series]) -> pd.DataFrame:
    kinds = {"int": "Int64", "float": "float64", "bool": "boolean"}
    made = {}
    for name, values in columns.items():
        made[name] = pd.Series(values, dtype=kinds.get(COLUMNS[name], object))
    return pd.DataFrame(made)


def _fingerprint(store: Path) -> str:
    digest = hashlib.blake2b(f"{FRAME_SCHEMA} {sorted(COLUMNS)}".encode(), digest_size=16)
    names = []
    with contextlib.suppress(FileNotFoundError), os.scandir(store / "runs") as runs:
        for run in runs:
            if run.is_dir():
                with os.scandir(run.path) as files:
                    for file in files:
                        if file.name.endswith(".json") and not file.name.startswith("."):
                            stat = file.stat()
                            names.append(
                                f"{run.name}/{file.name} {stat.st_size} {stat.st_mtime_ns}"
                            )
    digest.update("\n".join(sorted(names)).encode())
    return digest.hexdigest()


def _read_index(path: Path, fingerprint: str) -> pd.DataFrame | None:
    if not path.exists():
        return None
    from pyarrow import parquet

    if (parquet.read_schema(path).metadata or {}).get(b"aerie") != fingerprint.encode():
        return None
    frame = parquet.read_table(path).to_pandas()
    # what is missing is None again, as in a frame of records
    objects = {name: frame[name].astype(object) for name in COLUMNS}
    return _typed({name: values.where(values.notna(), None) for name, values in objects.items()})


def _write_index(frame: pd.DataFrame, path: Path, fingerprint: str) -> None:
    from pyarrow import Table, parquet

    table = Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata(
        {**(table.schema.metadata or {}), b"aerie": fingerprint.encode()}
    )
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    parquet.write_table(table, temporary)
    temporary.replace(path)


class _CallableModule(ModuleType):
    """`analysis.load(store)` works although `analysis.load` is this module."""

    def __call__(self, store: Path) -> pd.DataFrame:
        return load(store)


sys.modules[__name__].__class__ = _CallableModule
