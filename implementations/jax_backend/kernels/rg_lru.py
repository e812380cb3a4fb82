"""The RG-LRU from its gates' pre-activations to its states, by variant; and its other gates.

Twin: implementations/torch_backend/kernels/rg_lru.py.  Truth: implementations/gates.py.
What a gate computes of an element: gate.py.

The variants are those of linear_scan; float32 inside (float64 in float64). The block-diagonal
products of the gates, and their biases, stay outside: products of all tokens, for which a
compiler's own are best.
"""

import jax.numpy as jnp
from jax import Array

from implementations.config import GATES, ModelConfig
from implementations.jax_backend.kernels import rg_lru_gpu, rg_lru_tpu
from implementations.jax_backend.kernels.gate import (
    Form,
    coefficients,
    phases,
    slowest_of,
    turned,
)
from implementations.jax_backend.kernels.linear_scan import linear_scan


def rg_lru(
    x_BTR: Array,
    a_gate_BTR: Array | None,
    input_gate_BTR: Array | None,
    a_param_R: Array | None,
    position_BT: Array,
    h0_BR: Array,
    variant: str,
    *,
    theta_R: Array | None = None,
    gate: str = "rg_lru",
    decay_exponent: float = ModelConfig.decay_exponent,
    normalize_input: bool = True,
) -> tuple[Array, Array]:
    """Every state, in x's dtype, and the last one, in h0's. The gates come before their sigmoid,
    with their bias, None where `gate` has none; those of a complex one, its a_param and its theta
    are R / 2. Where position is 0 a document starts: h = i x."""
    kind, (B, T, R) = GATES[gate], x_BTR.shape
    if position_BT.shape != (B, T):
        raise ValueError(f"rg_lru: position must be {(B, T)}, got {position_BT.shape}.")
    own = R // 2 if kind.is_complex else R
    given = {
        "a_gate": (a_gate_BTR, kind.has_recurrence_gate, (B, T, own)),
        "input_gate": (input_gate_BTR, kind.has_input_gate, (B, T, own)),
        "a_param": (a_param_R, kind.has_a_param, (own,)),
        "theta": (theta_R, kind.is_complex, (own,)),
    }
    for name, (value, is_needed, shape) in given.items():
        wanted, found = shape if is_needed else None, None if value is None else value.shape
        if found != wanted:
            raise ValueError(f"rg_lru with gate={gate} needs {name} {wanted}, got {found}.")

    wide, form = h0_BR.dtype, Form(gate, normalize_input)
    inputs = (a_gate_BTR, input_gate_BTR, slowest_of(a_param_R, form, decay_exponent, wide))
    compute = _fused if variant in FUSED else _composed
    settings = (*inputs, position_BT, h0_BR, variant, form)
    if not kind.is_complex:
        return compute(x_BTR, *settings)
    # All in float32: the gradient of a phase is a sum over all later steps, in which the roundings
    # of its terms would add up.
    phase_BTR = phases(a_gate_BTR, theta_R.astype(wide))
    g_BTR, g_BR = compute(turned(x_BTR, -phase_BTR), *settings)
    return turned(g_BTR, phase_BTR).astype(x_BTR.dtype), turned(g_BR, phase_BTR[:, -1])


def _composed(
    x_BTR: Array,
    a_gate_BTR: Array | None,
    input_gate_BTR: Array | None,
    slowest_R: Array | None,
    position_BT: Array,
    h0_BR: Array,
    variant: str,
    form: Form,
) -> tuple[Array, Array]:
    """The equations op by op, and a linear_scan of the variant."""
    wide, is_start_BT1 = h0_BR.dtype, (position_BT == 0)[:, :, None]
    gates = (a_gate_BTR, input_gate_BTR, slowest_R)
    a_BTR, weight_BTR = coefficients(*gates, is_start_BT1, form, wide)
    if form.kind.is_complex:  # both halves have the same
        a_BTR, weight_BTR = (jnp.concatenate([v, v], axis=-1) for v in (a_BTR, weight_BTR))
    h_BTR, h_BR = linear_scan(a_BTR, weight_BTR * x_BTR.astype(wide), h0_BR, variant)
    return h_BTR.astype(x_BTR.dtype), h_BR


def _fused(
    x_BTR: Array,
    a_gate_BTR: Array | None,
    input_gate_BTR: Array | None,
    slowest_R: Array | None,
    position_BT: Array,
    h0_BR: Array,
    variant: str,
    form: Form,
) -> tuple[Array, Array]:
    """One kernel. To it the halves of complex channels are two sequences that share their gates."""
    (B, T, R), halves = x_BTR.shape, 2 if form.kind.is_complex else 1
    x = x_BTR.reshape(B, T, halves, -1).swapaxes(1, 2).reshape(B * halves, T, -1)
    gates = (a_gate_BTR, input_gate_BTR, slowest_R)
    h, last = FUSED[variant](form, x, *gates, position_BT, h0_BR.reshape(B * halves, -1))
    h_BTR = h.reshape(B, halves, T, -1).swapaxes(1, 2).reshape(B, T, R)
    return h_BTR, last.reshape(B, R)


# one kernel; the others are composed
FUSED = {"pallas_tpu": rg_lru_tpu.rg_lru, "pallas_gpu": rg_lru_gpu.rg_lru}
