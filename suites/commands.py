"""What each command does. Returns exit codes: 0 as planned, 1 not, 2 the request was wrong."""

import itertools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from suites import compose, display, gate, reports
from suites.harness import corpora, pack, plan, provenance, rounds, slurm, tasks
from suites.harness.plan import Planned
from suites.harness.run import DataConfig, Run
from suites.harness.sweep import Result, sweep

AS_PLANNED, NOT_AS_PLANNED, WRONG_REQUEST = 0, 1, 2
MAX_DIFFERENCES = 20  # of a report and its samples that are printed
T = TypeVar("T")


class WrongRequest(SystemExit):
    """Exit code 2, its one line already said."""

    def __init__(self) -> None:
        super().__init__(WRONG_REQUEST)


def run(
    overrides: list[str],
    store: Path,
    *,
    rerun_stale: bool = False,
    verify_frontier: bool = False,
    as_json: bool = False,
) -> int:
    request, planned = planned_of(overrides, store)
    ahead = _ahead(planned, store, rerun_stale, verify_frontier)
    result, planned = run_pending(
        request, planned, store, overrides, rerun_stale, verify_frontier, ahead
    )
    path = reports.report_path(store, None, request.title)
    if result.outcomes or not path.exists():
        frame = reports.of_runs(reports.frame_of(store), [item.run for item in planned])
        reports.write(
            frame,
            store,
            path.parent,
            title=request.title,
            command=reports.command_of("run", overrides, store),
            redraw=reports.command_of("report", overrides, store),
            question=request.question,
        )
    if as_json:
        display.print_json(
            {
                "num_runs": len(planned),
                "num_started": result.num_started,
                "outcomes": dict(_final(planned, result)),
                "num_unsettled": rounds.num_unsettled(store, planned),
                "report": str(path),
                "runs": [_with_outcome(item, result) for item in planned],
                "proxies": [_with_outcome(item, result) for item in ahead],
            }
        )
    else:
        if result.num_started:
            reports.print_side_by_side(store, {item.run.run_id for item in planned})
        _print_ends(planned, ahead, result, rounds.num_unsettled(store, planned))
        print(f"report: {path}")
    return exit_code([*ahead, *planned], result)


def show_plan(overrides: list[str], store: Path, *, as_json: bool = False) -> int:
    _, planned = planned_of(overrides, store, bare=compose.BARE_PLAN)
    if as_json:
        display.print_json([item.to_json() for item in planned])
        return AS_PLANNED
    if len(planned) == 1:
        display.print_card(planned[0])
    else:
        header = ["run_id", "suite", "model", "backend", "dtype", "work", "seed", "round",
                  "num_params", "num_params_non_embedding", "train_flops_per_token",
                  "cache_bytes", "predicted_peak_memory", "reason"]  # fmt: skip
        display.print_table(header, map(display.plan_row, planned))
        reasons = Counter(item.reason for item in planned)
        pending = f"{sum(item.is_pending for item in planned)}"
        if any(item.is_pending and item.until_ci for item in planned):
            pending = f"at most {pending}"
        words = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        print(f"{display.count(len(planned), 'run')}, {pending} would start: {words}.")
    if missing := sum(item.is_pending for item in _ahead(planned, store)):
        print(f"aerie run adds {_proxies(missing)}, to verify the speeds.")
    return AS_PLANNED


def report(
    asked: list[str], store: Path, out: Path | None, *, title: str | None, names: list[str]
) -> int:
    """Of all of the store, or of the runs that an experiment or overrides name."""
    need_records(store)
    frame = reports.frame_of(store)
    command, question = reports.command_of("report", [], store), None
    with one_line():
        if asked:
            overrides = reports.overrides_of(asked)
            request = compose.read(overrides)
            runs = [run for settings in request.settings for run in plan.expand(settings)]
            frame = reports.of_runs(frame, runs)
            command = reports.command_of("run", overrides, store)
            if frame.empty:
                raise ValueError(f"{store} has no run of {' '.join(asked)}; first: {command}")
            title, question = title or request.title, request.question
        redraw = reports.command_of("report", asked, store)
        title = title or reports.TITLE
        folder = reports.report_path(store, out, title).parent
        if names:
            for path in reports.draw(frame, folder, redraw, names):
                print(f"figure: {path}")
            return AS_PLANNED
        folder.mkdir(parents=True, exist_ok=True)
    path = reports.write(
        frame, store, folder, title=title, command=command, redraw=redraw, question=question
    )
    print(f"report: {path}")
    return AS_PLANNED


