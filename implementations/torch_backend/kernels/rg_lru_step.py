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

from implementations.config import GATES, ModelConfig
from implementations.torch_backend.kernels.gate import (
    has_input_gate,
    has_recurrence_gate,
    is_complex,
    keep_and_jump,
    load,
    sigmoid_of,
    softplus_of,
    step,
)
from implementations.torch_backend.kernels.gated_gelu import gelu_of
from implementations.torch_backend.kernels.rope import rotation

BLOCK_R = 256  # of the convolution
BLOCK_B = 16  # rows of a matrix instruction
BLOCK_I = 64
BLOCK_J = 32  # 80 channels a gate block at 16 blocks make 48 programs, 160 make 80


def rg_lru_step(
    gate_BR: Tensor,
    x_BR: Tensor,
    conv_weight_WR: Tensor | None,
    conv_bias_R: Tensor | None,
    a_weight_GIJ: Tensor | None,
    input_weight_GIJ: Tensor | None,
    a_bias_R: Tensor | None,
    input_bias_R: Tensor | None,
    a_param_R: Tensor | None,
    position_B: Tensor,
    conv_BWR: Tensor,
    h_BR: Tensor,
    *,
    theta_R: Tensor | None = None,
    gate: str = "rg_lru",
    decay_exponent: float = ModelConfig.decay_exponent,
    normalize_input: bool = True,
) -> Tensor:
    """gelu(gate) * h, [B, R] in x's dtype. conv_BWR and h_BR (float32) are written in place; for
    inference alone. Where position is 0 a document starts. None is what `gate` has none of, or
    a block without a convolution."""
    kind, (B, R) = GATES[gate], x_BR.shape
    own = R // 2 if kind.is_complex else R
    weights = [v for v in (a_weight_GIJ, input_weight_GIJ) if v is not None]
    G, I, J = weights[0].shape if weights else (1, R, own)  # noqa: E741
    if (
        gate_BR.shape != x_BR.shape
        or h_BR.shape != x_BR.shape
        or G * I != R
        or own != G * J
        or any(v.shape != (G, I, J) for v in weights)
        or (a_weight_GIJ is not None) != kind.has_recurrence_gate
        or (input_weight_GIJ is not None) != kind.has_input_gate
    ):
        raise ValueError(
            f"rg_lru_step with gate={gate} needs gate, x and h of one shape [B, R], and of each "
            f"gate it has equal weights of {own} outputs in all; got gate {tuple(gate_BR.shape)}, "
            f"x {tuple(x_BR.shape)}, h {tuple(h_BR.shape)}, weights "
            f"{[None if v is None else tuple(v.shape) for v in (a_weight_GIJ, input_weight_GIJ)]}."
        )
    W = 0 if conv_weight_WR is None else conv_weight_WR.shape[0]
    taps = [v for v in (conv_weight_WR, conv_bias_R) if v is not None]
    of_gates = [v for v in (a_bias_R, input_bias_R, a_param_R, theta_R) if v is not None]
    if (
        conv_BWR.shape != (B, max(W - 1, 0), R)
        or position_B.shape != (B,)
        or any(v.shape[-1] != R for v in taps)
        or any(v.shape != (own,) for v in of_gates)
        or (a_param_R is not None) != kind.has_a_param
        or (theta_R is not None) != kind.is_complex
    ):
        given = (*taps, conv_BWR, position_B, *of_gates)
        raise ValueError(
            f"rg_lru_step with gate={gate} needs taps [W, {R}], their state [{B}, W - 1, {R}], "
            f"positions [{B}], and biases, a_param and theta [{own}]; got "
            f"{[tuple(v.shape) for v in given]}."
        )
    if not (conv_BWR.is_contiguous() and h_BR.is_contiguous() and h_BR.dtype == torch.float32):
        raise ValueError("rg_lru_step writes conv and h, contiguous, h in float32, in place.")
    convolved_BR = x_BR.contiguous()
    if W:
        convolved_BR = torch.empty_like(convolved_BR)
        _conv_kernel[(triton.cdiv(R, BLOCK_R), B)](
            x_BR.contiguous(), conv_weight_WR.contiguous(), conv_bias_R, conv_BWR, convolved_BR,
            R, W, BLOCK_R, num_warps=1,
        )  # fmt: skip
    out_BR = torch.empty_like(convolved_BR)
    weights = (None if v is None else v.contiguous() for v in (a_weight_GIJ, input_weight_GIJ))
    exponent = 1.0 if kind.has_time_step else decay_exponent
    _gates_kernel[(triton.cdiv(J, BLOCK_J), G, triton.cdiv(B, BLOCK_B))](
        convolved_BR, gate_BR.contiguous(), *weights, a_bias_R, input_bias_R,
        a_param_R, theta_R, position_B.contiguous(), h_BR, out_BR,
        B, R, I, J, exponent, gate, normalize_input, BLOCK_B, BLOCK_I, BLOCK_J, num_warps=4,
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
    a_weight_ptr,  # [G, I, J], or None, as all that the gate does without
    input_weight_ptr,  # [G, I, J]
    a_bias_ptr,  # [G J]
    input_bias_ptr,  # [G J]
    a_param_ptr,  # [G J] float32
    theta_ptr,  # [G J] float32
    position_ptr,  # [B]
    h_ptr,  # [B, R] float32, read and written
    out_ptr,  # [B, R]
    B,
    R,
    I,  # noqa: E741
    J,
    EXPONENT: tl.constexpr,
    GATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
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
    if has_recurrence_gate(GATE) or has_input_gate(GATE):
        for start in tl.range(0, I, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            x = tl.load(
                x_ptr + batch * R + block * I + i[None, :],
                mask=is_row & (i < I)[None, :],
                other=0.0,
            )
            at = (block * I + i[:, None]) * J + j
            mask = (i < I)[:, None] & is_channel
            if has_recurrence_gate(GATE):
                a_weight = tl.load(a_weight_ptr + at, mask=mask, other=0.0).to(x.dtype)
                a_gate = tl.dot(x, a_weight, a_gate, input_precision="ieee")
            if has_input_gate(GATE):
                input_weight = tl.load(input_weight_ptr + at, mask=mask, other=0.0).to(x.dtype)
                input_gate = tl.dot(x, input_weight, input_gate, input_precision="ieee")
    channel = block * J + j
    a_bias = load(a_bias_ptr, channel, is_channel)
    input_bias = load(input_bias_ptr, channel, is_channel)
    decay = -1.0
    if a_param_ptr is not None:
        decay = -EXPONENT * softplus_of(load(a_param_ptr, channel, is_channel))
    keep, jump = keep_and_jump(tl.load(position_ptr + batch, mask=is_row, other=1), is_row)
    gates = (a_gate, input_gate, a_bias, input_bias, decay, keep, jump)
    at, mask = batch * R + channel, is_row & is_channel
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + at, mask=mask, other=0.0)
    a, inflow = step(x, *gates, GATE, NORMALIZE)
    if is_complex(GATE):
        second_at = at + R // 2
        second_x = tl.load(x_ptr + second_at, mask=mask, other=0.0).to(tl.float32)
        second_h = tl.load(h_ptr + second_at, mask=mask, other=0.0)
        _, second_inflow = step(second_x, *gates, GATE, NORMALIZE)
        theta = tl.load(theta_ptr + channel, mask=is_channel, other=0.0)
        cos, sin = rotation(sigmoid_of(a_gate, a_bias), theta)
        first = a * (h * cos - second_h * sin) + inflow
        second = a * (second_h * cos + h * sin) + second_inflow
        _write(first, gate_ptr, h_ptr, out_ptr, at, mask)
        _write(second, gate_ptr, h_ptr, out_ptr, second_at, mask)
    else:
        _write(a * h + inflow, gate_ptr, h_ptr, out_ptr, at, mask)


@triton.jit
def _write(h, gate_ptr, h_ptr, out_ptr, at, mask):
    """The state, and the block's product."""
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, h, mask=mask)
    tl.store(out_ptr + at, (gelu_of(gate) * h).to(out_ptr.dtype.element_ty), mask=mask)
