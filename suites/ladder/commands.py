"""aerie parity: climb, prove, calibrate. Exit codes as in suites/commands.py; a red check is 1."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from implementations.config import choose
from suites import compose, display, reports
from suites.commands import AS_PLANNED, NOT_AS_PLANNED, counted, one_line, run_pending
from suites.harness import plan, provenance
from suites.harness.run import Run
from suites.ladder import calibrate as calibration
from suites.ladder import plan as ladder
from suites.ladder import prove as proof
from suites.ladder import seeds, tables
from suites.ladder.check import LADDER
from suites.parity import LONG


def parity(
    overrides: list[str],
    store: Path,
    *,
    levels: tuple[str, ...] = (),
    against: str = "float64",
    as_json: bool = False,
) -> int:
    """Climbs what the present code has not climbed yet, and judges every run."""
    with one_line():
        _check_parity(overrides, levels, against)
        levels = tuple(level for level in LADDER if level in levels)
        gate_levels = [level for level in levels if level not in LONG]
        runs = ladder.gate(overrides, gate_levels) if gate_levels or not levels else []
        runs += [run for level in levels if level in LONG for run in ladder.long(overrides, level)]
        cluster = compose.read(["suite=parity", *_of(overrides, "cluster")]).cluster
        if not _of(overrides, "cluster.runs_in_parallel"):  # nothing is timed
            cluster = replace(cluster, runs_in_parallel=len(provenance.cores()))
        planned = plan.plan(store, runs)
    request = compose.Request("parity", (cluster,), [], command="parity")
    result, planned = run_pending(request, planned, store, overrides, True, False)

    shown = [(item.run, record) for item in planned if (record := counted(store, item))]
    with one_line():
        found = _judged(store, shown, against)
    if missing := len(planned) - len(shown):
        found["failed"].append(f"{display.count(missing, 'run')} of {len(planned)} left no record.")
        found["is_red"] = True
    if as_json:
        display.print_json(found)
    else:
        _print(found, against, by_tensor=bool(levels))
        _write_training_figure(store, shown)
    return NOT_AS_PLANNED if found["is_red"] or result.is_interrupted else AS_PLANNED


def _judged(store: Path, shown: list[tuple[Run, dict[str, Any]]], against: str) -> dict[str, Any]:
    """Every check against float64, every tensor beside the other side's, and what is red."""
    checks = [tables.rows_of(run, record) for run, record in shown]
    rows = [row for part in checks for row in part]
    is_truth, is_twin = against == "float64", against in tables.TWINS
    other, folder = ("jax", None) if is_truth else (against, None if is_twin else Path(against))
    beside = list(tables.beside(store, shown, other, folder))
    equivalence = seeds.equivalence(shown)
    peer = tables.beside_peer(rows)
    failed = [
        f"{tables.name_of(run)}: {record['outcome']}: {record['reason']}"
        for run, record in shown
        if record["outcome"] not in ("completed", "unsupported", "invalid_measurement")
    ]
    judged = [*rows, *beside, *equivalence, *peer] if is_truth else beside
    if not judged:
        ends = {record["reason"] for _, record in shown if record["reason"]}
        failed.append(f"nothing was compared. {' '.join(sorted(ends))}".strip())
    is_red = bool(failed) or not all(row.get("is_within", True) for row in judged)
    divergences = map(tables.divergence, checks if is_truth else tables.by_run(beside))
    return {
        "checks": rows,
        "against": beside,
        "equivalence": equivalence,
        "peer": peer,
        "first_divergences": [lines for lines in divergences if lines],
        "failed": failed,
        "is_red": is_red or not all(row["is_equivalent"] for row in equivalence),
    }


def _print(found: dict[str, Any], against: str, *, by_tensor: bool) -> None:
    show = tables.by_tensor if by_tensor else tables.by_level
    if against == "float64" and found["checks"]:
        display.print_table(tables.HEADER, show(found["checks"]), title="Against float64")
        print()
    if found["against"]:
        title = f"Against {'jax' if against == 'float64' else against}"
        display.print_table(tables.HEADER, show(found["against"]), title=title)
        print()
    elif against != "float64":
        print(f"nothing of {against} to compare with.")
    if found["peer"] and against == "float64":
        title = f"Beside transformers: ours at most {tables.PEER_MULTIPLE:g} times its error"
        display.print_table(tables.PEER_HEADER, tables.peer_table(found["peer"]), title=title)
        print()
    if found["equivalence"]:
        header, lines = seeds.table(found["equivalence"])
        display.print_table(header, lines, title="Final losses over seeds (L6)")
        print()
    for line in tables.alike(found["first_divergences"]):
        print(line)
    for line in found["failed"]:
        print(f"RED  {line}")
    print(tables.NOTE)


def prove(*, as_json: bool = False) -> int:
    """Plants every defect, and counts those that the ladder catches, and its false alarms."""
    with one_line():
        found = proof.prove(on_end=display.count_up("proof"))
    if as_json:
        display.print_json(found)
    else:
        for header, rows, title in proof.tables(found):
            display.print_table(header, rows, title=title)
        print(proof.words(found))
    is_proved = found["caught"] == found["planted"] and not found["false_alarms"]
    return AS_PLANNED if is_proved else NOT_AS_PLANNED


def calibrate(gates: list[str]) -> int:
    """Measures the noise of every check, or of some gates', and writes tolerances.yaml."""
    with one_line():
        path = calibration.calibrate(gates, on_end=display.count_up("calibration"))
    print(f"tolerances: {path}")
    return AS_PLANNED


def _check_parity(overrides: list[str], levels: tuple[str, ...], against: str) -> None:
    typed = compose.parse(overrides)
    if typed.get("suite", ["parity"]) != ["parity"] or "experiment" in typed:
        raise ValueError("aerie parity runs suite=parity; for others use aerie run.")
    for level in levels:
        choose("--level", level, LADDER, "aerie parity")
    if against not in ("float64", "jax", "torch") and not (Path(against) / "runs").is_dir():
        raise ValueError(
            f"--against {against}: not float64, jax, torch, or a folder of records (--results)."
        )


def _of(overrides: list[str], key: str) -> list[str]:
    """The overrides of a group, or of its keys."""
    return [text for text in overrides if text.split("=")[0].startswith(key)]


def _write_training_figure(store: Path, shown: list[tuple[Run, dict[str, Any]]]) -> None:
    """Of L5, where it was run: both curves, their difference, and what rounding makes of it."""
    ids = [run.run_id for run, _ in shown if run.workload.levels == ("L5",)]
    if not ids:
        return
    from analysis import figures, style

    frame = reports.frame_of(store)
    with style.looks():
        figure = figures.training_parity(frame[frame["run_id"].isin(ids)])
        if figure is not None:
            path = reports.report_path(store, None, "parity").parent / "training_parity.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
            print(f"figure: {path}")
