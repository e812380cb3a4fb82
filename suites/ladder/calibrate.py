"""tolerances.yaml from measured noise: every field of every run of the ladder, over many seeds.

A tolerance is a multiple of the largest error seen. The multiples leave room for another machine's
order of summation, and are small enough that every planted defect is caught (prove.py).
"""

import math
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from implementations.config import GATES
from implementations.engine import LANGUAGES
from suites.harness import provenance
from suites.harness.run import Run
from suites.ladder.check import (
    OTHER_GATES,
    dtype_of,
    has_other_gate,
    kind_of,
    level_of,
    section_of,
    tolerances,
)
from suites.ladder.plan import gate, need_peer
from suites.ladder.survey import Draw, Request, in_parallel
from suites.ladder.tables import name_of

NUM_DRAWS = 20  # of Griffin, which has every mixer
NUM_OTHER_DRAWS = 7  # of each other family
NUM_GATE_DRAWS = 3  # of each other gate: what they need beyond rg_lru is kept
NUM_INTERPRETED_DRAWS = 5  # of each family: a minute each; what they need beyond `ours` is kept
MARGIN = {
    "truth": {"largest": 4.0, "rms": 4.0},  # of finite differences; FLOOR: of larger models' too
    "float64": {"largest": 4.0, "rms": 2.5},
    "float32": {"largest": 4.0, "rms": 2.5},
    "bfloat16": {"largest": 4.0, "rms": 1.5},  # each value is rounded for itself: it hardly varies
}
# Some units in the last place: what is exact here is summed in another order elsewhere.
FLOOR = {"float64": 2e-14, "float32": 2e-6, "bfloat16": 2e-6, "truth": 1e-8}
MOST_OF_AN_OP = 1e-12  # in float64: the promise of L1
# How many times farther than its disturbed twin a backend may be: see training.py. Measured over
# both backends of griffin and mqa, 200 steps: at most 5.1 (of a step), 2.2 (of a loss).
GROWTH = 15.0
SINGLE = ("loss", "one document/loss")  # kinds of which each is one number
Seen = dict[str, dict[str, dict[str, dict[str, float]]]]  # section, dtype, kind: worst
PATH = Path(__file__).with_name("tolerances.yaml")


# In griffin, which has every mixer, as the paper has it.
PLACE_OF_GATES = ("family=griffin", "settings=paper")


def calibrate(gates: list[str], *, on_end: Callable[[int, int, str], None]) -> Path:
    """Measures, and writes the file; `gates`, if any, are overrides that choose other gates, whose
    section is then widened by what they need here. ValueError where a run fails or breaks a
    promise."""
    chosen = gates or [f"gate={','.join(name for name in GATES if name != 'rg_lru')}"]
    runs = gate([*PLACE_OF_GATES, *chosen])
    if not gates:
        need_peer()
        runs = [*gate([]), *runs]
    elif not all(map(has_other_gate, runs)):
        raise ValueError(
            "--calibrate measures all, or gates alone: gate= must name them, and not rg_lru."
        )
    requests = [Request(run=run, seeds=tuple(range(_num_draws(run)))) for run in runs]
    seen: Seen = {name: {} for name in ("ours", *LANGUAGES, "peer", OTHER_GATES)}
    if gates:  # on top of what was measured before, perhaps on another machine
        seen = {name: _before(name) for name in seen}
    ends = in_parallel(requests, lambda request, nursery: nursery.draws(request))
    for number, (request, found) in enumerate(ends, start=1):
        for draw in found:
            _add(seen, request.run, draw)
        on_end(number, len(requests), name_of(request.run))
    for name in (*LANGUAGES, OTHER_GATES):
        seen[name] = {
            dtype: {k: entry for k, entry in fields.items() if _is_wider(seen, name, dtype, k)}
            for dtype, fields in seen[name].items()
        }
    PATH.write_text(_text(seen, tolerances() if gates else _head()), encoding="utf-8")
    return PATH


def _before(name: str) -> dict[str, dict[str, dict[str, float]]]:
    """A section of the file, as _add would have made it."""
    return {
        dtype: {
            kind: {"largest": e["measured"], "rms": e["measured_rms"], "n": e["n"]}
            for kind, e in fields.items()
        }
        for dtype, fields in tolerances()[name].items()
    }


def _num_draws(run: Run) -> int:
    if has_other_gate(run):
        return NUM_GATE_DRAWS
    if run.kernels.interpret:
        return NUM_INTERPRETED_DRAWS
    return NUM_DRAWS if run.model.family == "griffin" else NUM_OTHER_DRAWS


