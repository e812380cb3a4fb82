"""What is left of an experiment on a Slurm that falls apart: python benchmarks/chaos.py --out DIR

A throw-away Slurm (tests/slurm_cluster.py), configured unlike that of the tests, runs a hundred
tiny runs in both backends: blocks of training_speed, and quality runs of language_modeling that
leave checkpoints. Meanwhile nodes crash, slurmd and slurmctld are killed, jobs are requeued and
preempted, and whoever submits or waits is killed, at moments drawn by --seed. Then all is mended,
and what was lost is submitted again, as a user would. It must be as if nothing had happened:

- every run has a finished record that counts, blocks have theirs from one sweep, none has two
- no claim, no open attempt, no job and no process is left
- the losses of quality runs that were interrupted are, bit for bit, those of an undisturbed run

Exits with 1 where it is not. 100 runs take 15 to 25 minutes on two cores; --num-runs 12 takes two.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's folder would hide Python's own statistics
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from slurm_cluster import Node, Partition, SlurmCluster

from suites.harness import plan, provenance, record, submission
from suites.harness.cluster import Cluster
from suites.harness.plan import Planned
from suites.harness.record import Record
from suites.harness.submission import Submission
from suites.harness.sweep import sweep

CALM_S = 3.0  # at least, between two blows
CHECKPOINT_S = 2.0
SETTLE_S = 600.0  # for what is left, once nothing disturbs any more
MANY = 36  # runs: from here on of two families
MAX_SUBMISSIONS = 8  # of a user who finds that something is missing, and submits again
LOSSES = ("train_loss", "loss", "loss_by_position")

CLUSTER = ("cluster=slurm_cpu", "cluster.name=shaky", "cluster.partition=shared",
           "cluster.cpus_per_task=4", "cluster.mem=2000M", "cluster.time=30",
           "cluster.stop_warning_s=60", "cluster.lost_after_s=20", "cluster.view_s=2",
           "cluster.runs_per_job=2", f"cluster.checkpoint_s={CHECKPOINT_S}")  # fmt: skip
BOTH = ("backend=jax,torch", "size=tiny", "dtype=float32")


class Shaky(SlurmCluster):
    """Every node has one core of the machine, so that a run has as many threads wherever it is."""

    def _launch(self, daemon: str) -> None:
        name, cores = daemon.removeprefix("slurmd-"), provenance.cores()
        mine = {node.name: cores[n % len(cores)] for n, node in enumerate(self.nodes)}.get(name)
        os.sched_setaffinity(0, cores if mine is None else {mine})
        try:
            super()._launch(daemon)
        finally:
            os.sched_setaffinity(0, cores)


def shaky(num_nodes: int, accounting: bool) -> Shaky:
    return Shaky(
        accounting=accounting,
        proctrack="pgid",
        nodes=tuple(Node(f"n{number}", num_cpus=4) for number in range(1, num_nodes + 1)),
        partitions=(
            Partition("shared", "ALL", preempt_mode="REQUEUE", options="Default=YES"),
            Partition("urgent", "ALL", priority_tier=50),
        ),
        grace_time=8,
        preempt_send_user_signal=False,
        extra=("SlurmdTimeout=20",),
    )


def requests(num_runs: int) -> list[list[str]]:
    """Three fifths of the runs in blocks of training_speed, the others train to a loss. A few have
    one family: each is verified by a parity run of its own, which takes the longest."""
    family, rounds = ("family=mqa,hawk", 3) if num_runs >= MANY else ("family=hawk", 2)
    per_seed = 2 * len(family.split(","))
    per_block = per_seed * rounds
    lens = [32 * (1 + n) for n in range(max(round(0.6 * num_runs / per_block), 1))]
    timing = ["suite=training_speed", family, f"suite.seq_lens={lens}".replace(" ", ""),
              "suite.tokens_per_step=512", "suite.repeats=5", f"suite.rounds={rounds}"]  # fmt: skip
    seeds = f"{list(range(max(round(0.4 * num_runs / per_seed), 1)))}".replace(" ", "")
    text = f"data.paths=[{ROOT / 'suites' / 'harness' / '*.py'}]"
    quality = ["suite=language_modeling", "data=text", text, family,
               "suite.num_steps=400", "suite.batch_size=4", "suite.seq_len=64",
               "suite.num_held_out_batches=4", f"suite.seeds={seeds}"]  # fmt: skip
    # quality runs first: they are to be hit while they run
    return [[*quality, *BOTH, *CLUSTER], [*timing, *BOTH, *CLUSTER]]


@dataclass
class Users:
    """Those who submit and wait, and may be killed at it."""

    environment: dict[str, str]
    store: Path
    log: Path
    processes: list[subprocess.Popen] = field(default_factory=list)

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "suites", *arguments, "--results", str(self.store)]
        with self.log.open("ab") as output:
            output.write(f"$ aerie {' '.join(arguments[:2])}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def run(self, *arguments: str, seconds: float = SETTLE_S) -> int:
        return self.start(*arguments).wait(seconds)

    def kill(self) -> int:
        """With all that they started: sbatch, squeue. How many."""
        alive = [one for one in self.processes if one.poll() is None]
        for one in alive:
            with suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()
        self.processes.clear()
        return len(alive)


@dataclass
class Chaos:
    """What is done to a cluster and to its users, and what is due to be mended."""

    slurm: SlurmCluster
    users: Users
    requests: list[list[str]]
    random: random.Random
    start: float = field(default_factory=time.monotonic)
    done: Counter = field(default_factory=Counter)
    _due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    _down: set[str] = field(default_factory=set)

    def strike(self) -> None:
        blows = {
            self.crash_a_node: 3, self.kill_a_slurmd: 2, self.kill_slurmctld: 2,
            self.requeue_a_job: 4, self.preempt_a_job: 4, self.kill_a_submitter: 2,
            self.kill_who_waits: 1,
        }  # fmt: skip
        blow = self.random.choices(list(blows), list(blows.values()))[0]
        with suppress(RuntimeError, subprocess.TimeoutExpired):  # Slurm refuses: a job has ended
            if (said := blow()) is not None:
                self.say(blow.__name__.replace("_", " "), said)

    def say(self, what: str, more: str = "") -> None:
        self.done[what] += 1
        print(f"{time.monotonic() - self.start:6.1f} s  {what} {more}", flush=True)

    def mend(self, *, all_: bool = False) -> None:
        """What is due, or all."""
        for due in list(self._due):
            if all_ or time.monotonic() > due[0]:
                self._due.remove(due)
                due[1]()

    def later(self, low: float, high: float, action: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + self.random.uniform(low, high), action))

    def crash_a_node(self) -> str | None:
        if (node := self._a_node()) is None:
            return None
        self._down.add(node)
        self.later(8, 20, lambda: self._resume(node))
        self.slurm.fail_node(node)
        return node

    def kill_a_slurmd(self) -> str | None:
        """Its jobs run on."""
        if (node := self._a_node()) is None:
            return None
        self._down.add(node)
        self.later(2, 10, lambda: self._resume(node))
        self.slurm.kill_daemon(f"slurmd-{node}")
        return node

    def kill_slurmctld(self) -> str:
        """It may forget what it was told last."""
        self.slurm.kill_daemon("slurmctld")
        time.sleep(self.random.uniform(1, 8))
        self.slurm.start_daemon("slurmctld")
        return ""

    def requeue_a_job(self) -> str | None:
        if not (jobs := self._running_jobs()):
            return None
        job = self.random.choice(jobs)
        self.slurm.run("scontrol", "requeue", job)
        return job

    def preempt_a_job(self) -> str | None:
        if (node := self._a_node()) is None:
            return None
        seconds = self.random.randint(3, 10)
        options = ("--partition=urgent", f"--nodelist={node}", "--cpus-per-task=4", "--time=1")
        self.slurm.submit(f"sleep {seconds}", *options, "--job-name=urgent", "--output=/dev/null")
        return node

    def kill_a_submitter(self) -> str:
        self.users.kill()
        self.users.start("submit", *self.random.choice(self.requests))
        time.sleep(self.random.uniform(0.3, 4.0))
        return "" if self.users.kill() else "who had ended"

    def kill_who_waits(self) -> str:
        self.users.kill()
        self.users.start("wait", "--every", "0.2")
        time.sleep(self.random.uniform(0.5, 3.0))
        return "" if self.users.kill() else "who had ended"

    def _a_node(self) -> str | None:
        up = [node.name for node in self.slurm.nodes if node.name not in self._down]
        return self.random.choice(up) if len(up) > 1 else None

    def _running_jobs(self) -> list[str]:
        ask = ("squeue", "--noheader", "--partition=shared", "--states=RUNNING", "--format=%i")
        return sorted(self.slurm.run(*ask).split())

    def _resume(self, node: str) -> None:
        self.slurm.resume_node(node)
        self._down.discard(node)


# --- What is found afterwards.


@dataclass
class Found:
    """All that a store says."""

    store: Path
    records: list[Record]
    submissions: list[Submission]

    @classmethod
    def of(cls, store: Path) -> "Found":
        return cls(store, list(record.read_all(store)), submission.read(store))

    @property
    def planned(self) -> dict[str, Planned]:
        """Every run that was ever submitted."""
        return {
            item.run.run_id: item
            for made in self.submissions
            for place in made.places()
            for item in made.runs(*place)
        }

    def attempts(self, run_id: str) -> list[Record]:
        return [one for one in self.records if one.run_id == run_id]

    def completed(self, run_id: str) -> list[Record]:
        return [one for one in self.attempts(run_id) if one.outcome == "completed"]

    def is_resumed(self, run_id: str) -> bool:
        return any(len(one.provenance.get("segments", ())) > 1 for one in self.completed(run_id))

    def whole_sweeps(self, block: str) -> set[str]:
        """Of a block: sweeps in which every run of it has completed."""
        members = [item for item in self.planned.values() if item.block == block]
        return set.intersection(
            *({one.block for one in self.completed(item.run.run_id)} for item in members)
        )


def faults(found: Found, wanted: set[str]) -> Iterator[str]:
    planned = found.planned
    for run_id in sorted(wanted | planned.keys()):
        done, item = found.completed(run_id), planned.get(run_id)
        if not done:
            ends = [one.outcome for one in found.attempts(run_id)] or ["no attempt"]
            yield f"run {run_id} is not finished: {', '.join(ends)}"
        elif item is not None and item.block is None and len(done) > 1:
            yield f"run {run_id} is finished {len(done)} times"
        for sweep_id, count in Counter(one.block for one in done).items():
            if sweep_id is not None and count > 1:
                yield f"run {run_id} is finished {count} times in sweep {sweep_id}"
    for block in sorted({item.block for item in planned.values() if item.block}):
        whole = found.whole_sweeps(block)
        if len(whole) != 1:
            yield f"block {block} was measured whole {len(whole)} times"
        members = [item.run.run_id for item in planned.values() if item.block == block]
        counted = {
            found.completed(run_id)[-1].block for run_id in members if found.completed(run_id)
        }
        if counted != whole:
            yield f"block {block}: records that count are of sweeps {sorted(counted)}"
    for pattern in ("claims/[!.]*", "runs/*/.task-*", "runs/*/.phase-*", "runs/*/.tmp-*"):
        for path in found.store.glob(pattern):
            yield f"left behind: {path.relative_to(found.store)}"
    for made in found.submissions:
        if not made.memory().get("is_settled"):
            yield f"submission {made.id} is not settled"


def left_processes(store: Path) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").replace("\0", " ")
            if "suites.harness" in words and str(store) in words:
                yield f"process {path.parent.name} is left: {words[:200]}"


def other_losses(found: Found, store: Path) -> Iterator[str]:
    """Runs that went on from a checkpoint are run again, from beginning to end, in peace."""
    resumed = [item for run_id, item in found.planned.items() if found.is_resumed(run_id)]
    if not resumed:
        print("no quality run was resumed: nothing to compare")
        return
    todo = plan.plan(store, [item.run for item in resumed])
    peace = Cluster(name="peace", executor="local", runs_in_parallel=provenance.num_cores())
    result = sweep(store, todo, peace)
    undisturbed = Found.of(store)
    for item in resumed:
        run_id = item.run.run_id
        if result.outcomes.get(run_id) != "completed":
            yield f"run {run_id} alone: {result.outcomes.get(run_id)}"
            continue
        ours, theirs = (losses(one.completed(run_id)[-1]) for one in (found, undisturbed))
        if ours != theirs:
            differ = sum(a != b for a, b in zip(ours, theirs, strict=False))
            yield f"run {run_id}: {differ} of {len(theirs)} losses are not those of its like"
    print(f"{len(resumed)} quality runs were resumed; their losses were compared bit for bit")


def losses(one: Record) -> list[tuple]:
    return [(s.metric, s.at, s.value) for s in one.samples if s.metric in LOSSES]


def print_outcomes(found: Found) -> None:
    rows: dict[int, Counter] = {}
    for run_id in {one.run_id for one in found.records}:
        for number, one in enumerate(found.attempts(run_id), start=1):
            rows.setdefault(number, Counter())[one.outcome] += 1
    names = sorted({name for row in rows.values() for name in row})
    print(f"\n| attempt | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for number, row in sorted(rows.items()):
        print(f"| {number} | {' | '.join(str(row[name] or '-') for name in names)} |")


# --- From beginning to end.


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where stores and logs go")
    parser.add_argument("--num-runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=4, choices=range(2, 6))
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and sacct")
    parser.add_argument("--every", type=float, default=8.0, help="seconds between two blows, mean")
    asked = parser.parse_args()
    folder = (asked.out / f"{datetime.now():%Y%m%d-%H%M%S}-seed{asked.seed}").resolve()
    folder.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the daemons with us
    with shaky(asked.nodes, asked.accounting) as slurm:
        return chaos(slurm, folder, asked)


def chaos(slurm: SlurmCluster, folder: Path, asked: argparse.Namespace) -> int:
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    users = Users(slurm.environment | {"PYTHONPATH": path}, folder / "store", folder / "users.log")
    todo = requests(asked.num_runs)
    made = Chaos(slurm, users, todo, random.Random(asked.seed))
    wanted = set().union(*(run_ids(users, request) for request in todo))
    print(f"{len(wanted)} runs and their parity, {asked.nodes} nodes, seed {asked.seed}: {folder}")
    for request in todo:  # nobody's first try is left in peace
        users.start("submit", *request)
        time.sleep(made.random.uniform(0.5, 6.0))
        if users.kill():
            made.say("kill a submitter")
        users.run("submit", *request)

    end = time.monotonic() + asked.num_runs * 7.5
    while time.monotonic() < end and slurm.run("squeue", "--noheader", "--partition=shared"):
        pause = CALM_S + made.random.expovariate(1 / max(asked.every - CALM_S, 0.1))
        time.sleep(min(pause, 30))
        made.mend()
        made.strike()
    made.say("mend all")
    made.mend(all_=True)
    slurm.run("scancel", "--name=urgent")
    settle(made, wanted)

    found = Found.of(users.store)
    wrong = [*faults(found, wanted), *left_processes(users.store)]
    wrong += other_losses(found, folder / "peace")
    print_outcomes(found)
    blows = ", ".join(f"{what} {count}" for what, count in made.done.most_common())
    print(f"\n{blows}; {len(found.submissions)} submissions, {len(found.records)} records, "
          f"{time.monotonic() - made.start:.0f} s")  # fmt: skip
    for one in wrong:
        print(f"WRONG: {one}")
    print(f"{len(wrong)} faults" if wrong else "nothing was lost, nothing doubled")
    said = {"seed": asked.seed, "blows": dict(made.done), "wrong": wrong}
    (folder / "chaos.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    shutil.copytree(slurm.folder / "log", folder / "slurm", dirs_exist_ok=True)
    return int(bool(wrong))


def run_ids(users: Users, request: list[str]) -> set[str]:
    command = [sys.executable, "-m", "suites", "plan", *request, "--results", str(users.store)]
    done = subprocess.run([*command, "--json"], cwd=ROOT, env=users.environment,
                          stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    return {one["run_id"] for one in json.loads(done.stdout)}


def settle(made: Chaos, wanted: set[str]) -> None:
    """Waits, and submits again what is missing, until nothing is."""
    users = made.users
    for _ in range(MAX_SUBMISSIONS):
        users.run("wait", "--every", "1", "--timeout", str(SETTLE_S), seconds=SETTLE_S + 60)
        found = Found.of(users.store)
        missing = [
            run_id for run_id in wanted | found.planned.keys() if not found.completed(run_id)
        ]
        if not missing:
            return
        made.say("submit again", f"{len(missing)} runs are not finished")
        for request in made.requests:
            users.run("submit", *request)
        users.run("retry")  # what is given up: a node may crash too often for us, not for the user


if __name__ == "__main__":
    sys.exit(main())
