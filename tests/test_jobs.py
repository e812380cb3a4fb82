"""Submitting as people do it: the bill, the batch file, one line for what is wrong; then a real
Slurm, from submit to collect."""

import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from slurm_shims import OVER_SUBMIT_LIMIT, UNREACHABLE, Answer, SlurmShims

from analysis import statistics
from suites import compose, jobs
from suites.__main__ import main
from suites.harness import plan, provenance, record, submission
from suites.harness.execute import Task
from suites.harness.measure import sample
from suites.harness.record import write
from suites.harness.submission import Submission

ONE = ("suite=training_speed", "family=hawk", "backend=torch", "suite.rounds=2",
       "suite.seq_lens=[16]", "suite.repeats=1", "suite.tokens_per_step=64")  # fmt: skip
CLUSTER = ("cluster=slurm_cpu", "cluster.partition=cpu", "cluster.mem=1G", "cluster.time=10",
           "cluster.cpus_per_task=1", "cluster.stop_warning_s=60", "cluster.view_s=1")  # fmt: skip
NUMBERS = itertools.count()  # two submissions of one second have ends of their own
CONFIG = "MaxArraySize = 1001\nMaxJobCount = 10000\nAccountingStorageType = x/none\n"


@pytest.fixture
def shims(tmp_path, monkeypatch):
    """A Slurm of commands alone: its queue is empty, and takes everything."""
    made = SlurmShims(tmp_path / "shims", path="/usr/bin:/bin")
    made.answers("scontrol", Answer(stdout=CONFIG))
    made.answers("squeue", Answer(stdout=""))
    made.answers("sbatch", Answer(stdout="Submitted batch job 77\n"))
    for command in ("scancel", "sacct", "srun"):
        made.answers(command, Answer(stdout=""))
    monkeypatch.setenv("PATH", made.path)
    return made


def leave(store, run, outcome, attempt, build, block=None, samples=()):
    """A record as a run would leave it."""
    facts = {"versions": provenance.versions(), "device_name": provenance.cpu_model()}
    task = Task(run=run, build=build, attempt=attempt, parent_pid=0, block=block)
    write(store, task.record(outcome, provenance=facts, started_at="", seconds=1.0,
                             samples=samples))  # fmt: skip


def end(made, outcome, suites=("training_speed", "parity")):
    """As if the jobs of a submission had ended, and all their runs so; other suites completed."""
    for array, index in made.places():
        for item in made.runs(array, index):
            so = outcome if item.run.suite in suites else "completed"
            leave(made.store, item.run, so, f"{made.stamp}{next(NUMBERS):06}", item.build)
    made.remember({"is_settled": True})


