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

KEPT_S = 86400.0  # that the name of a dead claim stands in the way of a slower rescuer
TORN_S = 60.0  # until an owner that cannot be read is taken for lost with its machine


def claim(store: Path, run_id: str) -> str | None:
    """Takes the run for this process, and returns the token that gives it back; None where another
    process that lives has it."""
    folder = store / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / run_id
    ready = folder / f".new-{uuid.uuid4().hex}"
    ready.mkdir()
    made = ourselves()
    try:
        write_synced(ready / "owner.json", json.dumps(made))
    except OSError:
        shutil.rmtree(ready, ignore_errors=True)
        raise
    for _ in range(2):
        try:
            ready.rename(place)  # fails where the place is a folder with an owner in it
            return made["token"]
        except OSError:
            if not _set_aside_if_dead(place):
                break
    shutil.rmtree(ready)
    return None


def release(store: Path, run_id: str, token: str) -> None:
    """Gives back the claim of this token; one that somebody else has made since stays."""
    place = store / "claims" / run_id
    if _token(place) != token:
        return
    gone = place.with_name(f".dead-{token}")
    try:
        place.rename(gone)
    except OSError:
        if _token(place) == token:
            raise
        return
    if _token(gone) != token:  # made between our look and our move
        with contextlib.suppress(OSError):
            gone.rename(place)
    else:
        shutil.rmtree(gone, ignore_errors=True)


def sweep_up(store: Path) -> None:
    """Removes what was set aside, or never made, long ago."""
    for path in (store / "claims").glob(".*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_ctime > KEPT_S:
                shutil.rmtree(path)


def owner(store: Path, run_id: str) -> dict[str, Any] | None:
    """Who has a claim; None where nobody has, or where its file is not whole."""
    try:
        return json.loads((store / "claims" / run_id / "owner.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def owners(store: Path) -> dict[str, dict[str, Any]]:
    """Who has which claim, by its name."""
    names = [place.name for place in (store / "claims").glob("[!.]*")]
    return {name: found for name in names if (found := owner(store, name)) is not None}


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


def _token(place: Path) -> str | None:
    return (owner(place.parent.parent, place.name) or {}).get("token")


def _torn(place: Path) -> str | None:
    """In place of a token, of a claim whose owner was not written whole; None where it may be."""
    try:
        (place / "owner.json").read_bytes()
        changed_at = place.stat().st_mtime
    except OSError:
        return None
    return f"torn-{changed_at}" if time.time() - changed_at > TORN_S else None
