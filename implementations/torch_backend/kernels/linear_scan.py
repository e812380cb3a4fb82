"""Linear recurrence h_t = a_t * h_{t-1} + x_t over time, by name of variant.

Twin: implementations/jax_backend/kernels/linear_scan.py.  Truth: implementations/reference.py.
The state is float32 (float64 in float64), and every variant has gradients for a, x and h0, from
every state and from the last one. A document starts where a is 0; |a| is at most 1, or products
over many steps may overflow.

`triton`: a program owns one sequence and BLOCK_R channels and walks time in tiles of SEGMENTS x
ROWS steps (see TILES); a tile's loads are under way while those before it are computed. Forward
reads 2 and writes 1 element a step and channel, backward reads 3 and writes 2: each byte once.
`triton_split` cuts time in chunks of CHUNK_LEN steps that run at once, for when sequences times
channels are too few to fill a device: a first pass finds what each chunk does to a state, the
recurrence over chunks is a short linear_scan, and the second pass is `triton` from those states.
It reads a and x (backward: a and dh) twice.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from implementations.engine import Unsupported

# A tile is [SEGMENTS, BLOCK_R] for each of ROWS steps: thread by thread 8 neighbouring channels (16
# bytes of bfloat16) of every row of one segment. Within a segment time runs in registers; only what
# a segment does as a whole, 1 / ROWS of the elements, is scanned across threads. Many channels fill
# a device by themselves, and segments are only work; the fewer they are, the more of time must be
# walked at once. So tiles go by how many channels all sequences have at least: of 114 timed on an
# H100, at 65536, 20480, 8192 and 2560 channels, each is nearly the fastest, and spills on no chip.
# (Some are faster by 4 to 17% that load 8 bytes a thread, or spill on other chips.) Chunks are
# many, and one warp needs no barrier. See results/reference/kernels_h100.
TILES = {  # channels at least, then SEGMENTS, ROWS, BLOCK_R, warps and stages
    "forward": (
        (32768, (8, 1, 128, 4, 3)),
        (16384, (8, 1, 32, 1, 4)),
        (4096, (32, 4, 32, 4, 3)),
        (0, (64, 2, 16, 4, 3)),
    ),
    "backward": (
        (65536, (4, 1, 128, 2, 3)),
        (16384, (8, 1, 64, 2, 4)),
        (0, (32, 2, 32, 4, 3)),
    ),
}
TILE_OF_CHUNKS = (4, 2, 64, 1, 3)  # of triton_split, in both directions
CHUNK_LEN = 256  # of triton_split


def linear_scan(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """Returns every state, in x's dtype, and the last state, in h0's."""
    if a_BTR.shape != x_BTR.shape or h0_BR.shape != x_BTR[:, 0].shape:
        raise ValueError(
            "linear_scan needs a and x of one shape [B, T, R] and h0 of shape [B, R]; "
            f"got a {tuple(a_BTR.shape)}, x {tuple(x_BTR.shape)}, h0 {tuple(h0_BR.shape)}."
        )
    if h0_BR.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the recurrent state h0 must be float32 or float64, got {h0_BR.dtype}.")
    if variant.startswith("triton"):
        return VARIANTS[check(variant)](a_BTR, x_BTR, h0_BR)
    dtype = x_BTR.dtype
    a_BTR, x_BTR = a_BTR.to(h0_BR.dtype), x_BTR.to(h0_BR.dtype)
    if x_BTR.shape[1] == 1:
        h_BR = torch.addcmul(x_BTR[:, 0], a_BTR[:, 0], h0_BR)
        return h_BR[:, None].to(dtype), h_BR
    h_BTR, h_BR = VARIANTS[check(variant)](a_BTR, x_BTR, h0_BR)
    return h_BTR.to(dtype), h_BR


def check(variant: str) -> str:
    """The variant, when this backend has it; else Unsupported."""
    if variant not in VARIANTS:
        raise Unsupported(
            f"kernels.linear_scan={variant} is not offered by the torch backend; "
            f"offered: {', '.join(VARIANTS)}."
        )
    return variant


def _sequential(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over time, differentiated by autograd."""
    h_BR, states = h0_BR, []
    for a_BR, x_BR in zip(a_BTR.unbind(1), x_BTR.unbind(1), strict=True):
        h_BR = torch.addcmul(x_BR, a_BR, h_BR)
        states.append(h_BR)
    return torch.stack(states, 1), h_BR