@pytest.fixture
def aerie(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_a_dry_run_prints_the_batch_file_and_writes_nothing(aerie, shims, tmp_path):
    store = tmp_path / "raw"
    options = ("cluster.account=lab", "cluster.sbatch={mail-type: FAIL}",
               "cluster.setup=[module load gcc]", "cluster.scratch=/local",
               "cluster.max_parallel=2", "cluster.container=apptainer exec image.sif")  # fmt: skip
    code, out, _ = aerie("submit", *ONE, *CLUSTER, *options, "--results", store, "--dry-run")
    assert code == 0
    assert "device-hours" in out
    assert "runs: 3 new." in out  # and the proxy that verifies them
    for line in ("--partition=cpu", "--account=lab", "--mem=1G", "--time=10", "--array=0-1%2",
                 "--signal=USR2@60", "--requeue", "--mail-type=FAIL"):  # fmt: skip
        assert f"#SBATCH {line}\n" in out
    setup = out.index("module load gcc"), out.index('TMPDIR="/local"'), out.index("PYTHONPATH=")
    assert list(setup) == sorted(setup)
    assert "apptainer exec image.sif" in out
    assert not store.exists()
    assert not shims.calls("sbatch")


def test_submitting_twice_submits_once(aerie, shims, tmp_path):
    store = ("--results", tmp_path / "raw")
    code, out, _ = aerie("submit", *ONE, *CLUSTER, *store, "--json")
    told = json.loads(out)
    assert (code, told["num_runs"]) == (0, 3)
    assert told["device_hours"]["low"] < told["device_hours"]["high"]
    (call,) = shims.calls("sbatch")
    script = Path(call[-1]).read_text()
    assert "suites.harness.worker" in script
    assert "/code/" in script
    row = f"77|{{}}|PENDING||0|0:00|0|N/A|aerie-{told['submission']}-0|Priority\n"
    shims.answers("squeue", Answer(stdout=row.format("0") + row.format("1")))
    code, out, _ = aerie("submit", *ONE, *CLUSTER, *store)
    assert "3 current (in a queue)" in out
    assert "nothing to submit" in out
    assert len(shims.calls("sbatch")) == 1
    shims.forget_calls()
    told = json.loads(aerie("status", *store, "--json")[1])
    (one,) = told["submissions"]
    assert one["runs"] == {"queued": 3}
    assert one["waiting_for"] == {"Priority": 2}
    assert shims.num_calls() == 1  # one question for all


def test_a_job_inherits_nothing_of_the_job_it_is_submitted_from(
    aerie, shims, tmp_path, monkeypatch
):
    around = {
        "SLURM_JOB_ID": "5", "SLURM_MEM_PER_CPU": "100", "SLURM_RESTART_COUNT": "1",
        "SLURMD_NODENAME": "n", "SBATCH_ARRAY_INX": "0-2", "SBATCH_TIMELIMIT": "1",
        "SBATCH_MEM_PER_CPU": "100", "SBATCH_PARTITION": "other", "SBATCH_MAIL_TYPE": "ALL",
    }  # fmt: skip
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "lab", "SBATCH_EXPORT": "ALL"}
    for name, value in {**around, **kept}.items():
        monkeypatch.setenv(name, value)
    seen = tmp_path / "seen"
    (tmp_path / "shims" / "bin" / "sbatch").write_text(
        f"#!/bin/bash\nenv >{seen}\necho Submitted batch job 77\n"
    )
    options = ("cluster.sbatch={mail-type: FAIL}", "--results", tmp_path / "raw")
    assert aerie("submit", *ONE, *CLUSTER, *options)[0] == 0
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert {name for name in names if name.startswith(("SLURM", "SBATCH"))} == kept.keys()
    assert around.items() <= os.environ.items()


def test_a_rerun_is_judged_by_its_own_ends(aerie, shims, tmp_path):
    store = tmp_path / "raw"
    options = ("--results", store, "--json")
    for settings in compose.read(ONE).settings:
        for run in plan.expand(settings):
            leave(store, run, "completed", "20200101T000000", "an.older")
    told = json.loads(aerie("submit", *ONE, *CLUSTER, "--rerun-stale", *options)[1])
    assert told["num_runs"] == 3
    row = "77|{}|PENDING||0|0:00|0|N/A|Priority\n"
    shims.answers("squeue", Answer(stdout=row.format("0") + row.format("1")))
    (one,) = json.loads(aerie("status", *options)[1])["submissions"]
    assert one["runs"] == {"queued": 3}
    end(submission.find(store, told["submission"]), "failed")
    code, out, _ = aerie("wait", *options)
    assert (code, json.loads(out)["outcomes"]) == (1, {"failed": 3})
    told = json.loads(aerie("submit", *ONE, *CLUSTER, "--rerun-stale", *options)[1])
    assert (told["num_runs"], told["given_up"]) == (0, {"failed": 3})
    told = json.loads(aerie("retry", "--reason", "failed", *options)[1])
    assert told["num_runs"] == 3
    end(submission.find(store, told["submission"]), "out_of_memory")
    assert json.loads(aerie("retry", "--dry-run", *options)[1])["num_runs"] == 0  # a result
    told = json.loads(aerie("retry", "--reason", "out_of_memory", *options)[1])
    assert told["num_runs"] == 3
    end(submission.find(store, told["submission"]), "completed")
    assert aerie("wait", *options)[0] == 0
    told = json.loads(aerie("retry", "--reason", "completed", "--dry-run", *options)[1])
    assert told["num_runs"] == 0


