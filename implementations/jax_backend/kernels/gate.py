"""The gates of the recurrent mixer, element by element: composed, and for the fused kernels.

Twin: implementations/torch_backend/kernels/gate.py.  Truth: implementations/gates.py.
Source: arXiv:2402.19427 section 2.4, appendices A and B; the clipped gradient: arXiv:2404.07839 and
its code.

All are h_t = a h_{t-1} + beta i x, with log a = rate * slowest. A gate's name is a switch of the
fused kernels when they are compiled: what a gate lacks is None, among inputs and gradients, and is
not loaded, computed or stored. The complex one is two real channels to them, k and k + R / 2, with
the gates of k: what turns a state by theta r is undone before them, and done after them (`turned`).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from implementations.config import GATES, Gate

MAX_SQRT_GRADIENT = 1000.0  # clips the derivative of sqrt(1 - a^2) near a = 1 (released code)


class Form(NamedTuple):
    """What is compiled in."""

    gate: str
    normalize_input: bool

    @property
    def kind(self) -> Gate:
        return GATES[self.gate]


# Composed.


def slowest_of(
    a_param_R: Array | None, form: Form, exponent: float, dtype: jnp.dtype
) -> Array | None:
    """log a where the rate is 1; None where that is -1 (gru)."""
    if a_param_R is None:
        return None
    exponent = 1.0 if form.kind.has_time_step else exponent
    return -exponent * jax.nn.softplus(a_param_R.astype(dtype))


def coefficients(
    a_gate: Array | None,
    input_gate: Array | None,
    slowest_R: Array | None,
    is_start: Array,
    form: Form,
    dtype: jnp.dtype,
) -> tuple[Array, Array]:
    """(a, beta i) of every step. At a document's start the past is dropped and the input enters
    whole: a = 0, beta = 1."""
    log_a = -1.0 if slowest_R is None else slowest_R
    if a_gate is not None:
        log_a = log_a * rate_of(a_gate.astype(dtype), form)
    if form.kind.has_time_step:
        beta = -jnp.expm1(log_a) if slowest_R is None else jnp.expm1(log_a) / slowest_R
    elif form.normalize_input:
        beta = bounded_sqrt(-jnp.expm1(2 * log_a))  # sqrt(1 - a^2), without cancellation
    else:
        beta = jnp.ones_like(log_a)
    a, beta = jnp.where(is_start, 0, jnp.exp(log_a)), jnp.where(is_start, 1, beta)
    return a, beta if input_gate is None else beta * jax.nn.sigmoid(input_gate.astype(dtype))


def rate_of(a_gate: Array, form: Form) -> Array:
    """The recurrence gate r, or a step in time."""
    return jax.nn.softplus(a_gate) if form.kind.has_time_step else jax.nn.sigmoid(a_gate)


@jax.custom_jvp
def bounded_sqrt(u: Array) -> Array:
    """sqrt(u); its derivative, 1 / (2 sqrt(u)), is held at MAX_SQRT_GRADIENT."""
    return jnp.sqrt(u)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (u,), (du,) = primals, tangents
    floor = 1 / (4 * MAX_SQRT_GRADIENT**2)
    return jnp.sqrt(u), du * (0.5 * jax.lax.rsqrt(jnp.maximum(u, floor)))


@jax.custom_vjp
def turned(x: Array, phase_R: Array) -> Array:
    """Channels k and k + R / 2, one complex number, times exp(j phase), in the phase's dtype."""
    first, second = jnp.split(x.astype(phase_R.dtype), 2, axis=-1)
    cos, sin = jnp.cos(phase_R), jnp.sin(phase_R)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _turned_fwd(x: Array, phase_R: Array) -> tuple:
    return turned(x, phase_R), (x, phase_R)


