"""Softmax attention over the keys that a query may see, one variant per name.

Twin: implementations/jax_backend/kernels/attention.py.  Truth: implementations/reference.py.

Heads come in K groups that share a key head (MQA: K = 1); keys are never repeated over a group.
Scores are scaled by head_dim ** -0.5; the softmax is float32 (float64 in float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from implementations.engine import Unsupported

# Queries of one window are cut in this many blocks: a block meets (1 + 1 / 4) W keys.
BLOCKS_PER_WINDOW = 4


def attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visible_BTS: Tensor, variant: str
) -> Tensor:
    """[B, T, N, H] in v's dtype. Every query must see at least one key."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or N % K:
        raise ValueError(
            "attention needs q [B, T, N, H], k and v [B, S, K, H] and K a divisor of N; "
            f"got q {tuple(q_BTNH.shape)}, k {tuple(k_BSKH.shape)}, v {tuple(v_BSKH.shape)}."
        )
    if visible_BTS.shape != (B, T, S):
        raise ValueError(f"visible must be {(B, T, S)}, got {tuple(visible_BTS.shape)}.")
    return VARIANTS[check(variant)](q_BTNH, k_BSKH, v_BSKH, visible_BTS)


def window_attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, reach_BT: Tensor, window: int, variant: str
) -> Tensor:
    """Attention in a sliding window, without the scores that no query sees.

    The last T keys are those of the queries, the others those before. Query t sees the keys at
    distances 0 to reach_BT[t], at most window - 1; keys that are not there must be out of reach.
    """
    B, T, N, H = q_BTNH.shape
    block = -(-window // BLOCKS_PER_WINDOW)
    num_past = -(-window // block)  # blocks of keys before a block of queries
    num_blocks = -(-T // block)
    back = num_blocks * block - T
    front = num_past * block - (k_BSKH.shape[1] - T)  # below 0: keys that no query sees

    def key_blocks(x_BSKH: Tensor) -> Tensor:
        """[B * num_blocks, (num_past + 1) * block, K, H]: the keys that each block may see."""
        x = F.pad(x_BSKH, (0, 0, 0, 0, front, back)).unflatten(1, (-1, block))
        x = torch.cat([x[:, i : i + num_blocks] for i in range(num_past + 1)], 2)
        return x.flatten(0, 1)

    # Padded queries get reach 0: they see their own, padded, key.
    q_BTNH = F.pad(q_BTNH, (0, 0, 0, 0, 0, back))
    reach_BT = F.pad(reach_BT.clamp(max=window - 1), (0, back))
    visible_BTS = within_reach(
        reach_BT.reshape(B * num_blocks, block), num_past * block, (num_past + 1) * block
    )
    out = attention(
        q_BTNH.reshape(B * num_blocks, block, N, H),
        key_blocks(k_BSKH),
        key_blocks(v_BSKH),
        visible_BTS,
        variant,
    )
    return out.reshape(B, num_blocks * block, N, H)[:, :T]


def within_reach(reach_BT: Tensor, num_past: int, num_keys: int) -> Tensor:
    """[B, T, S]: the first query stands at key num_past; it sees distances 0 to its reach."""
    query_T = torch.arange(num_past, num_past + reach_BT.shape[1], device=reach_BT.device)
    distance_TS = query_T[:, None] - torch.arange(num_keys, device=reach_BT.device)
    return (distance_TS >= 0) & (distance_TS <= reach_BT[:, :, None])


def check(variant: str) -> str:
    """The variant, when this backend has it; else Unsupported."""
    if variant not in VARIANTS:
        raise Unsupported(
            f"kernels.attention={variant} is not offered by the torch backend; "
            f"offered: {', '.join(VARIANTS)}."
        )
    return variant


def _plain(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visible_BTS: Tensor) -> Tensor:
    """The query heads of one key head are rows of one matrix."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q = (q_BTNH * H**-0.5).view(B, T, K, N // K, H).permute(0, 2, 1, 3, 4)
    scores = q.reshape(B, K, T * (N // K), H) @ k_BSKH.permute(0, 2, 3, 1)
    if scores.dtype == torch.bfloat16:
        scores = scores.float()
    hidden_BTS = torch.zeros(visible_BTS.shape, dtype=scores.dtype, device=scores.device)
    hidden_BTS.masked_fill_(~visible_BTS, float("-inf"))
    # T before the heads of a group keeps MQA free of transposes.
    scores = scores.view(B, K, T, N // K, S) + hidden_BTS[:, None, :, None]
    weights = scores.softmax(-1).to(v_BSKH.dtype).view(B, K, T * (N // K), S)
    out = (weights @ v_BSKH.transpose(1, 2)).view(B, K, T, N // K, H)
    return out.transpose(1, 2).reshape(B, T, N, H)


def _fused(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visible_BTS: Tensor) -> Tensor:
    """The framework's scaled_dot_product_attention."""
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=visible_BTS[:, None],
        enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2],
    )
    return out_BNTH.transpose(1, 2)


VARIANTS = {"plain": _plain, "fused": _fused}
