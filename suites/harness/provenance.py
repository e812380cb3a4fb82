"""Where a run ran and on what code: machine, versions, commit, and the build key of promise 4.

Nothing here imports a framework: versions come from package metadata, the machine from /proc.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from implementations.engine import CPU, ENGINES, TPUS
from suites.harness import syntax

ROOT = Path(__file__).resolve().parents[2]
_VERSIONS = """
import json, sys
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""
SNAPSHOT = "snapshot.json"  # in the root of a copy of the code: the commit it was taken at
PACKAGES = ("numpy", "jax", "jaxlib", "libtpu", "optax", "torch", "triton", "transformers",
            "lm_eval", "aerie")  # fmt: skip
LIBRARIES = {
    "jax": ("numpy", "jax", "jaxlib", "optax"),
    "torch": ("numpy", "torch", "triton"),
    "transformers": ("numpy", "torch", "transformers"),
}
QUESTIONS = {"downstream": ("lm_eval",)}  # suite -> the packages that ask what it asks
DEVICE_KINDS = (CPU, "a100", "h100", "h200", *TPUS)


@cache
def versions(python: str | None = None) -> dict[str, str | None]:
    """Installed versions by package, here or where another interpreter finds them; None for what is
    not installed."""
    if python is None:
        return {name: _version(name) for name in PACKAGES}
    command = [python, "-c", _VERSIONS, *PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        why = (error.stderr.splitlines() or [str(error)])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    raise ValueError(f"cluster.python: {python} does not run: {why}")


@cache
def versions_on_node(python: str | None) -> dict[str, str | None]:
    """The same where runs are started; none of an interpreter that does not run there, so that its
    own runs fail, and not all of a job."""
    try:
        return versions(python)
    except ValueError:
        return {}


def libraries(backend: str, device_name: str) -> tuple[str, ...]:
    """The packages that make a backend's results on a device."""
    compiler = ("libtpu",) if device_name in TPUS else ()
    return (*LIBRARIES.get(backend, ("numpy",)), *compiler)


def build_key(
    suite: str, backend: str, device_name: str, found: dict[str, str | None] | None = None
) -> str:
    """What a run executes, as two digests with a dot between: the engine (code of the backend, its
    libraries, the device), then the question (the suite and the harness). Parity verifies speed
    of the same first half; a run is current while both halves are. `found` are the versions of
    libraries, if not ours.
    """
    found = versions() if found is None else found
    both = libraries(backend, device_name), QUESTIONS.get(suite, ())
    engine, question = (tuple(f"{name} {found.get(name)}" for name in names) for names in both)
    return _build_key(suite, backend, device_name, engine, question)


@cache
def _build_key(
    suite: str,
    backend: str,
    device_name: str,
    libraries_now: tuple[str, ...],
    questions_now: tuple[str, ...],
) -> str:
    engine = engine_modules(backend)
    question = closure({f"suites.{suite}", "suites.harness.child"}) - engine
    halves = (
        [*_digests(engine), *libraries_now, device_name],
        [*_digests(question), *questions_now],
    )
    syntax.keep()
    return ".".join(
        hashlib.blake2b("\n".join(half).encode(), digest_size=6).hexdigest() for half in halves
    )


def engine_modules(backend: str) -> set[str]:
    """Modules that a backend's engine imports, found in their syntax.

    Mixers and the parts of a backend are loaded by name too, so their folders count whole.
    """
    engine = ENGINES[backend]
    found = {engine} | _modules_below(ROOT / "implementations" / "mixers")
    folder = Path(_origin(engine)).parent
    if folder.is_relative_to(ROOT):
        found |= _modules_below(folder)
    return closure(found)


def closure(found: set[str]) -> set[str]:
    """These modules and all of implementations/ and suites/ that they import, however deep."""
    found, waiting = set(found), sorted(found)
    while waiting:
        for name in syntax.imports(_origin(waiting.pop())):
            is_ours = name.split(".")[0] in ("implementations", "suites")
            if is_ours and name not in found and _origin(name):
                found.add(name)
                waiting.append(name)
    return found


def machine() -> dict[str, Any]:
    """What this machine has, without asking a framework."""
    return {
        "host": node(),
        "job": job_id(),
        "cpu_model": cpu_model(),
        "num_cores": num_cores(),
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
        "platform": _platform(),
    }


def _platform() -> str:
    """As platform.platform(), which starts a process to ask for the processor, and drops that."""
    if sys.platform != "linux":
        return platform.platform()
    here = os.uname()
    return f"{here.sysname}-{here.release}-{here.machine}-with-{''.join(platform.libc_ver())}"


def node() -> str:
    """The name of this machine: Slurm's own where it started us, as several may share a host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_id() -> str | None:
    """Slurm's name of the job that we are in, 123_4 in an array."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}") for part in ("JOB_ID", "TASK_ID"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def num_restarts() -> int:
    """How often Slurm has started our job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


@cache
def device_name(device_kind: str) -> str:
    """The device found for a requested kind: the CPU's model, or the first GPU's name."""
    if device_kind == CPU:
        return cpu_model()
    if device_kind in TPUS:
        return device_kind
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        if answer.strip():
            return answer.splitlines()[0].strip()
    return device_kind


@cache
def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def num_cores() -> int:
    return len(cores())


def cores() -> list[int]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def memory_bytes() -> int:
    """Memory that this process may use: of the machine, or of its control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (*_cgroup_files("memory.max"), *_cgroup_files("memory.limit_in_bytes")):
        text = limit.read_text().strip()
        if text.isdigit():
            total = min(total, int(text))
    return total


def num_out_of_memory_kills() -> int | None:
    """Processes that the kernel has killed for memory so far, in our group; None: not told."""
    for path in (*_cgroup_files("memory.events"), *_cgroup_files("memory.oom_control")):
        for line in path.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


@cache
def git_commit() -> str | None:
    """The commit of this checkout, with +dirty when files differ; None outside of git. A copy of
    the code (snapshot.py) has that of the checkout it was taken from."""
    if (ROOT / SNAPSHOT).exists():
        return json.loads((ROOT / SNAPSHOT).read_text(encoding="utf-8"))["git_commit"]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    said = _git("status", "--porcelain=v2", "--branch", "--untracked-files=no").splitlines()
    facts = dict(line.split(" ", 2)[1:] for line in said if line.startswith("# "))
    dirty = "+dirty" if any(not line.startswith("#") for line in said) else ""
    commit = facts.get("branch.oid", "(initial)")
    return commit + dirty if commit != "(initial)" else None


def parameters_digest(values: dict[str, np.ndarray]) -> str:
    """blake2b over names, shapes and values: equal for both backends from one seed."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(values):
        value = np.ascontiguousarray(values[name], dtype=np.float32)
        digest.update(f"{name} {value.shape}".encode())
        digest.update(value.data)
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _cgroup_files(name: str) -> list[Path]:
    """Files of this name in our control groups (v2 and v1) and those above them, that exist: Slurm
    limits a job, and a task is in a group further down."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            group = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            found += [place / name for place in (group, *group.parents)]
    return [path for path in found if path.is_file()]


def _modules_below(folder: Path) -> set[str]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
    }


def _digests(modules: set[str]) -> list[str]:
    """Of the modules, and of the data files that lie beside them."""
    folders = {Path(_origin(name)).parent for name in modules}
    data = sorted(path for folder in folders for path in folder.glob("*.yaml"))
    return [
        *(f"{name} {syntax.digest(_origin(name))}" for name in sorted(modules)),
        *(hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() for path in data),
    ]


@cache
def _origin(module: str) -> str:
    """The file of a module, found without importing it or its parents; empty when there is none."""
    top, *rest = module.split(".")
    if not rest:
        spec = find_spec(top)
        return spec.origin or "" if spec else ""
    for place in getattr(sys.modules.get(top), "__path__", [str(ROOT / top)]):
        path = os.path.join(place, *rest)  # in text: 400 of pathlib's would be 20 ms of a child
        for file in (f"{path}.py", os.path.join(path, "__init__.py")):
            if os.path.isfile(file):
                return file
    return ""
