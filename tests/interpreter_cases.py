"""What tests/test_interpreter.py runs in the worker: small kernels that prove Triton's interpreter
right, and kernels with planted defects."""

import os
import time

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from implementations.torch_backend.kernels.interpreter import is_interpreting, mend

N = 4096


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + N + i, a - b)
    tl.store(out_ptr + 2 * N + i, a * b)
    tl.store(out_ptr + 3 * N + i, a / b)
    tl.store(out_ptr + 4 * N + i, tl.where(a < b, a, b * 2.0))
    tl.store(out_ptr + 5 * N + i, tl.maximum(a, b))
    tl.store(out_ptr + 6 * N + i, tl.abs(a))
    tl.store(out_ptr + 7 * N + i, -a)
    tl.store(out_ptr + 8 * N + i, tl.fma(a, b, a))
    tl.store(out_ptr + 9 * N + i, tl.minimum(a, 0.1))


def arithmetic_case() -> dict[str, int]:
    """Elements that differ from torch's bfloat16, by operation."""
    a, b, out = random(N), random(N, seed=1), torch.zeros(10, N, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](a, b, out, N)
    fma = (a.float() * b.float() + a.float()).bfloat16()
    tenth = torch.full_like(a, 0.1)
    want = {
        "add": a + b,
        "sub": a - b,
        "mul": a * b,
        "div": a / b,
        "where": torch.where(a < b, a, b * 2.0),
        "maximum": torch.maximum(a, b),
        "abs": a.abs(),
        "neg": -a,
        "fma": fma,
        "minimum": torch.minimum(a, tenth),
    }
    return {name: int((got != w).sum()) for (name, w), got in zip(want.items(), out, strict=True)}


@triton.jit
def _rounding_kernel(x_ptr, out_ptr, wide_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x.to(tl.bfloat16))
    tl.store(out_ptr + N + i, x)  # the cast is implied by the pointer
    tl.store(out_ptr + 2 * N + i, tl.full((N,), 0.3, tl.bfloat16))
    tl.store(out_ptr + 3 * N + i, x.to(tl.bfloat16, fp_downcast_rounding="rtne"))
    tl.store(wide_ptr + i, tl.load(out_ptr + i).to(tl.float32))
    tl.store(wide_ptr + N + i, (x * 100.0).to(tl.int32).to(tl.bfloat16).to(tl.int32))


def rounding_case() -> dict[str, int]:
    x = random(N, dtype=torch.float32)
    x[:8] = torch.tensor([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 3.4e38, 1 + 2**-8])
    x[8:] = torch.where(x[8:].abs() > 20, 1.0, x[8:])
    out, wide = torch.zeros(4, N, dtype=torch.bfloat16), torch.zeros(2, N)
    _rounding_kernel[(1,)](x, out, wide, N)
    integers = (x[8:] * 100).int().bfloat16().int().float()
    want = x.bfloat16()
    bits = {
        "to": (out[0], want),
        "store": (out[1], want),
        "constant": (out[2], torch.full_like(want, 0.3)),
        "rtne": (out[3], want),
        "back": (wide[0].bfloat16(), want),
        "integers": (wide[1, 8:].bfloat16(), integers.bfloat16()),
    }
    return {
        name: int((got.view(torch.int16) != w.view(torch.int16))[~w.isnan()].sum())
        + int((got.isnan() != w.isnan()).sum())
        for name, (got, w) in bits.items()
    }


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at).trans(1, 0)))


def dot_case() -> float:
    """The error of a @ b.T, of the largest value."""
    a, b, c = random(64, 64), random(64, 64, seed=1), torch.zeros(64, 64)
    _dot_kernel[(1,)](a, b, c, 64)
    want = a.double() @ b.double().T
    return ((c - want).abs().max() / want.abs().max()).item()


