"""Adaptive rounds: how many rounds a block of timing runs needs, by the records that are there.

Where a suite sets `until_ci`, `suite.rounds` is the most: a block ends after the first round at
which every pair of its variants is settled (analysis.statistics.is_settled), by the headline of the
suite, for decode_throughput at each batch size. Records alone decide, so that the sweep that
measures, the planner after it and whoever watches come to one conclusion.

The evidence of a pair are the rounds that both completed within one sweep, as in the report. Rounds
of several sweeps add up: where a narrower interval is asked for later, the block goes on, and the
earlier rounds count. Where a variant is new, the others are measured again beside it. One alone is
settled by the interval of its own value. One that is known not to run (out of memory, unsupported,
diverged) is left out, of the rule and of later rounds.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from suites.harness import plan
from suites.harness.plan import NOT_NEEDED, Planned

MOST_ROUNDS = 20  # of a block, unless suite.rounds is named
BESIDE_NEW = "measured again beside a new variant"
STATE = "not_needed"  # of such a run, beside outcomes
IF_NEEDED = "if needed"  # the reason of runs that are started only where the others ask for them
LOST = tuple(outcome for outcome in plan.FINISHED if outcome != "completed")


class Point(NamedTuple):
    """What one record says of its run."""

    cell: str
    round: int
    seed: int
    sweep: str | None  # that measured it
    outcome: str
    is_finished: bool
    values: dict[int | None, float]  # the headline's median, by batch size where it has several


def asked(settings: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How narrow intervals are to be, of the suites that say so."""
    found: dict[str, float | None] = {}
    for made in settings:
        suite = made["suite"]
        name, until = suite["name"], suite.get("until_ci")
        if found.setdefault(name, until) != until:
            raise ValueError("suite.until_ci takes one value: the runs of a block end together.")
        if until is not None:
            _check(until, suite["rounds"], len(suite["seeds"]))
    return {name: until for name, until in found.items() if until is not None}


def _check(until: float, rounds: int, num_seeds: int) -> None:
    if not 0 < until < 1:
        raise ValueError(f"suite.until_ci={until:g}; must be above 0 and below 1: 0.02 is 2%.")
    first = first_look()
    if rounds * num_seeds < first:
        raise ValueError(
            f"suite.until_ci={until:g} looks at an interval after {first} rounds at the earliest, "
            f"and suite.rounds={rounds} are the most; name more, or none for {MOST_ROUNDS}."
        )


def first_look() -> int:
    """Rounds without which no pair is settled."""
    from analysis import statistics  # here: SciPy takes a moment, and most plans need none

    return statistics.FIRST_LOOK


def settle(store: Path, planned: list[Planned], until: Mapping[str, float]) -> list[Planned]:
    """The same runs; those of adaptive blocks know what ends them, and what is not needed any more
    is not pending."""
    changed = {}
    for unit in _blocks(item for item in planned if item.run.suite in until):
        bound = until[unit[0].run.suite]
        points = _all_counted(store, (item.run.run_id for item in unit))
        has_grown = _has_grown(unit, points)
        was_interrupted = any(item.reason == plan.WITH_ITS_BLOCK for item in unit)
        needless = {} if has_grown or was_interrupted else _judged(unit, points, bound)[0]
        is_stale = any(item.is_stale for item in unit if item.run.run_id not in needless)
        for item in unit:
            run_id = item.run.run_id
            made = replace(item, until_ci=bound, measured=tuple(points))
            if run_id in needless and (item.is_pending or (item.is_stale and not is_stale)):
                made = replace(made, is_pending=False, is_stale=False, reason=needless[run_id])
            elif was_interrupted and is_stale:  # it was run again as stale, rounds that are new too
                made = replace(made, is_pending=False, is_stale=True)
            elif has_grown and not item.is_pending and item.outcome == "completed":
                made = replace(made, is_pending=True, reason=BESIDE_NEW)
            changed[run_id] = made
    return [changed.get(item.run.run_id, item) for item in planned]


def _has_grown(unit: Sequence[Planned], points: Mapping[str, Point]) -> bool:
    """Whether a block has a variant that was never measured, and may be, unlike others of it. What
    older code has measured is not measured again unasked."""
    known = {point.cell for point in points.values()}
    new = [item.run for item in unit if item.run.cell_id not in known]
    is_stale = any(item.is_stale for item in unit)
    return bool(known) and not is_stale and not all(map(plan.fits_nowhere, new))


def along(todo: Iterable[Planned], planned: Iterable[Planned]) -> list[Planned]:
    """What is to be done, and of its blocks the runs that were not needed: what is measured now may
    ask for them."""
    chosen = {item.run.run_id: item for item in todo}
    blocks = {item.block for item in chosen.values()} - {None}
    made = []
    for item in planned:
        if item.run.run_id in chosen:
            made.append(chosen[item.run.run_id])
        elif item.is_needless and item.block in blocks:
            made.append(replace(item, reason=IF_NEEDED))
    return made


def not_needed(store: Path, items: Iterable[Planned]) -> dict[str, str]:
    """Why runs are not needed, by run_id: those of a block of which a sweep since they were planned
    has found enough. Each sweep is judged for itself: one that was interrupted has found nothing,
    and another begins anew."""
    found: dict[str, str] = {}
    for unit in _blocks(item for item in items if item.until_ci is not None):
        ids = {item.run.run_id for item in unit}
        earlier = dict.fromkeys(run_id for item in unit for run_id in item.measured)
        before = _all_counted(store, earlier.keys() - ids)
        sweeps: dict[str, dict[str, Point]] = {}
        for item in unit:
            for attempt, point in _points(store, item.run.run_id).items():
                if point.sweep is not None and attempt not in item.attempts:
                    sweeps.setdefault(point.sweep, {})[item.run.run_id] = point
        bound = min(item.until_ci for item in unit)
        for points in sweeps.values():
            found |= _judged(unit, before | points, bound)[0]
    return found


