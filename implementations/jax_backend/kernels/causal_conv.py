"""Causal convolution over time, one filter a channel, within documents, one variant per name.

Twin: implementations/torch_backend/kernels/causal_conv.py.  Truth: implementations/reference.py.
"""

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
        start = width - 1 - offset
        inside_BT1 = (position_BT >= offset)[:, :, None]
        shifted_BTR = jnp.where(inside_BT1, past_BTR[:, start : start + T], 0)
        y_BTR = y_BTR + shifted_BTR.astype(dtype) * weight_WR[width - 1 - offset]
    if bias_R is not None:
        y_BTR = y_BTR + bias_R.astype(dtype)
    return y_BTR.astype(x_BTR.dtype), past_BTR[:, T:]


VARIANTS = {"plain": _plain}
