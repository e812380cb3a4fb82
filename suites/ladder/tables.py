"""What parity shows: a row a level, a row a tensor, the first divergence, two sides of one run."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from implementations.config import ModelConfig
from suites import compose, parity
from suites.harness import plan
from suites.harness.record import record_path
from suites.harness.run import Run
from suites.ladder.check import (
    LEVELS,
    Error,
    dtype_of,
    error_of,
    kind_of,
    level_of,
    limit_of,
    section,
)

HEADER = ["level", "backend", "dtype", "what", "checks", "largest", "tolerance", "rms",
          "tolerance", "measured", "verdict", "worst at"]  # fmt: skip
TWINS = ("jax", "torch")
Shown = list[tuple[Run, dict[str, Any]]]  # runs, each with the record that counts
NONE = "-"
NOTE = (
    "largest: the largest difference over the largest true value of a tensor; rms: the same of "
    "root mean squares; measured: the largest error when the tolerance was set (tolerances.yaml)."
)


def rows_of(run: Run, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every check of one record, in the order of the ladder; errors that are no number are None."""
    found: dict[tuple, dict[str, Any]] = {}
    for sample in record["samples"]:
        if sample["field"] and "tolerance" in sample["metric"]:
            found.setdefault((sample["field"], sample["at"]), {})
    for sample in record["samples"]:
        if (key := (sample["field"], sample["at"])) in found:
            found[key][sample["metric"]] = sample["value"]
    return [
        _row(run, field, at, Error(values.get("relative_error", float("inf")),
                                   values.get("rms_error", float("inf"))),
             Error(values["tolerance"], values["rms_tolerance"]))
        for (field, at), values in found.items()
    ]  # fmt: skip


def _row(run: Run, field: str, at: int | None, error: Error, limit: Error) -> dict[str, Any]:
    is_number = error.largest < float("inf")
    return {
        "run_id": run.run_id,
        "family": run.model.family,
        "settings": settings_of(run.model),
        "backend": run.backend,
        "dtype": run.dtype,
        "kernels": kernels_of(run),
        "seed": run.seed,
        "level": level_of(field),
        "field": field,
        "at": at,
        "largest": error.largest if is_number else None,
        "rms": error.rms if is_number else None,
        "measured": section(run, dtype_of(field, run.dtype))
        .get(kind_of(field), {})
        .get("measured"),
        "tolerance": limit.largest,
        "rms_tolerance": limit.rms,
        "share": share if np.isfinite(share := error.share(limit)) else None,
        "is_within": not error.exceeds(limit),
    }


