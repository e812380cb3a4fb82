"""aerie compare: pairs by any setting, two files as a gate, and why two sides differ."""

import json
import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from synthetic_records import modeling, parity, record, sample

from analysis import comparisons, load, regressions, report, settings, tables, why
from analysis.load import frame_of
from suites import display, reports
from suites.__main__ import main
from suites.harness.record import write


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def aerie(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        return Done(ended.value.code or 0, *capsys.readouterr())

    return run


def timed(
    value: float = 10.0, *, round: int = 0, noise: float = 0.01, metric="step_time_ms", **rest
):
    """A training run whose one repeat takes so long, give or take a draw of its round."""
    rest = {"seq_len": 512, "batch_size": 4} | rest
    draw = np.random.default_rng([round, len(str(rest))]).normal(0, noise)
    samples = (sample(metric, value * np.exp(draw), repeat=0),)
    return record(samples=samples, round=round, **rest)


def rounds(value: float = 10.0, count: int = 6, **rest) -> list:
    return [timed(value, round=n, **rest) for n in range(count)]


# by any setting

VARIANTS = [
    ("model.lambda_init", "code", "paper", {"model": {"lambda_init": "code"}}, {}),
    ("model.window_size", "16", "32", {"model": {"window_size": 16}}, {}),
    ("optimizer.learning_rate", "0.001", "0.003", {"optimizer": {"name": "adamw",
     "learning_rate": 1e-3}}, {"optimizer": {"name": "adamw", "learning_rate": 3e-3}}),
    ("kernels.attention", "fused", "plain", {"kernels": {"attention": "fused"}},
     {"kernels": {"attention": "plain"}}),
    ("dtype", "bfloat16", "float32", {"dtype": "bfloat16"}, {}),
    ("batch_size", "8", "4", {"batch_size": 8}, {}),
    ("seq_len", "1024", "512", {"seq_len": 1024, "batch_size": 2}, {}),
    ("size", "100m", "tiny", {"model": {"size": "100m", "d_model": 768}}, {}),
    ("device_kind", "h200", "h100", {"device_kind": "h200"}, {"device_kind": "h100"}),
    ("data", "docstrings", "stdlib", {"data": {"name": "docstrings", "source": "docstrings"}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("by", "ours", "baseline", "a", "b"), VARIANTS, ids=lambda v: str(v)[:20])
def test_pairs_differ_in_the_setting_alone(by, ours, baseline, a, b):
    frame = frame_of([*rounds(8, **a), *rounds(10, **b), *rounds(3, backend="torch", **b)])
    found = comparisons.comparisons(frame, by, ours, baseline)
    pair = found[found["value_ours"].notna() & found["value_baseline"].notna()]
    assert list(pair["backend"]) == ["jax"]  # torch has no such run of ours
    assert pair["speedup"].item() == pytest.approx(10 / 8, rel=0.05)
    assert by in settings.varying(frame)
    assert settings.varying(frame)[by] == tuple(sorted({ours, baseline}, key=[
        *settings.values_of(frame, by)].index))  # fmt: skip


def test_cells_that_differ_in_two_settings_are_no_pair():
    frame = frame_of([*rounds(model={"lambda_init": "code", "window_size": 16}), *rounds()])
    assert settings.varying(frame) == {}
    assert len(comparisons.comparisons(frame, "model.lambda_init", "code", "paper")) == 2  # alone


def test_settings_of_one_block_have_a_verdict_and_other_workloads_have_none():
    code = rounds(8, model={"lambda_init": "code"})
    longer = rounds(20, seq_len=1024, batch_size=2, block="block1")
    frame = frame_of([*rounds(), *code])
    (one,) = comparisons.comparisons(frame, "model.lambda_init", "code").to_dict("records")
    assert (one["verdict"], one["num_paired_rounds"]) == ("faster", 6)
    frame = frame_of([*rounds(), *longer])
    (one,) = comparisons.comparisons(frame, "seq_len", "1024", "512").to_dict("records")
    assert (one["verdict"], one["num_paired_rounds"]) == ("unpaired", 0)
    assert np.isnan(one["speedup_low"])


def test_a_step_of_other_tokens_is_another_workload():
    """By seq_len the batch of a training step shrinks; elsewhere it must be the same."""
    frame = frame_of([*rounds(), *rounds(seq_len=1024, batch_size=4)])
    assert "seq_len" not in settings.varying(frame)
    quality = [modeling("hawk", "jax", batch_size=b, **{}) for b in (4, 2)]
    assert "batch_size" in settings.varying(frame_of(quality))


def test_a_lone_cell_has_a_row_only_where_both_values_were_asked_for():
    code = rounds(8, model={"lambda_init": "code"})
    frame = frame_of([*rounds(), *code, *rounds(backend="torch"), *rounds(family="mqa")])
    found = comparisons.comparisons(frame, "model.lambda_init", "code", "paper")
    assert set(zip(found["family"], found["backend"], strict=True)) == {
        ("griffin", "jax"), ("griffin", "torch")}  # fmt: skip


def test_by_a_kernel_is_by_what_ran():
    def ran(asked, resolved, value):
        seen = {"resolved_kernels": {"linear_scan": resolved, "attention": "plain"}}
        return rounds(value, kernels={"linear_scan": asked}, provenance=seen)

    frame = frame_of([*ran("auto", "analytic", 8), *ran("sequential", "sequential", 16)])
    assert settings.varying(frame) == {"linear_scan": ("analytic", "sequential")}
    (one,) = comparisons.comparisons(frame, "linear_scan", "analytic").to_dict("records")
    assert one["speedup"] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("values", "defaults", "want"),
    [(("code", "paper"), ["paper"], "paper"), (("code", "paper"), ["x"], "code"),
     (("16", "32", "64"), ["32", "null"], "32")],
)  # fmt: skip
def test_the_baseline_is_that_of_configs_else_the_first(values, defaults, want):
    assert settings.baseline_of("model.x", values, {"model.x": defaults}) == want


@pytest.mark.parametrize("by", [*settings.BASELINE, "dtype"])
def test_the_baseline_of_several_values_was_measured(by):
    assert settings.baseline_of(by, ("hawk", "griffin")) == "hawk"
    assert settings.baseline_of(by, ("griffin", "hawk"), {by: ["griffin"]}) == "griffin"
    convention = settings.BASELINE.get(by, "hawk")
    assert settings.baseline_of(by, ("hawk", convention)) == convention
    assert settings.baseline_of(by, ("hawk",)) == convention  # it stands alone


def test_configs_name_the_baseline_of_what_was_measured():
    big = {"size": "1b", "d_model": 2048, "window_size": 1024}
    made = reports.defaults(frame_of([*rounds(count=1), *rounds(count=1, model=big)]))
    assert made["model.lambda_init"][0] == "paper"
    assert {"32", "1024"} <= set(made["model.window_size"])
    assert made["optimizer.learning_rate"][0] == "0.003"


def test_numbers_stand_in_their_order():
    frame = frame_of([one for n in (128, 16, 32) for one in rounds(model={"window_size": n})])
    assert settings.values_of(frame, "model.window_size") == ("16", "32", "128")
    assert settings.value_of("1.6e1", ("16", "32")) == "16"


def test_a_table_says_what_it_compares_and_hides_what_goes_along():
    frame = frame_of([*rounds(), *rounds(seq_len=1024, batch_size=2)])
    table = tables.side_by_side(frame, "seq_len", "1024")
    assert {"seq_len=1024", "seq_len=512", "seq_len=1024 / seq_len=512"} <= set(table.header)
    assert table.rows[0][table.header.index("workload")] == ""
    assert "/" not in table.name


def test_variants_name_every_setting_that_tells_cells_apart():
    rates = [{"optimizer": {"name": "adamw", "learning_rate": rate}} for rate in (1e-3, 3e-3)]
    records = [one for backend in ("jax", "torch") for rate in rates
               for one in rounds(backend=backend, **rate)]  # fmt: skip
    found = comparisons.comparisons(frame_of(records))
    assert set(found["variant"]) == {"learning_rate=0.001", "learning_rate=0.003"}


def test_the_report_has_a_table_of_each_ablation():
    fused = {"resolved_kernels": {"linear_scan": "analytic", "attention": "fused"}}
    frame = frame_of(
        [
            *rounds(),
            *rounds(8, model={"lambda_init": "code"}),
            *rounds(8, kernels={"attention": "fused"}, provenance=fused),
            *rounds(20, seq_len=1024, batch_size=2),
            *rounds(20, model={"size": "100m", "d_model": 768}),
        ]
    )
    made = {
        table.name for table in report.comparison_tables(frame, report.pairs(frame)) if table.rows
    }
    assert made == {"attention_fused_plain",  # one backend ran
                    "model.lambda_init_lambda_init=paper_lambda_init=code"}  # fmt: skip
    made = report.comparison_tables(frame, report.pairs(frame, {"model.lambda_init": ["paper"]}))
    assert "lambda_init=code beside lambda_init=paper" in [table.title for table in made]


# the command


@pytest.fixture
def store(tmp_path):
    for one in [*rounds(), *rounds(8, model={"lambda_init": "code"}),
                *rounds(12, backend="torch")]:  # fmt: skip
        write(tmp_path, one)
    return tmp_path


def test_rows_of_json_say_both_sides_and_why(aerie, store):
    done = aerie("compare", "--by", "lambda_init", "--json", "--results", store)
    assert done.returncode == 0
    row, lone = json.loads(done.stdout)
    assert (lone["backend"], lone["value_ours"], lone["speedup"]) == ("torch", None, None)
    assert (row["by"], row["ours"], row["baseline"]) == ("model.lambda_init", "code", "paper")
    assert row["speedup"] == pytest.approx(1.25, rel=0.05)
    assert row["verdict"] == "faster"
    assert row["why"] == []
    rows = json.loads(aerie("compare", "--json", "--results", store).stdout)
    row = next(row for row in rows if row["speedup"])
    assert row["why"][0]["evidence"] == "program: eager -> compiled in every pair of runs (6)"


def test_json_rounds_nothing(aerie, tmp_path):
    records = [modeling(family, "jax", seed) for family in ("mqa", "griffin") for seed in range(3)]
    records = [
        replace(one, samples=(sample("loss", 2 + i // 3 + 1e-7 * i**2),))
        for i, one in enumerate(records)
    ]
    for one in records:
        write(tmp_path, one)
    done = aerie("compare", "--by", "family", "--metric", "loss", "--json", "--results", tmp_path)
    (row,) = json.loads(done.stdout)
    (want,) = comparisons.comparisons(
        load.load(tmp_path), "family", "griffin", "mqa", metrics=("loss",)
    ).to_dict("records")
    assert 0 < row["p"] < 1e-10
    assert {name: row[name] for name in ("p", "difference", "value_ours")} == {
        name: want[name] for name in ("p", "difference", "value_ours")}  # fmt: skip
    assert row["speedup"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--by", "famly"], ["'family'", "What varies: backend (jax, torch), model.lambda_init"]),
        (["--by", "lambda_inti"], ["'model.lambda_init'"]),
        (["--metric", "step_tim_ms"], ["'step_time_ms'"]),
        (["--baseline", "tortch"], ["--baseline", "'torch'"]),
        (["--ours", "jx"], ["--ours", "'jax'"]),
        (["--ours", "torch"], ["is the baseline too"]),
        (["quickstat"], ["'quickstart'"]),
        (["quickstart"], ["none of the runs of quickstart", "aerie run experiment=quickstart"]),
        (["--fail-above", "3%"], ["two files"]),
        (["a.parquet"], ["two files"]),
        (["a.parquet", "b.parquet", "--by", "family"], ["--by"]),
        (["a.parquet", "b.parquet"], ["a.parquet"]),
        (["a.parquet", "b.parquet", "--fail-above", "3"], ["like 3%"]),
    ],
    ids=" ".join,
)
def test_a_wrong_request_is_one_line(aerie, store, arguments, words):
    done = aerie("compare", *arguments, "--results", store)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    for word in words:
        assert word in done.stderr


def test_nothing_to_compare_says_what_varies(aerie, store):
    done = aerie("compare", "--by", "dtype", "--results", store)
    assert done.returncode == 0
    assert "only float32 was measured" in done.stdout
    assert "model.lambda_init (code, paper)" in done.stdout
    assert json.loads(aerie("compare", "--by", "dtype", "--json", "--results", store).stdout) == []


def test_a_metric_that_no_table_shows_may_be_asked_for(aerie, tmp_path):
    for one in [*rounds(8, metric="init_time_s"), *rounds(metric="init_time_s", backend="torch")]:
        write(tmp_path, one)
    done = aerie("compare", "--metric", "init_time_s", "--json", "--results", tmp_path)
    assert [row["metric"] for row in json.loads(done.stdout)] == ["init_time_s"]


def test_a_metric_leaves_other_suites_out(aerie, tmp_path):
    for one in [*rounds(), *rounds(backend="torch"), modeling("hawk", "jax")]:
        write(tmp_path, one)
    done = aerie("compare", "--metric", "bits_per_byte", "--results", tmp_path)
    assert "nothing to compare by backend: only jax was measured" in done.stdout


def test_a_narrow_terminal_folds_no_word(monkeypatch, capsys):
    frame = frame_of([*rounds(), *rounds(12, backend="torch")])
    table = tables.side_by_side(frame)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    display.print_beside(table.header, table.rows, title=table.title)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "griffin" in lines[1]
    assert any("Step time (ms): 1.2" in line for line in lines)
    assert any(line.startswith("    jax ") and ", torch 1" in line for line in lines)


# two files


def gate(old, new, limit=0.03, **rest):
    return regressions.compare(frame_of(new), frame_of(old), limit=limit, **rest)


def verdict(found) -> tuple:
    (row,) = found.rows.to_dict("records")
    return row["verdict"], row["is_regression"]


def test_the_gate_passes_what_is_alike_and_fails_what_is_worse():
    assert verdict(gate(rounds(), rounds(10.05))) == ("equivalent", False)
    assert verdict(gate(rounds(), rounds(11))) == ("worse", True)
    assert verdict(gate(rounds(), rounds(9))) == ("better", False)
    assert verdict(gate(rounds(), rounds(11), limit=0.2)) == ("worse", False)  # but within 20%
    assert verdict(gate(rounds(), rounds(11), limit=None)) == ("worse", False)


def test_more_is_better_where_it_is():
    fewer = [rounds(value, metric="tokens_per_s") for value in (1000, 900)]
    assert verdict(gate(*fewer)) == ("worse", True)
    assert verdict(gate(*reversed(fewer))) == ("better", False)


def test_few_processes_or_much_noise_never_fail():
    assert verdict(gate(rounds(count=5), rounds(20))) == ("inconclusive", False)
    assert verdict(gate(rounds(noise=0.5), rounds(10.5, noise=0.5, host="b"))) == (
        "inconclusive", False)  # fmt: skip


def test_the_interval_is_welchs():
    from scipy.stats import ttest_ind

    old, new = rounds(count=8, noise=0.02), rounds(10.3, count=11, noise=0.05)
    a, b = (np.log([one.samples[0].value for one in side]) for side in (old, new))
    want = np.exp(ttest_ind(a, b, equal_var=False).confidence_interval(0.95))
    (row,) = gate(old, new).rows.to_dict("records")
    assert (row["ratio_low"], row["ratio_high"]) == pytest.approx(tuple(want))
    assert row["ratio"] == pytest.approx(np.exp(a.mean() - b.mean()))


def test_what_does_not_complete_any_more_is_lost():
    lost = [timed(round=n, outcome="out_of_memory", reason="x") for n in range(6)]
    lost = [type(one)(**(vars(one) | {"samples": ()})) for one in lost]
    found = gate(rounds(), lost)
    assert verdict(found) == ("lost", True)
    assert found.rows["reason"].item() == "out_of_memory"
    assert verdict(gate(lost, rounds())) == ("inconclusive", False)  # new: nothing to be worse than


def lost(count: int, total: int = 8, **rest) -> list:
    """So many of all runs out of memory, the first ones."""
    none = {"outcome": "out_of_memory", "reason": "x"}
    return [replace(timed(round=n, **none, **rest), samples=()) if n < count else
            timed(round=n, **rest) for n in range(total)]  # fmt: skip


def test_what_completes_less_often_is_lost():
    (row,) = gate(rounds(count=8), lost(7)).rows.to_dict("records")
    assert (row["verdict"], row["is_regression"]) == ("lost", True)
    words = row["reason"].split("; ")
    assert set(words[0].split(", ")) == {"1 completed", "7 out_of_memory"}
    assert words[1] == "1 of 8 completed, 8 of 8 before"
    assert verdict(gate(rounds(count=8), lost(1))) == ("lost", True)
    assert verdict(gate(rounds(count=8), lost(1), limit=None)) == ("lost", False)
    assert verdict(gate(lost(2), lost(2)))[1] is False
    assert verdict(gate(lost(2), rounds(count=6)))[1] is False
    assert verdict(gate(rounds(count=8), rounds(count=6)))[1] is False  # fewer rounds, all complete


def test_a_cell_of_the_baseline_that_is_missing_fails_the_gate(aerie, files):
    old, new, never = files(
        old=[*rounds(), *rounds(family="mqa")],
        new=[*rounds(), *rounds(family="hawk")],
        never=[*rounds(), *lost(6, 6, family="mqa")],
    )
    done = aerie("compare", old, new, "--fail-above", "3%")
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    assert line.startswith("FAILED training_speed, mqa, tiny, jax")
    assert line.endswith(": new.parquet has no run of it")
    assert done.stdout.splitlines()[-1] == (
        "regression gate failed: 0 of 1 metric worse by more than 3%, 0 without a verdict, "
        "1 cell not in new.parquet."
    )
    assert aerie("compare", old, new).returncode == 0  # no limit, no gate
    assert aerie("compare", never, new, "--fail-above", "3%").returncode == 0  # it never completed
    done = aerie("compare", old, new, "--fail-above", "3%", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["is_failed"], len(found["missing"])) == (1, True, 1)


def test_a_lost_cell_fails_the_gate_by_any_metric(aerie, files):
    """Where nothing of a suite completed, no record of the new side names the metric."""
    old, new = files(old=rounds(), new=lost(6, 6))
    done = aerie("compare", old, new, "--fail-above", "3%", "--metric", "step_time_ms")
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    assert line.endswith("does not complete any more: out_of_memory")
    assert "0 of 1 metric worse" in done.stdout.splitlines()[-1]
    assert done.stdout.splitlines()[-1].endswith(", 1 cell not completed as before.")


@pytest.mark.parametrize(("count", "noise"), [(3, 0.01), (6, 0.9)])
def test_a_gate_that_judged_nothing_is_undecided(aerie, files, count, noise):
    old, new = files(old=rounds(count=8, noise=noise), new=rounds(11, count, noise=noise, host="b"))
    done = aerie("compare", old, new, "--fail-above", "3%")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == (
        "regression gate undecided: nothing was judged, 1 metric without a verdict. One needs 6 "
        f"processes a side at least, and more where they differ much; the fewest here are {count}."
    )


def test_cpu_and_accelerator_are_refused_by_cell():
    old = [*rounds(device_kind="h100"), *rounds(backend="torch")]
    new = [*rounds(), *rounds(backend="torch")]
    found = gate(old, new, names=("NEW", "OLD"))
    assert set(found.rows["backend"]) == {"torch"}
    (line,) = found.refused
    assert "cpu in NEW, h100 in OLD" in line
    assert found.lone == []


def test_a_cell_without_a_partner_is_named_with_the_nearest():
    found = gate(rounds(), rounds(model={"window_size": 16}), names=("NEW", "OLD"))
    assert len(found.rows) == 0
    assert any("in NEW alone; the nearest in OLD has model.window_size=32" in line
               for line in found.lone)  # fmt: skip


@pytest.fixture
def files(tmp_path):
    def make(**sides):
        made = []
        for name, records in sides.items():
            made.append(tmp_path / f"{name}.parquet")
            load.write_parquet(frame_of(records), made[-1])
        return made

    return make


def test_the_command_is_a_gate(aerie, files):
    other = {"host": "node2", "provenance": {"versions": {"jax": "0.11.0", "numpy": "2.4.6"}}}
    old, same, slow = files(
        old=rounds(), same=rounds(10.02), slow=[*rounds(11, **other), parity("griffin", "jax")]
    )
    done = aerie("compare", old, same, "--fail-above", "3%")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == (
        "regression gate passed: 0 of 1 metric worse by more than 3%, 0 without a verdict."
    )
    done = aerie("compare", old, slow, "--fail-above", "3%")
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    assert line.startswith("FAILED training_speed, griffin, tiny, jax, float32, seq_len 512, batch")
    assert "Step time (ms) worse by " in line
    assert "Other nodes" in done.stdout
    assert "jax: 0.10.2 -> 0.11.0 in every pair of runs (6)" in done.stdout
    assert aerie("compare", old, slow).returncode == 0  # no limit, no gate
    found = json.loads(aerie("compare", old, slow, "--fail-above", "0.03", "--json").stdout)
    assert found["is_failed"] is True
    assert found["why"][0]["what"] == "jax"
    assert found["ours"]["nodes"] == ["node2"]
    assert [row["is_regression"] for row in found["rows"]] == [True]


def test_files_that_share_nothing_are_refused(aerie, files):
    done = aerie("compare", *files(old=rounds(device_kind="h100"), new=rounds()))
    assert done.returncode == 2
    assert "share no cell" in done.stderr
    assert "cpu in new.parquet, h100 in old.parquet" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_store_is_compared_like_a_file(aerie, files, store):
    (new,) = files(new=rounds(10.02))
    done = aerie("compare", store, new)
    assert done.returncode == 0
    assert "in " + store.name not in done.stdout.splitlines()[0]
    assert "lambda_init=code" in done.stdout  # in the store alone


def test_a_file_that_is_no_records_is_one_line(aerie, tmp_path):
    (tmp_path / "a.parquet").write_text("no parquet")
    (tmp_path / "b.parquet").write_text("no parquet")
    done = aerie("compare", tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# why


def causes(ours, baseline) -> list:
    return why.of_files(frame_of(ours), frame_of(baseline))


def test_a_cause_whose_pairs_show_it_comes_first():
    """Every pair has fewer threads; half of them another triton, and these alone are slower."""
    versions = [{"versions": {"triton": name, "jax": "0.10.2"}} for name in ("3.6.0", "3.7.0")]
    old = [*rounds(noise=0.001),
           *rounds(backend="torch", noise=0.001, provenance=versions[0])]  # fmt: skip
    fewer = {"num_threads": 1}
    new = [*rounds(noise=0.001, provenance=fewer),
           *rounds(12, backend="torch", noise=0.001, provenance=versions[1] | fewer)]  # fmt: skip
    first, *rest = causes(new, old)
    assert first.what == "triton"
    assert "triton: 3.6.0 -> 3.7.0 in 6 of 12 pairs of runs" in first.evidence
    assert "0.83x there and 1.00x in the others" in first.evidence
    assert [cause.what for cause in rest] == ["num_threads"]


def test_a_tiny_ratio_has_its_digits():
    """JAX takes 3000 times as long, and 1.6 times that in rounds of one node."""
    made = []
    for n in range(12):
        slow = 1.6 if n % 2 else 1
        made += [timed(3000 * slow, round=n, host=f"node{n % 2}"),
                 timed(1, round=n, host=f"node{n % 2}", backend="torch")]  # fmt: skip
    found = why.of_comparison(frame_of(made), "backend", "jax", "torch")
    (cause,) = (cause for cause in found if cause.what == "node")
    ratios = re.findall(r"([\d.]+)x", cause.evidence)
    assert sorted(map(float, ratios)) == pytest.approx([1 / 4800, 1 / 3000], rel=0.02)


def test_a_cause_that_its_pairs_deny_comes_last():
    old = [*rounds(), *rounds(backend="torch", provenance={"num_threads": 1})]
    new = [*rounds(12, host="node2"), *rounds(12, backend="torch", host="node2")]
    assert [cause.what for cause in causes(new, old)] == ["node", "num_threads"]


def test_what_differs_together_cannot_be_told_apart():
    other = {"host": "node2", "provenance": {"num_threads": 1}}
    first, second = causes(rounds(12, **other), rounds())
    assert (first.what, first.along) == ("num_threads", ("node",))
    assert (second.what, second.num_differing) == ("node", 6)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ({}, {"build": "other"}, "code of the engine"),
        ({"build": "e.q"}, {"build": "e.r"}, "code of suite and harness"),
        ({"provenance": {"load_average": [0.5, 0, 0]}},
         {"provenance": {"load_average": [6.0, 0, 0]}}, "load average"),
        ({}, {"provenance": {"data_digest": "x"}}, "data"),
        ({}, {"provenance": {"init_digest": "x"}}, "initial parameters"),
        ({}, {"provenance": {"device_name": "another CPU", "cpu_model": "B"}}, "device_name"),
        ({}, {"provenance": {"resolved_kernels": {"linear_scan": "sequential"}}}, "linear_scan"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_every_kind_of_difference_is_found(old, new, what):
    (cause,) = causes(rounds(**new), rounds(**old))
    assert cause.what == what


def test_measured_peaks_and_cold_compilations_are_found():
    def probed(peak, compile_s):
        made = []
        for n in range(6):
            samples = (sample("step_time_ms", 10 + n / 100, repeat=0),
                       sample("peak_flops_per_s", peak, field="measured"),
                       sample("compile_time_s", compile_s))  # fmt: skip
            made.append(record(samples=samples, round=n, seq_len=512))
        return made

    found = {cause.what: cause.evidence for cause in causes(probed(6e10, 9.0), probed(9e10, 0.5))}
    assert set(found) == {"measured peak", "compile cache"}
    assert "90 GFLOP/s -> 60 GFLOP/s" in found["measured peak"]
    assert "warm -> cold" in found["compile cache"]


def test_what_was_asked_for_is_no_cause():
    fused = {"resolved_kernels": {"linear_scan": "analytic", "attention": "fused"}}
    frame = frame_of([*rounds(), *rounds(kernels={"attention": "fused"}, provenance=fused)])
    assert why.of_comparison(frame, "attention", "fused", "plain") == []
    frame = frame_of([*rounds(), *rounds(family="hawk")])
    assert why.of_comparison(frame, "family", "hawk", "griffin") == []  # their parameters differ


def test_rounds_of_a_node_that_differ_from_others_are_named():
    """Six rounds of each node are alike on the first, and 20% apart on the second."""
    ours = [timed(10 if n < 6 else 12, round=n, host=f"node{1 + n // 6}") for n in range(12)]
    base = [timed(10, round=n, backend="torch", host=f"node{1 + n // 6}") for n in range(12)]
    found = why.of_comparison(frame_of([*ours, *base]), "backend", "jax", "torch")
    (cause,) = (cause for cause in found if cause.what == "node")
    assert "in 6 of 12 rounds of training_speed, griffin" in cause.evidence
    alike = [timed(10, round=n, host=f"node{1 + n // 6}") for n in range(12)]
    found = why.of_comparison(frame_of([*alike, *base]), "backend", "jax", "torch")
    assert not any(cause.what == "node" for cause in found)


def test_a_load_of_others_in_some_rounds_is_named():
    def busy(n):
        return {"provenance": {"load_average": [5.0 if n % 3 == 0 else 1.0, 0, 0]}}

    ours = [timed(14 if n % 3 == 0 else 10, round=n, **busy(n)) for n in range(12)]
    base = [timed(10, round=n, backend="torch", **busy(n)) for n in range(12)]
    found = why.of_comparison(frame_of([*ours, *base]), "backend", "jax", "torch")
    (cause,) = (cause for cause in found if cause.what == "load")
    assert "beyond the cores in 4 of 12 rounds" in cause.evidence
