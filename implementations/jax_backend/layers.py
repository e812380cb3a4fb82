"""Layers without memory of their own, and the causal convolution: functions of (params, inputs).

Twin: implementations/torch_backend/layers.py.  A weight maps its first axis to its second.
"""

import jax
import jax.numpy as jnp
from jax import Array

from implementations.engine import IGNORED


def linear(params: dict, x: Array) -> Array:
    """x @ weight + bias. Rows are flattened first: XLA takes its fast matrix product for 2D alone
    (on 2 CPU cores, [4, 1024, 256] @ [256, 768] with its gradients: 50 ms, not 94)."""
    y = x.reshape(-1, x.shape[-1]) @ params["weight"]
    y = y + params["bias"] if "bias" in params else y
    return y.reshape(*x.shape[:-1], y.shape[-1])


def rms_norm(params: dict, x: Array, eps: float) -> Array:
    """x / rms(x) * (1 + scale), in float32 (float64 in float64)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(dtype)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * (1 + params["scale"].astype(dtype))).astype(x.dtype)


def gelu(x: Array) -> Array:
    """The tanh approximation (released code)."""
    return jax.nn.gelu(x, approximate=True)


def causal_conv(
    params: dict, x_BTR: Array, position_BT: Array, conv_BWR: Array
) -> tuple[Array, Array]:
    """One filter a channel over time; weight[-1] meets the current input. Carries conv_width - 1
    inputs; those from before the document start count as 0."""
    weight_WR = params["weight"]
    T, width = x_BTR.shape[1], weight_WR.shape[0]
    past_BTR = jnp.concatenate([conv_BWR, x_BTR], axis=1)
    y_BTR = x_BTR * weight_WR[-1]
    for offset in range(1, width):
        start = width - 1 - offset
        inside_BT1 = (position_BT >= offset)[:, :, None]
        shifted_BTR = jnp.where(inside_BT1, past_BTR[:, start : start + T], 0)
        y_BTR = y_BTR + shifted_BTR * weight_WR[width - 1 - offset]
    if "bias" in params:
        y_BTR = y_BTR + params["bias"]
    return y_BTR, past_BTR[:, T:]


def block_diagonal(params: dict, x_BTR: Array) -> Array:
    """One small linear layer for each of the G blocks of channels."""
    B, T, R = x_BTR.shape
    G, width, _ = params["weight"].shape
    x = x_BTR.reshape(B * T, G, width).swapaxes(0, 1)  # G leads: a plain batch of products
    y_BTR = (x @ params["weight"]).swapaxes(0, 1).reshape(B, T, R)
    return y_BTR + params["bias"] if "bias" in params else y_BTR


def mlp(params: dict, x_BTD: Array) -> Array:
    gate_BTF = gelu(linear(params["linear_gate"], x_BTD))
    return linear(params["linear_down"], gate_BTF * linear(params["linear_up"], x_BTD))


def embed(params: dict, tokens_BT: Array, *, is_scaled: bool) -> Array:
    x_BTD = params["weight"][tokens_BT]
    return x_BTD * jnp.asarray(x_BTD.shape[-1] ** 0.5, x_BTD.dtype) if is_scaled else x_BTD


def unembed(params: dict, x_BTD: Array, soft_cap: float | None) -> Array:
    """Logits from the tied embedding, float32 (float64 in float64)."""
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    B, T, D = x_BTD.shape
    logits = jnp.einsum(
        "xd,vd->xv", x_BTD.reshape(B * T, D), params["weight"], preferred_element_type=dtype
    )
    logits_BTV = logits.reshape(B, T, -1)
    return logits_BTV if soft_cap is None else soft_cap * jnp.tanh(logits_BTV / soft_cap)


def cross_entropy(logits_BTV: Array, targets_BT: Array) -> Array:
    """Negative log likelihood of each target, nats; 0 where IGNORED."""
    is_scored_BT = targets_BT != IGNORED
    index_BT1 = jnp.where(is_scored_BT, targets_BT, 0)[:, :, None]
    target_BT = jnp.take_along_axis(logits_BTV, index_BT1, axis=-1)[:, :, 0]
    return jnp.where(is_scored_BT, jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT, 0)
