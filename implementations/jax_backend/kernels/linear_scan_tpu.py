"""linear_scan for TPU: one Pallas kernel per direction, compiled by Mosaic.

Contract: implementations/jax_backend/kernels/linear_scan.py.  Truth: implementations/reference.py.

A program owns one sequence and BLOCK_R channels, across lanes, and walks time in blocks of BLOCK_T
steps, the state in VMEM between them. Bytes a step and channel: forward reads a and x and writes h,
backward reads a, h and dh and writes da and dx: each once.

A register holds 8 rows of 128 channels. One row after the other would use an eighth of it, so the
block is cut in SEGMENTS pieces of time, one a row: a first walk finds what each piece does to a
state, product * state + total; from these follow the states between pieces, and a second walk
writes every state. Compiled for v5e in bfloat16, loop by loop, a forward block is 7 bundles for
each 1024 elements, whose bytes take 11 cycles there (819 GB/s, 1.5 GHz): memory bounds it. With
the gates of rg_lru_tpu.py it is 24 bundles against 15 cycles: arithmetic is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from implementations.jax_backend.kernels import interpreter

LANES = 128
SEGMENTS = 8  # rows of a float32 register
LENGTH = 32  # steps of a piece
PITCH = LENGTH + 1  # rows from one piece to the next: odd, so that its 8 rows lie in 8 memory banks
BLOCK_T = SEGMENTS * LENGTH
BLOCK_R = 512  # 4 registers a row: enough chains to hide what each waits for
UNROLL = 8
BEFORE = 16  # rows of a bfloat16 register: the least that can be read
GRID = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


@jax.custom_vjp
def linear_scan(a_BTR: Array, x_BTR: Array, h0_BR: Array) -> tuple[Array, Array]:
    """Every state, in x's dtype, and the last one, in float32."""
    return _forward(a_BTR, x_BTR, h0_BR)


def _fwd(a_BTR: Array, x_BTR: Array, h0_BR: Array) -> tuple:
    h_BTR, h_BR = _forward(a_BTR, x_BTR, h0_BR)
    return (h_BTR, h_BR), (a_BTR, h_BTR, h0_BR)


def _bwd(saved: tuple, gradient: tuple) -> tuple[Array, Array, Array]:
    a_BTR, h_BTR, h0_BR = saved
    dh_BTR, dh_BR = gradient
    tile = Tile(*a_BTR.shape, reverse=True)
    da_BTR, dx_BTR, dh0_B1R = pl.pallas_call(
        partial(_backward_kernel, tile=tile),
        grid=tile.grid,
        in_specs=[tile.steps, tile.steps, tile.before, tile.steps, tile.state, tile.state],
        out_specs=[tile.steps, tile.steps, tile.state],
        out_shape=[
            jax.ShapeDtypeStruct(a_BTR.shape, a_BTR.dtype),
            jax.ShapeDtypeStruct(a_BTR.shape, dh_BTR.dtype),
            tile.state_shape,
        ],
        scratch_shapes=[tile.buffer(), tile.buffer(), tile.buffer(8 + BLOCK_T)],
        compiler_params=GRID,
        interpret=interpreter.mode(),
        name="linear_scan_backward",
    )(a_BTR, h_BTR, h_BTR, dh_BTR, h0_BR[:, None], dh_BR[:, None])
    return da_BTR, dx_BTR, dh0_B1R[:, 0]


linear_scan.defvjp(_fwd, _bwd)


def _forward(a_BTR: Array, x_BTR: Array, h0_BR: Array) -> tuple[Array, Array]:
    tile = Tile(*a_BTR.shape)
    h_BTR, h_B1R = pl.pallas_call(
        partial(_forward_kernel, tile=tile),
        grid=tile.grid,
        in_specs=[tile.steps, tile.steps, tile.state],
        out_specs=[tile.steps, tile.state],
        out_shape=[jax.ShapeDtypeStruct(x_BTR.shape, x_BTR.dtype), tile.state_shape],
        scratch_shapes=[tile.buffer(), tile.buffer()],
        compiler_params=GRID,
        interpret=interpreter.mode(),
        name="linear_scan_forward",
    )(a_BTR, x_BTR, h0_BR[:, None])
    return h_BTR, h_B1R[:, 0]


