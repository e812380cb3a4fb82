"""A Slurm that falls apart loses and doubles nothing, nor does a node that starts no job."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import Node, Partition, SlurmCluster, require_slurm
from stub_suite import stub_run

from suites import jobs
from suites.harness import plan, reconcile
from suites.harness.cluster import Cluster
from suites.harness.record import read_all

ROOT = Path(__file__).resolve().parent.parent
PROLOG = """#!/bin/bash
[ "$SLURMD_NODENAME" != n1 ] # as a check of health that fails: Slurm drains n1 and holds the job
"""


@pytest.fixture
def n1_starts_nothing(tmp_path, monkeypatch):
    require_slurm(accounting=False)
    prolog = tmp_path / "prolog"
    prolog.write_text(PROLOG)
    prolog.chmod(0o755)
    with SlurmCluster(
        accounting=False,
        proctrack="pgid",
        nodes=(Node("n1"), Node("n2")),
        partitions=(Partition("all", "ALL", options="Default=YES"),),
        extra=(f"Prolog={prolog}",),
    ) as cluster:
        monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
        yield cluster


@pytest.mark.slow
def test_a_job_that_a_node_could_not_start_runs_on_another(stub, n1_starts_nothing):
    cluster = Cluster(name="here", executor="slurm", mem="1G", view_s=0.1)
    planned = plan.plan(stub, [stub_run("done")])
    bill = jobs._bill(stub, planned, planned, [cluster], reconcile.reconcile(stub))
    jobs._submit(stub, bill, "stub", "a test", dry_run=False, as_json=True)
    deadline, reasons = time.monotonic() + 60, set()
    while open_ones := reconcile.reconcile(stub).jobs:
        reasons |= {one.seen.reason for one in open_ones if one.seen}
        assert time.monotonic() < deadline, reasons
        time.sleep(0.5)
    assert "launch failed requeued held" in reasons
    (record,) = read_all(stub)
    assert (record.outcome, record.provenance["host"]) == ("completed", "n2")


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_doubled_where_all_falls_apart(tmp_path):
    require_slurm(accounting=False)
    command = [sys.executable, ROOT / "benchmarks" / "chaos.py", "--num-runs", "12", "--every", "5"]
    done = subprocess.run(
        [*command, "--out", tmp_path], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was lost, nothing doubled" in done.stdout