def by_level(rows: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The worst check of every level, backend and dtype."""
    return _table(rows, lambda row: LEVELS[row["level"]])


def by_tensor(rows: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The worst check of every kind of tensor: layers, seeds, families and kernels together."""
    return _table(rows, lambda row: kind_of(row["field"]))


def _table(rows: Iterable[dict[str, Any]], what_of: Callable[[dict], str]) -> list[list[str]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["level"], row["backend"], row["dtype"], what_of(row))
        groups.setdefault(key, []).append(row)
    made = []
    for (level, backend, dtype, what), members in sorted(groups.items(), key=lambda g: g[0][:3]):
        worst = max(members, key=_share)
        red = sum(not row["is_within"] for row in members)
        place = [worst["family"], worst["settings"], worst["kernels"], worst["field"]]
        if worst["at"] is not None:
            place.append(f"step {worst['at']}")
        made.append(
            [level, backend, dtype, what, f"{len(members):,}", number(worst["largest"]),
             number(worst["tolerance"]), number(worst["rms"]), number(worst["rms_tolerance"]),
             "twin" if worst["at"] is not None else number(worst["measured"]),
             f"RED ({red})" if red else "green", " ".join(filter(None, place))]
        )  # fmt: skip
    return made


def number(value: float | None) -> str:
    return NONE if value is None else f"{value:.1e}"


def _share(row: dict[str, Any]) -> float:
    return float("inf") if row["share"] is None else row["share"]


def divergence(rows: list[dict[str, Any]]) -> list[str]:
    """Lines that lead to the first check of one run that left its tolerance.

    The ladder is in order: a red op stands before all that is made of it, a red activation before
    all that it flows into. Layers that are whole are one line.
    """
    first = next((row for row in rows if not row["is_within"]), None)
    if first is None:
        return []
    num_red = sum(not row["is_within"] for row in rows)
    parts = ("family", "settings", "backend", "dtype", "kernels")
    name = " ".join(filter(None, (first[part] for part in parts)))
    lines = [f"{name}: first divergence at {first['field']}; {num_red} of {len(rows)} checks red"]
    activations = [row for row in rows if "/activations/" in row["field"]]
    broken = next((row for row in activations if not row["is_within"]), None)
    shown = [] if first["field"].split("/")[1] == "activations" else [first]
    if broken is not None:
        layer = _layer(broken)
        before = activations[: activations.index(broken)]
        inside = [row for row in before if _layer(row) == layer]
        whole = [row for row in before if row not in inside and _path(row).count(".") < 2]
        shown += [*whole, *inside, broken]
    else:
        kind = first["field"].rpartition("/")[0]
        same = [row for row in rows if row["field"].rpartition("/")[0] == kind]
        shown = same[max(0, same.index(first) - 3) : same.index(first) + 1]
    width = max(len(row["field"]) for row in shown)
    for row in shown:
        verdict = "ok " if row["is_within"] else "RED"
        lines.append(
            f"  {verdict}  {row['field']:<{width}}  {number(row['largest'])} of "
            f"{number(row['tolerance'])}, rms {number(row['rms'])} of "
            f"{number(row['rms_tolerance'])}"
        )
    return lines


def alike(divergences: list[list[str]]) -> Iterator[str]:
    """The first of those that begin at the same check, in full; the others by name."""
    groups: dict[str, list[list[str]]] = {}
    for lines in divergences:
        begins = lines[0].partition(": first divergence at ")[2].partition(";")[0]
        groups.setdefault(begins.partition("/")[2], []).append(lines)
    for first, *others in groups.values():
        yield from first
        if others:
            names = ", ".join(lines[0].partition(":")[0] for lines in others)
            yield f"  alike: {names}"


def _path(row: dict[str, Any]) -> str:
    return row["field"].split("/activations/")[1]


def _layer(row: dict[str, Any]) -> str:
    """layers.3, of layers.3.mixer.linear_q."""
    path = _path(row).split(".")
    return ".".join(path[:2]) if path[0] == "layers" else path[0]


# Beside the peer --------------------------------------------------------------------------------

PEER_MULTIPLE = 2.0  # of the peer's own error that ours may be; measured: at most 1.24
PEER_HEADER = ["backend", "family", "bfloat16, one document", "rms", "of the peer", "ratio",
               "verdict", "worst at"]  # fmt: skip


def beside_peer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """L7: our bfloat16 error beside that of an implementation of others, on the same model. Of each
    tensor as a root mean square: the largest of a few elements is chance."""
    one = [row for row in rows if row["level"] == "L7" and "/one document/" in row["field"]]
    key = ("family", "settings", "seed", "field")
    peer = {tuple(row[k] for k in key): row for row in one if row["backend"] == "transformers"}
    worst: dict[tuple, dict[str, Any]] = {}
    for row in one:
        other = peer.get(tuple(row[k] for k in key))
        if other is None or row["backend"] == "transformers" or row["field"].endswith("/loss"):
            continue
        what, _, tensor = row["field"].partition("/one document/")[2].partition("/")
        ratio = float("inf") if row["rms"] is None else row["rms"] / other["rms"]
        found = {
            "backend": row["backend"],
            "family": row["family"],
            "what": what,
            "rms": row["rms"],
            "peer_rms": other["rms"],
            "ratio": ratio if np.isfinite(ratio) else None,
            "is_within": ratio <= PEER_MULTIPLE,
            "tensor": tensor,
        }
        place = (row["backend"], row["family"], what)
        if place not in worst or ratio > (worst[place]["ratio"] or float("inf")):
            worst[place] = found
    return list(worst.values())


def peer_table(found: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [row["backend"], row["family"], row["what"], number(row["rms"]), number(row["peer_rms"]),
         NONE if row["ratio"] is None else f"{row['ratio']:.2f}",
         "green" if row["is_within"] else "RED", row["tensor"] or NONE]
        for row in found
    ]  # fmt: skip


# Two sides ------------------------------------------------------------------------------------


def beside(store: Path, shown: Shown, other: str, folder: Path | None) -> Iterator[dict]:
    """Rows of every run that has a partner: its tensors beside those of backend `other`, or of a
    run of equal settings (but the device) in another store."""
    partners = _runs_in(folder) if folder else [one for one in shown if one[0].backend == other]
    known = {_partner_key(run, folder): (run, record) for run, record in partners}
    for run, record in shown:
        if folder is None and run.backend in (other, "transformers"):
            continue
        mine = _tensors(store, run, record)
        theirs = _tensors(folder or store, *known.get(_partner_key(run, folder), (None, None)))
        if mine is None or theirs is None:
            continue
        ours, true = parity.load(mine), parity.load(theirs)
        for field in dict.fromkeys((*true, *ours)):
            error = error_of(ours.get(field), true[field]) if field in true else error_of(None, ())
            yield _row(run, field, None, error, limit_of(field, run))


def by_run(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [list(part) for _, part in groupby(rows, key=lambda row: row["run_id"])]


def _partner_key(run: Run, folder: Path | None) -> str:
    """Variants go by one name in both backends."""
    dropped = "device_kind" if folder else "backend"
    return str({key: value for key, value in run.to_json().items() if key != dropped})


def _runs_in(folder: Path) -> Iterator[tuple[Run, dict[str, Any]]]:
    for path in sorted((folder / "runs").glob("*")):
        records = plan.attempts(folder, path.name)
        if records and records[-1]["run"]["suite"] == "parity":
            yield Run.from_json(records[-1]["run"]), records[-1]


def _tensors(store: Path, run: Run | None, record: dict[str, Any] | None) -> Path | None:
    if run is None or record is None:
        return None
    path = record_path(store, run.run_id, record["attempt"]).with_suffix(".npz")
    return path if path.exists() else None


# Words ------------------------------------------------------------------------------------------


def name_of(run: Run) -> str:
    parts = (run.model.family, settings_of(run.model), run.backend, run.dtype, kernels_of(run))
    return " ".join(filter(None, parts))


def kernels_of(run: Run) -> str:
    """What is not automatic: `linear_scan=associative`."""
    words = [f"{setting}={name}" for setting, name in run.kernels.chosen.items()]
    return " ".join([*words, *(["compiled"] if run.kernels.compile else [])])


def settings_of(model: ModelConfig) -> str:
    """The choice of configs/settings that the model has, or `other`."""
    for name, values in _settings().items():
        if all(getattr(model, key) == value for key, value in values.items()):
            return name
    return "other"


@cache
def _settings() -> dict[str, dict[str, Any]]:
    folder = compose.CONFIGS / "settings"
    return {
        name: yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in compose.choices("settings")
    }
