"""Executes one run in this process and writes its record: every end becomes a typed outcome.

The only place that catches Exception. The parent writes the record of a child that could not.
"""

import hashlib
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
import uuid
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from implementations.engine import (
    CompileError,
    Compiler,
    Engine,
    Unsupported,
    load_compiler,
    load_engine,
)
from implementations.rank import Rank
from suites.harness import checkpoint, data, measure, provenance, ranks, stop
from suites.harness.record import PHASES, Record, Sample, record_path, with_room, write
from suites.harness.run import Run

if TYPE_CHECKING:  # the parent's side: a child that imported it would start later
    from suites.harness.executors import Ended

# What allocators, loaders and thread pools say when an address space limit stops them.
_STARVED = re.compile(
    r"out of memory|RESOURCE_EXHAUSTED|can't allocate memory|bad_alloc|cannot allocate memory|"
    r"MemoryError|failed to map segment|Allocation failed|can't start new thread|"
    r"Thread creation failed|pthread_create failed|Resource temporarily unavailable",
    re.IGNORECASE,
)
GOES_ON = ("preempted", "failed")  # ends after which a run is run again, from its checkpoint
_STAMP = "%Y%m%dT%H%M%S%f"  # an attempt's name begins with it
NEAR_LIMIT = 0.9  # of the memory allowed: a process that dies here died of memory


@dataclass(frozen=True, kw_only=True)
class Task:
    """One attempt of one run, as the parent hands it to a child: all that a record repeats."""

    run: Run
    build: str
    attempt: str
    parent_pid: int
    owner: dict[str, Any] = field(default_factory=dict)  # of the claim: who started it
    found: dict[str, Any] = field(default_factory=dict)  # what the build is made of, where it runs
    costs: dict[str, Any] = field(default_factory=dict)
    block: str | None = None
    order: int | None = None

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"run": self.run.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Task":
        return cls(**(values | {"run": Run.from_json(values["run"])}))

    def record(self, outcome: str, **values: Any) -> Record:
        return Record(
            run_id=self.run.run_id,
            cell_id=self.run.cell_id,
            build=self.build,
            attempt=self.attempt,
            outcome=outcome,
            run=self.run.to_json(),
            costs=self.costs,
            block=self.block,
            order=self.order,
            **values,
        )


def new_attempt() -> str:
    """Sorts by time; unique over hosts and processes."""
    now = datetime.now(UTC).strftime(_STAMP)
    return f"{now}-{provenance.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def began(attempt: str) -> datetime:
    return datetime.strptime(attempt.partition("-")[0], _STAMP).replace(tzinfo=UTC)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def execute(
    store: Path,
    task: Task,
    started: float | None = None,
    others: ranks.Others | None = None,
) -> Record:
    """Runs the task, writes its record, returns it. This process was started at `started` of
    time.monotonic(), which is one clock for all processes of a machine. Of several ranks the first
    alone writes."""
    started_at = utc_now()
    is_first = Rank.of().index == 0
    measure.begin(phase_path(store, task) if is_first else None, started)
    task = replace(task, build=build_now(task.run))  # code may have changed since the plan
    keeper = checkpoint.keep(store, task.run, _segment(task, started_at), saves=is_first)
    samples: list[Sample] = []
    found: dict[str, Any] = {}

    def made(outcome: str, reason: str | None, phase: str) -> Record:
        measure.phase("write")
        times = measure.times()
        return task.record(
            outcome,
            reason=reason,
            phase=None if outcome == "completed" else phase,
            provenance=seen(task.run) | found | keeper.found(),
            samples=tuple(samples),
            started_at=started_at,
            seconds=sum(times.values()),
            times=times,
        )

    def leave(record: Record) -> None:
        with_room(lambda: write(store, record))
        if record.outcome not in GOES_ON:
            keeper.remove()

    blame = partial(_blame, store, task, provenance.num_out_of_memory_kills())
    if others is not None:
        others.watch(lambda *death: leave(made(*blame(*death))))
    outcome, reason, trace = "completed", None, ""
    try:
        _measure(task.run, samples, found)
    except stop.Stopped as error:
        outcome, reason = "preempted", _first_line(error)
    except Unsupported as error:
        outcome, reason = "unsupported", _first_line(error)
    except measure.Diverged as error:
        outcome, reason = "diverged", _first_line(error)
    except measure.InvalidMeasurement as error:
        outcome, reason = "invalid_measurement", _first_line(error)
    except measure.OutOfMemoryPredicted as error:
        outcome, reason = "out_of_memory_predicted", _first_line(error)
    except CompileError as error:
        outcome, reason = "compile_error", str(error)
    except Exception as error:
        outcome, reason = _outcome_of(error), f"{type(error).__name__}: {_first_line(error)}"
        trace = traceback.format_exc()
    end = (outcome, reason, measure.current_phase())
    if not is_first:
        if outcome != "completed":
            sys.stderr.write(trace)
            ranks.report(*end)
        return made(*end)
    if others is not None:
        # a collective that fails is most often that of a rank that has died
        if outcome == "failed" and (death := others.death()) is not None:
            end = blame(*death)
        others.let_go()
    if trace:
        path = record_path(store, task.run.run_id, task.attempt).with_suffix(".traceback.txt")
        path.write_text(trace, encoding="utf-8")
    record = made(*end)
    leave(record)
    return record


