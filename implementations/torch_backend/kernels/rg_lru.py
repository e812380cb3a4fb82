"""The RG-LRU from its gates' pre-activations to its states: equations 1 to 4 and 6, by variant.

Twin: implementations/jax_backend/kernels/rg_lru.py.  Truth: implementations/mixers/rg_lru.py.
Source: arXiv:2402.19427 section 2.4; the clipped gradient: arXiv:2404.07839 and its code.

The variants are those of linear_scan. `triton` and `triton_split` are one fused kernel a direction,
which walks time as linear_scan's do. Bytes a step and channel in bfloat16, each moved once: forward
8 (reads x and both pre-activations, writes h), backward 16 (reads those three, h and dh; writes
three gradients); gates and decay are computed again, not stored. `triton_split` reads 6 more
forward and 4 more backward. The biases of the gates are added here, where their sum costs nothing.

The block-diagonal products stay outside. A program that did them would need all channels of a gate
block (R / 16, up to 512) at each step and its two square matrices beside them, 16 to 512 KiB where
a multiprocessor has 227; and the products are matrix products of all tokens, bound by arithmetic,
which the vendor's library does well. What fusing would save is 8 bytes forward. Not measured.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from implementations.torch_backend.kernels.linear_scan import (
    CHUNK_LEN,
    across_segments,
    first_state,
    grid,
    in_chunks,
    linear_scan,
    place,
    refuse_float64,
    tile_of,
)

GATE = "rg_lru"  # the formula of decay and input: a compile-time switch of the fused kernels
DECAY = 8.0  # c of equation 3
MAX_SQRT_GRADIENT = 1000.0

LOG2_E = tl.constexpr(1.4426950408889634)
MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


def rg_lru(
    x_BTR: Tensor,
    a_gate_BTR: Tensor,
    input_gate_BTR: Tensor,
    a_bias_R: Tensor | None,
    input_bias_R: Tensor | None,
    a_param_R: Tensor,
    position_BT: Tensor,
    h0_BR: Tensor | None,
    variant: str,
) -> tuple[Tensor, Tensor]:
    """Every state in x's dtype, and the last one in float32 (float64 in float64). The gates come
    before bias and sigmoid; h0 None is zeros. Where position is 0 a document starts: h = i x."""
    B, _, R = x_BTR.shape
    if not x_BTR.shape == a_gate_BTR.shape == input_gate_BTR.shape:
        raise ValueError(
            "rg_lru needs x and both gates of one shape [B, T, R]; got x "
            f"{tuple(x_BTR.shape)}, gates {tuple(a_gate_BTR.shape)}, {tuple(input_gate_BTR.shape)}."
        )
    if position_BT.shape != x_BTR.shape[:2]:
        raise ValueError(
            f"position must be {tuple(x_BTR.shape[:2])}, got {tuple(position_BT.shape)}."
        )
    wide = torch.float64 if x_BTR.dtype == torch.float64 else torch.float32
    if h0_BR is None:
        h0_BR = x_BTR.new_zeros((B, R), dtype=wide)
    of_channels = (a_param_R, *(b for b in (a_bias_R, input_bias_R) if b is not None))
    if h0_BR.shape != (B, R) or h0_BR.dtype != wide or any(v.shape != (R,) for v in of_channels):
        raise ValueError(
            f"rg_lru needs h0 {(B, R)} in {wide}, and a_param and biases {(R,)}; got h0 "
            f"{tuple(h0_BR.shape)} in {h0_BR.dtype}, and {[tuple(v.shape) for v in of_channels]}."
        )
    decay_R = -DECAY * F.softplus(a_param_R.to(wide))
    gates, biases = (x_BTR, a_gate_BTR, input_gate_BTR), (a_bias_R, input_bias_R)
    if variant not in FUSED:
        return _composed(*gates, *biases, decay_R, position_BT, h0_BR, variant)
    refuse_float64(x_BTR, h0_BR)
    if a_bias_R is None:
        biases = 2 * (h0_BR.new_zeros(R),)
    return _RGLRU.apply(*gates, *biases, decay_R, position_BT, h0_BR, FUSED[variant])


def bounded_sqrt(u: Tensor) -> Tensor:
    """sqrt(u), its derivative held to at most MAX_SQRT_GRADIENT."""
    return _BoundedSqrt.apply(u) if u.requires_grad else torch.sqrt(u)


def _composed(
    x_BTR: Tensor,
    a_gate_BTR: Tensor,
    input_gate_BTR: Tensor,
    a_bias_R: Tensor | None,
    input_bias_R: Tensor | None,
    decay_R: Tensor,
    position_BT: Tensor,
    h0_BR: Tensor,
    variant: str,
) -> tuple[Tensor, Tensor]:
    """The equations op by op, and a linear_scan of the variant."""
    wide = h0_BR.dtype
    if a_bias_R is not None:
        a_gate_BTR = a_gate_BTR + a_bias_R.to(x_BTR.dtype)
        input_gate_BTR = input_gate_BTR + input_bias_R.to(x_BTR.dtype)
    r_BTR, i_BTR = torch.sigmoid(a_gate_BTR.to(wide)), torch.sigmoid(input_gate_BTR.to(wide))
    log_a_BTR = r_BTR * decay_R
    # At a document start a = 0 and the scale is 1: exactly what log a = -inf gives.
    log_a_BTR = log_a_BTR.masked_fill((position_BT == 0)[:, :, None], float("-inf"))
    scale_BTR = bounded_sqrt(-torch.expm1(2 * log_a_BTR))  # sqrt(1 - a^2), no cancellation
    x = scale_BTR * i_BTR * x_BTR.to(wide)
    h_BTR, h_BR = linear_scan(torch.exp(log_a_BTR), x, h0_BR, variant)
    return h_BTR.to(x_BTR.dtype), h_BR


class _BoundedSqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return torch.sqrt(u)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grad * 0.5 * torch.rsqrt(u.clamp(min=1 / (4 * MAX_SQRT_GRADIENT**2)))


class _RGLRU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_BTR: Tensor,
        a_gate_BTR: Tensor,
        input_gate_BTR: Tensor,
        a_bias_R: Tensor,
        input_bias_R: Tensor,
        decay_R: Tensor,
        position_BT: Tensor,
        h0_BR: Tensor,
        chunk_len: int | None,
    ) -> tuple[Tensor, Tensor]:
        _, T, R = x_BTR.shape
        gates = (x_BTR.contiguous(), a_gate_BTR.contiguous(), input_gate_BTR.contiguous(),
                 a_bias_R, input_bias_R, decay_R, position_BT.contiguous())  # fmt: skip
        h0_BR, h_BTR = h0_BR.contiguous(), torch.empty_like(gates[0])

        def launch(h0_BCR: Tensor, end_BCR: Tensor, product_BCR: Tensor | None) -> None:
            tile = tile_of("forward", end_BCR)
            _forward_kernel[grid(end_BCR, tile)](
                *gates, h0_BCR, h_BTR, end_BCR, product_BCR,
                T, R, chunk_len or T, GATE, product_BCR is not None, **tile,
            )  # fmt: skip

        h_BR = in_chunks(launch, h0_BR, T, chunk_len)
        ctx.save_for_backward(*gates, h0_BR, h_BTR)
        ctx.chunk_len = chunk_len
        return h_BTR, h_BR

    @staticmethod
    def backward(ctx, dh_BTR: Tensor, dh_BR: Tensor) -> tuple[Tensor | None, ...]:
        *gates, h0_BR, h_BTR = ctx.saved_tensors
        (B, T, R), (a_bias_R, input_bias_R) = h_BTR.shape, gates[3:5]
        dh_BTR = dh_BTR.contiguous()
        dx_BTR, da_gate_BTR, dinput_gate_BTR = (torch.empty_like(x) for x in gates[:3])
        num_chunks = -(-T // (ctx.chunk_len or T))
        # of decay and both biases: a row for each program, then one sum, the same every time
        sums_XBCR = h0_BR.new_empty(3, B, num_chunks, R)

        def launch(flow_BCR: Tensor, end_BCR: Tensor, product_BCR: Tensor | None) -> None:
            tile = tile_of("backward", end_BCR)
            _backward_kernel[grid(end_BCR, tile)](
                *gates, h0_BR, h_BTR, dh_BTR, flow_BCR, end_BCR, product_BCR,
                dx_BTR, da_gate_BTR, dinput_gate_BTR, *sums_XBCR.unbind(0),
                T, R, ctx.chunk_len or T, GATE, MAX_SQRT_GRADIENT, product_BCR is not None, **tile,
            )  # fmt: skip

        dh0_BR = in_chunks(launch, dh_BR.contiguous(), T, ctx.chunk_len)
        ddecay_R, da_bias_R, dinput_bias_R = sums_XBCR.sum((1, 2)).unbind(0)
        return (dx_BTR, da_gate_BTR, dinput_gate_BTR, da_bias_R.to(a_bias_R.dtype),
                dinput_bias_R.to(input_bias_R.dtype), ddecay_R, None, dh0_BR, None)  # fmt: skip


@triton.jit(do_not_specialize=["T", "chunk_len"])
def _forward_kernel(
    x_ptr,  # [B, T, R]
    a_gate_ptr,  # [B, T, R]
    input_gate_ptr,  # [B, T, R]
    a_bias_ptr,  # [R]
    input_bias_ptr,  # [R]
    decay_ptr,  # [R] float32: log a where the recurrence gate is 1
    position_ptr,  # [B, T]
    h0_ptr,  # [B, C, R] float32
    h_ptr,  # [B, T, R], written unless ONLY_ENDS
    end_ptr,  # [B, C, R] float32, written
    product_ptr,  # [B, C, R] float32, written if ONLY_ENDS
    T,
    R,
    chunk_len,
    GATE: tl.constexpr,
    ONLY_ENDS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    batch, channel, inside, segment, of_row, of_chunk, start, stop = place(
        T, R, chunk_len, SEGMENTS, BLOCK_R
    )
    decay = tl.load(decay_ptr + channel, mask=inside, other=0.0)
    a_bias = tl.load(a_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    input_bias = tl.load(input_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)

    h = first_state(h0_ptr + of_chunk, inside, ONLY_ENDS, SEGMENTS, BLOCK_R)
    whole = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
    for tile in tl.range(start, stop, SEGMENTS * ROWS, num_stages=NUM_STAGES):
        products, totals = (), ()
        product = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
        total = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
        for row in tl.static_range(ROWS):
            t = (tile + segment * ROWS + row).to(tl.int64)
            at, mask = of_row + t * R, (t < stop) & inside
            position = tl.load(position_ptr + batch * T + t, mask=t < stop, other=1)
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            a_gate = tl.load(a_gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
            input_gate = tl.load(input_gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
            keep, jump = keep_and_jump(position, t < stop)
            a, inflow = step(x, a_gate, input_gate, a_bias, input_bias, decay, keep, jump, GATE)
            product = a * product
            total = a * total + inflow
            products += (product,)
            totals += (total,)
        before, h, product = across_segments(product, total, h, segment, SEGMENTS, BLOCK_R)
        whole *= product
        if not ONLY_ENDS:
            for row in tl.static_range(ROWS):
                t = (tile + segment * ROWS + row).to(tl.int64)
                state = products[row] * before + totals[row]
                mask = (t < stop) & inside
                tl.store(h_ptr + of_row + t * R, state.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(end_ptr + of_chunk + 0 * segment, h, mask=(segment == 0) & inside)
    if ONLY_ENDS:
        tl.store(product_ptr + of_chunk + 0 * segment, whole, mask=(segment == 0) & inside)


@triton.jit(do_not_specialize=["T", "chunk_len"])
def _backward_kernel(
    x_ptr,  # [B, T, R]
    a_gate_ptr,  # [B, T, R]
    input_gate_ptr,  # [B, T, R]
    a_bias_ptr,  # [R]
    input_bias_ptr,  # [R]
    decay_ptr,  # [R] float32
    position_ptr,  # [B, T]
    h0_ptr,  # [B, R] float32
    h_ptr,  # [B, T, R]
    dh_ptr,  # [B, T, R]
    flow_ptr,  # [B, C, R] float32: what reaches a chunk's last state from later ones
    end_ptr,  # [B, C, R] float32, written: what leaves its first state for earlier ones
    product_ptr,  # [B, C, R] float32, written if ONLY_ENDS; all below unless ONLY_ENDS
    dx_ptr,  # [B, T, R]
    da_gate_ptr,  # [B, T, R]
    dinput_gate_ptr,  # [B, T, R]
    ddecay_ptr,  # [B, C, R] float32
    da_bias_ptr,  # [B, C, R] float32
    dinput_bias_ptr,  # [B, C, R] float32
    T,
    R,
    chunk_len,
    GATE: tl.constexpr,
    MAX_SQRT_GRADIENT: tl.constexpr,
    ONLY_ENDS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """With g_t the whole gradient of h_t: g_t = dh_t + flow_t, flow_{t-1} = a_t g_t; time runs
    backwards, u = T - 1 - t."""
    batch, channel, inside, segment, of_row, of_chunk, start, stop = place(
        T, R, chunk_len, SEGMENTS, BLOCK_R
    )
    decay = tl.load(decay_ptr + channel, mask=inside, other=0.0)
    a_bias = tl.load(a_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    input_bias = tl.load(input_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)

    flow = first_state(flow_ptr + of_chunk, inside, ONLY_ENDS, SEGMENTS, BLOCK_R)
    h0 = first_state(h0_ptr + batch * R + channel, inside, ONLY_ENDS, SEGMENTS, BLOCK_R)
    whole = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
    ddecay = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
    da_bias = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
    dinput_bias = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
    for tile in tl.range(start, stop, SEGMENTS * ROWS, num_stages=NUM_STAGES):
        products, totals, decays = (), (), ()
        product = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
        total = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
        for row in tl.static_range(ROWS):
            u = tile + segment * ROWS + row
            t = (T - 1 - u).to(tl.int64)
            mask = (u < stop) & inside
            position = tl.load(position_ptr + batch * T + t, mask=u < stop, other=1)
            a_gate = tl.load(a_gate_ptr + of_row + t * R, mask=mask, other=0.0).to(tl.float32)
            total += tl.load(dh_ptr + of_row + t * R, mask=mask, other=0.0).to(tl.float32)
            products += (product,)
            totals += (total,)
            keep, jump = keep_and_jump(position, u < stop)
            a, log_a, r = _decay(a_gate, a_bias, decay, keep, jump, GATE)
            decays += ((a, log_a, r, keep),)
            product = a * product
            total = a * total
        before, flow, product = across_segments(product, total, flow, segment, SEGMENTS, BLOCK_R)
        whole *= product
        if not ONLY_ENDS:
            for row in tl.static_range(ROWS):
                u = tile + segment * ROWS + row
                t = (T - 1 - u).to(tl.int64)
                at, mask = of_row + t * R, (u < stop) & inside
                x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
                input_gate = tl.load(input_gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
                h = tl.load(h_ptr + at - R, mask=mask & (t > 0), other=0.0).to(tl.float32)
                h = tl.where(t == 0, h0, h)
                g = products[row] * before + totals[row]
                dx, da_gate, dinput_gate, ddecay_row = _step_grad(
                    g, h, x, input_gate, input_bias, decay, *decays[row], MAX_SQRT_GRADIENT, GATE
                )
                ddecay += ddecay_row
                da_bias += da_gate
                dinput_bias += dinput_gate
                dtype = dx_ptr.dtype.element_ty
                tl.store(dx_ptr + at, dx.to(dtype), mask=mask)
                tl.store(da_gate_ptr + at, da_gate.to(dtype), mask=mask)
                tl.store(dinput_gate_ptr + at, dinput_gate.to(dtype), mask=mask)
    once = (segment == 0) & inside
    tl.store(end_ptr + of_chunk + 0 * segment, flow, mask=once)
    if ONLY_ENDS:
        tl.store(product_ptr + of_chunk + 0 * segment, whole, mask=once)
    else:
        tl.store(ddecay_ptr + of_chunk, tl.sum(ddecay, 0)[None, :], mask=inside)
        tl.store(da_bias_ptr + of_chunk, tl.sum(da_bias, 0)[None, :], mask=inside)
        tl.store(dinput_bias_ptr + of_chunk, tl.sum(dinput_bias, 0)[None, :], mask=inside)


@triton.jit
def step(x, a_gate, input_gate, a_bias, input_bias, decay, keep, jump, GATE: tl.constexpr):
    """(a, inflow) of h_t = a h_{t-1} + inflow."""
    a, log_a, _ = _decay(a_gate, a_bias, decay, keep, jump, GATE)
    return a, _scale(a, log_a)[0] * _sigmoid(input_gate, input_bias) * x


@triton.jit
def _step_grad(
    g, h, x, input_gate, input_bias, decay, a, log_a, r, keep,
    MAX_SQRT_GRADIENT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """What g, the gradient of h_t, and the state h before it make of x, both gates and decay."""
    tl.static_assert(GATE == "rg_lru", "no such gate")
    scale, inverse = _scale(a, log_a)
    i = _sigmoid(input_gate, input_bias)
    # the slope of sqrt(u), 1 / (2 sqrt(u)), is held at its maximum; u = 1 - a^2
    slope = tl.minimum(inverse, 2 * MAX_SQRT_GRADIENT)
    dlog_a = g * a * (h - a * slope * i * x)
    dr = dlog_a * decay * keep
    dscaled = g * scale
    return dscaled * i, dr * r * (1 - r), dscaled * x * i * (1 - i), dlog_a * keep * r


@triton.jit
def _decay(a_gate, a_bias, decay, keep, jump, GATE: tl.constexpr):
    """(a, log a, recurrence gate)."""
    tl.static_assert(GATE == "rg_lru", "no such gate")
    r = _sigmoid(a_gate, a_bias)
    log_a = r * (decay * keep) + jump
    return tl.exp2(log_a * LOG2_E), log_a, r


@triton.jit
def keep_and_jump(position, is_there):
    """log a = keep * (r decay) + jump: at a document start a is 0, beyond the end it is 1."""
    is_start = position == 0
    keep = tl.where(is_start | (is_there == 0), 0.0, 1.0)
    return keep, tl.where(is_start, -1000.0, 0.0)


@triton.jit
def _scale(a, log_a):
    """sqrt(1 - a^2), and 1 over it. 1 - a comes from its series where a is near 1 and the
    difference would cancel (error below 6e-8); 1 - a^2 = (1 - a) (1 + a)."""
    series = 1 / 24 + log_a * (1 / 120 + log_a * (1 / 720))
    series = 1 + log_a * (1 / 2 + log_a * (1 / 6 + log_a * series))
    rest = tl.where(log_a > -0.25, -log_a * series, 1 - a)
    square = rest * (2 - rest)
    inverse = tl.rsqrt(tl.maximum(square, 1e-30))
    return square * inverse, inverse


@triton.jit
def _sigmoid(gate, bias):
    """1 / (1 + exp(-gate - bias)): the reciprocal as the square of a reciprocal root, which is one
    instruction where a division is six."""
    root = tl.rsqrt(1 + tl.exp2(gate * MINUS_LOG2_E + bias * MINUS_LOG2_E))
    return root * root


FUSED = {"triton": None, "triton_split": CHUNK_LEN}  # steps a chunk; the others are composed
