"""Trained parameters in a folder: what a quality run leaves, and what checkpoint=DIR starts from.

The folder holds model.safetensors, the parameters by the names of the parameter table, and
config.json, the model they belong to. A run is known by what they hold, not by where they lie.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path

import numpy as np

from implementations import parameters
from implementations.config import ModelConfig, build
from implementations.engine import Engine
from suites.harness.record import sync_folder, write_atomically
from suites.harness.run import Run, Start

KEEP_VARIABLE = "AERIE_KEEP_PARAMETERS"  # set by the parent: it does not affect the result
PARAMETERS, CONFIG = "model.safetensors", "config.json"
NAMES = ("family", "size")  # fields of a model that say what it is called
ONLY_AT_START = ("lambda_init",)  # and those of what training began from


def find(folder: str, model: ModelConfig) -> Start:
    """ValueError, in one line, where the folder is no checkpoint, or another model's."""
    path, where = Path(folder).expanduser().resolve(), f"checkpoint={folder}"
    if not path.is_dir():
        raise ValueError(f"{where}: no such folder.")
    for name in (CONFIG, PARAMETERS):
        if not (path / name).is_file():
            raise ValueError(
                f"{where}: has no {name}, so it is no checkpoint. Quality runs leave one in "
                "STORE/checkpoints/RUN_ID with cluster.keeps_parameters=true."
            )
    _check_model(path, model, where)
    _check_parameters(path / PARAMETERS, model, where)
    return Start(str(path), _digest(str(path / PARAMETERS), *_version(path / PARAMETERS)))


def load(run: Run, engine: Engine) -> None:
    """The engine's parameters become those of the run's checkpoint; ValueError where these have
    changed since the run was planned."""
    path, where = Path(run.checkpoint.path), f"checkpoint={run.checkpoint.path}"
    values = parameters.load(path / PARAMETERS, run.model)
    if _digest(str(path / PARAMETERS), *_version(path / PARAMETERS)) != run.checkpoint.digest:
        raise ValueError(f"{where}: {PARAMETERS} has changed since this run was planned.")
    engine.load_parameters(values)


def started(run: Run, start: Start) -> Run:
    """The same run without training: what it evaluates does not depend on how it would train."""
    default = type(run.optimizer)()
    work = replace(run.workload, phase="evaluate", num_steps=0, activation_checkpointing=False)
    if work.length_buckets:  # no bucket is the trained one: one run for all
        longest = work.length_buckets[-1]
        batch_size = work.batch_size * work.seq_len // longest
        work = replace(work, seq_len=longest, batch_size=batch_size)
    return replace(run, checkpoint=start, workload=work, optimizer=default)


def keep(folder: Path, engine: Engine) -> None:
    """Leaves what was trained in the folder, whole or not at all, where that was asked for."""
    if not os.environ.get(KEEP_VARIABLE):
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-{uuid.uuid4().hex[:8]}"
    try:
        parameters.save(temporary, engine.parameters())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(folder / PARAMETERS)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    write_atomically(folder / CONFIG, json.dumps(asdict(engine.config), indent=1))


def _check_model(path: Path, model: ModelConfig, where: str) -> None:
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"holds {type(values).__name__}, not keys and values")
        found = build(ModelConfig, values, CONFIG)
    except ValueError as error:
        raise ValueError(f"{where}: {CONFIG} is no model's: {error}") from None
    if differ := list(_differences(found, model)):
        more = f", and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise ValueError(f"{where}: is of another model: {differ[0]}{more}.")


def _check_parameters(path: Path, model: ModelConfig, where: str) -> None:
    """By the file's head alone: it may be large."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{where}: {PARAMETERS} is torn or no safetensors file: {error}") from None
    nothing = np.zeros((), np.float32)
    parameters.check(model, {n: np.broadcast_to(nothing, s) for n, s in shapes.items()}, where)


def _differences(found: ModelConfig, model: ModelConfig) -> Iterable[str]:
    for field in fields(ModelConfig):
        theirs, ours = getattr(found, field.name), getattr(model, field.name)
        if field.name not in (*NAMES, *ONLY_AT_START) and theirs != ours:
            yield f"it has {field.name}={theirs}, and {model.title} {field.name}={ours}"


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@cache
def _digest(path: str, written_ns: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
