"""linear_scan, the fused RG-LRU and its decode step in Triton, interpreted, against float64.

Tolerances are those of parity, where the same fields are measured (tolerances.yaml).
"""

import math

import pytest
from scan_cases import LONG_SHAPES, SHAPES, within

CASES = "triton_scan_cases"

SCANS = [("triton", *shape) for shape in SHAPES]
SCANS += [
    # T x R: half a minute or more to interpret where both are many
    pytest.param(
        "triton_split", *shape, marks=pytest.mark.slow if math.prod(shape[1:3]) > 2**15 else ()
    )
    for shape in LONG_SHAPES
]


@pytest.mark.parametrize(("variant", "B", "T", "R", "documents", "dtype"), SCANS)
@pytest.mark.parametrize("op", ["linear_scan", "rg_lru"])
def test_a_scan_and_its_gradients_are_true(interpreted, op, variant, B, T, R, documents, dtype):
    shape = {"B": B, "T": T, "R": R, "documents": documents}
    found = interpreted(CASES, "op_errors", op=op, **shape, variant=variant, dtype=dtype)
    within(found, op, dtype, "triton")


@pytest.mark.parametrize("size", [0, 1, 2])  # the last, of few channels, is that of all others
@pytest.mark.parametrize("op", ["linear_scan", "rg_lru"])
def test_tiles_of_many_channels(interpreted, op, size):
    shape = {"B": 2, "T": 161, "R": 131, "documents": "some", "dtype": "float32"}
    within(interpreted(CASES, "tile_errors", op=op, size=size, **shape), op, "float32", "triton")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["triton", "triton_split"])
def test_gates_without_biases(interpreted, variant, dtype):
    shape = {"B": 1, "T": 300, "R": 8, "documents": "some", "biases": False}
    found = interpreted(CASES, "op_errors", op="rg_lru", **shape, variant=variant, dtype=dtype)
    assert "da_gate.bias" not in found
    within(found, "rg_lru", dtype, "triton")


@pytest.mark.parametrize("variant", ["triton", "triton_split"])
def test_any_strides(interpreted, variant):
    found = interpreted(CASES, "strided_errors", variant=variant)
    within(found, "linear_scan", "float32", "triton")


# Batch, channels, gate blocks, conv_width.
STEPS = [(1, 3, 1, 4), (3, 96, 4, 4), (17, 160, 2, 2), (2, 65, 5, 1), (1, 1024, 16, 4)]
# Of the largest true value, and as root mean squares: measured 3.3e-7 and 1.4e-7, 7.0e-3, 2.9e-3.
STEP_TOLERANCE = {"float32": (2e-6, 1e-6), "bfloat16": (2e-2, 6e-3)}


@pytest.mark.parametrize("dtype", STEP_TOLERANCE)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
@pytest.mark.parametrize(("B", "R", "G", "conv_width"), STEPS)
def test_steps_are_the_recurrence(interpreted, B, R, G, conv_width, biases, dtype):
    shape = {"B": B, "R": R, "G": G, "conv_width": conv_width, "biases": biases}
    found = interpreted(CASES, "step_errors", **shape, dtype=dtype)
    if conv_width > 1:  # else there is no such state
        assert found.pop("conv_BWR")[0] == 0.0
    largest, rms = STEP_TOLERANCE[dtype]
    assert not {k: v for k, v in found.items() if v[0] > largest or (v[1] or 0) > rms}


# The other gates, by the compile-time switch of the same kernels.

GATE_SETTINGS = [
    {"gate": "no_recurrence_gate"},
    {"gate": "no_input_gate", "decay_exponent": 3.0},
    {"gate": "lru"},
    {"gate": "gru"},
    {"gate": "mamba"},
    {"gate": "cg_lru"},
    {"normalize_input": False},
    {"gate": "cg_lru", "normalize_input": False, "biases": False},
]
# Of the largest true value; twice the 4.2e-6 measured of 261 tokens: phases add up in float32.
THETA_TOLERANCE = 8.5e-6


@pytest.mark.parametrize("settings", GATE_SETTINGS, ids=lambda s: " ".join(map(str, s.values())))
@pytest.mark.parametrize(("variant", "T"), [("triton", 37), ("triton_split", 261)])
def test_every_gate_and_its_gradients_are_true(interpreted, variant, T, settings):
    shape = {"B": 1, "T": T, "R": 24, "documents": "some", "dtype": "float32"}
    found = interpreted(CASES, "op_errors", op="rg_lru", **shape, variant=variant, **settings)
    if (theta := found.pop("dtheta", None)) is not None:
        assert theta[0] < THETA_TOLERANCE
    within(found, "rg_lru", "float32", "triton")


@pytest.mark.parametrize("settings", GATE_SETTINGS, ids=lambda s: " ".join(map(str, s.values())))
@pytest.mark.parametrize("dtype", STEP_TOLERANCE)
def test_a_step_of_every_gate(interpreted, dtype, settings):
    shape = {"B": 3, "R": 48, "G": 2, "conv_width": 0, "dtype": dtype}
    found = interpreted(CASES, "step_errors", **shape, **settings)
    largest, rms = STEP_TOLERANCE[dtype]
    assert not {k: v for k, v in found.items() if v[0] > largest or (v[1] or 0) > rms}
