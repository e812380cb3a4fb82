"""Where jobs are started: one small protocol, behind it Slurm (through submitit) and this machine.

A job is `python -m suites.harness.worker SUBMISSION ARRAY`, run from the snapshot of the code; all
that it needs to know is in files. submitit writes the batch file and calls sbatch; it pickles
nothing, so that no job waits for a file that a killed submitter never moved into place.
"""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Protocol

from suites.harness import claims, slurm
from suites.harness.cluster import Cluster
from suites.harness.slurm import Seen
from suites.harness.submission import Submission

_UNHEARD = re.compile(
    r"timed? ?out|contact|connect|communicat|transmi|receive|said nothing", re.IGNORECASE
)
WORKER = "suites.harness.worker"
# Variables by which sbatch overrules its file, named otherwise than what a cluster asks for.
_OVERRULING = ("ARRAY_INX", "ERROR", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "REQUEUE",
               "SIGNAL", "TIMELIMIT", "WAIT")  # fmt: skip
# Else importing submitit configures logging anew, which closes every handler there is, and with
# that of absl (loaded by optax) the standard error itself.
os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")


class Refused(Exception):
    """What a submission was refused for, in the scheduler's words: one line."""


class Launcher(Protocol):
    """Carries arrays of jobs to where they run."""

    def script(self, submission: Submission, array: int, command: str | None = None) -> str:
        """What would be submitted, as text; `command` instead of the worker, where it is given."""

    def submit(self, submission: Submission, array: int, command: str | None = None) -> str:
        """Submits an array and returns its job id. Raises Refused; see may_be_taken."""

    def poll(self, job_ids: Iterable[str]) -> dict[str, Seen]:
        """What is known of the jobs of arrays, by ARRAY_INDEX: one query for all of them."""

    def find(self, submission: Submission, array: int) -> str | None:
        """The job id of an array whose submitter was killed before it could write it down."""

    def cancel(self, job_ids: Iterable[str]) -> None: ...


class Slurm:
    """Arrays of Slurm."""

    def script(self, submission: Submission, array: int, command: str | None = None) -> str:
        command = command or _command(submission, array)
        return self._array(submission, array)._make_submission_file_text(command, "")

    def submit(self, submission: Submission, array: int, command: str | None = None) -> str:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        if f"{array}_0" in submission.memory().get("settled", ()):
            raise Refused("given up by a later command: nothing was heard for 10 minutes")
        submission.logs(array).mkdir(parents=True, exist_ok=True)
        made = self._array(submission, array)
        try:
            # What sbatch says is in the error, too.
            with redirect_stderr(io.StringIO()), _outside_of_jobs(submission.cluster(array)):
                return made._submit_command(command or _command(submission, array)).job_id
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            raise Refused(_reason(str(error))) from None

    def poll(self, job_ids: Iterable[str]) -> dict[str, Seen]:
        return slurm.queue(job_ids)

    def find(self, submission: Submission, array: int) -> str | None:
        found = slurm.find(submission.job_name(array))
        return found[0] if found else None

    def cancel(self, job_ids: Iterable[str]) -> None:
        slurm.cancel(job_ids)

    def _array(self, submission: Submission, array: int):
        from submitit import SlurmExecutor

        cluster, count = submission.cluster(array), submission.arrays[array].num_jobs
        made = SlurmExecutor(submission.logs(array))
        made.update_parameters(
            job_name=submission.job_name(array),
            **_asked(cluster),
            array_parallelism=cluster.max_parallel or count,
            signal_delay_s=cluster.stop_warning_s,
            wckey=None,  # submitit's own: sites that know their keys refuse it
            stderr_to_stdout=True,
            setup=_setup(submission, cluster),
            srun_args=[
                "--export=ALL",  # a site's SBATCH_EXPORT=NONE would keep everything out
                f"--cpus-per-task={cluster.cpus_per_task}",  # srun inherits it no longer
                "--kill-on-bad-exit=1",
                *cluster.srun,
            ],
        )
        made.parameters["map_count"] = count
        return made


def may_be_taken(refusal: str) -> bool:
    """Whether an array may be in the queue all the same: sbatch does not report an answer, but that
    it has heard none."""
    return _UNHEARD.search(refusal) is not None