@pytest.mark.parametrize(
    ("second", "num_submitted", "num_retried"),
    [(None, 2, 0), ("preempted", 2, 2), ("cancelled", 0, 2), ("failed", 0, 1)],
)
def test_a_block_is_sent_again_whole(aerie, shims, tmp_path, second, num_submitted, num_retried):
    """Of two rounds the first was measured; the job died between them, or in the second."""
    options = ("--results", tmp_path / "raw", "--json")
    told = json.loads(aerie("submit", *ONE, *CLUSTER, *options)[1])
    made = submission.find(tmp_path / "raw", told["submission"])
    (proxy,), (first, last) = sorted((made.runs(*place) for place in made.places()), key=len)
    leave(made.store, proxy.run, "completed", f"{made.stamp}1", proxy.build)
    leave(made.store, first.run, "completed", f"{made.stamp}1", first.build, "b-1")
    if second is not None:
        leave(made.store, last.run, second, f"{made.stamp}2", last.build, "b-1")
    made.remember({"is_settled": True})
    dry = ("--dry-run", *options)
    told = json.loads(aerie("submit", *ONE, *CLUSTER, *dry)[1])
    assert told["num_runs"] == num_submitted
    assert json.loads(aerie("retry", *dry)[1])["num_runs"] == num_retried


@pytest.fixture
def _looks(monkeypatch):
    """Whether intervals are narrow is looked at after 8, 12, 16, ... rounds."""
    monkeypatch.setattr(statistics, "FIRST_LOOK", 8)
    monkeypatch.setattr(statistics, "LOOK_EVERY", 4)


def leave_rounds(made, number):
    """So many rounds of a submission, of which the interval is 2.3% wide after 8; and proxies."""
    for array, index in made.places():
        for item in made.runs(array, index):
            value = 1.0 if item.run.backend == "jax" else 2.0 + 0.026 * (-1) ** item.run.round
            times = (sample("step_time_ms", value, repeat=0),) if item.block else ()
            if item.run.round < number:
                attempt = f"{made.stamp}{next(NUMBERS):06}"
                leave(made.store, item.run, "completed", attempt, item.build,
                      item.block and "b-1", times)  # fmt: skip


@pytest.mark.usefixtures("_looks")
def test_adaptive_rounds_whose_job_died_between_them_are_sent_again_whole(aerie, shims, tmp_path):
    options = ("--results", tmp_path / "raw", "--json")
    asked = (*ONE[:2], "backend=jax,torch", *ONE[4:], *CLUSTER, "--until-ci", "3%")
    told = json.loads(aerie("submit", *asked, *options)[1])
    made = submission.find(tmp_path / "raw", told["submission"])
    leave_rounds(made, 5)
    made.remember({"is_settled": True})
    assert json.loads(aerie("submit", *asked, "--dry-run", *options)[1])["num_runs"] == 40
    code, out, _ = aerie("wait", *options)
    assert (code, json.loads(out)["outcomes"]) == (1, {"completed": 12, "left": 30})


@pytest.mark.usefixtures("_looks")
def test_rounds_that_are_not_needed_are_nothing_left_to_do(aerie, shims, tmp_path):
    """For whoever looks: the next plan, submit and retry, status and wait. Of 20 rounds 8 are
    measured, after which the interval is 2.3% wide."""
    options = ("--results", tmp_path / "raw", "--json")
    asked = (*ONE[:2], "backend=jax,torch", *ONE[4:])
    told = json.loads(aerie("submit", *asked, *CLUSTER, "--until-ci", "3%", *options)[1])
    assert (told["num_runs"], told["is_at_most"]) == (42, True)  # and two proxies
    plain = ("submit", *asked, *CLUSTER, "suite.rounds=20", "--dry-run", "--results", tmp_path)
    fixed = json.loads(aerie(*plain, "--json")[1])
    assert told["device_hours"]["high"] == fixed["device_hours"]["high"]
    assert told["device_hours"]["low"] < fixed["device_hours"]["low"]
    assert not fixed["is_at_most"]
    made = submission.find(tmp_path / "raw", told["submission"])
    leave_rounds(made, 8)
    row = f"77_{{}}|{{}}|RUNNING||0|1:00|1:00|N/A|aerie-{made.id}-0|None\n"
    shims.answers("squeue", Answer(stdout=row.format(0, 77) + row.format(1, 77)))
    (one,) = json.loads(aerie("status", *options)[1])["submissions"]
    assert one["runs"] == {"completed": 18, "not_needed": 24}
    made.remember({"is_settled": True})
    code, out, _ = aerie("wait", *options)
    assert (code, json.loads(out)["outcomes"]) == (0, {"completed": 18, "not_needed": 24})
    (row,) = json.loads(aerie("status", *asked, "suite.until_ci=0.03", *options)[1])["outcomes"][1:]
    assert (row["outcome"], row["num_runs"]) == ("not_needed", 24)
    assert json.loads(aerie("retry", "--dry-run", *options)[1])["num_runs"] == 0
    again = ("submit", *asked, *CLUSTER, "--dry-run")
    told = json.loads(aerie(*again, "--until-ci", "3%", *options)[1])
    assert (told["num_runs"], told["num_finished"], told["num_not_needed"]) == (0, 16, 24)
    rows = json.loads(aerie("plan", *asked, "--until-ci", "0.03", *options)[1])
    assert [row["reason"] for row in rows if row["round"] >= 8] == [
        "not needed: settled after 8 rounds"
    ] * 24
    assert not any(row["is_pending"] for row in rows)
    assert json.loads(aerie(*again, "--until-ci", "2%", *options)[1])["num_runs"] == 24
    out = aerie(*again, "--until-ci", "2%", *options[:2])[1]
    assert "runs: 24 new, 16 finished." in out
    assert "at most" in out


