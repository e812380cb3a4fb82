"""The command as people type it: exit codes, one-line answers, JSON, and what it does not load.

How long commands take is measured in benchmarks/harness_scale.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from finished_runs import finished

from suites import reports
from suites.__main__ import _complete, main
from suites.harness.record import read_all, write

AERIE = Path(sys.executable).with_name("aerie")
ONE = ("suite=training_speed", "family=hawk", "suite.rounds=1", "suite.seq_lens=[256]")
FRAMEWORKS = ("jax", "torch", "triton")
PLAN_KEYS = {"run_id", "suite", "family", "size", "backend", "seed", "round", "num_params",
             "num_params_non_embedding", "train_flops_per_token", "cache_bytes",
             "predicted_peak_memory_bytes", "reason"}  # fmt: skip


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def aerie(*arguments):
    """The command in a process of its own."""
    done = subprocess.run(
        [AERIE, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    return Done(done.returncode, done.stdout, done.stderr)


def loaded_by(monkeypatch, *arguments):
    """The packages that the command imports: most of what a short command takes."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    told = [
        line for line in aerie(*arguments).stderr.splitlines() if line.startswith("import time:")
    ]
    assert told
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in told}


@pytest.fixture
def here(capsys):
    """The same command in this process, which is quicker."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        return Done(ended.value.code or 0, *capsys.readouterr())

    return run


def test_help_names_every_command_and_loads_little(monkeypatch):
    done = aerie("--help")
    assert done.returncode == 0
    for command in ("run", "plan", "submit", "status", "logs", "cancel", "retry", "wait",
                    "collect", "report", "compare", "parity", "doctor", "data"):  # fmt: skip
        assert f"  {command} " in done.stdout
    assert "--install-completion" in done.stdout
    loaded = loaded_by(monkeypatch, "--help")
    assert not loaded & {*FRAMEWORKS, "numpy", "pandas", "hydra", "pydantic", "yaml", "rich"}


def test_plan_of_griffin_7b_knows_the_paper():
    done = aerie("plan", "family=griffin", "size=7b")
    assert done.returncode == 0
    assert "6,790,182,912 non-embedding parameters" in done.stdout
    assert "seq_len 2048" in done.stdout
    assert "4096 positions, batch 1, bfloat16" in done.stdout
    (row,) = json.loads(aerie("plan", "family=griffin", "size=7b", "--json").stdout)
    assert row.keys() >= PLAN_KEYS
    # 10 rings of 1024 keys and values of 128 channels; 22 states of 5632 channels, 3 inputs each
    assert row["cache_bytes"] == 10 * 1024 * 2 * 128 * 2 + 22 * 5632 * (4 + 3 * 2)
    assert row["reason"] == "new"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["plan", "family=grifin"], "'griffin'"),
        (["run", "experiment=quickstat"], "'quickstart'"),
        (["run", *ONE, "suite.seq_len=[8]"], "'suite.seq_lens'"),
        (["run", *ONE, "data=text"], "data.paths"),
        (["run", *ONE, "data=text", "data.paths=[no/such/file.txt]"], "file.txt"),
        (["run"], "experiment=quickstart"),
        (["run", *ONE, "suite.seq_lens=[0]"], "at least 1"),
        (["run", *ONE, "model.num_layers=range(5,1)"], "sweeps over nothing"),
        (["run", *ONE, "model.rope_fraction=interval(0,1)"], "interval(0,1)"),
        (["run", *ONE, "model.rope_base=inf"], "finite"),
        (["run", *ONE, "--results", "file/below"], "file"),
        (["rnu"], "'run'"),
        (["plan", "--jsn"], "--json"),
        (["report"], "--results"),
        (["compare", "--by", "famly"], "'family'"),
        (["parity", "suite=training_speed"], "aerie run"),
    ],
)
def test_a_wrong_request_is_one_line_and_2(tmp_path, here, monkeypatch, arguments, hint):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "compare":
        finished(tmp_path / "results" / "raw", *ONE)
    (tmp_path / "file").write_text("a file, where a folder is needed")
    done = here(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert hint in done.stderr
    assert not done.stdout
    assert arguments[0] == "compare" or not list(tmp_path.rglob("*.json"))


def test_a_second_run_starts_nothing_and_says_so(tmp_path, monkeypatch):
    store = tmp_path / "raw"
    finished(store, "experiment=quickstart")
    assert aerie("run", "experiment=quickstart", "--results", store).returncode == 0  # the report
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert any(path.name == "report.html" for path in before)
    done = aerie("run", "experiment=quickstart", "--results", store)
    assert done.returncode == 0
    assert "nothing to run: all" in done.stderr
    assert "report.html" in done.stdout
    loaded = loaded_by(monkeypatch, "run", "experiment=quickstart", "--results", store)
    assert not loaded & {*FRAMEWORKS, "pandas", "matplotlib", "scipy"}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("outcome", "code"),
    [("completed", 0), ("unsupported", 0), ("out_of_memory", 1), ("diverged", 1)],
)
def test_the_exit_code_is_how_the_runs_ended(tmp_path, here, outcome, code):
    finished(tmp_path, *ONE, outcome=outcome)
    finished(tmp_path, "suite=parity", "family=hawk")
    done = here("run", *ONE, "--results", tmp_path, "--json")
    assert done.returncode == code
    told = json.loads(done.stdout)
    assert told["outcomes"] == {outcome: 1}
    assert told["num_started"] == 0


def test_a_damaged_record_is_named_in_one_line(tmp_path, here):
    finished(tmp_path, *ONE)
    (path,) = tmp_path.rglob("2*.json")
    path.write_text("{")
    for command in ("status", "plan", "run"):
        done = here(command, *ONE, "--results", tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert str(path) in done.stderr


def test_the_report_counts_the_attempt_that_the_plan_counts(tmp_path):
    """A later attempt of another build does not hide the finished one of ours."""
    finished(tmp_path, *ONE)
    (ours,) = read_all(tmp_path)
    write(tmp_path, replace(ours, build="older.code", attempt="29990101T000000"))
    frame = reports.frame_of(tmp_path).drop_duplicates("attempt").set_index("attempt")
    assert frame["is_counted"].to_dict() == {ours.attempt: True, "29990101T000000": False}
    assert frame["is_current"].to_dict() == {ours.attempt: True, "29990101T000000": False}


def test_a_thousand_runs_are_counted_and_reported(tmp_path):
    finished(tmp_path, *ONE, "backend=jax,torch", copies=500)
    for command in ("status", "report"):
        done = aerie(command, "--results", tmp_path)
        assert done.returncode == 0, done.stderr
    told = json.loads(aerie("status", "--results", tmp_path, "--json").stdout)
    row = {"suite": "training_speed", "outcome": "completed", "num_runs": 1000}
    assert (told["outcomes"], told["running"]) == ([row], [])


def test_stale_runs_are_listed_and_left(tmp_path, here):
    (run,) = finished(tmp_path, *ONE)
    path = next(tmp_path.glob("runs/*/*.json"))
    record = json.loads(path.read_text())
    record["build"] = "x.y"
    record["provenance"]["versions"]["numpy"] = "1.0"
    path.write_text(json.dumps(record))
    (row,) = json.loads(here("plan", *ONE, "--results", tmp_path, "--json").stdout)
    assert row["run_id"] == run.run_id
    assert row["reason"].startswith("stale: numpy 1.0 -> ")
    done = here("run", *ONE, "--results", tmp_path)
    assert "--rerun-stale" in done.stderr
    assert len(list(tmp_path.glob("runs/*/*.json"))) == 1


def test_compare_prints_the_pairs(tmp_path, here):
    finished(tmp_path, *ONE[:1], "family=mqa,hawk", "backend=jax,torch", "suite.rounds=6",
             "suite.seq_lens=[256]")  # fmt: skip
    rows = json.loads(here("compare", "--results", tmp_path, "--json").stdout)
    assert {row["family"] for row in rows} == {"mqa", "hawk"}
    assert all(row["num_paired_rounds"] == 6 for row in rows)
    rows = json.loads(here("compare", "--by", "family", "--results", tmp_path, "--json").stdout)
    assert {row["backend"] for row in rows} == {"jax", "torch"}
    assert "Hawk" in here("compare", "--by", "family", "--results", tmp_path).stdout


def test_doctor_knows_this_machine(tmp_path, here):
    done = here("doctor", "--json", "--results", tmp_path)
    found = json.loads(done.stdout)
    assert found["num_cores"] == len(os.sched_getaffinity(0))
    assert found["memory_bytes"] > 2**28
    assert found["versions"]["numpy"]
    assert done.returncode == (1 if found["missing"] else 0)


def test_completion_offers_groups_and_their_choices():
    assert {"family=", "suite=", "experiment="} <= set(_complete(""))
    assert "family=griffin" in set(_complete("family="))
