"""The throw-away Slurm that other tests rely on does what they take for granted."""

import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Node, Partition, SlurmCluster, require_slurm

# The batch script and a step of it say which signals they are sent, and go on whatever comes. Each
# to a file of its own: what a step prints goes through srun, which the same signals end.
STUBBORN = """
listen() {
    exec >>heard-$SLURM_JOB_ID-$1
    for name in TERM USR1; do trap "echo $1 got $name \\$EPOCHSECONDS" $name; done
    echo $1 start $SLURM_RESTART_COUNT
    for i in {1..900}; do sleep 0.1; done
}
export -f listen
srun --overlap bash -c "listen step" &
listen batch
"""
ALL_GPUS = ("--gpus-per-node=4", "--nodelist=gpu1", "--time=30")


def states(cluster, job):
    return set(cluster.state(job).split())


def test_an_array_runs_and_sacct_answers(slurm):
    job = slurm.submit(
        "echo element $SLURM_ARRAY_TASK_ID; exit $SLURM_ARRAY_TASK_ID", "--array=0-1"
    )
    slurm.wait_for(lambda: states(slurm, job) == {"COMPLETED", "FAILED"}, 30)
    assert slurm.output(f"{job}_1") == "element 1\n"

    # It lags by seconds, and says half of the truth meanwhile (one element of two, as "1|FAILED").
    want = [f"{job}_0|COMPLETED|0:0", f"{job}_1|FAILED|1:0"]
    columns = ("-o", "JobID,State,ExitCode")
    slurm.wait_for(lambda: slurm.run("sacct", "-nXPj", job, *columns).split() == want, 20)


def test_without_accounting_sacct_says_so(slurm_without_accounting):
    job = slurm_without_accounting.submit("true")
    slurm_without_accounting.wait_for_state(job, "COMPLETED")
    with pytest.raises(RuntimeError, match="Slurm accounting storage is disabled"):
        slurm_without_accounting.run("sacct", "-j", job)


def test_settings_can_be_read(own):
    cluster = own(max_array_size=77, max_job_count=555, requeue=False, extra=("MinJobAge=42",))
    shown = cluster.run("scontrol", "show", "config")
    values = {key.strip(): value.strip() for key, _, value in
              (line.partition("=") for line in shown.splitlines())}  # fmt: skip
    assert values["MaxArraySize"] == "77"
    assert values["MaxJobCount"] == "555"
    assert values["JobRequeue"] == "0"
    assert values["MinJobAge"] == "42 sec"
    with pytest.raises(RuntimeError, match="Invalid job array specification"):
        cluster.submit("true", "--array=0-77")


def test_jobs_on_one_node_have_disjoint_gpus_and_the_reason_of_the_third_is_seen(slurm):
    script = "echo $CUDA_VISIBLE_DEVICES; sleep 60"
    jobs = [slurm.submit(script, "--partition=gpu", "--gres=gpu:h100:2") for _ in range(3)]
    for job in jobs[:2]:
        slurm.wait_for(lambda job=job: slurm.output(job), 30)
    devices = [set(slurm.output(job).strip().split(",")) for job in jobs[:2]]
    assert devices[0] | devices[1] == {"0", "1", "2", "3"}
    assert not devices[0] & devices[1]
    reason = slurm.run("squeue", "-h", "-j", jobs[2], "-o", "%T %r").split()
    assert reason[0] == "PENDING"
    assert reason[1] in ("Resources", "Priority")


def test_tpus_are_counted(slurm):
    first, second = (
        slurm.submit("sleep 60", "--partition=tpu", f"--gres=tpu:{count}") for count in (4, 1)
    )
    slurm.wait_for_state(first, "RUNNING")
    assert slurm.state(second) == "PENDING"


def preempted(own, grace_time: int, with_signal: bool) -> dict[str, int]:
    """When the step and the batch script of a preempted job got which signal first, in seconds
    since the job that preempts it was submitted."""
    cluster = own(grace_time=grace_time, preempt_send_user_signal=with_signal)
    low = cluster.submit(STUBBORN, "--partition=gpu", "--signal=USR1@30", *ALL_GPUS)

    def heard() -> str:
        return "".join(path.read_text() for path in cluster.jobs_folder.glob(f"heard-{low}-*"))

    cluster.wait_for(lambda: heard().count("start") == 2, 30, "step and batch script run")
    time.sleep(0.5)  # srun must have told slurmctld of its step
    began = int(time.time())
    cluster.submit("sleep 1", "--partition=gpu-urgent", *ALL_GPUS)
    cluster.wait_for(lambda: "batch start 1" in heard(), 90, "it starts again")
    got = re.findall(r"(\w+ got \w+) (\d+)", heard())
    return {what: int(when) - began for what, when in reversed(got)}


@pytest.mark.slow
def test_a_preempted_job_is_warned_as_the_site_has_it_and_starts_again(own):
    sites = [(5, True), (5, False), (0, True), (0, False)]
    with ThreadPoolExecutor(len(sites)) as pool:
        seen = dict(zip(sites, pool.map(lambda site: preempted(own, *site), sites), strict=True))

    warned, alone = seen[5, True], seen[5, False]
    assert warned["step got USR1"] <= 3, "the job's own signal comes at once"
    assert warned["step got TERM"] >= 5, "and no TERM before the grace time is over"
    assert alone["step got TERM"] <= 3, "TERM comes at once, to steps"
    assert alone["batch got TERM"] >= 5, "but not to the batch script"
    assert "step got USR1" in seen[0, True]
    for got in (seen[0, True], seen[0, False]):
        assert max(got["step got TERM"], got["batch got TERM"]) <= 3, "no grace: all at once"
    for got in (alone, seen[0, False]):
        assert "step got USR1" not in got, "a site without the setting never sends it"


