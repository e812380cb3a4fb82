"""The benchmark of kernels, as far as it needs no GPU: what it counts, goals, order and table."""

import json
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import cases, kernels, timing
from benchmarks.cases import BOTH, FORWARD, case
from implementations import cost

ROOT = Path(cases.__file__).resolve().parent.parent
LIMITS = {"copy_bytes_per_s": 3e12, "matmul_flops_per_s": 700e12}


def docstring(op: str) -> str:
    text = import_module(f"implementations.torch_backend.kernels.{op}").__doc__
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("op", "file", "words"),
    [
        ("rg_lru", "rg_lru", r"forward (\d+) \(reads x and both.*?backward (\d+) \(reads those"),
        ("causal_conv", "causal_conv", r"forward (\d+) \(reads x, writes y\), backward (\d+) "),
        ("rms_norm", "rms_norm", r" rms_norm forward (\d+) .*?backward (\d+) "),
        ("add_rms_norm", "rms_norm", r"add_rms_norm forward (\d+) .*?backward (\d+) "),
        ("gated_gelu", "gated_gelu", r"forward (\d+) \(reads gate.*?backward (\d+) \("),
    ],
)
def test_bytes_are_those_of_the_docstring(op, file, words):
    found = re.search(words, docstring(file))
    assert found, f"{file}.py does not say so"
    assert tuple(map(int, found.groups())) == cases.BYTES[op][:2]


def test_bytes_of_elements_counted_in_words():
    words = "Forward reads 2 and writes 1 element a step and channel, backward reads 3 and writes 2"
    assert words in docstring("linear_scan")
    assert cases.BYTES["linear_scan"][:2] == (2 * 3, 2 * 5)
    assert "in bfloat16 4 bytes an element, forward and backward" in docstring("rope")
    assert cases.BYTES["rope"][:2] == (4, 4)


