"""How the harness scales: thousands of runs planned, submitted and looked at, and where time goes.

    python benchmarks/harness_scale.py --out DIR [--only NAME ...]

Starts a throw-away Slurm of its own (tests/slurm_cluster.py). Every case has a bound; exits with 1
where one is not met. Wall times are those of whole commands, as a user waits for them; beside them
stand the seconds that they kept a core busy, which a machine with other work changes less.

command  short commands, as people type them: help, a second run with nothing to do, status and
         report of a thousand runs
plan     planning NUM_RUNS runs, of a timing and of a quality suite
submit   submitting them and their parity proxies, one job a run, to a real controller: intent,
         copy of the code, sbatch
status   `aerie status` over as many records, the jobs still in the queue: one command of Slurm's
sleep    200 runs that sleep a second and import no framework, four at a time: in one job, in four
budget   60 tiny training_speed runs in both backends: where each second of their jobs goes
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's folder would hide Python's own statistics
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from finished_runs import finished
from slurm_cluster import Node, Partition, SlurmCluster
from slurm_shims import SlurmShims

from suites.harness import provenance, record, submission
from suites.harness.execute import Task, new_attempt
from suites.harness.measure import sample
from suites.harness.record import PHASES, Record
from suites.harness.submission import Submission

NUM_RUNS = 10_000
VARIANTS = ("family=mqa,mqa_local,hawk,griffin", "backend=jax,torch", "size=tiny")  # 8
LEARNING_RATES = "optimizer.learning_rate=1.0e-3,2.0e-3"
QUALITY = ("suite=language_modeling", "data=random", *VARIANTS, LEARNING_RATES,
           f"suite.seeds=[{','.join(map(str, range(NUM_RUNS // 16)))}]")  # fmt: skip
TIMING = ("suite=training_speed", *VARIANTS, LEARNING_RATES,
          "suite.seq_lens=[64,128,256,512,1024]", "dtype=float32",
          "suite.rounds=25", "model.conv_width=2,3,4,5,6")  # fmt: skip
PLAN_S, SUBMIT_S, STATUS_S = 10.0, 30.0, 3.0
HELP_S, AGAIN_S, THOUSAND_S = 0.3, 2.0, 5.0
NUM_SAMPLES = 20  # of a record

NUM_SLEEPS, LANES, SLEEP_S = 200, 4, 65.0
BUDGET = ("suite=training_speed", "family=hawk,griffin", "backend=jax,torch", "size=tiny",
          "suite.seq_lens=[64,128,256]", "suite.tokens_per_step=256", "suite.repeats=5",
          "suite.rounds=5")  # fmt: skip
NUM_BUDGET = 60
UNKNOWN, OWN = 0.02, 0.10  # of the wall time of jobs: not accounted for; idle, and aerie's own

NODES = tuple(Node(f"node{number}") for number in range(1, LANES + 1))
CLUSTER = ("cluster=slurm_cpu", "cluster.partition=all", "cluster.mem=1000M",
           "cluster.cpus_per_task=1", "cluster.time=60", "cluster.view_s=1")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One case: what was measured, and what it may be at most."""

    name: str
    value: float
    bound: float
    unit: str
    facts: dict = field(default_factory=dict)

    @property
    def is_met(self) -> bool:
        return self.value <= self.bound

    def __str__(self) -> str:
        facts = ", ".join(f"{key} {value:g}" for key, value in self.facts.items())
        verdict = "met" if self.is_met else "NOT MET"
        return (
            f"| {self.name} | {self.value:.3g} {self.unit} | {self.bound:g} | {verdict} | {facts} |"
        )


@dataclass
class Done:
    """A command that has ended."""

    stdout: str
    seconds: float
    cpu_s: float


def aerie(*arguments: str, environment: dict[str, str]) -> Done:
    return run(sys.executable, "-m", "suites", *arguments, environment=environment)


