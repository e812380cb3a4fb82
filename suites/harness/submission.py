"""What a submission leaves in the store, so that nothing is lost with the process that made it.

STORE/submissions/ID/
  submission.json     the intent, written before anything is submitted: clusters, arrays, their jobs
  left.json           runs that did not fit in the queue: they go with the user's next submission
  cancelled.json      who withdrew it: nothing of it goes with the next submission any more
  jobs/A_K.json       the runs of job K of array A, written before the intent
  runs.json           the ids of them all, by job, in one file; written before the intent, too
  arrays/A.json       what Slurm calls array A, written after sbatch
  beats/A_K.json      a job that runs: where, since when, its last sign of life
  seen.json           what reconcile.py remembers between two looks; may be deleted
  logs/               of the jobs; a run's own log lies beside its records
submission.json makes what was written before it count. Files that change are replaced whole;
seen.json, and arrays/A.json where a submitter was killed, by whoever looks.
"""

import getpass
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from implementations.config import build
from suites.harness import claims, provenance
from suites.harness.cluster import Cluster
from suites.harness.pack import Job
from suites.harness.plan import Planned
from suites.harness.record import write_atomically, write_synced


@dataclass(frozen=True, kw_only=True)
class Array:
    """Jobs of one cluster that are submitted at once."""

    number: int
    cluster: str
    num_jobs: int
    seconds: float  # that one job may take, likely


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The intent: what was to be submitted, where, and from which copy of the code."""

    folder: Path
    created_at: str
    user: str
    title: str
    command: str
    snapshot: str
    owner: dict[str, Any]  # the process that submits, as in claims.py
    clusters: tuple[Cluster, ...]
    arrays: tuple[Array, ...]
    num_left: int = 0

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def created_s(self) -> float:
        """Since the epoch."""
        return seconds(self.created_at)

    @property
    def stamp(self) -> str:
        """When it was made, as the names of attempts begin: they compare."""
        return datetime.fromisoformat(self.created_at).strftime("%Y%m%dT%H%M%S")

    @property
    def store(self) -> Path:
        return self.folder.parents[1]

    def cluster(self, array: int) -> Cluster:
        name = self.arrays[array].cluster
        return next(cluster for cluster in self.clusters if cluster.name == name)

    def is_elsewhere(self, array: int) -> bool:
        """Whether an array's processes are another machine's: from here they cannot be seen."""
        is_local = self.cluster(array).executor == "local"
        return is_local and self.owner["host"] != provenance.node()

    def job_name(self, array: int) -> str:
        """By which an array is found in the queue, also where its number was never written."""
        return f"aerie-{self.id}-{array}"

    def places(self) -> Iterator[tuple[int, int]]:
        """(array, index) of every job."""
        for array in self.arrays:
            for index in range(array.num_jobs):
                yield array.number, index

    def runs(self, array: int, index: int) -> list[Planned]:
        values = json.loads(self._job(array, index).read_text(encoding="utf-8"))
        return [Planned.from_stored(value) for value in values]

    def adaptive(self, array: int, index: int) -> list[Planned]:
        """The runs of a job that may not be needed (see rounds.py), parsed once."""
        if (array, index) not in self._adaptive:
            runs = self.runs(array, index)
            self._adaptive[array, index] = [item for item in runs if item.until_ci is not None]
        return self._adaptive[array, index]

    @cached_property
    def _adaptive(self) -> dict[tuple[int, int], list[Planned]]:
        """An intent does not change."""
        return {}

    def run_ids(self, array: int, index: int) -> list[str]:
        return self.run_ids_of.get((array, index), [])

    @cached_property
    def run_ids_of(self) -> dict[tuple[int, int], list[str]]:
        """Run ids of all jobs, from one file."""
        values = json.loads((self.folder / "runs.json").read_text(encoding="utf-8"))
        return {(a, k): ids for a, k, ids in values}

    def left(self) -> list[tuple[Planned, Cluster]]:
        """What did not fit in the queue, and where it would go."""
        if not self.num_left:
            return []
        values = json.loads((self.folder / "left.json").read_text(encoding="utf-8"))
        known = {cluster.name: cluster for cluster in self.clusters}
        return [(Planned.from_stored(value), known[name]) for value, name in values]

    def answer(self, array: int) -> dict[str, Any]:
        """What the scheduler said to an array, and when; nothing before that is written."""
        return _read(self.folder / "arrays" / f"{array}.json") or {}

    def job_id(self, array: int) -> str | None:
        """What Slurm calls an array; None before that is known, and where it was refused."""
        if array not in self._job_ids:
            job_id = self.answer(array).get("job_id")
            if job_id is None:
                return None
            self._job_ids[array] = job_id
        return self._job_ids[array]

    @cached_property
    def _job_ids(self) -> dict[int, str]:
        """What is known does not change."""
        return {}

    def refusal(self, array: int) -> str | None:
        """Why the scheduler did not take an array."""
        return self.answer(array).get("refusal")

    def remember_job_id(self, array: int, job_id: str) -> None:
        """Known to this process whether or not it can be written down."""
        self._job_ids[array] = job_id
        values = {"job_id": job_id, "submitted_at": _now()}
        write_atomically(self.folder / "arrays" / f"{array}.json", json.dumps(values))

    def remember_refusal(self, array: int, reason: str) -> None:
        values = {"refusal": reason, "submitted_at": _now()}
        write_atomically(self.folder / "arrays" / f"{array}.json", json.dumps(values))

    def beat_path(self, array: int, index: int) -> Path:
        return self.folder / "beats" / f"{array}_{index}.json"

    def beat(self, array: int, index: int) -> dict[str, Any] | None:
        return _read(self.beat_path(array, index))

    def beats(self) -> dict[tuple[int, int], dict[str, Any]]:
        found = {}
        for path in (self.folder / "beats").glob("[!.]*.json"):
            array, _, index = path.stem.partition("_")
            if (values := _read(path)) is not None:
                found[int(array), int(index)] = values
        return found

    def logs(self, array: int) -> Path:
        return self.folder / "logs" / str(array)

    @property
    def is_cancelled(self) -> bool:
        return (self.folder / "cancelled.json").exists()

    def cancel(self) -> None:
        """Withdraws what was refused, or did not fit in the queue."""
        values = {"user": user_name(), "cancelled_at": _now()}
        write_atomically(self.folder / "cancelled.json", json.dumps(values))

    def memory(self) -> dict[str, Any]:
        return _read(self.folder / "seen.json") or {}

    def remember(self, memory: dict[str, Any]) -> None:
        write_atomically(self.folder / "seen.json", json.dumps(memory))

    def _job(self, array: int, index: int) -> Path:
        return self.folder / "jobs" / f"{array}_{index}.json"


Packing = list[tuple[Cluster, list[list[Job]]]]  # arrays of jobs, by cluster


def intend(
    store: Path,
    *,
    title: str,
    command: str,
    snapshot: Path,
    packed: Packing,
    left: list[tuple[Planned, str]],
) -> Submission:
    """Writes the whole intent; its last file, submission.json, makes it one. `left` names the
    cluster of each run."""
    made = draft(
        store,
        title=title,
        command=command,
        snapshot=snapshot,
        packed=packed,
        num_left=len(left),
    )
    run_ids = []
    jobs = [jobs for _, arrays in packed for jobs in arrays]
    for array, index in made.places():
        job = jobs[array][index]
        text = json.dumps([item.stored() for item in job.runs])
        write_synced(made.folder / "jobs" / f"{array}_{index}.json", text)
        run_ids.append([array, index, [item.run.run_id for item in job.runs]])
    write_atomically(made.folder / "runs.json", json.dumps(run_ids))
    if left:
        stored = [[item.stored(), name] for item, name in left]
        write_atomically(made.folder / "left.json", json.dumps(stored))
    write_atomically(made.folder / "submission.json", json.dumps(_stored(made), indent=1))
    return made


def draft(
    store: Path,
    *,
    title: str,
    command: str,
    snapshot: Path,
    packed: Packing,
    num_left: int = 0,
) -> Submission:
    """What would be written."""
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    groups = [(cluster, jobs) for cluster, arrays in packed for jobs in arrays]
    arrays = [
        Array(
            number=number,
            cluster=cluster.name,
            num_jobs=len(jobs),
            seconds=max(job.seconds.likely for job in jobs),
        )
        for number, (cluster, jobs) in enumerate(groups)
    ]
    return Submission(
        folder=store.resolve() / "submissions" / name,
        created_at=_now(),
        user=user_name(),
        title=title,
        command=command,
        snapshot=str(snapshot),
        owner=claims.ourselves(),
        clusters=tuple(cluster for cluster, _ in packed),
        arrays=tuple(arrays),
        num_left=num_left,
    )


def read(store: Path) -> list[Submission]:
    """Every submission of a store, oldest first; what was killed before its intent is none."""
    paths = sorted((store / "submissions").glob("[!.]*/submission.json"))
    return [load(path.parent) for path in paths]


def find(store: Path, name: str) -> Submission:
    """The submission of an id, or of the beginning of one."""
    found = [one for one in read(store) if one.id.startswith(name)]
    if len(found) != 1:
        known = ", ".join(one.id for one in read(store)[-5:]) or "none"
        what = "no submission" if not found else "several submissions"
        raise ValueError(f"{what} {name!r} in {store}; the last are: {known}.")
    return found[0]


def _stored(submission: Submission) -> dict[str, Any]:
    return {key: value for key, value in asdict(submission).items() if key != "folder"}


def load(folder: Path) -> Submission:
    """An intent does not change: who looks again and again parses it, and its runs, once."""
    return _load(folder.resolve(), (folder / "submission.json").stat().st_mtime_ns)


@cache
def _load(folder: Path, written_ns: int) -> Submission:
    values = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    clusters = tuple(build(Cluster, value, "submission") for value in values["clusters"])
    arrays = tuple(build(Array, value, "submission") for value in values["arrays"])
    return Submission(**(values | {"folder": folder, "clusters": clusters, "arrays": arrays}))


def _read(path: Path) -> dict[str, Any] | None:
    """A file's values; None where it is not there, or not whole (a torn beat)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container that does not know its users
        return str(os.getuid())


def seconds(time: str) -> float:
    """Since the epoch."""
    return datetime.fromisoformat(time).timestamp()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
