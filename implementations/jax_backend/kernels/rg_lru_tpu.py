"""The RG-LRU from its gates' pre-activations to its states for TPU: one Pallas kernel a direction.

Contract: implementations/jax_backend/kernels/rg_lru.py.  Truth: implementations/mixers/rg_lru.py.

Time is walked as in linear_scan_tpu.py, and the gates are computed a piece at a time before it
(backward: and their gradients after it). Bytes a step and channel in bfloat16, each moved once:
forward 8 (reads x and both pre-activations, writes h), backward 16 (reads those three, h and dh;
writes three gradients). Gates and decay are computed again, not stored.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from implementations.jax_backend.kernels import gate, interpreter
from implementations.jax_backend.kernels.linear_scan_tpu import (
    BLOCK_T,
    GRID,
    LANES,
    SEGMENTS,
    Tile,
    earlier,
    lanes,
)


@jax.custom_vjp
def rg_lru(
    x_BTR: Array,
    a_gate_BTR: Array,
    input_gate_BTR: Array,
    slowest_R: Array,
    position_BT: Array,
    h0_BR: Array,
) -> tuple[Array, Array]:
    """Every state, in x's dtype, and the last one, in float32. slowest: -8 softplus(a_param)."""
    return _forward(x_BTR, a_gate_BTR, input_gate_BTR, slowest_R, position_BT, h0_BR)


def _fwd(*inputs: Array) -> tuple:
    h_BTR, h_BR = _forward(*inputs)
    return (h_BTR, h_BR), (*inputs, h_BTR)


def _bwd(saved: tuple, gradient: tuple) -> tuple[Array | None, ...]:
    x_BTR, a_gate_BTR, input_gate_BTR, slowest_R, position_BT, h0_BR, h_BTR = saved
    dh_BTR, dh_BR = gradient
    B, T, R = x_BTR.shape
    tile = Tile(B, T, R, reverse=True)
    jump_B1T = tile.whole_blocks(gate.jump(position_BT))
    gates, states = (x_BTR, a_gate_BTR, input_gate_BTR), (h0_BR[:, None], dh_BR[:, None])
    sum_spec = pl.BlockSpec((None, SEGMENTS, tile.block_r), lambda b, r, k: (b, 0, r))
    *dgates, dslowest_BSR, dh0_B1R = pl.pallas_call(
        partial(_backward_kernel, tile=tile),
        grid=tile.grid,
        in_specs=[
            *[tile.steps] * 3,
            tile.channels,
            tile.numbers,
            *[tile.steps, tile.before, tile.steps],
            *[tile.state] * 2,
        ],
        out_specs=[*[tile.steps] * 3, sum_spec, tile.state],
        out_shape=[
            *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in gates],
            jax.ShapeDtypeStruct((B, SEGMENTS, R), jnp.float32),
            tile.state_shape,
        ],
        scratch_shapes=[
            *[tile.buffer()] * 3,
            tile.buffer(8 + BLOCK_T),
            pltpu.VMEM((BLOCK_T, LANES), jnp.float32),
        ],
        compiler_params=GRID,
        interpret=interpreter.mode(),
        name="rg_lru_backward",
    )(*gates, slowest_R[None], jump_B1T, h_BTR, h_BTR, dh_BTR, *states)
    return *dgates, dslowest_BSR.sum((0, 1)), None, dh0_B1R[:, 0]


rg_lru.defvjp(_fwd, _bwd)


def _forward(
    x_BTR: Array,
    a_gate_BTR: Array,
    input_gate_BTR: Array,
    slowest_R: Array,
    position_BT: Array,
    h0_BR: Array,
) -> tuple[Array, Array]:
    tile = Tile(*x_BTR.shape)
    jump_B1T = tile.whole_blocks(gate.jump(position_BT))
    h_BTR, h_B1R = pl.pallas_call(
        partial(_forward_kernel, tile=tile),
        grid=tile.grid,
        in_specs=[*[tile.steps] * 3, tile.channels, tile.numbers, tile.state],
        out_specs=[tile.steps, tile.state],
        out_shape=[jax.ShapeDtypeStruct(x_BTR.shape, x_BTR.dtype), tile.state_shape],
        scratch_shapes=[*[tile.buffer()] * 2, pltpu.VMEM((BLOCK_T, LANES), jnp.float32)],
        compiler_params=GRID,
        interpret=interpreter.mode(),
        name="rg_lru_forward",
    )(x_BTR, a_gate_BTR, input_gate_BTR, slowest_R[None], jump_B1T, h0_BR[:, None])
    return h_BTR, h_B1R[:, 0]


