"""The node's side of `aerie doctor`, started as a job: `python -m suites.doctor.examine FOLDER`.

It answers files of the login node with files, looks round, and says what it finds in
FOLDER/node.json, step by step: what ends it too early is then known to the step. It needs the
standard library alone; what else a job needs is tried in processes of its own.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from suites.harness.record import write_atomically

ASKED, REPORT = "asked.json", "node.json"
HERE, THERE, ENOUGH = "here-", "there-", "enough"  # files of the login node, of the node, the end
LOOK_S = 0.02  # between two looks at the folder
ANSWER_S = 150.0  # until the login node is no longer listened to
CHILD_S = 90.0  # for a framework to be imported and to find its devices

_WORKER = """
import json
from suites.harness import provenance, worker
print(json.dumps(provenance.machine() | {"code": str(provenance.ROOT)}))
"""
# A sum on every device: one that is seen may still not work.
_BACKENDS = {
    "jax": """
import json
from importlib import metadata
import jax
found = jax.local_devices()
sums = [jax.device_put(jax.numpy.ones(8), one).sum().block_until_ready() for one in found]
print(json.dumps({"version": metadata.version("jax"), "platform": found[0].platform,
                  "devices": [one.device_kind for one in found]}))
""",
    "torch": """
import json
from importlib import metadata
import torch
found = range(torch.cuda.device_count())
sums = [torch.ones(8, device=f"cuda:{one}").sum().item() for one in found]
print(json.dumps({"version": metadata.version("torch"), "platform": "gpu" if found else "cpu",
                  "devices": [torch.cuda.get_device_name(one) for one in found] or ["cpu"]}))
""",
}


def main(folder: Path) -> None:
    asked = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    report: dict[str, Any] = {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "python": sys.executable,
    }
    publish(folder / REPORT, report)
    answer(folder)
    steps = {
        "worker": lambda: _child(sys.executable, _WORKER, {}),
        "scratch": _scratch,
        "scontrol": _scontrol,
    }
    for backend, python in asked["python"].items():
        steps[backend] = lambda backend=backend, python=python: _child(
            python or sys.executable, _BACKENDS[backend], asked["environment"]
        )
    for name, step in steps.items():
        publish(folder / REPORT, report | {"now": name})
        report[name] = step()
    publish(folder / REPORT, report | {"is_whole": True})


def publish(path: Path, values: dict[str, Any]) -> None:
    """As records are written."""
    write_atomically(path, json.dumps(values))


def answer(folder: Path) -> None:
    """For each file of the login node one of ours, with its token and when it was seen."""
    answered: set[str] = set()
    end = time.monotonic() + ANSWER_S
    while time.monotonic() < end:
        names = set(os.listdir(folder))
        seen_at = time.time()
        for name in sorted(names - answered):
            if name.startswith(HERE):
                token = json.loads((folder / name).read_text(encoding="utf-8"))["token"]
                values = {"token": token, "seen_at": seen_at, "sent_at": time.time()}
                publish(folder / name.replace(HERE, THERE), values)
                answered.add(name)
        if ENOUGH in names:
            return
        time.sleep(LOOK_S)


def file_system(path: Path) -> tuple[str, str]:
    """Type and mount point of the file system that holds a path."""
    path, found = path.resolve(), ("unknown", "/")
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        _, place, kind, *_ = line.split()
        place = place.replace("\\040", " ")
        # of several over one another the last is on top
        if path.is_relative_to(place) and len(place) >= len(found[1]):
            found = (kind, place)
    return found


def _child(python: str, code: str, environment: dict[str, str]) -> dict[str, Any]:
    """What a program prints, as its last line; {"error": line} where it fails."""
    try:
        done = subprocess.run(
            [python, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=CHILD_S,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | environment,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {CHILD_S:g} s"}
    except OSError as error:
        return {"error": f"{python}: {error.strerror}"}
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return {"error": (lines or [f"exit code {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def _scratch() -> dict[str, Any]:
    folder = tempfile.gettempdir()  # the first of TMPDIR, /tmp and others that can be written
    return {
        "asked": os.environ.get("TMPDIR"),
        "folder": folder,
        "file_system": file_system(Path(folder))[0],
        "free_bytes": shutil.disk_usage(folder).free,
    }


def _scontrol() -> dict[str, Any]:
    """Whether a job can ask for itself: it does so to be started again."""
    command = ["scontrol", "show", "job", os.environ.get("SLURM_JOB_ID", "")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=20
        )
    except FileNotFoundError:
        return {"error": "scontrol is not found"}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"scontrol does not answer: {error}"}
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"error": (lines or ["scontrol failed"])[-1][:300]} if done.returncode else {}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
