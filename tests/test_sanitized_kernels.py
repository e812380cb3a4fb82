"""No Triton kernel touches what is not its own, and each writes all that it owes."""

from itertools import product

import pytest

CASES = "sanitized_cases"
OPS = (
    "linear_scan",
    "linear_scan_split",
    "rg_lru",
    "rg_lru_split",
    "rms_norm",
    "add_rms_norm",
    "gated_gelu",
    "causal_conv",
    "cross_entropy",
    "mean_cross_entropy",
    "rope",
    "attention",
    "attention_step",
    "rg_lru_step",
)


def cases():
    """An interpreted walk in chunks takes half a minute: in one dtype that is quick."""
    for op, dtype in product(OPS, ("float32", "bfloat16")):
        is_slow = op.endswith("_split") and dtype == "float32"
        yield pytest.param(op, dtype, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.parametrize(("op", "dtype"), cases())
def test_a_kernel_keeps_to_its_own(interpreted, op, dtype):
    launches, problems, not_finite = interpreted(CASES, "sanitized_case", op=op, dtype=dtype)
    assert launches
    assert not problems
    assert not not_finite