def _is_wider(seen: Seen, language: str, dtype: str, kind: str) -> bool:
    """Whether the kernels of a language need more than what the others leave them."""
    if kind not in seen["ours"].get(dtype, {}):
        return True
    theirs, ours = (
        tolerance(kind, *_measured(seen[name][dtype][kind]), dtype) for name in (language, "ours")
    )
    return theirs[0] > ours[0] or theirs[1] > ours[1]


def _measured(entry: dict[str, float]) -> tuple[float, ...]:
    """As the file holds it."""
    return tuple(float(f"{entry[which]:.2e}") for which in ("largest", "rms"))


def _add(seen: Seen, run: Run, draw: Draw) -> None:
    if draw.failure:
        raise ValueError(f"{name_of(run)}: {draw.failure}")
    by_dtype = seen[OTHER_GATES if has_other_gate(run) else section_of(run)]
    for field, (largest, rms) in draw.errors.items():
        level = level_of(field)
        if not math.isfinite(largest) or (level == "L1" and largest > MOST_OF_AN_OP):
            raise ValueError(f"{name_of(run)}: {field} is {largest:.1e} from the truth.")
        if level != "L0":
            fields = by_dtype.setdefault(dtype_of(field, run.dtype), {})
            entry = fields.setdefault(kind_of(field), {"largest": 0.0, "rms": 0.0, "n": 0})
            entry["largest"] = max(entry["largest"], largest)
            entry["rms"] = max(entry["rms"], rms)
            entry["n"] += 1


def tolerance(kind: str, measured: float, measured_rms: float, dtype: str) -> tuple[float, float]:
    """(largest, rms) for measured errors. Of a single number both are one, and vary as one."""
    margin = MARGIN[dtype]
    rms = margin["largest" if kind in SINGLE else "rms"]
    return _rounded_up(margin["largest"] * measured, dtype), _rounded_up(rms * measured_rms, dtype)


def _rounded_up(value: float, dtype: str) -> float:
    """To two digits; at least FLOOR."""
    value = max(value, FLOOR[dtype])
    exponent = math.floor(math.log10(value)) - 1
    return float(f"{math.ceil(value / 10**exponent - 1e-9) * 10.0**exponent:.1e}")


def _head() -> dict[str, Any]:
    versions = {k: v for k, v in provenance.versions().items() if v}
    return {
        "date": date.today().isoformat(),
        "machine": provenance.cpu_model(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": "aerie parity --calibrate",
        "draws": NUM_DRAWS,
    }


HEAD = ("date", "machine", "versions", "command", "draws")


def _text(seen: Seen, values: dict[str, Any]) -> str:
    head = {key: values[key] for key in HEAD}
    lines = [
        "# What parity allows, by kind of field and dtype: a multiple (margin) of the largest",
        "# error measured. largest: of one element, over the largest true one; rms: both as root",
        "# mean squares. n: tensors compared, over seeds, families, settings, layers, kernels and",
        "# both backends; triton and pallas: what these kernels, interpreted, need beyond those;",
        "# peer: transformers' RecurrentGemma; gates: what other gates than rg_lru need beyond",
        "# all these (--calibrate gate=... adds what they need on another machine). Written by",
        "# the command: do not edit.",
        *(f"{key}: {value!r}" if isinstance(value, str) else f"{key}: {value}"
          for key, value in head.items()),
        "margin:",
        *(f"  {dtype}: {{largest: {m['largest']}, rms: {m['rms']}}}"
          for dtype, m in MARGIN.items()),
        f"training: {{growth: {GROWTH}}}",
    ]  # fmt: skip
    for section, by_dtype in seen.items():
        lines.append(f"{section}:")
        for dtype, fields in by_dtype.items():
            lines.append(f"  {dtype}:")
            lines += [
                f"    {kind!r}: {_entry(kind, entry, dtype)}" for kind, entry in fields.items()
            ]
    return "\n".join(lines) + "\n"


def _entry(kind: str, entry: dict[str, Any], dtype: str) -> str:
    measured, measured_rms = _measured(entry)
    largest, rms = tolerance(kind, measured, measured_rms, dtype)
    return (
        f"{{largest: {largest:.1e}, rms: {rms:.1e}, measured: {measured:.2e}, "
        f"measured_rms: {measured_rms:.2e}, n: {entry['n']}}}"
    )