def test_what_slurm_refuses_goes_with_the_next_submit(aerie, shims, tmp_path):
    store = ("--results", tmp_path / "raw")
    shims.answers("sbatch", OVER_SUBMIT_LIMIT)
    code, _, err = aerie("submit", *ONE, *CLUSTER, *store)
    assert code == 1
    assert err.count("\n") == 1
    assert "QOSMaxSubmitJobPerUserLimit" in err or "job submit limit" in err
    shims.answers("sbatch", Answer(stdout="Submitted batch job 78\n"))
    other = ("suite=decode_latency", "family=hawk", "backend=torch", "suite.rounds=1",
             "suite.prompt_lens=[8]", "suite.num_new_tokens=[2]")  # fmt: skip
    code, out, _ = aerie("submit", *other, *CLUSTER, *store)
    assert code == 0
    assert "runs: 4 new." in out  # its own, those that were refused, one proxy for both


def test_an_answer_is_read_once_for_all_jobs_of_an_array(aerie, shims, tmp_path, monkeypatch):
    assert aerie("submit", *ONE, *CLUSTER, "--results", tmp_path / "raw")[0] == 0
    (made,) = submission.read(tmp_path / "raw")
    assert [array.num_jobs for array in made.arrays] == [2]
    asked = []
    monkeypatch.setattr(Submission, "refusal", lambda self, array: asked.append(array))
    assert jobs._unqueued(made) == []
    assert asked == [0]


def test_a_full_disk_at_one_array_costs_the_others_nothing(aerie, shims, tmp_path, monkeypatch):
    """Array 0 finds no room for its logs, array 1 at first none for its job id."""
    logs, remember, full = Submission.logs, Submission.remember_job_id, [1]

    def no_logs(made, array):
        if array == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return logs(made, array)

    def full_once(made, array, job_id):
        if full:
            raise OSError(errno.ENOSPC, f"full {full.pop()}")
        remember(made, array, job_id)

    monkeypatch.setattr(record, "PAUSE_S", 0.0)
    monkeypatch.setattr(Submission, "logs", no_logs)
    monkeypatch.setattr(Submission, "remember_job_id", full_once)
    store = tmp_path / "raw"
    code, _, err = aerie("submit", *ONE, *CLUSTER, "cluster.max_array_size=1", "--results", store)
    assert (code, "left for the next submit: [Errno 28]" in err) == (1, True)
    (made,) = submission.read(store)
    assert (made.job_id(0), made.job_id(1)) == (None, "77")
    assert "No space left" in made.refusal(0)
    assert {item.run.run_id for item, _ in jobs._unqueued(made)} == {*made.run_ids(0, 0)}


