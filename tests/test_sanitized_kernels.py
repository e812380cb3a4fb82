"""No Triton kernel touches what is not its own, and each writes all that it owes."""

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_a_kernel_keeps_to_its_own(interpreted, op, dtype):
    launches, problems, not_finite = interpreted(CASES, "sanitized_case", op=op, dtype=dtype)
    assert launches
    assert not problems
    assert not not_finite
