"""One token of the real-gated linear recurrent unit: its variants are those of linear_scan.

Twin: implementations/torch_backend/kernels/rg_lru_step.py.
Truth: implementations/mixers/rg_lru.py.

Compiled for a v5e it moves what must move: x, its gates and h are read once, h is written once
(benchmarks/compiled_bytes.py). Its twin is given the convolution and the gates' products too.
"""

from jax import Array

from implementations.jax_backend.kernels.linear_scan import check
from implementations.jax_backend.kernels.rg_lru import decay_and_input, slowest


def rg_lru_step(
    x_BR: Array,
    a_gate_BR: Array,
    input_gate_BR: Array,
    a_param_R: Array,
    position_BT: Array,
    h_BR: Array,
    variant: str,
) -> Array:
    """The next state, in h's dtype; T = 1. No variant has a loop to choose."""
    check(variant)
    if not x_BR.shape == a_gate_BR.shape == input_gate_BR.shape == h_BR.shape:
        raise ValueError(
            "rg_lru_step needs x, its gates and h of one shape [B, R]; got x "
            f"{x_BR.shape}, gates {a_gate_BR.shape} and {input_gate_BR.shape}, h {h_BR.shape}."
        )
    inputs = (x_BR, a_gate_BR, input_gate_BR, slowest(a_param_R, h_BR.dtype))
    a_BR, input_BR = decay_and_input(*inputs, position_BT == 0, h_BR.dtype)
    return a_BR * h_BR + input_BR
