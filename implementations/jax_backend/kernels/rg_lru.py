"""The real-gated linear recurrent unit, from its gates on: its variants are those of linear_scan.

Twin: implementations/torch_backend/kernels/rg_lru.py.  Truth: implementations/mixers/rg_lru.py.

a_t = exp(-8 softplus(a_param) sigmoid(a_gate_t)), h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t with
i_t = sigmoid(input_gate_t); float32 inside (float64 in float64). The block-diagonal products of the
gates, and their biases, stay outside: products of all tokens, for which a compiler's own are best.
"""

import jax
import jax.numpy as jnp
from jax import Array

from implementations.jax_backend.kernels import rg_lru_gpu, rg_lru_tpu
from implementations.jax_backend.kernels.gate import DECAY, MAX_SQRT_GRADIENT
from implementations.jax_backend.kernels.linear_scan import linear_scan


def rg_lru(
    x_BTR: Array,
    a_gate_BTR: Array,
    input_gate_BTR: Array,
    a_param_R: Array,
    position_BT: Array,
    h0_BR: Array,
    variant: str,
) -> tuple[Array, Array]:
    """Every state, in x's dtype, and the last one, in h0's. The gates are given before their
    sigmoid, with their bias."""
    if not x_BTR.shape == a_gate_BTR.shape == input_gate_BTR.shape:
        raise ValueError(
            "rg_lru needs x and its gates of one shape [B, T, R]; "
            f"got x {x_BTR.shape}, a_gate {a_gate_BTR.shape}, input_gate {input_gate_BTR.shape}."
        )
    if position_BT.shape != x_BTR.shape[:2]:
        raise ValueError(f"rg_lru: position must be {x_BTR.shape[:2]}, got {position_BT.shape}.")
    inputs = (x_BTR, a_gate_BTR, input_gate_BTR, slowest(a_param_R, h0_BR.dtype))
    if variant in FUSED:
        return FUSED[variant](*inputs, position_BT, h0_BR)
    is_start_BT1 = (position_BT == 0)[:, :, None]
    a_BTR, input_BTR = decay_and_input(*inputs, is_start_BT1, h0_BR.dtype)
    h_BTR, h_BR = linear_scan(a_BTR, input_BTR, h0_BR, variant)
    return h_BTR.astype(x_BTR.dtype), h_BR


def slowest(a_param_R: Array, dtype: jnp.dtype) -> Array:
    """log a where the recurrence gate is 1."""
    return -DECAY * jax.nn.softplus(a_param_R.astype(dtype))


def decay_and_input(
    x: Array, a_gate: Array, input_gate: Array, slowest_R: Array, is_start: Array, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """(a_t, sqrt(1 - a_t^2) i_t x_t). At a document start the past is dropped and the input enters
    whole: h_0 = i_0 x_0."""
    r = jax.nn.sigmoid(a_gate.astype(dtype))
    i = jax.nn.sigmoid(input_gate.astype(dtype))
    log_a = slowest_R * r
    a = jnp.where(is_start, 0, jnp.exp(log_a))
    # sqrt(1 - a^2), without cancellation
    scale = jnp.where(is_start, 1, bounded_sqrt(-jnp.expm1(2 * log_a)))
    return a, scale * i * x.astype(dtype)


@jax.custom_jvp
def bounded_sqrt(u: Array) -> Array:
    """sqrt(u); its derivative, 1 / (2 sqrt(u)), is held at MAX_SQRT_GRADIENT."""
    return jnp.sqrt(u)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (u,), (du,) = primals, tangents
    floor = 1 / (4 * MAX_SQRT_GRADIENT**2)
    return jnp.sqrt(u), du * (0.5 * jax.lax.rsqrt(jnp.maximum(u, floor)))


# one kernel; the others are composed
FUSED = {"pallas_tpu": rg_lru_tpu.rg_lru, "pallas_gpu": rg_lru_gpu.rg_lru}
