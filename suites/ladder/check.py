"""One comparison of the ladder: a backend's tensor beside the true one, judged by two errors.

A field is named "L4/grad/layers.0.mlp.linear_up.weight": rung, what it is, which tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from implementations.engine import LANGUAGES, auto
from suites.harness.measure import sample
from suites.harness.record import Sample
from suites.harness.run import Run

LEVELS = {
    "L0": "parameter tree: names, shapes, values, round trip",
    "L1": "every op alone, float64",
    "L2": "every op alone, float32",
    "L3": "gradients of every input and parameter of every op",
    "L4": "whole model: activations, logits, gradients, prefill in chunks, decode",
    "L5": "optimizer steps",
    "L6": "final losses over seeds",
    "L7": "bfloat16, ops and whole model",
    "truth": "the equations themselves: finite differences, definitions",
}
OTHER_GATES = "gates"  # the section of tolerances.yaml for gates other than rg_lru
LADDER = tuple(level for level in LEVELS if level != "truth")  # what may be asked for


@dataclass(frozen=True)
class Error:
    """Largest difference over the largest true value; and both as root mean squares."""

    largest: float
    rms: float

    def exceeds(self, limit: "Error") -> bool:
        return self.share(limit) > 1

    def share(self, limit: "Error") -> float:
        """Of the limit that is used up: above 1 is too much."""
        pairs = ((self.largest, limit.largest), (self.rms, limit.rms))
        return max(error / most if most else np.inf if error else 0.0 for error, most in pairs)


WRONG = Error(float("inf"), float("inf"))  # not finite, not of the right shape, or not there


@dataclass(frozen=True)
class Check:
    """`note` says where within the field, when that is not the whole of it."""

    field: str
    ours: np.ndarray | None
    true: np.ndarray
    note: str = ""

    @cached_property
    def error(self) -> Error:
        return error_of(self.ours, self.true)


def error_of(ours: np.ndarray | None, true: np.ndarray) -> Error:
    """WRONG where ours is missing; where all true values are 0, they count as 1."""
    if ours is None or np.shape(ours) != np.shape(true):
        return WRONG
    true = np.asarray(true, np.float64)
    if not true.size:
        return Error(0.0, 0.0)
    difference = np.abs(np.asarray(ours, np.float64) - true)
    if not np.isfinite(difference).all():
        return WRONG
    largest = np.abs(true).max() or 1.0
    rms = np.sqrt(np.mean(true**2)) or 1.0
    return Error(float(difference.max() / largest), float(np.sqrt(np.mean(difference**2)) / rms))


def level_of(field: str) -> str:
    return field.partition("/")[0]


def kind_of(field: str) -> str:
    """What fields of one tolerance share: the field without its rung and its layer's number."""
    _, _, rest = field.partition("/")
    parts = rest.split(".")
    return ".".join("*" if part.isdigit() else part for part in parts)


def samples(check: Check, error: Error, limit: Error, at: int | None = None) -> Iterator[Sample]:
    """What a record keeps of a check; an error that is not finite has no number."""
    yield sample("tolerance", limit.largest, field=check.field, at=at)
    yield sample("rms_tolerance", limit.rms, field=check.field, at=at)
    if np.isfinite(error.largest):
        yield sample("relative_error", error.largest, field=check.field, at=at)
        yield sample("rms_error", error.rms, field=check.field, at=at)


def words(check: Check, error: Error, limit: Error) -> str:
    note = f" ({check.note})" if check.note else ""
    if not np.isfinite(error.largest):
        return f"{check.field}{note}: missing, not finite, or not of the right shape"
    if error.largest > limit.largest:
        return f"{check.field}{note}: relative error {error.largest:.2g} > {limit.largest:.2g}"
    return f"{check.field}{note}: RMS relative error {error.rms:.2g} > {limit.rms:.2g}"


# Tolerances ------------------------------------------------------------------------------------


@cache
def tolerances() -> dict[str, Any]:
    """tolerances.yaml: what `python -m suites.ladder.calibrate` measured, and allows."""
    text = (files("suites.ladder") / "tolerances.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def limit_of(field: str, run: Run) -> Error:
    """The tolerance of a field. What must be exact, the parameter tree, has none. ValueError where
    none was measured."""
    if level_of(field) == "L0":
        return Error(0.0, 0.0)
    dtype = dtype_of(field, run.dtype)
    entry = section(run, dtype).get(kind_of(field))
    if entry is None:
        raise ValueError(
            f"{kind_of(field)!r} in {dtype} is not in tolerances.yaml: aerie parity --calibrate."
        )
    return Error(entry["largest"], entry["rms"])


def dtype_of(field: str, dtype: str) -> str:
    """Under which tolerances stand; those of the truth apart."""
    return "truth" if level_of(field) == "truth" else dtype


def section(run: Run, dtype: str) -> dict[str, Any]:
    """Tolerances by kind of field: one set for both of our backends, one for a peer; for the
    kernels of Triton and Pallas those that must be wider, such as where a state is bfloat16; and
    for other gates than rg_lru what they need beyond all these."""
    name = section_of(run)
    found = tolerances()["peer" if name == "peer" else "ours"].get(dtype, {})
    if name in LANGUAGES:
        found = found | tolerances()[name].get(dtype, {})
    if has_other_gate(run):
        found = dict(found)
        for kind, entry in tolerances()[OTHER_GATES].get(dtype, {}).items():
            least = found.get(kind, entry)
            found[kind] = entry | {w: max(entry[w], least[w]) for w in ("largest", "rms")}
    return found


def has_other_gate(run: Run) -> bool:
    return "rg_lru" in run.model.pattern and run.model.gate != "rg_lru"


def section_of(run: Run) -> str:
    """Under which name the errors of a run are counted."""
    if run.backend == "transformers":
        return "peer"
    variants = auto(run.backend, run.device_kind) | run.kernels.chosen
    languages = {name.partition("_")[0] for name in variants.values()}
    return next((name for name in LANGUAGES if name in languages), "ours")


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 values, ties to even, as float32."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32).reshape(np.shape(value))
