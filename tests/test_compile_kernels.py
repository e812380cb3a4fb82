"""Ahead-of-time compilation of the Triton kernels: the tool sees what it must, and every shipped
kernel keeps its registers and its shared memory."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import compile_kernels
from benchmarks.compile_kernels import CASES, CHIPS, DTYPES, compile_launches, empty, problems_of

ROOT = Path(__file__).parent.parent
# The matrix instructions of each chip's own generation, and the ops that live by their loads.
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
STREAMING = ("linear_scan", "rg_lru")


@triton.jit
def _product_kernel(
    a_ptr,  # [N, K]
    c_ptr,  # [N, N]
    K,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    i, k = tl.arange(0, N), tl.arange(0, BLOCK_K)
    sum = tl.zeros((N, N), tl.float32)
    for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        a = tl.load(a_ptr + i[:, None] * K + begin + k[None, :])
        sum = tl.dot(a, a.trans(1, 0), sum)
    tl.store(c_ptr + i[:, None] * N + i[None, :], sum)


def product(*, stages: int = 2, block_k: int = 64, K: int = 4096, **options):
    def run() -> None:
        a, c = empty(64, K, dtype="bfloat16", grad=False), empty(64, 64, grad=False)
        for _ in range(2):  # a kernel launched twice is one row
            _product_kernel[lambda _: (1,)](a, c, K, 64, BLOCK_K=block_k, STAGES=stages, **options)

    return run


class _Doubled(torch.autograd.Function):
    """An op like the shipped ones, whose backward launches another configuration."""

    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        _double_kernel[(8,)](x, out, x.numel(), BLOCK=1024)
        return out

    @staticmethod
    def backward(ctx, dout):
        out = torch.empty_like(dout)
        _double_kernel[(16,)](dout, out, dout.numel(), BLOCK=512, num_warps=2)
        return out


@torch.library.custom_op("aerie_test::doubled", mutates_args=())
def _doubled(x: torch.Tensor) -> torch.Tensor:
    return _Doubled.forward(None, x + torch.arange(len(x), device=x.device))


@_doubled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_doubled.register_autograd(_Doubled.backward)


@triton.jit
def _double_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < size) * 2, mask=i < size)


@pytest.mark.parametrize(
    ("target", "matrix", "copy"),
    [
        ("sm_80", "HMMA", "LDGSTS.128"),
        ("sm_90", "HGMMA", "LDGSTS.128"),
        ("sm_100", "UTCHMMA", "LDGSTS.128"),
        ("gfx942", "v_mfma_f32_32x32x8_bf16", None),
    ],
)
def test_a_product_shows_its_matrix_instructions(target, matrix, copy):
    (row,) = compile_launches(product(), target)
    assert (row.kernel, row.target) == ("test_compile_kernels._product_kernel", target)
    assert row.config == "bf16,fp32 N=64 BLOCK_K=64 STAGES=2 num_warps=4"
    assert row.instructions[matrix] == row.total("matrix")
    assert row.total("load_16_bytes")
    assert row.total("async_copy") == row.instructions.get(copy, 0)
    assert (row.total("async_copy") > 0) == (copy is not None)
    assert 16 < row.registers <= 255
    assert row.shared_bytes >= 64 * 64 * 2
    assert not list(problems_of(row))


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        ("sm_80", {"stages": 40}),
        ("sm_90", {"stages": 40}),
        ("gfx942", {"block_k": 1024}),  # where stages are kept in registers
    ],
)
def test_too_much_shared_memory_is_found(target, asked):
    (row,) = compile_launches(product(**asked), target)
    assert row.shared_bytes > CHIPS[target].shared_bytes
    *_, problem = problems_of(row)
    assert f"the chip has {CHIPS[target].shared_bytes}" in problem


def test_too_much_tensor_memory_is_found():
    (row,) = compile_launches(product(), "sm_100")
    assert row.tensor_columns == 64  # of 128 rows and 4 bytes: the sum
    (problem,) = problems_of(replace(row, tensor_columns=704))
    assert "needs 704 columns of tensor memory; the chip has 512" in problem


def test_scratch_memory_of_amd_is_a_spill():
    (row,) = compile_launches(product(block_k=1024), "gfx942")
    assert row.spill_bytes > 0
    assert row.total("local")


def test_a_spill_is_found_and_counted_as_ptxas_counts_it(monkeypatch, capfd):
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    (row,) = compile_launches(product(maxnreg=32), "sm_80")
    said = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", capfd.readouterr().out)
    assert row.spill_bytes == int(said[1]) + int(said[2]) > 0
    assert row.total("local")
    (problem,) = problems_of(row)
    assert f"spills {row.spill_bytes} bytes, with {row.registers} registers" in problem


def test_the_backward_of_an_op_is_compiled_as_it_launches():
    def run() -> None:
        compile_kernels.backward(_Doubled.apply(empty(8192, dtype="bfloat16")))

    forward, backward = compile_launches(run, "sm_90")
    assert forward.config == "bf16 BLOCK=1024 num_warps=4"
    assert backward.config == "bf16 BLOCK=512 num_warps=2"
    assert all(row.instructions.get("LDG.128") for row in (forward, backward))


def test_a_custom_op_is_compiled_too():
    """On meta tensors torch would call its fake."""

    def run() -> None:
        compile_kernels.backward(_doubled(empty(8192, dtype="bfloat16")))

    forward, backward = compile_launches(run, "sm_90")
    assert forward.config == "bf16 BLOCK=1024 num_warps=4"
    assert backward.config == "bf16 BLOCK=512 num_warps=2"
    assert _doubled(torch.empty(1, device="meta")).shape == (1,)  # the fake is back: no launch


def test_a_width_that_is_no_multiple_of_16_loads_less_at_once():
    """As in a real launch, the compiler knows what the arguments are divisible by."""
    (row,) = compile_launches(product(K=4097), "sm_90")
    assert not row.total("load_16_bytes")


def test_the_driver_is_given_back():
    before = triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError):
        compile_launches(lambda: 1 / 0, "sm_90")
    assert triton.runtime.driver._active is before


def test_the_interpreter_is_refused_in_one_line():
    script = ROOT / "benchmarks" / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("TRITON_INTERPRET is set")
    assert done.stderr.count("\n") == 1


def cases() -> Iterator:
    """Every op, dtype and chip; quick are those of an H100 in its usual dtype, but for the other
    gates: 21 kernels, minutes."""
    for case in itertools.product(CASES, DTYPES, CHIPS):
        is_quick = case[0] != "gates" and case[1:] == ("bfloat16", "sm_90")
        yield pytest.param(*case, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(("op", "dtype", "target"), cases())
def test_a_shipped_kernel_fits_every_chip(op, dtype, target):
    rows = compile_launches(lambda: CASES[op](dtype), target)
    assert rows, f"{op} launches no kernel"
    assert not [problem for row in rows for problem in problems_of(row)]
    for row in rows:
        if op == "attention" and dtype == "bfloat16":
            assert any(name.startswith(MATRIX[target]) for name in row.instructions), row
        if op in STREAMING and target != "gfx942":  # which pipelines through registers
            assert row.instructions.get("LDGSTS.128"), row


@pytest.mark.slow
@pytest.mark.skipif(not CASES, reason="no kernel is shipped")
def test_the_command_prints_rows():
    op = next(iter(CASES))
    script = ROOT / "benchmarks" / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, script, "--json", "--target", "sm_80", "--kernel", op],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout)
    assert rows
    for row in rows:
        assert row.keys() == {
            "kernel",
            "target",
            "config",
            "registers",
            "spill_bytes",
            "shared_bytes",
            "tensor_columns",
            "instructions",
        }
    assert done.stderr.count("\n") == len(DTYPES)


@pytest.mark.slow
def test_no_kernel_of_pallas_spills():
    script = ROOT / "benchmarks" / "compile_pallas.py"
    done = subprocess.run(
        [sys.executable, script, "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    rows = json.loads(done.stdout)
    num_chips = sum(t.target.backend == "cuda" for t in CHIPS.values())
    num_kernels = 2 * (1 + 1 + len(list(compile_kernels.other_gates())))
    assert len(rows) == num_kernels * len(DTYPES) * num_chips
    assert {row["spill_bytes"] for row in rows} == {0}
