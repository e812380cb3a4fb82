"""Multi-query attention: causal, global or in a sliding window, with rotary positions (RoPE).

Source: arXiv:2402.19427 section 2.3.  Twin: implementations/jax_backend/mixers/mqa.py.

A key is visible iff its distance is at most min(W - 1, position of the query). The cache of a
sequence holds position p in slot p % num_slots: a ring of the W visible keys, or all of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from implementations.config import ModelConfig
from implementations.torch_backend.kernels.attention import attention, window_attention
from implementations.torch_backend.kernels.attention_step import attention_step
from implementations.torch_backend.kernels.rope import rope
from implementations.torch_backend.layers import Linear


class State(NamedTuple):
    """Written in place: the state that a mixer was given is used up."""

    k_BSKH: Tensor  # rotated
    v_BSKH: Tensor
    is_empty: bool = False  # no slot was written: none needs to be read


def empty_state(
    config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> State:
    W = config.num_visible_keys
    num_slots = capacity if W is None else min(capacity, W)
    shape = (batch_size, num_slots, config.num_kv_heads, config.head_dim)
    k_BSKH, v_BSKH = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    return State(k_BSKH, v_BSKH, is_empty=True)


class Mixer(nn.Module):
    """With a state, positions count on from those of its T predecessors, one document a row."""

    def __init__(self, config: ModelConfig, kernels: dict[str, str]):
        super().__init__()
        D, N, K, H = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.linear_q = Linear(D, N * H, has_bias=False)
        self.linear_k = Linear(D, K * H, has_bias=False)
        self.linear_v = Linear(D, K * H, has_bias=False)
        self.linear_out = Linear(N * H, D, config.biases)
        self.config = config
        self.variant, self.layers = kernels["attention"], kernels["layers"]

    def forward(
        self, x_BTD: Tensor, position_BT: Tensor, state: State | None
    ) -> tuple[Tensor, State | None]:
        B, T, _ = x_BTD.shape
        H, rotation = self.config.head_dim, (self.config.rope_dim, self.config.rope_base)
        q_BTNH = self.linear_q(x_BTD).view(B, T, -1, H)
        k_BTKH = self.linear_k(x_BTD).view(B, T, -1, H)
        v_BTKH = self.linear_v(x_BTD).view(B, T, -1, H)
        is_filled = state is not None and not state.is_empty
        if T == 1 and is_filled and self.variant == "triton":
            heads = (q_BTNH[:, 0], k_BTKH[:, 0], v_BTKH[:, 0], position_BT[:, 0])
            y_BNH = attention_step(*heads, state.k_BSKH, state.v_BSKH, *rotation)
            return self.linear_out(y_BNH.reshape(B, 1, -1)), state
        q_BTNH = rope(q_BTNH, position_BT, *rotation, self.layers)
        k_BTKH = rope(k_BTKH, position_BT, *rotation, self.layers)
        if not is_filled:
            y_BTNH = attend_alone(q_BTNH, k_BTKH, v_BTKH, position_BT, self.config, self.variant)
            state = None if state is None else write(state, k_BTKH, v_BTKH, position_BT)
        else:
            y_BTNH, state = attend_with_state(
                q_BTNH, k_BTKH, v_BTKH, position_BT, state, self.config, self.variant
            )
        return self.linear_out(y_BTNH.reshape(B, T, -1)), state


def attend_alone(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    position_BT: Tensor,
    config: ModelConfig,
    variant: str,
) -> Tensor:
    """Nothing lies before the first query."""
    T, W = q_BTNH.shape[1], config.num_visible_keys
    reach_BT = torch.minimum(position_BT, torch.arange(T, device=position_BT.device))
    if W is not None and W < T:
        return window_attention(q_BTNH, k_BTKH, v_BTKH, reach_BT, W, variant)
    last_BT = torch.arange(T, device=position_BT.device).expand_as(position_BT)
    return attention(q_BTNH, k_BTKH, v_BTKH, last_BT, reach_BT, variant)


def attend_with_state(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    position_BT: Tensor,
    state: State,
    config: ModelConfig,
    variant: str,
) -> tuple[Tensor, State]:
    T, W, num_slots = q_BTNH.shape[1], config.num_visible_keys, state.k_BSKH.shape[1]
    device = position_BT.device
    if T > 1 and num_slots == W:
        # The chunk overwrites keys that its first queries see: read the ring from before it.
        slots = (position_BT[0, 0] + torch.arange(W, device=device)) % W
        k_BSKH = torch.cat([state.k_BSKH[:, slots], k_BTKH], 1)  # from the oldest to the newest
        v_BSKH = torch.cat([state.v_BSKH[:, slots], v_BTKH], 1)
        y_BTNH = window_attention(q_BTNH, k_BSKH, v_BSKH, position_BT, W, variant)
        return y_BTNH, write(state, k_BTKH, v_BTKH, position_BT)
    # Here slot s holds position s, or one query sees all slots: those written are visible.
    new = write(state, k_BTKH, v_BTKH, position_BT)
    last_BT = position_BT.clamp(max=num_slots - 1)
    return attention(q_BTNH, new.k_BSKH, new.v_BSKH, last_BT, last_BT, variant), new


def write(state: State, k_BTKH: Tensor, v_BTKH: Tensor, position_BT: Tensor) -> State:
    """The slots with those of the new keys and values that still fit; positions as in row 0."""
    num_slots = state.k_BSKH.shape[1]
    slots = position_BT[0, -num_slots:] % num_slots
    state.k_BSKH.index_copy_(1, slots, k_BTKH[:, -num_slots:])
    state.v_BSKH.index_copy_(1, slots, v_BTKH[:, -num_slots:])
    return State(state.k_BSKH, state.v_BSKH)