def _turned_bwd(saved: tuple, dy: Array) -> tuple[Array, Array]:
    """From x and the phase alone: their cosines are computed again, not kept."""
    x, phase_R = saved
    dx = turned(dy, -phase_R)
    (first, second), (dfirst, dsecond) = (jnp.split(v, 2, axis=-1) for v in (x, dx))
    return dx.astype(x.dtype), first * dsecond - second * dfirst


turned.defvjp(_turned_fwd, _turned_bwd)


@jax.custom_vjp
def phases(a_gate_BTR: Array, theta_R: Array) -> Array:
    """The angle by which each state is turned since the first step: the sum of theta r. It is
    summed in parts of a turn, as integers: these wrap around with the circle and round nothing,
    where a sum in float32 would lose the digits of a long sequence."""
    dtype = theta_R.dtype
    integer, num_bits = (jnp.int64, 64) if dtype == jnp.float64 else (jnp.int32, 32)
    turns_BTR = theta_R / (2 * math.pi) * jax.nn.sigmoid(a_gate_BTR.astype(dtype))
    turns_BTR -= jnp.round(turns_BTR)
    parts_BTR = running_sum(jnp.round(turns_BTR * 2.0**num_bits).astype(integer))
    return parts_BTR.astype(dtype) * (2 * math.pi / 2.0**num_bits)


def _phases_fwd(a_gate_BTR: Array, theta_R: Array) -> tuple:
    return phases(a_gate_BTR, theta_R), (a_gate_BTR, theta_R)


def _phases_bwd(saved: tuple, dphase_BTR: Array) -> tuple[Array, Array]:
    a_gate_BTR, theta_R = saved
    r_BTR = jax.nn.sigmoid(a_gate_BTR.astype(theta_R.dtype))
    # not lax.cumsum's own reverse, which libtpu compiles for minutes
    dturn_BTR = jnp.flip(running_sum(jnp.flip(dphase_BTR, 1)), 1)
    da_gate_BTR = theta_R * dturn_BTR * r_BTR * (1 - r_BTR)
    return da_gate_BTR.astype(a_gate_BTR.dtype), (dturn_BTR * r_BTR).sum((0, 1))


phases.defvjp(_phases_fwd, _phases_bwd)


