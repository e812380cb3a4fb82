"""The causal depthwise convolution over time, one filter of W taps a channel, and its state.

Twin: implementations/jax_backend/kernels/causal_conv.py.  Truth: implementations/reference.py.

The bias, the masks of document starts, the state before the first input and all casts are in the
one kernel: plain code passes over x once for each of them and for each tap. It is not fused with
the gates that follow: between them lie their block-diagonal matrix products, which need every
channel of a block at once. Bytes an element of bfloat16 (float32: twice as many): forward 4 (reads
x, writes y), backward 6 (reads x, dy; writes dx). A row is read W times, W - 1 of them from the L1
cache: copies to shared memory (cp.async) go past it, so that no load here is made one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from implementations.engine import Unsupported
from implementations.torch_backend.kernels.rms_norm import check

MAX_WIDTH = 8  # the backward pass holds one sum a tap in registers
# Forward, 32 positions by 64 channels in 4 warps: a row of a tile is 128 bytes of bfloat16, a
# thread has two 16-byte loads a tap, and the W - 1 rows that the next tile reads again are few.
BLOCK_T = 32
BLOCK_R = 64
NUM_WARPS = 4
# Backward, half as many, for the sums in registers; a program walks over the tiles of 512
# positions: its partial sums, W + 1 float32 rows, are then under 2 % of the bytes at W = 4.
BACKWARD_BLOCK_T = 16
TILES = 32


def causal_conv(
    x_BTR: Tensor,
    weight_WR: Tensor,
    bias_R: Tensor | None,
    position_BT: Tensor,
    conv_BWR: Tensor | None,
    variant: str,
) -> tuple[Tensor, Tensor]:
    """(y in x's dtype, the last W - 1 inputs). conv_BWR: the W - 1 inputs before x; None: zeros.

    weight[W - 1] meets the current input; inputs from before the document count as 0.
    """
    B, T, R = x_BTR.shape
    width = weight_WR.shape[0]
    if weight_WR.shape != (width, R) or position_BT.shape != (B, T):
        raise ValueError(
            "causal_conv needs x [B, T, R], weight [W, R] and position [B, T]; got x "
            f"{(B, T, R)}, weight {tuple(weight_WR.shape)}, position {tuple(position_BT.shape)}."
        )
    if bias_R is not None and bias_R.shape != (R,):
        raise ValueError(f"causal_conv needs a bias of shape {(R,)}, got {tuple(bias_R.shape)}.")
    if conv_BWR is not None and conv_BWR.shape != (B, width - 1, R):
        raise ValueError(
            f"causal_conv with {width} taps needs a state {(B, width - 1, R)}, "
            f"got {tuple(conv_BWR.shape)}."
        )
    compute = VARIANTS[check(variant)]
    return compute(x_BTR, weight_WR, bias_R, position_BT, conv_BWR)


def _plain(
    x_BTR: Tensor,
    weight_WR: Tensor,
    bias_R: Tensor | None,
    position_BT: Tensor,
    conv_BWR: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, T, R = x_BTR.shape
    weight_WR = weight_WR.to(x_BTR.dtype)
    bias_R = None if bias_R is None else bias_R.to(x_BTR.dtype)
    past = weight_WR.shape[0] - 1
    if conv_BWR is None:
        conv_BWR = x_BTR.new_zeros(B, past, R)
    inputs_BSR = torch.cat([conv_BWR, x_BTR], 1)
    if T == 1:  # the state holds no input from before the document
        out_BTR = (inputs_BSR * weight_WR).sum(1, keepdim=True)
        out_BTR = out_BTR if bias_R is None else out_BTR + bias_R
        return out_BTR, inputs_BSR[:, 1:].clone()
    taps = weight_WR.unbind(0)
    out_BTR = x_BTR * taps[past]
    if bias_R is not None:
        out_BTR = out_BTR + bias_R
    for offset in range(1, past + 1):
        seen_BT1 = (position_BT >= offset)[:, :, None]
        shifted_BTR = inputs_BSR[:, past - offset : past - offset + T]
        out_BTR = torch.addcmul(out_BTR, shifted_BTR * seen_BT1, taps[past - offset])
    return out_BTR, inputs_BSR[:, T:].clone()


def _triton(
    x_BTR: Tensor,
    weight_WR: Tensor,
    bias_R: Tensor | None,
    position_BT: Tensor,
    conv_BWR: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if x_BTR.dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"kernels.layers=triton has no convolution in {x_BTR.dtype}; use plain.")
    if weight_WR.shape[0] > MAX_WIDTH:
        raise Unsupported(
            f"kernels.layers=triton has at most {MAX_WIDTH} taps, not {weight_WR.shape[0]}; "
            "use plain."
        )
    y_BTR = _CausalConv.apply(
        x_BTR.contiguous(),
        weight_WR.contiguous(),
        None if bias_R is None else bias_R.contiguous(),
        position_BT.contiguous(),
        None if conv_BWR is None else conv_BWR.contiguous(),
    )
    return y_BTR, _next_state(x_BTR, conv_BWR, weight_WR.shape[0] - 1)


def _next_state(x_BTR: Tensor, conv_BWR: Tensor | None, past: int) -> Tensor:
    """A copy, whatever T: a view would keep all of x alive. Autograd knows its gradient."""
    B, T, R = x_BTR.shape
    if past <= T:
        return x_BTR[:, T - past :].clone()
    before_BWR = x_BTR.new_zeros(B, past, R) if conv_BWR is None else conv_BWR
    return torch.cat([before_BWR[:, T:], x_BTR], 1)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_BTR: Tensor,
        weight_WR: Tensor,
        bias_R: Tensor | None,
        position_BT: Tensor,
        conv_BWR: Tensor | None,
    ) -> Tensor:
        B, T, R = x_BTR.shape
        y_BTR = torch.empty_like(x_BTR)
        if y_BTR.numel():
            _causal_conv_fwd_kernel[(triton.cdiv(T, BLOCK_T) * triton.cdiv(R, BLOCK_R), B)](
                x_BTR,
                weight_WR,
                bias_R,
                position_BT,
                conv_BWR,
                y_BTR,
                T,
                R=R,
                WIDTH=weight_WR.shape[0],
                HAS_BIAS=bias_R is not None,
                HAS_STATE=conv_BWR is not None,
                BLOCK_T=BLOCK_T,
                BLOCK_R=BLOCK_R,
                num_warps=NUM_WARPS,
            )
        ctx.save_for_backward(x_BTR, weight_WR, bias_R, position_BT, conv_BWR)
        return y_BTR

    @staticmethod
    def backward(ctx, dy_BTR: Tensor) -> tuple:
        x_BTR, weight_WR, bias_R, position_BT, conv_BWR = ctx.saved_tensors
        B, T, R = x_BTR.shape
        width = weight_WR.shape[0]
        dx_BTR = torch.empty_like(x_BTR)
        dconv_BWR = None if conv_BWR is None else torch.empty_like(conv_BWR)
        # With a state one tile more, of the W - 1 inputs before the first.
        num_tiles = triton.cdiv(T, BACKWARD_BLOCK_T) + (conv_BWR is not None)
        num_parts = triton.cdiv(num_tiles, TILES)
        num_sums = width + (bias_R is not None)
        partial_PWR = x_BTR.new_empty(B * num_parts, num_sums, R, dtype=torch.float32)
        if dx_BTR.numel():
            _causal_conv_bwd_kernel[(num_parts * triton.cdiv(R, BLOCK_R), B)](
                x_BTR,
                weight_WR,
                position_BT,
                conv_BWR,
                dy_BTR.contiguous(),
                dx_BTR,
                dconv_BWR,
                partial_PWR,
                T,
                num_parts,
                R=R,
                WIDTH=width,
                HAS_BIAS=bias_R is not None,
                HAS_STATE=conv_BWR is not None,
                TILES=TILES,
                BLOCK_T=BACKWARD_BLOCK_T,
                BLOCK_R=BLOCK_R,
                num_warps=NUM_WARPS,
            )
        sums_WR = partial_PWR.sum(0)
        dbias_R = None if bias_R is None else sums_WR[width].to(bias_R.dtype)
        return dx_BTR, sums_WR[:width].to(weight_WR.dtype), dbias_R, None, dconv_BWR


@triton.jit(do_not_specialize=["T"])
def _causal_conv_fwd_kernel(
    x_ptr,  # [B, T, R]
    weight_ptr,  # [WIDTH, R]
    bias_ptr,  # [R], or None
    position_ptr,  # [B, T]
    conv_ptr,  # [B, WIDTH - 1, R], or None
    y_ptr,  # [B, T, R]
    T,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    PAST: tl.constexpr = WIDTH - 1
    # Blocks of channels lead: programs at one time read whole rows.
    NUM_BLOCKS_R: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    channel = tl.program_id(0) % NUM_BLOCKS_R * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.arange(0, BLOCK_T)
    first = tl.program_id(0) // NUM_BLOCKS_R * BLOCK_T
    time = first + row
    batch = tl.program_id(1).to(tl.int64)  # int64: B * T * R passes 2**31 in the long sweeps
    is_channel = channel < R
    mask = (time < T)[:, None] & is_channel[None, :]
    x_ptr += (batch * T + first) * R
    y_ptr += (batch * T + first) * R
    at = row[:, None] * R + channel[None, :]  # within a tile offsets need few registers
    position = tl.load(position_ptr + batch * T + time, mask=time < T, other=0)

    y = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for offset in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + (PAST - offset) * R + channel, mask=is_channel, other=0.0)
        seen = mask & (position >= offset)[:, None]
        x = tl.load(x_ptr + at - offset * R, mask=seen & (time >= offset)[:, None], other=0.0).to(
            tl.float32
        )
        if HAS_STATE and offset > 0:
            before = (PAST - offset + time)[:, None] * R + channel[None, :]
            seen &= (time < offset)[:, None]
            x += tl.load(conv_ptr + batch * (PAST * R) + before, mask=seen, other=0.0).to(
                tl.float32
            )
        y += x * tap.to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "num_parts"])
def _causal_conv_bwd_kernel(
    x_ptr,  # [B, T, R]
    weight_ptr,  # [WIDTH, R]
    position_ptr,  # [B, T]
    conv_ptr,  # [B, WIDTH - 1, R], or None
    dy_ptr,  # [B, T, R]
    dx_ptr,  # [B, T, R]
    dconv_ptr,  # [B, WIDTH - 1, R], or None
    partial_ptr,  # [B, num_parts, WIDTH + HAS_BIAS, R] float32: of weight and bias
    T,
    num_parts,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Of input `time`, which the outputs up to WIDTH - 1 later saw; those of the state have times
    below 0, and a tile of their own."""
    PAST: tl.constexpr = WIDTH - 1
    NUM_BLOCKS_R: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    channel = tl.program_id(0) % NUM_BLOCKS_R * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(0) // NUM_BLOCKS_R
    batch = tl.program_id(1).to(tl.int64)
    is_channel = channel < R

    sums = ()
    for _ in tl.static_range(WIDTH + HAS_BIAS):
        sums += (tl.zeros([BLOCK_T, BLOCK_R], tl.float32),)
    row = tl.arange(0, BLOCK_T)
    at = row[:, None] * R + channel[None, :]
    first = (part * TILES - HAS_STATE) * BLOCK_T
    last = tl.minimum(first + TILES * BLOCK_T, T)
    for start in range(first, last, BLOCK_T):
        time = start + row
        tile = (batch * T + start) * R
        is_input = (time >= 0) & (time < T)
        mask = is_input[:, None] & is_channel[None, :]
        x = tl.load(x_ptr + tile + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_STATE:
            is_before = ((time < 0) & (time >= -PAST))[:, None] & is_channel[None, :]
            before = batch * (PAST * R) + (PAST + time)[:, None] * R + channel[None, :]
            x += tl.load(conv_ptr + before, mask=is_before, other=0.0).to(tl.float32)
        dx = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        new_sums = ()
        for offset in tl.static_range(WIDTH):
            later = time + offset
            is_output = (later >= 0) & (later < T)
            position = tl.load(position_ptr + batch * T + later, mask=is_output, other=-1)
            seen = (position >= offset)[:, None] & is_channel[None, :]
            dy = tl.load(dy_ptr + tile + offset * R + at, mask=seen, other=0.0).to(tl.float32)
            tap = tl.load(weight_ptr + (PAST - offset) * R + channel, mask=is_channel, other=0.0)
            dx += dy * tap.to(tl.float32)[None, :]
            new_sums += (sums[offset] + dy * x,)
            if HAS_BIAS and offset == 0:
                dbias = sums[WIDTH] + dy
        if HAS_BIAS:
            new_sums += (dbias,)
        sums = new_sums
        tl.store(dx_ptr + tile + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_STATE:
            tl.store(dconv_ptr + before, dx.to(dconv_ptr.dtype.element_ty), mask=is_before)

    sum_row = (batch * num_parts + part) * (WIDTH + HAS_BIAS)
    for offset in tl.static_range(WIDTH):
        total = tl.sum(sums[offset], 0)
        tl.store(partial_ptr + (sum_row + PAST - offset) * R + channel, total, mask=is_channel)
    if HAS_BIAS:
        tl.store(
            partial_ptr + (sum_row + WIDTH) * R + channel, tl.sum(sums[WIDTH], 0), mask=is_channel
        )


VARIANTS = {"plain": _plain, "triton": _triton}