def num_unsettled(store: Path, planned: Iterable[Planned]) -> int:
    """Adaptive blocks of which all rounds were measured, and were too few."""
    found = 0
    for unit in _blocks(item for item in planned if item.until_ci is not None):
        points = _all_counted(store, (item.run.run_id for item in unit))
        needless, end = _judged(unit, points, unit[0].until_ci)
        has_ended = all(item.run.run_id in points.keys() | needless.keys() for item in unit)
        is_lost = all(point.outcome in LOST for point in points.values())
        found += has_ended and end is None and not is_lost
    return found


def spared(planned: Iterable[Planned], why: Mapping[str, str]) -> list[Planned]:
    """The same runs; those that a sweep has found needless say so."""
    return [
        replace(item, is_pending=False, reason=why[item.run.run_id])
        if item.run.run_id in why
        else item
        for item in planned
    ]


def _blocks(items: Iterable[Planned]) -> list[list[Planned]]:
    found: dict[str, list[Planned]] = {}
    for item in items:
        if item.block is not None:
            found.setdefault(item.block, []).append(item)
    return list(found.values())


def _judged(
    unit: Sequence[Planned], points: Mapping[str, Point], until: float
) -> tuple[dict[str, str], str | None]:
    """Why runs of a block are not needed, by run_id; and why it ends, if it does. `points` is what
    was measured of it, by run_id: of runs that are not in the unit, too. Rounds are looked at in
    order, as far as all runs of them have ended."""
    found: dict[str, str] = {}
    lost: dict[str, str] = {}  # variant -> why
    seen: list[Point] = []
    end, is_whole = None, True
    numbers = {item.run.round for item in unit} | {point.round for point in points.values()}
    for number in sorted(numbers):
        members = {item.run.run_id: item.run for item in unit if item.run.round == number}
        for run_id, run in members.items():
            if reason := lost.get(run.cell_id) or end:
                found[run_id] = f"{NOT_NEEDED}: {reason}"
        if end is not None:
            continue
        seen += (now := [point for point in points.values() if point.round == number])
        for point in now:
            if point.outcome in LOST:
                lost.setdefault(point.cell, f"{point.outcome} in round {number}")
        is_whole = is_whole and members.keys() <= points.keys() | found.keys()
        if is_whole:
            end = _end([point for point in seen if point.cell not in lost], until)
    return found, end


def _end(points: Collection[Point], until: float) -> str | None:
    """Why a block ends after these rounds; None where it goes on."""
    num_rounds = len({point.round for point in points})
    if not any(point.outcome == "completed" for point in points):
        is_enough = len({(point.round, point.seed) for point in points}) >= first_look()
        return f"none of {num_rounds} rounds completed" if is_enough else None
    words = f"settled after {num_rounds} round{'s' if num_rounds > 1 else ''}"
    return words if _is_settled(points, until) else None


def _is_settled(points: Iterable[Point], until: float) -> bool:
    """Whether every pair of variants is, or the one variant that there is."""
    values: dict[str, dict[int | None, dict[tuple, float]]] = {}
    for point in points:
        if point.outcome == "completed":
            for at, value in point.values.items():
                of_place = values.setdefault(point.cell, {}).setdefault(at, {})
                of_place[point.round, point.seed, point.sweep] = value
    if len(values) == 1:
        (alone,) = values.values()
        values["nothing"] = {at: dict.fromkeys(rounds, 1.0) for at, rounds in alone.items()}
    return all(
        _is_narrow(ours[at], baseline[at], until)
        for ours, baseline in combinations(values.values(), 2)
        for at in ours.keys() & baseline.keys()
    )


def _is_narrow(ours: dict[tuple, float], baseline: dict[tuple, float], until: float) -> bool:
    """At the last number of rounds at which a pair may be looked at: one of its variants may have
    failed in some."""
    from analysis import statistics

    both = sorted(ours.keys() & baseline.keys())
    while both and not statistics.is_look(len(both)):
        both.pop()
    pair = [ours[place] for place in both], [baseline[place] for place in both]
    return bool(both) and statistics.is_settled(*pair, until)


def _all_counted(store: Path, run_ids: Iterable[str]) -> dict[str, Point]:
    """Of each run that was measured the last attempt that is a result, else the last."""
    found = {}
    for run_id in run_ids:
        if points := list(_points(store, run_id).values()):
            found[run_id] = next((p for p in reversed(points) if p.is_finished), points[-1])
    return found


def _points(store: Path, run_id: str) -> dict[str, Point]:
    """By attempt, oldest first."""
    paths = sorted((store / "runs" / run_id).glob("[!.]*.json"))
    return {path.stem: _point(path, *plan.version(path)) for path in paths}


@cache
def _point(path: Path, written_ns: int, size: int) -> Point:
    """Each record is parsed once: a sweep asks after every round."""
    record = plan.read(path)
    run, values = record["run"], {}
    for sample in record["samples"]:
        if sample["metric"] == plan.load_suite(run["suite"]).headline:
            values.setdefault(sample["at"], []).append(sample["value"])
    return Point(
        cell=record["cell_id"],
        round=run["round"],
        seed=run["seed"],
        sweep=record["block"],
        outcome=record["outcome"],
        is_finished=plan.is_finished(record),
        values={at: median(of_place) for at, of_place in values.items()},
    )