def verify(asked: str | None, store: Path, out: Path | None) -> int:
    """Holds a written report against its samples, and these against the records of the store."""
    with one_line():
        path = reports.written_path(asked, store, out)
        from analysis.verify import verify

        found = verify(path, None if store == reports.DEFAULT_STORE else store)
    for note in found.notes:
        print(f"note: {note}")
    for difference in found.differences[:MAX_DIFFERENCES]:
        print(difference)
    if (more := len(found.differences) - MAX_DIFFERENCES) > 0:
        print(f"... and {more:,} more.")
    cells = ", ".join(f"{count:,} {where}" for where, count in found.cells.items())
    if found.differences:
        print(f"{path}: {display.count(len(found.differences), 'difference')} in {cells}.")
        return NOT_AS_PLANNED
    print(f"{path}: verified: {cells}.")
    return AS_PLANNED


def doctor(store: Path, *, as_json: bool = False) -> int:
    from suites.harness.data import default_cache

    existing = next(path for path in (store.resolve(), *store.resolve().parents) if path.exists())
    cache = default_cache()
    found = provenance.machine() | {
        "devices": _devices(),
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "results": str(store),
        "results_free_bytes": shutil.disk_usage(existing).free,
        "is_results_writable": os.access(existing, os.W_OK),
        "data_cache": str(cache),
        "data_cache_bytes": sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
        if cache.exists()
        else 0,
        "load_average": list(os.getloadavg()),
        "num_out_of_memory_kills": provenance.num_out_of_memory_kills(),
    }
    missing = [name for name in ("jax", "torch") if found["versions"][name] is None]
    if as_json:
        display.print_json(found | {"missing": missing})
    else:
        rows = []
        for key, value in found.items():
            if key.endswith("_bytes"):
                value = display.size(value)
            elif isinstance(value, dict):
                value = ", ".join(f"{k} {v or 'not installed'}" for k, v in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(str, value)) or "none"
            rows.append([key, str(value)])
        display.print_table(["what", "found"], rows)
    return NOT_AS_PLANNED if missing or not found["is_results_writable"] else AS_PLANNED


def prepare(overrides: list[str], *, workers: int | None = None, as_json: bool = False) -> int:
    with one_line():
        request = compose.read(overrides, bare=compose.BARE_PLAN)
        configs = data_configs(request.settings)
    for config in configs:
        corpus = prepare_data(config, workers)
        facts = {
            "data": corpus.name,
            "num_train_tokens": len(corpus.train_tokens),
            "num_held_out_tokens": len(corpus.held_out_tokens),
            "vocab_size": corpus.vocab_size,
            "bytes_per_token": corpus.bytes_per_token,
            "unigram_bits_per_byte": corpus.unigram_bits_per_byte,
            "data_digest": corpus.digest,
        }
        if as_json:
            display.print_json(facts)
        else:
            display.print_table(["what", "found"], [[k, str(v)] for k, v in facts.items()])
    return AS_PLANNED


# Requests ---------------------------------------------------------------------------------------


