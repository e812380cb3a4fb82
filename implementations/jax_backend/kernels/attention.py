"""Softmax attention over the keys that a query may see, one variant per name.

Twin: implementations/torch_backend/kernels/attention.py.  Truth: implementations/reference.py.

Heads come in K groups that share a key head (MQA: K = 1); keys are never repeated over a group.
Scores are scaled by head_dim ** -0.5; the softmax is float32 (float64 in float64).
"""

import jax
import jax.numpy as jnp
from jax import Array

from implementations.engine import Unsupported

# Queries of one window are cut in this many blocks: a block meets (1 + 1 / 4) W keys.
BLOCKS_PER_WINDOW = 4


def attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, last_BT: Array, reach_BT: Array, variant: str
) -> Array:
    """[B, T, N, H] in v's dtype. Query t sees the keys of index last - reach to last, of which one
    at least must be there."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or N % K:
        raise ValueError(
            f"attention needs q [B, T, N, H], k and v [B, S, K, H] and K a divisor of N; "
            f"got q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}."
        )
    if not last_BT.shape == reach_BT.shape == (B, T):
        raise ValueError(
            f"last and reach must be {(B, T)}, got {last_BT.shape} and {reach_BT.shape}."
        )
    distance_BTS = last_BT[:, :, None] - jnp.arange(S, dtype=jnp.int32)
    visible_BTS = (distance_BTS >= 0) & (distance_BTS <= reach_BT[:, :, None])
    return VARIANTS[check(variant)](q_BTNH, k_BSKH, v_BSKH, visible_BTS)


def window_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, reach_BT: Array, window: int, variant: str
) -> Array:
    """Attention in a sliding window, without the scores that no query sees.

    Keys are those of the `window` positions before the first query, then those of the queries:
    S = window + T. Query t sees the keys at distances 0 to reach_BT[t], at most window - 1.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    if k_BSKH.shape[1] != window + T:
        raise ValueError(f"window_attention needs {window + T} keys, got {k_BSKH.shape[1]}.")
    block = -(-window // BLOCKS_PER_WINDOW)
    num_past = -(-window // block)  # blocks of keys before a block of queries
    num_blocks = -(-T // block)
    front, back = num_past * block - window, num_blocks * block - T

    def key_blocks(x_BSKH: Array) -> Array:
        """[B * num_blocks, (num_past + 1) * block, K, H]: the keys that each block may see."""
        x_BSKH = jnp.pad(x_BSKH, ((0, 0), (front, back), (0, 0), (0, 0)))
        x = x_BSKH.reshape(B, num_past + num_blocks, block, K, H)
        x = jnp.concatenate([x[:, i : i + num_blocks] for i in range(num_past + 1)], axis=2)
        return x.reshape(B * num_blocks, (num_past + 1) * block, K, H)

    # Padded queries get reach 0: they see their own, padded, key.
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, back), (0, 0), (0, 0)))
    reach_BT = jnp.pad(jnp.minimum(reach_BT, window - 1), ((0, 0), (0, back)))
    reach_BT = reach_BT.reshape(B * num_blocks, block)
    last_T = num_past * block + jnp.arange(block, dtype=jnp.int32)
    out = attention(
        q_BTNH.reshape(B * num_blocks, block, N, H),
        key_blocks(k_BSKH),
        key_blocks(v_BSKH),
        jnp.broadcast_to(last_T, reach_BT.shape),
        reach_BT,
        variant,
    )
    return out.reshape(B, num_blocks * block, N, H)[:, :T]


def check(variant: str) -> str:
    """The variant, when this backend has it; else Unsupported."""
    if variant not in VARIANTS:
        raise Unsupported(
            f"kernels.attention={variant} is not offered by the jax backend; "
            f"offered: {', '.join(VARIANTS)}."
        )
    return variant


def _plain(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array) -> Array:
    """Products of one batch axis, (B, K), in which MQA has nothing to transpose; the weights are
    normalized after the second one."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B * K, -1, H)
    k, v = (x.swapaxes(1, 2).reshape(B * K, S, H) for x in (k_BSKH, v_BSKH))
    scores = jnp.einsum("xth,xsh->xts", q, k, preferred_element_type=dtype)
    scores = scores.reshape(B, K, T, N // K, S)
    scores = jnp.where(visible_BTS[:, None, :, None, :], scores, jnp.finfo(dtype).min)
    highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.reshape(B * K, -1, S).astype(v.dtype)
    out = jnp.einsum("xts,xsh->xth", weights, v, preferred_element_type=dtype)
    out = (out.reshape(B, K, T, N // K, H) / total).astype(v.dtype)
    return out.swapaxes(1, 2).reshape(B, T, N, H)


def _fused(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array) -> Array:
    """jax.nn's own. Its softmax is float32 always."""
    if q_BTNH.dtype == jnp.float64:
        raise Unsupported("kernels.attention=fused is not offered in float64 by the jax backend.")
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=visible_BTS[:, None])


VARIANTS = {"plain": _plain, "fused": _fused}
