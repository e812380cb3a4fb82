"""What Slurm says: its commands, asked in batches, their answers as plain values.

squeue knows what waits and runs, and for a while what has ended; sacct knows the rest, where a site
keeps accounts. Nothing here imports submitit; Slurm 20.11 to 25 answer in these forms.
"""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

TIMEOUT_S = 60.0  # of one command: a busy controller takes its time
_GONE = ("Invalid job id",)
_NO_ACCOUNTS = ("accounting storage is disabled", "Slurm accounting storage is disabled")
_FORMAT = "%i|%T|%r|%N|%M|%e"
_LIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING",
         "STAGE_OUT", "RESIZING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT",
         "RESV_DEL_HOLD")  # fmt: skip


class Unreachable(Exception):
    """Slurm did not answer: nothing is known, and nothing may be concluded. One line."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What Slurm says of one job at its latest start."""

    state: str  # the first word: CANCELLED of "CANCELLED by 0"
    reason: str = ""  # why it waits
    node: str = ""
    elapsed_s: float | None = None
    is_in_queue: bool = False  # in a state that goes on
    by: str = ""  # who cancelled it


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a site allows, as far as it says."""

    max_array_size: int | None = None
    max_submit_jobs: int | None = None  # of this user, and of all
    num_queued: int = 0  # jobs of this user that are in the queue


def queue(job_ids: Iterable[str]) -> dict[str, Seen]:
    """Jobs of these arrays by ARRAY_INDEX: one squeue for all; of what it has forgotten, one sacct.
    A job that neither knows is not in the answer. Raises Unreachable."""
    job_ids = sorted(set(job_ids))
    if not job_ids:
        return {}
    found = dict(_squeue(job_ids))
    known = {key.partition("_")[0] for key in found}
    forgotten = [job_id for job_id in job_ids if job_id not in known]
    ended = {key.partition("_")[0] for key, one in found.items() if not one.is_in_queue}
    if forgotten or ended:  # squeue drops the jobs of an array one by one
        for key, one in _sacct([*forgotten, *ended]):
            found.setdefault(key, one)
    return found


def find(name: str) -> list[str]:
    """Job ids of the arrays of this name, ours: in the queue, or in the accounts."""
    said = _ask("squeue", "--me", "--noheader", "--states=all", f"--name={name}", "--format=%F")
    found = said.split()
    if not found:
        with contextlib.suppress(LookupError):
            options = ("--noheader", "-X", "-P", "--format=JobID", "--starttime=now-7days")
            found = [_base(word) for word in _ask("sacct", f"--name={name}", *options).split()]
    return sorted(set(found))


def limits() -> Limits:
    """Raises Unreachable."""
    config = _ask("scontrol", "show", "config")
    queued = _ask("squeue", "--me", "--noheader", "--array", "--format=%i")
    return Limits(
        max_array_size=_number(config, "MaxArraySize"),
        max_submit_jobs=_least(_number(config, "MaxJobCount"), _max_submit_jobs()),
        num_queued=len(queued.split()),
    )


def describe(job_id: str | None) -> dict[str, str]:
    """What the controller says of one job: key=value; empty where it cannot be asked."""
    if job_id is None:
        return {}
    try:
        said = _ask("scontrol", "show", "job", "-o", job_id, timeout_s=5.0)
    except (Unreachable, LookupError):
        return {}
    return dict(word.partition("=")[::2] for word in said.split() if "=" in word)


def earlier_end(job_id: str | None) -> Seen | None:
    """How the last start before this one of a job ended, by the accounts; None where they do not
    tell."""
    if job_id is None:
        return None
    try:
        starts = [one for key, one in _sacct([job_id], every=True) if key == job_id]
    except Unreachable:
        return None
    return next((one for one in reversed(starts) if not one.is_in_queue), None)


def requeue(job_id: str) -> bool:
    """Asks Slurm to start a job again: our own. Its effect is that we are killed, and the command
    that asks with us: it gets a session of its own, and a signal is no failure."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # inherited by the command
    try:
        command = ["scontrol", "requeue", job_id]
        done = subprocess.run(
            command,
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"cannot be started again from here: {error}", flush=True)
        return False
    finally:
        signal.signal(signal.SIGTERM, before)
    if done.returncode > 0:
        print(f"cannot be started again: {done.stderr.strip()}", flush=True)
    return done.returncode <= 0


