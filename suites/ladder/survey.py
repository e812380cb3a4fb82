"""Many draws of the ladder, each request in a fork of its own (child.py): what calibration and the
proof are made of."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from typing import TextIO, TypeVar

from suites.harness import provenance
from suites.harness.executors import environment
from suites.harness.run import Run

Item, Result = TypeVar("Item"), TypeVar("Result")
# What a fork finds imported, none of it ours: a defect is planted before ours is.
IMPORTED = {
    "jax": ("jax", "optax"),
    "torch": ("torch._dynamo",),
    "transformers": ("torch", "transformers"),
}


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


@dataclass(frozen=True)
class Nursery:
    """Where the requests of some cores are answered: a process for each backend imports it once,
    and forks for every request."""

    cores: list[int]
    log: TextIO  # of all: the last line is why a fork ended
    processes: dict[tuple[str, bool], subprocess.Popen] = field(default_factory=dict)

    def draws(self, request: Request) -> list[Draw]:
        """Of a fork; a last one without errors says why there are no more."""
        process, log_start = self._process(request.run), os.fstat(self.log.fileno()).st_size
        with suppress(BrokenPipeError):  # it is gone, as is seen below
            process.stdin.write(request.to_json() + "\n")
            process.stdin.flush()
        found, code = [], None
        for line in process.stdout:
            if line.startswith('{"seed"'):
                found.append(Draw(**json.loads(line)))
            elif line.startswith('{"ended"'):
                code = json.loads(line)["ended"]
                break
        if code is None:
            del self.processes[_key(request.run)]
            code = process.wait()
            if code == -signal.SIGINT:  # Ctrl-C is for all of us
                raise KeyboardInterrupt
        if len(found) < len(request.seeds):
            self.log.seek(log_start)
            last = (self.log.read().strip().splitlines() or ["no output"])[-1]
            why = f"exit code {code}: {last[:300]}"
            found.append(Draw(request.seeds[len(found)], {}, why))
        return found

    def _process(self, run: Run) -> subprocess.Popen:
        if (key := _key(run)) not in self.processes:
            self.processes[key] = subprocess.Popen(
                [sys.executable, "-m", "suites.ladder.child", *IMPORTED[run.backend]],
                env=environment(self.cores, run),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
            )
        return self.processes[key]


def _key(run: Run) -> tuple[str, bool]:
    """Runs of one key share what is imported: Triton reads then whether it interprets."""
    return run.backend, run.kernels.interpret


@contextmanager
def nursery(cores: list[int]) -> Iterator[Nursery]:
    with tempfile.TemporaryFile("a+", errors="replace") as log:
        opened = Nursery(cores, log)
        try:
            yield opened
        finally:
            for process in opened.processes.values():
                process.communicate()  # closes what it waits for


def in_parallel(items: Iterable[Item], work: Callable[[Item, Nursery], Result]) -> Iterator:
    """(item, work(item, nursery)) as they end, one item a core at a time."""
    with ExitStack() as stack:
        free: SimpleQueue = SimpleQueue()
        for core in (cores := provenance.cores()):
            free.put(stack.enter_context(nursery([core])))

        def on_a_core(item: Item) -> tuple[Item, Result]:
            mine = free.get()
            try:
                return item, work(item, mine)
            finally:
                free.put(mine)

        pool = ThreadPoolExecutor(len(cores))
        stack.callback(pool.shutdown, cancel_futures=True)
        for future in as_completed([pool.submit(on_a_core, item) for item in items]):
            yield future.result()