def test_a_cancel_meanwhile_stops_the_submission(aerie, shims, tmp_path):
    """It comes while the first of two arrays is submitted, and does not see the job of that."""
    store = tmp_path / "raw"
    script = tmp_path / "shims" / "bin" / "sbatch"
    meanwhile = f"#!/bin/bash\ntouch $(echo {store}/submissions/*)/cancelled.json\n"
    script.write_text(script.read_text().replace("#!/bin/bash\n", meanwhile))
    code, _, err = aerie("submit", *ONE, *CLUSTER, "cluster.max_array_size=1", "--results", store)
    assert (code, "refused, and withdrawn: cancelled meanwhile" in err) == (1, True)
    assert (len(shims.calls("sbatch")), shims.calls("scancel")) == (1, [["77"]])
    (made,) = submission.read(store)
    assert (made.job_id(0), made.refusal(1)) == ("77", "cancelled meanwhile")


def test_cancelling_all_leaves_the_jobs_of_others_alone(aerie, shims, tmp_path, monkeypatch):
    store = ("--results", tmp_path / "raw")
    with monkeypatch.context() as patch:
        patch.setattr("getpass.getuser", lambda: "another")
        assert aerie("submit", *ONE, *CLUSTER, *store)[0] == 0
    shims.answers("sbatch", Answer(stdout="Submitted batch job 78\n"))
    own = json.loads(aerie("submit", *ONE, *CLUSTER, "suite.repeats=2", *store, "--json")[1])
    told = json.loads(aerie("cancel", "--all", *store, "--json")[1])
    assert told["cancelled"] == [own["submission"]]
    assert shims.calls("scancel") == [["78"]]


def test_what_was_left_over_goes_where_it_was_to_go_and_takes_nothing_along(aerie, shims, tmp_path):
    store = ("--results", tmp_path / "raw")
    shims.answers("sbatch", OVER_SUBMIT_LIMIT)
    assert aerie("submit", *ONE, *CLUSTER, *store)[0] == 1
    other = ("submit", *ONE, "suite.repeats=2", "cluster=slurm_gpu", *store, "--dry-run")
    code, out, _ = aerie(*other, "device_kind=h100", "--json")
    names = {array["cluster"] for array in json.loads(out)["arrays"]}
    assert (code, names) == (0, {"slurm_cpu", "slurm_gpu"})
    code, _, err = aerie(*other, "device_kind=cpu")
    assert (code, "device_kind=cpu: cluster=slurm_gpu offers" in err) == (2, True)


def test_the_newest_log_with_something_in_it_is_shown(aerie, shims, tmp_path):
    store, run_id = tmp_path / "raw", None
    for job_id, text in (("77", "old"), ("78", "new"), ("79", "")):
        shims.answers("sbatch", Answer(stdout=f"Submitted batch job {job_id}\n"))
        told = json.loads(aerie("submit", *ONE, *CLUSTER, "--results", store, "--json")[1])
        made = submission.find(store, told["submission"])
        run_id = run_id or made.run_ids(0, 0)[0]
        (index,) = (k for (_, k), ids in made.run_ids_of.items() if run_id in ids)
        (made.logs(0) / f"{job_id}_{index}_0_log.out").write_text(text)
        made.remember({"is_settled": True})  # its jobs have not begun a run
    assert aerie("logs", run_id, "--results", store)[1] == "new"
    (store / "runs" / run_id).mkdir(parents=True)
    (store / "runs" / run_id / "20200101T000000.log").write_text("its own")
    assert aerie("logs", run_id, "--results", store)[1] == "its own"


def test_a_queue_that_is_nearly_full_takes_what_it_can(aerie, shims, tmp_path):
    store = ("--results", tmp_path / "raw")
    many = ("suite.seq_lens=[8,16,32,64]", "cluster.max_submit=2")
    code, out, err = aerie("submit", *ONE, *CLUSTER, *many, *store, "--json")
    assert not err
    told = json.loads(out)
    assert code == 0
    assert sum(array["num_jobs"] for array in told["arrays"]) == 2
    assert told["num_left"] + told["num_runs"] == 9


