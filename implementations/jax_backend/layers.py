"""Layers without memory of their own, and the causal convolution: functions of (params, inputs).

Twin: implementations/torch_backend/layers.py.  A weight maps its first axis to its second.
"""

import jax.numpy as jnp
from jax import Array

from implementations.jax_backend.activations import watched
from implementations.jax_backend.kernels import causal_conv as causal_conv_kernel
from implementations.jax_backend.kernels import cross_entropy
from implementations.jax_backend.kernels import rms_norm as rms_norm_kernel
from implementations.jax_backend.kernels.gated_gelu import gated_gelu


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
def rms_norm(params: dict, x_BTD: Array, eps: float, variant: str) -> Array:
    return rms_norm_kernel.rms_norm(x_BTD, params["scale"], eps, variant)


def add_rms_norm(
    params: dict, x_BTD: Array, branch_BTD: Array, eps: float, variant: str
) -> tuple[Array, Array]:
    """x + branch, and the norm of that sum: the sum is what the norm is given."""
    inputs = (x_BTD, branch_BTD, params["scale"])
    x_BTD, normed_BTD = rms_norm_kernel.add_rms_norm(*inputs, eps, variant)
    return x_BTD, watched(lambda params, x_BTD: normed_BTD)(params, x_BTD)


@watched
def causal_conv(
    params: dict, x_BTR: Array, position_BT: Array, conv_BWR: Array, variant: str
) -> tuple[Array, Array]:
    weight_WR, bias_R = params["weight"], params.get("bias")
    return causal_conv_kernel.causal_conv(x_BTR, weight_WR, bias_R, position_BT, conv_BWR, variant)


@watched
def block_diagonal(params: dict, x_BTR: Array) -> Array:
    """One small linear layer for each of the G blocks of channels."""
    B, T, _ = x_BTR.shape
    G, width, _ = params["weight"].shape
    x = x_BTR.reshape(B * T, G, width).swapaxes(0, 1)  # G leads: a plain batch of products
    return add_bias((x @ params["weight"]).swapaxes(0, 1).reshape(B, T, -1), params)


@watched
def mlp(params: dict, x_BTD: Array, variant: str) -> Array:
    gate_BTF = linear(params["linear_gate"], x_BTD)
    up_BTF = linear(params["linear_up"], x_BTD)
    return linear(params["linear_down"], gated_gelu(gate_BTF, up_BTF, variant))


@watched
def embed(params: dict, tokens_BT: Array, dtype: jnp.dtype, *, is_scaled: bool) -> Array:
    """Rows in dtype. Their gradient is summed in the dtype of the weight."""
    x_BTD = params["weight"][tokens_BT].astype(dtype)
    return x_BTD * jnp.asarray(x_BTD.shape[-1] ** 0.5, x_BTD.dtype) if is_scaled else x_BTD


def unembed(params: dict, x_BTD: Array, soft_cap: float | None) -> Array:
    """Logits from the tied embedding, float32 (float64 in float64)."""
    return cross_entropy.unembed(x_BTD, params["weight"], soft_cap)
