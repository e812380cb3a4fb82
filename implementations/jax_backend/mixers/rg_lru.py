"""The recurrent block: two branches, a causal convolution, the RG-LRU, and their product.

Source: arXiv:2402.19427 section 2.4.  Twin: implementations/torch_backend/mixers/rg_lru.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from implementations.config import ModelConfig
from implementations.engine import Kernels
from implementations.jax_backend.activations import watched
from implementations.jax_backend.kernels.linear_scan import linear_scan
from implementations.jax_backend.layers import block_diagonal, causal_conv, gelu, linear

MAX_SQRT_GRADIENT = 1000.0  # clips the derivative of sqrt(1 - a^2) near a = 1 (released code)


class State(NamedTuple):
    conv_BWR: Array  # the last conv_width - 1 inputs of the convolution
    h_BR: Array  # float32 (float64 in float64)


def empty_state(config: ModelConfig, batch_size: int, capacity: int, dtype: jnp.dtype) -> State:
    R = config.d_rnn
    return State(
        jnp.zeros((batch_size, config.conv_width - 1, R), dtype),
        jnp.zeros((batch_size, R), jnp.promote_types(dtype, jnp.float32)),
    )


@watched
def mixer(
    params: dict,
    x_BTD: Array,
    position_BT: Array,
    state: State | None,
    *,
    config: ModelConfig,
    kernels: Kernels,
) -> tuple[Array, State | None]:
    past = empty_state(config, x_BTD.shape[0], 0, x_BTD.dtype) if state is None else state
    gate_BTR = gelu(linear(params["linear_y"], x_BTD))
    x_BTR = linear(params["linear_x"], x_BTD)
    x_BTR, conv_BWR = causal_conv(params["conv_1d"], x_BTR, position_BT, past.conv_BWR)
    h_BTR, h_BR = rg_lru(params["rg_lru"], x_BTR, position_BT, past.h_BR, kernels.linear_scan)
    y_BTD = linear(params["linear_out"], gate_BTR * h_BTR)
    return y_BTD, None if state is None else State(conv_BWR, h_BR)


@watched
def rg_lru(
    params: dict, x_BTR: Array, position_BT: Array, h0_BR: Array, variant: str
) -> tuple[Array, Array]:
    """The real-gated linear recurrent unit: a_t = exp(-8 softplus(a_param) r_t), float32 inside.

    At a document start the past is dropped and the input enters whole: h_0 = i_0 x_0.
    """
    dtype = h0_BR.dtype
    r_BTR = jax.nn.sigmoid(block_diagonal(params["a_gate"], x_BTR).astype(dtype))
    i_BTR = jax.nn.sigmoid(block_diagonal(params["input_gate"], x_BTR).astype(dtype))
    log_a_BTR = -8 * jax.nn.softplus(params["a_param"].astype(dtype)) * r_BTR
    is_start_BT1 = (position_BT == 0)[:, :, None]
    a_BTR = jnp.where(is_start_BT1, 0, jnp.exp(log_a_BTR))
    # sqrt(1 - a^2), without cancellation
    scale_BTR = jnp.where(is_start_BT1, 1, bounded_sqrt(-jnp.expm1(2 * log_a_BTR)))
    h_BTR, h_BR = linear_scan(a_BTR, scale_BTR * i_BTR * x_BTR.astype(dtype), h0_BR, variant)
    return h_BTR.astype(x_BTR.dtype), h_BR


@jax.custom_jvp
def bounded_sqrt(u: Array) -> Array:
    """sqrt(u); its derivative, 1 / (2 sqrt(u)), is held at MAX_SQRT_GRADIENT."""
    return jnp.sqrt(u)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (u,), (du,) = primals, tangents
    floor = 1 / (4 * MAX_SQRT_GRADIENT**2)
    return jnp.sqrt(u), du * (0.5 * jax.lax.rsqrt(jnp.maximum(u, floor)))
