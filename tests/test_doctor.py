"""`aerie doctor cluster=NAME` says before a submission what would go wrong with it: on a real
Slurm, and by what commands print where that cannot be made here."""

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from implementations.config import build
from suites.__main__ import main
from suites.doctor import command, endings, examine, node, site, storage, talk
from suites.doctor.finding import OK, PROBLEM, WARNING, Finding
from suites.doctor.talk import Heard, Round
from suites.harness import provenance
from suites.harness.cluster import Cluster
from suites.harness.slurm import Limits, Partition

SMALL = ("cluster=slurm_cpu", "cluster.mem=1G", "cluster.cpus_per_task=1", "cluster.view_s=1")
CLUSTER = Cluster(name="here", executor="slurm")
LIMITS = Limits(
    version="23.11.4",
    max_array_size=1001,
    may_requeue=True,
    preempt_type="preempt/partition_prio",
    preempt_mode="REQUEUE",
    kill_wait_s=30,
    has_accounting=True,
    warns_of_preemption=True,
    partitions={"cpu": Partition(preempt_mode="REQUEUE", grace_s=120, state="UP")},
)


class Told:
    """What the command said: its exit code, its rows by name, and all of its JSON."""

    def __init__(self, code: int, text: str) -> None:
        self.code, self.values = code, json.loads(text)
        self.rows = {row["what"]: row for row in self.values["findings"]}

    def verdict(self, what: str) -> str:
        return self.rows[what]["verdict"]

    def found(self, what: str) -> str:
        return self.rows[what]["found"]


@pytest.fixture
def tell(tmp_path, capsys, monkeypatch):
    def run(cluster, *words: str) -> Told:
        monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
        with pytest.raises(SystemExit) as end:
            main(["doctor", *SMALL, "--results", str(tmp_path / "store"), "--json", *words])
        return Told(end.value.code, capsys.readouterr().out)

    return run


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_node_is_examined_by_a_job(slurm, tell, tmp_path, capsys):
    told = tell(slurm)

    assert told.code == 0
    assert told.values["cluster"] == "slurm_cpu"
    assert PROBLEM not in {row["verdict"] for row in told.values["findings"]}
    for what in ("commands", "Slurm", "accounting", "MaxArraySize", "queue", "partition (default)",
                 "preemption in cpu", "JobRequeue", "times", "store", "writing", "request", "job",
                 "renames", "clock of the node", "worker", "memory", "scratch", "scontrol", "jax",
                 "torch"):  # fmt: skip
        assert told.verdict(what) == OK, told.rows[what]
    node = told.values["node"]
    assert node["node"] in ("cpu1", "cpu2")
    if slurm.has_memory_limits:  # they are set on the job, above the group that a task is in
        assert node["worker"]["memory_bytes"] == 2**30
    assert node["jax"]["version"] == provenance.versions()["jax"]
    assert Path(node["worker"]["code"]).parent == tmp_path / "store" / "code"
    assert os.listdir(tmp_path / "store") == ["code"]  # nothing else is left behind
    slurm.wait_for(lambda: not slurm.run("squeue", "--noheader"), 20)


def test_without_accounting_it_says_what_is_lost(slurm_without_accounting, tell):
    told = tell(slurm_without_accounting, "--no-job")
    assert told.code == 0
    assert told.verdict("accounting") == WARNING
    assert "300 s (MinJobAge)" in told.rows["accounting"]["advice"]
    assert told.verdict("request") == OK
    assert "job" not in told.rows


def test_a_wrong_partition_is_a_problem_and_no_job_is_sent(slurm, tell):
    told = tell(slurm, "cluster.partition=cpus")
    assert told.code == 1
    assert told.verdict("partition") == told.verdict("request") == PROBLEM
    assert "did you mean cpu?" in told.rows["partition"]["advice"]
    assert told.found("job").startswith("not submitted")


def test_an_impossible_request_is_refused_in_slurms_words(slurm, tell):
    told = tell(slurm, "cluster.partition=gpu", "cluster.gres=gpu:h100:9", "--no-job")
    assert told.code == 1
    assert told.found("request") == "refused: Requested node configuration is not available"
    assert "cluster.gres" in told.rows["request"]["advice"]


