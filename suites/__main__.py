"""The command `aerie`: what it offers, in words. The work is in commands.py, imported when used."""

import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WRONG_REQUEST = 2
ClickException = typer.BadParameter.__mro__[2]  # typer carries click in other places by version

app = typer.Typer(
    name="aerie",
    help="Measures MQA-Transformer, Hawk and Griffin against each other, in JAX and in PyTorch.",
    epilog="Overrides: key=value, key=a,b (a sweep), key=[1,2] (a list). "
    "Start with: aerie run experiment=quickstart",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Text and tokens.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")


def _complete(incomplete: str) -> Iterator[str]:
    """Groups and their choices, as the files say; no framework, no Hydra."""
    group, equals, _ = incomplete.partition("=")
    for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir()):
        if not equals:
            yield f"{folder.name}="
        elif folder.name == group:
            files = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
            yield from sorted(f"{group}={path.with_suffix('').as_posix()}" for path in files)


def _share(typed: str | None) -> str | None:
    """2% or 0.02, as the number that suite.until_ci takes."""
    if typed is None:
        return None
    try:
        number = float(typed.removesuffix("%")) / (100 if typed.endswith("%") else 1)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise typer.BadParameter(f"{typed!r} is no share above 0 and below 1; write 2% or 0.02.")
    return f"{number:.9g}"


