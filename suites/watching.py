"""What is shown of jobs that run: status, logs, wait. Exit codes as in suites/commands.py."""

import sys
import time
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from suites import commands, display
from suites.commands import AS_PLANNED, NOT_AS_PLANNED, one_line
from suites.harness import claims, execute, launch, plan, reconcile, rounds, states, submission
from suites.harness.plan import Ends
from suites.harness.reconcile import JobView
from suites.harness.record import OUTCOMES
from suites.harness.states import TaskState
from suites.harness.submission import Submission
from suites.harness.sweep import BLOCK

EVERY_S = 10.0  # between two looks at a queue
MAX_ROWS = 20  # of runs that are shown while they run
# States of runs that have not ended; then of those that have, and left no result.
WAITING = ("planned", "queued", "running", "stopping", "to_retry")
LEFT = ("lost", "given_up")


@dataclass
class Progress:
    """How one submission goes."""

    made: Submission
    counts: Counter = field(default_factory=Counter)  # state or outcome -> runs
    reasons: Counter = field(default_factory=Counter)  # why jobs wait, in Slurm's words
    seconds_left: float | None = None
    num_jobs: int = 0  # that have not ended
    spared: set[str] = field(default_factory=set)  # runs that are not needed

    @property
    def is_open(self) -> bool:
        return any(self.counts[state] for state in WAITING)

    def to_json(self) -> dict[str, Any]:
        return {
            "submission": self.made.id,
            "user": self.made.user,
            "title": self.made.title,
            "created_at": self.made.created_at,
            "clusters": [cluster.name for cluster in self.made.clusters],
            "runs": dict(self.counts),
            "waiting_for": dict(self.reasons),
            "seconds_left": self.seconds_left,
            "num_left": self.made.num_left,
        }


@dataclass
class Look:
    """All that a status shows, of one moment."""

    submissions: list[Progress]
    outcomes: dict[str, Counter]  # suite -> outcome -> runs
    running: list[dict[str, Any]]
    silent: str | None
    troubles: list[str]  # what could not be written, a line each


def status(overrides: list[str], store: Path, *, watch: bool = False, as_json: bool = False) -> int:
    """Submissions that have not ended, what runs now, and outcomes by suite; with overrides of
    those runs alone."""
    wanted, spared = None, set()
    if overrides:
        _, planned = commands.planned_of(overrides, store)
        wanted = {item.run.run_id: item.run.suite for item in planned}
        spared = {item.run.run_id for item in planned if item.is_needless}
    if not watch:
        return _print(look(store, wanted, spared), store, as_json=as_json)
    console = Console()
    if not console.is_terminal:
        raise_not_a_terminal()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            seen = look(store, wanted, spared)
            live.update(_page(seen, store), refresh=True)
            if not any(one.is_open for one in seen.submissions):
                break
            time.sleep(EVERY_S)
    return _print(seen, store)


def look(store: Path, wanted: dict[str, str] | None = None, spared: Container[str] = ()) -> Look:
    """Settles what has ended, and counts; `wanted` (run_id -> suite) limits it to some runs, of
    which some are known to be `spared`."""
    with one_line():
        view = reconcile.reconcile(store)
    ends = plan.ends(store, wanted)
    jobs: dict[str, list[JobView]] = {}
    for job in view.jobs:
        jobs.setdefault(job.made.id, []).append(job)
    names = (place.name for place in (store / "claims").glob("[!.]*"))
    claimed = {name for name in names if not name.startswith(BLOCK)}
    made = [
        _progress(one, jobs.get(one.id, []), ends, claimed, wanted)
        for one in submission.read(store)
        if one.id in jobs or wanted is not None
    ]
    outcomes: dict[str, Counter] = {}
    for end in ends.values():
        outcomes.setdefault(end.suite, Counter())[end.counted()] += 1
    for run_id, suite in (wanted or {}).items():
        if run_id not in ends:
            is_spared = run_id in spared or any(run_id in one.spared for one in made)
            outcomes.setdefault(suite, Counter())[rounds.STATE if is_spared else plan.NEW] += 1
    running = list(_running(store, claimed if wanted is None else claimed & wanted.keys()))
    made = [one for one in made if one.counts]
    return Look(made, outcomes, running, view.silent, view.troubles)


def _progress(
    made: Submission,
    jobs: list[JobView],
    ends: dict[str, Ends],
    claimed: set[str],
    wanted: dict[str, str] | None,
) -> Progress:
    found = Progress(made, num_jobs=len(jobs), spared=_spared(made, ends))
    state_of = {run_id: job.state for job in jobs for run_id in job.run_ids}
    for run_ids in made.run_ids_of.values():
        for run_id in run_ids:
            if wanted is None or run_id in wanted:
                if run_id in found.spared:
                    found.counts[rounds.STATE] += 1
                    continue
                end = ends.get(run_id)
                state = states.run_state(
                    end.outcomes if end else (),
                    state_of.get(run_id),
                    is_claimed=run_id in claimed,
                    num_before=end.num_before(made.stamp) if end else 0,
                )
                found.counts[state] += 1
    found.reasons = Counter(
        job.seen.reason
        for job in jobs
        if job.state is TaskState.QUEUED and job.seen and job.seen.reason
    )
    found.seconds_left = _seconds_left(made, jobs)
    return found


