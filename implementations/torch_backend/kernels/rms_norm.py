"""x / sqrt(mean(x^2) + eps) * (1 + scale) over the last axis, alone or after a residual sum.

Twin: implementations/jax_backend/kernels/rms_norm.py.  Truth: implementations/reference.py.

A row lies whole in the registers of one program, so that each pass is one read. Bytes an element of
bfloat16 (float32: twice as many):

    rms_norm       forward 4 (reads x, writes y);              backward 6 (reads x, dy; writes dx)
    add_rms_norm   forward 8 (reads x, branch; writes sum, y); backward 8 (reads sum, dsum, dy;
                   writes dx, which is also the gradient of the branch)

Nothing but the input is kept for the backward pass: it holds the whole row anyway, and its two sums
(of x^2 and along x) cost no byte. The gradient of the scale is summed over rows by each program in
float32, then over programs: deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from implementations.engine import Unsupported

# Elements of a tile: 16 a thread are two 16-byte loads of bfloat16 an operand, enough in flight for
# the memory's latency and few enough that float32 copies of three operands stay in registers.
TILE = 2048
PER_WARP = 512
MAX_WARPS = 16
# Warps of the backward pass on a processor: as many as find registers, 128 a thread. More programs
# would only write more rows of partial sums.
WARPS_A_PROCESSOR = 16


def rms_norm(x_BTD: Tensor, scale_D: Tensor, eps: float, variant: str) -> Tensor:
    """In x's dtype; computed in float32 (plain: float64 in float64)."""
    _check(x_BTD, scale_D)
    return VARIANTS[check(variant)](x_BTD, None, scale_D, eps)[1]


def add_rms_norm(
    x_BTD: Tensor, branch_BTD: Tensor, scale_D: Tensor, eps: float, variant: str
) -> tuple[Tensor, Tensor]:
    """(x + branch, the norm of that sum), both in x's dtype: the norm is of the rounded sum."""
    _check(x_BTD, scale_D)
    if branch_BTD.shape != x_BTD.shape or branch_BTD.dtype != x_BTD.dtype:
        raise ValueError(
            f"add_rms_norm needs x and branch of one shape and dtype; got {x_BTD.dtype} "
            f"{tuple(x_BTD.shape)} and {branch_BTD.dtype} {tuple(branch_BTD.shape)}."
        )
    return VARIANTS[check(variant)](x_BTD, branch_BTD, scale_D, eps)


def check(variant: str) -> str:
    """The variant of kernels.layers, when this backend has it; else Unsupported."""
    if variant not in VARIANTS:
        raise Unsupported(
            f"kernels.layers={variant} is not offered by the torch backend; "
            f"offered: {', '.join(VARIANTS)}."
        )
    return variant


def _check(x_BTD: Tensor, scale_D: Tensor) -> None:
    if scale_D.shape != x_BTD.shape[-1:]:
        raise ValueError(
            f"rms_norm needs one scale a channel; got x {tuple(x_BTD.shape)} and scale "
            f"{tuple(scale_D.shape)}."
        )