def test_a_partition_that_is_down_or_short_is_a_problem(slurm, tell):
    try:
        slurm.run("scontrol", "update", "partitionname=tpu", "maxtime=30", "state=down")
        down = tell(slurm, "cluster.partition=tpu", "--no-job")
        slurm.run("scontrol", "update", "partitionname=tpu", "state=up")
        short = tell(slurm, "cluster.partition=tpu", "--no-job")
        fits = tell(slurm, "cluster.partition=tpu", "cluster.time=30", "--no-job")
    finally:
        slurm.run("scontrol", "update", "partitionname=tpu", "maxtime=infinite", "state=up")
    assert "DOWN" in down.found("partition")
    assert down.verdict("partition") == PROBLEM
    assert short.rows["partition"]["advice"] == (
        "cluster.time asks for 2:00:00: set it to 30 at most"
    )
    assert short.code == 1
    assert fits.verdict("partition") == OK


@pytest.mark.slow
def test_a_python_that_does_not_exist_is_said_by_the_job_too(slurm, tell):
    told = tell(slurm, "cluster.python.worker=/nowhere/python")
    assert told.code == 1
    assert told.verdict("job") == PROBLEM
    assert "/nowhere/python: No such file or directory" in told.found("job")


@pytest.mark.slow
def test_a_node_that_never_comes_is_not_waited_for(slurm, tell, capsys):
    busy = slurm.submit("sleep 300", "--partition=tpu", "--cpus-per-task=8")
    slurm.wait_for_state(busy, "RUNNING")
    told = tell(slurm, "cluster.partition=tpu", "--timeout", "4")
    assert told.code == 0  # it may come later
    assert told.verdict("job") == WARNING
    assert "PENDING (Resources)" in told.found("job")
    slurm.wait_for(lambda: len(slurm.run("squeue", "--noheader").splitlines()) == 1, 10)