def running_sum(x_BTR: Array) -> Array:
    """Over time."""

    def loop(x_BTR: Array) -> Array:
        def step(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            sum_BR, rows_BTR = carry
            sum_BR += lax.dynamic_index_in_dim(rows_BTR, t, axis=1, keepdims=False)
            return sum_BR, lax.dynamic_update_index_in_dim(rows_BTR, sum_BR, t, axis=1)

        return lax.fori_loop(0, x_BTR.shape[1], step, (jnp.zeros_like(x_BTR[:, 0]), x_BTR))[1]

    return lax.platform_dependent(x_BTR, cpu=loop, default=partial(lax.cumsum, axis=1))


# Within kernels, and what their inputs are made from. All is float32. Only operations that Mosaic
# (TPU) and Triton (GPU) both compile: neither has expm1.


def given(x: Any, value: Any) -> Any:
    """The value that belongs to x, where there is an x."""
    return None if x is None else value


def over_sharing(x_BTR: Array | None, num_gates: int) -> Array | None:
    """The gradient of gates that several sequences, one after the other, have in common."""
    if x_BTR is None or len(x_BTR) == num_gates:
        return x_BTR
    return x_BTR.reshape(num_gates, -1, *x_BTR.shape[1:]).sum(1, jnp.float32).astype(x_BTR.dtype)


def jump(position: Array) -> Array:
    """What is added to log a: at a document start it makes a 0, and the past is dropped."""
    return jnp.where(position == 0, -1000.0, 0.0)


def decay(
    form: Form, a_gate: Array | None, slowest: Array | None, jump: Array
) -> tuple[Array, Array, Array | None]:
    """(a, log a, rate): log a = rate * slowest + jump. No a_gate: rate 1; no slowest: -1."""
    if a_gate is None:
        rate, log_a = None, slowest + jump
    else:
        rate = softplus(a_gate) if form.kind.has_time_step else jax.nn.sigmoid(a_gate)
        log_a = log_decay(rate, slowest, jump)
    return jnp.exp(log_a), log_a, rate


def log_decay(rate: Array | None, slowest: Array | None, jump: Array) -> Array:
    if rate is None:
        return slowest + jump
    return rate * (-1 if slowest is None else slowest) + jump


def inflow(
    form: Form,
    x: Array,
    input_gate: Array | None,
    slowest: Array | None,
    jump: Array,
    a: Array,
    log_a: Array,
) -> Array:
    """beta i x: what enters the state."""
    beta, _ = scale(form, slowest, jump, a, log_a)
    if input_gate is not None:
        x = jax.nn.sigmoid(input_gate) * x
    return x if beta is None else beta * x


def grad(
    form: Form,
    g: Array,
    h: Array,
    x: Array,
    input_gate: Array | None,
    slowest: Array | None,
    jump: Array,
    a: Array,
    log_a: Array,
    rate: Array | None,
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """What g, the gradient of h_t, and the state h before it make of x, of both gates'
    pre-activations and of slowest. Where a document starts a is 0, and so is dlog_a."""
    beta, across = scale(form, slowest, jump, a, log_a)
    i = None if input_gate is None else jax.nn.sigmoid(input_gate)
    entering = x if i is None else i * x
    flow = h if across is None else h - across * entering
    dlog_a = g * a * flow
    dentering = g if beta is None else g * beta
    dx = dentering if i is None else dentering * i
    dinput_gate = None if i is None else dentering * x * i * (1 - i)
    da_gate = dslowest = None
    if rate is not None:
        curve = complement(-rate, jnp.exp(-rate)) if form.kind.has_time_step else rate * (1 - rate)
        da_gate = dlog_a * curve * (-1 if slowest is None else slowest)
    if slowest is not None:
        dslowest = dlog_a if rate is None else dlog_a * rate
        if form.kind.has_time_step:  # beta = (1 - a) / A too
            dslowest -= jnp.where(jump < 0, 0, dentering * entering / slowest)
    return dx, da_gate, dinput_gate, dslowest


def scale(
    form: Form, slowest: Array | None, jump: Array, a: Array, log_a: Array
) -> tuple[Array | None, Array | float | None]:
    """beta, None where it is 1, and of its slope -a * across along log a, that factor. At a
    document's start beta is 1."""
    if form.kind.has_time_step:
        rest = complement(log_a, a)
        if slowest is None:
            return rest, 1.0
        across = -1 / slowest
        return jnp.where(jump < 0, 1, rest * across), across
    if not form.normalize_input:
        return None, None
    rest = complement(log_a, a)
    square = rest * (2 - rest)  # 1 - a^2 = (1 - a) (1 + a)
    inverse = jax.lax.rsqrt(jnp.maximum(square, 1e-30))
    # the slope of sqrt(u), 1 / (2 sqrt(u)), is held at its maximum; u = 1 - a^2
    return square * inverse, a * jnp.minimum(inverse, 2 * MAX_SQRT_GRADIENT)


def complement(log_a: Array, a: Array) -> Array:
    """1 - a: from its series where a is near 1 and the difference would cancel (error below
    6e-8)."""
    series = 1 / 24 + log_a * (1 / 120 + log_a * (1 / 720))
    series = 1 + log_a * (1 / 2 + log_a * (1 / 6 + log_a * series))
    return jnp.where(log_a > -0.25, -log_a * series, 1 - a)


def softplus(x: Array) -> Array:
    """log(1 + exp(x)) to the last digits, where exp(x) is small too: log(1 + u) = 2 artanh(s)."""
    u = jnp.exp(-jnp.abs(x))
    s = u / (2 + u)
    square = s * s
    series = 1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * series))
    return jnp.maximum(x, 0) + 2 * s * series