def _blame(
    store: Path,
    task: Task,
    kills_before: int | None,
    rank: int,
    returncode: int,
    report: dict[str, Any],
) -> tuple[str, str, str]:
    """Outcome, reason and phase of a run that ends with the death of one of its ranks."""
    from suites.harness.executors import Ended

    if report:
        return report["outcome"], f"rank {rank}: {report['reason']}", report["phase"]
    kills = provenance.num_out_of_memory_kills()
    if kills is not None and kills_before is not None:
        kills -= kills_before
    log = record_path(store, task.run.run_id, task.attempt).with_suffix(".log")
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    outcome, reason = verdict(Ended(returncode, num_out_of_memory_kills=kills), text)
    return outcome, f"rank {rank}: {reason}", measure.current_phase()


def build_now(run: Run) -> str:
    """The build key of the code, the libraries and the device as they are found now."""
    device = provenance.device_name(run.device_kind)
    return provenance.build_key(run.suite, run.backend, device)


def seen(run: Run) -> dict[str, Any]:
    """What is known of machine and code without an engine."""
    return provenance.machine() | {
        "device_kind": run.device_kind,
        "build_device": provenance.device_name(run.device_kind),
        "device_name": provenance.device_name(run.device_kind),
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
    }


def _segment(task: Task, started_at: str) -> dict[str, Any]:
    """Where and when this process works on its run."""
    return {
        "attempt": task.attempt,
        "host": provenance.node(),
        "job": provenance.job_id(),
        "device_name": provenance.device_name(task.run.device_kind),
        "started_at": started_at,
    }


def phase_path(store: Path, task: Task) -> Path:
    """Where a running child says what it is doing; the parent removes it."""
    return record_path(store, task.run.run_id, f".phase-{task.attempt}")


def last_phase(store: Path, task: Task) -> str:
    return (_said(phase_path(store, task)) or {}).get("phase", PHASES[0])


def times_of_killed(store: Path, task: Task, seconds: float) -> dict[str, float]:
    """Where the time of a child went that was killed after so many seconds."""
    said = _said(phase_path(store, task)) or {"phase": PHASES[0], "times": {}}
    times, phase = said["times"], said["phase"]
    rest = max(seconds - sum(times.values()), 0.0)
    return times | {phase: times.get(phase, 0.0) + rest}


def running_progress(store: Path, run_id: str) -> dict[str, Any] | None:
    """{attempt, phase, done, total, loss, since} of a run that is running; None where none says
    so."""
    prefix = ".phase-"
    for path in sorted((store / "runs" / run_id).glob(f"{prefix}*.json"), reverse=True):
        attempt = path.stem.removeprefix(prefix)
        if not record_path(store, run_id, attempt).exists() and (said := _said(path)):
            keys = ("phase", "done", "total", "loss", "since")
            return {"attempt": attempt} | {key: said.get(key) for key in keys}
    return None


