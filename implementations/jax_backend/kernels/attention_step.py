"""Attention of one new token over a cache that it enters: its variants are those of attention.

Twin: implementations/torch_backend/kernels/attention_step.py.  Truth: implementations/reference.py.

The cache of a sequence holds position p in slot p % num_slots: a ring of the visible keys, or all.

Compiled for a v5e, plain reads every key and value once and keeps the scores of 64 sequences and
8192 slots in VMEM: 1.0 times what must move (benchmarks/compiled_bytes.py).
"""

import jax.numpy as jnp
from jax import Array

from implementations.jax_backend.kernels.attention import attention


def attention_step(
    q_BNH: Array,
    k_BKH: Array,
    v_BKH: Array,
    position_BT: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    variant: str,
) -> tuple[Array, Array, Array]:
    """([B, N, H] in v's dtype, the slots of the keys, those of the values); T = 1.

    Queries and keys are rotated. The token sees every slot written, its own included.
    """
    k_BSKH = write(k_BSKH, k_BKH[:, None], position_BT)
    v_BSKH = write(v_BSKH, v_BKH[:, None], position_BT)
    last_BT = jnp.minimum(position_BT, k_BSKH.shape[1] - 1)
    if variant == "pallas_tpu":
        # A block of its kernel is 256 queries, of which 255 would be padding: of 16 heads 1 MiB in
        # bfloat16 read and written, beside 0.5 MiB of 1024 keys and values. Plain reads these once.
        variant = "plain"
    out_BTNH = attention(q_BNH[:, None], k_BSKH, v_BSKH, last_BT, last_BT, variant)
    return out_BTNH[:, 0], k_BSKH, v_BSKH


def write(x_BSKH: Array, new_BTKH: Array, position_BT: Array) -> Array:
    """The slots with those of the new keys, or values, that still fit.

    Scattered, which decodes in place. Of a dynamic_update_slice XLA for CPUs makes one in each of
    its readers, and 4 copies of the cache a token. On a v5e both are the same: caches that fit its
    VMEM (128 MiB) are moved there and back each token, larger ones stay."""
    num_slots = x_BSKH.shape[1]
    slot_BT = position_BT[:, -num_slots:] % num_slots
    row_B1 = jnp.arange(x_BSKH.shape[0], dtype=jnp.int32)[:, None]
    return x_BSKH.at[row_B1, slot_BT].set(new_BTKH[:, -num_slots:])
