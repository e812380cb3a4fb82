"""Who measures a run: a folder made by one atomic rename, its owner named inside.

Claims of processes that died are taken over; a claim is never waited for. Whether another job of
Slurm lives is known to Slurm alone: reconcile.py gives back what such a job has left behind.
"""

import contextlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from suites.harness import provenance
from suites.harness.record import write_synced

TORN_S = 60.0  # until an owner that cannot be read is taken for lost with its machine


def claim(store: Path, run_id: str) -> bool:
    """Takes the run for this process; False where another one that lives has it."""
    folder = store / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / run_id
    ready = folder / f".new-{uuid.uuid4().hex}"
    ready.mkdir()
    try:
        write_synced(ready / "owner.json", json.dumps(ourselves()))
    except OSError:
        shutil.rmtree(ready, ignore_errors=True)
        raise
    for _ in range(2):
        try:
            ready.rename(place)  # fails where the place is a folder with an owner in it
            return True
        except OSError:
            if not _set_aside_if_dead(place):
                break
    shutil.rmtree(ready)
    return False


def release(store: Path, run_id: str) -> None:
    """Gives a claim of ours back."""
    place = store / "claims" / run_id
    gone = place.with_name(f".gone-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        place.rename(gone)
        shutil.rmtree(gone)


def owner(store: Path, run_id: str) -> dict[str, Any] | None:
    """Who has a claim; None where nobody has, or where its file is not whole."""
    try:
        return json.loads((store / "claims" / run_id / "owner.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_alive(found: dict[str, Any]) -> bool:
    """Whether the owner still runs. Of another host and of another job nothing is known: it counts
    as alive. An earlier start of our own job is over."""
    job = provenance.job_id()
    if found.get("job") != job or found["host"] != provenance.node():
        return not (job and found.get("job") == job and is_earlier(found))
    if job and is_earlier(found):
        return False
    return started(found["pid"]) == found["started"]


def started(pid: int) -> str | None:
    """Boot and start time of a process, which tell it from a later one of the same number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return _without_proc(pid)
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else f"{boot} {rest[18]}"


def _without_proc(pid: int) -> str | None:
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "alive"


def is_earlier(found: dict[str, Any]) -> bool:
    """Whether the owner is of our job, and of a start before this one."""
    return found.get("job") == provenance.job_id() and found["restart"] < provenance.num_restarts()


def ourselves() -> dict[str, Any]:
    return {
        "host": provenance.node(),
        "job": provenance.job_id(),
        "restart": provenance.num_restarts(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "token": uuid.uuid4().hex,
    }


def _set_aside_if_dead(place: Path) -> bool:
    """Moves a dead owner's claim away. Its new name is the owner's token, so that of two rescuers
    the slower one cannot move away the claim that the faster one has just made."""
    found = owner(place.parent.parent, place.name)
    if found is not None and is_alive(found):
        return False
    token = found["token"] if found else _torn(place)
    if token is None:
        return not place.exists()
    try:
        place.rename(place.with_name(f".dead-{token}"))
    except OSError:
        return not place.exists()
    return True


def _torn(place: Path) -> str | None:
    """In place of a token, of a claim whose owner was not written whole; None where it may be."""
    try:
        (place / "owner.json").read_bytes()
        changed_at = place.stat().st_mtime
    except OSError:
        return None
    return f"torn-{changed_at}" if time.time() - changed_at > TORN_S else None
