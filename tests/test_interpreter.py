"""The proving ground of the Triton kernels: the mended interpreter is right in bfloat16, and its
worker behaves."""

import re
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sanitizer_passes_a_good_kernel(interpreted, dtype):
    assert interpreted(CASES, "shift_case", dtype=dtype) == ([], [], True)


@pytest.mark.parametrize(
    ("shift", "place"), [(1, "1 after the end of x_ptr"), (-3, "3 before x_ptr")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sanitizer_finds_a_load_beyond_the_end(interpreted, dtype, shift, place):
    outside, conflicts, _ = interpreted(CASES, "shift_case", dtype=dtype, shift=shift)
    assert len(outside) == 2  # one program, in two launches
    assert all(place in problem for problem in outside)
    assert re.match(r"interpreter_cases.py:\d+: a load of _shift_kernel, program", outside[0])
    assert not conflicts


def test_the_sanitizer_finds_two_programs_that_write_one_element(interpreted):
    outside, conflicts, _ = interpreted(CASES, "shift_case", dtype="float32", overlap=2)
    assert not outside
    assert len(conflicts) == 2
    # Two elements of each of the last three blocks.
    assert "_shift_kernel: 6 elements of out_ptr" in conflicts[0]
    assert "(0, 0, 0) and (1, 0, 0)" in conflicts[0]


def test_the_sanitizer_finds_a_program_that_reads_what_another_writes(interpreted):
    (conflict,) = interpreted(CASES, "in_place_case")
    assert "3 elements of x_ptr" in conflict


def test_the_sanitizer_knows_the_end_of_a_view(interpreted):
    assert interpreted(CASES, "view_case") == (0, 1)


def test_the_sanitizer_refuses_what_it_cannot_follow(interpreted):
    with pytest.raises(Exception, match="does not follow create_atomic_rmw"):
        interpreted(CASES, "atomic_case")
