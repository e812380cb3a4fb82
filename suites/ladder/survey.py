"""Many draws of the ladder, each request in a process of its own (child.py): what calibration and
the proof are made of."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import TypeVar

from suites.harness import provenance
from suites.harness.executors import environment
from suites.harness.run import Run

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Climb a run's ladder from other seeds, perhaps with a defect planted."""

    run: Run
    seeds: tuple[int, ...]
    defect: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"run": self.run.to_json()})


@dataclass(frozen=True)
class Draw:
    """One seed: the errors by field, in the order of the ladder; or why there are none."""

    seed: int
    errors: dict[str, tuple[float, float]]
    failure: str | None = None


def in_parallel(items: Iterable[Item], work: Callable[[Item, list[int]], Result]) -> Iterator:
    """(item, work(item, cores)) as they end, one item a core at a time."""
    cores = provenance.cores()
    free: SimpleQueue = SimpleQueue()
    for core in cores:
        free.put(core)

    def on_a_core(item: Item) -> tuple[Item, Result]:
        core = free.get()
        try:
            return item, work(item, [core])
        finally:
            free.put(core)

    with ThreadPoolExecutor(len(cores)) as pool:
        for future in as_completed([pool.submit(on_a_core, item) for item in items]):
            yield future.result()


def draws(request: Request, cores: list[int]) -> list[Draw]:
    """Of a fresh process; a last one without errors says why there are no more."""
    command = [sys.executable, "-m", "suites.ladder.child", request.to_json()]
    result = subprocess.run(
        command,
        env=environment(cores, request.run),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"seed"')]
    found = [Draw(**json.loads(line)) for line in lines]
    if len(found) < len(request.seeds):
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        why = f"exit code {result.returncode}: {last[:300]}"
        found.append(Draw(request.seeds[len(found)], {}, why))
    return found
