"""One token of decoding: rotates q and k, writes k and v into their slot, attends to every slot.

Twin: implementations/jax_backend/kernels/attention_step.py, which is given rotated q and k.
Truth: rope and attention of one token, in a cache written before.

Position p lies in slot p % num_slots, so that slots 0 to min(p, num_slots - 1) are visible: a ring
of the visible keys, or all of them. A step must read each visible key and value once, in bfloat16
4 H bytes a slot and key head. The slots are split over programs, enough of them for batch size 1;
each leaves the largest score, the sum and the weighted values of its slots, and a second kernel
puts them together. The grid follows from num_slots, and the position is read on the device: a
CUDA graph of a step serves every position.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from implementations.engine import Unsupported
from implementations.torch_backend.kernels.attention import LOG2_E
from implementations.torch_backend.kernels.rope import float32_rates, rotation

# Two programs on each of 132 multiprocessors (H100), with 2 stages of 32 KiB of keys and values in
# flight in each, ask for more than its memory's latency times bandwidth.
ENOUGH_PROGRAMS = 264
MIN_PART = 64  # slots: 64 of 128 channels in bfloat16 are such a stage
PARTS_AT_ONCE = 16  # of one head, when they are put together


def attention_step(
    q_BNH: Tensor,
    k_BKH: Tensor,
    v_BKH: Tensor,
    position_B: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    rope_dim: int,
    base: float,
) -> Tensor:
    """[B, N, H] in v's dtype; k_BSKH (rotated keys) and v_BSKH are written in place: for
    inference alone. All sequences stand at one position."""
    B, N, H = q_BNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BKH.shape != (B, K, H) or v_BKH.shape != k_BKH.shape or N % K:
        raise ValueError(
            "attention_step needs q [B, N, H], k and v [B, K, H] and K a divisor of N; "
            f"got q {tuple(q_BNH.shape)}, k {tuple(k_BKH.shape)}, v {tuple(v_BKH.shape)}."
        )
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or position_B.shape != (B,):
        raise ValueError(
            f"attention_step needs slots [{B}, S, {K}, {H}] and positions [{B}]; got k "
            f"{tuple(k_BSKH.shape)}, v {tuple(v_BSKH.shape)}, position {tuple(position_B.shape)}."
        )
    dtype = v_BSKH.dtype
    if dtype not in (torch.float32, torch.bfloat16) or k_BSKH.dtype != dtype:
        raise Unsupported(
            f"kernels.attention=triton needs slots of one dtype, float32 or bfloat16, not {dtype}."
        )
    if not (k_BSKH.is_contiguous() and v_BSKH.is_contiguous()):
        raise ValueError("attention_step writes into the slots: they must be contiguous.")
    part_len, num_parts = parts_of(S, B * K)
    BLOCK_H = max(triton.next_power_of_2(H), 16)
    out_BNH = q_BNH.new_empty((B, N, H), dtype=dtype)
    float32 = {"dtype": torch.float32, "device": q_BNH.device}
    sum_BNPH = torch.empty((B, N, num_parts, H), **float32)
    top_BNP, total_BNP = (torch.empty((B, N, num_parts), **float32) for _ in range(2))
    half = rope_dim // 2
    rate_H = float32_rates(max(half, 1), base, q_BNH.device)
    inputs = [x.to(dtype).contiguous() for x in (q_BNH, k_BKH, v_BKH)]
    position_B = position_B.contiguous()
    _part_kernel[(num_parts, B * K)](
        *inputs,
        position_B,
        rate_H,
        k_BSKH,
        v_BSKH,
        sum_BNPH,
        top_BNP,
        total_BNP,
        S,
        part_len,
        K=K,
        G=N // K,
        H=H,
        HALF=half,
        BLOCK_G=max(triton.next_power_of_2(N // K), 16),  # rows of a matrix instruction
        BLOCK_H=BLOCK_H,
        **blocks(BLOCK_H, dtype),
    )
    _combine_kernel[(B * N,)](
        position_B,
        sum_BNPH,
        top_BNP,
        total_BNP,
        out_BNH,
        S,
        part_len,
        num_parts,
        N=N,
        H=H,
        BLOCK_H=BLOCK_H,
        BLOCK_P=PARTS_AT_ONCE,
    )
    return out_BNH


def parts_of(num_slots: int, num_rows: int) -> tuple[int, int]:
    """(slots of a part, parts): the longest parts, by doubling, that make enough programs."""
    part_len = MIN_PART
    while num_rows * triton.cdiv(num_slots, 2 * part_len) >= ENOUGH_PROGRAMS:
        part_len *= 2
    return part_len, triton.cdiv(num_slots, part_len)


def blocks(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """As many slots as compile without a spill: products of float32 take many registers."""
    slots, num_warps, num_stages = {
        (torch.bfloat16, True): (64, 4, 2),
        (torch.bfloat16, False): (32, 8, 2),
        (torch.float32, True): (32, 8, 2),
        (torch.float32, False): (16, 8, 1),
    }[dtype, head_dim <= 128]
    return {"BLOCK_S": slots, "num_warps": num_warps, "num_stages": num_stages}


@triton.jit(do_not_specialize=["S", "part_len"])
def _part_kernel(
    q_ptr,  # [B, K * G, H]
    new_k_ptr,  # [B, K, H]
    new_v_ptr,  # [B, K, H]
    position_ptr,  # [B]
    rate_ptr,  # [HALF] float32
    k_ptr,  # [B, S, K, H], read and one slot written
    v_ptr,  # [B, S, K, H], read and one slot written
    sum_ptr,  # [B, K * G, parts, H] float32
    top_ptr,  # [B, K * G, parts] float32, base 2
    total_ptr,  # [B, K * G, parts] float32
    S,
    part_len,
    K: tl.constexpr,
    G: tl.constexpr,  # query heads of a group
    H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1)  # batch * K + group
    batch = (row // K).to(tl.int64)  # int64: B * S * K * H passes 2**31
    group = row % K
    position = tl.load(position_ptr + batch)
    num_visible = tl.minimum(position + 1, S).to(tl.int32)
    begin = part * part_len
    end = tl.minimum(begin + part_len, num_visible)
    if begin < end:
        channel = tl.arange(0, BLOCK_H)
        member = tl.arange(0, BLOCK_G)
        cos, sin = _channel_rotation(rate_ptr, position, channel, HALF)
        q_ptrs = q_ptr + (row * G + member)[:, None] * H
        is_member = (member < G)[:, None]
        q = _rotated(q_ptrs, channel[None, :], is_member, cos, sin, H, HALF)
        new_k = _rotated(new_k_ptr + row * H, channel, channel < H, cos, sin, H, HALF)
        new_v = tl.load(new_v_ptr + row * H + channel, mask=channel < H, other=0.0)

        # No other program reads the new slot: this one takes what it writes from registers.
        new_slot = (position % S).to(tl.int32)
        k_ptr += (batch * S * K + group) * H
        v_ptr += (batch * S * K + group) * H
        slot = tl.arange(0, BLOCK_S)
        offset = slot[:, None] * (K * H) + channel[None, :]
        top = tl.full([BLOCK_G], -1e30, tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
        for start in range(begin, end, BLOCK_S):
            skipped = tl.cast(start, tl.int64) * (K * H)
            if q.dtype == tl.float32:  # kept, a row of it would take H registers of each thread
                q = _rotated(q_ptrs, channel[None, :], is_member & (start < end), cos, sin, H, HALF)
            is_new = (start + slot == new_slot)[:, None]
            is_seen = start + slot < end
            mask = is_seen[:, None] & (channel < H)[None, :] & ~is_new
            k = tl.load(k_ptr + skipped + offset, mask=mask, other=0.0)
            v = tl.load(v_ptr + skipped + offset, mask=mask, other=0.0)
            k = tl.where(is_new, new_k[None, :], k)
            v = tl.where(is_new, new_v[None, :], v)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (H**-0.5 * LOG2_E)
            scores = tl.where(is_seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = new_top

        place = (row * G + member) * num_parts + part
        mask = is_member & (channel < H)[None, :]
        tl.store(sum_ptr + place.to(tl.int64)[:, None] * H + channel[None, :], acc, mask=mask)
        tl.store(top_ptr + place, top, mask=member < G)
        tl.store(total_ptr + place, total, mask=member < G)
        if (begin <= new_slot) & (new_slot < end):
            written = new_slot.to(tl.int64) * (K * H)
            tl.store(k_ptr + written + channel, new_k, mask=channel < H)
            tl.store(v_ptr + written + channel, new_v, mask=channel < H)


@triton.jit(do_not_specialize=["S", "part_len", "num_parts"])
def _combine_kernel(
    position_ptr,  # [B]
    sum_ptr,  # [B, N, parts, H] float32
    top_ptr,  # [B, N, parts] float32, base 2
    total_ptr,  # [B, N, parts] float32
    out_ptr,  # [B, N, H]
    S,
    part_len,
    num_parts,
    N: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0)  # batch * N + head
    num_visible = tl.minimum(tl.load(position_ptr + row // N) + 1, S).to(tl.int32)
    num_written = tl.cdiv(num_visible, part_len)  # parts that saw no slot wrote nothing
    channel = tl.arange(0, BLOCK_H)
    top_ptr += row * num_parts
    total_ptr += row * num_parts
    sum_ptr += row.to(tl.int64) * num_parts * H
    top = tl.full([], -1e30, tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, num_written, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        is_written = part < num_written
        tops = tl.load(top_ptr + part, mask=is_written, other=float("-inf"))
        totals = tl.load(total_ptr + part, mask=is_written, other=0.0)
        mask = is_written[:, None] & (channel < H)[None, :]
        sums = tl.load(sum_ptr + part[:, None] * H + channel[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        weights = tl.exp2(tops - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights * totals, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * sums, 0)
        top = new_top
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * H + channel, out, mask=channel < H)


@triton.jit
def _channel_rotation(rate_ptr, position, channel, HALF: tl.constexpr):
    """For each channel cos, and sin with the sign that it has there; 1 and 0 where none turns."""
    turns = channel < 2 * HALF
    rate = tl.load(rate_ptr + tl.where(channel < HALF, channel, channel - HALF), mask=turns)
    cos, sin = rotation(position, tl.where(turns, rate, 0.0))
    return cos, tl.where(channel < HALF, -sin, sin)


@triton.jit
def _rotated(ptr, channel, mask, cos, sin, H: tl.constexpr, HALF: tl.constexpr):
    """What lies at ptr + channel, rotated, in its dtype."""
    partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
    x = tl.load(ptr + channel, mask=mask & (channel < H), other=0.0)
    y = tl.load(ptr + partner, mask=mask & (channel < 2 * HALF), other=0.0)
    turned = x.to(tl.float32) * cos + y.to(tl.float32) * sin
    return turned.to(x.dtype)