def _associative(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Doubling: after step k, x_t holds the last 2^k terms; log2(T) passes over the data."""
    first_BR = torch.addcmul(x_BTR[:, 0], a_BTR[:, 0], h0_BR)
    x_BTR = torch.cat([first_BR[:, None], x_BTR[:, 1:]], 1)
    span = 1
    while span < x_BTR.shape[1]:
        tail_BTR = torch.addcmul(x_BTR[:, span:], a_BTR[:, span:], x_BTR[:, :-span])
        x_BTR = torch.cat([x_BTR[:, :span], tail_BTR], 1)
        a_BTR = torch.cat([a_BTR[:, :span], a_BTR[:, span:] * a_BTR[:, :-span]], 1)
        span *= 2
    return x_BTR, x_BTR[:, -1].clone()


def _analytic(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over contiguous rows, in place, and one reverse loop for the gradient: two custom
    ops, of which torch.compile sees the shapes and not the thousands of steps."""
    h_BTR = _analytic_forward(a_BTR, x_BTR, h0_BR)
    return h_BTR, h_BTR[:, -1].clone()  # a view would keep every state alive


@torch.library.custom_op("aerie::linear_scan", mutates_args=())
def _analytic_forward(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> Tensor:
    a_TBR = a_BTR.transpose(0, 1).contiguous()
    h_TBR = x_BTR.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    h_BR = h0_BR
    for a_BR, x_BR in zip(a_TBR.unbind(0), h_TBR.unbind(0), strict=True):
        h_BR = x_BR.addcmul_(a_BR, h_BR)
    return h_TBR.transpose(0, 1)


@_analytic_forward.register_fake
def _(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> Tensor:
    return _time_first(x_BTR)


@torch.library.custom_op("aerie::linear_scan_backward", mutates_args=())
def _analytic_backward(
    a_BTR: Tensor, h_BTR: Tensor, h0_BR: Tensor, dh_BTR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx_t = dh_t + a_{t+1} dx_{t+1};  da_t = dx_t h_{t-1};  dh0 = a_0 dx_0."""
    a_TBR, h_TBR = (x.transpose(0, 1).contiguous() for x in (a_BTR, h_BTR))
    dx_TBR = dh_BTR.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    a_rows, dx_rows = a_TBR.unbind(0), dx_TBR.unbind(0)
    dx_BR = dx_rows[-1]
    for t in range(len(dx_rows) - 2, -1, -1):
        dx_BR = dx_rows[t].addcmul_(a_rows[t + 1], dx_BR)
    da_TBR = torch.empty_like(a_TBR)
    torch.mul(dx_TBR[0], h0_BR, out=da_TBR[0])
    torch.mul(dx_TBR[1:], h_TBR[:-1], out=da_TBR[1:])
    return da_TBR.transpose(0, 1), dx_TBR.transpose(0, 1), a_rows[0] * dx_BR


@_analytic_backward.register_fake
def _(a_BTR: Tensor, h_BTR: Tensor, h0_BR: Tensor, dh_BTR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _time_first(a_BTR), _time_first(dh_BTR), torch.empty_like(h0_BR)


def _time_first(x_BTR: Tensor) -> Tensor:
    """An empty tensor of this shape that lies in memory as [T, B, R]."""
    B, T, R = x_BTR.shape
    return x_BTR.new_empty(T, B, R).transpose(0, 1)


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    a_BTR, _, h0_BR = inputs
    ctx.save_for_backward(a_BTR, output, h0_BR)


_analytic_forward.register_autograd(
    lambda ctx, dh_BTR: _analytic_backward(*ctx.saved_tensors, dh_BTR), setup_context=_save
)


def _triton(
    a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor, chunk_len: int | None = None
) -> tuple[Tensor, Tensor]:
    refuse_float64(a_BTR, x_BTR, h0_BR)
    return _LinearScan.apply(a_BTR, x_BTR, h0_BR, chunk_len)


def _triton_split(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> tuple[Tensor, Tensor]:
    return _triton(a_BTR, x_BTR, h0_BR, CHUNK_LEN)


def refuse_float64(*inputs: Tensor) -> None:
    if any(x.dtype == torch.float64 for x in inputs):
        raise Unsupported("kernels.linear_scan=triton computes in float32, not in float64.")


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor, chunk_len: int | None
    ) -> tuple[Tensor, Tensor]:
        a_BTR, x_BTR, h0_BR = a_BTR.contiguous(), x_BTR.contiguous(), h0_BR.contiguous()
        h_BTR, h_BR = _forward(a_BTR, x_BTR, h0_BR, chunk_len)
        ctx.save_for_backward(a_BTR, h_BTR, h0_BR)
        ctx.chunk_len = chunk_len
        return h_BTR, h_BR

    @staticmethod
    def backward(ctx, dh_BTR: Tensor, dh_BR: Tensor) -> tuple[Tensor | None, ...]:
        a_BTR, h_BTR, h0_BR = ctx.saved_tensors
        _, T, R = a_BTR.shape
        dh_BTR = dh_BTR.contiguous()
        da_BTR, dx_BTR = torch.empty_like(a_BTR), torch.empty_like(dh_BTR)

        def launch(flow_BCR: Tensor, end_BCR: Tensor, product_BCR: Tensor | None) -> None:
            tile = tile_of("backward", end_BCR)
            _backward_kernel[grid(end_BCR, tile)](
                a_BTR, h_BTR, h0_BR, dh_BTR, flow_BCR, end_BCR, product_BCR, da_BTR, dx_BTR,
                T, R, ctx.chunk_len or T, product_BCR is not None, **tile,
            )  # fmt: skip

        dh0_BR = in_chunks(launch, dh_BR.contiguous(), T, ctx.chunk_len)
        return da_BTR, dx_BTR, dh0_BR, None


def _forward(
    a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor, chunk_len: int | None
) -> tuple[Tensor, Tensor]:
    _, T, R = x_BTR.shape
    h_BTR = torch.empty_like(x_BTR)

    def launch(h0_BCR: Tensor, end_BCR: Tensor, product_BCR: Tensor | None) -> None:
        tile = tile_of("forward", end_BCR)
        _forward_kernel[grid(end_BCR, tile)](
            a_BTR, x_BTR, h0_BCR, h_BTR, end_BCR, product_BCR,
            T, R, chunk_len or T, product_BCR is not None, **tile,
        )  # fmt: skip

    return h_BTR, in_chunks(launch, h0_BR, T, chunk_len)


def in_chunks(launch: Callable, h0_BR: Tensor, T: int, chunk_len: int | None) -> Tensor:
    """The state at the end of time, from `launch(h0_BCR, end_BCR, product_BCR)`: a kernel that
    walks each of C chunks from its own first state and writes its last one. Where it is given
    product_BCR it writes there what a first state is multiplied by, takes that to be 0, and
    writes nothing else. One chunk when chunk_len is None."""
    B, R = h0_BR.shape
    num_chunks = -(-T // (chunk_len or T))
    end_BCR = h0_BR.new_empty(B, num_chunks, R)
    if num_chunks == 1:
        launch(h0_BR[:, None], end_BCR, None)
        return end_BCR[:, 0]
    product_BCR = torch.empty_like(end_BCR)
    launch(h0_BR[:, None], end_BCR, product_BCR)
    state_BCR, _ = _forward(product_BCR, end_BCR, h0_BR, None)
    launch(torch.cat([h0_BR[:, None], state_BCR[:, :-1]], 1), end_BCR, None)
    return state_BCR[:, -1].clone()


def tile_of(kernel: str, end_BCR: Tensor) -> dict[str, int]:
    """The constants of a kernel's launch."""
    if end_BCR.shape[1] > 1:
        sizes = TILE_OF_CHUNKS
    else:
        sizes = next(sizes for least, sizes in TILES[kernel] if end_BCR.numel() >= least)
    names = ("SEGMENTS", "ROWS", "BLOCK_R", "num_warps", "NUM_STAGES")
    return dict(zip(names, sizes, strict=True))


def grid(end_BCR: Tensor, tile: dict[str, int]) -> tuple[int, int, int]:
    B, C, R = end_BCR.shape
    return (triton.cdiv(R, tile["BLOCK_R"]), B, C)


@triton.jit(do_not_specialize=["T", "chunk_len"])
def _forward_kernel(
    a_ptr,  # [B, T, R]
    x_ptr,  # [B, T, R]
    h0_ptr,  # [B, C, R] float32
    h_ptr,  # [B, T, R], written unless ONLY_ENDS
    end_ptr,  # [B, C, R] float32, written
    product_ptr,  # [B, C, R] float32, written if ONLY_ENDS
    T,
    R,
    chunk_len,
    ONLY_ENDS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    _, _, inside, segment, of_row, of_chunk, start, stop = place(T, R, chunk_len, SEGMENTS, BLOCK_R)

    h = first_state(h0_ptr + of_chunk, inside, ONLY_ENDS, SEGMENTS, BLOCK_R)
    whole = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
    for tile in tl.range(start, stop, SEGMENTS * ROWS, num_stages=NUM_STAGES):
        products, totals = (), ()
        product = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
        total = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
        for row in tl.static_range(ROWS):
            t = (tile + segment * ROWS + row).to(tl.int64)
            mask = (t < stop) & inside
            a = tl.load(a_ptr + of_row + t * R, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + of_row + t * R, mask=mask, other=0.0).to(tl.float32)
            a = tl.where(t < stop, a, 1.0)  # beyond the end the state stays
            product = a * product
            total = a * total + x
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
    a_ptr,  # [B, T, R]
    h_ptr,  # [B, T, R]
    h0_ptr,  # [B, R] float32
    dh_ptr,  # [B, T, R]
    flow_ptr,  # [B, C, R] float32: what reaches a chunk's last state from later ones
    end_ptr,  # [B, C, R] float32, written: what leaves its first state for earlier ones
    product_ptr,  # [B, C, R] float32, written if ONLY_ENDS
    da_ptr,  # [B, T, R], written unless ONLY_ENDS
    dx_ptr,  # [B, T, R], written unless ONLY_ENDS
    T,
    R,
    chunk_len,
    ONLY_ENDS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """dx_t = dh_t + flow_t, flow_{t-1} = a_t dx_t: time runs backwards, u = T - 1 - t."""
    batch, channel, inside, segment, of_row, of_chunk, start, stop = place(
        T, R, chunk_len, SEGMENTS, BLOCK_R
    )

    flow = first_state(flow_ptr + of_chunk, inside, ONLY_ENDS, SEGMENTS, BLOCK_R)
    whole = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
    for tile in tl.range(start, stop, SEGMENTS * ROWS, num_stages=NUM_STAGES):
        products, totals = (), ()
        product = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
        total = tl.zeros((SEGMENTS, BLOCK_R), tl.float32)
        for row in tl.static_range(ROWS):
            u = tile + segment * ROWS + row
            mask = (u < stop) & inside
            at = of_row + (T - 1 - u).to(tl.int64) * R
            a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32)
            total += tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
            products += (product,)
            totals += (total,)
            a = tl.where(u < stop, a, 1.0)
            product = a * product
            total = a * total
        before, flow, product = across_segments(product, total, flow, segment, SEGMENTS, BLOCK_R)
        whole *= product
        if not ONLY_ENDS:
            for row in tl.static_range(ROWS):
                u = tile + segment * ROWS + row
                mask = (u < stop) & inside
                at = of_row + (T - 1 - u).to(tl.int64) * R
                is_first = u == T - 1
                h = tl.load(h_ptr + at - R, mask=mask & (u < T - 1), other=0.0).to(tl.float32)
                h0 = tl.load(
                    h0_ptr + batch * R + channel + 0 * segment, mask=is_first & inside, other=0.0
                )
                dx = products[row] * before + totals[row]
                da = dx * (h + h0)
                tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
                tl.store(da_ptr + at, da.to(da_ptr.dtype.element_ty), mask=mask)
    tl.store(end_ptr + of_chunk + 0 * segment, flow, mask=(segment == 0) & inside)
    if ONLY_ENDS:
        tl.store(product_ptr + of_chunk + 0 * segment, whole, mask=(segment == 0) & inside)


@triton.jit
def place(T, R, chunk_len, SEGMENTS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where a program of `grid` works: its sequence (int64: B * T * R passes 2**31), channels
    [1, BLOCK_R] and whether they are, segments [SEGMENTS, 1], the offset of its sequence and of its
    chunk's states, and the steps from the first to one after the last."""
    channel = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[None, :]
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    segment = tl.arange(0, SEGMENTS)[:, None]
    of_row = batch * T * R + channel
    of_chunk = (batch * tl.num_programs(2) + chunk) * R + channel
    start = chunk * chunk_len
    stop = tl.minimum(T, start + chunk_len)
    return batch, channel, channel < R, segment, of_row, of_chunk, start, stop


@triton.jit
def first_state(
    h0_ptr, inside, IS_ZERO: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_R: tl.constexpr
):
    """[SEGMENTS, BLOCK_R], every segment the same: a carry of the tile's own layout."""
    h = tl.zeros((1, BLOCK_R), tl.float32) if IS_ZERO else tl.load(h0_ptr, mask=inside, other=0.0)
    return tl.broadcast_to(h, (SEGMENTS, BLOCK_R))


@triton.jit
def across_segments(product, total, h, segment, SEGMENTS: tl.constexpr, BLOCK_R: tl.constexpr):
    """From what each segment does to a state (product * state + total) and the state before the
    first one: the state before each, the state after the last, and the product of all.

    What stands before a segment is scanned along: fetching it from its neighbour (tl.gather) makes
    the compiler choose a layout for that, in which it computes everything else a second time.
    """
    one = tl.full((SEGMENTS, BLOCK_R), 1.0, tl.float32)
    total = tl.where(segment == 0, product * h + total, total)
    product, after, _, before = tl.associative_scan((product, total, one, one * 0), 0, _then)
    before = tl.where(segment == 0, h, before)
    is_last = segment == SEGMENTS - 1
    h = tl.sum(tl.where(is_last, after, 0.0), 0)[None, :]
    product = tl.sum(tl.where(is_last, product, 0.0), 0)[None, :]
    return before, one * h, one * product


@triton.jit
def _then(product0, total0, early0, before0, product1, total1, early1, before1):
    """Some segments, then others. Each: what all do to a state (product, total), and what all but
    the last do (early, before)."""
    return (
        product0 * product1,
        product1 * total0 + total1,
        product0 * early1,
        early1 * total0 + before1,
    )


VARIANTS = {
    "sequential": _sequential,
    "associative": _associative,
    "analytic": _analytic,
    "triton": _triton,
    "triton_split": _triton_split,
}