def _with(overrides: list[str] | None, until_ci: str | None) -> list[str]:
    """What was typed, and the option as the setting that it is."""
    return [*(overrides or []), *([f"suite.until_ci={until_ci}"] if until_ci else [])]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Hydra overrides, e.g. suite=training_speed.", autocompletion=_complete),
]
Results = Annotated[Path, typer.Option("--results", help="Folder of the records.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Rerun = Annotated[bool, typer.Option("--rerun-stale", help="Run again what an older build ran.")]
Verify = Annotated[
    bool, typer.Option("--verify-frontier", help="Try points that are predicted not to fit.")
]
UntilCi = Annotated[
    str | None,
    typer.Option(
        "--until-ci",
        metavar="SHARE",
        callback=_share,
        help="2% or 0.02: end the rounds of a comparison when its intervals are as narrow; "
        "suite.rounds is then the most, and 20 unless it is named.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the batch files; write and submit nothing.")
]
Submissions = Annotated[
    list[str] | None, typer.Argument(metavar="[SUBMISSION]...", help="Ids, or their beginnings.")
]
RAW = Path("results/raw")


@app.command()
def run(
    overrides: Overrides = None,
    results: Results = RAW,
    rerun_stale: Rerun = False,
    verify_frontier: Verify = False,
    until_ci: UntilCi = None,
    as_json: Json = False,
) -> None:
    """Run what is not finished, then print the comparison and write the report."""
    from suites import commands

    raise typer.Exit(
        commands.run(
            _with(overrides, until_ci),
            results,
            rerun_stale=rerun_stale,
            verify_frontier=verify_frontier,
            as_json=as_json,
        )
    )


@app.command()
def plan(
    overrides: Overrides = None,
    results: Results = RAW,
    until_ci: UntilCi = None,
    as_json: Json = False,
) -> None:
    """List the runs, what each costs, and why it would run. Starts nothing."""
    from suites import commands

    raise typer.Exit(commands.show_plan(_with(overrides, until_ci), results, as_json=as_json))


@app.command()
def submit(
    overrides: Overrides = None,
    results: Results = RAW,
    dry_run: DryRun = False,
    rerun_stale: Rerun = False,
    verify_frontier: Verify = False,
    until_ci: UntilCi = None,
    as_json: Json = False,
) -> None:
    """Show the bill, submit what is not finished to the cluster (cluster=slurm_gpu), and return."""
    from suites import jobs

    raise typer.Exit(
        jobs.submit(
            _with(overrides, until_ci),
            results,
            dry_run=dry_run,
            rerun_stale=rerun_stale,
            verify_frontier=verify_frontier,
            as_json=as_json,
        )
    )


@app.command()
def status(
    overrides: Overrides = None,
    results: Results = RAW,
    watch: Annotated[bool, typer.Option("--watch", help="Look again until all has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Show submissions, what runs now and outcomes by suite; with overrides, of those runs."""
    from suites import watching

    raise typer.Exit(watching.status(overrides or [], results, watch=watch, as_json=as_json))


@app.command()
def logs(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run id, or its beginning.")],
    results: Results = RAW,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Print on while it runs.")] = False,
) -> None:
    """Print what a run printed at its newest attempt; of one that never began, what its job did."""
    from suites import watching

    raise typer.Exit(watching.logs(results, run_id, follow=follow))


@app.command()
def cancel(
    submissions: Submissions = None,
    results: Results = RAW,
    all_: Annotated[bool, typer.Option("--all", help="All of yours that have not ended.")] = False,
    as_json: Json = False,
) -> None:
    """Take submissions out of the queue and stop what runs of them."""
    from suites import jobs

    raise typer.Exit(jobs.cancel(results, submissions or [], all_=all_, as_json=as_json))


@app.command()
def retry(
    results: Results = RAW,
    reason: Annotated[
        list[str] | None,
        typer.Option("--reason", help="An outcome, repeatable. Default: all without a result."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Submit again what was submitted and ended without a result, used-up retries or not."""
    from suites import jobs

    raise typer.Exit(
        jobs.retry(results, reasons=tuple(reason or ()), dry_run=dry_run, as_json=as_json)
    )


@app.command()
def wait(
    submissions: Submissions = None,
    results: Results = RAW,
    timeout: Annotated[
        float | None, typer.Option("--timeout", help="Seconds; then exit code 1.")
    ] = None,
    every: Annotated[float, typer.Option("--every", help="Seconds between two looks.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Return when submissions have ended: for scripts. Exit code 1 where a run has no result."""
    from suites import watching

    raise typer.Exit(
        watching.wait(results, submissions or [], timeout_s=timeout, every_s=every, as_json=as_json)
    )


@app.command()
def collect(
    results: Results = RAW,
    out: Annotated[Path | None, typer.Option("--out", help="Default: records.parquet.")] = None,
    as_json: Json = False,
) -> None:
    """Settle what has ended, and write all records as one Parquet file."""
    from suites import jobs

    raise typer.Exit(jobs.collect(results, out, as_json=as_json))


@app.command()
def report(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERIMENT | OVERRIDE...]",
            help="Only these runs, and what verifies them: quickstart, or suite=... family=...",
            autocompletion=_complete,
        ),
    ] = None,
    results: Results = RAW,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; default: beside the records.")
    ] = None,
    title: Annotated[
        str | None, typer.Option("--title", help="Default: what is asked for.")
    ] = None,
    figure: Annotated[
        list[str] | None,
        typer.Option("--figure", help="Draw this figure alone, as SVG and PNG; repeatable."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compute every cell of a written report (its folder, its report.html or its "
            "EXPERIMENT) again from the samples; exit code 1 where one differs.",
        ),
    ] = False,
) -> None:
    """Write report.html, and the same as Markdown, LaTeX, CSV, Parquet, SVG and PNG."""
    from suites import commands

    asked = overrides or []
    if verify:
        if figure or title or len(asked) > 1:
            raise typer.BadParameter("--verify takes one report, and neither --figure nor --title.")
        raise typer.Exit(commands.verify(asked[0] if asked else None, results, out))
    raise typer.Exit(commands.report(asked, results, out, title=title, names=figure or []))


@app.command()
def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERIMENT | OVERRIDES... | OLD.parquet NEW.parquet]",
            help="Of these runs alone (default: all records); or two files of records.",
            autocompletion=_complete,
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            help="backend (default), family, linear_scan, attention, layers, or any setting that "
            "varies: seq_len, model.window_size, ...",
        ),
    ] = None,
    ours: Annotated[
        str | None, typer.Option("--ours", help="Default: all but the baseline.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help="Default: torch, mqa, sequential, plain; else as in configs/, or the first.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Repeatable. Default: the headlines of each suite."),
    ] = None,
    fail_above: Annotated[
        str | None,
        typer.Option(
            "--fail-above", help="Of two files: exit code 1 where NEW is worse by more, as 3%."
        ),
    ] = None,
    results: Results = RAW,
    as_json: Json = False,
) -> None:
    """Print paired ratios with intervals and verdicts; or whether NEW is worse than OLD."""
    from suites import comparing

    metrics, files = tuple(metric or ()), [*filter(comparing.is_records, arguments or [])]
    if files:
        if len(files) != 2 or len(arguments) != 2:
            raise typer.BadParameter("two files of records are compared: OLD.parquet NEW.parquet.")
        if by or ours or baseline:
            raise typer.BadParameter("two files are compared as they are, without --by or sides.")
        paths = [Path(text) for text in files]
        raise typer.Exit(
            comparing.compare_files(paths, metrics=metrics, fail_above=fail_above, as_json=as_json)
        )
    if fail_above is not None:
        raise typer.BadParameter("--fail-above needs two files: OLD.parquet NEW.parquet.")
    raise typer.Exit(
        comparing.compare(
            arguments or [],
            results,
            by=by or "backend",
            ours=ours,
            baseline=baseline,
            metrics=metrics,
            as_json=as_json,
        )
    )


@app.command()
def parity(
    overrides: Overrides = None,
    results: Results = RAW,
    level: Annotated[
        list[str] | None,
        typer.Option("--level", help="L0 to L7, repeatable. Default: all but the long L5 and L6."),
    ] = None,
    against: Annotated[
        str, typer.Option("--against", help="float64, jax, torch, or another --results folder.")
    ] = "float64",
    prove: Annotated[
        bool, typer.Option("--prove", help="Plant defects: does the ladder catch each?")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the noise; write tolerances.yaml.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Climb the parity ladder in both backends. Exit code 1 where a check is red."""
    from suites.ladder import commands

    if prove or calibrate:
        if level or against != "float64" or (prove and (calibrate or overrides)):
            raise typer.BadParameter("--prove and --calibrate stand alone: they take all.")
        if prove:
            raise typer.Exit(commands.prove(as_json=as_json))
        raise typer.Exit(commands.calibrate(overrides or []))
    raise typer.Exit(
        commands.parity(
            overrides or [],
            results,
            levels=tuple(level or ()),
            against=against,
            as_json=as_json,
        )
    )


@app.command("compile")
def compile_(overrides: Overrides = None, results: Results = RAW, as_json: Json = False) -> None:
    """Compile a model for a TPU that is not here, topology=v5e:2x2: its memory, or why not."""
    from suites import ahead

    raise typer.Exit(ahead.compile_(overrides or [], results, as_json=as_json))


@app.command()
def doctor(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="cluster=NAME, cluster.KEY=VALUE.", autocompletion=_complete),
    ] = None,
    results: Results = RAW,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds that the job may wait in the queue.")
    ] = 300.0,
    no_job: Annotated[bool, typer.Option("--no-job", help="Do not look at a node.")] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine has; with cluster=NAME whether that cluster takes our jobs."""
    if overrides:
        from suites.doctor import command

        code = command.doctor(
            overrides, results, timeout_s=timeout, with_job=not no_job, as_json=as_json
        )
    elif no_job:
        raise typer.BadParameter("--no-job is about a cluster: name it, cluster=NAME.")
    else:
        from suites import commands

        code = commands.doctor(results, as_json=as_json)
    raise typer.Exit(code)


@data_app.command()
def prepare(
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Default: one a core.")] = None,
    as_json: Json = False,
) -> None:
    """Extract and tokenize a data set once, in parallel; what is there is used again."""
    from suites import commands

    raise typer.Exit(commands.prepare(overrides or [], workers=workers, as_json=as_json))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; a wrong request is one line on stderr and exit code 2."""
    try:
        code = app(arguments, standalone_mode=False)
    except ClickException as error:
        message = " ".join(error.format_message().split())
        print(f"aerie: {message}{_hint(message)}", file=sys.stderr)
        code = WRONG_REQUEST
    except (typer.Abort, KeyboardInterrupt):
        print("aerie: interrupted.", file=sys.stderr)
        code = 1
    except BrokenPipeError:
        if not _has_lost_its_reader():
            raise
        code = 0
    sys.exit(code or 0)


def _has_lost_its_reader() -> bool:
    """As in `aerie plan ... | head`: what was not read is dropped, without a word at the exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _hint(message: str) -> str:
    """A suggestion for a command that does not exist."""
    if not message.startswith("No such command") or "Did you mean" in message:
        return ""
    known = [command.name or command.callback.__name__ for command in app.registered_commands]
    close = difflib.get_close_matches(message.split("'")[1], [*known, "data"], n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}, data."


if __name__ == "__main__":
    main()
