"""The gates in Pallas' fused kernels: interpreted, against float64; compiled for TPU by libtpu; and
lowered for GPU, where benchmarks/compile_pallas.py compiles them.
"""

from functools import partial

import jax
import pytest
from jax.sharding import SingleDeviceSharding
from topologies import tpu

from implementations.config import GATES
from implementations.jax_backend.kernels.rg_lru import rg_lru

pytestmark = pytest.mark.usefixtures("in_32_bits")

CASES = "pallas_scan_cases"
VARIANTS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
# Largest error over the largest true value, and that of all as root mean squares, as in parity: in
# bfloat16 the gates' products are rounded, and where they turn a state too, its phase drifts.
LIMITS = {"float32": (5e-6, 2e-6), "bfloat16": (6e-2, 2e-2)}
THETA_LIMIT = 2e-5  # in float32: what comes to theta is a sum over time of sums over time

FORMS = [
    (gate, normalize)
    for gate, kind in GATES.items()
    for normalize in ((True,) if kind.has_time_step else (True, False))
]
QUICK = {("pallas_tpu", "cg_lru", True), ("pallas_tpu", "mamba", True), ("pallas_gpu", "lru", True),
         ("pallas_gpu", "gru", True), ("pallas_gpu", "cg_lru", True)}  # fmt: skip
FORMS_OF = [(variant, *form) for variant in VARIANTS for form in FORMS]


def slow_unless(is_quick):
    return () if is_quick else pytest.mark.slow


@pytest.mark.parametrize(
    ("variant", "gate", "normalize", "dtype", "T", "R"),
    [
        pytest.param(*form, dtype, *shape, marks=slow_unless(form in QUICK and is_first))
        for form in FORMS_OF
        for dtype, shape, is_first in (
            ("float32", (40, 20), True),
            ("float32", (300, 130), False),  # more than a block, whose last one is cut
            ("bfloat16", (300, 20), False),
        )
    ],
)
def test_a_gate_and_its_gradients_are_true(interpreted, variant, gate, normalize, dtype, T, R):
    shape = {"B": 2, "T": T, "R": R, "documents": "some", "dtype": dtype}
    settings = {
        "variant": variant,
        "gate": gate,
        "normalize_input": normalize,
        "num_gate_blocks": 5,
    }
    found = interpreted(CASES, "op_errors", backend="pallas", op="rg_lru", **shape, **settings)
    kind = GATES[gate]
    assert ("da_gate.weight" in found) == kind.has_recurrence_gate
    assert ("dinput_gate.weight" in found) == kind.has_input_gate
    assert ("da_param" in found, "dtheta" in found) == (kind.has_a_param, kind.is_complex)
    largest, rms = LIMITS[dtype]
    if dtype == "float32" and (theta := found.pop("dtheta", None)):
        assert theta[0] < THETA_LIMIT
    for name, (ours, ours_rms) in found.items():
        assert ours < largest, f"{name}: {ours:.1e}"
        assert ours_rms is None or ours_rms < rms, f"{name}: rms {ours_rms:.1e}"


@pytest.mark.parametrize("gate", ["cg_lru", pytest.param("lru", marks=pytest.mark.slow)])
def test_no_access_is_out_of_bounds_or_races(interpreted, gate):
    shape = {"B": 2, "T": 20, "R": 20, "documents": "some", "dtype": "float32"}
    settings = {"gate": gate, "num_gate_blocks": 5}
    _, has_raced = interpreted(
        CASES, "op_races", backend="pallas", op="rg_lru", **shape, **settings
    )
    assert has_raced == [False] * 2  # forward and backward


# Compiled, at channels of the paper's 1b: what is allocated for a block fits in a core.

B, T, R = 2, 2048, 2560


def traced(variant, gate, normalize, dtype, sharding=None):
    """The program of outputs and all gradients."""
    kind, own = GATES[gate], R // 2 if GATES[gate].is_complex else R

    def shape(*sizes, dtype="float32"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def given(is_there, *sizes, **kind):
        return shape(*sizes, **kind) if is_there else None

    inputs = {
        "x_BTR": shape(B, T, R, dtype=dtype),
        "a_gate_BTR": given(kind.has_recurrence_gate, B, T, own, dtype=dtype),
        "input_gate_BTR": given(kind.has_input_gate, B, T, own, dtype=dtype),
        "a_param_R": given(kind.has_a_param, own),
        "theta_R": given(kind.is_complex, own),
        "h0_BR": shape(B, R),
    }

    def run(inputs, position_BT, doutputs):
        form = {"variant": variant, "gate": gate, "normalize_input": normalize}
        unit = partial(rg_lru, position_BT=position_BT, **form)
        outputs, pull = jax.vjp(lambda inputs: unit(**inputs), inputs)
        return outputs, pull(doutputs)

    doutputs = (inputs["x_BTR"], inputs["h0_BR"])
    return jax.jit(run).trace(inputs, shape(B, T, dtype="int32"), doutputs)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("variant", "gate", "normalize"), FORMS_OF)
def test_every_gate_lowers(variant, gate, normalize, dtype):
    text = traced(variant, gate, normalize, dtype).lower(lowering_platforms=(VARIANTS[variant],))
    target = {"pallas_tpu": "tpu_custom_call", "pallas_gpu": "triton"}[variant]
    assert target in text.as_text()


@pytest.mark.parametrize(
    ("topology", "gate", "normalize", "dtype"),
    [
        pytest.param(topology, *form, dtype, marks=slow_unless(is_quick))
        for topology in ("v5e:2x2", "v5p:2x2x1")
        for form in FORMS
        for dtype in ("float32", "bfloat16")
        for is_quick in [
            topology == "v5e:2x2" and dtype == "bfloat16" and form[0] in ("gru", "mamba")
        ]
    ],
)
def test_every_gate_compiles_for_real_tpus(topology, gate, normalize, dtype):
    sharding = SingleDeviceSharding(tpu(topology))
    compiled = traced("pallas_tpu", gate, normalize, dtype, sharding).lower().compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
