"""Layers without memory of their own, and the causal convolution: functions of (params, inputs).

Twin: implementations/torch_backend/layers.py.  A weight maps its first axis to its second.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from implementations.engine import IGNORED
from implementations.jax_backend.activations import watched


@watched
def linear(params: dict, x: Array) -> Array:
    """x @ weight + bias. Rows are flattened first: XLA takes its fast matrix product for 2D alone
    (on 2 CPU cores, [4, 1024, 256] @ [256, 768] with its gradients: 50 ms, not 94)."""
    y = add_bias(x.reshape(-1, x.shape[-1]) @ params["weight"], params)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def add_bias(y: Array, params: dict) -> Array:
    """y + bias, where there is one, in at least float32: the gradient is a sum over all tokens, and
    one in bfloat16 stops growing at 256 equal terms."""
    if "bias" not in params:
        return y
    return (exact(y) + exact(params["bias"])).astype(y.dtype)


def exact(x: Array) -> Array:
    """x in float32, or in float64 when it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@watched
def rms_norm(params: dict, x: Array, eps: float) -> Array:
    """x / rms(x) * (1 + scale), in float32 (float64 in float64)."""
    wide = exact(x)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * (1 + exact(params["scale"]))).astype(x.dtype)


def gelu(x: Array) -> Array:
    """The tanh approximation (released code)."""
    return _gelu_of_bfloat16(x) if x.dtype == jnp.bfloat16 else _gelu(x)


_gelu = partial(jax.nn.gelu, approximate=True)


@jax.custom_jvp
def _gelu_of_bfloat16(x: Array) -> Array:
    """Computed in float32; its slope, all that the backward pass keeps, rounded once. In bfloat16
    throughout the gradient was wrong by 1.8e-2; so it is by 5e-3, as in PyTorch."""
    return _gelu(exact(x)).astype(x.dtype)


@_gelu_of_bfloat16.defjvp
def _gelu_of_bfloat16_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    y, slope = jax.jvp(_gelu, (exact(x),), (jnp.ones_like(exact(x)),))
    return y.astype(x.dtype), slope.astype(x.dtype) * dx


@watched
def causal_conv(
    params: dict, x_BTR: Array, position_BT: Array, conv_BWR: Array
) -> tuple[Array, Array]:
    """One filter a channel over time; weight[-1] meets the current input. Carries conv_width - 1
    inputs; those from before the document start count as 0. Products are float32, as the gradient
    of a tap is a sum over all tokens."""
    weight_WR = exact(params["weight"])
    T, width = x_BTR.shape[1], weight_WR.shape[0]
    past_BTR = jnp.concatenate([conv_BWR, x_BTR], axis=1)
    y_BTR = exact(x_BTR) * weight_WR[-1]
    for offset in range(1, width):
        start = width - 1 - offset
        inside_BT1 = (position_BT >= offset)[:, :, None]
        shifted_BTR = jnp.where(inside_BT1, past_BTR[:, start : start + T], 0)
        y_BTR = y_BTR + exact(shifted_BTR) * weight_WR[width - 1 - offset]
    return add_bias(y_BTR, params).astype(x_BTR.dtype), past_BTR[:, T:]


@watched
def block_diagonal(params: dict, x_BTR: Array) -> Array:
    """One small linear layer for each of the G blocks of channels."""
    B, T, R = x_BTR.shape
    G, width, _ = params["weight"].shape
    x = x_BTR.reshape(B * T, G, width).swapaxes(0, 1)  # G leads: a plain batch of products
    return add_bias((x @ params["weight"]).swapaxes(0, 1).reshape(B, T, R), params)


@watched
def mlp(params: dict, x_BTD: Array) -> Array:
    gate_BTF = gelu(linear(params["linear_gate"], x_BTD))
    return linear(params["linear_down"], gate_BTF * linear(params["linear_up"], x_BTD))


@watched
def embed(params: dict, tokens_BT: Array, dtype: jnp.dtype, *, is_scaled: bool) -> Array:
    """Rows in dtype. Their gradient is summed in the dtype of the weight."""
    x_BTD = params["weight"][tokens_BT].astype(dtype)
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
