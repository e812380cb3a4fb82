"""What Slurm's commands print is read as it is meant, with as few commands as there can be.

The samples are answers of Slurm 22.05, cut short; later versions print exit codes as 0:15.
"""

from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, require_slurm

from suites.harness import slurm as slurm_module
from suites.harness.slurm import Job, Seen, Unreachable, cancel, describe, earlier_end, find, queue

QUEUE = """\
12|0|CANCELLED|cpu1|0|2:07|15|N/A|aerie-1-0|None
28|0|NODE_FAIL|cpu2|0|3:06|0|N/A|aerie-1-0|NodeDown
33|0|COMPLETING|gpu1|1|0:00|0|N/A|aerie-1-0|None
33|1|COMPLETED|gpu1|1|0:02|0|N/A|aerie-1-0|None
42|1|FAILED|gpu2|0|0:03|13:0|N/A|aerie-1-0|NonZeroExitCode
10|0|FAILED|gpu1|0|0:07|36608|2026-11-26T11:43:19|aerie-1-0|NonZeroExitCode
48|1|PREEMPTED|gpu2|0|0:58|15|2026-11-26T12:21:56|aerie-1-0|None
52|3|PENDING||0|0:00|0|N/A|aerie-1-0|Nodes required for job are DOWN, DRAINED or | reserved
53|4-9:2%2|PENDING||0|0:00|0|N/A|aerie-1-0|JobArrayTaskLimit
1|N/A|RUNNING|cpu1|0|1-02:03:04|0|N/A|aerie-1-0|None
"""
ACCOUNTS = """\
33_0|PREEMPTED|0:0|82|gpu1|2026-11-26T11:46:36|aerie-1-0
33_0.batch|CANCELLED|0:9|90|gpu1|2026-11-26T11:46:36|aerie-1-0
33_1|REQUEUED|0:0|0|gpu2|2026-11-26T11:46:36|aerie-1-0
34_2|RUNNING|0:0|8|gpu1|2026-11-26T11:46:36|aerie-1-0
34_2.batch|RUNNING|0:0|8|gpu1|2026-11-26T11:46:36|aerie-1-0
34_[2-3%1]|PENDING|0:0|0|None assigned|2026-11-26T11:46:36|aerie-1-0
33_1|COMPLETED|0:0|2|gpu1|2026-11-26T12:20:49|aerie-1-0
33_0|COMPLETED|0:0|2|gpu1|2026-11-26T11:48:06|aerie-1-0
12_1|CANCELLED by 1000|0:0|126|cpu1|2026-11-26T11:43:15|aerie-1-0
55_0|FAILED|1:0|9|cpu1|2026-11-26T11:43:15|aerie-1-0
55_0.batch|FAILED|1:0|9|cpu1|2026-11-26T11:43:15|aerie-1-0
55_0.0|OUT_OF_MEMORY|0:125|8|cpu1|2026-11-26T11:43:15|aerie-1-0
"""
DISABLED = "Slurm accounting storage is disabled"
CONFIG = """\
Configuration data as of 2026-11-26T11:43:15
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = local
JobRequeue              = 1
KillWait                = 30 sec
MaxArraySize            = 1001
MaxJobCount             = 10000
MinJobAge               = 300 sec
PreemptMode             = GANG,REQUEUE
PreemptType             = preempt/partition_prio
SlurmctldParameters     = enable_configless,preempt_send_user_signal
SLURM_VERSION           = 22.05.8
"""
PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL QoS=fair GraceTime=15 MaxTime=2-00:00:00 PreemptMode=REQUEUE State=UP
PartitionName=cpu AllowGroups=ALL QoS=N/A GraceTime=0 MaxTime=UNLIMITED PreemptMode=OFF State=UP
"""  # noqa: E501
ASSOCIATIONS = "Cluster|Account|User|GrpSubmit|MaxSubmit|Def QOS\nlocal|lab|ada||500|normal\n"
QOS = "Name|GrpSubmit|MaxSubmitPU\nnormal||400\nfair||200\nother||1\n"


class Commands:
    """Answers in place of Slurm, and what was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.answers: dict[str, tuple[int, str, str]] = {}

    def __call__(self, command: list[str], *_: object, **__: object) -> tuple[int, str, str]:
        self.asked.append(command)
        for words, answer in self.answers.items():
            if words in " ".join(command):
                return answer
        return 0, "", ""

    def count(self) -> list[str]:
        return [command[0] for command in self.asked]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    stand_in = Commands()
    monkeypatch.setattr(slurm_module, "_ask", stand_in)
    return stand_in


