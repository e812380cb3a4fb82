"""One token of the RG-LRU, or of its other gates: its variants are those of linear_scan.

Twin: implementations/torch_backend/kernels/rg_lru_step.py.
Truth: implementations/gates.py.

Compiled for a v5e it moves what must move: x, its gates and h are read once, h is written once
(benchmarks/compiled_bytes.py). Its twin is given the convolution and the gates' products too.
"""

import jax
import jax.numpy as jnp
from jax import Array

from implementations.config import GATES, ModelConfig
from implementations.jax_backend.kernels.gate import Form, coefficients, slowest_of, turned
from implementations.jax_backend.kernels.linear_scan import check


def rg_lru_step(
    x_BR: Array,
    a_gate_BR: Array | None,
    input_gate_BR: Array | None,
    a_param_R: Array | None,
    position_BT: Array,
    h_BR: Array,
    variant: str,
    *,
    theta_R: Array | None = None,
    gate: str = "rg_lru",
    decay_exponent: float = ModelConfig.decay_exponent,
    normalize_input: bool = True,
) -> Array:
    """The next state, in h's dtype; T = 1. No variant has a loop to choose."""
    check(variant)
    (B, R), is_complex = x_BR.shape, GATES[gate].is_complex
    gates = (a_gate_BR, input_gate_BR)
    found = [v.shape for v in gates if v is not None]
    shape = (B, R // 2 if is_complex else R)
    if h_BR.shape != (B, R) or any(v != shape for v in found):
        raise ValueError(
            "rg_lru_step needs x and h of one shape [B, R], and gates of it (complex: [B, R / 2]); "
            f"got x {x_BR.shape}, h {h_BR.shape}, gates {found}."
        )
    wide, form = h_BR.dtype, Form(gate, normalize_input)
    slowest_R = slowest_of(a_param_R, form, decay_exponent, wide)
    a_BR, weight_BR = coefficients(*gates, slowest_R, position_BT == 0, form, wide)
    if is_complex:
        h_BR = turned(h_BR, theta_R.astype(wide) * jax.nn.sigmoid(a_gate_BR.astype(wide)))
        a_BR, weight_BR = (jnp.concatenate([v, v], axis=-1) for v in (a_BR, weight_BR))
    return a_BR * h_BR + weight_BR * x_BR.astype(wide)
