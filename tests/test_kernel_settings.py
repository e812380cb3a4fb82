"""Kernels that a machine cannot run are refused in one line, and none is interpreted unasked."""

import os
from dataclasses import replace

import pytest
from conftest import BACKENDS, tiny

from implementations.engine import TPUS, Kernels, Unsupported, auto, load_engine
from implementations.ops import OPS
from suites import compose
from suites.harness import plan
from suites.harness.executors import environment
from suites.harness.run import Run
from suites.ladder import ops as op_checks
from suites.ladder import plan as ladder

SCAN = {"linear_scan": "triton", "interpret": True}
PALLAS = {"linear_scan": "pallas_tpu", "interpret": True}


def runs_of(*overrides: str) -> list[Run]:
    request = compose.read(["suite=parity", "size=tiny", *overrides])
    return [run for settings in request.settings for run in plan.expand(settings)]


@pytest.fixture
def jax_engine(monkeypatch):
    """The module of the engine, as if scans and attention had every variant of Pallas."""
    from implementations.jax_backend import engine

    for module in (engine.attention, engine.linear_scan):
        for name in ("pallas_tpu", "pallas_gpu"):
            monkeypatch.setitem(module.VARIANTS, name, None)
    return engine


@pytest.fixture
def torch_engine(monkeypatch):
    """The module of the engine, as if every kernel had a variant of Triton."""
    from implementations.torch_backend import engine

    for module in (engine.attention, engine.linear_scan, engine.rms_norm):
        monkeypatch.setitem(module.VARIANTS, "triton", None)
    monkeypatch.setitem(engine.linear_scan.VARIANTS, "triton_split", None)
    set_interpreting(monkeypatch, engine, True)
    return engine


def set_interpreting(monkeypatch, engine, is_interpreting: bool) -> None:
    monkeypatch.setattr(engine.interpreter, "is_interpreting", lambda: is_interpreting)


# What auto stands for


def test_auto_is_triton_on_a_gpu_of_pytorch_alone(torch_engine, monkeypatch):
    assert auto("torch", "cpu")["layers"] == auto("jax", "cpu")["layers"] == "plain"
    set_interpreting(monkeypatch, torch_engine, False)
    found = torch_engine.resolve(Kernels(), "h200", "bfloat16")
    assert found == dict.fromkeys(("linear_scan", "attention", "layers"), "triton")
    mixed = torch_engine.resolve(Kernels(layers="plain"), "h200", "float32")
    assert mixed == found | {"layers": "plain"}


def test_auto_follows_the_platform():
    found = {kind: auto("jax", kind) for kind in ("cpu", "h200", *TPUS, "tpu")}
    scans = {kind: variants["linear_scan"] for kind, variants in found.items()}
    assert scans == {"cpu": "analytic", "h200": "pallas_gpu"} | dict.fromkeys(
        (*TPUS, "tpu"), "pallas_tpu"
    )
    assert found["v6e"]["attention"] == "pallas_tpu"
    assert found["h200"]["attention"] == "fused"
    assert {variants["layers"] for variants in found.values()} == {"plain"}


def test_in_float64_auto_never_stands_for_triton(torch_engine):
    assert torch_engine.resolve(Kernels(), "h200", "float64") == auto("torch", "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_setting_is_recorded(backend):
    found = load_engine(backend)(tiny("hawk")).resolved_kernels
    assert found["layers"] == "plain"


# What is refused


@pytest.mark.parametrize(
    ("kernels", "device_kind", "dtype", "message"),
    [
        ({"linear_scan": "triton"}, "cpu", "float32", "linear_scan=triton needs a GPU"),
        ({"linear_scan": "triton_split"}, "cpu", "float32", "linear_scan=triton_split needs a GPU"),
        ({"attention": "triton"}, "cpu", "bfloat16", "attention=triton needs a GPU"),
        ({"layers": "triton"}, "cpu", "bfloat16", "layers=triton needs a GPU"),
        ({"interpret": True}, "cpu", "float32", "none of the kernels is one of Triton"),
        (SCAN, "cpu", "float64", "linear_scan=triton computes in float32"),
        ({"attention": "triton"}, "h200", "float64", "attention=triton computes in float32"),
        (SCAN | {"compile": True}, "cpu", "float32", "cannot be compiled"),
    ],
)
def test_kernels_that_cannot_run_are_refused(torch_engine, kernels, device_kind, dtype, message):
    with pytest.raises(Unsupported, match=message) as refusal:
        torch_engine.resolve(Kernels(**kernels), device_kind, dtype)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kernels", "device_kind", "dtype", "message"),
    [
        ({"linear_scan": "pallas_tpu"}, "cpu", "float32", "linear_scan=pallas_tpu needs a TPU"),
        ({"linear_scan": "pallas_tpu"}, "h200", "float32", "linear_scan=pallas_tpu needs a TPU"),
        ({"attention": "pallas_gpu"}, "v5e", "bfloat16", "attention=pallas_gpu needs a GPU"),
        (PALLAS | {"linear_scan": "pallas_gpu"}, "v5e", "float32", "needs a GPU"),
        (PALLAS, "cpu", "float64", "linear_scan=pallas_tpu computes in float32"),
        ({"interpret": True}, "cpu", "float32", "none of the kernels is one of Pallas"),
        ({"attention": "fused"}, "cpu", "float64", "softmax is float32"),
    ],
)
def test_pallas_that_cannot_run_is_refused(jax_engine, kernels, device_kind, dtype, message):
    with pytest.raises(Unsupported, match=message) as refusal:
        jax_engine.resolve(Kernels(**kernels), device_kind, dtype)
    assert "\n" not in str(refusal.value)


