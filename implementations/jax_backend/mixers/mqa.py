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
from implementations.jax_backend.kernels.attention_step import attention_step, write
from implementations.jax_backend.kernels.rope import rope
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
    rotation = (position_BT, config.rope_dim, config.rope_base, kernels.layers)
    q_BTNH, k_BTKH = rope(q_BTNH, *rotation), rope(k_BTKH, *rotation)
    attend = attend_alone if state is None else attend_with_state
    y_BTNH, state = attend(q_BTNH, k_BTKH, v_BTKH, position_BT, state, config, kernels.attention)
    return linear(params["linear_out"], y_BTNH.reshape(B, T, -1)), state


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
    if W is not None and W < T:
        return window_attention(q_BTNH, k_BTKH, v_BTKH, reach_BT, W, variant), None
    last_BT = jnp.broadcast_to(index_T, reach_BT.shape)
    return attention(q_BTNH, k_BTKH, v_BTKH, last_BT, reach_BT, variant), None


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
    if T == 1:
        token = (x[:, 0] for x in (q_BTNH, k_BTKH, v_BTKH))
        out_BNH, *slots = attention_step(*token, position_BT, *state, variant)
        return out_BNH[:, None], State(*slots)
    new = State(write(state.k_BSKH, k_BTKH, position_BT), write(state.v_BSKH, v_BTKH, position_BT))
    if num_slots == W:
        # The chunk overwrites keys that its first queries see: read the ring from before it.
        slot_BS = (position_BT[:, :1] + jnp.arange(W, dtype=jnp.int32)) % W
        past_BSKH = [
            jnp.take_along_axis(x, slot_BS[:, :, None, None], axis=1) for x in state
        ]  # from the oldest to the newest
        k_BSKH = jnp.concatenate([past_BSKH[0], k_BTKH], axis=1)
        v_BSKH = jnp.concatenate([past_BSKH[1], v_BTKH], axis=1)
        return window_attention(q_BTNH, k_BSKH, v_BSKH, position_BT, W, variant), new
    # Slot s holds position s: all that were are kept.
    return attention(q_BTNH, new.k_BSKH, new.v_BSKH, position_BT, position_BT, variant), new
