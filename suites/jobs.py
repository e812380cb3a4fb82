"""Commands over submissions: submit, cancel, retry, collect. Exit codes as in suites/commands.py.

What is shown of jobs that run is in suites/watching.py.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from suites import commands, compose, display, gate, reports
from suites.commands import AS_PLANNED, NOT_AS_PLANNED, one_line
from suites.harness import (
    launch,
    pack,
    plan,
    reconcile,
    rounds,
    slurm,
    snapshot,
    states,
    submission,
)
from suites.harness.cluster import Cluster
from suites.harness.estimate import NOTHING, History, Seconds
from suites.harness.pack import Packed
from suites.harness.plan import NOT_NEEDED, Planned
from suites.harness.record import OUTCOMES, with_room
from suites.harness.run import Run
from suites.harness.submission import Submission
from suites.harness.sweep import units

CANCELLED = "cancelled meanwhile"


@dataclass
class Bill:
    """What a submission would start and what it leaves alone, before anything is written."""

    packed: list[Packed]
    finished: int
    not_needed: int  # rounds of blocks whose intervals are as narrow as asked
    current: int  # in the queue, or running, by an earlier submission
    stale: int
    given_up: Counter
    unsupported: list[tuple[Planned, str]]

    @property
    def runs(self) -> list[Planned]:
        return [item for one in self.packed for item in one.runs]

    @property
    def left(self) -> list[Planned]:
        return [item for one in self.packed for item in one.left]

    @property
    def is_at_most(self) -> bool:
        return any(one.is_at_most for one in self.packed)

    @property
    def device_hours(self) -> Seconds:
        return sum((one.device_seconds for one in self.packed), NOTHING) * (1 / 3600)


def submit(
    overrides: list[str],
    store: Path,
    *,
    dry_run: bool = False,
    rerun_stale: bool = False,
    verify_frontier: bool = False,
    as_json: bool = False,
) -> int:
    """Plans, shows the bill, hands the arrays to the scheduler, and returns."""
    with one_line():
        request = compose.read(overrides)
        clusters = request.clusters
        runs = [run for settings in request.settings for run in plan.expand(settings)]
        commands.data_configs(request.settings)
        python = _interpreters(clusters)
        view = reconcile.reconcile(store)
        planned = plan.plan(store, runs, python)
        planned = plan.whole(store, planned, _interrupted(store, planned))
        planned = rounds.settle(store, planned, rounds.asked(request.settings))
        todo = commands.todo(planned, rerun_stale, verify_frontier)
        ahead = gate.ahead(store, planned, todo, python)
        wanted = [*(item for item in ahead if item.is_pending), *todo]
        bill = _bill(store, wanted, planned, clusters, view, unasked=_left_over(store, view))
    command = reports.command_of("submit", overrides, store)
    return _submit(store, bill, request.title, command, dry_run=dry_run, as_json=as_json)


def retry(
    store: Path,
    *,
    reasons: tuple[str, ...] = (),
    dry_run: bool = False,
    as_json: bool = False,
) -> int:
    """Submits again what ended without a result, whatever its budget says, where it was sent."""
    with one_line():
        for reason in reasons:
            if reason not in OUTCOMES:
                raise ValueError(commands.did_you_mean("--reason", reason, list(OUTCOMES)))
        commands.need_submissions(store)
        view = reconcile.reconcile(store)
        active, found = view.active_run_ids(), {}
        for made in submission.read(store):
            for array, index in made.places():
                for item in made.runs(array, index):
                    found[item.run.run_id] = (item, made.cluster(array))
        known, spared = [], rounds.not_needed(store, (item for item, _ in found.values()))
        for run_id, (item, _) in found.items():
            records = plan.attempts(store, run_id)
            # An earlier result is no reason not to repeat what was asked for since.
            ends = [r for r in records if r["attempt"] not in item.attempts] or records
            outcomes = [record["outcome"] for record in ends]
            is_asked = run_id not in active and _is_to_repeat(ends, reasons)
            if is_asked or states.may_retry(outcomes)[0] or any(map(plan.is_finished, ends)):
                known.append(
                    replace(
                        item,
                        is_pending=is_asked,
                        is_stale=False,
                        reason=outcomes[-1] if outcomes else spared.get(run_id, plan.NEW),
                        attempts=tuple(record["attempt"] for record in records),
                    )
                )
        known = plan.whole(store, known, _interrupted(store, known))
        wanted = rounds.along((item for item in known if item.is_pending), known)
        clusters = {c.name: c for _, c in (found[item.run.run_id] for item in wanted)}
        bill = _bill(store, wanted, [], clusters.values(), view, ignores_budgets=True)
    command = " ".join(["aerie retry", *(f"--reason {reason}" for reason in reasons)])
    return _submit(store, bill, "retry", command, dry_run=dry_run, as_json=as_json)


def _is_to_repeat(ends: list[dict[str, Any]], reasons: tuple[str, ...]) -> bool:
    """Whether a run that ended so left no result, or one that a reason names."""
    if not ends or any(record["outcome"] == "completed" for record in ends):
        return False
    return ends[-1]["outcome"] in reasons if reasons else not any(map(plan.is_finished, ends))


def cancel(store: Path, names: list[str], *, all_: bool = False, as_json: bool = False) -> int:
    """Takes jobs out of the queue and stops those that run; their runs end as cancelled. What did
    not get into the queue is withdrawn, of submissions that have ended too."""
    with one_line():
        commands.need_submissions(store)
        if not names and not all_:
            raise ValueError("name the submissions to cancel, or say --all.")
        user = submission.user_name()
        made = [submission.find(store, name) for name in names]
        if all_:  # of this user: of others Slurm cancels nothing
            made = [one for one in submission.read(store) if one.user == user]
        reconcile.reconcile(store)
        stopped, elsewhere = [], []
        for one in made:
            is_settled = one.memory().get("is_settled")
            if is_settled and (one.user != user or one.is_cancelled or not _unqueued(one)):
                continue
            if one.user == user:
                one.cancel()
            for array in one.arrays:
                job_id = one.job_id(array.number)
                if job_id is not None and not is_settled:
                    launch.launcher(one.cluster(array.number).executor).cancel([job_id])
            is_elsewhere = any(one.is_elsewhere(array.number) for array in one.arrays)
            (elsewhere if is_elsewhere and not is_settled else stopped).append(one)
    ids = [one.id for one in stopped]
    if as_json:
        display.print_json({"cancelled": ids})
    else:
        whose = " of yours" if all_ else ""
        none = "nothing" if elsewhere else f"nothing, all{whose} had ended"
        print(f"cancelled: {', '.join(ids) or none}.")
    for one in elsewhere:
        host = one.owner["host"]
        print(f"aerie: {one.id} runs on {host}; cancel it there.", file=sys.stderr)
    return NOT_AS_PLANNED if elsewhere else AS_PLANNED


def collect(store: Path, out: Path | None, *, as_json: bool = False) -> int:
    """Settles what has ended and writes all records as one Parquet file."""
    commands.need_records(store)
    from analysis import derive, load

    with one_line():
        view = reconcile.reconcile(store)
        frame = load.load(store)
        path = load.write_parquet(frame, out or store / "records.parquet")
    counted = derive.runs(frame)["outcome"].value_counts()
    if as_json:
        display.print_json({"path": str(path), "outcomes": counted.to_dict(),
                            "num_open_jobs": len(view.jobs)})  # fmt: skip
    else:
        words = ", ".join(f"{number} {outcome}" for outcome, number in counted.items())
        print(f"{display.count(len(frame), 'row')} of {words}: {path}")
        if view.jobs:
            print(f"{display.count(len(view.jobs), 'job')} not ended yet.")
    return AS_PLANNED


# The bill ---------------------------------------------------------------------------------------


def _bill(
    store: Path,
    wanted: list[Planned],
    planned: list[Planned],
    clusters: Iterable[Cluster],
    view: reconcile.View,
    *,
    unasked: Iterable[tuple[Planned, Cluster]] = (),
    ignores_budgets: bool = False,
) -> Bill:
    active, given_up = view.active_run_ids(), Counter()
    unsupported, runs = [], []
    asked = list(clusters)
    known = {cluster.name: cluster for cluster in asked}
    ids = {item.run.run_id for item in wanted}
    placed: dict[str, list[Planned]] = {name: [] for name in known}
    for item, cluster in unasked:  # left over by an earlier submission
        if item.run.run_id not in ids | active:
            known.setdefault(cluster.name, cluster)
            placed.setdefault(cluster.name, []).append(item)
    for item in wanted:
        if item.run.run_id in active:
            continue
        if reason := plan.fits_nowhere(item.run):
            unsupported.append((item, reason))
        elif not ignores_budgets and (outcome := _given_up(store, item)):
            given_up[outcome] += 1
        else:
            runs.append(item)
    # Of a block of which all that is missing is given up, the rest is not measured again.
    with_others = (plan.WITH_ITS_BLOCK, rounds.BESIDE_NEW, rounds.IF_NEEDED)
    lacking = {item.block for item in runs if item.reason not in with_others}
    runs = [i for i in runs if i.reason not in with_others or i.block in lacking]
    for name, members in pack.place(runs, asked).items():
        placed[name] += members
    history, room = History.of(store), _Room()
    packed = [
        room.pack(members, known[name], history) for name, members in placed.items() if members
    ]
    return Bill(
        packed=packed,
        finished=sum(not (i.is_pending or i.is_stale or i.is_needless) for i in planned),
        not_needed=sum(item.is_needless and item.run.run_id not in ids for item in planned),
        current=len({item.run.run_id for item in [*planned, *wanted]} & active),
        stale=sum(item.is_stale and item.run.run_id not in ids for item in planned),
        given_up=given_up,
        unsupported=unsupported,
    )


class _Room:
    """What the queues still take."""

    def __init__(self) -> None:
        self._taken = 0

    def pack(self, members: list[Planned], cluster: Cluster, history: History) -> Packed:
        known, size, num_queued = {}, cluster.max_array_size, 0
        if cluster.max_submit is not None:
            known["cluster.max_submit"] = cluster.max_submit
        if cluster.executor == "slurm":
            limits = slurm.limits(cluster.partition, cluster.account, cluster.qos)
            size = size or limits.max_array_size
            known |= limits.submit_limits
            num_queued = limits.num_queued + self._taken
        least = min(known, key=known.get, default=None)
        room = None if least is None else max(known[least] - num_queued, 0)
        packed = pack.pack(
            members, cluster, seconds=history.seconds, room=room, max_array_size=size
        )
        if packed.left:
            packed.bound = f"{least} is {known[least]}, and {num_queued} of your jobs are queued"
        self._taken += sum(map(len, packed.arrays))
        return packed


def _left_over(store: Path, view: reconcile.View) -> list[tuple[Planned, Cluster]]:
    """Runs of this user's earlier submissions that never got into a queue, and have no record
    since."""
    found, active, user = {}, view.active_run_ids(), submission.user_name()
    for made in submission.read(store):
        for item, cluster in _unqueued(made) if made.user == user else ():
            found[item.run.run_id] = None if made.is_cancelled else (item, cluster)
    spared = rounds.not_needed(store, (item for item, _ in filter(None, found.values())))
    return [
        (item, cluster)
        for item, cluster in filter(None, found.values())
        if item.run.run_id not in active | spared.keys()
        and len(plan.attempts(store, item.run.run_id)) == len(item.attempts)
    ]


def _unqueued(made: Submission) -> list[tuple[Planned, Cluster]]:
    """What was refused of a submission, and what did not fit in the queue."""
    refused = [
        (item, made.cluster(array.number))
        for array in made.arrays
        if made.refusal(array.number)
        for index in range(array.num_jobs)
        for item in made.runs(array.number, index)
    ]
    return [*refused, *made.left()]


def _interrupted(store: Path, planned: list[Planned]) -> set[str]:
    """Blocks of pending runs that a job was sent to measure, and began, and did not end: where it
    died between two runs, no record says so."""
    pending = {item.run.run_id for item in planned if item.is_pending and item.block is not None}
    found = set()
    for made in submission.read(store) if pending else ():
        for (array, index), run_ids in made.run_ids_of.items():
            given = made.runs(array, index) if pending & {*run_ids} else []
            spared = rounds.not_needed(store, given)
            for unit in units(given):
                begun = [
                    any(r["block"] and r["attempt"] not in item.attempts for r in records)
                    for item in unit
                    if item.run.run_id not in spared
                    for records in [plan.attempts(store, item.run.run_id)]
                ]
                if any(begun) and not all(begun):
                    found.add(unit[0].block)
    return found


def _given_up(store: Path, item: Planned) -> str | None:
    """The outcome of a run whose retries are used up, by attempts of the present code. One that has
    a result is asked for again for another reason."""
    outcomes = plan.outcomes_of_build(store, item)
    if set(outcomes) & set(plan.FINISHED) or not outcomes or states.may_retry(outcomes)[0]:
        return None
    return outcomes[-1]


def _interpreters(clusters: tuple[Cluster, ...]):
    def python(run: Run) -> str | None:
        offers = (one for one in clusters if run.device_kind in one.device_kinds)
        cluster = next(offers, None)
        return cluster and cluster.interpreter(run.backend)

    return python


# Submitting -------------------------------------------------------------------------------------


def _submit(
    store: Path, bill: Bill, title: str, command: str, *, dry_run: bool, as_json: bool
) -> int:
    if not as_json:
        _print_bill(bill)
    if dry_run:
        return _print_scripts(store, bill, title, command, as_json=as_json)
    commands.need_writable(store)
    for item, reason in bill.unsupported:
        with one_line():
            reconcile.write_unsupported(store, item, reason)
    if not bill.runs and not bill.left:
        if as_json:
            display.print_json({"submission": None, **_facts(bill)})
        else:
            print("nothing to submit.")
        return NOT_AS_PLANNED if bill.given_up else AS_PLANNED
    for config in dict.fromkeys(i.run.data for i in bill.runs if commands.reads_text(i.run)):
        commands.prepare_data(config, None)
    with one_line():
        made = _intend(store, bill, title, command, snapshot.take(store))
    refusals = _hand_over(made)
    if as_json:
        display.print_json({"submission": made.id, **_facts(bill), "refused": refusals})
    else:
        what = "withdrawn" if made.is_cancelled else "left for the next submit"
        for reason in dict.fromkeys(refusals):
            print(f"aerie: refused, and {what}: {reason}", file=sys.stderr)
        jobs = sum(array.num_jobs for array in made.arrays)
        print(f"submitted {made.id}: {display.count(jobs, 'job')}. Follow: aerie status --watch")
    return NOT_AS_PLANNED if refusals else AS_PLANNED


def _intend(store: Path, bill: Bill, title: str, command: str, code: Path) -> Submission:
    return submission.intend(
        store,
        title=title,
        command=command,
        snapshot=code,
        packed=[(one.cluster, one.arrays) for one in bill.packed],
        left=[(item, one.cluster.name) for one in bill.packed for item in one.left],
    )


def _hand_over(made: Submission) -> list[str]:
    """Submits every array; what is refused is said, written down, and does not stop the others."""
    refusals = [_submit_array(made, array.number) for array in made.arrays]
    return [one for one in refusals if one is not None]


def _submit_array(made: Submission, array: int) -> str | None:
    """Submits one array, unless somebody cancels it meanwhile; None, or what it was refused for."""
    launcher = launch.launcher(made.cluster(array).executor)
    try:
        if made.is_cancelled:
            raise launch.Refused(CANCELLED)
        job_id = launcher.submit(made, array)
    except (launch.Refused, OSError) as error:  # a disk may be full, or a process may not start
        reason = str(error)
        with suppress(OSError):
            with_room(lambda: made.remember_refusal(array, reason))
        return reason
    with suppress(OSError):  # it is found by its name
        with_room(lambda: made.remember_job_id(array, job_id))
    if not made.is_cancelled:
        return None
    try:  # who cancelled it may not have seen this job
        launcher.cancel([job_id])
    except slurm.Unreachable as error:
        return f"{CANCELLED}, and job {job_id} may run all the same: {error}"
    return CANCELLED


def _print_scripts(store: Path, bill: Bill, title: str, command: str, *, as_json: bool) -> int:
    """The batch files that would be submitted; nothing is written."""
    made = submission.draft(
        store,
        title=title,
        command=command,
        snapshot=store.resolve() / "code" / "DIGEST",
        packed=[(one.cluster, one.arrays) for one in bill.packed],
    )
    scripts = []
    with one_line():
        for array in made.arrays:
            launcher = launch.launcher(made.cluster(array.number).executor)
            scripts.append(launcher.script(made, array.number))
    if as_json:
        display.print_json({"submission": None, **_facts(bill), "scripts": scripts})
    else:
        for array, script in zip(made.arrays, scripts, strict=True):
            print(f"\n# array {array.number}, cluster={array.cluster}\n{script}")
    return AS_PLANNED


def _facts(bill: Bill) -> dict[str, Any]:
    return {
        "num_runs": len(bill.runs),
        "num_finished": bill.finished,
        "num_not_needed": bill.not_needed,
        "num_current": bill.current,
        "num_stale": bill.stale,
        "num_left": len(bill.left),
        "no_room": {one.cluster.name: one.bound for one in bill.packed if one.left},
        "num_unsupported": len(bill.unsupported),
        "given_up": dict(bill.given_up),
        "device_hours": vars(bill.device_hours),
        "is_at_most": bill.is_at_most,
        "arrays": [
            {"cluster": one.cluster.name, "num_jobs": len(jobs)}
            for one in bill.packed
            for jobs in one.arrays
        ],
    }


def _print_bill(bill: Bill) -> None:
    rows = []
    for one in bill.packed:
        hours = one.device_seconds * (1 / 3600)
        jobs = [job for array in one.arrays for job in array]
        at_most = "at most " if one.is_at_most else ""
        rows.append(
            [
                one.cluster.name,
                display.number(len(one.runs)),
                display.number(len(jobs)),
                display.number(len(one.arrays)),
                f"{at_most}{display.hours(hours.likely)}",
                f"{display.hours(hours.low)} to {display.hours(hours.high)}",
                at_most + display.duration(max((job.seconds.likely for job in jobs), default=0.0)),
            ]
        )
    if rows:
        header = ["cluster", "runs", "jobs", "arrays", "device-hours", "between", "longest job"]
        display.print_table(header, rows)
    new = Counter(item.reason for item in bill.runs)
    words = [f"{count} {reason}" for reason, count in new.items()]
    words += [f"{bill.finished} finished"] if bill.finished else []
    words += [f"{bill.not_needed} {NOT_NEEDED}"] if bill.not_needed else []
    words += [f"{bill.current} current (in a queue)"] if bill.current else []
    words += [f"{bill.stale} stale (--rerun-stale)"] if bill.stale else []
    words += [f"{len(bill.unsupported)} unsupported"] if bill.unsupported else []
    words += [f"{len(bill.left)} left for the next submit"] if bill.left else []
    print(f"runs: {', '.join(words) or 'none'}.")
    for one in bill.packed:
        if one.left:
            runs = display.count(len(one.left), "run")
            print(f"no room for {runs} of cluster={one.cluster.name}: {one.bound}.")
    if bill.given_up:
        words = ", ".join(f"{count} {outcome}" for outcome, count in bill.given_up.items())
        print(f"given up: {words}; again with aerie retry --reason {next(iter(bill.given_up))}.")
