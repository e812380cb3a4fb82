"""Whether the store's file system can do what records and claims are made of, and has space."""

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from suites import display
from suites.doctor import examine, site
from suites.doctor.finding import OK, PROBLEM, WARNING, Finding

MIN_FREE_BYTES = 2**30
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "fhgfs", "ceph", "panfs", "wekafs", "pvfs", "orangefs",
          "glusterfs", "cifs", "smb", "afs", "9p", "virtiofs", "daos", "fuse.")  # fmt: skip


def look(store: Path) -> Iterator[Finding]:
    try:
        store.mkdir(parents=True, exist_ok=True)
        kind, place = examine.file_system(store)
        usage = shutil.disk_usage(store)
    except OSError as error:
        advice = "name a folder that you may write: --results DIR"
        yield Finding("store", f"{store}: {error.strerror}", PROBLEM, advice)
        return
    shared = "shared" if kind.startswith(SHARED) else "local, by its type"
    found = f"{store.resolve()}: {kind} ({shared}) at {place}, {display.size(usage.free)} free"
    if usage.free < MIN_FREE_BYTES:
        yield Finding("store", found, WARNING, "little space is left: remove something")
    else:
        yield Finding("store", found, OK)
    if quota := _quota(kind, place):
        yield quota
    yield _operations(store)


def _operations(store: Path) -> Finding:
    """What records and claims are made of, tried."""
    trial, step = store / f".doctor-{uuid.uuid4().hex}", "a file"
    try:
        trial.mkdir()
        start = time.perf_counter()
        examine.publish(trial / "record", {})
        took = time.perf_counter() - start
        step = "a hard link"
        os.link(trial / "record", trial / "link")
        step = "a rename over a file"
        (trial / "link").replace(trial / "record")
        step = "the rename of a folder"
        (trial / "one").mkdir()
        (trial / "one").rename(trial / "two")
    except OSError as error:
        found, advice = f"{step} fails: {error.strerror}", "choose another file system: --results"
        return Finding("writing", found, PROBLEM, advice)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    words = f"atomic renames and hard links work; a small file takes {1000 * took:.1f} ms"
    return Finding("writing", words, OK)


def _quota(kind: str, place: str) -> Finding | None:
    """Of this user, in KiB, where the site's command tells."""
    user = ("-u", str(os.getuid()))
    lustre = kind.startswith("lustre")
    command = ("lfs", "quota", "-q", *user, place) if lustre else ("quota", "-w", "-f", place)
    if shutil.which(command[0]) is None:
        return None
    _, said = site.ask(*command)
    for line in said.splitlines():
        if match := re.search(r"\s(\d+)\*?\s+(\d+)\s+(\d+)\s", line):
            used, *limits = (int(number) * 1024 for number in match.groups())
            limit = min(filter(None, limits), default=None)
            of = "no limit" if limit is None else f"of {display.size(limit)}"
            if limit is not None and limit - used < MIN_FREE_BYTES:
                advice = "little is left: remove something"
                return Finding("quota", f"{display.size(used)} {of}", WARNING, advice)
            return Finding("quota", f"{display.size(used)} {of}", OK)
    return None