def test_bytes_and_flops_of_cases():
    shape = {"B": 8, "T": 2048, "R": 1024}
    assert case("rg_lru", FORWARD, **shape).num_bytes == 8 * 8 * 2048 * 1024
    assert case("rg_lru", BOTH, **shape).num_bytes == 24 * 8 * 2048 * 1024
    assert case("rg_lru", BOTH, **shape, dtype="float32").num_bytes == 48 * 8 * 2048 * 1024
    heads = {"B": 2, "T": 8192, "N": 16, "H": 128}
    config = cases.model_config("1b", "griffin")
    keys = cost.mean_visible_keys(config, 8192)
    local = case("attention", FORWARD, **heads, W=1024)
    assert local.flops == pytest.approx(4 * 2 * 8192 * keys * 16 * 128)
    assert case("attention", BOTH, **heads).flops == 14 * 2 * (8192 * 8193 // 2) * 16 * 128
    loss = case("mean_cross_entropy", BOTH, B=1, T=10, D=20, V=30)
    assert (loss.flops, loss.num_bytes) == (6 * 10 * 20 * 30, None)


def test_models_are_those_of_the_configs():
    config = cases.model_config("1b", "mqa")
    assert (config.d_rnn, config.window_size, config.vocab_size) == (2560, None, 32000)
    assert cases.model_config("400m", "hawk").pattern == ("rg_lru",)
    shapes = [c.shape for c in cases.model_cases() if c.op == "train"]
    assert {s["B"] * s["T"] for s in shapes} == {cases.TOKENS_PER_STEP}


def test_every_goal_of_the_issue_is_there():
    plan = cases.sections()
    assert next(iter(plan)) == "parity"
    goals = {
        (c.op, c.direction, c.shape.get("B"), c.shape.get("W"), str(g))
        for section in plan.values()
        for c in section.cases
        for g in c.goals
    }
    assert ("rg_lru", FORWARD, 8, None, "of_copy >= 0.9") in goals
    assert ("rg_lru", BOTH, 8, None, "of_copy >= 0.8") in goals
    assert ("rg_lru", BOTH, 1, None, "of_copy >= 0.7") in goals
    assert ("rg_lru", FORWARD, 8, None, "ratio >= 1.5") in goals
    assert ("attention", BOTH, 2, 1024, "ratio >= 1") in goals
    assert {("attention", BOTH, B, None, "ratio >= 0.95") for B in (16, 8, 4, 2)} <= goals
    assert {c.shape["T"] for c in plan["rg_lru"].cases} >= {2048, 16384}
    assert {c.shape["R"] for c in plan["rg_lru"].cases} >= {1024, 8192}
    decode = [c for c in plan["models"].cases if c.op == "decode"]
    assert [c.shape["family"] for c in decode] == ["griffin", "mqa", "hawk"]
    assert all(str(g) == "mbu >= 0.8" for c in decode for g in c.goals)
    quick = cases.sections(["rg_lru"], quick=True)
    assert list(quick) == ["parity", "rg_lru"]
    assert {c.op for c in quick["parity"].cases} == {"rg_lru"}
    assert len(quick["rg_lru"].cases) == 2


def row(ms, *, is_ours=True, parity="ok", **more):
    return {"is_ours": is_ours, "ms": ms, "parity": parity, "goals": []} | more


def test_a_goal_needs_a_verdict_and_a_peer_that_computes_the_same():
    goal = {"metric": "ratio", "least": 1.5}
    ours, wrong = row(1.0, goals=[goal]), row(1.0, goals=[goal], parity="FAILED")
    slow = row(2.0, goals=[goal])
    cases.judge([ours, wrong, slow, row(1.6, is_ours=False),
                 row(0.5, is_ours=False, parity="FAILED")])  # fmt: skip
    assert (ours["ratio"], ours["met"]) == (1.6, True)
    assert (wrong["met"], slow["met"]) == (False, False)
    alone = row(1.0, goals=[goal])
    cases.judge([alone])
    assert (alone["ratio"], alone["met"]) == (None, None)


def test_goals_between_cases():
    def step(family, T, ms, parity="ok"):
        shape = {"size": "1b", "family": family, "B": 16384 // T, "T": T}
        return row(ms, op="train", direction=BOTH, shape=shape, parity=parity)

    rows = [step("griffin", 2048, 100), step("griffin", 8192, 105), step("mqa", 2048, 90)]
    found = {goal["goal"]: (goal["value"], goal["met"]) for goal in cases.cross_goals(rows)}
    assert found["griffin 1b: step at 8192 over 2048"] == (1.05, True)
    assert found["1b at 2048: griffin over mqa"] == (100 / 90, False)
    assert cases.cross_goals([step("griffin", 2048, 1), step("mqa", 2048, 1, "FAILED")]) == []
    shape = {"B": 2, "N": 16, "H": 128, "W": 1024}
    rows = [
        row(ms, op="attention", direction=FORWARD, shape={**shape, "T": T})
        for T, ms in ((4096, 1.0), (16384, 4.2))
    ]
    [goal] = cases.cross_goals(rows)
    assert (round(goal["value"], 3), goal["met"]) == (1.05, True)


def test_contenders_take_turns_and_drift_meets_all():
    rounds = [timing.in_turn(["a", "b", "c"], n) for n in range(4)]
    assert rounds == [["a", "b", "c"], ["c", "b", "a"]] * 2
    assert timing.num_rounds([1.0, 3.0], seconds=0.1) == 25
    assert timing.num_rounds([500.0], seconds=0.1) == timing.MIN_ROUNDS
    assert timing.num_rounds([0.01], seconds=10) == timing.MAX_ROUNDS
    assert timing.quantiles([1.0, 2.0, 3.0])["ms"] == 2.0


def test_a_section_ends_with_its_limit_or_the_budget():
    now = [0.0]
    budget = timing.Budget(100, clock=lambda: now[0])
    budget.open_section(30)
    assert budget.left_s() == 30
    now[0] = 90.0
    budget.open_section(30)
    assert budget.left_s() == 10
    with pytest.raises(TimeoutError, match="not measured"), timing.time_limit(0.0):
        pass
    with pytest.raises(TimeoutError), timing.time_limit(0.05):
        time.sleep(10)


def test_speeds_are_shares_of_what_the_device_does():
    found = kernels.speeds([1.0, 1.0, 1.0], 2.7e9, 350e9, LIMITS)
    assert (found["of_copy"], found["of_matmul"]) == (pytest.approx(0.9), pytest.approx(0.5))
    assert (found["gb_per_s"], found["tflop_per_s"]) == (pytest.approx(2700), pytest.approx(350))


@pytest.fixture
def report(tmp_path, monkeypatch):
    machine = LIMITS | {"device": "none", "copy_of_sheet": 0.9, "sheet": "none"}
    monkeypatch.setattr(kernels, "machine", lambda: machine)
    return kernels.Report(tmp_path, resumed=False)


def test_errors_and_missing_time_are_rows_and_no_row_is_lost(report, tmp_path, monkeypatch):
    one, two, three = (case("rms_norm", FORWARD, B=1, T=T, D=8) for T in (1, 2, 3))

    def measure(section, group, report):
        if group == [two]:
            raise RuntimeError("no luck\nand more")
        report.add(section, group[0], "triton", True, **timing.quantiles([1.0]), parity="ok")

    monkeypatch.setattr(kernels, "measure_op", measure)
    monkeypatch.setattr(kernels, "release", lambda: None)
    plan = {"layers": cases.Section(60, (one, two)), "late": cases.Section(-1, (three,))}
    kernels.run(plan, report, timing.Budget(60), started=0.0)
    report.finish()
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [r.get("note") for r in rows][:2] == [None, "RuntimeError: no luck"]
    assert "not measured" in rows[2]["note"]
    text = (tmp_path / "kernels.md").read_text()
    assert text.count("\n| rms_norm") == 3
    assert "goal 85%: met" in text
    again = kernels.Report(tmp_path, resumed=True)
    assert len(again.of_case("layers", one)) == 1


def test_a_kernel_that_failed_small_is_unverified_large():
    small = row(None, section="parity", op="rope", dtype="bfloat16", contender="triton")
    large = case("rope", FORWARD, B=1, T=1, N=1, H=2)
    assert not kernels.is_broken([small], large, "triton")
    assert kernels.is_broken([small | {"parity": "FAILED"}], large, "triton")
    assert kernels.is_broken([small | {"parity": "none", "contender": "all"}], large, "triton")
    assert kernels.verdict(large, float("nan"))["parity"] == "FAILED"


@pytest.mark.parametrize("op", ["rg_lru", "attention", "causal_conv", "mean_cross_entropy"])
def test_contenders_agree_with_truth_in_the_interpreter(interpreted, op):
    found = interpreted("kernel_benchmark_cases", "measured", op=op)
    assert [r["parity"] for r in found] == ["ok"] * len(found)
    assert {r["contender"] for r in found} >= {"triton"}
    assert all(r["ms"] == 1.0 and r["error"] < 2**-6 for r in found)


def test_without_a_gpu_one_line_and_exit_code_2():
    script = [sys.executable, str(ROOT / "benchmarks" / "kernels.py")]
    done = subprocess.run(
        script, capture_output=True, text=True, env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "needs a CUDA device" in done.stderr
    done = subprocess.run([*script, "--dry-run"], capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 0
    for words in ("rg_lru (at most", "of_copy >= 0.9", "mean_cross_entropy", "1b family=hawk"):
        assert words.replace("1b family", "size=1b family") in done.stdout
