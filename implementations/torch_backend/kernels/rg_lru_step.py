"""One token of the recurrent block, between its linear layers: convolution, gates, RG-LRU, product.

Twin: implementations/jax_backend/kernels/rg_lru_step.py, where XLA fuses what surrounds the state.
Truth: the same layers called one by one, as for more than one token.

Two kernels. The first convolves and shifts the convolution's state. The second computes both
block-diagonal products, its gates, the next h and the block's product: of each gate block it needs
every convolved channel, which many programs read, so that the shift, in place, must be over. Bytes
a step are those of the gates' weights, 4 R^2 / G in bfloat16, and 8 + 2 (conv_width - 1) times 2
for each channel of the state and 6 for those passing: a launch more costs more than it reads.
It belongs to `triton` and `triton_split` of linear_scan; the other variants call the layers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from implementations.torch_backend.kernels.gated_gelu import gelu_of
from implementations.torch_backend.kernels.rg_lru import DECAY, GATE, keep_and_jump, step

BLOCK_R = 256  # of the convolution
BLOCK_B = 16  # rows of a matrix instruction
BLOCK_I = 64
BLOCK_J = 32  # 80 channels a gate block at 16 blocks make 48 programs, 160 make 80


def rg_lru_step(
    gate_BR: Tensor,
    x_BR: Tensor,
    conv_weight_WR: Tensor,
    conv_bias_R: Tensor | None,
    a_weight_GIJ: Tensor,
    input_weight_GIJ: Tensor,
    a_bias_R: Tensor | None,
    input_bias_R: Tensor | None,
    a_param_R: Tensor,
    position_B: Tensor,
    conv_BWR: Tensor,
    h_BR: Tensor,
) -> Tensor:
    """gelu(gate) * h, [B, R] in x's dtype. conv_BWR and h_BR (float32) are written in place; for
    inference alone. Where position is 0 a document starts."""
    B, R = x_BR.shape
    G, I, J = a_weight_GIJ.shape  # noqa: E741
    if gate_BR.shape != x_BR.shape or h_BR.shape != x_BR.shape or G * J != R or I != J:
        raise ValueError(
            "rg_lru_step needs gate, x and h of one shape [B, R] and R / G by R / G weights; got "
            f"gate {tuple(gate_BR.shape)}, x {tuple(x_BR.shape)}, h {tuple(h_BR.shape)}, weights "
            f"{tuple(a_weight_GIJ.shape)}."
        )
    W = conv_weight_WR.shape[0]
    of_channels = [v for v in (conv_bias_R, a_bias_R, input_bias_R, a_param_R) if v is not None]
    if (
        conv_weight_WR.shape != (W, R)
        or conv_BWR.shape != (B, W - 1, R)
        or input_weight_GIJ.shape != a_weight_GIJ.shape
        or position_B.shape != (B,)
        or any(v.shape != (R,) for v in of_channels)
    ):
        given = (conv_weight_WR, conv_BWR, a_weight_GIJ, input_weight_GIJ, position_B, *of_channels)
        raise ValueError(
            f"rg_lru_step needs taps [W, {R}], their state [{B}, W - 1, {R}], equal weights of "
            f"both gates, positions [{B}], and biases and a_param [{R}]; got "
            f"{[tuple(v.shape) for v in given]}."
        )
    if not (conv_BWR.is_contiguous() and h_BR.is_contiguous() and h_BR.dtype == torch.float32):
        raise ValueError("rg_lru_step writes conv and h, contiguous, h in float32, in place.")
    convolved_BR = torch.empty_like(x_BR, memory_format=torch.contiguous_format)
    _conv_kernel[(triton.cdiv(R, BLOCK_R), B)](
        x_BR.contiguous(), conv_weight_WR.contiguous(), conv_bias_R, conv_BWR, convolved_BR,
        R, W, BLOCK_R, num_warps=1,
    )  # fmt: skip
    out_BR = torch.empty_like(convolved_BR)
    _gates_kernel[(triton.cdiv(J, BLOCK_J), G, triton.cdiv(B, BLOCK_B))](
        convolved_BR, gate_BR.contiguous(), a_weight_GIJ.contiguous(),
        input_weight_GIJ.contiguous(), a_bias_R, input_bias_R,
        a_param_R, position_B.contiguous(), h_BR, out_BR,
        B, R, J, DECAY, GATE, BLOCK_B, BLOCK_I, BLOCK_J, num_warps=4,
    )  # fmt: skip
    return out_BR


@triton.jit
def _conv_kernel(
    x_ptr,  # [B, R]
    weight_ptr,  # [W, R]: the last tap meets x
    bias_ptr,  # [R], or None
    conv_ptr,  # [B, W - 1, R], shifted by one input
    out_ptr,  # [B, R]
    R,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    batch = tl.program_id(1).to(tl.int64)
    inside = channel < R
    conv_ptr += batch * (W - 1) * R + channel
    newest = tl.load(x_ptr + batch * R + channel, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + (W - 1) * R + channel, mask=inside, other=0.0).to(tl.float32)
    out = newest.to(tl.float32) * weight
    if bias_ptr is not None:
        out += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for w in tl.static_range(W - 1):
        earlier = tl.load(conv_ptr + w * R, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + w * R + channel, mask=inside, other=0.0).to(tl.float32)
        out += earlier.to(tl.float32) * weight
        if w > 0:
            tl.store(conv_ptr + (w - 1) * R, earlier, mask=inside)
    if W > 1:
        tl.store(conv_ptr + (W - 2) * R, newest.to(conv_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + batch * R + channel, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gates_kernel(
    x_ptr,  # [B, R]
    gate_ptr,  # [B, R]
    a_weight_ptr,  # [G, J, J]
    input_weight_ptr,  # [G, J, J]
    a_bias_ptr,  # [R], or None
    input_bias_ptr,  # [R], or None
    a_param_ptr,  # [R] float32
    position_ptr,  # [B]
    h_ptr,  # [B, R] float32, read and written
    out_ptr,  # [B, R]
    B,
    R,
    J,
    DECAY: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    block = tl.program_id(1)
    batch = (tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    j = (tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J))[None, :]
    is_row, is_channel = batch < B, j < J
    a_gate = tl.zeros((BLOCK_B, BLOCK_J), tl.float32)
    input_gate = tl.zeros((BLOCK_B, BLOCK_J), tl.float32)
    for start in tl.range(0, J, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        x = tl.load(
            x_ptr + batch * R + block * J + i[None, :], mask=is_row & (i < J)[None, :], other=0.0
        )
        at = (block * J + i[:, None]) * J + j
        mask = (i < J)[:, None] & is_channel
        a_weight = tl.load(a_weight_ptr + at, mask=mask, other=0.0).to(x.dtype)
        input_weight = tl.load(input_weight_ptr + at, mask=mask, other=0.0).to(x.dtype)
        a_gate = tl.dot(x, a_weight, a_gate, input_precision="ieee")
        input_gate = tl.dot(x, input_weight, input_gate, input_precision="ieee")
    channel = block * J + j
    a_bias = tl.zeros((1, BLOCK_J), tl.float32)
    input_bias = tl.zeros((1, BLOCK_J), tl.float32)
    if a_bias_ptr is not None:
        a_bias += tl.load(a_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        input_bias += tl.load(input_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    a_param = tl.load(a_param_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    decay = -DECAY * _softplus(a_param)
    keep, jump = keep_and_jump(tl.load(position_ptr + batch, mask=is_row, other=1), is_row)
    at, mask = batch * R + channel, is_row & is_channel
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    a, inflow = step(x, a_gate, input_gate, a_bias, input_bias, decay, keep, jump, GATE)
    h = a * tl.load(h_ptr + at, mask=mask, other=0.0) + inflow
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, h, mask=mask)
    tl.store(out_ptr + at, (gelu_of(gate) * h).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to the last digits, where exp(x) is small too: log(1 + u) = 2 artanh(s)."""
    u = tl.exp(-tl.abs(x))
    s = u / (2 + u)
    square = s * s
    series = 1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * series))
    return tl.maximum(x, 0.0) + 2 * s * series