@pytest.mark.slow
def test_what_a_job_found_before_it_was_killed_is_kept(slurm, tell, tmp_path):
    # Here it is Python; in a job it kills who asks.
    killer = script(
        tmp_path / "python", f'[ "$SLURM_JOB_ID" ] && kill -9 $PPID\nexec {sys.executable} "$@"'
    )
    told = tell(slurm, f"cluster.python.jax={killer}")
    assert told.code == 1
    assert told.verdict("job") == PROBLEM
    assert "ended at jax: FAILED" in told.found("job")
    assert told.verdict("worker") == told.verdict("renames") == OK
    assert "torch" not in told.values["node"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["suite=parity"], "takes cluster=NAME and cluster.KEY=VALUE alone"),
        (["cluster=nowhere"], "nowhere"),
        (["--no-job"], "cluster=NAME"),
        (["cluster=local,slurm_cpu"], "name one"),
        (["cluster=slurm_cpu", "cluster.tim=3"], "'tim'"),
        (["cluster=local", "--timeout", "0"], "--timeout 0; must be positive"),
    ],
)
def test_a_wrong_request_is_one_line(words, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["doctor", *words, "--results", str(tmp_path)])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_where_there_is_no_slurm_it_says_where_to_go(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    code = command.doctor(["cluster=slurm_cpu"], tmp_path / "store", as_json=True)
    told = Told(code, capsys.readouterr().out)
    assert told.code == 1
    assert told.found("commands") == "no sbatch, squeue, scontrol, scancel, srun"
    assert told.found("job").startswith("not submitted")


def test_a_controller_that_does_not_answer_is_a_problem(tmp_path, monkeypatch, capsys):
    for name in site.COMMANDS:
        script(tmp_path / name, "echo Unable to contact slurm controller >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code = command.doctor(["cluster=slurm_cpu"], tmp_path / "store", as_json=True)
    told = Told(code, capsys.readouterr().out)
    assert told.code == 1
    assert told.verdict("Slurm") == PROBLEM
    assert "Unable to contact" in told.found("Slurm")


def test_a_folder_that_cannot_be_made_is_a_problem(tmp_path):
    (tmp_path / "file").touch()
    (finding,) = storage.look(tmp_path / "file" / "store")
    assert finding.verdict == PROBLEM


def test_links_that_cannot_be_made_are_a_problem(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    finding = storage._operations(tmp_path)
    assert finding.found == "a hard link fails: Operation not supported"
    assert finding.verdict == PROBLEM
    assert not os.listdir(tmp_path)


def test_a_quota_is_read(tmp_path, monkeypatch):
    table = "Disk quotas for user one (uid 1000):\n  Filesystem blocks quota limit grace files\n"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script(tmp_path / "quota", f"printf '{table} srv:/home 9437184* 9000000 9961472 6d 7 0 0\n'")
    finding = storage._quota("nfs4", "/home")
    assert finding == Finding("quota", "9.00 GiB of 8.58 GiB", WARNING, finding.advice)
    script(tmp_path / "lfs", "printf ' /work 1048576 0 0 - 11 0 0 -\n'")
    assert storage._quota("lustre", "/work") == Finding("quota", "1.00 GiB no limit", OK)
    script(tmp_path / "quota", "echo none; exit 1")
    assert storage._quota("nfs4", "/home") is None


@pytest.mark.parametrize(
    ("limits", "verdict", "said"),
    [
        ({}, OK, "grace 120 s; the warning signal is sent"),
        ({"preempt_type": "preempt/none"}, OK, "none"),
        ({"warns_of_preemption": False}, OK, "SIGTERM alone is sent"),
        ({"partitions": {"cpu": Partition(preempt_mode="OFF")}}, OK, "OFF"),
        ({"partitions": {"cpu": Partition(preempt_mode="REQUEUE", grace_s=30)}}, WARNING, "30 s"),
        ({"partitions": {"cpu": Partition(preempt_mode="SUSPEND")}}, WARNING, "SUSPEND"),
        ({"warns_of_preemption": False, "kill_wait_s": 5,
          "partitions": {"cpu": Partition(preempt_mode="REQUEUE", grace_s=0)}}, WARNING, "SIGTERM"),
    ],
)  # fmt: skip
def test_preemption_is_judged_by_what_a_job_needs(limits, verdict, said):
    limits = replace(LIMITS, **limits)
    finding = endings.preemption("cpu", limits.partitions["cpu"], CLUSTER, limits)
    assert finding.verdict == verdict
    assert said in finding.found


def test_a_short_grace_names_the_setting_that_fits():
    limits = replace(LIMITS, partitions={"cpu": Partition(preempt_mode="REQUEUE", grace_s=30)})
    finding = endings.preemption("cpu", limits.partitions["cpu"], CLUSTER, limits)
    assert finding.advice.endswith("set cluster.stop_warning_s=60")
    fits = replace(CLUSTER, stop_warning_s=60)
    assert endings.preemption("cpu", limits.partitions["cpu"], fits, limits).verdict == OK


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"time": 120}, ""),
        ({"time": 60}, "a run may take 3600 s"),
        ({"time": 120, "checkpoint_s": 7100.0}, "before its first checkpoint"),
        ({"time": 120, "stop_warning_s": 20}, "10 s for a last checkpoint"),
    ],
)
def test_times_that_cannot_work_together_are_said(settings, said):
    finding, kill_wait = endings.times(replace(CLUSTER, **settings), LIMITS)
    assert finding.verdict == (WARNING if said else OK)
    assert said in finding.advice
    assert kill_wait.verdict == OK


def test_limits_of_the_site_are_judged():
    assert site._array_size(replace(CLUSTER, max_array_size=2000), LIMITS).verdict == PROBLEM
    assert site._array_size(CLUSTER, replace(LIMITS, max_array_size=0)).verdict == PROBLEM
    assert site._queue(CLUSTER, LIMITS).found == "0 of yours; no limit known"
    full = replace(LIMITS, submit_limits={"MaxJobCount": 9, "MaxSubmit of qos a": 4}, num_queued=4)
    assert site._queue(CLUSTER, full).verdict == WARNING
    free = site._queue(replace(CLUSTER, max_submit=5), replace(full, num_queued=3))
    said = "3 of yours; cluster.max_submit 5, MaxJobCount 9, MaxSubmit of qos a 4"
    assert free == Finding("queue", said, OK)
    assert site._version("20.02.7").verdict == WARNING
    assert site._version("25.05.0").verdict == OK


def test_the_clock_of_a_node_is_bounded_by_what_was_seen():
    # A node 100 s ahead, that sees a file after 1 s, and is seen after 3 s; then after 2 and 1.
    rounds = [Round(0.0, 101.0, 101.5, 4.5), Round(10.0, 112.0, 112.0, 13.0)]
    low, high = talk.skew(rounds)
    assert (low, high) == (99.0, 101.0)
    renames, clock = node._clocks(rounds, CLUSTER)
    assert renames.verdict == OK
    assert clock.found == "+100.000 s, at most 1.000 s off"
    assert clock.verdict == WARNING
    _, clock = node._clocks(rounds, replace(CLUSTER, lost_after_s=110.0))
    assert clock.verdict == PROBLEM
    renames, _ = node._clocks(rounds, replace(CLUSTER, view_s=2.0))
    assert renames.verdict == PROBLEM


