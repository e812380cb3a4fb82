"""The fake commands of Slurm show the faults they are named after, word for word, and count."""

import os
import subprocess

import pytest
import slurm_shims
from slurm_cluster import SlurmCluster, require_slurm
from slurm_shims import Answer, SlurmShims


@pytest.fixture
def shims(tmp_path):
    """In front of commands that say their name and how often they were called."""
    real = tmp_path / "real"
    real.mkdir()
    for name in ("sbatch", "squeue"):
        script = real / name
        script.write_text(
            f'#!/bin/sh\necho x >>$0.log\necho {name} $(wc -l <$0.log) "$@"\nexit 3\n'
        )
        script.chmod(0o755)
    return SlurmShims(tmp_path / "shims", path=f"{real}:{os.environ['PATH']}")


def call(shims, *command, seconds=10):
    done = subprocess.run(
        command,
        env=os.environ | {"PATH": shims.path},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_calls_pass_through_and_are_counted_with_their_arguments(shims):
    assert call(shims, "squeue", "-h", "two words") == (3, "squeue 1 -h two words\n", "")
    assert call(shims, "squeue") == (3, "squeue 2\n", "")
    assert shims.calls("squeue") == [["-h", "two words"], []]
    assert shims.num_calls("squeue", "sbatch") == shims.num_calls() == 2
    shims.forget_calls()
    assert shims.num_calls() == 0


def test_calls_at_once_are_all_counted(shims):
    shims.answers("squeue", Answer(stdout=""))
    command = ["sh", "-c", "for i in $(seq 40); do squeue --name 'a\nb' $i & done; wait"]
    subprocess.run(command, env=os.environ | {"PATH": shims.path}, check=True)
    calls = shims.calls("squeue")
    assert sorted(int(arguments[-1]) for arguments in calls) == list(range(1, 41))
    assert all(arguments[:2] == ["--name", "a\nb"] for arguments in calls)


def test_answers_come_in_turn_and_the_last_one_stays(shims):
    call(shims, "squeue")
    shims.answers("squeue", slurm_shims.UNREACHABLE, Answer(stdout="it's 7\n", stderr="hm\n"))
    code, printed, complaint = call(shims, "squeue")
    assert (code, printed) == (1, "")
    assert complaint.startswith("slurm_load_jobs error: Unable to contact slurm controller")
    assert call(shims, "squeue") == call(shims, "squeue") == (0, "it's 7\n", "hm\n")


def test_a_stale_view_is_the_first_one_for_these_arguments(shims):
    shims.answers("squeue", slurm_shims.STALE)
    assert [call(shims, "squeue", "-j", "1")[1] for _ in range(2)] == ["squeue 1 -j 1\n"] * 2
    assert call(shims, "squeue", "-j", "2")[1] == "squeue 2 -j 2\n"


def test_a_job_can_be_submitted_and_its_id_lost(shims, tmp_path):
    shims.answers("sbatch", slurm_shims.SUBMITTED_THEN_KILLED, slurm_shims.SUBMITTED_THEN_HANGS)
    assert call(shims, "sbatch", "job") == (-9, "", "")
    with pytest.raises(subprocess.TimeoutExpired):
        call(shims, "sbatch", "job", seconds=0.5)
    assert len((tmp_path / "real" / "sbatch.log").read_text().split()) == 2


def test_a_slow_answer_is_late(shims):
    shims.answers("squeue", Answer(stdout="", after_s=5))
    with pytest.raises(subprocess.TimeoutExpired):
        call(shims, "squeue", seconds=0.3)


def test_a_command_that_is_not_installed_stays_so(tmp_path):
    shims = SlurmShims(tmp_path / "shims", path="/nowhere")
    assert shims.path.endswith(":/nowhere")
    shims.path = f"{tmp_path}/shims/bin:/usr/bin:/bin"  # the shims themselves need these
    assert "sacct: not installed" in call(shims, "sacct")[2]


def test_a_name_that_is_no_command_is_refused(shims):
    with pytest.raises(ValueError, match="sbtach"):
        shims.answers("sbtach", Answer())
    with pytest.raises(ValueError, match="hang"):
        Answer(then="crash")


@pytest.mark.slow
def test_canned_answers_are_what_slurm_says():
    require_slurm()
    limits = ("AccountingStorageEnforce=limits,qos",)
    with SlurmCluster(proctrack="pgid", extra=limits) as cluster:

        def said(*command):
            done = subprocess.run(
                command, env=cluster.environment, capture_output=True, text=True, check=False
            )
            return Answer(stdout=done.stdout, stderr=done.stderr, returncode=done.returncode)

        user = cluster.run("id", "-un").strip()
        limit = "MaxSubmitJobsPerUser=1"
        for command in (("add", "account", "lab"), ("add", "user", user, "account=lab"),
                        ("modify", "qos", "normal", "set", limit)):  # fmt: skip
            cluster.run("sacctmgr", "--immediate", *command)
        cluster.submit("sleep 60")
        command = ("sbatch", "--hold", "--mem=10", "--wrap=true", "--output=/dev/null")
        # slurmdbd tells slurmctld of the limit when it gets to it.
        cluster.wait_for(lambda: said(*command).returncode, 20, "a submission is refused")
        assert said(*command) == slurm_shims.OVER_SUBMIT_LIMIT
        cluster.kill_daemon("slurmctld")
        assert said("squeue") == slurm_shims.UNREACHABLE

    with SlurmCluster(accounting=False, proctrack="pgid") as cluster:
        assert said("sacct") == slurm_shims.NO_ACCOUNTING