@contextmanager
def one_line() -> Iterator[None]:
    """What goes wrong inside is the user's to fix: one line, exit code 2, nothing started."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError, slurm.Unreachable) as error:
        print(f"aerie: {' '.join(str(error).split())}", file=sys.stderr)
        raise WrongRequest from None


def planned_of(
    overrides: list[str], store: Path, *, bare: Iterable[str] = ()
) -> tuple[compose.Request, list[Planned]]:
    with one_line():
        if store.exists() and not store.is_dir():
            raise ValueError(f"--results {store} is a file; name a folder.")
        request = compose.read(overrides, bare=bare)
        runs = [run for settings in request.settings for run in plan.expand(settings)]
        data_configs(request.settings)
        until = rounds.asked(request.settings)
        return request, rounds.settle(store, plan.plan(store, runs), until)


def data_configs(settings: list[dict[str, Any]]) -> list[DataConfig]:
    """The corpora of a request, each once, their files looked for. Tasks are none."""
    read = (made for made in settings if plan.reads_corpus(made))
    found = dict.fromkeys(plan.data_config(made) for made in read)
    found = {config: None for config in found if not tasks.is_task(config)}
    for config in found:
        corpora.check(config)
        if config.paths:
            corpora.find_files(config)
    return list(found)


def need_records(store: Path) -> None:
    with one_line():
        if not (store / "runs").is_dir():
            raise ValueError(
                f"no records in {store}; run something first, or name their folder: --results DIR."
            )


def need_submissions(store: Path) -> None:
    if not (store / "submissions").is_dir():
        raise ValueError(
            f"nothing was submitted from {store}; submit something first (aerie submit), or name "
            "another folder: --results DIR."
        )


def need_writable(store: Path) -> None:
    with one_line():
        store.mkdir(parents=True, exist_ok=True)
        if not os.access(store, os.W_OK):
            raise ValueError(f"--results {store} cannot be written.")


def did_you_mean(option: str, value: str, known: list[str]) -> str:
    close = get_close_matches(value, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{option} {value!r} is not known; known: {', '.join(known)}.{hint}"


# Running ----------------------------------------------------------------------------------------


def todo(
    planned: list[Planned], rerun_stale: bool = False, verify_frontier: bool = False
) -> list[Planned]:
    chosen = [
        item
        for item in planned
        if item.is_pending
        or (item.is_stale and rerun_stale)
        or (verify_frontier and item.outcome == "out_of_memory_predicted")
    ]
    return rounds.along(chosen, planned)


def _ahead(
    planned: list[Planned], store: Path, rerun_stale: bool = False, verify_frontier: bool = False
) -> list[Planned]:
    with one_line():
        return gate.ahead(store, planned, todo(planned, rerun_stale, verify_frontier))


def run_pending(
    request: compose.Request,
    planned: list[Planned],
    store: Path,
    overrides: list[str],
    rerun_stale: bool,
    verify_frontier: bool,
    ahead: Iterable[Planned] = (),
) -> tuple[Result, list[Planned]]:
    """Runs what is pending, of `ahead` first; says so where nothing is."""
    with one_line():
        cluster = request.cluster
    missing = [item for item in ahead if item.is_pending]
    pending = [*missing, *todo(planned, rerun_stale, verify_frontier)]
    ids = {item.run.run_id for item in pending}
    stale = [item for item in planned if item.is_stale and item.run.run_id not in ids]
    if not pending:
        spared = sum(item.is_needless for item in planned)
        words = f", or are not needed ({spared})" if spared else ""
        print(f"nothing to run: all {len(planned)} runs have ended before{words}.", file=sys.stderr)
    if stale:
        reasons = Counter(item.reason for item in stale)
        words = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        print(f"{words}; run them again with --rerun-stale.", file=sys.stderr)
    if not pending:
        return Result(), planned
    need_writable(store)
    if missing:
        words = f"{_proxies(len(missing))} {'runs' if len(missing) == 1 else 'run'} first"
        print(f"{words}: speeds without them would be UNVERIFIED.", file=sys.stderr)
    for config in dict.fromkeys(item.run.data for item in pending if reads_text(item.run)):
        prepare_data(config, None)
    proven = [item.run for item in planned if item.outcome == "out_of_memory" and not item.is_stale]
    result = Result()
    with display.SweepProgress(len(pending)) as progress:
        progress.expect(pending)
        for lanes, group in itertools.groupby(pending, lambda i: pack.num_lanes(cluster, i.run)):
            part = sweep(
                store,
                list(group),
                replace(cluster, runs_in_parallel=lanes),
                on_start=progress.started,
                on_end=progress.ended,
                on_spare=progress.spared,
                verify_frontier=verify_frontier,
                proven=proven,
            )
            result.add(part)
            if result.is_interrupted:
                break
    if result.elsewhere:
        print(
            f"another aerie run measures {display.count(len(result.elsewhere), 'run')} of these.",
            file=sys.stderr,
        )
    if result.is_interrupted:
        left = len(pending) - len(result.outcomes) - len(result.not_needed)
        again = reports.command_of(request.command, overrides, store)
        left = display.count(left, "run")
        print(f"interrupted; {left} not started. To go on: {again}", file=sys.stderr)
    return result, rounds.spared(planned, result.not_needed)


def counted(store: Path, item: Planned) -> dict[str, Any] | None:
    """The newest attempt of the present build, else the newest."""
    records = plan.attempts(store, item.run.run_id)
    return next((r for r in reversed(records) if r["build"] == item.build), (records or [None])[-1])


def reads_text(run: Run) -> bool:
    """Whether a run trains on a corpus; timing runs draw random tokens."""
    is_trained = run.workload.phase == "train" and run.workload.num_steps > 0
    return is_trained and not tasks.is_task(run.data)


def prepare_data(config: DataConfig, workers: int | None) -> Any:
    """The corpus, extracted first if need be, with progress on stderr."""
    from suites.harness import data

    shown = -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        if percent // 10 > shown // 10 or (sys.stderr.isatty() and percent > shown):
            shown = percent
            end = "\r" if sys.stderr.isatty() and percent < 100 else "\n"
            print(f"data {config.name}: {percent}%", end=end, file=sys.stderr, flush=True)

    with one_line():
        return data.prepare(config, workers=workers, progress=progress)


def _final(planned: list[Planned], result: Result) -> Counter:
    return Counter(_end(item, result) or "not run" for item in planned)


def _end(item: Planned, result: Result) -> str | None:
    """How a run has ended, or that it is not needed; None where it is still to be run."""
    ended = result.outcomes.get(item.run.run_id)
    return ended or (rounds.STATE if item.is_needless else item.outcome)


def exit_code(planned: list[Planned], result: Result) -> int:
    fine = all(
        _end(item, result) == rounds.STATE
        or plan.ended_as_planned(_end(item, result), is_search=item.run.workload.max_batch_size > 0)
        for item in planned
    )
    return AS_PLANNED if fine and not result.is_interrupted else NOT_AS_PLANNED


def _with_outcome(item: Planned, result: Result) -> dict[str, Any]:
    return item.to_json() | {"outcome": _end(item, result)}


# Words ------------------------------------------------------------------------------------------


def _print_ends(
    planned: list[Planned], ahead: list[Planned], result: Result, num_unsettled: int
) -> None:
    print(f"\n{display.count(len(planned), 'run')}: {_ends(planned, result)}.")
    if ahead:
        print(f"{_proxies(len(ahead))}: {_ends(ahead, result)}.")
    ends = [(item.run, _end(item, result)) for item in ahead]
    lost = dict.fromkeys(
        f"{run.model.family} {run.backend} {run.dtype}"
        for run, outcome in ends
        if outcome != "completed"
    )
    if lost:
        print(f"Speeds of {', '.join(lost)} stay UNVERIFIED: their parity is not green.")
    if num_unsettled:
        are = "is" if num_unsettled == 1 else "are"
        blocks = f"{display.count(num_unsettled, 'comparison')} {are}"
        most = max(item.run.round for item in planned if item.until_ci is not None) + 1
        print(f"{blocks} not as narrow as asked: suite.rounds={2 * most} allows more rounds.")
    seen: dict[str, set[int]] = {}
    for item in planned:
        if item.block:
            seen.setdefault(item.run.suite, set()).add(item.run.round)
    few = [len(numbers) for numbers in seen.values() if len(numbers) < 6]
    if few:
        number = display.count(min(few), "round") + (" is" if min(few) == 1 else " are")
        print(f"{number} too few for a verdict; use suite.rounds=6 or more.")
    seeds = {item.run.seed for item in planned if reads_text(item.run)}
    if len(seeds) == 1:
        print("Quality is of one seed: its spread is not known; use suite.seeds=[0,1,2].")


def _ends(planned: list[Planned], result: Result) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in _final(planned, result).items())


def _proxies(number: int) -> str:
    return f"{number:,} parity {'proxy' if number == 1 else 'proxies'}"


def _devices() -> list[str]:
    """Accelerators that this machine shows, without asking a framework."""
    gpu = provenance.device_name("h100")
    gpus = [gpu] if gpu != "h100" else []
    tpus = [str(path) for path in sorted(Path("/dev").glob("accel*"))]
    return [f"cpu: {provenance.cpu_model()}", *gpus, *tpus]
