"""The parity ladder: green where nothing is wrong, red at the fault where something is."""

from collections import Counter
from dataclasses import replace
from importlib import import_module
from itertools import product

import numpy as np
import pytest
from conftest import BACKENDS, FAMILIES, tiny
from test_suites import MODEL, run_of, suite_of, taken

from implementations import ops, parameters
from implementations.config import GATES
from implementations.engine import IGNORED, LANGUAGES, Batch, OptimizerConfig, auto, load_engine
from suites import parity
from suites.harness.executors import TENSORS_VARIABLE
from suites.ladder import calibrate, check, plan, seeds, tables, training
from suites.ladder import ops as ladder_ops
from suites.ladder.check import OTHER_GATES, Check, Error, error_of, kind_of, limit_of
from suites.ladder.model import chunk_plans, packed_batches


def engine_of(run):
    return load_engine(run.backend)(run.model, dtype=run.dtype, kernels=run.kernels, seed=run.seed)


def rows_of(run, samples):
    """As tables shows them, of samples that a record would hold."""
    return tables.rows_of(run, {"samples": [vars(sample) for sample in samples]})


@pytest.fixture(scope="module")
def climbs():
    """Every check of both backends in float64, which is exact enough to tell any fault."""
    runs = {backend: run_of("parity", backend, "float64") for backend in BACKENDS}
    return {
        backend: (run, list(parity.climb(run, engine_of(run)))) for backend, run in runs.items()
    }


def test_both_backends_are_within_every_tolerance(climbs):
    for run, checks in climbs.values():
        for one in checks:
            limit = limit_of(one.field, run)
            assert not one.error.exceeds(limit), parity.words(one, one.error, limit)


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
@pytest.mark.parametrize("settings", [{"gate": "mamba"}, {"gate": "cg_lru", "conv_width": 0}])
def test_the_ops_of_another_gate_are_within_every_tolerance(settings, backend):
    run = run_of("parity", backend, "float64")
    run = replace(run, model=replace(MODEL, **settings))
    fields = []
    for one in ladder_ops.checks(run, engine_of(run)):
        fields.append(one.field)
        limit = limit_of(one.field, run)
        assert not one.error.exceeds(limit), parity.words(one, one.error, limit)
    assert "L1/rg_lru/h_BTR" in fields
    assert any("causal_conv" in field for field in fields) == bool(run.model.conv_width)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "gate", "dtype"),
    [
        *(("torch", gate, "float32") for gate in GATES if gate != "rg_lru"),
        *product(BACKENDS, ["cg_lru"], ["float64", "bfloat16"]),
        ("jax", "cg_lru", "float32"),
        ("jax", "mamba", "float32"),
    ],
)
def test_a_model_of_every_gate_is_within_every_tolerance(backend, gate, dtype):
    """As the command climbs, at the size that tolerances were measured at."""
    asked = {"family": "griffin", "settings": "paper", "backend": backend, "dtype": dtype}
    runs = plan.gate([f"{key}={value}" for key, value in (asked | {"gate": gate}).items()])
    (run,) = [run for run in runs if not run.kernels.chosen]
    for one in parity.climb(run, engine_of(run)):
        limit = limit_of(one.field, run)
        assert not one.error.exceeds(limit), parity.words(one, one.error, limit)


def test_the_ladder_holds_every_op_every_layer_and_every_parameter(climbs):
    num_params = len(parameters.param_specs(MODEL))
    for _, checks in climbs.values():
        fields = [one.field for one in checks]
        assert len(set(fields)) == len(fields)
        called = {field.split("/")[1].partition(" ")[0] for field in fields if field[:2] == "L1"}
        assert called == set(ops.OPS)
        counts = Counter("/".join(field.split("/")[:2]) for field in fields)
        for kind in ("L0/drawn", "L0/loaded", "L0/saved"):
            assert counts[kind] == num_params + 1
        assert counts["L4/grad"] == counts["L5/steps"] == num_params
        assert counts["L4/activations"] > 10 * MODEL.num_layers
        assert [f for f in fields if f[:2] == "L4" and "chunks" in f] == ["L4/prefill in chunks"]
        # from the lowest rung up, and both backends in one order: the first red one tells most
        assert fields == [one.field for one in climbs["torch"][1]]


