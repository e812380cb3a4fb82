"""The RG-LRU's gate and its gradient, element by element: what the fused kernels of Pallas compute.

Truth: implementations/mixers/rg_lru.py.  Source: arXiv:2402.19427 section 2.4, equations 3 and 4;
the clipped gradient: arXiv:2404.07839 and its code.  Only operations that Mosaic (TPU) and Triton
(GPU) both compile: neither has expm1. All is float32.
"""

import jax
import jax.numpy as jnp
from jax import Array

DECAY = 8.0  # c of equation 3
MAX_SQRT_GRADIENT = 1000.0  # clips the derivative of sqrt(1 - a^2) near a = 1 (released code)


def jump(position: Array) -> Array:
    """What is added to log a: at a document start it makes a 0, and the past is dropped."""
    return jnp.where(position == 0, -1000.0, 0.0)


def decay(a_gate: Array, slowest: Array, jump: Array) -> tuple[Array, Array, Array]:
    """(a, log a, recurrence gate r): log a = r * slowest + jump, where slowest is -8
    softplus(a_param)."""
    r = jax.nn.sigmoid(a_gate)
    log_a = r * slowest + jump
    return jnp.exp(log_a), log_a, r


def inflow(x: Array, input_gate: Array, a: Array, log_a: Array) -> Array:
    """sqrt(1 - a^2) i x: what enters the state."""
    return scale(a, log_a)[0] * jax.nn.sigmoid(input_gate) * x


def grad(
    g: Array,
    h: Array,
    x: Array,
    input_gate: Array,
    slowest: Array,
    a: Array,
    log_a: Array,
    r: Array,
) -> tuple[Array, Array, Array, Array]:
    """What g, the gradient of h_t, and the state h before it make of x, of both gates'
    pre-activations and of slowest. Where a document starts a is 0, and so is dlog_a."""
    root, inverse = scale(a, log_a)
    i = jax.nn.sigmoid(input_gate)
    # the slope of sqrt(u), 1 / (2 sqrt(u)), is held at its maximum; u = 1 - a^2
    slope = jnp.minimum(inverse, 2 * MAX_SQRT_GRADIENT)
    dlog_a = g * a * (h - a * slope * i * x)
    dscaled = g * root
    di = dscaled * x
    return dscaled * i, dlog_a * slowest * r * (1 - r), di * i * (1 - i), dlog_a * r


def scale(a: Array, log_a: Array) -> tuple[Array, Array]:
    """sqrt(1 - a^2), and 1 over it. 1 - a comes from its series where a is near 1 and the
    difference would cancel (error below 6e-8); 1 - a^2 = (1 - a) (1 + a)."""
    series = 1 / 24 + log_a * (1 / 120 + log_a * (1 / 720))
    series = 1 + log_a * (1 / 2 + log_a * (1 / 6 + log_a * series))
    rest = jnp.where(log_a > -0.25, -log_a * series, 1 - a)
    square = rest * (2 - rest)
    inverse = jax.lax.rsqrt(jnp.maximum(square, 1e-30))
    return square * inverse, inverse