def test_pallas_is_interpreted_on_a_cpu_or_runs_where_it_belongs(jax_engine):
    for kernels, kind in (
        (Kernels(**PALLAS), "cpu"), (Kernels(), "v5e"), (Kernels(attention="pallas_gpu"), "h200")
    ):  # fmt: skip
        assert jax_engine.resolve(kernels, kind, "bfloat16") == auto("jax", kind) | kernels.chosen
    assert jax_engine.resolve(Kernels(), "v5e", "float64") == auto("jax", "cpu")


def test_the_interpreter_is_asked_for_in_both_places(torch_engine, monkeypatch):
    assert torch_engine.resolve(Kernels(**SCAN), "cpu", "float32")["linear_scan"] == "triton"
    with pytest.raises(Unsupported, match="unset TRITON_INTERPRET"):
        torch_engine.resolve(Kernels(), "h200", "float32")
    set_interpreting(monkeypatch, torch_engine, False)
    with pytest.raises(Unsupported, match="needs TRITON_INTERPRET=1"):
        torch_engine.resolve(Kernels(**SCAN), "cpu", "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_must_be_something_to_interpret(backend):
    with pytest.raises(Unsupported, match="none of the kernels"):
        load_engine(backend)(tiny("hawk"), kernels=Kernels(interpret=True))


def test_the_layers_of_jax_are_plain():
    with pytest.raises(Unsupported, match="layers=triton is not offered by the jax backend"):
        load_engine("jax")(tiny("hawk"), kernels=Kernels(layers="triton"))


def test_names_are_checked():
    with pytest.raises(ValueError, match="Did you mean 'triton'"):
        Kernels(layers="tritn")


TIMING = ["training_speed", "prefill_latency", "decode_latency", "decode_throughput"]


@pytest.mark.parametrize("suite", TIMING)
def test_no_interpreter_is_timed(suite):
    with pytest.raises(ValueError, match=f"suite={suite} times what it runs"):
        runs_of(f"suite={suite}", "kernels.interpret=true", "kernels.linear_scan=triton")
    assert runs_of("suite=parity,language_modeling", "kernels.interpret=true")


def test_the_request_to_time_an_interpreter_ends_before_anything_starts(capsys, tmp_path):
    from suites import commands

    asked = ["suite=decode_latency", "kernels.interpret=true", "backend=torch"]
    with pytest.raises(SystemExit) as ended:
        commands.run(asked, tmp_path / "store")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "kernels.interpret=true is for correctness only" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "store").exists()


# Runs


def test_a_child_is_interpreted_when_its_run_says_so(monkeypatch):
    (run,) = runs_of("kernels.linear_scan=triton", "kernels.interpret=true", "backend=torch")
    assert environment([0], run)["TRITON_INTERPRET"] == "1"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    other = replace(run, kernels=Kernels())
    assert "TRITON_INTERPRET" not in environment([0], other)
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_runs_keep_their_ids_where_the_layers_are_automatic():
    (run,) = runs_of()
    assert "layers" not in run.to_json()["kernels"]
    assert Run.from_json(run.to_json()) == run
    plain = replace(run, kernels=Kernels(layers="plain"))
    assert plain.to_json()["kernels"]["layers"] == "plain"
    assert Run.from_json(plain.to_json()) == plain
    assert plain.run_id != run.run_id


