"""linear_scan and the fused RG-LRU in Pallas, interpreted, against float64: the cases of Triton's.

Tolerances are those of parity, where the same fields are measured (tolerances.yaml).
"""

import pytest
from scan_cases import LONG_SHAPES, SHAPES, within

CASES = "pallas_scan_cases"
# An interpreted program is compiled for each shape, in some seconds: the others are slow tests.
QUICK = (SHAPES[2], SHAPES[4], SHAPES[6])


def scans(variant: str, shapes: list[tuple]) -> list:
    return [
        pytest.param(variant, *shape, marks=() if shape in QUICK else pytest.mark.slow)
        for shape in shapes
    ]


# blocks of pallas_tpu are 256 steps
SCANS = scans("pallas_tpu", SHAPES + LONG_SHAPES) + scans("pallas_gpu", SHAPES)


@pytest.mark.parametrize(("variant", "B", "T", "R", "documents", "dtype"), SCANS)
@pytest.mark.parametrize("op", ["linear_scan", "rg_lru"])
def test_a_scan_and_its_gradients_are_true(interpreted, op, variant, B, T, R, documents, dtype):
    shape = {"B": B, "T": T, "R": R, "documents": documents}
    found = interpreted(
        CASES, "op_errors", backend="pallas", op=op, **shape, variant=variant, dtype=dtype
    )
    within(found, op, dtype, "pallas")


@pytest.mark.parametrize(("B", "T"), [(2, 20), (1, 257)], ids=["sequences", "blocks"])
@pytest.mark.parametrize(("op", "dtype"), [("linear_scan", "bfloat16"), ("rg_lru", "float32")])
def test_no_access_is_out_of_bounds_or_races(interpreted, op, dtype, B, T):
    shape = {"B": B, "T": T, "R": 20, "documents": "some"}
    found, has_raced = interpreted(CASES, "op_races", backend="pallas", op=op, **shape, dtype=dtype)
    within(found, op, dtype, "pallas")
    assert has_raced == [False] * 2  # forward and backward


@pytest.mark.parametrize("variant", ["pallas_tpu", "pallas_gpu"])
def test_gates_without_biases(interpreted, variant):
    shape = {"B": 1, "T": 300, "R": 8, "documents": "some", "biases": False}
    settings = {"variant": variant, "dtype": "float32"}
    found = interpreted(CASES, "op_errors", backend="pallas", op="rg_lru", **shape, **settings)
    assert "da_gate.bias" not in found
    within(found, "rg_lru", "float32", "pallas")