def _reason(said: str) -> str:
    """The line that tells: sbatch's error among what submitit says."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines or ["sbatch failed, and said nothing"])[-1]


def _asked(cluster: Cluster) -> dict:
    """What a job asks for, by the names of submitit; what is null is the site's default."""
    values = {
        name: getattr(cluster, name)
        for name in ("partition", "account", "qos", "constraint", "gres", "mem", "cpus_per_task")
    }
    further = {str(key).replace("_", "-"): value for key, value in cluster.sbatch.items()}
    further["requeue" if cluster.is_requeued else "no-requeue"] = True
    return {
        **{name: value for name, value in values.items() if value is not None},
        "time": cluster.time_min,
        "nodes": 1,
        "ntasks_per_node": 1,
        "additional_parameters": further,
    }


@contextlib.contextmanager
def _outside_of_jobs(cluster: Cluster) -> Iterator[None]:
    """Within it the environment, which sbatch hands on to the job, is without that of a job that we
    may be in (srun takes its memory for another request, we its restarts for ours), and without
    what would overrule the file. What the cluster does not ask for a user's SBATCH_ may."""
    names = [str(key).upper().replace("-", "_") for key in (*_asked(cluster), *cluster.sbatch)]
    ours = {f"SBATCH_{name}" for name in (*names, *_OVERRULING)}
    foreign = {
        key: os.environ.pop(key)
        for key in [*os.environ]
        if (key.startswith("SLURM") and key not in slurm.KEPT)
        or key in ours
        or (cluster.mem is not None and key.startswith("SBATCH_MEM_PER_"))
    }
    try:
        yield
    finally:
        os.environ.update(foreign)


def _setup(submission: Submission, cluster: Cluster) -> list[str]:
    """Lines of shell before the job: the site's, then the code that was submitted."""
    code = shlex.quote(submission.snapshot)
    return [
        *cluster.environment,
        f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1',
    ]


def _command(submission: Submission, array: int) -> str:
    cluster = submission.cluster(array)
    return cluster.command("-u", "-m", WORKER, str(submission.folder), str(array))


class ThisMachine:
    """Jobs of an array one after the other, in a process that outlives the command. Its job id
    names that process."""

    def script(self, submission: Submission, array: int, command: str | None = None) -> str:
        setup = _setup(submission, submission.cluster(array))
        if command is None:
            command = f"{_command(submission, array)} 0-{submission.arrays[array].num_jobs - 1}"
        return "\n".join(["#!/bin/bash", *setup, f"exec {command}", ""])  # whose process is the job

    def submit(self, submission: Submission, array: int, command: str | None = None) -> str:
        logs = submission.logs(array)
        logs.mkdir(parents=True, exist_ok=True)
        script = logs / "job.sh"
        script.write_text(self.script(submission, array, command), encoding="utf-8")
        name = submission.job_name(array)
        with (logs / "log.out").open("ab") as output:
            process = subprocess.Popen(
                ["bash", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"AERIE_JOB": name},
                start_new_session=True,
            )
        return f"{process.pid}@{claims.started(process.pid)}"  # a pid is used again, later

    def poll(self, job_ids: Iterable[str]) -> dict[str, Seen]:
        """By the id alone: the process runs all jobs of its array."""
        return {
            job_id: Seen(state="RUNNING", is_in_queue=True) for job_id in job_ids if _lives(job_id)
        }

    def find(self, submission: Submission, array: int) -> str | None:
        """By the name that the process carries in its environment."""
        name = f"AERIE_JOB={submission.job_name(array)}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if name in path.read_bytes().split(b"\0"):
                    pid = int(path.parent.name)
                    return f"{os.getsid(pid)}@{claims.started(os.getsid(pid))}"
        return None

    def cancel(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            if _lives(job_id):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(job_id.partition("@")[0]), signal.SIGTERM)


def _lives(job_id: str) -> bool:
    pid, _, started = job_id.partition("@")
    return claims.started(int(pid)) == started


def launcher(executor: str) -> Launcher:
    return {"slurm": Slurm, "local": ThisMachine}[executor]()


def log_of(submission: Submission, array: int, index: int) -> Path:
    """Where a job prints."""
    if submission.cluster(array).executor == "local":
        return submission.logs(array) / "log.out"
    job_id = submission.job_id(array)
    return submission.logs(array) / f"{job_id}_{index}_0_log.out"