def test_preemption_can_cancel(own):
    cluster = own(grace_time=0)
    low = cluster.submit("sleep 60", "--partition=gpu-cancel", *ALL_GPUS)
    cluster.wait_for_state(low, "RUNNING")
    high = cluster.submit("sleep 1", "--partition=gpu-urgent", *ALL_GPUS)
    cluster.wait_for_state(high, "RUNNING", "COMPLETED", seconds=40)
    assert cluster.state(low) == "PREEMPTED"


@pytest.mark.slow
def test_a_job_starts_again_when_its_node_fails(slurm):
    script = "setsid sleep 67 & echo start $SLURM_RESTART_COUNT on $SLURMD_NODENAME; sleep 67"
    job = slurm.submit(script)
    slurm.wait_for(lambda: "start" in slurm.output(job), 30)
    node = slurm.output(job).split()[-1]
    slurm.fail_node(node)
    assert slurm.nodes_not_ready() == {node}
    assert not slurm_cluster._processes_of(slurm.folder, node)
    slurm.wait_for(lambda: "start 1" in slurm.output(job), 40)
    assert slurm.output(job).split()[-1] != node
    slurm.resume_node(node)
    assert slurm.nodes_not_ready() == set()


@pytest.mark.slow
def test_jobs_outlive_slurmctld(slurm):
    """The first ends when it is told to: one that ends before the kill may be forgotten to have
    ended, as slurmctld saves what it knows every 5 s, and then runs for ever."""
    go = slurm.jobs_folder / "go"
    running = slurm.submit(f"until [ -e {go} ]; do sleep 0.2; done")
    waiting = slurm.submit("true", f"--dependency=afterok:{running}")
    slurm.wait_for_state(running, "RUNNING")
    slurm.wait_for_saved_state()
    slurm.kill_daemon("slurmctld")
    with pytest.raises(RuntimeError, match="Unable to contact slurm controller"):
        slurm.run("squeue")
    slurm.start_daemon("slurmctld")
    go.touch()
    for job in (running, waiting):
        slurm.wait_for_state(job, "COMPLETED", seconds=40)


def test_a_job_that_takes_more_memory_than_it_asked_for_is_killed(own):
    # Names of its own: another cluster of this machine may hold those of the default nodes.
    nodes = (Node("memory1"),)
    partitions = (Partition("cpu", "memory1", options="Default=YES"),)
    cluster = own(proctrack="auto", nodes=nodes, partitions=partitions)
    if not cluster.has_memory_limits:
        pytest.skip("no cgroup v1 that can be written, or not root: no memory limits")
    hog = f"{sys.executable} -c 'block = bytearray(300 << 20)'"
    job = cluster.submit(hog, "--mem=50")
    assert cluster.wait_for_state(job, "OUT_OF_MEMORY", "FAILED", "COMPLETED") == "OUT_OF_MEMORY"


def test_stop_leaves_no_process_and_no_folder(own):
    cluster = own()
    script = "trap '' TERM; setsid sleep 68 & env -i setsid sleep 68 & sleep 68"
    job = cluster.submit(script)
    cluster.wait_for_state(job, "RUNNING")
    cluster.wait_for(lambda: len(sleepers("68")) == 3, 10)
    cluster.stop()
    assert not cluster.folder.exists()
    assert not sleepers("68")
    assert not slurm_cluster._processes_of(cluster.folder)
    cluster.stop()  # again is no error


def test_a_start_that_fails_leaves_nothing_and_says_why():
    require_slurm()
    cluster = SlurmCluster(accounting=False, proctrack="pgid", extra=("NodeName=gpu1 Nonsense=1",))
    with pytest.raises(RuntimeError, match="Nonsense"):
        cluster.start()
    assert not cluster.folder.exists()


def test_what_a_killed_session_left_is_removed_by_the_next_start(own):
    require_slurm()
    code = (
        "from slurm_cluster import SlurmCluster; import os, time; "
        "cluster = SlurmCluster(accounting=False, proctrack='pgid'); cluster.start(); "
        "print(cluster.folder, flush=True); time.sleep(60)"
    )
    here = Path(__file__).parent
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=here, stdout=subprocess.PIPE, text=True
    )
    folder = Path(child.stdout.readline().strip())
    assert own().folder != folder
    assert folder.exists(), "one that is in use stays"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert slurm_cluster._processes_of(folder)
    own()
    assert not folder.exists()
    assert not slurm_cluster._processes_of(folder)


def test_where_slurm_is_missing_tests_skip_or_fail(monkeypatch):
    monkeypatch.setattr(slurm_cluster, "_path", lambda: "/nowhere")
    monkeypatch.delenv("AERIE_REQUIRE_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install"):
        require_slurm()
    monkeypatch.setenv("AERIE_REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install"):
        require_slurm()


def sleepers(seconds):
    """Processes `sleep SECONDS` of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == f"sleep\0{seconds}\0".encode():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found
