"""The recurrent block: two branches, a causal convolution, the RG-LRU, and their product.

Source: arXiv:2402.19427 section 2.4.  Twin: implementations/torch_backend/mixers/rg_lru.py.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from implementations.config import ModelConfig
from implementations.engine import Kernels
from implementations.jax_backend.activations import watched
from implementations.jax_backend.kernels import rg_lru as rg_lru_kernel
from implementations.jax_backend.kernels.gated_gelu import gated_gelu
from implementations.jax_backend.kernels.rg_lru_step import rg_lru_step
from implementations.jax_backend.layers import block_diagonal, causal_conv, linear


class State(NamedTuple):
    conv_BWR: Array  # the last conv_width - 1 inputs of the convolution
    h_BR: Array  # float32 (float64 in float64)


def empty_state(config: ModelConfig, batch_size: int, capacity: int, dtype: jnp.dtype) -> State:
    R = config.d_rnn
    return State(
        jnp.zeros((batch_size, max(config.conv_width - 1, 0), R), dtype),
        jnp.zeros((batch_size, R), jnp.promote_types(dtype, jnp.float32)),
    )


@watched
def mixer(
    params: dict,
    x_BTD: Array,
    position_BT: Array,
    state: State | None,
    *,
    config: ModelConfig,
    kernels: Kernels,
) -> tuple[Array, State | None]:
    past = empty_state(config, x_BTD.shape[0], 0, x_BTD.dtype) if state is None else state
    gate_BTR = linear(params["linear_y"], x_BTD)
    x_BTR = linear(params["linear_x"], x_BTD)
    conv_BWR = past.conv_BWR
    if config.conv_width:
        x_BTR, conv_BWR = causal_conv(
            params["conv_1d"], x_BTR, position_BT, conv_BWR, kernels.layers
        )
    h_BTR, h_BR = rg_lru(
        params["rg_lru"], x_BTR, position_BT, past.h_BR, config, kernels.linear_scan
    )
    y_BTD = linear(params["linear_out"], gated_gelu(gate_BTR, h_BTR, kernels.layers))
    return y_BTD, None if state is None else State(conv_BWR, h_BR)


@watched
def rg_lru(
    params: dict,
    x_BTR: Array,
    position_BT: Array,
    h0_BR: Array,
    config: ModelConfig,
    variant: str,
) -> tuple[Array, Array]:
    """The unit with its gates; of one token without a scan. What a gate lacks is None."""
    gates = [
        block_diagonal(params[name], x_BTR) if name in params else None
        for name in ("a_gate", "input_gate")
    ]
    a_param_R, form = params.get("a_param"), {"theta_R": params.get("theta")} | form_of(config)
    if x_BTR.shape[1] == 1:
        inputs = [None if v is None else v[:, 0] for v in (x_BTR, *gates)]
        h_BR = rg_lru_step(*inputs, a_param_R, position_BT, h0_BR, variant, **form)
        return h_BR[:, None].astype(x_BTR.dtype), h_BR
    return rg_lru_kernel.rg_lru(x_BTR, *gates, a_param_R, position_BT, h0_BR, variant, **form)


def form_of(config: ModelConfig) -> dict[str, Any]:
    """What a config says of the equations."""
    names = ("gate", "decay_exponent", "normalize_input")
    return {name: getattr(config, name) for name in names}
