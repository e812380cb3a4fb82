"""Rotary positions: channel i of every head turns against channel i + rope_dim / 2, the rest stay.

Twin: `rope` in implementations/jax_backend/kernels/rope.py.  Truth: implementations/reference.py.

The angle is position * base^(-2 i / rope_dim), a float32 product of float32 numbers (float64 in
float64). The kernel reads and writes every element once, in bfloat16 4 bytes an element, forward
and backward: a turn is undone by the turn back, and nothing is saved but the positions.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from implementations.engine import Unsupported
from implementations.torch_backend.kernels.rms_norm import check

# Channels of one program: 32 a thread, in bfloat16 two loads of 16 bytes from either half of each.
NUM_CHANNELS = 4096
NUM_WARPS = 4
HALF_PI = tl.constexpr(1.5707963267948966)
PER_HALF_PI = tl.constexpr(0.6366197723675814)


def rope(x_BTNH: Tensor, position_BT: Tensor, rope_dim: int, base: float, variant: str) -> Tensor:
    B, T, _, H = x_BTNH.shape
    if position_BT.shape != (B, T):
        raise ValueError(f"rope needs positions {(B, T)}, got {tuple(position_BT.shape)}.")
    if rope_dim % 2 or not 0 <= rope_dim <= H:
        raise ValueError(f"rope_dim must be even and at most head_dim={H}, got {rope_dim}.")
    return VARIANTS[check(variant)](x_BTNH, position_BT, rope_dim, base) if rope_dim else x_BTNH


def rates(half: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians per position, [half]."""
    exponent = torch.arange(half, dtype=dtype, device=device) / half
    return 1 / base**exponent


@cache  # the launches that make the rates cost more than a kernel that reads them
def float32_rates(half: int, base: float, device: torch.device) -> Tensor:
    return rates(half, base, torch.float32, device)


def _plain(x_BTNH: Tensor, position_BT: Tensor, rope_dim: int, base: float) -> Tensor:
    half, dtype = rope_dim // 2, torch.promote_types(x_BTNH.dtype, torch.float32)
    rate_H = rates(half, base, dtype, x_BTNH.device)
    angle_BT1H = position_BT[:, :, None, None].to(dtype) * rate_H
    cos, sin = angle_BT1H.cos(), angle_BT1H.sin()
    first, second = x_BTNH[..., :half].to(dtype), x_BTNH[..., half:rope_dim].to(dtype)
    turned = [first * cos - second * sin, second * cos + first * sin]
    turned = [part.to(x_BTNH.dtype) for part in turned]
    return torch.cat([*turned, x_BTNH[..., rope_dim:]], -1)


def _triton(x_BTNH: Tensor, position_BT: Tensor, rope_dim: int, base: float) -> Tensor:
    if x_BTNH.dtype == torch.float64:
        raise Unsupported("kernels.layers=triton computes in float32, not in float64.")
    return _Rope.apply(x_BTNH, position_BT, rope_dim, base)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTNH: Tensor, position_BT: Tensor, rope_dim: int, base: float) -> Tensor:
        ctx.save_for_backward(position_BT)
        ctx.rotation = rope_dim, base
        return _turned(x_BTNH, position_BT, rope_dim, base, is_back=False)

    @staticmethod
    def backward(ctx, dy_BTNH: Tensor) -> tuple[Tensor | None, ...]:
        [position_BT] = ctx.saved_tensors
        return _turned(dy_BTNH, position_BT, *ctx.rotation, is_back=True), None, None, None


def _turned(
    x_BTNH: Tensor, position_BT: Tensor, rope_dim: int, base: float, is_back: bool
) -> Tensor:
    B, T, N, H = x_BTNH.shape
    x_BTNH, position_BT = x_BTNH.contiguous(), position_BT.contiguous()
    y_BTNH = torch.empty_like(x_BTNH)
    half = rope_dim // 2
    blocks = _blocks(N, H, half)
    grid = (triton.cdiv(T, blocks["BLOCK_T"]), triton.cdiv(N, blocks["BLOCK_N"]), B)
    _rope_kernel[grid](
        x_BTNH,
        position_BT,
        float32_rates(half, base, x_BTNH.device),
        y_BTNH,
        T,
        N=N,
        H=H,
        HALF=half,
        IS_BACK=is_back,
        **blocks,
        num_warps=NUM_WARPS,
    )
    return y_BTNH


