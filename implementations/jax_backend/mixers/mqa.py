"""Multi-query attention: causal, global or in a sliding window, with rotary positions (RoPE).

Source: arXiv:2402.19427 section 2.3.  Twin: implementations/torch_backend/mixers/mqa.py.

A key is visible iff its distance is at most min(W - 1, position of the query). The cache of a
sequence holds position p in slot p % num_slots: a ring of the W visible keys, or all of them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from implementations.config import ModelConfig
from implementations.engine import Kernels
from implementations.jax_backend.activations import watched
from implementations.jax_backend.kernels.attention import attention, window_attention
from implementations.jax_backend.layers import linear


class State(NamedTuple):
    k_BSKH: Array  # rotated
    v_BSKH: Array


def empty_state(config: ModelConfig, batch_size: int, capacity: int, dtype: jnp.dtype) -> State:
    W = config.num_visible_keys
    num_slots = capacity if W is None else min(capacity, W)
    shape = (batch_size, num_slots, config.num_kv_heads, config.head_dim)
    return State(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


@watched
def mixer(
    params: dict,
    x_BTD: Array,
    position_BT: Array,
    state: State | None,
    *,
    config: ModelConfig,
    kernels: Kernels,
) -> tuple[Array, State | None]:
    """With a state, positions count on from those of its T predecessors, one document a row."""
    B, T, _ = x_BTD.shape
    q_BTNH = linear(params["linear_q"], x_BTD).reshape(B, T, config.num_heads, config.head_dim)
    k_BTKH = linear(params["linear_k"], x_BTD).reshape(B, T, config.num_kv_heads, config.head_dim)
    v_BTKH = linear(params["linear_v"], x_BTD).reshape(k_BTKH.shape)
    q_BTNH, k_BTKH = rope(q_BTNH, position_BT, config), rope(k_BTKH, position_BT, config)
    attend = attend_alone if state is None else attend_with_state
    y_BTNH, state = attend(q_BTNH, k_BTKH, v_BTKH, position_BT, state, config, kernels.attention)
    return linear(params["linear_out"], y_BTNH.reshape(B, T, -1)), state


def rope(x_BTNH: Array, position_BT: Array, config: ModelConfig) -> Array:
    """Rotates channel i against channel i + rope_dim / 2, by position * base^(-2 i / rope_dim)."""
    half = config.rope_dim // 2
    if not half:
        return x_BTNH
    dtype = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    rate_H = 1 / config.rope_base ** (jnp.arange(half, dtype=dtype) / half)
    angle_BT1H = position_BT[:, :, None, None].astype(dtype) * rate_H
    cos, sin = jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)
    first = x_BTNH[..., :half].astype(dtype)
    second = x_BTNH[..., half : 2 * half].astype(dtype)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rotated = [part.astype(x_BTNH.dtype) for part in rotated]
    return jnp.concatenate([*rotated, x_BTNH[..., 2 * half :]], axis=-1)


def attend_alone(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    position_BT: Array,
    state: None,
    config: ModelConfig,
    variant: str,
) -> tuple[Array, None]:
    """Nothing lies before the first query."""
    T, W = q_BTNH.shape[1], config.num_visible_keys
    index_T = jnp.arange(T, dtype=jnp.int32)
    reach_BT = jnp.minimum(position_BT, index_T)
    if W is not None:
        reach_BT = jnp.minimum(reach_BT, W - 1)
    if W is not None and W < T:
        past = ((0, 0), (W, 0), (0, 0), (0, 0))
        k_BSKH, v_BSKH = jnp.pad(k_BTKH, past), jnp.pad(v_BTKH, past)
        return window_attention(q_BTNH, k_BSKH, v_BSKH, reach_BT, W, variant), None
    distance_TS = index_T[:, None] - index_T
    visible_BTS = (distance_TS >= 0) & (distance_TS <= reach_BT[:, :, None])
    return attention(q_BTNH, k_BTKH, v_BTKH, visible_BTS, variant), None


def attend_with_state(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    position_BT: Array,
    state: State,
    config: ModelConfig,
    variant: str,
) -> tuple[Array, State]:
    T, W, num_slots = q_BTNH.shape[1], config.num_visible_keys, state.k_BSKH.shape[1]
    new = State(write(state.k_BSKH, k_BTKH, position_BT), write(state.v_BSKH, v_BTKH, position_BT))
    reach_BT = position_BT if W is None else jnp.minimum(position_BT, W - 1)
    if T > 1 and num_slots == W:
        # The chunk overwrites keys that its first queries see: read the ring from before it.
        slot_BS = (position_BT[:, :1] + jnp.arange(W, dtype=jnp.int32)) % W
        past_BSKH = [
            jnp.take_along_axis(x, slot_BS[:, :, None, None], axis=1) for x in state
        ]  # from the oldest to the newest
        k_BSKH = jnp.concatenate([past_BSKH[0], k_BTKH], axis=1)
        v_BSKH = jnp.concatenate([past_BSKH[1], v_BTKH], axis=1)
        return window_attention(q_BTNH, k_BSKH, v_BSKH, reach_BT, W, variant), new
    # Slot s holds the latest position, up to the chunk's last, that is s modulo num_slots; a slot
    # never written gets a negative one, which no reach admits.
    last_B1 = position_BT[:, -1:]
    slot_S = jnp.arange(num_slots, dtype=jnp.int32)
    key_BS = last_B1 - (last_B1 - slot_S) % num_slots
    distance_BTS = position_BT[:, :, None] - key_BS[:, None, :]
    visible_BTS = (distance_BTS >= 0) & (distance_BTS <= reach_BT[:, :, None])
    return attention(q_BTNH, new.k_BSKH, new.v_BSKH, visible_BTS, variant), new


def write(x_BSKH: Array, new_BTKH: Array, position_BT: Array) -> Array:
    """The slots with those of the new keys, or values, that still fit."""
    num_slots = x_BSKH.shape[1]
    slot_BT = position_BT[:, -num_slots:] % num_slots
    row_B1 = jnp.arange(x_BSKH.shape[0], dtype=jnp.int32)[:, None]
    return x_BSKH.at[row_B1, slot_BT].set(new_BTKH[:, -num_slots:])
