"""RMS norm, alone and after a residual addition, one variant per name.

Twin: implementations/torch_backend/kernels/rms_norm.py.  Truth: implementations/reference.py.

Compiled for a v5e (benchmarks/compiled_bytes.py), what must move is moved 1.5 times forward, as XLA
reads x for its mean square and again to scale it, and 1.2 times with the backward pass; after a
residual addition 1.0 and 1.25 times: the sum is taken where the addition is. On a v5p, which keeps
less in VMEM, it is 1.5 and 1.6, and 1.25 and 1.6 times.
"""

import jax
import jax.numpy as jnp
from jax import Array

from implementations.engine import Unsupported


def rms_norm(x_BTD: Array, scale_D: Array, eps: float, variant: str) -> Array:
    """x / rms(x) * (1 + scale), in float32 (float64 in float64); in x's dtype."""
    _check_shapes(x_BTD, scale_D)
    return VARIANTS[check(variant)](x_BTD, scale_D, eps)


def add_rms_norm(
    x_BTD: Array, branch_BTD: Array, scale_D: Array, eps: float, variant: str
) -> tuple[Array, Array]:
    """x + branch, and the norm of that sum."""
    _check_shapes(x_BTD, scale_D)
    if branch_BTD.shape != x_BTD.shape:
        raise ValueError(f"add_rms_norm: {x_BTD.shape} and {branch_BTD.shape} are not one shape.")
    x_BTD = x_BTD + branch_BTD
    return x_BTD, VARIANTS[check(variant)](x_BTD, scale_D, eps)


def check(variant: str) -> str:
    """The variant of kernels.layers, when this backend has it; else Unsupported."""
    if variant not in VARIANTS:
        raise Unsupported(
            f"kernels.layers={variant} is not offered by the jax backend; "
            f"offered: {', '.join(VARIANTS)}."
        )
    return variant


def _check_shapes(x_BTD: Array, scale_D: Array) -> None:
    if scale_D.shape != x_BTD.shape[-1:]:
        raise ValueError(
            f"rms_norm needs x [..., D] and scale [D]; got x {x_BTD.shape}, scale {scale_D.shape}."
        )


def _plain(x_BTD: Array, scale_D: Array, eps: float) -> Array:
    wide = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * (1 + scale_D.astype(wide.dtype))).astype(x_BTD.dtype)


VARIANTS = {"plain": _plain}
