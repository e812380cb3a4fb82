"""Parity that proves itself: every planted defect must be caught, and nothing else.

Each defect is planted in a process of its own, which climbs the ladder at the gate's own
configuration, rung by rung until one is red. A false alarm is a red check without a defect, from
seeds that the tolerances were not measured with.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from suites.harness.run import Run
from suites.ladder.check import LEVELS, Error, level_of, limit_of
from suites.ladder.defects import DEFECTS, Defect
from suites.ladder.plan import PEER, gate, need_peer
from suites.ladder.survey import Draw, Nursery, Request, in_parallel
from suites.ladder.tables import name_of, settings_of

ALARM_SEEDS = tuple(range(100, 120))
FAMILY = "family=griffin"  # it has every mixer
# A climb in parts, so that a fault of an op is found before a whole model is compiled.
OPS64 = ("float64", ("L0", "L1", "L3"))
OPS32 = ("float32", ("L2", "L3"))
MODEL64 = ("float64", ("L4", "L5"))
MODEL32 = ("float32", ("L4", "L5"))
BFLOAT16 = ("bfloat16", ("L7",))
PARTS = (OPS64, OPS32, MODEL64, MODEL32, BFLOAT16)


def prove(*, on_end: Callable[[int, int, str], None], every: int = 1) -> dict[str, Any]:
    """{planted, caught, false_alarms, by_level: {level: {planted, caught}}, defects, alarms}.

    Of the seeds without a defect each run draws one of `every`, another one than its neighbor: all
    are drawn.
    """
    need_peer()
    base = gate([FAMILY])
    plain = [run for run in base if not run.kernels.chosen]
    slow = [run for run in base if run.kernels.interpret]
    quiet = [
        Request(run=run, seeds=ALARM_SEEDS[number % every :: every])
        for number, run in enumerate(run for run in plain if _is_watched(run))
    ]
    quiet += [Request(run=run, seeds=ALARM_SEEDS[:2]) for run in slow]
    jobs = [*quiet, *DEFECTS]

    def work(job: Request | Defect, nursery: Nursery) -> Any:
        if isinstance(job, Request):
            return list(_alarms(job, nursery.draws(job)))
        return _caught(job, slow if job.is_interpreted else plain, nursery)

    defects, alarms, num_draws = [], [], 0
    for number, (job, found) in enumerate(in_parallel(jobs, work), start=1):
        if isinstance(job, Request):
            alarms += found
            num_draws += len(job.seeds)
            on_end(number, len(jobs), f"no defect, {name_of(job.run)}")
        else:
            defects.append(found)
            on_end(number, len(jobs), f"{job.name}: {found['level'] or 'MISSED'}")
    defects.sort(key=lambda row: (row["expected"], row["name"]))
    planted = Counter(row["expected"] for row in defects)
    caught = Counter(row["expected"] for row in defects if row["level"])
    return {
        "planted": len(defects),
        "caught": sum(caught.values()),
        "false_alarms": len(alarms),
        "num_draws": num_draws,
        "by_level": {
            level: {"planted": planted[level], "caught": caught[level]}
            for level in LEVELS
            if planted[level]
        },
        "defects": defects,
        "alarms": alarms,
    }


def _is_watched(run: Run) -> bool:
    """False alarms are sought in every dtype with the paper's settings, in float32 with all."""
    return run.dtype == "float32" or settings_of(run.model) == "paper"


def _alarms(request: Request, found: list[Draw]) -> Iterator[dict[str, Any]]:
    for draw in found:
        red = _red(request.run, draw)
        if draw.failure or red:
            why = draw.failure or f"{len(red)} red, {red[0]}"
            yield {"run": name_of(request.run), "seed": draw.seed, "why": why}


def _caught(defect: Defect, runs: list[Run], nursery: Nursery) -> dict[str, Any]:
    """The lowest level that sees the defect, and the first field that is red there."""
    row = {"name": defect.name, "module": defect.module, "line": defect.line,
           "fault": defect.fault, "expected": defect.level}  # fmt: skip
    failures = []  # no check was red: a crash is seen, but it is not caught
    for run in _parts(defect, runs):
        (draw,) = nursery.draws(Request(run=run, seeds=(run.seed,), defect=defect.name))
        if draw.failure:
            failures.append(draw.failure)
        if red := _red(run, draw):
            level = min(map(level_of, red))
            first = next(field for field in red if level_of(field) == level)
            level = "truth" if defect.backend is None else level
            return row | {"level": level, "field": first, "run": name_of(run), "why": None}
    return row | {"level": None, "field": None, "run": None, "why": "; ".join(failures) or None}


def _parts(defect: Defect, runs: list[Run]) -> Iterator[Run]:
    """Where a defect is looked for: in the ops first, then where it is expected, then elsewhere."""
    if defect.is_interpreted:
        for dtype, levels in (OPS32, MODEL32, BFLOAT16):
            for run in (r for r in runs if (r.backend, r.dtype) == (defect.backend, dtype)):
                yield replace(run, workload=replace(run.workload, levels=levels))
        return
    if defect.backend is None:
        yield from (run for run in runs if run.backend == PEER and run.dtype == "float32")
        for run in runs:
            if run.backend == "torch" and run.dtype == "float64":
                yield replace(run, workload=replace(run.workload, levels=("L0", "truth")))
        return
    of_part = {
        (run.dtype, settings_of(run.model)): run for run in runs if run.backend == defect.backend
    }
    settings = list(dict.fromkeys(name for _, name in of_part))
    everywhere = [(part, name) for name in settings for part in PARTS]
    first = (
        [(OPS64, settings[0]), (OPS32, settings[0])]
        if defect.level < "L4"
        else [(OPS64, settings[0])]
    )
    expected = [(part, name) for part, name in everywhere if defect.level in part[1]]
    for (dtype, levels), name in dict.fromkeys([*first, *expected, *everywhere]):
        if (dtype, name) in of_part:
            run = of_part[dtype, name]
            yield replace(run, workload=replace(run.workload, levels=levels))


def _red(run: Run, draw: Draw) -> list[str]:
    return [
        field for field, error in draw.errors.items() if Error(*error).exceeds(limit_of(field, run))
    ]


def tables(found: dict[str, Any]) -> Iterator[tuple[list[str], list[list[str]], str]]:
    """(header, rows, title) of what is printed."""
    rows = [
        [row["name"], row["expected"], row["level"] or "MISSED", row["field"] or row["why"] or "-",
         row["run"] or "-"]
        for row in found["defects"]
    ]  # fmt: skip
    yield ["defect", "expected", "caught at", "first red check", "run"], rows, "Planted defects"
    rows = [
        [level, LEVELS[level], str(count["planted"]), str(count["caught"])]
        for level, count in found["by_level"].items()
    ]
    yield ["level", "what it holds", "planted", "caught"], rows, "By level"
    if found["alarms"]:
        rows = [[row["run"], str(row["seed"]), row["why"]] for row in found["alarms"]]
        yield ["run", "seed", "why"], rows, "False alarms"


def words(found: dict[str, Any]) -> str:
    return (
        f"mutation score {found['caught']} of {found['planted']}; {found['false_alarms']} false "
        f"alarms in {found['num_draws']} draws without a defect."
    )