def test_what_was_left_over_is_withdrawn_by_cancel_and_goes_with_its_user(
    aerie, shims, tmp_path, monkeypatch
):
    store = ("--results", tmp_path / "raw")
    full = "cluster.max_submit=1"  # for the proxy alone
    bound = "cluster.max_submit is 1, and 0 of your jobs are queued"
    out = aerie("submit", *ONE, *CLUSTER, full, *store, "--dry-run")[1]
    assert f"runs of cluster=slurm_cpu: {bound}." in out
    first = json.loads(aerie("submit", *ONE, *CLUSTER, full, *store, "--json")[1])
    left = first["num_left"]
    assert left > 0
    assert first["no_room"] == {"slurm_cpu": bound}
    assert (
        f"{first['submission']}: {left} runs did not fit in the queue" in aerie("status", *store)[1]
    )
    end(submission.find(tmp_path / "raw", first["submission"]), "completed")
    other = ("submit", "suite=parity", "size=tiny", "family=mqa", "backend=torch", *CLUSTER,
             *store, "--dry-run", "--json")  # fmt: skip

    def num_sent():
        return json.loads(aerie(*other)[1])["num_runs"]

    with monkeypatch.context() as patch:
        patch.setattr("getpass.getuser", lambda: "another")
        own = num_sent()
        assert json.loads(aerie("cancel", "--all", *store, "--json")[1])["cancelled"] == []
    assert num_sent() == own + left
    code, out, _ = aerie("wait", *store, "--json")
    assert (code, json.loads(out)["outcomes"]["left"]) == (1, left)
    assert first["submission"] in aerie("cancel", first["submission"], *store)[1]
    assert num_sent() == own
    assert aerie("wait", *store)[0] == 0
    assert "nothing" in aerie("cancel", "--all", *store)[1]


@pytest.mark.parametrize(("suite", "code"), [("decode_throughput", 0), ("decode_latency", 1)])
def test_waiting_for_a_search_that_ends_out_of_memory_is_as_planned(
    aerie, shims, tmp_path, suite, code
):
    store = ("--results", tmp_path / "raw")
    one = (f"suite={suite}", "family=hawk", "backend=torch", "suite.rounds=1",
           "suite.prompt_lens=[8]", "suite.num_new_tokens=[2]")  # fmt: skip
    told = json.loads(aerie("submit", *one, *CLUSTER, *store, "--json")[1])
    end(submission.find(tmp_path / "raw", told["submission"]), "out_of_memory", [suite])
    assert aerie("wait", *store)[0] == code


def test_waiting_reads_its_own_runs_alone(aerie, shims, tmp_path, monkeypatch):
    store = ("--results", tmp_path / "raw")
    told = json.loads(aerie("submit", *ONE, *CLUSTER, *store, "--json")[1])
    other = tmp_path / "raw" / "runs" / "0123" / "torn.json"
    other.parent.mkdir(parents=True)
    other.write_text("{")
    code, _, err = aerie("wait", told["submission"], "--timeout", 0, *store)
    assert (code, "3 queued" in err) == (1, True)
    (made,) = submission.read(tmp_path / "raw")
    assert made.job_id(0) == "77"
    end(made, "completed")
    monkeypatch.setattr(submission, "_read", {made.folder / "seen.json": made.memory()}.get)
    (made,) = submission.read(tmp_path / "raw")  # an intent and a job id are read once
    assert made.job_id(0) == "77"
    assert aerie("wait", told["submission"], *store)[0] == 0


def test_a_point_that_fits_nowhere_is_a_record(aerie, shims, tmp_path):
    store = tmp_path / "raw"
    code, out, _ = aerie("submit", *ONE[:3], "suite.rounds=1", "device_kind=v5e",
                         "cluster=slurm_tpu", "--results", store, "--json")  # fmt: skip
    told = json.loads(out)
    assert (code, told["num_runs"], told["submission"]) == (0, 0, None)
    (path, *_) = store.glob("runs/*/[!.]*.json")
    record = json.loads(path.read_text())
    assert record["outcome"] == "unsupported"
    assert record["reason"] == "backend=torch runs on no TPU (v5e)."


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["submit", *ONE, *CLUSTER, "device_kind=h100"], "device_kind=h100: cluster=slurm_cpu"),
        (["submit", *ONE, "cluster=slrum_cpu"], "Did you mean 'slurm_cpu'?"),
        (["submit", *ONE, *CLUSTER, "cluster.partitoin=x"], "Did you mean 'partition'?"),
        (["submit", *ONE, *CLUSTER, "cluster.python={torch: /no/python}"], "/no/python"),
        (["run", *ONE, *CLUSTER], "use aerie submit"),
        (["retry"], "aerie submit"),
        (["wait"], "aerie submit"),
        (["cancel", "--all"], "aerie submit"),
        (["collect"], "--results"),
        (["logs", "0123"], "no run '0123'"),
        (["status", "--watch"], "aerie wait"),
        (["submit", *ONE[:4], *CLUSTER, "--until-ci", "2"], "write 2% or 0.02"),
        (["submit", *ONE, *CLUSTER, "--until-ci", "2%"], "rounds at the earliest"),
        (["run", "suite=language_modeling", "--until-ci", "2%"], "where a suite is timed"),
    ],
)
def test_a_wrong_request_is_one_line_and_2(aerie, shims, tmp_path, monkeypatch, arguments, hint):
    monkeypatch.chdir(tmp_path)
    code, out, err = aerie(*arguments)
    assert code == 2, out + err
    assert err.count("\n") == 1, err
    assert hint in err
    assert not list(tmp_path.rglob("*.json"))


