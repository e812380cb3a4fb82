"""The login node's side of `aerie doctor`: one short job, started as every job is, that says what a
node finds (examine.py), and files there and back, which tell how soon each sees the other's."""

import contextlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from suites.doctor import examine
from suites.harness import launch, pack, slurm, submission
from suites.harness.cluster import Cluster
from suites.harness.slurm import Seen
from suites.harness.submission import Submission

EXAMINE = "suites.doctor.examine"
JOB_MIN = 5  # that the job may take: it takes one where nothing is slow
ANSWER_S = 120.0  # that Python may take to begin, and Slurm to end a job after its time
LOOK_S = 0.05  # between two looks at the store, POLL_S at the queue
POLL_S = 2.0
ROUNDS, ROUNDS_S = 5, 90.0  # of files there and back, and until no further one is waited for


@dataclass(frozen=True)
class Round:
    """One file there and one back: times of the clocks of both sides."""

    sent_at: float  # here
    seen_at: float  # there
    answered_at: float  # there
    back_at: float  # here


@dataclass
class Heard:
    """What came of the job."""

    job_id: str
    waited_s: float | None = None  # until it began; None: it did not
    report: dict[str, Any] | None = None  # examine.py's, as far as it got
    rounds: list[Round] = field(default_factory=list)
    seen: Seen | None = None  # what Slurm said last
    last_words: str = ""  # of its log, where it ended too early
    is_late: bool = False  # it waited too long, and was cancelled

    @property
    def is_whole(self) -> bool:
        return bool(self.report and self.report.get("is_whole"))

    @property
    def state(self) -> str:
        """With why it waits or how it ended, as far as Slurm says."""
        if self.seen is None:
            return "not in the queue"
        more = self.seen.reason
        if self.seen.exit_code:
            more = f"exit code {self.seen.exit_code}"
        return f"{self.seen.state} ({more})" if more else self.seen.state


def skew(rounds: Iterable[Round]) -> tuple[float, float]:
    """Bounds of the node's clock minus ours: it saw a file after we wrote it, and we its answer
    after it wrote that."""
    rounds = list(rounds)
    return (
        max(one.answered_at - one.back_at for one in rounds),
        min(one.seen_at - one.sent_at for one in rounds),
    )


def draft(cluster: Cluster, store: Path, code: Path) -> Submission:
    """One job of a cluster, as a submission would have it."""
    return submission.draft(
        store,
        title="doctor",
        command="aerie doctor",
        snapshot=code,
        packed=[(cluster, [[pack.Job()]])],
    )


def talk(
    cluster: Cluster, store: Path, code: Path, asked: dict[str, Any], timeout_s: float
) -> Heard:
    """Starts the job, listens, and takes away what it has left. Raises launch.Refused."""
    folder = store.resolve() / "doctor" / uuid.uuid4().hex[:8]
    made = replace(draft(_short(cluster), store, code), folder=folder)
    folder.mkdir(parents=True)
    examine.publish(folder / examine.ASKED, asked)
    launcher, listener = launch.launcher(cluster.executor), None
    try:
        job_id = launcher.submit(made, 0, cluster.command("-u", "-m", EXAMINE, str(folder)))
        listener = _Listener(launcher, made, job_id)
        made.remember_job_id(0, job_id)
        return listener.listen(timeout_s)
    finally:
        if listener is not None and not listener.heard.is_whole:
            listener.cancel()
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another doctor is at work
            folder.parent.rmdir()


def _short(cluster: Cluster) -> Cluster:
    """The same request, for the few minutes that the job takes."""
    time_min = min(cluster.time_min, JOB_MIN)
    return replace(cluster, time=time_min, stop_warning_s=0, is_requeued=False)


class _Over(Exception):
    """Nothing more is to be heard."""


