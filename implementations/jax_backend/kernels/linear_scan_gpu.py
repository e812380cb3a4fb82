"""linear_scan for GPU: one Pallas kernel per direction, compiled by Triton.

Contract: implementations/jax_backend/kernels/linear_scan.py.  Truth: implementations/reference.py.

A program owns one sequence and BLOCK_R channels and walks time once, the state in float32
registers. ROWS steps are read at once, before the first of them is computed: their loads are under
way together. Bytes a step and channel: forward reads a and x and writes h, backward reads a, h and
dh and writes da and dx: each once. Pallas has no scan across the threads of a program, with which
Triton's own kernels (the torch backend's) also compute pieces of time at once: few sequences of few
channels, fewer than 64 channels a multiprocessor, leave this kernel waiting for memory.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from implementations.engine import Unsupported
from implementations.jax_backend.kernels import interpreter

BLOCK_R = 64  # a row of bfloat16 is a line of 128 bytes
ROWS = 16  # forward: 4 KiB of bfloat16 under way a program
INTERPRETED_ROWS = 3
MAX_ELEMENTS = 2**31
BACKWARD_ROWS = 8  # it holds more for each row
PARAMS = pltriton.CompilerParams(num_warps=2, num_stages=1)  # a channel a thread


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
    lanes = Lanes(*a_BTR.shape)
    return pl.pallas_call(
        partial(_backward_kernel, lanes=lanes),
        grid=lanes.grid,
        in_specs=[*[lanes.steps] * 3, *[lanes.state] * 2],
        out_specs=[*[lanes.steps] * 2, lanes.state],
        out_shape=[
            jax.ShapeDtypeStruct(a_BTR.shape, a_BTR.dtype),
            jax.ShapeDtypeStruct(a_BTR.shape, dh_BTR.dtype),
            lanes.state_shape,
        ],
        compiler_params=PARAMS,
        interpret=interpreter.mode(),
        name="linear_scan_backward",
    )(a_BTR, h_BTR, dh_BTR, h0_BR, dh_BR)


linear_scan.defvjp(_fwd, _bwd)


def _forward(a_BTR: Array, x_BTR: Array, h0_BR: Array) -> tuple[Array, Array]:
    lanes = Lanes(*a_BTR.shape)
    return pl.pallas_call(
        partial(_forward_kernel, lanes=lanes),
        grid=lanes.grid,
        in_specs=[*[lanes.steps] * 2, lanes.state],
        out_specs=[lanes.steps, lanes.state],
        out_shape=[jax.ShapeDtypeStruct(x_BTR.shape, x_BTR.dtype), lanes.state_shape],
        compiler_params=PARAMS,
        interpret=interpreter.mode(),
        name="linear_scan_forward",
    )(a_BTR, x_BTR, h0_BR)


def _forward_kernel(
    a_ref,  # [T, BLOCK_R]
    x_ref,  # [T, BLOCK_R]
    h0_ref,  # [BLOCK_R] float32
    h_ref,  # [T, BLOCK_R], written
    last_ref,  # [BLOCK_R] float32, written
    *,
    lanes: "Lanes",
):
    lane = Lane(lanes)

    def rows(steps: list[Array], h: Array) -> Array:
        loaded = [lane.read(t, a_ref, x_ref) for t in steps]
        for t, (a, x) in zip(steps, loaded, strict=True):
            h = jnp.where(lane.is_step(t), a * h + x, h)
            lane.write(t, (h_ref, h))
        return h

    h = lane.walk(rows, lane.read_state(h0_ref), ROWS)
    lane.write_state((last_ref, h))


def _backward_kernel(
    a_ref,  # [T, BLOCK_R]
    h_ref,  # [T, BLOCK_R]
    dh_ref,  # [T, BLOCK_R]
    h0_ref,  # [BLOCK_R] float32
    dh_last_ref,  # [BLOCK_R] float32
    da_ref,  # [T, BLOCK_R], written
    dx_ref,  # [T, BLOCK_R], written
    dh0_ref,  # [BLOCK_R] float32, written
    *,
    lanes: "Lanes",
):
    """With g_t the whole gradient of h_t: g_t = dh_t + flow_t, flow_{t-1} = a_t g_t."""
    lane = Lane(lanes)
    h0 = lane.read_state(h0_ref)

    def rows(steps: list[Array], flow: Array) -> Array:
        loaded = [(*lane.read(t, a_ref, dh_ref), lane.read_before(t, h_ref, h0)) for t in steps]
        for t, (a, dh, h) in zip(steps, loaded, strict=True):
            g = dh + flow
            lane.write(t, (dx_ref, g), (da_ref, g * h))
            flow = jnp.where(lane.is_step(t), a * g, flow)
        return flow

    flow = lane.walk(rows, lane.read_state(dh_last_ref), BACKWARD_ROWS, reverse=True)
    lane.write_state((dh0_ref, flow))


class Lanes:
    """The grid of all programs: each owns a lane, one sequence and BLOCK_R of its channels."""

    def __init__(self, B: int, T: int, R: int, sharing: int = 1) -> None:
        """sharing: so many sequences, one after the other, have their gates in common."""
        if B * T * R >= MAX_ELEMENTS:
            raise Unsupported(
                f"pallas_gpu counts elements in 32 bits: batch {B} x {T} steps x {R} channels is "
                f"{B * T * R}; fewer than {MAX_ELEMENTS} are possible. Take another linear_scan."
            )
        self.T, self.R = T, R

        def owner(b: Array) -> Array:
            return jax.lax.div(b, sharing)

        self.grid = (B, pl.cdiv(R, BLOCK_R))
        self.state_shape = jax.ShapeDtypeStruct((B, R), jnp.float32)
        self.steps = pl.BlockSpec((None, T, BLOCK_R), lambda b, r: (b, 0, r))
        self.shared = pl.BlockSpec((None, T, BLOCK_R), lambda b, r: (owner(b), 0, r))
        self.state = pl.BlockSpec((None, BLOCK_R), lambda b, r: (b, r))
        self.channels = pl.BlockSpec((BLOCK_R,), lambda b, r: (r,))
        self.numbers = pl.BlockSpec((None, T), lambda b, r: (owner(b), 0))


class Lane:
    """What this program owns, within its kernel."""

    def __init__(self, lanes: Lanes) -> None:
        self.T = lanes.T
        channel = pl.program_id(1) * BLOCK_R + jnp.arange(BLOCK_R)
        self.is_channel = channel < lanes.R

    def walk(
        self,
        rows: Callable[[list[Array], Array | tuple], Array | tuple],
        carry: Array | tuple,
        num_rows: int,
        *,
        reverse: bool = False,
    ) -> Array | tuple:
        """rows(steps, carry) -> carry for all steps in order, num_rows at once; in the last call
        some may lie beyond the end (reversed: before the start)."""
        if interpreter.mode():  # it compiles every row for a CPU
            num_rows = INTERPRETED_ROWS

        def tile(i: Array, carry: Array | tuple) -> Array | tuple:
            steps = [i * num_rows + row for row in range(num_rows)]
            return rows([self.T - 1 - t for t in steps] if reverse else steps, carry)

        return jax.lax.fori_loop(0, pl.cdiv(self.T, num_rows), tile, carry)

    def is_step(self, t: Array) -> Array:
        return (t >= 0) & (t < self.T)

    def read(self, t: Array, *refs: jax.Ref | None) -> list[Array | None]:
        mask = self.is_channel & self.is_step(t)
        loaded = [
            None if ref is None else pltriton.load(ref.at[t], mask=mask, other=0) for ref in refs
        ]
        return [None if x is None else x.astype(jnp.float32) for x in loaded]

    def read_before(self, t: Array, h_ref: jax.Ref, h0: Array) -> Array:
        """The state before step t."""
        (h,) = self.read(t - 1, h_ref)
        return jnp.where(t == 0, h0, h)

    def read_number(self, t: Array, ref: jax.Ref) -> Array:
        """One of each step, the same for all channels."""
        return pltriton.load(ref.at[t], mask=self.is_step(t), other=0)

    def write(self, t: Array, *pairs: tuple[jax.Ref | None, Array | None]) -> None:
        mask = self.is_channel & self.is_step(t)
        for ref, value in pairs:
            if ref is not None:
                pltriton.store(ref.at[t], value.astype(ref.dtype), mask=mask)

    def read_state(self, ref: jax.Ref | None) -> Array | None:
        if ref is None:
            return None
        return pltriton.load(ref.at[:], mask=self.is_channel, other=0)

    def write_state(self, *pairs: tuple[jax.Ref | None, Array | None]) -> None:
        for ref, value in pairs:
            if ref is not None:
                pltriton.store(ref.at[:], value, mask=self.is_channel)
