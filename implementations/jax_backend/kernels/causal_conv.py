"""Causal convolution over time, one filter a channel, within documents, one variant per name.

Twin: implementations/torch_backend/kernels/causal_conv.py.  Truth: implementations/reference.py.

What XLA moves on a TPU is counted by benchmarks/compiled_bytes.py: at B=8, T=2048, R=2560, compiled
for a v5e, forward and backward move 1.2 times what they must (10 bytes an element of bfloat16; x is
read once more). Of the gradient that JAX derives, pads and sums of each tap's slices, they moved
2.2 times that: XLA wrote the terms of three taps before it added them.
"""

import jax
import jax.numpy as jnp
from jax import Array


def causal_conv(
    x_BTR: Array,
    weight_WR: Array,
    bias_R: Array | None,
    position_BT: Array,
    conv_BWR: Array | None,
    variant: str,
) -> tuple[Array, Array]:
    """(y [B, T, R], the last inputs); weight[-1] meets the current input.

    conv_BWR: the conv_width - 1 inputs before x, None for zeros; those from before the document
    start count as 0.
    """
    B, T, R = x_BTR.shape
    past = weight_WR.shape[0] - 1
    if weight_WR.shape[1] != R or (bias_R is not None and bias_R.shape != (R,)):
        raise ValueError(
            f"causal_conv needs a weight [W, {R}] and a bias [{R}]; got weight {weight_WR.shape}, "
            f"bias {None if bias_R is None else bias_R.shape}."
        )
    if position_BT.shape != (B, T):
        raise ValueError(f"causal_conv: position must be {(B, T)}, got {position_BT.shape}.")
    if conv_BWR is None:
        conv_BWR = jnp.zeros((B, past, R), x_BTR.dtype)
    if conv_BWR.shape != (B, past, R):
        raise ValueError(f"causal_conv: state must be {(B, past, R)}, got {conv_BWR.shape}.")
    return VARIANTS[variant](x_BTR, weight_WR, bias_R, position_BT, conv_BWR)


@jax.custom_vjp
def _plain(
    x_BTR: Array, weight_WR: Array, bias_R: Array | None, position_BT: Array, conv_BWR: Array
) -> tuple[Array, Array]:
    """Products and the bias are float32 (float64 in float64), as the gradient of a tap is a sum
    over all tokens."""
    dtype = jnp.promote_types(x_BTR.dtype, jnp.float32)
    weight_WR = weight_WR.astype(dtype)
    T, width = x_BTR.shape[1], weight_WR.shape[0]
    past_BTR = jnp.concatenate([conv_BWR, x_BTR], axis=1)
    y_BTR = x_BTR.astype(dtype) * weight_WR[-1]
    for offset in range(1, width):
        shifted_BTR = _shifted(past_BTR, position_BT, width - 1, offset).astype(dtype)
        y_BTR = y_BTR + shifted_BTR * weight_WR[width - 1 - offset]
    if bias_R is not None:
        y_BTR = y_BTR + bias_R.astype(dtype)
    return y_BTR.astype(x_BTR.dtype), past_BTR[:, T:]


def _shifted(past_BTR: Array, position_BT: Array, past: int, offset: int) -> Array:
    """The inputs that are offset tokens old, 0 where that is before the document."""
    T, start = position_BT.shape[1], past - offset
    inside_BT1 = (position_BT >= offset)[:, :, None]
    return jnp.where(inside_BT1, past_BTR[:, start : start + T], 0)


def _plain_fwd(*inputs: Array | None) -> tuple[tuple[Array, Array], tuple]:
    return _plain(*inputs), inputs


def _plain_bwd(inputs: tuple, doutputs: tuple[Array, Array]) -> tuple:
    x_BTR, weight_WR, bias_R, position_BT, conv_BWR = inputs
    dy_BTR, dlast_BWR = doutputs
    dtype = jnp.promote_types(x_BTR.dtype, jnp.float32)
    T, past = x_BTR.shape[1], weight_WR.shape[0] - 1
    past_BTR = jnp.concatenate([conv_BWR, x_BTR], axis=1)
    dtaps = [
        (_shifted(past_BTR, position_BT, past, offset).astype(dtype) * dy_BTR).sum((0, 1))
        for offset in range(past, -1, -1)
    ]
    dweight_WR = jnp.stack(dtaps).astype(weight_WR.dtype)
    dbias_R = None if bias_R is None else dy_BTR.sum((0, 1), dtype).astype(bias_R.dtype)
    # Of the inputs, those before x apart: together XLA would write the terms of every tap.
    weight_WR = weight_WR.astype(dtype)
    first = ((0, 0), (past, 0))
    dfirst_BTR = jnp.pad(dy_BTR[:, :past], (*first, (0, 0)))
    dconv_BWR = _from_later(dfirst_BTR, jnp.pad(position_BT[:, :past], first), weight_WR)[:, :past]
    dlast_BTR = jnp.pad(dlast_BWR.astype(dtype), ((0, 0), (T, 0), (0, 0)))
    dx_BTR = _from_later(dy_BTR, position_BT, weight_WR) + dlast_BTR[:, past:]
    dconv_BWR = (dconv_BWR + dlast_BTR[:, :past]).astype(conv_BWR.dtype)
    return dx_BTR.astype(x_BTR.dtype), dweight_WR, dbias_R, None, dconv_BWR


def _from_later(dy_BTR: Array, position_BT: Array, weight_WR: Array) -> Array:
    """The gradient of every input, from the tokens that see it, in the dtype of the weight."""
    T, past = dy_BTR.shape[1], weight_WR.shape[0] - 1
    later_BTR = jnp.pad(dy_BTR, ((0, 0), (0, past), (0, 0)))
    later_BT = jnp.pad(position_BT, ((0, 0), (0, past)))
    dx_BTR = dy_BTR.astype(weight_WR.dtype) * weight_WR[-1]
    for offset in range(1, past + 1):
        sees_BT1 = (later_BT[:, offset : offset + T] >= offset)[:, :, None]
        shifted_BTR = jnp.where(sees_BT1, later_BTR[:, offset : offset + T], 0)
        dx_BTR = dx_BTR + shifted_BTR.astype(weight_WR.dtype) * weight_WR[past - offset]
    return dx_BTR


_plain.defvjp(_plain_fwd, _plain_bwd)

VARIANTS = {"plain": _plain}
