"""The proving ground of the Triton kernels: the mended interpreter is right in bfloat16, and its
worker behaves."""

import sys

import pytest

from implementations.torch_backend.kernels import interpreter

CASES = "interpreter_cases"


def test_bfloat16_arithmetic_is_that_of_torch(interpreted):
    assert not {n: d for n, d in interpreted(CASES, "arithmetic_case").items() if d}


def test_float32_becomes_the_nearest_bfloat16(interpreted):
    assert not {n: d for n, d in interpreted(CASES, "rounding_case").items() if d}


def test_a_dot_of_bfloat16_is_a_float32_product(interpreted):
    assert interpreted(CASES, "dot_case") < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scans_and_reductions_are_those_of_a_loop(interpreted, dtype):
    assert not {n: d for n, d in interpreted(CASES, "fold_case", dtype=dtype).items() if d}


def test_a_custom_scan_is_fast(interpreted):
    assert interpreted(CASES, "scan_seconds") < 0.5  # measured 0.03; over elements, 2.9


def test_a_launch_leaves_the_language_as_it_was(interpreted):
    assert interpreted(CASES, "language_is_restored_case")


def test_mending_twice_changes_nothing(interpreted):
    assert interpreted(CASES, "mend_twice_case")


def test_only_the_worker_interprets(interpreted):
    assert interpreted(CASES, "is_interpreting_case")
    assert not interpreter.is_interpreting()


def test_another_interpreter_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(interpreter.KNOWN_API, "ScanOps.generic_scan", ("self", "other"))
    with pytest.raises(RuntimeError, match=r"Triton \d.*generic_scan\(self, input\)") as error:
        interpreter._interpreter()
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "triton.runtime.interpreter", None)
    with pytest.raises(RuntimeError, match="install triton"):
        interpreter._interpreter()


def test_the_worker_returns_raises_times_out_and_comes_back(interpreted):
    assert interpreted(CASES, "echo", T=7, dtype="bfloat16") == {"T": 7, "dtype": "bfloat16"}
    first = interpreted(CASES, "pid")
    assert interpreted(CASES, "pid") == first
    with pytest.raises(ValueError, match="of the case") as error:
        interpreted(CASES, "fail", text="the trouble of the case")
    assert "in fail" in error.value.__notes__[0]
    with pytest.raises(AttributeError, match="no_such_case"):
        interpreted(CASES, "no_such_case")
    with pytest.raises(TimeoutError, match="hang"):
        interpreted(CASES, "hang", timeout_s=0.5)
    assert interpreted(CASES, "pid") != first
    with pytest.raises(RuntimeError, match=r"exit code 7.*\n.*last words"):
        interpreted(CASES, "crash")
    assert interpreted(CASES, "echo") == {}


def test_poisoned_memory_is_nan(interpreted):
    made = interpreted(CASES, "poisoned_case")
    assert len(made) == 5
    assert all(made.values())