def cancel(job_ids: Iterable[str]) -> None:
    for job_id in job_ids:
        with contextlib.suppress(LookupError):
            _ask("scancel", job_id)


def _squeue(job_ids: list[str]) -> Iterator[tuple[str, Seen]]:
    options = ("--noheader", "--array", "--states=all", f"--format={_FORMAT}")
    try:
        said = _ask("squeue", *options, f"--jobs={','.join(job_ids)}")
    except LookupError:  # one that it has forgotten spoils the answer for a single job
        return
    for line in said.splitlines():
        key, state, reason, node, elapsed, _ = (*line.split("|"), "", "", "", "", "")[:6]
        state = _word(state)
        yield (
            key,
            Seen(
                state=state,
                reason="" if reason == "None" else reason,
                node=node,
                elapsed_s=_seconds(elapsed),
                is_in_queue=state in _LIVE,
            ),
        )


def _sacct(job_ids: list[str], *, every: bool = False) -> Iterator[tuple[str, Seen]]:
    """The last start of each job (every one, where asked), oldest first. A kill for memory stands
    in the step's state, not in the job's."""
    fields = "JobID,State,NodeList,ElapsedRaw"
    options = ("--noheader", "-P", "-D", f"--format={fields}", f"--jobs={','.join(job_ids)}")
    try:
        said = _ask("sacct", *options)
    except LookupError:
        return
    found: dict[str, list[Seen]] = {}
    for line in said.splitlines():
        name, state, node, elapsed = line.split("|")[:4]
        key, _, step = name.partition(".")
        if "[" in key:
            continue
        word, _, by = state.partition(" by ")
        if step:
            if _word(word) == "OUT_OF_MEMORY" and key in found:
                last = found[key][-1]
                found[key][-1] = Seen(
                    state="OUT_OF_MEMORY", node=last.node, elapsed_s=last.elapsed_s
                )
            continue
        one = Seen(
            state=_word(word),
            node=node,
            elapsed_s=float(elapsed or 0),
            is_in_queue=_word(word) in _LIVE,
            by=by,
        )
        found.setdefault(key, []).append(one)
    for key, starts in found.items():
        for one in starts if every else starts[-1:]:
            yield key, one


def _max_submit_jobs() -> int | None:
    """Of our associations and of the quality of service they come with, where accounts are kept."""
    user = os.environ.get("USER") or str(os.getuid())
    try:
        said = _ask("sacctmgr", "-n", "-P", "show", "assoc", f"user={user}", "format=MaxSubmitJobs")
    except (Unreachable, LookupError):
        return None
    numbers = [int(word) for word in said.split() if word.isdigit()]
    return max(numbers, default=None)


def _ask(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    """A command's answer. Raises Unreachable where Slurm did not answer; LookupError where it
    knows no such job, or keeps no accounts."""
    try:
        done = subprocess.run(
            command,
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except FileNotFoundError:
        raise Unreachable(f"{command[0]} is not installed here.") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} did not answer within {timeout_s:g} s.") from None
    said = f"{done.stdout}\n{done.stderr}"
    if done.returncode == 0 and not any(word in said for word in _NO_ACCOUNTS):
        return done.stdout
    if any(word in said for word in (*_GONE, *_NO_ACCOUNTS)):
        raise LookupError(command[0])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise Unreachable((lines or [f"{command[0]} exited with {done.returncode}"])[-1].strip())


def _environment() -> dict[str, str]:
    """Ours without what changes the form of answers (SQUEUE_FORMAT, SLURM_TIME_FORMAT, ...)."""
    noisy = re.compile(r"(SQUEUE|SACCT|SCONTROL|SBATCH|SINFO)_|SLURM_(TIME_FORMAT|CLUSTERS|BITSTR)")
    kept = {key: value for key, value in os.environ.items() if not noisy.match(key)}
    return kept | {"LC_ALL": "C"}


def _word(state: str) -> str:
    return (state.split() or ["UNKNOWN"])[0].rstrip("+")


def _base(job_id: str) -> str:
    return re.match(r"\d*", job_id).group()


def _seconds(text: str) -> float | None:
    """Of [days-][hours:]minutes:seconds."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts):
        return None
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + int(part)
    return float(seconds + int(days or 0) * 86400)


def _number(text: str, key: str) -> int | None:
    match = re.search(rf"^{key}\s*=\s*(\d+)", text, re.MULTILINE)
    return int(match.group(1)) if match else None


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)
