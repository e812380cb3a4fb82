"""Linear recurrence h_t = a_t * h_{t-1} + x_t, over the axis T, one variant per name.

Twin: implementations/torch_backend/kernels/linear_scan.py.  Truth: implementations/reference.py.

Analytic gradients, for the incoming dh and dh_last: g_t = dh_t + a_{t+1} g_{t+1} (from dh_last
after the last step), dx_t = g_t, da_t = g_t h_{t-1}, dh0 = a_0 g_0: one more scan, backwards.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from implementations.engine import Unsupported
from implementations.jax_backend.kernels import linear_scan_gpu, linear_scan_tpu

UNROLL = 8  # steps of `sequential` in one turn of its loop


def linear_scan(a_BTR: Array, x_BTR: Array, h0_BR: Array, variant: str) -> tuple[Array, Array]:
    """Every state, in x's dtype, and the last one, in float32 (float64 where x is float64)."""
    if a_BTR.shape != x_BTR.shape or h0_BR.shape != x_BTR[:, 0].shape:
        raise ValueError(
            "linear_scan needs a and x of one shape [B, T, R] and h0 of shape [B, R]; "
            f"got a {a_BTR.shape}, x {x_BTR.shape}, h0 {h0_BR.shape}."
        )
    dtype = jnp.promote_types(x_BTR.dtype, jnp.float32)
    if h0_BR.dtype != dtype:
        raise ValueError(f"the recurrent state h0 must be {dtype}, got {h0_BR.dtype}.")
    scan = VARIANTS[check(variant)]
    if variant.startswith("pallas"):  # these widen what they read
        return scan(a_BTR, x_BTR, h0_BR)
    h_BTR, h_BR = scan(a_BTR.astype(dtype), x_BTR.astype(dtype), h0_BR)
    return h_BTR.astype(x_BTR.dtype), h_BR


def check(variant: str) -> str:
    """The variant, when this backend has it; else Unsupported."""
    if variant not in VARIANTS:
        raise Unsupported(
            f"kernels.linear_scan={variant} is not offered by the jax backend; "
            f"offered: {', '.join(VARIANTS)}."
        )
    return variant


def _sequential(a_BTR: Array, x_BTR: Array, h0_BR: Array) -> tuple[Array, Array]:
    """lax.scan, differentiated by JAX; unrolled, but not on a CPU: XLA's code for 8 steps a turn
    takes 1.3 to 4.3 times as long there as for one (one core, d_rnn 96 and 1024, 256 and 2048
    steps, forward and with gradients)."""
    inputs = (a_BTR.swapaxes(0, 1), x_BTR.swapaxes(0, 1))

    def step(h_BR: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        a_BR, x_BR = inputs
        h_BR = a_BR * h_BR + x_BR
        return h_BR, h_BR

    h_BR, h_TBR = lax.platform_dependent(
        h0_BR,
        inputs,
        cpu=partial(lax.scan, step),
        default=partial(lax.scan, step, unroll=UNROLL),
    )
    return h_TBR.swapaxes(0, 1), h_BR


def _associative(a_BTR: Array, x_BTR: Array, h0_BR: Array) -> tuple[Array, Array]:
    """lax.associative_scan over pairs (a, x), differentiated by JAX."""

    def combine(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
        return early[0] * late[0], late[0] * early[1] + late[1]

    x_BTR = x_BTR.at[:, 0].add(a_BTR[:, 0] * h0_BR)
    _, h_BTR = lax.associative_scan(combine, (a_BTR, x_BTR), axis=1)
    return h_BTR, h_BTR[:, -1]


@jax.custom_vjp
def _analytic(a_BTR: Array, x_BTR: Array, h0_BR: Array) -> tuple[Array, Array]:
    """A loop over rows where they lie (a lax.scan would transpose all to [T, B, R]), in place over
    x, with the analytic backward, in place over dh. On a CPU, on one core at d_rnn 1024, 2 x 2048
    steps: forward 4.9 ms and with gradients 11, where PyTorch's takes 9.8 and 35."""
    T = x_BTR.shape[1]

    def step(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        h_BR, h_BTR = carry
        h_BR = _row(a_BTR, t) * h_BR + _row(h_BTR, t)
        return h_BR, lax.dynamic_update_index_in_dim(h_BTR, h_BR, t, axis=1)

    h_BR, h_BTR = lax.fori_loop(0, T, step, (h0_BR, x_BTR))
    return h_BTR, h_BR


def _analytic_fwd(a_BTR: Array, x_BTR: Array, h0_BR: Array) -> tuple:
    h_BTR, h_BR = _analytic(a_BTR, x_BTR, h0_BR)
    return (h_BTR, h_BR), (a_BTR, h_BTR, h0_BR)


def _analytic_bwd(saved: tuple, gradient: tuple) -> tuple[Array, Array, Array]:
    a_BTR, h_BTR, h0_BR = saved
    dh_BTR, dh_BR = gradient
    T = a_BTR.shape[1]

    # The loop carries g and not a g: XLA would copy all rows at every step, were the row that is
    # written used for something else beside.
    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        g_BR, dx_BTR = carry
        t = T - 2 - i
        g_BR = _row(a_BTR, t + 1) * g_BR + _row(dx_BTR, t)
        return g_BR, lax.dynamic_update_index_in_dim(dx_BTR, g_BR, t, axis=1)

    g_BR = dh_BTR[:, -1] + dh_BR
    g_BR, dx_BTR = lax.fori_loop(0, T - 1, step, (g_BR, dh_BTR.at[:, -1].set(g_BR)))
    first_BTR, rest_BTR = (g_BR * h0_BR)[:, None], dx_BTR[:, 1:] * h_BTR[:, :-1]
    return jnp.concatenate([first_BTR, rest_BTR], axis=1), dx_BTR, a_BTR[:, 0] * g_BR


_analytic.defvjp(_analytic_fwd, _analytic_bwd)


def _row(x_BTR: Array, t: Array) -> Array:
    return lax.dynamic_index_in_dim(x_BTR, t, axis=1, keepdims=False)


VARIANTS = {
    "sequential": _sequential,
    "associative": _associative,
    "analytic": _analytic,
    "pallas_tpu": linear_scan_tpu.linear_scan,
    "pallas_gpu": linear_scan_gpu.linear_scan,
}