def _forward_kernel(
    x_ref,  # [BLOCK_T, BLOCK_R]
    a_gate_ref,  # [BLOCK_T, BLOCK_R]
    input_gate_ref,  # [BLOCK_T, BLOCK_R]
    slowest_ref,  # [1, BLOCK_R] float32
    jump_ref,  # [1, BLOCK_T] float32
    h0_ref,  # [1, BLOCK_R] float32
    h_ref,  # [BLOCK_T, BLOCK_R], written
    last_ref,  # [1, BLOCK_R] float32, written: the state so far, and the last one in the end
    a_buffer,
    h_buffer,
    jump_buffer,  # [BLOCK_T, LANES] float32
    *,
    tile: Tile,
):
    def open_gates(c: int, rows: pl.Slice, kept: pl.Slice) -> None:
        x, a_gate, input_gate = read(rows, c, x_ref, a_gate_ref, input_gate_ref)
        a, log_a, _ = gate.decay(a_gate, slowest_ref[:, lanes(c)], jump_buffer[rows, :])
        a_buffer[c, kept, :] = a
        h_buffer[c, kept, :] = gate.inflow(x, input_gate, a, log_a)

    def narrow(c: int, rows: pl.Slice, kept: pl.Slice) -> None:
        h_ref[rows, lanes(c)] = h_buffer[c, kept, :].astype(h_ref.dtype)

    tile.begin(last_ref, h0_ref)
    stand(jump_buffer, jump_ref)
    tile.in_pieces(open_gates)
    tile.keep_beyond_end(a_buffer, h_buffer)
    tile.walk(a_buffer, h_buffer, last_ref)
    tile.in_pieces(narrow)


def _backward_kernel(
    x_ref,  # [BLOCK_T, BLOCK_R]
    a_gate_ref,  # [BLOCK_T, BLOCK_R]
    input_gate_ref,  # [BLOCK_T, BLOCK_R]
    slowest_ref,  # [1, BLOCK_R] float32
    jump_ref,  # [1, BLOCK_T] float32
    h_ref,  # [BLOCK_T, BLOCK_R]
    before_ref,  # [BEFORE, BLOCK_R]: the states before those of h_ref
    dh_ref,  # [BLOCK_T, BLOCK_R]
    h0_ref,  # [1, BLOCK_R] float32
    dh_last_ref,  # [1, BLOCK_R] float32
    dx_ref,  # [BLOCK_T, BLOCK_R], written
    da_gate_ref,  # [BLOCK_T, BLOCK_R], written
    dinput_gate_ref,  # [BLOCK_T, BLOCK_R], written
    dslowest_ref,  # [SEGMENTS, BLOCK_R] float32, written: parts of a sum
    flow_ref,  # [1, BLOCK_R] float32, written: what reaches the state before the block
    a_buffer,
    r_buffer,
    g_buffer,
    h_buffer,  # [BLOCK_R / LANES, 8 + BLOCK_T, LANES]
    jump_buffer,  # [BLOCK_T, LANES] float32
    *,
    tile: Tile,
):
    """With g_t the whole gradient of h_t: g_t = dh_t + flow_t, flow_{t-1} = a_t g_t."""
    block = tile.block(pl.program_id(2))

    def open_gates(c: int, rows: pl.Slice, kept: pl.Slice) -> None:
        a_gate, dh = read(rows, c, a_gate_ref, dh_ref)
        a, _, r = gate.decay(a_gate, slowest_ref[:, lanes(c)], jump_buffer[rows, :])
        a_buffer[c, kept, :], r_buffer[c, kept, :], g_buffer[c, kept, :] = a, r, dh

    def differentiate(c: int, rows: pl.Slice, kept: pl.Slice) -> None:
        x, input_gate = read(rows, c, x_ref, input_gate_ref)
        slowest, r = slowest_ref[:, lanes(c)], r_buffer[c, kept, :]
        log_a = r * slowest + jump_buffer[rows, :]
        dx, da_gate, dinput_gate, dslowest = gate.grad(
            g_buffer[c, kept, :],
            earlier(h_buffer, c, rows),
            x,
            input_gate,
            slowest,
            a_buffer[c, kept, :],
            log_a,
            r,
        )
        dx_ref[rows, lanes(c)] = dx.astype(dx_ref.dtype)
        da_gate_ref[rows, lanes(c)] = da_gate.astype(da_gate_ref.dtype)
        dinput_gate_ref[rows, lanes(c)] = dinput_gate.astype(dinput_gate_ref.dtype)
        dslowest = jnp.where(tile.is_inside(block, rows), dslowest, 0)
        dslowest_ref[:, lanes(c)] += dslowest.reshape(-1, SEGMENTS, LANES).sum(0)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dslowest_ref[...] = jnp.zeros_like(dslowest_ref)

    tile.begin(flow_ref, dh_last_ref)
    stand(jump_buffer, jump_ref)
    tile.shift(h_buffer, h_ref, before_ref, h0_ref)
    tile.in_pieces(open_gates)
    tile.keep_beyond_end(a_buffer, g_buffer)
    tile.walk(a_buffer, g_buffer, flow_ref)
    tile.in_pieces(differentiate)


def read(rows: pl.Slice, c: int, *refs: jax.Ref) -> list[Array]:
    return [ref[rows, lanes(c)].astype(jnp.float32) for ref in refs]


def stand(buffer: jax.Ref, row_ref: jax.Ref) -> None:
    """Numbers of steps, which lie along lanes, one a row: the same in all of its lanes."""
    buffer[...] = jnp.broadcast_to(row_ref[...], (LANES, BLOCK_T)).T