def _forward_kernel(
    a_ref,  # [BLOCK_T, BLOCK_R]
    x_ref,  # [BLOCK_T, BLOCK_R]
    h0_ref,  # [1, BLOCK_R] float32
    h_ref,  # [BLOCK_T, BLOCK_R], written
    last_ref,  # [1, BLOCK_R] float32, written: the state so far, and the last one in the end
    a_buffer,  # [BLOCK_R / LANES, BLOCK_T, LANES] float32, as all buffers
    h_buffer,
    *,
    tile: "Tile",
):
    def widen(c: int, rows: pl.Slice, kept: pl.Slice) -> None:
        a_buffer[c, kept, :] = a_ref[rows, lanes(c)].astype(jnp.float32)
        h_buffer[c, kept, :] = x_ref[rows, lanes(c)].astype(jnp.float32)

    def narrow(c: int, rows: pl.Slice, kept: pl.Slice) -> None:
        h_ref[rows, lanes(c)] = h_buffer[c, kept, :].astype(h_ref.dtype)

    tile.begin(last_ref, h0_ref)
    tile.in_pieces(widen)
    tile.keep_beyond_end(a_buffer, h_buffer)
    tile.walk(a_buffer, h_buffer, last_ref)
    tile.in_pieces(narrow)


def _backward_kernel(
    a_ref,  # [BLOCK_T, BLOCK_R]
    h_ref,  # [BLOCK_T, BLOCK_R]
    before_ref,  # [BEFORE, BLOCK_R]: the states before those of h_ref
    dh_ref,  # [BLOCK_T, BLOCK_R]
    h0_ref,  # [1, BLOCK_R] float32
    dh_last_ref,  # [1, BLOCK_R] float32
    da_ref,  # [BLOCK_T, BLOCK_R], written
    dx_ref,  # [BLOCK_T, BLOCK_R], written
    flow_ref,  # [1, BLOCK_R] float32, written: what reaches the state before the block
    a_buffer,
    g_buffer,
    h_buffer,  # with 8 rows more, the states before in the last of them
    *,
    tile: "Tile",
):
    """With g_t the whole gradient of h_t: g_t = dh_t + flow_t, flow_{t-1} = a_t g_t."""

    def widen(c: int, rows: pl.Slice, kept: pl.Slice) -> None:
        a_buffer[c, kept, :] = a_ref[rows, lanes(c)].astype(jnp.float32)
        g_buffer[c, kept, :] = dh_ref[rows, lanes(c)].astype(jnp.float32)

    def narrow(c: int, rows: pl.Slice, kept: pl.Slice) -> None:
        g = g_buffer[c, kept, :]
        dx_ref[rows, lanes(c)] = g.astype(dx_ref.dtype)
        da_ref[rows, lanes(c)] = (g * earlier(h_buffer, c, rows)).astype(da_ref.dtype)

    tile.begin(flow_ref, dh_last_ref)
    tile.shift(h_buffer, h_ref, before_ref, h0_ref)
    tile.in_pieces(widen)
    tile.keep_beyond_end(a_buffer, g_buffer)
    tile.walk(a_buffer, g_buffer, flow_ref)
    tile.in_pieces(narrow)


