"""The RG-LRU from its gates' pre-activations to its states, by variant; and its other gates.

Twin: implementations/jax_backend/kernels/rg_lru.py.  Truth: implementations/gates.py.
Source: arXiv:2402.19427 section 2.4. What a gate computes of an element: gate.py.

The variants are those of linear_scan. `triton` and `triton_split` are one fused kernel a direction,
which walks time as linear_scan's do. Bytes a step and channel in bfloat16, each moved once: forward
8 (reads x and both pre-activations, writes h), backward 16 (reads those three, h and dh; writes
three gradients); gates and decay are computed again, not stored. `triton_split` reads 6 more
forward and 4 more backward. The biases of the gates are added here, where their sum costs nothing.
A gate less is 2 fewer forward, 4 backward. cg_lru has half of each, but its x and h are float32, as
bfloat16 once more after the turn would be seen in theta's gradient; and its gates' gradients are
written for each channel, and then added in pairs.

The block-diagonal products stay outside. A program that did them would need all channels of a gate
block (R / 16, up to 512) at each step and its two square matrices beside them, 16 to 512 KiB where
a multiprocessor has 227; and the products are matrix products of all tokens, bound by arithmetic,
which the vendor's library does well. What fusing would save is 8 bytes forward. Not measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from implementations.config import GATES, ModelConfig
from implementations.torch_backend.kernels.gate import (
    MAX_SQRT_GRADIENT,
    coefficients,
    decay_of,
    decayed,
    gates_of,
    keep_and_jump,
    load,
    load_decay,
    phases,
    step,
    step_grad,
    store,
    turned,
)
from implementations.torch_backend.kernels.linear_scan import (
    CHUNK_LEN,
    across_segments,
    first_state,
    grid,
    in_chunks,
    linear_scan,
    place,
    refuse_float64,
    tile_of,
)


def rg_lru(
    x_BTR: Tensor,
    a_gate_BTR: Tensor | None,
    input_gate_BTR: Tensor | None,
    a_bias_R: Tensor | None,
    input_bias_R: Tensor | None,
    a_param_R: Tensor | None,
    position_BT: Tensor,
    h0_BR: Tensor | None,
    variant: str,
    *,
    theta_R: Tensor | None = None,
    gate: str = "rg_lru",
    decay_exponent: float = ModelConfig.decay_exponent,
    normalize_input: bool = True,
) -> tuple[Tensor, Tensor]:
    """Every state in x's dtype, and the last one in float32 (float64 in float64). The gates come
    before bias and sigmoid, None where `gate` has none; those of a complex one, its a_param and its
    theta are R / 2. h0 None is zeros. Where position is 0 a document starts: h = i x."""
    kind, (B, T, R) = GATES[gate], x_BTR.shape
    wide = torch.float64 if x_BTR.dtype == torch.float64 else torch.float32
    if h0_BR is None:
        h0_BR = x_BTR.new_zeros((B, R), dtype=wide)
    if h0_BR.shape != (B, R) or h0_BR.dtype != wide or position_BT.shape != (B, T):
        raise ValueError(
            f"rg_lru needs h0 {(B, R)} in {wide} and position {(B, T)}; got "
            f"h0 {tuple(h0_BR.shape)} in {h0_BR.dtype} and position {tuple(position_BT.shape)}."
        )
    own = R // 2 if kind.is_complex else R
    given = {
        "a_gate": (a_gate_BTR, kind.has_recurrence_gate, (B, T, own)),
        "input_gate": (input_gate_BTR, kind.has_input_gate, (B, T, own)),
        "a_param": (a_param_R, kind.has_a_param, (own,)),
        "theta": (theta_R, kind.is_complex, (own,)),
        "the bias of a_gate": (a_bias_R, a_bias_R is not None, (own,)),
        "the bias of input_gate": (input_bias_R, input_bias_R is not None, (own,)),
    }
    for name, (value, is_needed, shape) in given.items():
        if (None if value is None else value.shape) != (shape if is_needed else None):
            found = None if value is None else tuple(value.shape)
            wanted = shape if is_needed else None
            raise ValueError(f"rg_lru with gate={gate} needs {name} {wanted}, got {found}.")

    inputs = (a_gate_BTR, input_gate_BTR, a_bias_R, input_bias_R)
    decay_R = decay_of(None if a_param_R is None else a_param_R.to(wide), kind, decay_exponent)
    form = (gate, normalize_input)
    if variant in FUSED:
        refuse_float64(x_BTR, h0_BR)

    def compute(x_BTR: Tensor) -> tuple[Tensor, Tensor]:
        if variant in FUSED:
            inner = (*inputs, decay_R, position_BT, h0_BR, FUSED[variant])
            return _RGLRU.apply(x_BTR, *inner, *form)
        return _composed(x_BTR, *inputs, decay_R, position_BT, h0_BR, variant, *form)

    if not kind.is_complex:
        return compute(x_BTR)
    cos_BTR, sin_BTR = phases(a_gate_BTR, a_bias_R, theta_R.to(wide))
    g_BTR, g_BR = compute(turned(x_BTR, cos_BTR, -sin_BTR))
    h_BTR = turned(g_BTR, cos_BTR, sin_BTR).to(x_BTR.dtype)
    return h_BTR, turned(g_BR, cos_BTR[:, -1], sin_BTR[:, -1])


def _composed(
    x_BTR: Tensor,
    a_gate_BTR: Tensor | None,
    input_gate_BTR: Tensor | None,
    a_bias_R: Tensor | None,
    input_bias_R: Tensor | None,
    decay_R: Tensor | None,
    position_BT: Tensor,
    h0_BR: Tensor,
    variant: str,
    gate: str,
    normalize_input: bool,
) -> tuple[Tensor, Tensor]:
    """The equations op by op, and a linear_scan of the variant."""
    kind, wide = GATES[gate], h0_BR.dtype
    gates = (_add(a_gate_BTR, a_bias_R), _add(input_gate_BTR, input_bias_R))
    a_BTR, scale_BTR = coefficients(*gates, decay_R, position_BT, kind, normalize_input, wide)
    input_BTR = x_BTR.to(wide)
    if kind.is_complex:  # both halves have the same
        a_BTR = torch.cat([a_BTR, a_BTR], -1)
        scale_BTR = torch.cat([scale_BTR, scale_BTR], -1)
    if scale_BTR is not None:
        input_BTR = scale_BTR * input_BTR
    h_BTR, h_BR = linear_scan(a_BTR, input_BTR, h0_BR, variant)
    return h_BTR.to(x_BTR.dtype), h_BR


def _add(gate_BTR: Tensor | None, bias_R: Tensor | None) -> Tensor | None:
    return gate_BTR if bias_R is None else gate_BTR + bias_R.to(gate_BTR.dtype)


class _RGLRU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_BTR: Tensor,
        a_gate_BTR: Tensor | None,
        input_gate_BTR: Tensor | None,
        a_bias_R: Tensor | None,
        input_bias_R: Tensor | None,
        decay_R: Tensor | None,
        position_BT: Tensor,
        h0_BR: Tensor,
        chunk_len: int | None,
        gate: str,
        normalize_input: bool,
    ) -> tuple[Tensor, Tensor]:
        _, T, R = x_BTR.shape
        given = (x_BTR, a_gate_BTR, input_gate_BTR, a_bias_R, input_bias_R, decay_R, position_BT)
        given = tuple(None if value is None else value.contiguous() for value in given)
        h0_BR, h_BTR = h0_BR.contiguous(), torch.empty_like(given[0])

        def launch(h0_BCR: Tensor, end_BCR: Tensor, product_BCR: Tensor | None) -> None:
            tile = tile_of("forward", end_BCR)
            if gate == "gru" or not normalize_input:  # four rows spill, on sm_80 and sm_100
                tile["ROWS"] = min(tile["ROWS"], 2)
            _forward_kernel[grid(end_BCR, tile)](
                *given, h0_BCR, h_BTR, end_BCR, product_BCR,
                T, R, chunk_len or T, gate, normalize_input, product_BCR is not None, **tile,
            )  # fmt: skip

        h_BR = in_chunks(launch, h0_BR, T, chunk_len)
        ctx.save_for_backward(*given, h0_BR, h_BTR)
        ctx.chunk_len, ctx.form = chunk_len, (gate, normalize_input)
        return h_BTR, h_BR

    @staticmethod
    def backward(ctx, dh_BTR: Tensor, dh_BR: Tensor) -> tuple[Tensor | None, ...]:
        *given, h0_BR, h_BTR = ctx.saved_tensors
        (B, T, R), is_shared = h_BTR.shape, GATES[ctx.form[0]].is_complex
        x_BTR, *gates_BTR, a_bias_R, input_bias_R, decay_R, _ = given
        dh_BTR, dx_BTR = dh_BTR.contiguous(), torch.empty_like(x_BTR)
        # of each channel, where two share a gate
        dgates_BTR = [None if v is None else torch.empty_like(x_BTR if is_shared else v)
                      for v in gates_BTR]  # fmt: skip
        num_chunks = -(-T // (ctx.chunk_len or T))
        # of decay and both biases: a row for each program, then one sum, the same every time
        sums_BCR = [None if v is None else h0_BR.new_empty(B, num_chunks, R)
                    for v in (decay_R, a_bias_R, input_bias_R)]  # fmt: skip

        def launch(flow_BCR: Tensor, end_BCR: Tensor, product_BCR: Tensor | None) -> None:
            tile = tile_of("backward", end_BCR)
            if is_shared:  # whose gates lie apart from their channels: two rows spill
                tile["ROWS"] = 1
            if ctx.form[0] == "no_recurrence_gate":  # spills on sm_80, with more channels a thread
                tile["num_warps"] *= 2
            _backward_kernel[grid(end_BCR, tile)](
                *given, h0_BR, h_BTR, dh_BTR, flow_BCR, end_BCR, product_BCR,
                dx_BTR, *dgates_BTR, *sums_BCR, T, R, ctx.chunk_len or T, *ctx.form,
                MAX_SQRT_GRADIENT, product_BCR is not None, **tile,
            )  # fmt: skip

        dh0_BR = in_chunks(launch, dh_BR.contiguous(), T, ctx.chunk_len)

        def own(gradient: Tensor | None, value: Tensor | None) -> Tensor | None:
            if gradient is None:
                return None
            gradient = gradient.unflatten(-1, (2, -1)).sum(-2) if is_shared else gradient
            return gradient.to(value.dtype)

        ddecay_R, da_bias_R, dinput_bias_R = (
            own(None if v is None else v.sum((0, 1)), of)
            for v, of in zip(sums_BCR, (decay_R, a_bias_R, input_bias_R), strict=True)
        )
        dgates_BTR = map(own, dgates_BTR, gates_BTR)
        return (dx_BTR, *dgates_BTR, da_bias_R, dinput_bias_R, ddecay_R, None, dh0_BR,
                None, None, None)  # fmt: skip


@triton.jit(do_not_specialize=["T", "chunk_len"])
def _forward_kernel(
    x_ptr,  # [B, T, R]
    a_gate_ptr,  # [B, T, R], or None, as all that the gate does without; R / 2 of a complex one
    input_gate_ptr,  # [B, T, R]
    a_bias_ptr,  # [R]
    input_bias_ptr,  # [R]
    decay_ptr,  # [R] float32: log a where the rate is 1
    position_ptr,  # [B, T]
    h0_ptr,  # [B, C, R] float32
    h_ptr,  # [B, T, R], written unless ONLY_ENDS
    end_ptr,  # [B, C, R] float32, written
    product_ptr,  # [B, C, R] float32, written if ONLY_ENDS
    T,
    R,
    chunk_len,
    GATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ONLY_ENDS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    batch, channel, inside, segment, of_row, of_chunk, start, stop = place(
        T, R, chunk_len, SEGMENTS, BLOCK_R
    )
    num_gates, own = gates_of(channel, R, GATE)
    of_gates = batch * T * num_gates + own
    decay = load_decay(decay_ptr, own, inside)
    a_bias, input_bias = load(a_bias_ptr, own, inside), load(input_bias_ptr, own, inside)

    h = first_state(h0_ptr + of_chunk, inside, ONLY_ENDS, SEGMENTS, BLOCK_R)
    whole = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
    for tile in tl.range(start, stop, SEGMENTS * ROWS, num_stages=NUM_STAGES):
        products, totals = (), ()
        product = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
        total = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
        for row in tl.static_range(ROWS):
            t = (tile + segment * ROWS + row).to(tl.int64)
            at, mask = of_row + t * R, (t < stop) & inside
            position = tl.load(position_ptr + batch * T + t, mask=t < stop, other=1)
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            a_gate = load(a_gate_ptr, of_gates + t * num_gates, mask)
            input_gate = load(input_gate_ptr, of_gates + t * num_gates, mask)
            keep, jump = keep_and_jump(position, t < stop)
            a, inflow = step(
                x, a_gate, input_gate, a_bias, input_bias, decay, keep, jump, GATE, NORMALIZE
            )
            product = a * product
            total = a * total + inflow
            products += (product,)
            totals += (total,)
        before, h, product = across_segments(product, total, h, segment, SEGMENTS, BLOCK_R)
        whole *= product
        if not ONLY_ENDS:
            for row in tl.static_range(ROWS):
                t = (tile + segment * ROWS + row).to(tl.int64)
                state = products[row] * before + totals[row]
                mask = (t < stop) & inside
                tl.store(h_ptr + of_row + t * R, state.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(end_ptr + of_chunk + 0 * segment, h, mask=(segment == 0) & inside)
    if ONLY_ENDS:
        tl.store(product_ptr + of_chunk + 0 * segment, whole, mask=(segment == 0) & inside)


@triton.jit(do_not_specialize=["T", "chunk_len"])
def _backward_kernel(
    x_ptr,  # [B, T, R]
    a_gate_ptr,  # [B, T, R], or None, as all that the gate does without; R / 2 of a complex one
    input_gate_ptr,  # [B, T, R]
    a_bias_ptr,  # [R]
    input_bias_ptr,  # [R]
    decay_ptr,  # [R] float32
    position_ptr,  # [B, T]
    h0_ptr,  # [B, R] float32
    h_ptr,  # [B, T, R]
    dh_ptr,  # [B, T, R]
    flow_ptr,  # [B, C, R] float32: what reaches a chunk's last state from later ones
    end_ptr,  # [B, C, R] float32, written: what leaves its first state for earlier ones
    product_ptr,  # [B, C, R] float32, written if ONLY_ENDS; all below unless ONLY_ENDS
    dx_ptr,  # [B, T, R]
    da_gate_ptr,  # [B, T, R], of each channel: those that share a gate are summed later
    dinput_gate_ptr,  # [B, T, R]
    ddecay_ptr,  # [B, C, R] float32
    da_bias_ptr,  # [B, C, R] float32
    dinput_bias_ptr,  # [B, C, R] float32
    T,
    R,
    chunk_len,
    GATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MAX_SQRT_GRADIENT: tl.constexpr,
    ONLY_ENDS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """With g_t the whole gradient of h_t: g_t = dh_t + flow_t, flow_{t-1} = a_t g_t; time runs
    backwards, u = T - 1 - t."""
    batch, channel, inside, segment, of_row, of_chunk, start, stop = place(
        T, R, chunk_len, SEGMENTS, BLOCK_R
    )
    num_gates, own = gates_of(channel, R, GATE)
    of_gates = batch * T * num_gates + own
    decay = load_decay(decay_ptr, own, inside)
    a_bias, input_bias = load(a_bias_ptr, own, inside), load(input_bias_ptr, own, inside)

    flow = first_state(flow_ptr + of_chunk, inside, ONLY_ENDS, SEGMENTS, BLOCK_R)
    h0 = first_state(h0_ptr + batch * R + channel, inside, ONLY_ENDS, SEGMENTS, BLOCK_R)
    whole = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
    ddecay = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
    da_bias = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
    dinput_bias = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
    for tile in tl.range(start, stop, SEGMENTS * ROWS, num_stages=NUM_STAGES):
        products, totals, decays = (), (), ()
        product = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
        total = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
        for row in tl.static_range(ROWS):
            u = tile + segment * ROWS + row
            t = (T - 1 - u).to(tl.int64)
            mask = (u < stop) & inside
            position = tl.load(position_ptr + batch * T + t, mask=u < stop, other=1)
            a_gate = load(a_gate_ptr, of_gates + t * num_gates, mask)
            total += tl.load(dh_ptr + of_row + t * R, mask=mask, other=0.0).to(tl.float32)
            products += (product,)
            totals += (total,)
            keep, jump = keep_and_jump(position, u < stop)
            a, log_a, rate = decayed(a_gate, a_bias, decay, keep, jump, GATE)
            decays += ((a, log_a, rate, keep),)
            product = a * product
            total = a * total
        before, flow, product = across_segments(product, total, flow, segment, SEGMENTS, BLOCK_R)
        whole *= product
        if not ONLY_ENDS:
            for row in tl.static_range(ROWS):
                u = tile + segment * ROWS + row
                t = (T - 1 - u).to(tl.int64)
                at, mask = of_row + t * R, (u < stop) & inside
                x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
                input_gate = load(input_gate_ptr, of_gates + t * num_gates, mask)
                h = tl.load(h_ptr + at - R, mask=mask & (t > 0), other=0.0).to(tl.float32)
                h = tl.where(t == 0, h0, h)
                g = products[row] * before + totals[row]
                dx, da_gate, dinput_gate, ddecay_row = step_grad(
                    g, h, x, input_gate, input_bias, decay, *decays[row],
                    MAX_SQRT_GRADIENT, GATE, NORMALIZE,
                )  # fmt: skip
                ddecay += ddecay_row
                da_bias += da_gate
                dinput_bias += dinput_gate
                store(dx_ptr, at, dx, mask)
                store(da_gate_ptr, at, da_gate, mask)
                store(dinput_gate_ptr, at, dinput_gate, mask)
    once = (segment == 0) & inside
    tl.store(end_ptr + of_chunk + 0 * segment, flow, mask=once)
    if ONLY_ENDS:
        tl.store(product_ptr + of_chunk + 0 * segment, whole, mask=once)
    else:
        store(ddecay_ptr, of_chunk, tl.sum(ddecay, 0)[None, :], inside)
        store(da_bias_ptr, of_chunk, tl.sum(da_bias, 0)[None, :], inside)
        store(dinput_bias_ptr, of_chunk, tl.sum(dinput_bias, 0)[None, :], inside)


FUSED = {"triton": None, "triton_split": CHUNK_LEN}  # steps a chunk; the others are composed
