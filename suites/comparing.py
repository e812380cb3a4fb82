"""aerie compare: of a store by one setting, or of two files of records, which is a gate for CI."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from suites import compose, display, reports
from suites.commands import AS_PLANNED, NOT_AS_PLANNED, did_you_mean, need_records, one_line
from suites.harness import plan
from suites.harness.record import METRICS

MOST = 8  # lines of a list; all are in JSON


def compare(
    arguments: list[str],
    store: Path,
    *,
    by: str,
    ours: str | None,
    baseline: str | None,
    metrics: tuple[str, ...],
    as_json: bool = False,
) -> int:
    """Of a store, or of those of its runs that are asked for: pairs of cells that differ in one
    setting."""
    need_records(store)
    from analysis import remember, settings, tables, why

    with one_line(), remember.remembering():
        frame = _asked_for(reports.frame_of(store), arguments, store)
        (frame,) = _measuring(metrics, frame)
        by = _setting(frame, by)
        values = settings.values_of(frame, by)
        ours, baseline = (
            typed and _value(option, typed, values)
            for option, typed in (("--ours", ours), ("--baseline", baseline))
        )
        compared = settings.varying(frame).get(by, values)  # values that have a partner
        if baseline is None:
            baseline = settings.baseline_of(by, compared, reports.defaults(frame))
        if ours is not None and ours == baseline:
            raise ValueError(f"--ours {ours} is the baseline too; name another: --baseline.")
        others = [ours] if ours else [value for value in compared if value != baseline]
        made = [
            tables.side_by_side(frame, by, side, baseline, metrics=metrics, max_rows=None)
            for side in others
        ]
        if as_json:
            rows = []
            for side, table in zip(others, made, strict=True):
                causes = why.of_cells(frame, by, side, baseline)
                for row in _rows(table.frame):
                    those = causes.get((row["cell_id_ours"], row["cell_id_baseline"]), [])
                    rows.append(row | {"why": [cause.to_json() for cause in those]})
            display.print_json(rows)
            return AS_PLANNED
        for side, table in zip(others, made, strict=True):
            if table.rows:
                display.print_beside(table.header, table.rows, title=table.title)
                print_why(why.of_comparison(frame, by, side, baseline))
        if any(table.rows for table in made):
            display.say(made[-1].note)
        else:
            why = f"only {values[0]} was measured" if len(values) == 1 else "no two cells differ so"
            display.say(f"nothing to compare by {by}: {why}. {_what_varies(frame)}")
    return AS_PLANNED


def compare_files(
    paths: list[Path],
    *,
    metrics: tuple[str, ...] = (),
    fail_above: str | None = None,
    as_json: bool = False,
) -> int:
    """The second of two files (or stores) beside the first. Exit code 1 where a headline metric is
    worse by more than --fail-above, and the interval leaves no doubt that it is worse; and where a
    cell of the first completes less often in the second, or is not in it."""
    from analysis import regressions, remember, why

    with one_line(), remember.remembering():
        limit = None if fail_above is None else _share(fail_above)
        baseline, ours = (_records(path) for path in paths)
        baseline, ours = _measuring(metrics, baseline, ours)
        names = tuple(str(path) if paths[0].name == paths[1].name else path.name
                      for path in reversed(paths))  # fmt: skip
        found = regressions.compare(ours, baseline, metrics=metrics, limit=limit, names=names)
        if not len(found.rows):
            raise ValueError(_nothing_shared(found, names))
        causes = why.of_files(ours, baseline)
        machines = {
            side: {"path": str(path)} | regressions.machines(frame)
            for side, path, frame in zip(
                ("ours", "baseline"), reversed(paths), (ours, baseline), strict=True
            )
        }
    is_failed = limit is not None and bool(len(found.regressions) or found.missing)
    if as_json:
        display.print_json(
            machines
            | {
                "num_cells": found.num_cells,
                "rows": _rows(found.rows),
                "refused": found.refused,
                "lone": found.lone,
                "missing": found.missing,
                "why": [cause.to_json() for cause in causes],
                "fail_above": limit,
                "is_failed": is_failed,
            }
        )
        return NOT_AS_PLANNED if is_failed else AS_PLANNED
    table = regressions.table(found.rows, names)
    display.print_beside(table.header, table.rows, title=table.title)
    display.say(table.note)
    for side, name in zip(("ours", "baseline"), names, strict=True):
        facts = machines[side]
        words = [" to ".join(facts["days"]), *(", ".join(facts[key]) or "unknown" for key in
                 ("nodes", "devices", "commits"))]  # fmt: skip
        display.say(f"{name}: measured {words[0]} on {words[1]} ({words[2]}), commit {words[3]}")
    if machines["ours"]["devices"] != machines["baseline"]["devices"]:
        display.say("Other devices: a difference may be theirs, and not the code's.")
    elif machines["ours"]["nodes"] != machines["baseline"]["nodes"]:
        display.say("Other nodes: a difference may be theirs, and not the code's.")
    _print_list("Not compared, as CPU and accelerators never are", found.refused)
    _print_list("Not compared", found.lone)
    print_why(causes)
    if limit is not None:
        _print_gate(found, limit, names[0])
    return NOT_AS_PLANNED if is_failed else AS_PLANNED


def print_why(causes: list[Any]) -> None:
    """What differs and was not asked for."""
    if not causes:
        return
    display.say("Why they may differ, most likely first (what was not asked for, and differs):")
    for cause in causes[:MOST]:
        display.say(cause.evidence, "  ")
    if len(causes) > MOST:
        display.say(f"and {len(causes) - MOST} more, with --json", "  ")
    if causes[0].along:
        display.say(
            f"{', '.join([causes[0].what, *causes[0].along])} differ in the same pairs: records "
            "cannot tell which of them it is.",
            "  ",
        )


def _print_list(title: str, lines: list[str]) -> None:
    if lines:
        display.say(f"{title}:")
        for line in lines[:MOST]:
            display.say(line, "  ")
        if len(lines) > MOST:
            display.say(f"and {len(lines) - MOST} more, with --json", "  ")


def _print_gate(found: Any, limit: float, name: str) -> None:
    """A line a regression, then those that may be one, then the end in one line."""
    from analysis import regressions, statistics

    rows = found.rows
    lines: dict[tuple[str, str], list[str]] = {}  # of a cell one
    for row in rows.to_dict("records"):
        label = METRICS[row["metric"]].label
        if row["verdict"] == regressions.LOST:
            lines["FAILED", _words(row)] = [f"does not complete any more: {row['reason']}"]
        elif row["is_regression"]:
            ends = [regressions.worse_by(row[name]) for name in ("ratio_high", "ratio_low")]
            lines.setdefault(("FAILED", _words(row)), []).append(
                f"{label} worse by {regressions.worse_by(row['ratio'])} ({' to '.join(ends)})"
            )
        elif row["verdict"] == regressions.UNKNOWN and regressions.is_beyond(row["ratio"], limit):
            lines.setdefault(("unclear", _words(row)), []).append(
                f"{label} worse by {regressions.worse_by(row['ratio'])}, but {row['reason']}"
            )
    for what in found.missing:
        lines["FAILED", what] = [f"{name} has no run of it"]
    for (mark, what), reasons in sorted(lines.items()):
        display.say(f"{mark} {what}: {'; '.join(reasons)}")
    is_lost, is_unknown = (rows["verdict"] == v for v in (regressions.LOST, regressions.UNKNOWN))
    is_failed = bool(len(found.regressions) or found.missing)
    metrics = display.count(len(rows), "metric")
    if is_unknown.all() and not is_failed:
        fewest = int(rows[["num_processes_ours", "num_processes_baseline"]].min(axis=None))
        display.say(
            f"regression gate undecided: nothing was judged, {metrics} without a verdict. One "
            f"needs {statistics.MIN_ROUNDS} processes a side at least, and more where they differ "
            f"much; the fewest here are {fewest}."
        )
        return
    words = [
        f"{int((rows['is_regression'] & ~is_lost).sum())} of {metrics} worse by more than "
        f"{limit * 100:.3g}%",
        f"{int(is_unknown.sum())} without a verdict",
    ]
    if lost := rows.loc[is_lost, "cell_id"].nunique():
        words.append(f"{display.count(lost, 'cell')} not completed as before")
    if found.missing:
        words.append(f"{display.count(len(found.missing), 'cell')} not in {name}")
    display.say(f"regression gate {'failed' if is_failed else 'passed'}: {', '.join(words)}.")


def _words(row: dict[str, Any]) -> str:
    from analysis import wording

    words = [row["suite"], row["family"], row["size"], row["backend"], row["dtype"],
             wording.workload(row), row["variant"]]  # fmt: skip
    return ", ".join(word for word in words if word)


def _nothing_shared(found: Any, names: tuple[str, str]) -> str:
    if found.num_cells:
        return f"nothing was measured of the cells that {names[0]} and {names[1]} share."
    some = [*found.refused[:1], *found.lone[:1]]
    return (
        f"{names[0]} and {names[1]} share no cell, and only equal settings are compared. "
        f"{'; '.join(some)}."
    )


def _share(typed: str) -> float:
    """3% or 0.03."""
    number = typed.removesuffix("%")
    try:
        value = float(number) / (100 if typed.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ValueError(f"--fail-above {typed!r}: write a share, like 3% or 0.03.")
    return value


def is_records(text: str) -> bool:
    """Whether an argument names a file of records or a store, and no experiment."""
    return text.endswith(".parquet") or (Path(text) / "runs").is_dir()


def _records(path: Path) -> Any:
    from analysis import regressions

    if path.is_dir():
        need_records(path)
        return reports.frame_of(path)
    if not path.exists():
        raise ValueError(f"no file {path}; aerie collect --out {path} writes a store's records.")
    return regressions.read(path)


def _asked_for(frame: Any, arguments: list[str], store: Path) -> Any:
    """The runs of an experiment or of overrides, however many rounds they had; with none named all
    of the store. Parity of any command verifies them."""
    if not arguments:
        return frame
    overrides = [text if "=" in text else f"experiment={text}" for text in arguments]
    wanted = {
        (run.cell_id, run.seed)
        for made in compose.read(overrides).settings
        for run in plan.expand(made)
    }
    asked = zip(frame["cell_id"], frame["seed"], strict=True)
    is_asked = frame["suite"].ne("parity") & np.array([pair in wanted for pair in asked], bool)
    if not is_asked.any():
        raise ValueError(
            f"none of the runs of {' '.join(arguments)} has a record in {store}; measure them "
            f"first: {reports.command_of('run', overrides, store)}"
        )
    return frame[is_asked | frame["suite"].eq("parity")].reset_index(drop=True)


def _setting(frame: Any, by: str) -> str:
    from analysis import settings

    try:
        return settings.name_of(by, settings.asked(frame))
    except ValueError as error:
        raise ValueError(f"--by {error} {_what_varies(frame)}") from None


def _value(option: str, typed: str, values: Iterable[str]) -> str:
    from analysis import settings

    try:
        return settings.value_of(typed, values)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None


def _what_varies(frame: Any) -> str:
    from analysis import settings

    found = settings.varying(frame)
    words = [f"{name} ({', '.join(values)})" for name, values in found.items()]
    return f"What varies: {', '.join(words)}." if words else "Nothing varies between these runs."


def _measuring(metrics: tuple[str, ...], *frames: Any) -> list[Any]:
    """The suites that measure some of these metrics in any frame, and parity; all where no metric
    is named. A side of which no run completed measures none of them."""
    measured = [frame.loc[frame["suite"] != "parity", ["suite", "metric"]] for frame in frames]
    known = sorted({name for pairs in measured for name in pairs["metric"].dropna()})
    for name in metrics:
        if name not in known:
            raise ValueError(did_you_mean("--metric", name, known))
    if not metrics:
        return list(frames)
    kept = {"parity"}.union(
        *(pairs.loc[pairs["metric"].isin(metrics), "suite"] for pairs in measured)
    )
    return [frame[frame["suite"].isin(kept)].reset_index(drop=True) for frame in frames]


def _rows(frame: Any) -> list[dict[str, Any]]:
    """Rows of a frame in full precision, which to_json has not; every kind of missing is null."""
    return [{name: _bare(value) for name, value in row.items()} for row in frame.to_dict("records")]


def _bare(value: Any) -> Any:
    from analysis.vocabulary import plain

    value = plain(value.item() if isinstance(value, np.generic) else value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
