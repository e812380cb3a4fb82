"""Records to tables: what the frame keeps, what parity lets stand, what is compared and matched."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import synthetic_records as synthetic
from synthetic_records import modeling, parity, record, sample, training

import analysis
from analysis import checks, comparisons, derive, figures, matching, report, style, tables
from analysis.load import frame_of


@pytest.fixture(scope="module")
def quickstart(quickstart_report):
    return quickstart_report


# the attempt that counts


@pytest.mark.parametrize(
    ("outcomes", "counted"),
    [(["preempted", "completed"], 1), (["completed", "failed"], 0), (["failed", "timed_out"], 1),
     (["completed", "completed"], 1)],
)  # fmt: skip
def test_the_last_completed_attempt_counts_else_the_last(outcomes, counted):
    records = [
        record(outcome=outcome, attempt=f"attempt{n}", samples=(sample("mfu", 0.1 + n),))
        for n, outcome in enumerate(outcomes)
    ]
    frame = frame_of(records)
    assert derive.runs(frame)["attempt"].tolist() == [f"attempt{counted}"]
    values = derive.summary(frame)["value"].tolist()
    assert values == ([0.1 + counted] if outcomes[counted] == "completed" else [])


def test_importing_analysis_is_cheap_and_needs_no_framework():
    code = (
        "import sys, analysis; assert 'pandas' not in sys.modules; "
        "from analysis import report, load; assert callable(load); "
        "print([m for m in ('jax', 'torch', 'hydra', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# parity


def marks_of(table) -> set[str]:
    place = table.header.index("parity")
    return {row[place] for row in table.rows}


def status_of(records) -> str:
    return checks.parity(frame_of(records))["status"].tolist()


def test_parity_is_green_within_the_tolerance_and_red_beyond():
    assert status_of([parity("griffin", "jax", error=9e-6)]) == ["green"]
    assert status_of([parity("griffin", "jax", error=2e-5)]) == ["red"]


def test_parity_without_a_check_or_without_a_tolerance_is_red():
    assert status_of([record("parity")]) == ["red"]
    error = sample("relative_error", 0.0, field="float32/logits")
    assert status_of([record("parity", samples=(error,))]) == ["red"]


def test_parity_that_did_not_complete_is_red():
    done = parity("griffin", "jax")
    assert status_of([parity("griffin", "jax", outcome="failed", reason="x")]) == ["red"]
    assert status_of([done]) == ["green"]


KERNELS = {"linear_scan": "analytic", "attention": "plain", "program": "compiled"}


@pytest.mark.parametrize(
    "different",
    [{}, {"build": "build1"}, {"dtype": "bfloat16"}, {"device_kind": "h200"},
     {"model": {"lambda_init": "code"}}, {"model": {"head_dim": 128}},
     {"provenance": {"resolved_kernels": KERNELS | {"linear_scan": "triton"}}},
     {"provenance": {"resolved_kernels": KERNELS | {"program": "eager"}}}],
    ids=str,
)  # fmt: skip
def test_a_speed_is_verified_by_parity_of_its_own_key_alone(different):
    frame = frame_of([parity("griffin", "jax"), training("griffin", "jax", 0, **different)])
    cells = derive.summary(frame)
    want = "none" if different else "green"
    assert set(cells["parity"]) == {want}
    assert marks_of(tables.side_by_side(frame)) == {"UNVERIFIED" if different else "green"}


def test_another_question_of_the_same_engine_is_verified_too():
    frame = frame_of([parity("griffin", "jax", build="engine.parity"),
                      training("griffin", "jax", 0, build="engine.training")])  # fmt: skip
    assert set(derive.summary(frame)["parity"]) == {"green"}


def test_an_older_engine_keeps_its_own_parity():
    """Parity of the new engine, red or green, says nothing of speeds of the old one."""
    old = training("griffin", "jax", 0, build="old.q"), parity("griffin", "jax", build="old.q")
    later = {"build": "new.q", "attempt": "29990101T000000", "outcome": "invalid_measurement"}
    frame = frame_of([*old, parity("griffin", "jax", **later)])
    assert set(derive.summary(frame)["parity"]) == {"green"}
    speed = training("griffin", "jax", 1, build="new.q")
    frame = frame_of([*old, parity("griffin", "jax", **later), speed])
    assert sorted(derive.processes(frame)["parity"].unique()) == ["green", "red"]


def test_size_alone_does_not_lose_the_parity_of_tiny():
    big = training("griffin", "jax", 0, model={"size": "1b", "d_model": 2048, "num_heads": 16})
    assert set(derive.summary(frame_of([parity("griffin", "jax"), big]))["parity"]) == {"green"}


@pytest.mark.parametrize("levels", [("L1",), ("L1", "L2")])
def test_parity_of_some_levels_makes_no_key_green_but_may_make_it_red(levels):
    speed, whole = training("griffin", "jax", 0), parity("griffin", "jax")
    part, red = (parity("griffin", "jax", error=e, levels=levels) for e in (1e-6, 2e-5))
    for records, status, mark in (
        ([part], "partial", "none"),
        ([part, whole], "green", "green"),
        ([red, whole], "red", "red"),
        ([red], "red", "red"),
    ):
        frame = frame_of([*records, speed])
        assert checks.parity(frame)["status"].tolist() == [status]
        assert set(derive.summary(frame)["parity"]) == {mark}
    (row,) = tables.parity(frame_of([part])).rows
    assert f"partial ({','.join(levels)})" in row


def test_the_parity_table_tells_head_dims_apart():
    table = tables.parity(frame_of([parity("griffin", "jax", model={"head_dim": n})
                                    for n in (16, 128)]))  # fmt: skip
    place = table.header.index("variant")
    assert sorted(row[place] for row in table.rows) == ["head_dim=128", "head_dim=16"]
    assert "variant" not in tables.parity(frame_of([parity("griffin", "jax")])).header


# tables


def test_a_missing_value_is_a_dash_with_its_outcome_never_zero(quickstart):
    store, path = quickstart
    table = tables.side_by_side(analysis.load(store))
    row = next(row for row in table.rows if "seq_len 1,024" in row[2] and "Step" in row[3])
    assert row[4] == "- (out_of_memory)"
    assert float(row[5].replace(",", "")) > 0
    assert row[6:8] == ["-", "-"]
    text = path.with_name("report.md").read_text()
    assert "- (out_of_memory)" in text
    assert "| 0 |" not in re.sub(r"\| 0 \| 0 \| out_of_memory", "", text)  # seed and round may be 0


def test_a_pair_with_no_completed_run_keeps_its_row():
    lost = [record("training_speed", "mqa", b, outcome=o, seq_len=512)
            for b, o in (("jax", "timed_out"), ("torch", "unsupported"))]  # fmt: skip
    rows = tables.side_by_side(frame_of(lost)).rows
    assert [row[4:6] for row in rows] == [["- (timed_out)", "- (unsupported)"]]


def test_families_are_compared_with_mqa_of_the_same_backend(quickstart):
    store, _ = quickstart
    found = comparisons.comparisons(analysis.load(store), by="family", ours="hawk")
    times = found[(found["metric"] == "step_time_ms") & found["speedup"].notna()]
    assert len(times) == 4  # two backends, two lengths
    assert np.allclose(times["speedup"].astype(float), 1 / 1.25, rtol=0.03)
    assert set(times["num_paired_rounds"]) == {3}


def test_variants_of_one_family_are_told_apart():
    paper, code = {"lambda_init": "paper"}, {"lambda_init": "code"}
    records = [training("griffin", b, 0, model=m) for b in ("jax", "torch") for m in (paper, code)]
    table = tables.side_by_side(frame_of(records))
    place = table.header.index("variant")
    assert {row[place] for row in table.rows} == {"lambda_init=paper", "lambda_init=code"}
    assert len(table.rows) == 2 * 5


def test_the_brief_table_has_the_first_metric_of_each_suite(quickstart):
    store, _ = quickstart
    table = tables.side_by_side(analysis.load(store), is_brief=True)
    assert set(table.frame["metric"]) == {"step_time_ms", "tpot_ms", "bits_per_byte"}


def test_runs_that_went_on_from_a_checkpoint_are_flagged():
    once, twice = ({"segments": [{"host": "node1"}] * count} for count in (1, 2))
    frame = frame_of([modeling("hawk", "jax", 0, provenance=once)])
    assert not any("checkpoint" in text for text in report.caveats(frame))
    frame = frame_of([modeling("hawk", "jax", seed, provenance=twice) for seed in range(3)])
    assert any(text.startswith("3 runs went on from a checkpoint") for text in
               report.caveats(frame))  # fmt: skip


def test_stale_runs_are_marked():
    frame = frame_of([training("griffin", "jax", 0)])
    frame["is_current"] = False
    assert "(stale)" in tables.side_by_side(frame).rows[0][4]
    assert any("older build" in text for text in report.caveats(frame))


# matching certificate


def matches(records) -> dict:
    return {m.scope: m for m in matching.certificate(frame_of(records))}


def test_equal_runs_are_matched():
    found = matches([modeling(f, b) for f in ("mqa", "griffin") for b in ("jax", "torch")])
    assert {m.is_matched for m in found.values()} == {True}
    assert set(found) == {"mqa: jax, torch", "griffin: jax, torch", "jax: mqa, griffin",
                          "torch: mqa, griffin"}  # fmt: skip


@pytest.mark.parametrize(
    ("different", "name"),
    [
        ({"costs": {"num_params": 1}}, "num_params"),
        ({"costs": {"train_flops_per_token": 1.0}}, "train_flops_per_token"),
        ({"provenance": {"data_digest": "other"}}, "data_digest"),
        ({"provenance": {"init_digest": "other"}}, "init_digest"),
    ],
)
def test_the_certificate_names_what_differs(different, name):
    found = matches([modeling("griffin", "jax"), modeling("griffin", "torch", **different)])
    match = found["griffin: jax, torch"]
    assert match.is_matched is False
    assert match.differs == (name,)


def scanned(variant: str) -> dict:
    return {"resolved_kernels": {"linear_scan": variant, "attention": "plain", "layers": "plain"}}


@pytest.mark.parametrize(
    ("variants", "is_matched"),
    [
        (("pallas_gpu", "triton"), True),
        (("analytic", "associative"), True),
        (("analytic", "triton"), False),
    ],
)
def test_backends_scan_with_kernels_of_one_kind(variants, is_matched):
    records = [modeling("griffin", backend, provenance=scanned(variant))
               for backend, variant in zip(("jax", "torch"), variants, strict=True)]  # fmt: skip
    match = matches(records)["griffin: jax, torch"]
    assert match.is_matched is is_matched
    assert match.differs == (() if is_matched else ("scan_kernels",))


@pytest.mark.parametrize(("variant", "is_matched"), [("triton", True), ("analytic", False)])
def test_gates_are_matched_where_they_run_the_same_kernels(variant, is_matched):
    records = [
        modeling("hawk", "torch", seed, model={"gate": gate}, provenance=scanned(kernel))
        for gate, kernel in (("rg_lru", "triton"), ("lru", variant))
        for seed in (0, 1)
    ]
    found = matches(records)
    assert set(found) == {"hawk torch, gate: lru, rg_lru"}  # no family and no backend alone
    match = found["hawk torch, gate: lru, rg_lru"]
    assert match.is_matched is is_matched
    assert match.differs == (() if is_matched else ("kernels_used",))


def test_a_fact_that_was_not_recorded_is_no_match():
    none = {"provenance": {"data_digest": None}}
    records = [modeling("griffin", "jax"), modeling("griffin", "torch", **none)]
    match = matches(records)["griffin: jax, torch"]
    assert match.is_matched is None
    assert match.differs == ("data_digest not recorded",)


def test_seeds_are_matched_one_by_one():
    records = [modeling("griffin", b, seed) for b in ("jax", "torch") for seed in (0, 1)]
    assert matches(records)["griffin: jax, torch"].is_matched is True


# figures and the page


def test_every_figure_with_data_is_drawn_with_units(quickstart):
    store, path = quickstart
    drawn = {file.stem for file in (path.parent / "figures").glob("*.png")}
    assert drawn == {"relative_step_time", "training_throughput", "decode_latency",
                     "learning_curves", "loss_by_position", "parity_error", "peak_memory",
                     "memory_frontier", "framework_ratios", "gate_behaviour",
                     "held_out_curves"}  # fmt: skip
    figure = figures.training_throughput(analysis.load(store))
    axes = figure.axes[0]
    assert axes.get_ylabel() == "Throughput (tokens/s)"
    assert axes.get_xscale() == "log"


def test_family_is_colour_and_backend_is_marker(quickstart):
    store, _ = quickstart
    axes = figures.decode_latency(analysis.load(store)).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    jax, torch = lines["Griffin, JAX"], lines["Griffin, PyTorch"]
    assert jax.get_color() == torch.get_color() == style.FAMILY_COLORS["griffin"]
    assert jax.get_marker() != torch.get_marker()
    assert lines["Hawk, JAX"].get_color() != jax.get_color()
    assert lines["Hawk, JAX"].get_marker() == jax.get_marker()


def test_a_figure_without_parity_says_unverified():
    frame = frame_of([training("griffin", "jax", r, t) for r in (0, 1) for t in (256, 512)])
    figure = figures.training_throughput(frame)
    line = next(line for line in figure.axes[0].get_lines() if "Griffin" in line.get_label())
    assert line.get_label() == "Griffin, JAX UNVERIFIED"
    assert line.get_markerfacecolor() == "none"
    assert "UNVERIFIED" in figure.get_supxlabel()


def test_one_length_stands_families_side_by_side():
    frame = frame_of([training(f, b, 0) for f in synthetic.FAMILIES for b in ("jax", "torch")])
    axes = figures.training_throughput(frame).axes[0]
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert names == ["MQA-Transformer", "Hawk", "Griffin"]


def test_styling_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with style.looks():
        assert matplotlib.rcParams["axes.grid"]
    assert dict(matplotlib.rcParams) == before


# In a process of its own: a fork of one that runs JAX's threads may wait for ever.
WRITE = """
import os, sys
from pathlib import Path
from analysis import report
os.sched_getaffinity = lambda _: {0, 1, 2}
report.LARGE, begin, asides = int(sys.argv[1]), report.aside, []
report.aside = lambda *args, is_worth_it: (
    asides.append(is_worth_it), begin(*args, is_worth_it=is_worth_it))[1]