def _spared(made: Submission, ends: dict[str, Ends]) -> set[str]:
    """What is not needed of a submission's runs and was not measured, of jobs that have begun."""
    found: set[str] = set()
    for (array, index), run_ids in made.run_ids_of.items():
        left = {run_id for run_id in run_ids if not _has_ended(made, ends.get(run_id))}
        if 0 < len(left) < len(run_ids):
            found |= left & rounds.not_needed(made.store, made.adaptive(array, index)).keys()
    return found


def _has_ended(made: Submission, end: Ends | None) -> bool:
    """Whether a run has an attempt since it was submitted."""
    return end is not None and len(end.attempts) > end.num_before(made.stamp)


def _seconds_left(made: Submission, jobs: list[JobView]) -> float | None:
    """Until the last job may end, were as many to run at once as do now; None while none runs."""
    running = [job for job in jobs if job.state is TaskState.RUNNING]
    if not running:
        return None
    left = 0.0
    for job in jobs:
        elapsed = (job.seen.elapsed_s or 0.0) if job in running and job.seen else 0.0
        left += max(made.arrays[job.array].seconds - elapsed, 0.0)
    return left / len(running)


def _running(store: Path, run_ids: set[str]) -> Iterator[dict[str, Any]]:
    """What is measured now, and how far it is."""
    for run_id in sorted(run_ids):
        owner = claims.owner(store, run_id)
        if owner and claims.is_alive(owner):
            progress = execute.running_progress(store, run_id) or {}
            yield {"run_id": run_id, "node": owner["host"], "job": owner.get("job"), **progress}


def logs(store: Path, name: str, *, follow: bool = False) -> int:
    """What a run printed at its newest attempt; of one that never began, what its job printed."""
    with one_line():
        run_id = _find_run(store, name)
        path = _log(store, run_id)
        if path is None:
            raise ValueError(f"run {run_id} has printed nothing: it has not begun, or was silent.")
    print(f"{path}:", file=sys.stderr)
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            if text := file.read():
                print(text, end="", flush=True)
            elif not follow or claims.owner(store, run_id) is None:
                return AS_PLANNED
            else:
                time.sleep(0.5)


def wait(
    store: Path,
    names: list[str],
    *,
    timeout_s: float | None = None,
    every_s: float = EVERY_S,
    as_json: bool = False,
) -> int:
    """Returns when the submissions (all, where none is named) have ended: 0 where every run ended
    as planned, 1 where one did not or the time is over."""
    with one_line():
        commands.need_submissions(store)
        made = [submission.find(store, name) for name in names] or submission.read(store)
    made.sort(key=lambda one: one.stamp)  # of a run that several have, the last one counts
    last: dict[str, Submission] = {}
    for one in made:
        run_ids = [run_id for ids in one.run_ids_of.values() for run_id in ids]
        if not one.is_cancelled:  # what never got into the queue is no end either
            run_ids += [item.run.run_id for item, _ in one.left()]
        last |= dict.fromkeys(run_ids, one)
    ids, start, before = {one.id for one in made}, time.monotonic(), None
    while True:
        seen = look(store, dict.fromkeys(last, ""))
        left = [one for one in seen.submissions if one.made.id in ids and one.num_jobs]
        counts = sum((one.counts for one in left), Counter())
        words = ", ".join(f"{count} {state}" for state, count in counts.items())
        if left and words != before and not as_json:
            print(f"{datetime.now():%H:%M:%S} {words}", file=sys.stderr, flush=True)
        before = words
        is_over = timeout_s is not None and time.monotonic() - start > timeout_s
        if not left or is_over:
            break
        time.sleep(every_s)
    ends = plan.ends(store, last)
    found = [(end.counted(last[run_id].stamp), end.is_search) for run_id, end in ends.items()]
    outcomes = Counter(outcome for outcome, _ in found)
    spared = {one.id: _spared(one, ends) for one in made}
    lacking = last.keys() - ends.keys()
    if num_spared := sum(run_id in spared[last[run_id].id] for run_id in lacking):
        outcomes[rounds.STATE] = num_spared
    if missing := len(lacking) - num_spared:
        outcomes["left"] = missing
    if as_json:
        display.print_json({"is_over_time": bool(left), "outcomes": dict(outcomes)})
    else:
        words = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        print(f"{'not ended yet' if left else 'ended'}: {words}.")
    is_fine = all(plan.ended_as_planned(outcome, is_search=search) for outcome, search in found)
    return AS_PLANNED if is_fine and not left and not missing else NOT_AS_PLANNED


