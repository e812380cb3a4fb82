"""The RG-LRU from its gates' pre-activations to its states for TPU: one Pallas kernel a direction.

Contract: implementations/jax_backend/kernels/rg_lru.py.  Truth: implementations/gates.py.

Time is walked as in linear_scan_tpu.py, and the gates are computed a piece at a time before it
(backward: and their gradients after it). Bytes a step and channel in bfloat16, each moved once:
forward 8 (reads x and both pre-activations, writes h), backward 16 (reads those three, h and dh;
writes three gradients). Gates and decay are computed again, not stored. What `form`
says is compiled in; a gate that is absent is None here, and saves 2 bytes forward and 4 backward.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from implementations.jax_backend.kernels import gate, interpreter
from implementations.jax_backend.kernels.gate import Form
from implementations.jax_backend.kernels.linear_scan_tpu import (
    BLOCK_T,
    GRID,
    LANES,
    SEGMENTS,
    Tile,
    earlier,
    lanes,
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def rg_lru(
    form: Form,
    x_BTR: Array,
    a_gate_BTR: Array | None,
    input_gate_BTR: Array | None,
    slowest_R: Array | None,
    position_BT: Array,
    h0_BR: Array,
) -> tuple[Array, Array]:
    """Every state, in x's dtype, and the last one, in float32. slowest: log a where the rate is 1;
    None: -1. Where x has n times the sequences of its gates, n in a row have them in common."""
    return _forward(form, x_BTR, a_gate_BTR, input_gate_BTR, slowest_R, position_BT, h0_BR)


def _fwd(form: Form, *inputs: Array | None) -> tuple:
    h_BTR, h_BR = _forward(form, *inputs)
    return (h_BTR, h_BR), (*inputs, h_BTR)


def _bwd(form: Form, saved: tuple, gradient: tuple) -> tuple[Array | None, ...]:
    x_BTR, *gates, slowest_R, position_BT, h0_BR, h_BTR = saved
    dh_BTR, dh_BR = gradient
    B, T, R = x_BTR.shape
    tile = Tile(B, T, R, reverse=True, sharing=B // len(position_BT))
    jump_B1T = tile.whole_blocks(gate.jump(position_BT))
    states = (h0_BR[:, None], dh_BR[:, None])
    sum_spec = pl.BlockSpec((None, SEGMENTS, tile.block_r), lambda b, r, k: (b, 0, r))
    sum_shape = jax.ShapeDtypeStruct((B, SEGMENTS, R), jnp.float32)
    dx_BTR, *dgates, dslowest_BSR, dh0_B1R = pl.pallas_call(
        partial(_backward_kernel, form=form, tile=tile),
        grid=tile.grid,
        in_specs=[
            tile.steps,
            *[gate.given(x, tile.shared) for x in gates],
            gate.given(slowest_R, tile.channels),
            tile.numbers,
            *[tile.steps, tile.before, tile.steps],
            *[tile.state] * 2,
        ],
        out_specs=[
            tile.steps,
            *[gate.given(x, tile.steps) for x in gates],
            gate.given(slowest_R, sum_spec),
            tile.state,
        ],
        out_shape=[
            jax.ShapeDtypeStruct(x_BTR.shape, x_BTR.dtype),
            *[x if x is None else jax.ShapeDtypeStruct(x_BTR.shape, x.dtype) for x in gates],
            gate.given(slowest_R, sum_shape),
            tile.state_shape,
        ],
        scratch_shapes=[
            tile.buffer(),
            gate.given(gates[0], tile.buffer()),
            tile.buffer(),
            tile.buffer(8 + BLOCK_T),
            pltpu.VMEM((BLOCK_T, LANES), jnp.float32),
        ],
        compiler_params=GRID,
        interpret=interpreter.mode(),
        name="rg_lru_backward",
    )(x_BTR, *gates, row(slowest_R), jump_B1T, h_BTR, h_BTR, dh_BTR, *states)
    dgates = [gate.over_sharing(x, len(position_BT)) for x in dgates]
    dslowest_R = None if dslowest_BSR is None else dslowest_BSR.sum((0, 1))
    return dx_BTR, *dgates, dslowest_R, None, dh0_B1R[:, 0]


rg_lru.defvjp(_fwd, _bwd)


def _forward(
    form: Form,
    x_BTR: Array,
    a_gate_BTR: Array | None,
    input_gate_BTR: Array | None,
    slowest_R: Array | None,
    position_BT: Array,
    h0_BR: Array,
) -> tuple[Array, Array]:
    tile = Tile(*x_BTR.shape, sharing=len(x_BTR) // len(position_BT))
    jump_B1T = tile.whole_blocks(gate.jump(position_BT))
    h_BTR, h_B1R = pl.pallas_call(
        partial(_forward_kernel, form=form, tile=tile),
        grid=tile.grid,
        in_specs=[
            tile.steps,
            gate.given(a_gate_BTR, tile.shared),
            gate.given(input_gate_BTR, tile.shared),
            gate.given(slowest_R, tile.channels),
            tile.numbers,
            tile.state,
        ],
        out_specs=[tile.steps, tile.state],
        out_shape=[jax.ShapeDtypeStruct(x_BTR.shape, x_BTR.dtype), tile.state_shape],
        scratch_shapes=[*[tile.buffer()] * 2, pltpu.VMEM((BLOCK_T, LANES), jnp.float32)],
        compiler_params=GRID,
        interpret=interpreter.mode(),
        name="rg_lru_forward",
    )(x_BTR, a_gate_BTR, input_gate_BTR, row(slowest_R), jump_B1T, h0_BR[:, None])
    return h_BTR, h_B1R[:, 0]


def _forward_kernel(
    x_ref,  # [BLOCK_T, BLOCK_R]
    a_gate_ref,  # [BLOCK_T, BLOCK_R], or None
    input_gate_ref,  # [BLOCK_T, BLOCK_R], or None
    slowest_ref,  # [1, BLOCK_R] float32, or None
    jump_ref,  # [1, BLOCK_T] float32
    h0_ref,  # [1, BLOCK_R] float32
    h_ref,  # [BLOCK_T, BLOCK_R], written
    last_ref,  # [1, BLOCK_R] float32, written: the state so far, and the last one in the end
    a_buffer,
    h_buffer,
    jump_buffer,  # [BLOCK_T, LANES] float32
    *,
    form: Form,
    tile: Tile,
):
    def open_gates(c: int, rows: pl.Slice, kept: pl.Slice) -> None:
        x, a_gate, input_gate = read(rows, c, x_ref, a_gate_ref, input_gate_ref)
        slowest, jump = channels(slowest_ref, c), jump_buffer[rows, :]
        a, log_a, _ = gate.decay(form, a_gate, slowest, jump)
        a_buffer[c, kept, :] = a
        h_buffer[c, kept, :] = gate.inflow(form, x, input_gate, slowest, jump, a, log_a)

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
    a_gate_ref,  # [BLOCK_T, BLOCK_R], or None
    input_gate_ref,  # [BLOCK_T, BLOCK_R], or None
    slowest_ref,  # [1, BLOCK_R] float32, or None
    jump_ref,  # [1, BLOCK_T] float32
    h_ref,  # [BLOCK_T, BLOCK_R]
    before_ref,  # [BEFORE, BLOCK_R]: the states before those of h_ref
    dh_ref,  # [BLOCK_T, BLOCK_R]
    h0_ref,  # [1, BLOCK_R] float32
    dh_last_ref,  # [1, BLOCK_R] float32
    dx_ref,  # [BLOCK_T, BLOCK_R], written
    da_gate_ref,  # [BLOCK_T, BLOCK_R], written, or None
    dinput_gate_ref,  # [BLOCK_T, BLOCK_R], written, or None
    dslowest_ref,  # [SEGMENTS, BLOCK_R] float32, written: parts of a sum; or None
    flow_ref,  # [1, BLOCK_R] float32, written: what reaches the state before the block
    a_buffer,
    rate_buffer,  # or None, without a_gate
    g_buffer,
    h_buffer,  # [BLOCK_R / LANES, 8 + BLOCK_T, LANES]
    jump_buffer,  # [BLOCK_T, LANES] float32
    *,
    form: Form,
    tile: Tile,
):
    """With g_t the whole gradient of h_t: g_t = dh_t + flow_t, flow_{t-1} = a_t g_t."""
    block = tile.block(pl.program_id(2))

    def open_gates(c: int, rows: pl.Slice, kept: pl.Slice) -> None:
        a_gate, dh = read(rows, c, a_gate_ref, dh_ref)
        a, _, rate = gate.decay(form, a_gate, channels(slowest_ref, c), jump_buffer[rows, :])
        a_buffer[c, kept, :], g_buffer[c, kept, :] = a, dh
        if rate is not None:
            rate_buffer[c, kept, :] = rate

    def differentiate(c: int, rows: pl.Slice, kept: pl.Slice) -> None:
        x, input_gate = read(rows, c, x_ref, input_gate_ref)
        slowest, jump = channels(slowest_ref, c), jump_buffer[rows, :]
        rate = None if rate_buffer is None else rate_buffer[c, kept, :]
        *gradients, dslowest = gate.grad(
            form,
            g_buffer[c, kept, :],
            earlier(h_buffer, c, rows),
            x,
            input_gate,
            slowest,
            jump,
            a_buffer[c, kept, :],
            gate.log_decay(rate, slowest, jump),
            rate,
        )
        for ref, value in zip((dx_ref, da_gate_ref, dinput_gate_ref), gradients, strict=True):
            if ref is not None:
                ref[rows, lanes(c)] = value.astype(ref.dtype)
        if dslowest is not None:
            dslowest = jnp.where(tile.is_inside(block, rows), dslowest, 0)
            dslowest_ref[:, lanes(c)] += dslowest.reshape(-1, SEGMENTS, LANES).sum(0)

    if dslowest_ref is not None:

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


def row(slowest_R: Array | None) -> Array | None:
    return None if slowest_R is None else slowest_R[None]


def channels(ref: jax.Ref | None, c: int) -> Array | None:
    return None if ref is None else ref[:, lanes(c)]


def read(rows: pl.Slice, c: int, *refs: jax.Ref | None) -> list[Array | None]:
    return [None if ref is None else ref[rows, lanes(c)].astype(jnp.float32) for ref in refs]


def stand(buffer: jax.Ref, row_ref: jax.Ref) -> None:
    """Numbers of steps, which lie along lanes, one a row: the same in all of its lanes."""
    buffer[...] = jnp.broadcast_to(row_ref[...], (LANES, BLOCK_T)).T
