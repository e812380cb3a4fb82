"""Logits from the tied embedding and the negative log likelihood, one variant per name.

Twin: implementations/torch_backend/kernels/cross_entropy.py.  Truth: implementations/reference.py.
"""

import jax
import jax.numpy as jnp
from jax import Array

from implementations.engine import IGNORED


def cross_entropy(logits_BTV: Array, targets_BT: Array, variant: str) -> Array:
    """Negative log likelihood of each target, nats; 0 where IGNORED."""
    if targets_BT.shape != logits_BTV.shape[:2]:
        raise ValueError(
            "cross_entropy needs logits [B, T, V] and targets [B, T]; "
            f"got logits {logits_BTV.shape}, targets {targets_BT.shape}."
        )
    return VARIANTS[variant](logits_BTV, targets_BT)


def mean_cross_entropy(
    x_BTD: Array, weight_VD: Array, targets_BT: Array, soft_cap: float | None, variant: str
) -> Array:
    """The mean over scored targets, nats, of the logits that x makes; 0 where none is scored."""
    nll_BT = cross_entropy(unembed(x_BTD, weight_VD, soft_cap), targets_BT, variant)
    return nll_BT.sum() / jnp.maximum((targets_BT != IGNORED).sum(), 1)


def unembed(x_BTD: Array, weight_VD: Array, soft_cap: float | None) -> Array:
    """[B, T, V], float32 (float64 in float64); a soft cap c makes them c tanh(logits / c)."""
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    B, T, D = x_BTD.shape
    rows = jnp.einsum("xd,vd->xv", x_BTD.reshape(B * T, D), weight_VD, preferred_element_type=dtype)
    logits_BTV = rows.reshape(B, T, -1)
    return logits_BTV if soft_cap is None else soft_cap * jnp.tanh(logits_BTV / soft_cap)


def _plain(logits_BTV: Array, targets_BT: Array) -> Array:
    is_scored_BT = targets_BT != IGNORED
    index_BT1 = jnp.where(is_scored_BT, targets_BT, 0)[:, :, None]
    target_BT = jnp.take_along_axis(logits_BTV, index_BT1, axis=-1)[:, :, 0]
    return jnp.where(is_scored_BT, jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT, 0)


VARIANTS = {"plain": _plain}