GPUS = replace(CLUSTER, device_kinds=("h100",), num_devices=2, gres="gpu:2")
H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("devices", "platform", "verdict", "said"),
    [
        ([H100, H100], "gpu", OK, ""),
        ([H100], "gpu", PROBLEM, "cluster.num_devices=2"),
        (["cpu"], "cpu", PROBLEM, "no accelerator"),
        (["NVIDIA A100-SXM4-80GB"] * 2, "gpu", PROBLEM, "cluster.device_kinds says h100"),
    ],
)
def test_devices_of_a_node_are_what_the_cluster_says(devices, platform, verdict, said):
    version = provenance.versions()["jax"]
    found = {"devices": devices, "platform": platform, "version": version}
    (finding,) = node._engine("jax", found, GPUS)
    assert finding.verdict == verdict
    assert said in finding.advice


def test_another_version_on_the_node_is_a_problem():
    found = {"devices": ["cpu"], "platform": "cpu", "version": "0.0.1"}
    (finding,) = node._engine("jax", found, CLUSTER)
    assert finding.verdict == PROBLEM
    assert "older build" in finding.advice


def test_cores_memory_and_scratch_are_judged():
    cluster = replace(CLUSTER, cpus_per_task=8, mem="4G")
    assert node._cores(8, "a", cluster).verdict == OK
    assert node._cores(4, "a", cluster).verdict == WARNING
    assert node._cores(64, "a", cluster).verdict == WARNING
    assert node._cores(64, "a", replace(cluster, sbatch={"exclusive": True})).verdict == OK
    assert node._memory(4 * 2**30, cluster).verdict == OK
    assert node._memory(2 * 2**30, cluster).verdict == WARNING
    assert [node.mem_bytes(text) for text in ("2G", "512", "0", None)] == [
        2 * 2**30, 512 * 2**20, None, None,
    ]  # fmt: skip
    scratch = {"asked": "/s", "folder": "/s", "file_system": "xfs", "free_bytes": 2**40}

    def judged(**more) -> str:
        (finding,) = node._scratch(scratch | more, replace(CLUSTER, scratch="$TMP"))
        return finding.verdict

    assert judged() == OK
    assert judged(folder="/tmp") == judged(file_system="nfs4") == judged(free_bytes=1) == WARNING


def test_a_node_without_scontrol_cannot_start_its_job_again():
    (finding,) = node._scontrol({"error": "scontrol is not found"}, CLUSTER)
    assert finding.verdict == WARNING
    assert "aerie submit" in finding.advice


def test_a_job_that_said_nothing_names_what_a_node_must_see():
    finding = node._job(Heard("7", last_words="no module"), CLUSTER, Path("/store"))
    assert finding.verdict == PROBLEM
    assert "/store" in finding.advice


def test_the_nodes_side_needs_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules)\nimport suites.doctor.examine\n"
        "names = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*names - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["suites"]


def test_the_innermost_file_system_holds_a_path(tmp_path):
    kind, place = examine.file_system(Path("/proc/self"))
    assert (kind, place) == ("proc", "/proc")
    assert tmp_path.is_relative_to(examine.file_system(tmp_path)[1])


README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_every_key_of_a_cluster_with_its_default():
    table = README.partition("## Clusters")[2].partition("```yaml")[0]
    told = {
        key: default.strip(" `")
        for keys, default in re.findall(r"^\|(.*?)\|(.*?)\|", table, re.MULTILINE)
        for key in re.findall("`(.*?)`", keys)
    }
    for field in fields(Cluster):
        default = field.default_factory() if callable(field.default_factory) else field.default
        want = "" if default is MISSING else json.dumps(default)
        assert told[field.name].replace("[cpu]", '["cpu"]') == want.removesuffix(".0"), field.name


def test_the_cluster_of_the_readme_can_be_built():
    text = README.partition("# configs/cluster/mine.yaml\n")[2].partition("```")[0]
    values = OmegaConf.to_container(OmegaConf.create(text))
    cluster = build(Cluster, values, "README")
    assert (cluster.time_s, cluster.num_devices) == (8 * 3600, 8)
