"""Softmax attention over the keys that a query may see, one variant per name.

Twin: implementations/torch_backend/kernels/attention.py.  Truth: implementations/reference.py.

Heads come in K groups that share a key head (MQA: K = 1); keys are never repeated over a group.
Scores are scaled by head_dim ** -0.5; the softmax is float32 (float64 in float64).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.backend import get_backend

from implementations.engine import Unsupported
from implementations.jax_backend.kernels.attention_tpu import attention_tpu

# Queries of one window are cut in this many blocks: a block meets (1 + 1 / 4) W keys.
BLOCKS_PER_WINDOW = 4
CUDNN_HEAD_DIM = 128  # on every GPU; 256 on Hopper and later ones


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
    return VARIANTS[check(variant)](q_BTNH, k_BSKH, v_BSKH, last_BT, reach_BT)


def window_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, reach_BT: Array, window: int, variant: str
) -> Array:
    """Attention in a sliding window, without the scores that no query sees.

    The last T keys are those of the queries, the others those before. Query t sees the keys at
    distances 0 to reach_BT[t], at most window - 1; keys that are not there must be out of reach.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    reach_BT = jnp.minimum(reach_BT, window - 1)
    if variant == "pallas_tpu":  # it skips by itself
        last_BT = jnp.broadcast_to(jnp.arange(S - T, S, dtype=jnp.int32), (B, T))
        return attention_tpu(q_BTNH, k_BSKH, v_BSKH, last_BT, reach_BT, window)
    block = -(-window // BLOCKS_PER_WINDOW)
    block += block % 2  # cuDNN takes even lengths alone
    num_past = -(-window // block)  # blocks of keys before a block of queries
    num_blocks = -(-T // block)
    back = num_blocks * block - T
    front = num_past * block - (S - T)  # below 0: keys that no query sees

    def key_blocks(x_BSKH: Array) -> Array:
        """[B * num_blocks, (num_past + 1) * block, K, H]: the keys that each block may see."""
        pad = ((0, 0, 0), (front, back, 0), (0, 0, 0), (0, 0, 0))
        x_BSKH = lax.pad(x_BSKH, jnp.zeros((), x_BSKH.dtype), pad)
        x = x_BSKH.reshape(B, num_past + num_blocks, block, K, H)
        x = jnp.concatenate([x[:, i : i + num_blocks] for i in range(num_past + 1)], axis=2)
        return x.reshape(B * num_blocks, (num_past + 1) * block, K, H)

    # Padded queries get reach 0: they see their own, padded, key.
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, back), (0, 0), (0, 0)))
    reach_BT = jnp.pad(reach_BT, ((0, 0), (0, back))).reshape(B * num_blocks, block)
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


def _visible(last_BT: Array, reach_BT: Array, num_keys: int) -> Array:
    """[B, T, S]: whether query t sees key s."""
    behind_BTS = last_BT[:, :, None] - jnp.arange(num_keys, dtype=jnp.int32)
    return (behind_BTS >= 0) & (behind_BTS <= reach_BT[:, :, None])


def _plain(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, last_BT: Array, reach_BT: Array) -> Array:
    """Products of one batch axis, (B, K), in which MQA has nothing to transpose; the weights are
    normalized after the second one."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B * K, -1, H)
    k, v = (x.swapaxes(1, 2).reshape(B * K, S, H) for x in (k_BSKH, v_BSKH))
    scores = jnp.einsum("xth,xsh->xts", q, k, preferred_element_type=dtype)
    scores = scores.reshape(B, K, T, N // K, S)
    visible_BTS = _visible(last_BT, reach_BT, S)
    scores = jnp.where(visible_BTS[:, None, :, None, :], scores, jnp.finfo(dtype).min)
    highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.reshape(B * K, -1, S).astype(v.dtype)
    out = jnp.einsum("xts,xsh->xth", weights, v, preferred_element_type=dtype)
    out = (out.reshape(B, K, T, N // K, H) / total).astype(v.dtype)
    return out.swapaxes(1, 2).reshape(B, T, N, H)


def _fused(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, last_BT: Array, reach_BT: Array) -> Array:
    """jax.nn's own. Its softmax is float32 always.

    On a GPU of Nvidia that is cuDNN's kernel, where it takes the shape: it is given what is visible
    as a bias of 0 and the lowest number, one for all heads, which is exact whatever the documents.
    (Its own window would skip more, but knows no documents; its packed sequences must be a fixed
    number of them.)
    """
    if q_BTNH.dtype == jnp.float64:
        raise Unsupported("kernels.attention=fused is not offered in float64 by the jax backend.")
    mask = _visible(last_BT, reach_BT, k_BSKH.shape[1])[:, None]
    attend = partial(jax.nn.dot_product_attention, mask=mask)
    if not _cudnn_takes(q_BTNH, k_BSKH):
        return attend(q_BTNH, k_BSKH, v_BSKH)
    return lax.platform_dependent(
        q_BTNH, k_BSKH, v_BSKH, cuda=partial(attend, implementation="cudnn"), default=attend
    )


def _cudnn_takes(q_BTNH: Array, k_BSKH: Array) -> bool:
    """What jax.nn would raise an error for: all that it can know without a device's capability."""
    T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    return (
        "cuda" in get_backend().platform_version  # else not even the branch can be traced
        and q_BTNH.dtype == k_BSKH.dtype == jnp.bfloat16
        and H % 8 == 0
        and H <= CUDNN_HEAD_DIM
        and T % 2 == S % 2 == 0  # backward takes a bias of even lengths alone
    )


VARIANTS = {"plain": _plain, "fused": _fused, "pallas_tpu": attention_tpu}
