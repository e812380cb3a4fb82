"""How long a run may take, with an interval, before it is paid for.

Best known is its own cell, then runs of its suite and backend on its kind of device, scaled by
their work; where there is neither, the work over a guessed rate, and the interval says how little
that is worth.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from implementations.engine import CPU
from suites.harness import rounds
from suites.harness.measure import DEVICES
from suites.harness.plan import Planned
from suites.harness.run import Run

MAX_RECORDS = 2000  # of the store that are looked at, the newest
START_S = 20.0  # to import a framework, make a model and compile it, where nothing is known
GUESSED_MFU = 0.2
CPU_FLOPS_PER_S = 5e9  # of a core, where nothing is known
# Factors that the interval spans round the estimate, by what it is made from.
OWN_CELL, SAME_KIND, GUESS = (0.8, 1.25), (0.4, 2.5), (0.2, 5.0)


@dataclass(frozen=True)
class Seconds:
    low: float
    likely: float
    high: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(self.low * factor, self.likely * factor, self.high * factor)


NOTHING = Seconds(0.0, 0.0, 0.0)


class History:
    """Wall times of the completed runs of a store."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self._of_cell: dict[str, list[float]] = {}
        self._of_kind: dict[tuple, list[tuple[float, float]]] = {}  # (work, seconds)
        for record in records:
            run, costs, seconds = record["run"], record["costs"], record["seconds"]
            if record["outcome"] != "completed" or "train_flops_per_token" not in costs:
                continue
            self._of_cell.setdefault(record["cell_id"], []).append(seconds)
            work = flops(run["workload"], costs)
            kind = (run["suite"], run["backend"], run["device_kind"])
            self._of_kind.setdefault(kind, []).append((work, seconds))

    @classmethod
    def of(cls, store: Path) -> "History":
        return cls(_newest(store))

    def seconds(self, item: Planned) -> Seconds:
        """Of one run; where it is a round that may not be needed, from nothing on."""
        known = self._seconds(item)
        may_be_spared = item.until_ci is not None and item.run.round >= rounds.first_look()
        return replace(known, low=0.0) if may_be_spared else known

    def _seconds(self, item: Planned) -> Seconds:
        run = item.run
        if own := self._of_cell.get(run.cell_id):
            middle, (low, high) = median(own), OWN_CELL
            return Seconds(min(own) * low, middle, max(own) * high)
        work = flops(vars(run.workload), item.costs)
        if like := self._of_kind.get((run.suite, run.backend, run.device_kind)):
            middle, (low, high) = _scaled(work, like), SAME_KIND
        else:
            middle, (low, high) = START_S + work / _rate(run), GUESS
        return Seconds(middle * low, middle, middle * high)


def flops(work: dict[str, Any], costs: dict[str, Any]) -> float:
    """Model FLOPs of a whole run, roughly: for the ratio between two runs of one suite."""
    per_token = costs["train_flops_per_token"]
    tokens = work["batch_size"] * (
        work["seq_len"] * max(work["num_steps"], work["repeats"], 1)
        + (work["prompt_len"] + work["num_new_tokens"]) * max(work["repeats"], 1) / 3
    )
    return per_token * tokens


def _scaled(work: float, like: list[tuple[float, float]]) -> float:
    """Seconds for this work, by the runs that are nearest in work; what any run takes to start, the
    shortest of all at most, is not scaled."""
    start = min(START_S, min(seconds for _, seconds in like)) * 0.9
    nearest = sorted(like, key=lambda one: abs(one[0] - work))[:5]
    return median(start + (seconds - start) * work / done for done, seconds in nearest)


def _rate(run: Run) -> float:
    device = next((one for one in DEVICES if run.device_kind in one.name.lower()), None)
    if run.device_kind == CPU or device is None:
        return CPU_FLOPS_PER_S
    peaks = device.flops_per_s
    return GUESSED_MFU * peaks.get(run.dtype, min(peaks.values()))


def _newest(store: Path) -> Iterator[dict[str, Any]]:
    """The newest records; attempts sort by time, over runs too."""
    paths = sorted((store / "runs").glob("*/[!.]*.json"), key=lambda path: path.name)
    for path in paths[-MAX_RECORDS:]:
        try:
            yield json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # the planner names it where it matters
            continue