def _find_run(store: Path, name: str) -> str:
    found = {path.name for path in (store / "runs").glob(f"{name}*")}
    for made in submission.read(store):
        found |= {r for ids in made.run_ids_of.values() for r in ids if r.startswith(name)}
    if len(found) != 1:
        what = "no run" if not found else f"{len(found)} runs"
        raise ValueError(f"{what} {name!r} in {store}; aerie plan lists run ids.")
    return found.pop()


def _log(store: Path, run_id: str) -> Path | None:
    """The run's newest log; of a run that never began, the newest of its jobs that has printed."""
    if own := sorted((store / "runs" / run_id).glob("[!.]*.log")):
        return own[-1]
    found = {}
    for made in submission.read(store):
        for (array, index), run_ids in made.run_ids_of.items():
            if run_id in run_ids and (path := launch.log_of(made, array, index)).exists():
                found[path] = path.stat()
    said = [path for path, stat in found.items() if stat.st_size]
    return max(said, key=lambda path: found[path].st_mtime_ns, default=None)


# Words ------------------------------------------------------------------------------------------


def raise_not_a_terminal() -> None:
    with one_line():
        raise ValueError("--watch needs a terminal; for scripts use aerie wait.")


def _print(seen: Look, store: Path, *, as_json: bool = False) -> int:
    if as_json:
        rows = [
            {"suite": suite, "outcome": outcome, "num_runs": count}
            for suite, by_outcome in sorted(seen.outcomes.items())
            for outcome, count in by_outcome.items()
        ]
        display.print_json(
            {
                "submissions": [one.to_json() for one in seen.submissions],
                "outcomes": rows,
                "running": seen.running,
                "silent": seen.silent,
                "troubles": seen.troubles,
            }
        )
        return AS_PLANNED
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    console.print(_page(seen, store))
    return AS_PLANNED


def _page(seen: Look, store: Path) -> Group:
    parts: list[Any] = []
    if seen.silent:
        parts.append(Text(f"Slurm does not answer: {seen.silent}", style="yellow"))
    parts += [Text(line, style="yellow") for line in seen.troubles]
    if seen.submissions:
        total = sum((one.counts for one in seen.submissions), Counter())
        columns = [s for s in (*WAITING, *LEFT, rounds.STATE, *OUTCOMES) if total[s]]
        rows = [_row(one, columns) for one in seen.submissions]
        header = ["submission", "title", "cluster", "user", *columns, "time left", "waits for"]
        parts.append(display.table(header, rows))
        parts += [
            Text(
                f"{one.made.id}: {display.count(one.made.num_left, 'run')} did not fit in the queue"
            )
            for one in seen.submissions
            if one.made.num_left and not one.made.is_cancelled
        ]
    if seen.running:
        rows = [_running_row(one) for one in seen.running[:MAX_ROWS]]
        parts.append(display.table(["run", "node", "job", "phase", "done", "loss", "since"], rows))
        if more := len(seen.running) - MAX_ROWS:
            parts += [Text(f"and {more} more")] if more > 0 else []
    if not seen.outcomes:
        parts.append(Text(f"no records in {store}."))
        return Group(*parts)
    outcomes = sorted({outcome for by in seen.outcomes.values() for outcome in by})
    rows = [
        [suite, *(str(by[o]) if by[o] else display.NONE for o in outcomes)]
        for suite, by in sorted(seen.outcomes.items())
    ]
    parts.append(display.table(["suite", *outcomes], rows))
    number = sum(sum(by.values()) for by in seen.outcomes.values())
    parts.append(Text(f"{display.count(number, 'run')}; {len(seen.running)} being measured now."))
    return Group(*parts)


def _row(one: Progress, columns: list[str]) -> list[str]:
    left = display.NONE if one.seconds_left is None else display.duration(one.seconds_left)
    counts = [str(one.counts[state]) if one.counts[state] else display.NONE for state in columns]
    clusters = ",".join(cluster.name for cluster in one.made.clusters)
    reasons = ", ".join(one.reasons) or display.NONE
    return [one.made.id, one.made.title, clusters, one.made.user, *counts, left, reasons]


def _running_row(one: dict[str, Any]) -> list[str]:
    done, total = one.get("done"), one.get("total")
    share = f"{done} of {total}" if total else display.NONE
    since = one.get("since")
    ago = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds() if since else None
    return [
        one["run_id"],
        one["node"],
        one["job"] or display.NONE,
        one.get("phase") or display.NONE,
        share,
        display.NONE if one.get("loss") is None else f"{one['loss']:.3f}",
        display.NONE if ago is None else display.duration(ago),
    ]