class Tile:
    """The block of steps and channels that a program holds at once, and the grid of all of them."""

    def __init__(self, B: int, T: int, R: int, *, reverse: bool = False, sharing: int = 1) -> None:
        """sharing: so many sequences, one after the other, have their gates in common."""
        self.T, self.reverse = T, reverse

        def owner(b: Array) -> Array:
            return jax.lax.div(b, sharing)  # to lower // Mosaic would ask for the device

        self.block_r = min(BLOCK_R, pl.cdiv(R, LANES) * LANES)
        self.num_blocks = pl.cdiv(T, BLOCK_T)
        self.grid = (B, pl.cdiv(R, self.block_r), self.num_blocks)
        self.state_shape = jax.ShapeDtypeStruct((B, 1, R), jnp.float32)
        self.steps = pl.BlockSpec(
            (None, BLOCK_T, self.block_r), lambda b, r, k: (b, self.block(k), r)
        )
        self.shared = pl.BlockSpec(
            (None, BLOCK_T, self.block_r), lambda b, r, k: (owner(b), self.block(k), r)
        )
        self.before = pl.BlockSpec(
            (None, BEFORE, self.block_r),
            lambda b, r, k: (b, jnp.maximum(self.block(k) * (BLOCK_T // BEFORE) - 1, 0), r),
        )
        self.state = pl.BlockSpec((None, 1, self.block_r), lambda b, r, k: (b, 0, r))
        self.channels = pl.BlockSpec((1, self.block_r), lambda b, r, k: (0, r))
        self.numbers = pl.BlockSpec(
            (None, 1, BLOCK_T), lambda b, r, k: (owner(b), 0, self.block(k))
        )

    def buffer(self, num_rows: int = SEGMENTS * PITCH) -> Any:
        """Memory of a program, float32. The lanes of one register are innermost: in this form alone
        can rows that lie apart be read as one register."""
        return pltpu.VMEM((self.block_r // LANES, num_rows, LANES), jnp.float32)

    def block(self, k: Array) -> Array:
        """Which block of time the k-th is."""
        return self.num_blocks - 1 - k if self.reverse else k

    def begin(self, carry_ref: jax.Ref, first_ref: jax.Ref) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _():
            carry_ref[...] = first_ref[...]

    def in_pieces(self, act: Callable[[int, pl.Slice, pl.Slice], None]) -> None:
        """act(c, rows, kept) for each group of lanes and each piece: its rows in the block, and
        where they are kept in a buffer."""

        def piece(i: Array, _: None) -> None:
            rows = pl.ds(pl.multiple_of(i * LENGTH, LENGTH), LENGTH)
            for c in range(self.block_r // LANES):
                act(c, rows, pl.ds(i * PITCH, LENGTH))

        jax.lax.fori_loop(0, SEGMENTS, piece, None)

    def whole_blocks(self, x_BT: Array) -> Array:
        """[B, 1, BLOCK_T * blocks]: numbers of steps, and zeros beyond the end."""
        return jnp.pad(x_BT, ((0, 0), (0, self.num_blocks * BLOCK_T - self.T)))[:, None]

    def is_inside(self, block: Array, rows: pl.Slice) -> Array:
        """[LENGTH, LANES]: which rows of a block of time are steps."""
        row = jax.lax.broadcasted_iota(jnp.int32, (LENGTH, LANES), 0)
        return block * BLOCK_T + rows.start + row < self.T

    def keep_beyond_end(self, a_buffer: jax.Ref, x_buffer: jax.Ref) -> None:
        """Rows beyond the end leave the state as it is."""
        if num_rows := self.T % BLOCK_T:
            piece, row = divmod(num_rows, LENGTH)
            first = piece * PITCH + row

            @pl.when(self.block(pl.program_id(2)) == self.num_blocks - 1)
            def _():
                a_buffer[:, first:, :] = jnp.ones_like(a_buffer[:, first:, :])
                x_buffer[:, first:, :] = jnp.zeros_like(x_buffer[:, first:, :])

    def walk(self, a_buffer: jax.Ref, x_buffer: jax.Ref, carry_ref: jax.Ref) -> None:
        """x becomes the states, h = a h + x. Reversed: what a state is given, g = x + flow, where
        the flow to the state before is a g. carry: the state (the flow) before, then after."""

        def rows(i: Array) -> pl.Slice:
            return pl.ds(LENGTH - 1 - i if self.reverse else i, SEGMENTS, stride=PITCH)

        def ends(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            product, total = carry
            a, x = a_buffer[:, rows(i), :], x_buffer[:, rows(i), :]
            return a * product, a * (total + x) if self.reverse else a * total + x

        def states(i: Array, h: Array) -> Array:
            a, x = a_buffer[:, rows(i), :], x_buffer[:, rows(i), :]
            if self.reverse:
                x_buffer[:, rows(i), :] = h + x
                return a * (h + x)
            x_buffer[:, rows(i), :] = a * h + x
            return a * h + x

        unroll = 1 if interpreter.mode() else UNROLL  # it compiles every turn for a CPU
        zero = jnp.zeros((self.block_r // LANES, SEGMENTS, LANES), jnp.float32)
        product, total = jax.lax.fori_loop(0, LENGTH, ends, (zero + 1, zero), unroll=unroll)
        groups = range(self.block_r // LANES)
        state = jnp.stack([carry_ref[:, lanes(c)] for c in groups])
        firsts = [state] * SEGMENTS
        for s in reversed(range(SEGMENTS)) if self.reverse else range(SEGMENTS):
            firsts[s] = state
            state = product[:, s : s + 1] * state + total[:, s : s + 1]
        jax.lax.fori_loop(0, LENGTH, states, jnp.concatenate(firsts, axis=1), unroll=unroll)
        for c in groups:
            carry_ref[:, lanes(c)] = state[c]

    def shift(
        self, h_buffer: jax.Ref, h_ref: jax.Ref, before_ref: jax.Ref, h0_ref: jax.Ref
    ) -> None:
        """The states into the buffer, from row 8 on, and those before them into row 7."""

        def widen(c: int, rows: pl.Slice, _: pl.Slice) -> None:
            h = h_ref[rows, lanes(c)].astype(jnp.float32)
            h_buffer[c, pl.ds(rows.start + 8, LENGTH), :] = h

        self.in_pieces(widen)
        is_first = self.block(pl.program_id(2)) == 0
        for c in range(self.block_r // LANES):
            before = before_ref[:, lanes(c)].astype(jnp.float32)[BEFORE - 1 :]
            h_buffer[c, 7:8, :] = jnp.where(is_first, h0_ref[:, lanes(c)], before)


def lanes(c: int) -> slice:
    return slice(c * LANES, (c + 1) * LANES)


def earlier(h_buffer: jax.Ref, c: int, rows: pl.Slice) -> Array:
    """The states before those of the rows, from what `shift` left."""
    return h_buffer[c, pl.ds(rows.start + 7, LENGTH), :]
