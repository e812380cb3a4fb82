"""The RG-LRU from its gates' pre-activations to its states for GPU: one Pallas kernel a direction.

Contract: implementations/jax_backend/kernels/rg_lru.py.  Truth: implementations/gates.py.

Time is walked as in linear_scan_gpu.py. Bytes a step and channel in bfloat16, each moved once:
forward 8 (reads x and both pre-activations, writes h), backward 16 (reads those three, h and dh;
writes three gradients). Gates and decay are computed again, not stored. What `form`
says is compiled in; a gate that is absent is None here, and saves 2 bytes forward and 4 backward.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from implementations.jax_backend.kernels import gate, interpreter
from implementations.jax_backend.kernels.gate import Form
from implementations.jax_backend.kernels.linear_scan_gpu import (
    BACKWARD_ROWS,
    PARAMS,
    ROWS,
    Lane,
    Lanes,
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
    lanes = Lanes(*h_BTR.shape, len(h_BTR) // len(position_BT))
    dx_BTR, *dgates, dslowest_BR, dh0_BR = pl.pallas_call(
        partial(_backward_kernel, form=form, lanes=lanes),
        grid=lanes.grid,
        in_specs=[
            lanes.steps,
            *[gate.given(x, lanes.shared) for x in gates],
            gate.given(slowest_R, lanes.channels),
            lanes.numbers,
            *[lanes.steps] * 2,
            *[lanes.state] * 2,
        ],
        out_specs=[
            lanes.steps,
            *[gate.given(x, lanes.steps) for x in gates],
            gate.given(slowest_R, lanes.state),
            lanes.state,
        ],
        out_shape=[
            jax.ShapeDtypeStruct(x_BTR.shape, x_BTR.dtype),
            *[x if x is None else jax.ShapeDtypeStruct(x_BTR.shape, x.dtype) for x in gates],
            gate.given(slowest_R, lanes.state_shape),
            lanes.state_shape,
        ],
        compiler_params=PARAMS,
        interpret=interpreter.mode(),
        name="rg_lru_backward",
    )(x_BTR, *gates, slowest_R, gate.jump(position_BT), h_BTR, dh_BTR, h0_BR, dh_BR)
    dgates = [gate.over_sharing(x, len(position_BT)) for x in dgates]
    dslowest_R = None if dslowest_BR is None else dslowest_BR.sum(0)
    return dx_BTR, *dgates, dslowest_R, None, dh0_BR


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
    lanes = Lanes(*x_BTR.shape, len(x_BTR) // len(position_BT))
    return pl.pallas_call(
        partial(_forward_kernel, form=form, lanes=lanes),
        grid=lanes.grid,
        in_specs=[
            lanes.steps,
            gate.given(a_gate_BTR, lanes.shared),
            gate.given(input_gate_BTR, lanes.shared),
            gate.given(slowest_R, lanes.channels),
            lanes.numbers,
            lanes.state,
        ],
        out_specs=[lanes.steps, lanes.state],
        out_shape=[jax.ShapeDtypeStruct(x_BTR.shape, x_BTR.dtype), lanes.state_shape],
        compiler_params=PARAMS,
        interpret=interpreter.mode(),
        name="rg_lru_forward",
    )(x_BTR, a_gate_BTR, input_gate_BTR, slowest_R, gate.jump(position_BT), h0_BR)


def _forward_kernel(
    x_ref,  # [T, BLOCK_R]
    a_gate_ref,  # [T, BLOCK_R], or None
    input_gate_ref,  # [T, BLOCK_R], or None
    slowest_ref,  # [BLOCK_R] float32, or None
    jump_ref,  # [T] float32
    h0_ref,  # [BLOCK_R] float32
    h_ref,  # [T, BLOCK_R], written
    last_ref,  # [BLOCK_R] float32, written
    *,
    form: Form,
    lanes: Lanes,
):
    lane = Lane(lanes)
    slowest = lane.read_state(slowest_ref)

    def rows(steps: list[Array], h: Array) -> Array:
        loaded = [
            (*lane.read(t, x_ref, a_gate_ref, input_gate_ref), lane.read_number(t, jump_ref))
            for t in steps
        ]
        for t, (x, a_gate, input_gate, jump) in zip(steps, loaded, strict=True):
            a, log_a, _ = gate.decay(form, a_gate, slowest, jump)
            inflow = gate.inflow(form, x, input_gate, slowest, jump, a, log_a)
            h = jnp.where(lane.is_step(t), a * h + inflow, h)
            lane.write(t, (h_ref, h))
        return h

    h = lane.walk(rows, lane.read_state(h0_ref), ROWS)
    lane.write_state((last_ref, h))


def _backward_kernel(
    x_ref,  # [T, BLOCK_R]
    a_gate_ref,  # [T, BLOCK_R], or None
    input_gate_ref,  # [T, BLOCK_R], or None
    slowest_ref,  # [BLOCK_R] float32, or None
    jump_ref,  # [T] float32
    h_ref,  # [T, BLOCK_R]
    dh_ref,  # [T, BLOCK_R]
    h0_ref,  # [BLOCK_R] float32
    dh_last_ref,  # [BLOCK_R] float32
    dx_ref,  # [T, BLOCK_R], written
    da_gate_ref,  # [T, BLOCK_R], written, or None
    dinput_gate_ref,  # [T, BLOCK_R], written, or None
    dslowest_ref,  # [BLOCK_R] float32, written, or None
    dh0_ref,  # [BLOCK_R] float32, written
    *,
    form: Form,
    lanes: Lanes,
):
    """With g_t the whole gradient of h_t: g_t = dh_t + flow_t, flow_{t-1} = a_t g_t."""
    lane = Lane(lanes)
    slowest, h0 = lane.read_state(slowest_ref), lane.read_state(h0_ref)

    def rows(steps: list[Array], carry: tuple) -> tuple:
        flow, total = carry
        loaded = [
            (
                *lane.read(t, x_ref, a_gate_ref, input_gate_ref, dh_ref),
                lane.read_before(t, h_ref, h0),
                lane.read_number(t, jump_ref),
            )
            for t in steps
        ]
        for t, (x, a_gate, input_gate, dh, h, jump) in zip(steps, loaded, strict=True):
            g = dh + flow
            a, log_a, rate = gate.decay(form, a_gate, slowest, jump)
            dx, da_gate, dinput_gate, dslowest = gate.grad(
                form, g, h, x, input_gate, slowest, jump, a, log_a, rate
            )
            lane.write(t, (dx_ref, dx), (da_gate_ref, da_gate), (dinput_gate_ref, dinput_gate))
            flow = jnp.where(lane.is_step(t), a * g, flow)
            if total is not None:
                total += jnp.where(lane.is_step(t), dslowest, 0)
        return flow, total

    flow = lane.read_state(dh_last_ref)
    total = gate.given(slowest, jnp.zeros_like(flow))
    flow, total = lane.walk(rows, (flow, total), BACKWARD_ROWS, reverse=True)
    lane.write_state((dslowest_ref, total), (dh0_ref, flow))