def run(*command: str, environment: dict[str, str]) -> Done:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]}: exit code {done.returncode}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Done(done.stdout, seconds, cpu_s)


@dataclass
class Place:
    """Where the cases run: a cluster, and a folder for stores."""

    slurm: SlurmCluster
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return self.slurm.environment | {
            "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
        }

    @cached_property
    def submitted(self) -> tuple[Path, Done]:
        """A store with NUM_RUNS quality runs in the queue, held; and how they were submitted."""
        store = self.folder / "many"
        held = ("cluster.sbatch={hold: true}", "cluster.runs_per_job=1")
        command = ["submit", *QUALITY, *CLUSTER, *held, "--results", str(store), "--json"]
        return store, aerie(*command, environment=self.environment)


# --- Short commands.


def command(place: Place) -> Iterator[Row]:
    quick, thousand = place.folder / "quick", place.folder / "thousand"
    with mock.patch.object(os, "fsync"):
        finished(quick, "experiment=quickstart")
        finished(thousand, "suite=training_speed", "family=hawk", "suite.rounds=1",
                 "suite.seq_lens=[256]", "backend=jax,torch", copies=500)  # fmt: skip
    again = ("run", "experiment=quickstart", "--results", str(quick))
    aerie(*again, environment=place.environment)  # makes the report
    cases = (
        ("help", ("--help",), HELP_S),
        ("run, nothing to do", again, AGAIN_S),
        ("status, 1,000 runs", ("status", "--results", str(thousand)), THOUSAND_S),
        ("report, 1,000 runs", ("report", "--results", str(thousand)), THOUSAND_S),
    )
    for name, arguments, bound in cases:
        done = aerie(*arguments, environment=place.environment)
        yield Row(name, done.cpu_s, bound, "CPU s", {"s": done.seconds})


# --- Thousands of runs.


def plan(place: Place) -> Iterator[Row]:
    for name, overrides in (("timing", TIMING), ("quality", QUALITY)):
        done = aerie("plan", *overrides, "--json", environment=place.environment)
        assert len(json.loads(done.stdout)) == NUM_RUNS
        yield Row(f"plan, {name}", done.seconds, PLAN_S, "s", {"CPU s": done.cpu_s})


def submit(place: Place) -> Iterator[Row]:
    store, done = place.submitted
    (made,) = submission.read(store)
    queued = place.slurm.run("squeue", "--noheader", "--array", "--format=%i").splitlines()
    assert len(queued) == len(list(made.places())) >= NUM_RUNS, f"{len(queued)} in the queue"
    facts = {"CPU s": done.cpu_s, "jobs": len(queued), "arrays": len(made.arrays)}
    yield Row("submit", done.seconds, SUBMIT_S, "s", facts)


def status(place: Place) -> Iterator[Row]:
    store, _ = place.submitted
    write_records(store)
    shims = SlurmShims(place.folder / "shims")
    environment = place.environment | {"PATH": shims.path}
    done = aerie("status", "--results", str(store), "--json", environment=environment)
    seen = json.loads(done.stdout)
    assert sum(row["num_runs"] for row in seen["outcomes"]) >= NUM_RUNS
    assert seen["silent"] is None
    yield Row("status", done.seconds, STATUS_S, "s", {"CPU s": done.cpu_s})
    yield Row("status, asks Slurm", shims.num_calls(), 1, "times")
    place.slurm.run("scancel", "--user", str(os.getuid()))


def write_records(store: Path) -> None:
    """A completed record for every run that was submitted, as a child would have written it."""
    (made,) = submission.read(store)
    samples = tuple(sample("train_loss", 5.0 + 1 / (7 + at), at=at) for at in range(NUM_SAMPLES))
    seen = provenance.machine() | {"versions": provenance.versions()}
    with mock.patch.object(os, "fsync"):
        for array, index in made.places():
            for item in made.runs(array, index):
                task = Task(run=item.run, build=item.build, attempt=new_attempt(), parent_pid=0,
                            costs=item.costs)  # fmt: skip
                one = task.record("completed", provenance=seen, samples=samples,
                                  started_at=made.created_at, seconds=1.0)  # fmt: skip
                record.write(store, one)