@triton.jit
def _weighted(a0, x0, a1, x1):
    return a0 * a1, a1 * x0 + x1


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _fold_kernel(
    a_ptr,
    x_ptr,
    out_ptr,  # [4, M, N]: scans
    row_ptr,  # [8, N]: reductions over the first axis
    M: tl.constexpr,
    N: tl.constexpr,
):
    i, j = tl.arange(0, M), tl.arange(0, N)
    at = i[:, None] * N + j[None, :]
    a, x = tl.load(a_ptr + at), tl.load(x_ptr + at)
    decay, h = tl.associative_scan((a, x), 0, _weighted)
    tl.store(out_ptr + at, h)
    tl.store(out_ptr + M * N + at, decay)
    _, h = tl.associative_scan((a, x), 0, _weighted, reverse=True)
    tl.store(out_ptr + 2 * M * N + at, h)
    tl.store(out_ptr + 3 * M * N + at, tl.cumsum(x, 1))
    _, last = tl.reduce((a, x), 0, _weighted)
    tl.store(row_ptr + j, last)
    tl.store(row_ptr + N + j, tl.sum(x, 0))
    tl.store(row_ptr + 2 * N + j, tl.max(x, 0))
    tl.store(row_ptr + 3 * N + j, tl.reduce(x, 0, _add))
    kept = tl.reduce(x, 0, _add, keep_dims=True)
    tl.store(row_ptr + 4 * N + j[None, :], kept)
    tl.store(row_ptr + 5 * N + j, tl.argmax(x, 0))
    tl.store(row_ptr + 6 * N + j, tl.associative_scan(tl.sum(x, 0), 0, _add))
    tl.store(row_ptr + 7 * N + j, tl.reduce(x, None, _add))


def fold_case(dtype: str) -> dict[str, int]:
    """Elements of scans and reductions that differ from a loop over rows in torch."""
    M, K = 16, 256
    kind = getattr(torch, dtype)
    a, x = torch.sigmoid(random(M, K, dtype=torch.float32)).to(kind), random(M, K, dtype=kind)
    out, rows = torch.zeros(4, M, K, dtype=kind), torch.zeros(8, K, dtype=kind)
    _fold_kernel[(1,)](a, x, out, rows, M, K)

    def scan(a, x, combine):
        states = [(a[0], x[0])]
        for row in zip(a[1:], x[1:], strict=True):
            states.append(combine(*states[-1], *row))
        return (torch.stack(s) for s in zip(*states, strict=True))

    def weighted(a0, x0, a1, x1):
        return a0 * a1, a1 * x0 + x1

    def summed(a0, x0, a1, x1):
        return a1, x0 + x1

    decay, h = scan(a, x, weighted)
    _, back = scan(a.flip(0), x.flip(0), weighted)
    _, total = scan(a, x, summed)
    column = np.add.accumulate(x.float().numpy(), axis=1)
    by_row = x.float().numpy().sum(0)  # in float32, then rounded
    sums = torch.from_numpy(by_row).to(kind)
    running = sums.clone()
    for k in range(1, K):
        running[k] = running[k - 1] + sums[k]
    everything = x.reshape(-1)[0].clone()
    for value in x.reshape(-1)[1:]:
        everything = everything + value
    want = {
        "scan": (out[0], h),
        "decay": (out[1], decay),
        "reverse": (out[2], back.flip(0)),
        "cumsum": (out[3], torch.from_numpy(column).to(kind)),
        "reduce": (rows[0], h[-1]),
        "sum": (rows[1], sums),
        "max": (rows[2], x.amax(0)),
        "custom sum": (rows[3], total[-1]),
        "keep_dims": (rows[4], total[-1]),
        "argmax": (rows[5], x.float().argmax(0).to(kind)),
        "scan of a row": (rows[6], running),
        "reduce of all": (rows[7], everything.expand(K)),
    }
    return {name: int((got != w).sum()) for name, (got, w) in want.items()}


def scan_seconds() -> float:
    """Of a scan over 256 rows of 256."""
    M, K = 256, 256
    a, x = random(M, K, dtype=torch.float32), random(M, K, dtype=torch.float32)
    out = torch.zeros(M, K)
    begin = time.process_time()
    _scan_only_kernel[(1,)](a, x, out, M, K)
    return time.process_time() - begin


