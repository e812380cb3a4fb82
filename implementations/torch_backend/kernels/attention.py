"""Softmax attention over a range of keys for each query, one variant per name.

Twin: implementations/jax_backend/kernels/attention.py.  Truth: implementations/reference.py.

Heads come in K groups that share a key head (MQA: K = 1); keys are never repeated over a group.
Scores are scaled by head_dim ** -0.5; the softmax is float32 (float64 in float64).

The Triton kernels never write scores: forward keeps one float32 per query and head, from which
backward computes the weights again, once for dq and once for dk and dv. A tile's rows are the
queries of all heads of one group, time first: in MQA a tile of 128 rows and 16 heads spans 8
positions, so that in a window of W it meets little more than W keys. Blocks of keys that no row
sees are skipped; only those that some row sees in part are masked. FLOPs for each visible pair of
query and key: 4 H forward and 14 H backward. All sums have a fixed order: no atomics.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from implementations.engine import Unsupported
from implementations.torch_backend.kernels.interpreter import is_interpreting

# Queries of one window are cut in this many blocks: a block meets (1 + 1 / 4) W keys.
BLOCKS_PER_WINDOW = 4
# Programs that keep a device busy: four for each of 132 multiprocessors (H100). Where blocks of
# keys are fewer, the heads of a group are shared out, and their parts of dk and dv added up.
ENOUGH_PROGRAMS = 528
LOG2_E = tl.constexpr(1.4426950408889634)


MAX_HEAD_DIM = 256
# (rows, keys, warps, stages) of each kernel, for heads of up to so many channels. The accumulators
# decide: 128 x 128 in float32 are 64 of the 255 registers of each thread of 8 warps, and backward
# for keys holds two. Beside them, as many rows as still compile without a spill and fit the shared
# memory (cuda80 163 KiB, cuda90 and cuda100 227, hip 64). On sm_90 a warp group's instruction
# takes 64 rows. Products of float32 run on the plain cores, with all channels of their operands in
# registers: small tiles. An MI300's waves have 512 registers where only 4 share a block.
TILES = {
    "cuda80": {
        ("forward", 128): (128, 64, 8, 3), ("forward", 256): (64, 32, 8, 2),
        ("dq", 128): (128, 32, 8, 3), ("dq", 256): (64, 32, 8, 2),
        ("dkv", 128): (32, 64, 4, 3), ("dkv", 256): (32, 64, 8, 2),
    },
    "cuda90": {
        ("forward", 128): (128, 64, 8, 3), ("forward", 256): (128, 32, 8, 3),
        ("dq", 128): (128, 64, 8, 3), ("dq", 256): (64, 64, 8, 2),
        ("dkv", 128): (64, 128, 8, 2), ("dkv", 256): (16, 64, 8, 2),
    },
    "cuda100": {
        ("forward", 128): (128, 64, 8, 3), ("forward", 256): (64, 64, 8, 2),
        ("dq", 128): (128, 64, 8, 3), ("dq", 256): (64, 32, 8, 2),
        ("dkv", 128): (64, 128, 8, 2), ("dkv", 256): (32, 64, 8, 2),
    },
    "hip": {
        ("forward", 128): (128, 64, 4, 1), ("forward", 256): (64, 32, 4, 1),
        ("dq", 128): (128, 32, 4, 1), ("dq", 256): (32, 32, 4, 1),
        ("dkv", 128): (32, 64, 4, 1), ("dkv", 256): (16, 64, 4, 1),
    },
    "float32": {
        ("forward", 128): (64, 16, 8, 2), ("forward", 256): (16, 32, 8, 2),
        ("dq", 128): (32, 16, 8, 2), ("dq", 256): (16, 16, 8, 2),
        ("dkv", 128): (16, 32, 8, 3), ("dkv", 256): (16, 32, 8, 2),
    },
    "float32 hip": {
        ("forward", 128): (64, 32, 4, 1), ("forward", 256): (32, 32, 4, 1),
        ("dq", 128): (32, 32, 4, 1), ("dq", 256): (32, 16, 4, 1),
        ("dkv", 128): (32, 32, 4, 1), ("dkv", 256): (16, 32, 4, 1),
    },
}  # fmt: skip


def attention(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    last_BT: Tensor,
    reach_BT: Tensor,
    variant: str,
) -> Tensor:
    """[B, T, N, H] in v's dtype. Query t sees the keys last[t] - reach[t] to last[t], inclusive.

    Every query must see at least one key, and within a row neither bound may decrease.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or N % K:
        raise ValueError(
            "attention needs q [B, T, N, H], k and v [B, S, K, H] and K a divisor of N; "
            f"got q {tuple(q_BTNH.shape)}, k {tuple(k_BSKH.shape)}, v {tuple(v_BSKH.shape)}."
        )
    for name, index_BT in {"last": last_BT, "reach": reach_BT}.items():
        if index_BT.shape != (B, T) or index_BT.is_floating_point():
            raise ValueError(
                f"{name} must be integers {(B, T)}, got {index_BT.dtype} {tuple(index_BT.shape)}."
            )
    return VARIANTS[check(variant)](q_BTNH, k_BSKH, v_BSKH, last_BT, reach_BT)