def _plain(
    x_BTD: Tensor, branch_BTD: Tensor | None, scale_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if branch_BTD is not None:
        x_BTD = x_BTD + branch_BTD
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    wide_BTD = x_BTD.to(wide)
    rms_inverse = torch.rsqrt((wide_BTD * wide_BTD).mean(-1, keepdim=True) + eps)
    scale_D = scale_D.to(x_BTD.dtype).to(wide)
    return x_BTD, (wide_BTD * rms_inverse * (1 + scale_D)).to(x_BTD.dtype)


def _triton(
    x_BTD: Tensor, branch_BTD: Tensor | None, scale_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if x_BTD.dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"kernels.layers=triton has no norm in {x_BTD.dtype}; use plain.")
    if branch_BTD is None:
        return x_BTD, _RMSNorm.apply(x_BTD.contiguous(), scale_D.contiguous(), eps)
    return _AddRMSNorm.apply(x_BTD.contiguous(), branch_BTD.contiguous(), scale_D.contiguous(), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        _, y_BTD = _forward(x_BTD, None, scale_D, eps)
        ctx.save_for_backward(x_BTD, scale_D)
        ctx.eps = eps
        return y_BTD

    @staticmethod
    def backward(ctx, dy_BTD: Tensor) -> tuple:
        dx_BTD, dscale_D = _backward(*ctx.saved_tensors, ctx.eps, None, dy_BTD)
        return dx_BTD, dscale_D, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_BTD: Tensor, branch_BTD: Tensor, scale_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        sum_BTD, y_BTD = _forward(x_BTD, branch_BTD, scale_D, eps)
        ctx.save_for_backward(sum_BTD, scale_D)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return sum_BTD, y_BTD

    @staticmethod
    def backward(ctx, dsum_BTD: Tensor | None, dy_BTD: Tensor | None) -> tuple:
        if dy_BTD is None:
            return dsum_BTD, dsum_BTD, None, None
        dx_BTD, dscale_D = _backward(*ctx.saved_tensors, ctx.eps, dsum_BTD, dy_BTD)
        return dx_BTD, dx_BTD, dscale_D, None


def _forward(
    x_BTD: Tensor, branch_BTD: Tensor | None, scale_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    D = x_BTD.shape[-1]
    num_rows = x_BTD.numel() // D
    block_rows, block_D, num_warps = _tile(D)
    y_BTD = torch.empty_like(x_BTD)
    sum_BTD = x_BTD if branch_BTD is None else torch.empty_like(x_BTD)
    if num_rows:
        _rms_norm_fwd_kernel[(triton.cdiv(num_rows, block_rows),)](
            x_BTD,
            branch_BTD,
            scale_D,
            sum_BTD,
            y_BTD,
            num_rows,
            EPS=eps,
            D=D,
            HAS_BRANCH=branch_BTD is not None,
            BLOCK_ROWS=block_rows,
            BLOCK_D=block_D,
            num_warps=num_warps,
        )
    return sum_BTD, y_BTD


def _backward(
    x_BTD: Tensor, scale_D: Tensor, eps: float, dsum_BTD: Tensor | None, dy_BTD: Tensor
) -> tuple[Tensor, Tensor]:
    D = x_BTD.shape[-1]
    num_rows = x_BTD.numel() // D
    block_rows, block_D, num_warps = _tile(D)
    num_programs = min(triton.cdiv(num_rows, block_rows), _num_programs(x_BTD, num_warps))
    dx_BTD = torch.empty_like(x_BTD)
    partial_PD = x_BTD.new_empty(num_programs, D, dtype=torch.float32)
    if num_rows:
        _rms_norm_bwd_kernel[(num_programs,)](
            x_BTD,
            scale_D,
            dsum_BTD if dsum_BTD is None else dsum_BTD.contiguous(),
            dy_BTD.contiguous(),
            dx_BTD,
            partial_PD,
            num_rows,
            EPS=eps,
            D=D,
            HAS_DSUM=dsum_BTD is not None,
            BLOCK_ROWS=block_rows,
            BLOCK_D=block_D,
            num_warps=num_warps,
        )
    return dx_BTD, partial_PD.sum(0).to(scale_D.dtype)


def _tile(D: int) -> tuple[int, int, int]:
    """(rows, channels, warps) of a program: whole rows, and several where they are short."""
    block_D = triton.next_power_of_2(D)
    block_rows = max(TILE // block_D, 1)
    num_warps = min(max(block_rows * block_D // PER_WARP, 1), MAX_WARPS)
    return block_rows, block_D, num_warps


def _num_programs(x: Tensor, num_warps: int) -> int:
    """Each walks over rows; away from a GPU (the interpreter) so few that each has several."""
    if not x.is_cuda:
        return 2
    properties = torch.cuda.get_device_properties(x.device)
    return WARPS_A_PROCESSOR // num_warps * properties.multi_processor_count


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_fwd_kernel(
    x_ptr,  # [num_rows, D]
    branch_ptr,  # [num_rows, D], or None
    scale_ptr,  # [D]
    sum_ptr,  # [num_rows, D]: written with a branch
    y_ptr,  # [num_rows, D]
    num_rows,
    EPS: tl.constexpr,  # a float argument would be a double in a program of Inductor
    D: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_D)
    mask = (first + row < num_rows)[:, None] & (channel < D)[None, :]
    # int64: num_rows * D passes 2**31 in the long sweeps; offsets within a tile need few registers.
    start = first.to(tl.int64) * D
    at = row[:, None] * D + channel[None, :]

    x = tl.load(x_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        x += tl.load(branch_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + start + at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.load(scale_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
    rms_inverse = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
    y = x * rms_inverse[:, None] * (1 + scale)[None, :]
    tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_bwd_kernel(
    x_ptr,  # [num_rows, D]: what the norm was of
    scale_ptr,  # [D]
    dsum_ptr,  # [num_rows, D], or None
    dy_ptr,  # [num_rows, D]
    dx_ptr,  # [num_rows, D]
    partial_ptr,  # [programs, D] float32: of the scale's gradient
    num_rows,
    EPS: tl.constexpr,  # a float argument would be a double in a program of Inductor
    D: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < D
    scale = tl.load(scale_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    gain = (1 + scale)[None, :]
    dscale = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)

    row = tl.arange(0, BLOCK_ROWS)
    at = row[:, None] * D + channel[None, :]
    num_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    # A stride of all programs: neighbours read neighbouring rows at one time.
    for block in tl.range(program, num_blocks, tl.num_programs(0), num_stages=2):
        mask = (block * BLOCK_ROWS + row < num_rows)[:, None] & is_channel[None, :]
        start = tl.cast(block, tl.int64) * (BLOCK_ROWS * D)
        x = tl.load(x_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        rms_inverse = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
        unit = x * rms_inverse
        dscale += dy * unit
        dunit = dy * gain
        along = (tl.sum(dunit * unit, 1) / D)[:, None]
        dx = rms_inverse * (dunit - unit * along)
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + start + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    total = tl.sum(dscale, 0)
    tl.store(partial_ptr + program * D + channel, total, mask=is_channel)


VARIANTS = {"plain": _plain, "triton": _triton}