def _said(path: Path) -> dict[str, Any] | None:
    """What a child has said of itself; None where it has not, or not to the end."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def verdict(ended: "Ended", log: str) -> tuple[str, str]:
    """Outcome and reason of a death without a record, from its signal, its log and its memory."""
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no output")
    name = signal.Signals(-ended.returncode).name if ended.returncode < 0 else ""
    how = f"killed by {name}" if name else f"exited with {ended.returncode}"
    if ended.returncode == -signal.SIGKILL:
        if ended.num_out_of_memory_kills:
            return "out_of_memory", "killed (SIGKILL) by the kernel's out-of-memory killer"
        near = ended.peak_rss_bytes > NEAR_LIMIT * provenance.memory_bytes()
        if ended.num_out_of_memory_kills is None and near:
            return (
                "out_of_memory",
                "killed (SIGKILL): most likely the kernel's out-of-memory killer",
            )
        return "failed", f"{how}, and the kernel counts no out-of-memory kill"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    is_limited = limit != resource.RLIM_INFINITY
    starved = [line.strip() for line in log.splitlines() if _STARVED.search(line)]
    if starved:
        return "out_of_memory", f"{how}: {starved[-1][:300]}"
    if is_limited and name and ended.peak_virtual_bytes > NEAR_LIMIT * limit:
        return "out_of_memory", f"{how} near the address space limit of {limit:,} bytes"
    return "failed", f"{how} before it could write a record: {last[:300]}"


def _measure(run: Run, samples: list[Sample], found: dict[str, Any]) -> None:
    """Appends samples and provenance as they come: what was measured before an end is kept."""
    found["load_average"] = list(os.getloadavg())
    suite = import_module(f"suites.{run.suite}")
    is_run = run.workload.topology is None
    measure.phase("import")
    engine_class = (load_engine if is_run else load_compiler)(run.backend)
    found["num_threads"] = measure.num_cpu_threads()
    stop.check()
    measure.phase("init")
    start = time.perf_counter()
    engine = _open(engine_class, run)
    samples.append(measure.sample("init_time_s", time.perf_counter() - start))
    found["resolved_kernels"] = dict(engine.resolved_kernels)
    if engine.device_name != run.device_kind:
        found["device_name"] = engine.device_name
    if is_run:  # what is compiled alone has no values
        found["init_digest"] = provenance.parameters_digest(engine.parameters())
    measure.phase("measure")
    for sample in suite.measure(run, engine):
        samples.append(sample)  # one by one: extend() would lose them all at an exception
    measure.phase("write")
    if is_run:
        found["data_digest"] = _data_digest(run)


def _open(kind: type[Engine] | type[Compiler], run: Run) -> Engine | Compiler:
    settings = {"dtype": run.dtype, "kernels": run.kernels}
    if run.workload.topology is not None:
        return kind(run.model, topology=run.workload.topology, **settings)
    where = {"device_kind": run.device_kind, "num_devices": run.workload.num_devices}
    engine = kind(run.model, seed=run.seed, **where, **settings)
    engine.synchronize()
    return engine


def _data_digest(run: Run) -> str:
    """What the run's batches hold, in their order: equal digests, equal data."""
    work = run.workload
    if batches := getattr(import_module(f"suites.{run.suite}"), "batches", None):
        return data.batch_digest(batches(run))
    tokens_BT = data.random_tokens(
        work.batch_size,
        work.seq_len + 1 if work.seq_len else work.prompt_len,
        vocab_size=run.model.vocab_size,
        seed=run.seed,
    )
    return hashlib.blake2b(tokens_BT.tobytes(), digest_size=16).hexdigest()


def _outcome_of(error: Exception) -> str:
    chain, link = [], error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    for link in chain:
        text = f"{type(link).__name__}: {link}"
        if measure.is_out_of_memory(link) or (limited and _STARVED.search(text)):
            return "out_of_memory"
    return "compile_error" if measure.current_phase() == "compile" else "failed"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:500]
