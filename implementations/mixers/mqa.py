"""Multi-query attention: causal, global or in a sliding window, with rotary positions (RoPE).

Source: arXiv:2402.19427 sections 2.3 and 2.4; RoPE on the first rope_dim channels of every head.
"""

from typing import Any

import numpy as np

from implementations import reference
from implementations.config import ModelConfig
from implementations.parameters import ParamSpec, linear_specs
from implementations.reference import Params, linear, linear_grad, rope, rope_grad, under, within


def param_specs(config: ModelConfig) -> list[ParamSpec]:
    D, N, K, H = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
    query, key = ("model", "heads"), ("model", "kv")
    return [
        *linear_specs(config, "linear_q", (D, N * H), query, has_bias=False),
        *linear_specs(config, "linear_k", (D, K * H), key, has_bias=False),
        *linear_specs(config, "linear_v", (D, K * H), key, has_bias=False),
        *linear_specs(config, "linear_out", (N * H, D), ("heads", "model"), is_output=True),
    ]


def state_bytes(config: ModelConfig, capacity: int, itemsize: int) -> int:
    """KV cache of one sequence: a ring of the visible keys, or all of the capacity."""
    visible = config.num_visible_keys
    slots = capacity if visible is None else min(capacity, visible)
    return slots * 2 * config.num_kv_heads * config.head_dim * itemsize


def mixing_flops(config: ModelConfig, num_keys: float) -> float:
    """FLOPs a token beyond its linear layers: scores and weighted values over the visible keys."""
    return 4 * config.num_heads * config.head_dim * num_keys


def forward(
    config: ModelConfig, params: Params, x_BTD: np.ndarray, position_BT: np.ndarray
) -> tuple[np.ndarray, Any]:
    """The equations in NumPy: y [B, T, D], and what backward needs."""
    B, T, _ = x_BTD.shape
    heads, kv_heads = (B, T, config.num_heads, -1), (B, T, config.num_kv_heads, -1)
    rotation = (position_BT, config.rope_dim, config.rope_base)
    q_BTNH = rope(linear(within(params, "linear_q"), x_BTD).reshape(heads), *rotation)
    k_BSKH = rope(linear(within(params, "linear_k"), x_BTD).reshape(kv_heads), *rotation)
    v_BSKH = linear(within(params, "linear_v"), x_BTD).reshape(kv_heads)
    seen = (q_BTNH, k_BSKH, v_BSKH, position_BT, config.num_visible_keys)
    y_BTE = reference.attention(*seen).reshape(B, T, -1)
    return linear(within(params, "linear_out"), y_BTE), (x_BTD, seen, y_BTE)


def backward(
    config: ModelConfig, params: Params, saved: Any, dy_BTD: np.ndarray
) -> tuple[np.ndarray, Params]:
    """(dx, gradients by name)."""
    x_BTD, seen, y_BTE = saved
    B, T, _ = x_BTD.shape
    rotation = (seen[3], config.rope_dim, config.rope_base)
    dout, dy_BTE = linear_grad(within(params, "linear_out"), y_BTE, dy_BTD)
    dq_BTNH, dk_BSKH, dv_BSKH = reference.attention_grad(*seen, dy_BTE.reshape(seen[0].shape))
    inner = {
        "linear_q": rope_grad(*rotation, dq_BTNH),
        "linear_k": rope_grad(*rotation, dk_BSKH),
        "linear_v": dv_BSKH,
    }
    dx_BTD, grads = np.zeros_like(x_BTD), {"linear_out": dout}
    for name, dprojected in inner.items():
        grads[name], dx = linear_grad(within(params, name), x_BTD, dprojected.reshape(B, T, -1))
        dx_BTD += dx
    return dx_BTD, under(**grads)


def activations(params: Params, saved: Any) -> Params:
    """What forward computed on its way, by the name of the layer that gives it."""
    x_BTD, _, y_BTE = saved
    projected = {
        name: linear(within(params, name), x_BTD) for name in ("linear_q", "linear_k", "linear_v")
    }
    return projected | {"linear_out.input": y_BTE}
