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
    """lax.scan, differentiated by JAX."""

    def step(h_BR: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        a_BR, x_BR = inputs
        h_BR = a_BR * h_BR + x_BR
        return h_BR, h_BR

    h_BR, h_TBR = lax.scan(step, h0_BR, (a_BTR.swapaxes(0, 1), x_BTR.swapaxes(0, 1)))
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
    """A loop that writes its rows in place, with the analytic backward."""
    return _loop(a_BTR, x_BTR, h0_BR, reverse=False)


def _analytic_fwd(a_BTR: Array, x_BTR: Array, h0_BR: Array) -> tuple:
    h_BTR, h_BR = _loop(a_BTR, x_BTR, h0_BR, reverse=False)
    return (h_BTR, h_BR), (a_BTR, h_BTR, h0_BR)


def _analytic_bwd(saved: tuple, gradient: tuple) -> tuple[Array, Array, Array]:
    a_BTR, h_BTR, h0_BR = saved
    dh_BTR, dh_BR = gradient
    late_a_BTR = jnp.concatenate([a_BTR[:, 1:], jnp.ones_like(a_BTR[:, :1])], axis=1)
    early_h_BTR = jnp.concatenate([h0_BR[:, None], h_BTR[:, :-1]], axis=1)
    dx_BTR, _ = _loop(late_a_BTR, dh_BTR, dh_BR, reverse=True)
    return dx_BTR * early_h_BTR, dx_BTR, a_BTR[:, 0] * dx_BTR[:, 0]


_analytic.defvjp(_analytic_fwd, _analytic_bwd)


@partial(jax.jit, static_argnames="reverse")
def _loop(a_BTR: Array, x_BTR: Array, h0_BR: Array, *, reverse: bool) -> tuple[Array, Array]:
    """Rows are read and written where they lie: a lax.scan would transpose all to [T, B, R]."""
    T = x_BTR.shape[1]

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        h_BR, h_BTR = carry
        t = T - 1 - i if reverse else i
        a_BR = lax.dynamic_index_in_dim(a_BTR, t, axis=1, keepdims=False)
        x_BR = lax.dynamic_index_in_dim(x_BTR, t, axis=1, keepdims=False)
        h_BR = a_BR * h_BR + x_BR
        return h_BR, lax.dynamic_update_index_in_dim(h_BTR, h_BR, t, axis=1)

    h_BR, h_BTR = lax.fori_loop(0, T, step, (h0_BR, jnp.zeros_like(x_BTR)))
    return h_BTR, h_BR


VARIANTS = {
    "sequential": _sequential,
    "associative": _associative,
    "analytic": _analytic,
    "pallas_tpu": linear_scan_tpu.linear_scan,
    "pallas_gpu": linear_scan_gpu.linear_scan,
}