def test_the_queue_is_read():
    found = slurm_module.parse_queue(QUEUE)
    assert found["12_0"] == Seen(
        state="CANCELLED", is_in_queue=False, node="cpu1", restarts=0, elapsed_s=127, exit_code=-15,
        name="aerie-1-0",
    )  # fmt: skip
    assert found["33_0"].is_in_queue
    assert found["33_0"].restarts == 1
    assert not found["33_1"].is_in_queue
    assert found["28_0"].reason == "NodeDown"
    assert (found["10_0"].exit_code, found["10_0"].is_preempted) == (143, True)
    assert (found["42_1"].exit_code, found["42_1"].is_preempted) == (13, False)
    assert found["48_1"].is_preempted
    assert found["52_3"].reason.endswith("or | reserved")
    assert {job for job in found if job.startswith("53_")} == {"53_4", "53_6", "53_8"}
    assert found["1"].elapsed_s == ((24 + 2) * 60 + 3) * 60 + 4


def test_accounts_are_read_start_by_start():
    starts = slurm_module.parse_accounts(ACCOUNTS)
    assert [one.state for one in starts["33_0"]] == ["PREEMPTED", "COMPLETED"]
    assert [one.state for one in starts["33_1"]] == ["REQUEUED", "COMPLETED"]
    assert starts["33_1"][-1].restarts == 1
    assert [one.state for one in starts["34_2"]] == ["RUNNING"]  # not the row of those that wait
    assert [one.state for one in starts["34_3"]] == ["PENDING"]
    assert starts["12_1"][0].state == "CANCELLED"
    assert starts["12_1"][0].reason == "by uid 1000"
    assert starts["12_1"][0].name == "aerie-1-0"
    assert starts["55_0"][0].state == "OUT_OF_MEMORY"


def test_one_squeue_asks_for_all_arrays_and_sacct_only_for_the_rest(commands):
    commands.answers["squeue"] = (0, QUEUE, "")
    jobs = ["33_0", "33_1", "48_1", "53_4", "53_6", "52_3", "1"]
    found = slurm_module.queue(jobs)
    assert commands.count() == ["squeue"]
    assert "--jobs=1,33,48,52,53" in commands.asked[0]
    assert set(jobs) <= set(found)

    commands.answers["sacct"] = (0, ACCOUNTS, "")
    found = slurm_module.queue([*jobs, "55_0", "12_0", "77_0"])
    assert commands.count()[1:] == ["squeue", "sacct"]
    assert "--jobs=12,55,77" in commands.asked[2]
    assert "--duplicates" in commands.asked[2]
    assert found["55_0"].state == "OUT_OF_MEMORY"
    assert "77_0" not in found
    assert found["33_0"].state == "COMPLETING"  # the queue knows; accounts are older
    assert slurm_module.queue([]) == {}


def test_accounts_that_are_late_do_not_undo_an_end(commands):
    commands.answers["squeue"] = (0, "9|0|FAILED|cpu1|2|0:07|256|N/A|a|NonZeroExitCode\n", "")
    commands.answers["sacct"] = (0, "9_0|RUNNING|0:0|7|cpu1|2026-11-26T11:43:15|a\n", "")
    assert slurm_module.queue(["9_0"])["9_0"].state == "FAILED"
    commands.answers["sacct"] = (0, "9_0|CANCELLED by 7|0:0|7|cpu1|2026-11-26T11:43:15|a\n", "")
    one = slurm_module.queue(["9_0"])["9_0"]
    assert (one.state, one.reason, one.restarts) == ("CANCELLED", "by uid 7", 2)


def test_a_job_that_is_forgotten_is_absent_and_silence_is_not(commands):
    commands.answers["sacct"] = (1, "", DISABLED)
    commands.answers["squeue"] = (1, "", "slurm_load_jobs error: Invalid job id specified\n")
    assert slurm_module.queue(["9_0"]) == {}
    down = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    commands.answers["squeue"] = (1, "", f"a try\n{down}\n")
    with pytest.raises(Unreachable, match=r"^squeue: slurm_load_jobs error: Unable to contact"):
        slurm_module.queue(["9_0"])