def test_torch_is_within_the_tolerances_of_float32_and_bfloat16():
    for dtype in ("float32", "bfloat16"):
        run = run_of("parity", "torch", dtype)
        list(parity.measure(run, engine_of(run)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_op_is_offered_by_both_backends(backend):
    assert list(import_module(f"implementations.{backend}_backend.ops").OPS) == list(ops.OPS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [file for _, file in plan.CALLED.values()])
def test_variants_are_read_without_the_framework(backend, op):
    module = import_module(f"implementations.{backend}_backend.kernels.{op}")
    assert plan.offered(backend, op) == tuple(module.VARIANTS)


# What is red, and where.


def slower(a_param_R, gate, exponent):
    return -7.5 * (1 + a_param_R.exp()).log()


FAULTS = {  # a value of the torch backend, what stands in its place; the first red check, the layer
    "implementations.torch_backend.kernels.rg_lru.decay_of": (
        slower, "L1/rg_lru/h_BTR", "L4/activations/layers.0.mixer.rg_lru"
    ),
    "implementations.torch_backend.kernels.gate.MAX_SQRT_GRADIENT": (
        1e9, "L3/bounded_sqrt/dx", None
    ),
    "implementations.torch_backend.mixers.mqa.attend_with_state": (
        None, "L1/chunks.mqa/y_BTD", None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_red_at_its_own_op_and_layer(monkeypatch, name):
    fault, first, layer = FAULTS[name]
    if fault is None:  # a cache whose newest key is not seen
        module = import_module(name.rpartition(".")[0])
        right = module.attend_with_state

        def fault(q, k, v, *rest):
            return right(q, k * 0.999, v, *rest)

    monkeypatch.setattr(name, fault)
    run = run_of("parity", "torch", "float64")
    samples, error = taken(run, engine_of(run))
    assert str(error).startswith(f"{first}: ")
    shown = "\n".join(tables.divergence(rows_of(run, samples)))
    assert f"first divergence at {first}; " in shown
    if layer:
        assert f"RED  {layer} " in shown
        assert "ok   L4/activations/layers.0.mixer.conv_1d" in shown
        assert "layers.1" not in shown


def test_what_is_missing_or_not_finite_is_red():
    true = np.ones(3)
    limit = Error(1e9, 1e9)
    for ours in (None, np.array([1.0, np.nan, 1.0]), np.ones(4), np.array([1.0, np.inf, 1.0])):
        assert Check("L4/logits", ours, true).error.exceeds(limit)
    assert not Check("L4/logits", true, true).error.exceeds(Error(0.0, 0.0))
    assert error_of(true + 1e-3, true).exceeds(Error(0.0, 0.0))


def test_errors_are_relative_to_the_largest_and_to_the_root_mean_square():
    true = np.array([3.0, 4.0, 0.0, 0.0])
    error = error_of(true + np.array([0.0, 0.0, 0.0, 0.4]), true)
    assert error.largest == pytest.approx(0.1)
    assert error.rms == pytest.approx(0.2 / 2.5)
    assert error.share(Error(1.0, 0.04)) == pytest.approx(2.0)


def test_a_field_without_a_measured_tolerance_says_what_to_do():
    with pytest.raises(ValueError, match="--calibrate"):
        limit_of("L4/nothing like it", run_of("parity", "jax", "float32"))
    assert kind_of("L4/grad/layers.11.mixer.rg_lru.a_param") == "grad/layers.*.mixer.rg_lru.a_param"


# Tolerances.


def test_every_tolerance_is_the_multiple_of_what_was_measured():
    """A looser one needs another file: the margins of the code are those it was written with."""
    found = check.tolerances()
    assert found["draws"] >= 20
    assert {"date", "machine", "versions", "command"} <= found.keys()
    assert found["margin"] == calibrate.MARGIN
    assert found["training"]["growth"] == calibrate.GROWTH
    num_checked = 0
    for section in ("ours", *LANGUAGES, "peer", OTHER_GATES):
        for dtype, fields in found[section].items():
            for kind, entry in fields.items():
                most = calibrate.tolerance(kind, entry["measured"], entry["measured_rms"], dtype)
                assert (entry["largest"], entry["rms"]) == most, (section, dtype, kind)
                if section in ("ours", "peer"):
                    assert entry["n"] >= found["draws"]
                num_checked += 1
    assert num_checked > 800


def test_the_promises_of_the_ladder_are_kept_by_what_was_measured():
    found = check.tolerances()["ours"]
    assert max(e["largest"] for k, e in found["float64"].items() if _is_op(k)) <= 1e-12
    assert found["float32"]["logits"]["largest"] <= 1e-5


def _is_op(kind: str) -> bool:
    """The value of an op, not a gradient."""
    op, _, tensor = kind.partition("/")
    return op.partition(" ")[0] in ops.OPS and not tensor.startswith("d")


# What is run.


def test_the_gate_has_every_variant_setting_and_dtype():
    runs = plan.gate([])
    assert len({run.run_id for run in runs}) == len(runs)
    for backend in BACKENDS:
        mine = [run for run in runs if run.backend == backend]
        for family in FAMILIES:
            part = [run for run in mine if run.model.family == family]
            assert {run.dtype for run in part} == {"float64", "float32", "bfloat16"}
            assert {tables.settings_of(run.model) for run in part} == {"paper", "released"}
        griffin, mqa = (
            [run.kernels for run in mine if run.model.family == family]
            for family in ("griffin", "mqa")
        )
        for setting, (_, file) in plan.CALLED.items():
            others = set(plan.offered(backend, file)) - {auto(backend, "cpu")[setting]}
            assert {getattr(kernels, setting) for kernels in griffin} == {"auto"} | others
        assert {"sequential", "associative"} < {kernels.linear_scan for kernels in griffin}
        assert {kernels.linear_scan for kernels in mqa} == {"auto"}
        assert len({kernels.attention for kernels in mqa}) >= 2
    assert all(not run.workload.levels for run in runs)


def test_the_gate_is_what_was_typed():
    typed = ["family=hawk", "settings=paper", "backend=torch", "dtype=float32"]
    (run,) = plan.gate([*typed, "kernels.linear_scan=associative"])
    assert (run.model.family, run.kernels.linear_scan) == ("hawk", "associative")
    assert {run.dtype for run in plan.gate(["family=hawk"], ["L7"])} == {"bfloat16"}
    assert {run.seed for run in plan.long(["family=hawk"], "L6")} == set(range(5))


def test_chunks_are_cut_around_windows_and_where_nothing_is_compiled_everywhere():
    work = next(suite_of("parity").workloads())
    run = replace(run_of("parity"), model=tiny("griffin"), workload=work)
    W, T = 32, 112
    compiled = list(chunk_plans(run, is_eager=False))
    assert {1, W - 1, W, W + 1, 2 * W + 1, T - 1} <= {stop for stops in compiled for stop in stops}
    lengths = {int(length) for stops in compiled for length in np.diff([0, *stops, T])}
    assert lengths == {1, W - 1, W, W + 1}  # each is a program
    eager = list(chunk_plans(run, is_eager=True))
    assert {(stop,) for stop in range(1, T)} <= set(eager)


def test_packed_batches_restart_in_both_ways():
    """A document longer than three windows, one of a single token, others starting later."""
    suite = suite_of("parity")
    work = next(suite.workloads())
    run = replace(run_of("parity"), model=tiny("griffin"), workload=work)
    batches = packed_batches(run)
    first, second = next(batches), next(batches)
    assert not np.array_equal(first.tokens_BT, second.tokens_BT)
    assert first.position_BT.max() + 1 > 3 * 32
    starts = [np.flatnonzero(row == 0).tolist() for row in first.position_BT]
    assert starts == [[0, 110], [0, 1, 14, 17]]
    assert (first.targets_BT[1, [0, 13, 16]] == IGNORED).all()
    assert np.count_nonzero(first.targets_BT == IGNORED) == 4
    assert isinstance(first, Batch)


def test_some_levels_alone(climbs):
    run, checks = climbs["torch"]
    run = replace(run, workload=replace(run.workload, levels=("L1",)))
    found = [one.field for one in parity.climb(run, engine_of(run))]
    assert found == [one.field for one in checks if one.field.startswith("L1/")]


# Two sides.


def test_tensors_of_two_backends_are_compared(climbs, monkeypatch, tmp_path):
    shown = []
    for run, checks in climbs.values():
        path = tmp_path / "runs" / run.run_id / "a.npz"
        path.parent.mkdir(parents=True)
        monkeypatch.setenv(TENSORS_VARIABLE, str(path))
        monkeypatch.setattr(parity, "climb", lambda run, engine, checks=checks: iter(checks))
        list(parity.measure(run, None))
        shown.append((run, {"attempt": "a"}))
    rows = list(tables.beside(tmp_path, shown, "jax", None))
    assert {row["backend"] for row in rows} == {"torch"}
    assert {row["field"] for row in rows} > {"L4/logits", "L5/train_loss", "L4/prefill in chunks"}
    assert all(row["is_within"] for row in rows)

    broken = parity.load(path)  # the last one's, PyTorch's
    parity.save(path, broken | {"L4/logits": broken["L4/logits"] * (1 + 1e-9)})
    (red,) = [row for row in tables.beside(tmp_path, shown, "jax", None) if not row["is_within"]]
    assert red["field"] == "L4/logits"


def peer_row(backend, field, rms):
    same = {"level": "L7", "family": "griffin", "settings": "released", "seed": 0}
    return same | {"backend": backend, "field": f"L7/one document/{field}", "rms": rms}


@pytest.mark.parametrize(("ours", "is_within"), [(0.019, True), (0.021, False), (None, False)])
def test_bfloat16_may_be_twice_as_wrong_as_an_implementation_of_others(ours, is_within):
    rows = [
        peer_row("transformers", "grad/a", 0.01),
        peer_row("transformers", "grad/b", 0.01),
        peer_row("torch", "grad/a", ours),
        peer_row("torch", "grad/b", 0.001),
        peer_row("jax", "grad/c", 9.0),  # which the peer has not
    ]
    (row,) = tables.beside_peer(rows)
    assert (row["backend"], row["what"], row["tensor"]) == ("torch", "grad", "a")
    assert row["is_within"] == is_within
    assert tables.peer_table([row])[0][-2] == ("green" if is_within else "RED")


# L5 and L6.


def small_training(backend="torch", **settings):
    run = run_of("parity", backend, levels=["L5"], num_text_steps=12, text_batch_size=2,
                 text_seq_len=24, **settings)  # fmt: skip
    optimizer = suite_of("parity", num_text_steps=12).optimizer(OptimizerConfig(), run.workload)
    return replace(run, optimizer=optimizer)


def test_a_training_stays_near_its_disturbed_twin():
    run = small_training()
    samples = list(parity.measure(run, engine_of(run)))
    losses = [s for s in samples if s.metric == "train_loss"]
    assert [s.at for s in losses if s.field is None] == list(range(1, 13))
    curves = {
        name: np.array([s.value for s in losses if s.field == name])
        for name in (None, "float64", "float64, rounded")
    }
    assert not np.array_equal(curves["float64"], curves["float64, rounded"])
    np.testing.assert_allclose(curves[None], curves["float64"], rtol=1e-5)
    fields = {s.field for s in samples if s.metric == "tolerance" and s.at == 10}
    assert len(fields) == 1 + len(parameters.param_specs(MODEL))


def test_a_training_that_leaves_its_twin_is_red(monkeypatch):
    monkeypatch.setattr(
        "implementations.torch_backend.engine.learning_rate", lambda optimizer, step: 2.9e-3
    )
    run = small_training()
    _, error = taken(run, engine_of(run))
    assert "L5/steps/" in str(error)
    assert "after step 1" in str(error)


def losses_of(backend, losses):
    work = replace(run_of("parity").workload, levels=("L6",))
    for seed, loss in enumerate(losses):
        run = replace(run_of("parity", backend), workload=work, seed=seed)
        yield run, {"samples": [{"metric": "loss", "value": loss}]}


LOSSES = np.array([2.0, 2.1, 1.9, 2.05, 1.95])


@pytest.mark.parametrize(
    ("difference", "num_seeds", "is_equivalent"),
    [(1e-3, 5, True), (0.06, 5, False), (1e-3, 4, False)],
)
def test_final_losses_are_equivalent_within_the_seeds_noise(difference, num_seeds, is_equivalent):
    noise = np.array([1, -1, 0.5, -0.5, 0.0]) * 1e-3
    other = LOSSES + difference + noise
    shown = [*losses_of("jax", LOSSES[:num_seeds]), *losses_of("torch", other[:num_seeds])]
    (row,) = seeds.equivalence(shown)
    assert row["is_equivalent"] == is_equivalent
    assert row["margin"] == pytest.approx(row["seed_noise"] / 2)
    assert row["low"] < -difference < row["high"]


def test_the_twin_is_the_truth_without_noise(monkeypatch):
    """What disturbs it is what tolerances.yaml measured, and the rounding of the parameters."""
    run = small_training()
    batches = [next(packed_batches(run_of("parity")))] * 2
    start = parameters.draw(run.model, 0)
    true, twin = (
        list(training._true(run, batches, start, is_disturbed=flag)) for flag in (False, True)
    )
    assert twin[0][0] == true[0][0]
    for name, value in twin[1][1].items():
        np.testing.assert_array_equal(value, np.float32(value), err_msg=name)
        moved = np.abs(value - true[1][1][name]).max()
        assert 0 < moved < 1e-4, name