def _blocks(N: int, H: int, half: int) -> dict[str, int]:
    """A program takes as many heads as it can: they share cosines and sines."""
    BLOCK_C, rest = triton.next_power_of_2(half), H - 2 * half
    BLOCK_REST = triton.next_power_of_2(rest) if rest else 0
    num_vectors = max(NUM_CHANNELS // triton.next_power_of_2(2 * BLOCK_C + BLOCK_REST), 1)
    BLOCK_N = min(triton.next_power_of_2(N), num_vectors)
    return {
        "BLOCK_T": num_vectors // BLOCK_N,
        "BLOCK_N": BLOCK_N,
        "BLOCK_C": BLOCK_C,
        "BLOCK_REST": BLOCK_REST,
    }


@triton.jit(do_not_specialize=["T"])
def _rope_kernel(
    x_ptr,  # [B, T, N, H]
    position_ptr,  # [B, T]
    rate_ptr,  # [HALF] float32
    y_ptr,  # [B, T, N, H]
    T,
    N: tl.constexpr,
    H: tl.constexpr,
    HALF: tl.constexpr,
    IS_BACK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # of the channels that stay; 0: none
):
    start = tl.program_id(0) * BLOCK_T
    batch = tl.program_id(2).to(tl.int64)  # int64: B * T * N * H passes 2**31
    time = start + tl.arange(0, BLOCK_T)
    head = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_C)

    rate = tl.load(rate_ptr + channel, mask=channel < HALF, other=0.0)
    position = tl.load(position_ptr + batch * T + time, mask=time < T, other=0)
    cos, sin = rotation(position[:, None], rate[None, :])
    if IS_BACK:
        sin = -sin
    cos, sin = cos[:, None, :], sin[:, None, :]

    first_token = (batch * T + start) * N * H
    x_ptr += first_token
    y_ptr += first_token
    offset = (tl.arange(0, BLOCK_T)[:, None] * N + head[None, :]) * H
    inside = (time < T)[:, None] & (head < N)[None, :]
    low = offset[:, :, None] + channel[None, None, :]
    mask = inside[:, :, None] & (channel < HALF)[None, None, :]
    first = tl.load(x_ptr + low, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + low + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + low, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + low + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=mask)
    if BLOCK_REST > 0:
        stays = 2 * HALF + tl.arange(0, BLOCK_REST)
        place = offset[:, :, None] + stays[None, None, :]
        mask = inside[:, :, None] & (stays < H)[None, None, :]
        tl.store(y_ptr + place, tl.load(x_ptr + place, mask=mask, other=0.0), mask=mask)


@triton.jit
def rotation(position, rate):
    """cos and sin of position * rate, to 1e-7 up to 2**24 positions.

    The product is rounded to float32, as in `plain`; quarter turns are taken off in float64, and
    Taylor's series does the rest. The device's own cosine is approximate, or needs a stack.
    """
    angle = (position.to(tl.float32) * rate).to(tl.float64)
    quarters = tl.floor(angle * PER_HALF_PI + 0.5)
    x = (angle - quarters * HALF_PI).to(tl.float32)  # within pi / 4
    z = x * x
    sin = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cos = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 - z * (1 / 3628800)))))
    quarters = quarters.to(tl.int32)
    is_odd = (quarters & 1) == 1
    turned_cos, turned_sin = tl.where(is_odd, sin, cos), tl.where(is_odd, cos, sin)
    turned_cos = tl.where(((quarters + 1) & 2) == 2, -turned_cos, turned_cos)
    turned_sin = tl.where((quarters & 2) == 2, -turned_sin, turned_sin)
    return turned_cos, turned_sin


VARIANTS = {"plain": _plain, "triton": _triton}