report.write_report(Path(sys.argv[2]), Path(sys.argv[3]), title="T", command="c")
print(*asides)
"""


def test_a_report_of_several_processes_is_that_of_one(quickstart, tmp_path):
    store, _ = quickstart
    folder, made, asides = tmp_path / "report", [], []
    for least in (10**9, 0):
        command = [sys.executable, "-c", WRITE, str(least), str(store), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        asides += done.stdout.split()
        made.append({str(path.relative_to(folder)): re.sub(rb"Written [\d: {}-]+", b"", text)
                     for path in sorted(folder.rglob("*")) if path.is_file()
                     for text in [path.read_bytes()]})  # fmt: skip
        shutil.rmtree(folder)
    assert asides == ["False"] * 3 + ["True"] * 5
    assert made[0] == made[1]
    assert {"figures/learning_curves.svg", "tables/claims.csv", "samples.csv"} <= set(made[0])


def _answer(records) -> list[str]:
    frame = frame_of(records)
    return report.answer(frame, report.comparison_tables(frame, report.pairs(frame)))


def test_the_answer_says_what_an_ablated_setting_does():
    def trained(gate: str, bits: float, seed: int):
        noise = 0.001 * seed * (seed + len(gate))  # not the same for two gates
        return record("language_modeling", "hawk", "torch", seed=seed, model={"gate": gate},
                      samples=(sample("bits_per_byte", bits + noise),))  # fmt: skip

    bits = {"rg_lru": 2.5, "lru": 2.4, "gru": 2.5}
    records = [trained(*each, seed) for each in bits.items() for seed in range(3)]
    learned, ablated = _answer(records)
    assert learned.startswith("Hawk with gate=lru reaches held-out bits per byte")
    assert ablated.startswith("Held-out bits per byte beside gate=gru, each for itself: gate=lru")
    assert re.search(r"gate=lru -0\.1\d\d \[.*?\] better; gate=rg_lru .*\] not resolved\.$",
                     ablated)  # fmt: skip
    one = [one for one in records if one.run["seed"] == 0]
    assert "gate=lru -0.1" in _answer(one)[1]
    assert "[" not in _answer(one)[1]


def test_the_answer_mixes_no_devices_and_leaves_unpaired_out():
    gpu = {"device_kind": "h100"}
    records = [training(family, "jax", n) for n in range(6) for family in ("mqa", "griffin")]
    records += [training(family, "jax", n, block=f"block of {family}", host=family, **gpu)
                for n in range(6) for family in ("mqa", "griffin")]  # fmt: skip
    records += [training(family, "jax", n, 1024, **gpu)
                for n in range(6) for family in ("mqa", "griffin")]  # fmt: skip
    records += [training("mqa", "torch", n) for n in range(6)]
    architectures, frameworks = _answer(records)
    costs = re.findall(r"takes ([\d.x to]+) of MQA's time on (\w+) over 1 matched cell \((.*?)\)",
                       architectures)  # fmt: skip
    assert [cost[1:] for cost in costs] == [("cpu", "1 slower"), ("h100", "1 slower, 1 unpaired, "
                                                                  "left out")]  # fmt: skip
    assert all(" to " not in cost[0] for cost in costs)
    assert "as fast as PyTorch on cpu over 1 matched cell (1 faster)" in frameworks


def test_the_answer_says_where_no_seed_resolves_the_leader():
    rng = np.random.default_rng(3)
    values = {"mqa": 1.0, "griffin": 0.999, "hawk": 3.0}
    records = [
        record("language_modeling", family, samples=(
            sample("bits_per_byte", value + rng.normal(0, 0.05)),), seed=seed, seq_len=128)
        for family, value in values.items() for seed in range(3)
    ]  # fmt: skip
    text = _answer(records)[0]
    assert "reaches the fewest held-out bits per byte" in text
    assert text.count("(not resolved)") == 1
    assert re.search(r"[\d.]+ for Hawk \(jax|[\d.]+ for Hawk \(JAX", text)