def window_attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, reach_BT: Tensor, window: int, variant: str
) -> Tensor:
    """Attention in a sliding window, without the scores that no query sees.

    The last T keys are those of the queries, the others those before. Query t sees the keys at
    distances 0 to reach_BT[t], at most window - 1; keys that are not there must be out of reach.
    """
    B, T, N, H = q_BTNH.shape
    num_before = k_BSKH.shape[1] - T
    reach_BT = reach_BT.clamp(max=window - 1)
    if variant == "triton":  # it skips by itself
        last_BT = torch.arange(num_before, num_before + T, device=reach_BT.device).expand(B, T)
        return attention(q_BTNH, k_BSKH, v_BSKH, last_BT, reach_BT, variant)
    block = -(-window // BLOCKS_PER_WINDOW)
    num_past = -(-window // block)  # blocks of keys before a block of queries
    num_blocks = -(-T // block)
    back = num_blocks * block - T
    front = num_past * block - num_before  # below 0: keys that no query sees

    def key_blocks(x_BSKH: Tensor) -> Tensor:
        """[B * num_blocks, (num_past + 1) * block, K, H]: the keys that each block may see."""
        x = F.pad(x_BSKH, (0, 0, 0, 0, front, back)).unflatten(1, (-1, block))
        x = torch.cat([x[:, i : i + num_blocks] for i in range(num_past + 1)], 2)
        return x.flatten(0, 1)

    # Padded queries get reach 0: they see their own, padded, key.
    q_BTNH = F.pad(q_BTNH, (0, 0, 0, 0, 0, back))
    reach_BT = F.pad(reach_BT, (0, back)).reshape(B * num_blocks, block)
    last_T = torch.arange(num_past * block, (num_past + 1) * block, device=reach_BT.device)
    out = attention(
        q_BTNH.reshape(B * num_blocks, block, N, H),
        key_blocks(k_BSKH),
        key_blocks(v_BSKH),
        last_T.expand_as(reach_BT),
        reach_BT,
        variant,
    )
    return out.reshape(B, num_blocks * block, N, H)[:, :T]


def check(variant: str) -> str:
    """The variant, when this backend has it; else Unsupported."""
    if variant not in VARIANTS:
        raise Unsupported(
            f"kernels.attention={variant} is not offered by the torch backend; "
            f"offered: {', '.join(VARIANTS)}."
        )
    return variant


def _visible(last_BT: Tensor, reach_BT: Tensor, num_keys: int) -> Tensor:
    """[B, T, S]: whether query t sees key s."""
    last_BT1, reach_BT1 = last_BT[:, :, None], reach_BT[:, :, None]
    behind_BTS = last_BT1 - torch.arange(num_keys, device=last_BT.device)
    return (behind_BTS >= 0) & (behind_BTS <= reach_BT1)


def _plain(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, last_BT: Tensor, reach_BT: Tensor
) -> Tensor:
    """The query heads of one key head are rows of one matrix."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q = (q_BTNH * H**-0.5).view(B, T, K, N // K, H).permute(0, 2, 1, 3, 4)
    scores = q.reshape(B, K, T * (N // K), H) @ k_BSKH.permute(0, 2, 3, 1)
    if scores.dtype == torch.bfloat16:
        scores = scores.float()
    hidden_BTS = torch.zeros((B, T, S), dtype=scores.dtype, device=scores.device)
    hidden_BTS.masked_fill_(~_visible(last_BT, reach_BT, S), float("-inf"))
    # T before the heads of a group keeps MQA free of transposes.
    scores = scores.view(B, K, T, N // K, S) + hidden_BTS[:, None, :, None]
    weights = scores.softmax(-1).to(v_BSKH.dtype).view(B, K, T * (N // K), S)
    out = (weights @ v_BSKH.transpose(1, 2)).view(B, K, T, N // K, H)
    return out.transpose(1, 2).reshape(B, T, N, H)


def _fused(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, last_BT: Tensor, reach_BT: Tensor
) -> Tensor:
    """The framework's scaled_dot_product_attention."""
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=_visible(last_BT, reach_BT, k_BSKH.shape[1])[:, None],
        enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2],
    )
    return out_BNTH.transpose(1, 2)


def _triton(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, last_BT: Tensor, reach_BT: Tensor
) -> Tensor:
    dtype = v_BSKH.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"kernels.attention=triton computes in float32, not in {dtype}.")
    if (H := q_BTNH.shape[-1]) > MAX_HEAD_DIM:
        raise Unsupported(f"kernels.attention=triton has head_dim up to {MAX_HEAD_DIM}, not {H}.")
    first_BT = (last_BT - reach_BT).clamp(min=0).int()
    last_BT = last_BT.clamp(max=k_BSKH.shape[1] - 1).int()  # no further than there are keys
    return _Attention.apply(q_BTNH.to(dtype), k_BSKH.to(dtype), v_BSKH, first_BT, last_BT)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, first_BT: Tensor, last_BT: Tensor
    ) -> Tensor:
        B, T, N, H = q_BTNH.shape
        S, K = k_BSKH.shape[1:3]
        inputs = [x.contiguous() for x in (q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT)]
        out_BTNH = q_BTNH.new_empty((B, T, N, H))
        lse_BTN = q_BTNH.new_empty((B, T, N), dtype=torch.float32)
        tiles = tiles_of("forward", H, q_BTNH.dtype, _target())
        grid = (triton.cdiv(T * (N // K), tiles["BLOCK_M"]), B * K)
        _forward_kernel[grid](*inputs, out_BTNH, lse_BTN, T, S, **_shape(K, N // K, H), **tiles)
        ctx.save_for_backward(*inputs, out_BTNH, lse_BTN)
        return out_BTNH

    @staticmethod
    def backward(ctx, dout_BTNH: Tensor) -> tuple[Tensor | None, ...]:
        q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT, out_BTNH, lse_BTN = ctx.saved_tensors
        inputs = (q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT)
        dout_BTNH = dout_BTNH.contiguous()
        B, T, N, H = q_BTNH.shape
        S, K = k_BSKH.shape[1:3]
        G, dtype = N // K, q_BTNH.dtype

        dq_BTNH, delta_BTN = q_BTNH.new_empty((B, T, N, H)), lse_BTN.new_empty((B, T, N))
        tiles = tiles_of("dq", H, dtype, _target())
        grid = (triton.cdiv(T * G, tiles["BLOCK_M"]), B * K)
        _dq_kernel[grid](
            *inputs,
            out_BTNH,
            lse_BTN,
            dout_BTNH,
            delta_BTN,
            dq_BTNH,
            T,
            S,
            **_shape(K, G, H),
            **tiles,
        )

        tiles = tiles_of("dkv", H, dtype, _target())
        num_blocks = triton.cdiv(S, tiles["BLOCK_N"])
        P = num_parts(G, num_blocks * B * K)
        dk_PBSKH, dv_PBSKH = (
            q_BTNH.new_empty((P, B, S, K, H), dtype=dtype if P == 1 else torch.float32)
            for _ in range(2)
        )
        _dkv_kernel[(num_blocks, B * K * P)](
            *inputs,
            seen_by(first_BT, last_BT, S, tiles["BLOCK_N"]),
            lse_BTN,
            dout_BTNH,
            delta_BTN,
            dk_PBSKH,
            dv_PBSKH,
            T,
            S,
            **_shape(K, G // P, H),
            PARTS=P,
            **tiles,
        )
        dk_BSKH, dv_BSKH = (
            x_PBSKH[0] if P == 1 else x_PBSKH.sum(0).to(dtype) for x_PBSKH in (dk_PBSKH, dv_PBSKH)
        )
        return dq_BTNH, dk_BSKH, dv_BSKH, None, None


def seen_by(first_BT: Tensor, last_BT: Tensor, num_keys: int, block: int) -> Tensor:
    """[B, blocks of keys, 4]: queries 0 to 3 see some key of the block, 1 to 2 every one.

    Bounds as of a Python range: from entry 0 up to, and without, entry 3.
    """
    B, num_blocks = first_BT.shape[0], -(-num_keys // block)
    # the first key of each block, then the last one of each: without torch.cat, as Inductor of
    # torch 2.11 does not compile what it makes of that for a single block
    bound = torch.arange(2 * num_blocks, dtype=torch.int32, device=first_BT.device)
    last_key = ((bound - num_blocks + 1) * block).clamp(max=num_keys) - 1
    bounds = torch.where(bound < num_blocks, bound * block, last_key).expand(B, -1).contiguous()
    begins = torch.searchsorted(last_BT, bounds, out_int32=True)
    ends = torch.searchsorted(first_BT, bounds, right=True, out_int32=True)
    (some_begin, all_begin), (all_end, some_end) = begins.chunk(2, 1), ends.chunk(2, 1)
    return torch.stack([some_begin, all_begin, all_end, some_end], 2)


def num_parts(num_heads: int, num_programs: int) -> int:
    """The smallest divisor of the heads of a group that makes enough programs; else all of them."""
    divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    return next((n for n in divisors if n * num_programs >= ENOUGH_PROGRAMS), num_heads)


def _shape(K: int, G: int, H: int) -> dict[str, int]:
    return {"K": K, "G": G, "H": H, "BLOCK_H": max(triton.next_power_of_2(H), 16)}


def tiles_of(kernel: str, head_dim: int, dtype: torch.dtype, target: str) -> dict[str, int]:
    width = 128 if head_dim <= 128 else MAX_HEAD_DIM
    family = "hip" if target.startswith("hip") else target
    if dtype == torch.float32:
        family = "float32 hip" if family == "hip" else "float32"
    elif family not in TILES:
        family = "cuda80"  # of the least shared memory, and of no instruction that others lack
    rows, keys, num_warps, num_stages = TILES[family][kernel, width]
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": num_warps, "num_stages": num_stages}


@torch.compiler.assume_constant_result
def _target() -> str:
    """cuda80, cuda90, hipgfx942, ...; the interpreter, which has no device, does as an H100."""
    if is_interpreting():
        return "cuda90"
    target = triton.runtime.driver.active.get_current_target()
    return f"{target.backend}{target.arch}"


@triton.jit(do_not_specialize=["T", "S"])
def _forward_kernel(
    q_ptr,  # [B, T, K * G, H]
    k_ptr,  # [B, S, K, H]
    v_ptr,  # [B, S, K, H]
    first_ptr,  # [B, T] int32
    last_ptr,  # [B, T] int32
    out_ptr,  # [B, T, K * G, H]
    lse_ptr,  # [B, T, K * G] float32
    T,
    S,
    K: tl.constexpr,
    G: tl.constexpr,  # query heads of a group
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The last rows see the most keys where attention is global: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // K).to(tl.int64)  # int64: B * T * N * H passes 2**31
    group = tl.program_id(1) % K
    origin, place, time, is_row = _rows(block, batch, group, T, K, G, BLOCK_M)
    q = _load(q_ptr + origin * H, place, True, 1, H, BLOCK_H)
    first_ptr += batch * T
    last_ptr += batch * T
    first, last = tl.load(first_ptr + time), tl.load(last_ptr + time)
    low, full_low, full_high, high = _key_blocks(
        first_ptr, last_ptr, block, T, S, G, BLOCK_M, BLOCK_N
    )
    num_full = full_high - full_low
    k_ptr += (batch * S * K + group) * H
    v_ptr += (batch * S * K + group) * H
    key = tl.arange(0, BLOCK_N)

    top = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: no -inf - -inf where a row sees nothing
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for j in range(full_low, full_high):
        skipped = tl.cast(j, tl.int64) * (BLOCK_N * K * H)
        k = _load(k_ptr + skipped, key, True, K, H, BLOCK_H)
        v = _load(v_ptr + skipped, key, True, K, H, BLOCK_H)
        scores = _product(q, tl.trans(k)) * (H**-0.5 * LOG2_E)
        out, total, top = _attend(scores, v, out, total, top)
    for i in range(low, high - num_full):
        j = tl.where(i < full_low, i, i + num_full)
        skipped = tl.cast(j, tl.int64) * (BLOCK_N * K * H)
        is_key = j * BLOCK_N + key < S
        k = _load(k_ptr + skipped, key, is_key, K, H, BLOCK_H)
        v = _load(v_ptr + skipped, key, is_key, K, H, BLOCK_H)
        scores = _product(q, tl.trans(k)) * (H**-0.5 * LOG2_E)
        seen = _is_seen((j * BLOCK_N + key)[None, :], first[:, None], last[:, None])
        out, total, top = _attend(tl.where(seen, scores, float("-inf")), v, out, total, top)

    _store(out_ptr + origin * H, place, out / total[:, None], is_row, 1, H, BLOCK_H)
    tl.store(lse_ptr + origin + place, top + tl.log2(total), mask=is_row)


@triton.jit
def _attend(scores, v, out, total, top):
    """The sums with one more block of keys; scores in base 2."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return out, total * shrink + tl.sum(weights, 1), new_top


@triton.jit(do_not_specialize=["T", "S"])
def _dq_kernel(
    q_ptr,  # [B, T, K * G, H]
    k_ptr,  # [B, S, K, H]
    v_ptr,  # [B, S, K, H]
    first_ptr,  # [B, T] int32
    last_ptr,  # [B, T] int32
    out_ptr,  # [B, T, K * G, H]
    lse_ptr,  # [B, T, K * G] float32
    dout_ptr,  # [B, T, K * G, H]
    delta_ptr,  # [B, T, K * G] float32: sums of out * dout over H, written for _dkv_kernel
    dq_ptr,  # [B, T, K * G, H]
    T,
    S,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // K).to(tl.int64)
    group = tl.program_id(1) % K
    origin, place, time, is_row = _rows(block, batch, group, T, K, G, BLOCK_M)
    out = _load(out_ptr + origin * H, place, True, 1, H, BLOCK_H).to(tl.float32)
    dout = _load(dout_ptr + origin * H, place, True, 1, H, BLOCK_H)
    delta = tl.sum(out * dout.to(tl.float32), 1)
    tl.store(delta_ptr + origin + place, delta, mask=is_row)
    q = _load(q_ptr + origin * H, place, True, 1, H, BLOCK_H)
    lse = tl.load(lse_ptr + origin + place)
    first_ptr += batch * T
    last_ptr += batch * T
    first, last = tl.load(first_ptr + time), tl.load(last_ptr + time)
    low, full_low, full_high, high = _key_blocks(
        first_ptr, last_ptr, block, T, S, G, BLOCK_M, BLOCK_N
    )
    num_full = full_high - full_low
    k_ptr += (batch * S * K + group) * H
    v_ptr += (batch * S * K + group) * H
    key = tl.arange(0, BLOCK_N)

    dq = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for j in range(full_low, full_high):
        skipped = tl.cast(j, tl.int64) * (BLOCK_N * K * H)
        k = _load(k_ptr + skipped, key, True, K, H, BLOCK_H)
        v = _load(v_ptr + skipped, key, True, K, H, BLOCK_H)
        weights = tl.exp2(_product(q, tl.trans(k)) * (H**-0.5 * LOG2_E) - lse[:, None])
        dscores = weights * (_product(dout, tl.trans(v)) - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    for i in range(low, high - num_full):
        j = tl.where(i < full_low, i, i + num_full)
        skipped = tl.cast(j, tl.int64) * (BLOCK_N * K * H)
        is_key = j * BLOCK_N + key < S
        k = _load(k_ptr + skipped, key, is_key, K, H, BLOCK_H)
        v = _load(v_ptr + skipped, key, is_key, K, H, BLOCK_H)
        weights = tl.exp2(_product(q, tl.trans(k)) * (H**-0.5 * LOG2_E) - lse[:, None])
        seen = _is_seen((j * BLOCK_N + key)[None, :], first[:, None], last[:, None])
        weights = tl.where(seen, weights, 0.0)
        dscores = weights * (_product(dout, tl.trans(v)) - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")

    _store(dq_ptr + origin * H, place, dq * H**-0.5, is_row, 1, H, BLOCK_H)


@triton.jit(do_not_specialize=["T", "S"])
def _dkv_kernel(
    q_ptr,  # [B, T, K * PARTS * G, H]
    k_ptr,  # [B, S, K, H]
    v_ptr,  # [B, S, K, H]
    first_ptr,  # [B, T] int32
    last_ptr,  # [B, T] int32
    seen_by_ptr,  # [B, blocks of keys, 4] int32
    lse_ptr,  # [B, T, K * PARTS * G] float32
    dout_ptr,  # [B, T, K * PARTS * G, H]
    delta_ptr,  # [B, T, K * PARTS * G] float32
    dk_ptr,  # [PARTS, B, S, K, H]
    dv_ptr,  # [PARTS, B, S, K, H]
    T,
    S,
    K: tl.constexpr,
    G: tl.constexpr,  # query heads of one part of a group
    H: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0)
    part = tl.program_id(1) % PARTS
    group = tl.program_id(1) // PARTS % K
    batch = (tl.program_id(1) // (PARTS * K)).to(tl.int64)
    num_batches = tl.num_programs(1) // (PARTS * K)
    heads = group * PARTS + part
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    keys_before = (batch * S * K + group) * H
    k = _load(k_ptr + keys_before, key, key < S, K, H, BLOCK_H)
    v = _load(v_ptr + keys_before, key, key < S, K, H, BLOCK_H)
    first_ptr += batch * T
    last_ptr += batch * T
    seen_by_ptr += (batch * tl.num_programs(0) + block) * 4
    low = tl.load(seen_by_ptr) * G // BLOCK_M
    full_low = tl.cdiv(tl.load(seen_by_ptr + 1) * G, BLOCK_M)
    full_high = tl.maximum(tl.load(seen_by_ptr + 2) * G // BLOCK_M, full_low)
    high = tl.cdiv(tl.load(seen_by_ptr + 3) * G, BLOCK_M)
    num_full = full_high - full_low

    dk = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for j in range(full_low, full_high):
        origin, place, time, is_row = _rows(j, batch, heads, T, K * PARTS, G, BLOCK_M)
        q = _load(q_ptr + origin * H, place, True, 1, H, BLOCK_H)
        dout = _load(dout_ptr + origin * H, place, True, 1, H, BLOCK_H)
        lse = tl.load(lse_ptr + origin + place)
        delta = tl.load(delta_ptr + origin + place)
        weights = tl.exp2(_product(k, tl.trans(q)) * (H**-0.5 * LOG2_E) - lse[None, :])
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
        dscores = weights * (_product(v, tl.trans(dout)) - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    for i in range(low, high - num_full):
        j = tl.where(i < full_low, i, i + num_full)
        origin, place, time, is_row = _rows(j, batch, heads, T, K * PARTS, G, BLOCK_M)
        q = _load(q_ptr + origin * H, place, True, 1, H, BLOCK_H)
        dout = _load(dout_ptr + origin * H, place, True, 1, H, BLOCK_H)
        lse = tl.load(lse_ptr + origin + place)
        delta = tl.load(delta_ptr + origin + place)
        first, last = tl.load(first_ptr + time), tl.load(last_ptr + time)
        weights = tl.exp2(_product(k, tl.trans(q)) * (H**-0.5 * LOG2_E) - lse[None, :])
        seen = _is_seen(key[:, None], first[None, :], last[None, :]) & is_row[None, :]
        weights = tl.where(seen, weights, 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
        dscores = weights * (_product(v, tl.trans(dout)) - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")

    keys_before += part.to(tl.int64) * num_batches * S * K * H
    _store(dk_ptr + keys_before, key, dk * H**-0.5, key < S, K, H, BLOCK_H)
    _store(dv_ptr + keys_before, key, dv, key < S, K, H, BLOCK_H)


@triton.jit
def _rows(block, batch, group, T, K: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where the rows of a block lie in [B, T, K * G]: an origin, and the place of each from there.

    Row r is head r % G of the group at time r // G. Rows past the end repeat the last time.
    """
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    time = tl.minimum(row // G, T - 1)
    begin = block * BLOCK_M // G
    origin = (batch * T + begin) * (K * G) + group * G
    return origin, (time - begin) * (K * G) + row % G, time, row < T * G


@triton.jit
def _key_blocks(
    first_ptr,  # [T]
    last_ptr,  # [T]
    block,
    T,
    S,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of the blocks of keys from the first to the last number, some row of the block sees a part;
    from the second to the third, every row sees all."""
    begin = block * BLOCK_M // G
    end = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G, T - 1)
    low = tl.load(first_ptr + begin) // BLOCK_N
    full_low = tl.cdiv(tl.load(first_ptr + end), BLOCK_N)
    full_high = tl.maximum((tl.load(last_ptr + begin) + 1) // BLOCK_N, full_low)
    high = tl.cdiv(tl.minimum(tl.load(last_ptr + end) + 1, S), BLOCK_N)
    return low, full_low, full_high, high


@triton.jit
def _load(ptr, place, mask, stride: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """[places, BLOCK_H]: vectors of H channels, place * stride of them after the pointer."""
    channel = tl.arange(0, BLOCK_H)
    ptrs = ptr + place[:, None] * (stride * H) + channel[None, :]
    if mask is True:
        if H == BLOCK_H:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(channel < H)[None, :], other=0.0)
    else:
        return tl.load(ptrs, mask=mask[:, None] & (channel < H)[None, :], other=0.0)


@triton.jit
def _store(ptr, place, value, mask, stride: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    channel = tl.arange(0, BLOCK_H)
    ptrs = ptr + place[:, None] * (stride * H) + channel[None, :]
    mask = mask[:, None] & (channel < H)[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _is_seen(key, first, last):
    return (key >= first) & (key <= last)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


VARIANTS = {"plain": _plain, "fused": _fused, "triton": _triton}