@triton.jit
def _scan_only_kernel(a_ptr, x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    _, h = tl.associative_scan((tl.load(a_ptr + at), tl.load(x_ptr + at)), 0, _weighted)
    tl.store(out_ptr + at, h)


def language_is_restored_case() -> bool:
    """After a launch that called device functions, tl is as it was before."""
    before = (tl.load, tl.core.load, tl.reduce, tl.tensor.__add__, tl.math.exp)
    fold_case("float32")
    return before == (tl.load, tl.core.load, tl.reduce, tl.tensor.__add__, tl.math.exp)


def mend_twice_case() -> bool:
    from triton.runtime import interpreter

    before = interpreter.InterpreterBuilder.cast_impl, interpreter._patch_lang
    mend()
    return before == (interpreter.InterpreterBuilder.cast_impl, interpreter._patch_lang)


def is_interpreting_case() -> bool:
    return is_interpreting()


# How the worker itself behaves.


def echo(**arguments):
    return arguments


def pid() -> int:
    return os.getpid()


def fail(text: str):
    raise ValueError(text)


def hang():
    time.sleep(60)


def crash():
    print("these are my last words", flush=True)
    os._exit(7)


def poisoned_case() -> dict[str, bool]:
    from interpreted import poisoned

    x = torch.zeros(3, dtype=torch.bfloat16)
    with poisoned():
        made = {
            "empty": torch.empty(3),
            "empty_like": torch.empty_like(x),
            "empty_strided": torch.empty_strided((2, 2), (1, 2)),
            "new_empty": x.new_empty(4),
            "new_empty_strided": x.new_empty_strided((2, 2), (1, 2)),
        }
        torch.empty(3, dtype=torch.int64)
    return {name: bool(tensor.isnan().all()) for name, tensor in made.items()}


# Good kernels, and the defects that the sanitizer must see.


@triton.jit
def _shift_kernel(
    x_ptr,  # [N]
    out_ptr,  # [N]
    N,
    SHIFT: tl.constexpr,  # 0 is right; else reads beyond an end
    OVERLAP: tl.constexpr,  # 0 is right; else a program writes into the next one's block
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + SHIFT, mask=i < N, other=0.0)
    tl.store(out_ptr + i, x + 1.0, mask=i < N)
    tl.store(out_ptr + i + OVERLAP, x + 1.0, mask=i + OVERLAP < N)


@triton.jit
def _in_place_kernel(x_ptr, N, BLOCK: tl.constexpr):
    """Each program reads its left neighbour's last element, and overwrites its own."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(x_ptr + i - 1, mask=(i > 0) & (i < N), other=0.0)
    tl.store(x_ptr + i, before, mask=i < N)


@triton.jit
def _atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


def shift_case(dtype: str, shift: int = 0, overlap: int = 0) -> tuple[list[str], list[str], bool]:
    """What is reported, and whether the output is there all the same."""
    from sanitizer import sanitize

    x, out = (random(100, dtype=getattr(torch, dtype)) for _ in range(2))  # heap neighbours
    with sanitize() as report:
        for _ in range(2):  # two launches write the same elements: no conflict
            _shift_kernel[(4,)](x, out, 100, SHIFT=shift, OVERLAP=overlap, BLOCK=32)
    assert (report.num_launches, report.num_loads, report.num_stores) == (2, 8, 16)
    return report.out_of_bounds, report.conflicts, bool((out == x + 1).all())


def view_case() -> tuple[int, int]:
    """Problems of a launch on every second row, in bounds and one row too far down."""
    from sanitizer import sanitize

    x, out = random(8, 32)[::2], torch.empty(4, 32)
    counts = []
    for at in (x, x[1:]):
        with sanitize() as report:
            _rows_kernel[(4,)](at, out, at.stride(0), BLOCK=32)
        counts.append(len(report.problems))
    return tuple(counts)


@triton.jit
def _rows_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(out_ptr + row * BLOCK + i, tl.load(x_ptr + row * stride + i))


def in_place_case() -> list[str]:
    from sanitizer import sanitize

    x = random(100)
    with sanitize() as report:
        _in_place_kernel[(4,)](x, 100, BLOCK=32)
    assert not report.out_of_bounds
    return report.conflicts


def atomic_case() -> None:
    from sanitizer import sanitize

    with sanitize():
        _atomic_kernel[(1,)](torch.zeros(1))