def test_a_controller_that_is_down_costs_nothing_but_a_line(aerie, shims, tmp_path):
    store = ("--results", tmp_path / "raw")
    assert aerie("submit", *ONE, *CLUSTER, *store)[0] == 0
    for command in ("squeue", "scontrol", "sacct"):
        shims.answers(command, UNREACHABLE)
    code, out, _ = aerie("status", *store)
    assert code == 0
    assert "Slurm does not answer: " in out
    assert "queued" in out
    code, _, err = aerie("submit", *ONE, *CLUSTER, "suite.repeats=2", *store)
    assert (code, err.count("\n")) == (2, 1)
    assert "Unable to contact slurm controller" in err
    assert len(shims.calls("sbatch")) == 1


@pytest.mark.slow
def test_from_submit_to_collect_on_a_real_slurm(slurm, tmp_path):
    store = tmp_path / "raw"
    of_a_job = {"SLURM_MEM_PER_CPU": "100", "SLURM_RESTART_COUNT": "1", "SBATCH_ARRAY_INX": "0-2"}
    environment = os.environ | slurm.environment | of_a_job  # as after salloc

    def aerie(*arguments, seconds=900):
        command = [sys.executable, "-m", "suites", *map(str, arguments), "--results", str(store)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
        return done.returncode, done.stdout, done.stderr

    code, out, err = aerie("submit", *ONE, *CLUSTER, "--json")
    assert code == 0, err
    made = json.loads(out)["submission"]
    code, out, err = aerie("wait", made, "--every", 1, "--timeout", 800)
    assert code == 0, out + err
    told = json.loads(aerie("status", "--json")[1])
    assert (told["submissions"], told["running"]) == ([], [])
    assert {row["outcome"] for row in told["outcomes"]} == {"completed"}
    assert aerie("submit", *ONE, *CLUSTER)[1].count("nothing to submit") == 1
    code, out, _ = aerie("collect", "--out", tmp_path / "all.parquet")
    assert code == 0
    frame = pd.read_parquet(tmp_path / "all.parquet")
    assert set(frame["node"]) <= {"cpu1", "cpu2"}
    assert frame["job"].notna().all()
    (block,) = frame.loc[frame["suite"] == "training_speed", "block"].unique()
    run_id = frame["run_id"].iloc[0]

    hang = ("suite=language_modeling", "family=hawk", "backend=torch", "suite.num_steps=100000",
            "suite.seeds=[0]", *CLUSTER)  # fmt: skip
    assert aerie("submit", *hang)[0] == 0
    slurm.wait_for(lambda: json.loads(aerie("status", "--json")[1])["running"], 300)
    assert aerie("cancel", "--all")[0] == 0
    code, out, _ = aerie("wait", "--every", 1, "--timeout", 300)
    assert (code, "cancelled" in out) == (1, True)
    code, out, _ = aerie("submit", *hang)
    assert "given up: 1 cancelled" in out
    code, out, _ = aerie("retry", "--reason", "cancelled", "--dry-run")
    assert (code, "#SBATCH --array=0-0" in out) == (0, True)
    assert block
    assert aerie("logs", run_id)[0] in (0, 2)  # a run may have printed nothing
