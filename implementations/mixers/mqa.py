"""Multi-query attention: causal, global or in a sliding window, with rotary positions (RoPE).

Source: arXiv:2402.19427 sections 2.3 and 2.4; RoPE on the first rope_dim channels of every head.
"""

from implementations.config import ModelConfig
from implementations.parameters import ParamSpec, linear_specs


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