# --- Runs that sleep.

SUBMIT = """
from pathlib import Path
from suites import compose, jobs
from suites.harness import plan, reconcile
from suites.harness.cluster import Cluster

def sleeps():
    from stub_suite import stub_run
    # a length of its own makes each a block of its own
    return [stub_run("second", seq_len=1 + number) for number in range({num_sleeps})]

def budget():
    return [run for one in compose.read({budget!r}).settings for run in plan.expand(one)]

store = Path({store!r})
cluster = Cluster(name="here", executor="slurm", partition="all", mem="4000M", view_s=1.0,
                  **{options!r})
planned = plan.plan(store, {runs}())
bill = jobs._bill(store, planned, planned, [cluster], reconcile.reconcile(store))
jobs._submit(store, bill, {runs!r}, "a benchmark", dry_run=False, as_json=True)
"""


def submit_here(store: Path, runs: str, options: dict, environment: dict[str, str]) -> None:
    """As `aerie submit` does, for a suite that it does not know, or without parity runs."""
    code = SUBMIT.format(
        store=str(store), options=options, runs=runs, num_sleeps=NUM_SLEEPS, budget=list(BUDGET)
    )
    run(sys.executable, "-c", code, environment=environment)


def sleep(place: Place) -> Iterator[Row]:
    from stub_suite import stub_path

    site = place.folder / "site"
    site.mkdir()
    stub_path(site)
    ours = place.environment
    ours["PYTHONPATH"] = os.pathsep.join((str(site), ours["PYTHONPATH"]))
    one_job = {"runs_per_job": NUM_SLEEPS, "runs_in_parallel": LANES, "is_exclusive": True}
    for name, options in (
        ("one job", one_job),
        ("four jobs", {"runs_per_job": NUM_SLEEPS // LANES}),
    ):
        store = place.folder / f"sleep {name}".replace(" ", "-")
        before = _busy_s()
        submit_here(store, "sleeps", options, ours)
        wait(store, ours)
        busy = _busy_s() - before
        found = records(store)
        assert len(found) == NUM_SLEEPS, f"{len(found)} records"
        assert {one.outcome for one in found} == {"completed"}
        first = min(map(_begun, found))
        last = max(_written(store, one) for one in found)
        facts = {"machine's CPU s": busy, "start s": _mean(found, "start")}
        yield Row(f"sleep, {name}", last - first, SLEEP_S, "s", facts)


# --- Where the time of real runs goes.


def budget(place: Place) -> Iterator[Row]:
    store = place.folder / "budget"
    # one at a time, as jobs that have cores of their own
    submit_here(store, "budget", {"cpus_per_task": 8, "max_parallel": 1}, place.environment)
    wait(store, place.environment)
    found = {one.run_id: one for one in records(store)}
    assert len(found) == NUM_BUDGET, f"{len(found)} records"
    ends = Counter(one.outcome for one in found.values())
    assert ends.keys() <= {"completed", "invalid_measurement"}, ends  # a machine that is not ours
    spent, held_s = Counter(), 0.0
    (made,) = submission.read(store)
    for array, index in made.places():
        members = [found[run_id] for run_id in made.run_ids(array, index)]
        parts, held = _spent(place.slurm, made, array, index, members)
        spent, held_s = spent + parts, held_s + held
    facts = {name: round(spent[name], 2) for name in ("queue", *PHASES, "aerie", "idle")}
    known = spent.total() - spent["queue"]
    unknown = abs(held_s - known) / held_s
    yield Row("budget, unknown", unknown, UNKNOWN, "of jobs' time", facts | {"jobs": held_s})
    own = (spent["idle"] + spent["aerie"]) / held_s
    yield Row("budget, idle and aerie", own, OWN, "of jobs' time", dict(ends))


def _spent(
    slurm: SlurmCluster, made: Submission, array: int, index: int, members: list[Record]
) -> tuple[Counter, float]:
    """Seconds of a job by what they went to, from its submission to its end; and those that it held
    its node. Starts and ends of jobs are Slurm's, to the second; what a run did
    is what it says of itself; the rest lies between the times at which files were named."""
    submitted = json.loads((made.folder / "arrays" / f"{array}.json").read_text())["submitted_at"]
    submitted = datetime.fromisoformat(submitted).timestamp()
    start, end = _held(slurm, f"{made.job_id(array)}_{index}")
    beat = made.beat(array, index)
    worker = datetime.fromisoformat(beat["started_at"]).timestamp()
    members = sorted(members, key=_begun)
    begins = [*map(_begun, members), beat["at"]]
    ends = [worker, *(_written(made.store, one) for one in members)]
    spent = Counter({"queue": start - submitted, "idle": worker - start + end - beat["at"]})
    spent["aerie"] = sum(max(b - e, 0.0) for e, b in zip(ends, begins, strict=True))
    for one in members:
        spent.update(one.times)
    return spent, end - start


def _held(slurm: SlurmCluster, job: str) -> tuple[float, float]:
    fields = "--Format=StartTime:|,EndTime:"
    said = slurm.run("squeue", "--noheader", "--states=all", f"--jobs={job}", fields)
    start, _, end = said.strip().partition("|")
    return tuple(datetime.fromisoformat(text.strip()).timestamp() for text in (start, end))


# --- What stores and the machine say.


def wait(store: Path, environment: dict[str, str]) -> None:
    aerie("wait", "--results", str(store), "--every", "2", "--json", environment=environment)


def records(store: Path) -> list[Record]:
    return list(record.read_all(store))


def _begun(one: Record) -> float:
    """When its attempt was named: just before its process starts."""
    stamp, *_ = one.attempt.partition("-")
    return datetime.strptime(stamp, "%Y%m%dT%H%M%S%f").replace(tzinfo=UTC).timestamp()


def _written(store: Path, one: Record) -> float:
    return record.record_path(store, one.run_id, one.attempt).stat().st_mtime


def _mean(found: list[Record], phase: str) -> float:
    return sum(one.times.get(phase, 0.0) for one in found) / len(found)


def _busy_s() -> float:
    """Seconds that the cores of this machine have worked, for anyone."""
    user, nice, system, *_ = Path("/proc/stat").read_text().split(None, 5)[1:]
    ticks = int(user) + int(nice) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


CASES = {case.__name__: case for case in (command, plan, submit, status, sleep, budget)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where stores and figures go")
    parser.add_argument("--only", choices=CASES, action="append", help="repeatable")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    print("| case | measured | bound | | more |\n|---|---|---|---|---|", flush=True)
    rows = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the daemons with us
    with SlurmCluster(
        accounting=False,
        proctrack="pgid",
        nodes=NODES,
        partitions=(Partition("all", "ALL", options="Default=YES"),),
        max_job_count=2 * NUM_RUNS,
        extra=("MinJobAge=3600",),
    ) as slurm:
        folder = asked.out / f"{datetime.now():%Y%m%d-%H%M%S}"
        folder.mkdir()
        place = Place(slurm, folder.resolve())
        for name in asked.only or CASES:
            for row in CASES[name](place):
                print(row, flush=True)
                rows.append(row)
    facts = {"machine": provenance.machine(), "git_commit": provenance.git_commit()}
    made = [asdict(row) | {"is_met": row.is_met} for row in rows]
    text = json.dumps(facts | {"rows": made}, indent=1)
    (folder / "harness_scale.json").write_text(text, encoding="utf-8")
    return int(not all(row.is_met for row in rows))


if __name__ == "__main__":
    sys.exit(main())