class _Listener:
    def __init__(self, launcher: launch.Launcher, made: Submission, job_id: str) -> None:
        self.launcher, self.made, self.heard = launcher, made, Heard(job_id)
        self.view_s = made.clusters[0].view_s
        self.ends_at = float("inf")  # when it is given up, once it runs
        self.polled_at, self.gone_at = float("-inf"), None
        self.said = ""

    def listen(self, timeout_s: float) -> Heard:
        heard = self.heard
        with contextlib.suppress(_Over):
            self.wait_until_begun(timeout_s)
            for one in self.exchange():
                heard.rounds.append(one)
            examine.publish(self.made.folder / examine.ENOUGH, {})
            while not heard.is_whole:
                self.say(f"looks at {heard.report.get('now', 'its node')}")
                time.sleep(LOOK_S)
                self.look()
        if not heard.is_whole and not heard.is_late:
            heard.last_words = self.last_words()
        return heard

    def wait_until_begun(self, timeout_s: float) -> None:
        start = time.monotonic()
        self.look()
        while self.heard.report is None:
            seen, now = self.heard.seen, time.monotonic()
            if seen is None or slurm.kind(seen.state) == slurm.WAITING:
                why = f": {seen.reason}" if seen and seen.reason else ""
                self.say(f"waits in the queue{why}")
                if now - start > timeout_s:
                    self.heard.is_late = True
                    raise _Over
            else:
                self.say("starts")
                self.ends_at = min(self.ends_at, now + ANSWER_S)
            time.sleep(LOOK_S)
            self.look()
        self.heard.waited_s = time.monotonic() - start
        self.ends_at = time.monotonic() + 60 * JOB_MIN + ANSWER_S

    def exchange(self) -> Iterator[Round]:
        """Until there are enough rounds, or one takes too long."""
        folder, end = self.made.folder, time.monotonic() + ROUNDS_S
        for number in range(ROUNDS):
            token, sent_at = uuid.uuid4().hex, time.time()
            examine.publish(folder / f"{examine.HERE}{number}", {"token": token})
            name = f"{examine.THERE}{number}"
            while name not in os.listdir(folder):
                self.say("sends files there and back")
                if time.monotonic() > end:
                    return
                time.sleep(examine.LOOK_S)
                self.look()
            back_at = time.time()
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            assert values["token"] == token, values
            yield Round(sent_at, values["seen_at"], values["sent_at"], back_at)

    def look(self) -> None:
        """The report as it is. Raises _Over where the job left without one that is whole, and the
        store had the time to show it."""
        folder, now = self.made.folder, time.monotonic()
        if examine.REPORT in os.listdir(folder):  # NFS remembers that a name was not there
            self.heard.report = json.loads((folder / examine.REPORT).read_text(encoding="utf-8"))
        if now - self.polled_at > POLL_S:
            self.polled_at = now
            self.poll(now)
        is_gone = self.gone_at is not None and now - self.gone_at > self.view_s
        if not self.heard.is_whole and (is_gone or now > self.ends_at):
            raise _Over

    def poll(self, now: float) -> None:
        job_id = self.heard.job_id
        try:
            found = self.launcher.poll([job_id])
        except slurm.Unreachable as error:
            self.say(f"cannot be asked for: {error}")
            return
        self.heard.seen = found.get(f"{job_id}_0") or found.get(job_id) or self.heard.seen
        is_here = any(one.is_in_queue for one in found.values())
        self.gone_at = None if is_here else self.gone_at or now

    def cancel(self) -> None:
        try:
            self.launcher.cancel([self.heard.job_id])
        except slurm.Unreachable as error:
            self.say(f"could not be cancelled: {error}")

    def last_words(self) -> str:
        """The last line of its logs that speaks of an error, else the last line."""
        logs = sorted(launch.log_of(self.made, 0, 0).parent.glob("*.out"))
        text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in logs)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if "rror" in line and "srun: error:" not in line]
        return (errors or lines or [""])[-1][:300]

    def say(self, line: str) -> None:
        if line != self.said:
            name = self.heard.job_id.partition("@")[0]  # of a process its number
            print(f"job {name} {line}", file=sys.stderr, flush=True)
        self.said = line
