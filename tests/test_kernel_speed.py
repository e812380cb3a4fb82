"""kernel_speed: the scan alone is timed, the same in both backends, beside what it must move."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import BACKENDS, tiny
from synthetic_records import record, sample
from test_suites import FakeEngine, run_of, samples_of, values_of
from typer.main import get_command

from analysis import checks, comparisons, figures, report, settings, tables
from analysis.load import frame_of
from benchmarks import cpu_scan
from implementations import cost, reference
from implementations.engine import TIMED_OPS, Kernels, Unsupported, load_engine
from suites import compose, kernel_speed
from suites.__main__ import app
from suites.harness import measure, plan
from suites.harness.run import Run, Workload

TOLERANCE = 1e-5  # relative to the largest true value; the parity ladder is what is strict
HAWK = tiny("hawk", num_layers=1, d_rnn=24)


def workload(op, phase="train", **settings):
    return Workload(**({"batch_size": 2, "seq_len": 9, "op": op, "phase": phase} | settings))


def host(value):
    return value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)


def true_scan(op, inputs, doutputs):
    """(every state, the last one), and gradients by name where the reference has them apart."""
    wide = {k: v if k == "position_BT" else v.astype(np.float64) for k, v in inputs.items()}
    if op == "rg_lru":
        a, x, h0 = decay_and_input(**wide)
        return reference.linear_scan(a, x, h0), {}
    arguments = (wide["a_BTR"], wide["x_BTR"], wide["h0_BR"])
    grads = reference.linear_scan_grad(*arguments, *doutputs)
    names = ("a_BTR", "x_BTR", "h0_BR")
    return reference.linear_scan(*arguments), dict(zip(names, grads, strict=True))


def decay_and_input(x_BTR, a_gate_BTR, input_gate_BTR, a_param_R, position_BT, h0_BR):
    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    log_a = -8.0 * np.log1p(np.exp(a_param_R)) * sigmoid(a_gate_BTR)
    is_start = (position_BT == 0)[:, :, None]
    scale = np.where(is_start, 1, np.sqrt(-np.expm1(2 * log_a)))
    return np.where(is_start, 0, np.exp(log_a)), scale * sigmoid(input_gate_BTR) * x_BTR, h0_BR


@pytest.mark.parametrize("variant", ["sequential", "associative", "analytic"])
@pytest.mark.parametrize("op", TIMED_OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_timed_is_the_op(backend, op, variant):
    inputs, doutputs = kernel_speed.draw(workload(op), HAWK, seed=0)
    engine = load_engine(backend)(HAWK, kernels=Kernels(linear_scan=variant))
    outputs, grads = engine.prepare_op(op, inputs, doutputs)()
    engine.synchronize()
    alone, none = engine.prepare_op(op, inputs)()
    assert not none
    true, true_grads = true_scan(op, inputs, doutputs)
    assert set(grads) == {key for key in inputs if key != "position_BT"}
    pairs = [*zip(true, outputs, strict=True), *zip(true, alone, strict=True)]
    pairs += [(want, grads[key]) for key, want in true_grads.items()]
    for want, got in pairs:
        error = np.abs(want - host(got)).max() / np.abs(want).max()
        assert error < TOLERANCE, f"relative error {error:.1e}"


def test_gradients_of_the_gated_scan_are_equal_in_both_backends():
    inputs, doutputs = kernel_speed.draw(workload("rg_lru"), HAWK, seed=1)
    inputs["position_BT"] = inputs["position_BT"] + 1  # a document start would drop h0
    jax, torch = (
        load_engine(name)(HAWK).prepare_op("rg_lru", inputs, doutputs)()[1] for name in BACKENDS
    )
    for name, want in torch.items():
        error = np.abs(host(want) - host(jax[name])).max() / np.abs(host(want)).max()
        assert error < TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("op", "has_backward", "arrays"),
    [
        ("linear_scan", False, 3),  # a, x; h
        ("linear_scan", True, 3 + 5),  # a, h, dh; da, dx
        ("rg_lru", False, 4),
        ("rg_lru", True, 4 + 8),  # 8 and 16 bytes an element in bfloat16
    ],
)
def test_bytes_are_those_of_every_array_once(op, has_backward, arrays):
    config = tiny("hawk", d_rnn=96)
    shape = {"batch_size": 2, "seq_len": 100, "dtype": "bfloat16", "has_backward": has_backward}
    states = 2 * 96 * 4 * (4 if has_backward else 2)
    assert cost.scan_bytes(config, op, **shape) == 2 * 100 * 96 * 2 * arrays + states


def test_the_samples_are_exact(monkeypatch):
    engine = FakeEngine(monkeypatch)
    run = run_of("kernel_speed", phases=["train"], ops=["rg_lru"])
    samples = samples_of(run, engine)
    assert values_of(samples, "op_time_ms") == [250.0, 250.0]
    assert values_of(samples, "compile_time_s") == [10.0]
    assert engine.calls["op"] == 1 + 2 + 2  # first, warm-up, repeats
    (num_bytes,) = values_of(samples, "op_bytes")
    assert values_of(samples, "mbu") == [num_bytes / 0.25 / 1e12] * 2
    assert values_of(samples, "bound_ms", field="TPU v5e") == [num_bytes / 819e9 * 1e3]
    assert len(values_of(samples, "bound_ms")) == 4


def test_the_clock_holds_no_transfer(monkeypatch):
    """Inputs are placed once, before the first call."""
    engine, placed = FakeEngine(monkeypatch), []
    prepare = engine.prepare_op
    engine.prepare_op = lambda *args: placed.append(engine.calls["op"]) or prepare(*args)
    samples_of(run_of("kernel_speed"), engine)
    assert placed == [0]


def test_what_has_no_scan_is_unsupported(monkeypatch):
    run = run_of("kernel_speed")
    with pytest.raises(Unsupported, match="no recurrence"):
        samples_of(replace(run, model=tiny("mqa")), FakeEngine(monkeypatch))
    with pytest.raises(Unsupported, match="timed alone"):
        samples_of(replace(run, backend="transformers"), object())


def test_other_workloads_keep_their_run_ids():
    run = run_of("training_speed")
    assert "op" not in run.to_json()["workload"]
    timed = run_of("kernel_speed")
    assert Run.from_json(timed.to_json()) == timed
    assert plan.workload_text(timed.workload) == "linear_scan forward 2 x 8"
    assert plan.costs(timed)["predicted_peak_memory_bytes"] < 10_000


def records(num_rounds=6):
    """Sequential takes 8 ms a thousand tokens, analytic 2, associative 4; PyTorch twice as long."""
    made = []
    for variant, ms in (("sequential", 8.0), ("analytic", 2.0), ("associative", 4.0)):
        for backend, times in (("jax", 1), ("torch", 2)):
            for op, phase, seq_len in [
                (op, phase, seq_len)
                for op in TIMED_OPS
                for phase in ("evaluate", "train")
                for seq_len in (1024, 2048)
            ]:
                value = ms * times * seq_len / 1024
                samples = (
                    sample("op_bytes", 8 * 2.0**20),
                    *(sample("bound_ms", 0.25, field=f"TPU {name}") for name in ("v4", "v5e")),
                    sample("op_time_ms", value, repeat=0),
                    sample("mbu", 0.5, repeat=0),
                )
                for round in range(num_rounds):
                    one = record(
                        "kernel_speed",
                        "hawk",
                        backend,
                        samples=samples,
                        round=round,
                        block=f"{op} {phase} {seq_len}",
                        phase=phase,
                        op=op,
                        seq_len=seq_len,
                        batch_size=8,
                        provenance={
                            "resolved_kernels": {"linear_scan": variant, "attention": "plain"}
                        },
                    )
                    run = one.run | {"kernels": {"linear_scan": variant, "attention": "auto"}}
                    names = ("run_id", "cell_id", "attempt")
                    ids = {name: f"{getattr(one, name)} {variant}" for name in names}
                    made.append(replace(one, **ids, run=run))
    return made


@pytest.fixture(scope="module")
def frame():
    return frame_of(records())


def test_variants_are_paired_with_the_sequential_one(frame):
    found = comparisons.comparisons(frame, by="linear_scan", ours="analytic")
    found = found[found["metric"] == "op_time_ms"]
    assert len(found) == 2 * 2 * 2 * 2  # ops, phases, lengths, backends
    np.testing.assert_allclose(found["speedup"].astype(float), 4.0)
    assert set(found["verdict"]) == {"faster"}
    assert set(found["value_baseline"]) == {8.0, 16.0, 32.0}


def test_backends_are_paired_by_their_variant(frame):
    found = comparisons.comparisons(frame)
    found = found[found["metric"] == "op_time_ms"]
    assert len(found) == 3 * 2 * 2 * 2
    np.testing.assert_allclose(found["speedup"].astype(float), 2.0)


def test_the_report_shows_them_unverified_beside_bounds(frame, tmp_path):
    page = report.write_report(tmp_path, tmp_path / "out", title="t", command="c", frame=frame)
    text = (page.parent / "report.md").read_text()
    assert "analytic beside sequential" in text
    assert "associative beside sequential" in text
    assert "rg_lru, forward + backward, seq_len 2,048, batch 8" in text
    assert checks.UNVERIFIED in text
    assert "the recurrence alone (analytic) JAX is 2.00x as fast as PyTorch" in text
    assert tables.SCAN_CLAIM in text
    assert "Bounds, not measurements" in text
    assert (page.parent / "figures" / "kernel_speed.png").exists()


def test_bounds_are_a_row_for_each_shape(frame):
    table = tables.bounds(frame)
    assert table.header[-2:] == ["bound, TPU v4 (ms)", "bound, TPU v5e (ms)"]
    assert len(table.rows) == 2 * 2 * 2
    assert table.rows[0][-3:] == ["8", "0.25", "0.25"]


def test_the_figure_has_a_panel_for_each_pass_and_a_line_for_each_variant(frame):
    figure = figures.kernel_speed(frame)
    assert [axes.get_title() for axes in figure.axes] == [
        "linear_scan, forward",
        "linear_scan, forward + backward",
        "rg_lru, forward",
        "rg_lru, forward + backward",
    ]
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert len(labels) == 3 * 2
    assert all(label.endswith(checks.UNVERIFIED) for label in labels)
    assert figures.kernel_speed(frame[frame["suite"] == "parity"]) is None


def test_a_device_kind_of_a_tpu_is_bounded_by_its_own_bandwidth():
    assert {s.field: s.value for s in measure.bounds(819_000_000)}["TPU v5e"] == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_variant_for_another_device_is_unsupported(backend):
    with pytest.raises(Unsupported, match="pallas_tpu"):
        load_engine(backend)(HAWK, kernels=Kernels(linear_scan="pallas_tpu"))


def test_interpreted_kernels_are_not_timed():
    overrides = ["suite=kernel_speed", "family=hawk", "kernels.interpret=true"]
    (settings,) = compose.read(overrides).settings
    with pytest.raises(ValueError, match="times what it runs"):
        list(plan.expand(settings))


def test_the_experiment_has_the_shapes_of_the_figure():
    settings = compose.read(["experiment=scan_speed"]).settings
    runs = [run for made in settings for run in plan.expand(made)]
    assert {run.model.d_rnn for run in runs} == {1024}
    assert {run.workload.batch_size for run in runs} == {8}
    assert {run.workload.seq_len for run in runs} == {2**n for n in range(10, 15)}
    assert {run.kernels.linear_scan for run in runs} == {"sequential", "associative", "analytic"}


def cell(backend, asked, ms=1.0, *, ran=None, outcome="completed", seq_len=1024, **rest):
    """One run of one cell; a run that did not complete never came to its engine."""
    is_done = outcome == "completed"
    ran = {"linear_scan": ran or asked, "attention": "plain"} if is_done else None
    samples = (sample("op_bytes", 2.0**20 * ms), sample("op_time_ms", ms, repeat=0))
    one = record(
        "kernel_speed",
        "hawk",
        backend,
        op="rg_lru",
        seq_len=seq_len,
        outcome=outcome,
        samples=samples if is_done else (),
        provenance={"resolved_kernels": ran},
        **rest,
    )
    kernels = {"linear_scan": asked, "attention": "auto"}
    ids = {n: f"{getattr(one, n)} {kernels}" for n in ("run_id", "cell_id", "attempt")}
    return replace(one, **ids, run=one.run | {"kernels": kernels})


def sides(frame, *args, **kwargs):
    found = comparisons.comparisons(frame, *args, **kwargs)
    names = ["linear_scan_ours", "outcome_ours", "linear_scan_baseline", "outcome_baseline"]
    return [
        tuple(None if pd.isna(row[name]) else row[name] for name in names)
        for row in found[found["metric"] == "op_time_ms"].to_dict("records")
    ]


@pytest.mark.parametrize("end", ["completed", "out_of_memory"])
def test_a_scan_that_never_ran_keeps_its_row(end):
    frame = frame_of([cell("torch", "sequential", outcome=end),
                      cell("torch", "associative", outcome="out_of_memory")])  # fmt: skip
    assert sides(frame, "linear_scan", "associative") == [
        ("associative", "out_of_memory", "sequential", end)
    ]
    names = [table.name for table in report.comparison_tables(frame, report.pairs(frame))]
    assert "linear_scan_associative_sequential" in names


def test_kernels_of_our_own_are_paired_across_backends():
    unsupported = {"outcome": "unsupported"}
    frame = frame_of(
        [
            *(cell(backend, "sequential") for backend in BACKENDS),
            cell("jax", "pallas_gpu", 2.0),
            cell("torch", "triton", 3.0),
            cell("jax", "triton", **unsupported),
            cell("torch", "pallas_gpu", **unsupported),
            cell("jax", "associative"),
        ]
    )
    assert set(sides(frame)) == {
        ("sequential", "completed", "sequential", "completed"),
        ("pallas_gpu", "completed", "triton", "completed"),
        ("triton", "unsupported", "triton", "completed"),
        (None, None, "pallas_gpu", "unsupported"),
        ("associative", "completed", None, None),
    }
    found = comparisons.comparisons(frame)
    found = found[found["linear_scan_ours"].eq("pallas_gpu") & found["speedup"].notna()]
    (row,) = found.to_dict("records")
    assert row["speedup"] == pytest.approx(1.5)
    assert row["variant"] == "linear_scan=pallas_gpu beside linear_scan=triton"


def test_auto_is_a_backends_own():
    frame = frame_of([cell("jax", "auto", ran="pallas_gpu"), cell("torch", "triton"),
                      cell("torch", "sequential")])  # fmt: skip
    assert sides(frame) == [
        ("pallas_gpu", "completed", "triton", "completed"),
        (None, None, "sequential", "completed"),
    ]


def test_models_of_one_size_have_bounds_of_their_own():
    models = [{"d_rnn": 64}, {"d_rnn": 128}]
    frame = frame_of([cell("jax", "auto", n + 1, ran="analytic", model=model)
                      for n, model in enumerate(models)])  # fmt: skip
    table = tables.bounds(frame)
    place = table.header.index("variant")
    assert {(row[place], row[-1]) for row in table.rows} == {("d_rnn=64", "1"), ("d_rnn=128", "2")}
    assert "variant" not in tables.bounds(frame[frame["model"] == frame["model"][0]]).header


def test_a_line_of_the_figure_has_one_cell_a_length():
    small, large = {"d_rnn": 64}, {"d_rnn": 128}
    frame = frame_of(
        [
            one
            for n in (1024, 2048)
            for one in (
                cell("jax", "auto", 1, ran="analytic", seq_len=n, model=small),
                cell("jax", "analytic", 2, seq_len=n, model=small),
                cell("jax", "analytic", 4, seq_len=n, model=large),
            )
        ]
    )
    figure = figures.kernel_speed(frame)
    (line,) = (line for line in figure.axes[0].get_lines() if "analytic" in str(line.get_label()))
    assert list(line.get_xdata()) == [1024, 2048]
    assert list(line.get_ydata()) == [2, 2]
    assert "size tiny (d_rnn=64)" in figure.get_supxlabel()
    assert "4 further times" in figure.get_supxlabel()


def test_the_answer_mixes_no_variants():
    made = [cell("jax", "sequential", 1), cell("torch", "sequential", 9),
            cell("jax", "pallas_gpu", 1), cell("torch", "triton", 2)]  # fmt: skip
    frame = frame_of(made)
    (frameworks,) = report.answer(frame, report.comparison_tables(frame, report.pairs(frame)))
    for name, ratio in (("sequential", "9.00x"), ("pallas_gpu beside triton", "2.00x")):
        words = f"the recurrence alone ({name}) JAX is {ratio} as fast as PyTorch over 1 matched"
        assert words in frameworks


def test_a_missing_ratio_is_within_no_limit():
    assert cpu_scan.worst_ratio(pd.DataFrame({"speedup": [2.0, 0.5]})) == 2.0
    assert not cpu_scan.worst_ratio(pd.DataFrame({"speedup": [2.0, None]})) <= cpu_scan.LIMIT


def test_compare_says_what_it_compares_by():
    options = {option.name: option.help for option in get_command(app).commands["compare"].params}
    assert all(name in options["by"] for name in settings.BASELINE)
    assert all(name in options["baseline"] for name in settings.BASELINE.values())