def test_the_plan_shows_the_variants(tmp_path):
    (planned,) = plan.plan(tmp_path, runs_of("kernels.layers=plain"))
    shown = planned.to_json()
    assert (shown["linear_scan"], shown["attention"], shown["layers"]) == ("auto", "auto", "plain")


OFFERED = {
    "torch": {"linear_scan": ("sequential", "analytic", "triton", "triton_split"),
              "attention": ("plain", "fused", "triton"), "rms_norm": ("plain", "triton")},
    "jax": {"linear_scan": ("sequential", "analytic", "pallas_tpu", "pallas_gpu"),
            "attention": ("plain", "fused", "pallas_tpu"), "rms_norm": ("plain",)},
}  # fmt: skip


@pytest.mark.parametrize("family", ["mqa", "hawk", "griffin"])
@pytest.mark.parametrize("device_kind", ["cpu", "h200"])
def test_the_gate_interprets_the_kernels_of_a_family_together(monkeypatch, family, device_kind):
    monkeypatch.setattr(ladder, "offered", lambda backend, file: OFFERED[backend][file])
    runs = runs_of(f"family={family}", f"device_kind={device_kind}", "backend=torch")
    found = [run.kernels for run in ladder._other_kernels(runs * 2)]
    has = {"linear_scan": family != "mqa", "attention": family != "hawk", "layers": True}
    called = [setting for setting in has if has[setting]]
    assert all(kernels.chosen.keys() <= set(called) for kernels in found)
    interpreted = [kernels.chosen for kernels in found if kernels.interpret]
    alone = [kernels.chosen for kernels in found if not kernels.interpret]
    assert all(len(chosen) == 1 for chosen in alone)
    split = {"linear_scan": "triton_split"}
    if device_kind == "cpu":
        together = dict.fromkeys(called, "triton")
        assert interpreted == [together] + ([split] if has["linear_scan"] else [])
        assert all("triton" not in name for chosen in alone for name in chosen.values())
    else:  # auto is triton
        assert not interpreted
        assert (split in alone) == has["linear_scan"]
        assert {"layers": "plain"} in alone


def test_each_language_of_pallas_is_interpreted_by_itself(monkeypatch):
    monkeypatch.setattr(ladder, "offered", lambda backend, file: OFFERED[backend][file])
    (run,) = runs_of("family=griffin", "backend=jax")
    found = [run.kernels.chosen for run in ladder._other_kernels([run]) if run.kernels.interpret]
    assert found == [dict.fromkeys(("linear_scan", "attention"), "pallas_tpu"),
                     {"linear_scan": "pallas_gpu"}]  # fmt: skip


def test_what_auto_stands_for_elsewhere_is_interpreted_in_bfloat16_too(monkeypatch):
    monkeypatch.setattr(ladder, "offered", lambda backend, file: OFFERED[backend][file])
    runs = [run for run in ladder.gate(["family=hawk"]) if run.kernels.interpret]
    found = {(run.dtype, run.kernels.linear_scan) for run in runs}
    shipped = ("triton", "pallas_tpu", "pallas_gpu")
    assert found == {("float32", "triton_split")} | {
        (dtype, name) for dtype in ("float32", "bfloat16") for name in shipped
    }


def test_an_op_is_checked_again_with_the_kernels_that_it_calls():
    assert op_checks.KERNELS.keys() == OPS.keys()
    called = {setting for settings in op_checks.KERNELS.values() for setting in settings}
    assert called == set(auto("torch", "cpu"))


def test_a_child_has_a_thread_for_each_core_but_for_tiny_tensors_one():
    (parity,), (timed,) = (
        runs_of("family=hawk", "backend=torch", f"suite={suite}", "suite.rounds=1", *settings)
        for suite, settings in (
            ("parity", ("dtype=float32",)),
            ("training_speed", ("suite.seq_lens=[16]", "suite.tokens_per_step=16")),
        )
    )
    assert environment([0, 1], timed)["OMP_NUM_THREADS"] == "2"
    assert environment([0, 1], parity)["OMP_NUM_THREADS"] == "1"
    assert environment([0, 1], parity)["AERIE_CORES"] == "0,1"