def test_a_command_that_hangs_or_is_missing_is_no_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unreachable, match="squeue is not found"):
        slurm_module.queue(["9_0"])
    _command(tmp_path, "squeue", "exec /bin/sleep 30")
    monkeypatch.setattr(slurm_module, "COMMAND_S", 0.2)
    with pytest.raises(Unreachable, match=r"did not answer within 0\.2 s"):
        slurm_module.queue(["9_0"])
    assert slurm_module.describe("9_0") is None


def test_settings_of_the_user_do_not_reach_the_commands(monkeypatch):
    for name in ("SQUEUE_FORMAT", "SACCT_FORMAT", "SLURM_TIME_FORMAT", "SLURM_CONF", "LC_ALL"):
        monkeypatch.setenv(name, "x")
    clean = slurm_module.environment()
    assert clean["SLURM_CONF"] == "x"
    assert clean["LC_ALL"] == clean["LANG"] == "C"
    assert not {"SQUEUE_FORMAT", "SACCT_FORMAT", "SLURM_TIME_FORMAT"} & clean.keys()


def test_a_requeue_that_is_killed_by_its_own_effect_is_no_refusal(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    _command(tmp_path, "scontrol", "kill -TERM $$; echo it lives >&2; exit 1")
    assert "it lives" in slurm_module.requeue("9_0")
    _command(tmp_path, "scontrol", "kill -KILL $$")
    assert slurm_module.requeue("9_0") is None
    _command(tmp_path, "scontrol", "echo 9_0: Requested operation is disabled >&2; exit 1")
    assert "disabled" in slurm_module.requeue("9_0")


def test_an_array_is_found_by_its_name(commands):
    commands.answers["squeue"] = (0, "12|\n12|\n9|\n", "")
    assert slurm_module.find("aerie-1") == ["9", "12"]
    commands.answers["squeue"] = (0, "", "")
    commands.answers["sacct"] = (0, "33_0\n33_[1-2]\n", "")
    assert slurm_module.find("aerie-1") == ["33"]


def test_how_an_earlier_start_ended(commands):
    commands.answers["sacct"] = (0, ACCOUNTS.replace("COMPLETED", "RUNNING"), "")
    assert slurm_module.earlier_end("33_0").state == "PREEMPTED"
    commands.answers["sacct"] = (1, "", DISABLED)
    assert slurm_module.earlier_end("33_0").state == "REQUEUED"
    assert slurm_module.earlier_end(None) is None


def least(found) -> int:
    return min(found.submit_limits.values())


def test_the_limits_of_a_site(commands):
    commands.answers = {
        "show config": (0, CONFIG, ""),
        "show partition": (0, PARTITIONS, ""),
        "show assoc": (0, ASSOCIATIONS, ""),
        "show qos": (0, QOS, ""),
        "squeue": (0, "12_0\n12_1\n", ""),
    }
    found = slurm_module.limits("gpu")
    assert (found.max_array_size, found.num_queued) == (1001, 2)
    assert least(found) == 200
    assert least(slurm_module.limits("cpu")) == 400
    assert (found.kill_wait_s, found.min_job_age_s, found.may_requeue) == (30, 300, True)
    assert found.warns_of_preemption
    assert found.partitions["gpu"].grace_s == 15
    assert found.partitions["gpu"].max_time_s == 2 * 86400
    assert found.partitions["cpu"].max_time_s is None
    commands.answers["show config"] = (0, CONFIG.replace("slurmdbd", "none"), "")
    found = slurm_module.limits()
    assert (found.has_accounting, found.submit_limits) == (False, {"MaxJobCount": 10000})


def test_associations_that_a_job_is_not_counted_by_do_not_limit_it(commands, monkeypatch):
    """An account that has expired, and a partition of its own limit."""
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    header = "Cluster|Account|User|Partition|MaxSubmit|Def QOS\n"
    lab = "local|lab|ada|gpu|3|normal\nlocal|lab|ada||500|normal\n"
    old = "local|old|ada||0|normal\n"
    commands.answers = {
        "show config": (0, CONFIG, ""),
        "show partition": (0, PARTITIONS, ""),
        "show user": (0, "User|Def Acct|Admin\nada|lab|None\n", ""),
        "account=lab": (0, header + lab, ""),
        "account=old": (0, header + old, ""),
        "show assoc": (0, header + old + lab, ""),
        "show qos": (0, QOS, ""),
    }
    found = slurm_module.limits("cpu")
    assert found.submit_limits == {
        "MaxJobCount": 10000, "MaxSubmit of account lab": 500, "MaxSubmit of qos normal": 400,
    }  # fmt: skip
    assert least(slurm_module.limits("gpu")) == 3
    assert least(slurm_module.limits("cpu", "old")) == 0
    monkeypatch.setenv("SBATCH_ACCOUNT", "old")
    assert least(slurm_module.limits("cpu")) == 0


def test_a_job_is_described():
    text = "JobId=35 JobName=a JobState=RUNNING Reason=None Requeue=1 Restarts=1 ExitCode=0:0 "
    text += "RunTime=00:01:00 TimeLimit=01:00:00 PreemptTime=2026-11-26T11:47:43 Comment=Reason=x"
    assert slurm_module.parse_job(text) == Job(
        state="RUNNING", limit_s=3600, elapsed_s=60, restarts=1, is_requeued=True, is_preempted=True
    )
    assert slurm_module.parse_job("slurm_load_jobs error: Invalid job id specified") is None


# On a real Slurm ------------------------------------------------------------------------------

ENDING = """
[ $SLURM_ARRAY_TASK_ID = 3 ] || exit $SLURM_ARRAY_TASK_ID
[ "$SLURM_RESTART_COUNT" = 1 ] || sleep 100
"""


@pytest.mark.slow
def test_an_array_from_the_queue_to_the_accounts(slurm, monkeypatch):
    """Of four jobs one is requeued, one is cancelled, and one fails."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.setenv("SQUEUE_FORMAT", "%A")
    script = f"[ $SLURM_ARRAY_TASK_ID = 2 ] && sleep 100; {ENDING}"
    array = slurm.submit(script, "--array=0-3", "--job-name=aerie-one", "--requeue")
    jobs = [f"{array}_{index}" for index in range(4)]
    slurm.wait_for_state(f"{array}_3", "RUNNING")
    slurm.wait_for_state(f"{array}_2", "RUNNING")
    assert find("aerie-one") == [array]
    assert describe(jobs[3]).state == "RUNNING"
    assert find("aerie-none") == []

    cancel([jobs[2], jobs[0]])  # one of them has ended
    assert slurm_module.requeue(jobs[3]) is None
    ended = ("COMPLETED", "FAILED", "CANCELLED", "COMPLETED")
    slurm.wait_for(lambda: tuple(one.state for one in by_name(queue(jobs))) == ended, 60)
    slurm.wait_for(lambda: queue(jobs)[jobs[2]].reason, 20, "sacct names who cancelled")
    found = queue(jobs)
    assert found[jobs[1]].exit_code == 1
    assert found[jobs[2]].reason.startswith("by uid ")
    assert found[jobs[3]].restarts == 1
    slurm.wait_for(lambda: len(slurm_module._starts({jobs[3]})[jobs[3]]) == 2, 20)
    assert slurm_module._starts({jobs[3]})[jobs[3]][0].state == "REQUEUED"
    assert earlier_end(jobs[3]).state in ("REQUEUED", "COMPLETED")


def test_without_accounts_the_queue_is_all_there_is(slurm_without_accounting, monkeypatch):
    cluster = slurm_without_accounting
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    array = cluster.submit("exit 3", "--array=0-1%1")
    held = cluster.submit("true", "--array=5-9:2", "--hold")
    cluster.wait_for(lambda: not queue([f"{array}_1"])[f"{array}_1"].is_in_queue, 30)
    found = queue([f"{array}_0", f"{array}_1", held, "4242_0"])
    assert {found[f"{array}_{index}"].exit_code for index in range(2)} == {3}
    assert {job for job in found if job.startswith(held)} == {f"{held}_{i}" for i in (5, 7, 9)}
    assert found[f"{held}_5"].reason == "JobHeldUser"
    assert queue(["4242_0"]) == {}
    assert slurm_module.limits().max_array_size == 1001
    assert not slurm_module.limits().has_accounting


@pytest.mark.slow  # squeue tries for 9 s
def test_a_controller_that_is_down_is_unreachable(monkeypatch):
    require_slurm(accounting=False)
    with SlurmCluster(accounting=False, proctrack="pgid") as cluster:
        monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
        cluster.kill_daemon("slurmctld")
        with pytest.raises(Unreachable, match="squeue"):
            queue(["1_0"])


def by_name(found: dict[str, Seen]) -> list[Seen]:
    return [found[job] for job in sorted(found)]


def _command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
