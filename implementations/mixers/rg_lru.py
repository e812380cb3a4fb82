"""The recurrent block: two branches, a causal convolution, the RG-LRU, and their product.

Source: arXiv:2402.19427 section 2.4. The unit and its other gates: implementations/gates.py.
"""

import math
from typing import Any

import numpy as np

from implementations import gates, reference
from implementations.config import GATES, ModelConfig
from implementations.parameters import ParamSpec, linear_specs
from implementations.reference import Params, gelu, gelu_grad, linear, linear_grad, under, within


def param_specs(config: ModelConfig) -> list[ParamSpec]:
    D, R, W = config.d_model, config.d_rnn, config.conv_width
    specs = [
        *linear_specs(config, "linear_y", (D, R), ("model", "rnn")),
        *linear_specs(config, "linear_x", (D, R), ("model", "rnn")),
    ]
    if W:
        # recurrentgemma: variance 0.01 / width
        std = math.sqrt(0.01 / W)
        specs.append(ParamSpec("conv_1d.weight", (W, R), ("taps", "rnn"), "normal", std))
    if W and config.biases:
        specs.append(ParamSpec("conv_1d.bias", (R,), ("rnn",), "zeros"))
    specs += _unit_specs(config)
    specs += linear_specs(config, "linear_out", (R, D), ("rnn", "model"), is_output=True)
    return specs


def _unit_specs(config: ModelConfig) -> list[ParamSpec]:
    gate, R, G, C = GATES[config.gate], config.d_rnn, config.num_gate_blocks, config.d_gate
    specs, axes = [], ("gate_blocks", "gate_in", "gate_out")
    for name, has_gate, bias_init in (
        ("a_gate", gate.has_recurrence_gate, "time_step" if gate.has_time_step else "zeros"),
        ("input_gate", gate.has_input_gate, "zeros"),
    ):
        if not has_gate:
            continue
        weight, std = (G, R // G, C // G), (R // G) ** -0.5
        specs.append(ParamSpec(f"rg_lru.{name}.weight", weight, axes, "normal", std))
        if config.biases:
            specs.append(ParamSpec(f"rg_lru.{name}.bias", (C,), ("rnn",), bias_init))
    if gate.has_a_param:
        init = "one" if gate.has_time_step else config.lambda_init
        power = config.decay_exponent
        specs.append(ParamSpec("rg_lru.a_param", (C,), ("rnn",), f"a_param_{init}", power=power))
    if gate.is_complex:
        specs.append(ParamSpec("rg_lru.theta", (C,), ("rnn",), "phase"))
    return specs


def state_bytes(config: ModelConfig, capacity: int, itemsize: int) -> int:
    """State of one sequence: conv_width - 1 inputs in its dtype, and h in at least float32."""
    past = max(config.conv_width - 1, 0)
    return config.d_rnn * max(4, itemsize) + past * config.d_rnn * itemsize


def mixing_flops(config: ModelConfig, num_keys: float) -> float:
    """FLOPs a token beyond its linear layers: convolution, block-diagonal gates, recurrence."""
    R, gate = config.d_rnn, GATES[config.gate]
    num_gates = gate.has_recurrence_gate + gate.has_input_gate
    products = num_gates * 2 * R * config.d_gate // config.num_gate_blocks
    return 2 * config.conv_width * R + products + recurrence_flops(config) * R


def recurrence_flops(config: ModelConfig) -> int:
    """FLOPs a channel: h = alpha h + beta (i x) is 4 of them, and beta^2 = 1 - alpha^2 is 2 more
    (the paper counts these 6, appendix D)."""
    gate = GATES[config.gate]
    update = 4 if gate.is_complex else 2  # alpha h of a pair: four products and two sums
    if gate.has_time_step:
        normalization = 1 + 2 * gate.has_a_param  # gru's beta is its gate; (1 - alpha) / A
    else:
        # |alpha|^2 of a pair is one for two channels
        normalization = (2 if gate.is_complex else 3) * config.normalize_input
    return update + gate.has_input_gate + normalization


def forward(
    config: ModelConfig, params: Params, x_BTD: np.ndarray, position_BT: np.ndarray
) -> tuple[np.ndarray, Any]:
    """The equations in NumPy: y [B, T, D], and what backward needs."""
    before_BTR = linear(within(params, "linear_y"), x_BTD)
    x_BTR = linear(within(params, "linear_x"), x_BTD)
    conv_BTR = x_BTR
    if config.conv_width:
        conv_BTR = reference.causal_conv(*_taps(params), x_BTR, position_BT)
    h0_BR = np.zeros_like(conv_BTR[:, 0])
    h_BTR, _ = gates.rg_lru(config, within(params, "rg_lru"), conv_BTR, position_BT, h0_BR)
    y_BTD = linear(within(params, "linear_out"), gelu(before_BTR) * h_BTR)
    return y_BTD, (x_BTD, position_BT, before_BTR, x_BTR, conv_BTR, h_BTR)


def backward(
    config: ModelConfig, params: Params, saved: Any, dy_BTD: np.ndarray
) -> tuple[np.ndarray, Params]:
    """(dx, gradients by name)."""
    x_BTD, position_BT, before_BTR, x_BTR, conv_BTR, h_BTR = saved
    gate_BTR, grads = gelu(before_BTR), {}
    dout, dproduct_BTR = linear_grad(within(params, "linear_out"), gate_BTR * h_BTR, dy_BTD)
    zeros_BR = np.zeros_like(conv_BTR[:, 0])  # h0, and the gradient of the last state
    dunit, dinput_BTR, _ = gates.rg_lru_grad(
        config,
        within(params, "rg_lru"),
        conv_BTR,
        position_BT,
        zeros_BR,
        dproduct_BTR * gate_BTR,
        zeros_BR,
    )
    if config.conv_width:
        conv = (*_taps(params), x_BTR, position_BT)
        dweight_WR, dbias_R, dinput_BTR = reference.causal_conv_grad(*conv, dinput_BTR)
        grads["conv_1d.weight"] = dweight_WR
        grads |= {} if dbias_R is None else {"conv_1d.bias": dbias_R}
    dbefore_BTR = gelu_grad(before_BTR, dproduct_BTR * h_BTR)
    dlinear_y, dx_y_BTD = linear_grad(within(params, "linear_y"), x_BTD, dbefore_BTR)
    dlinear_x, dx_x_BTD = linear_grad(within(params, "linear_x"), x_BTD, dinput_BTR)
    grads |= under(linear_y=dlinear_y, linear_x=dlinear_x, rg_lru=dunit, linear_out=dout)
    return dx_y_BTD + dx_x_BTD, grads


def _taps(params: Params) -> tuple[np.ndarray, np.ndarray | None]:
    return params["conv_1d.weight"], params.get("conv_1d.bias")


def activations(params: Params, saved: Any) -> Params:
    """What forward computed on its way, by the name of the layer that gives it."""
    _, _, before_BTR, x_BTR, conv_BTR, h_BTR = saved
    found = {"linear_y": before_BTR, "linear_x": x_BTR}
    if "conv_1d.weight" in params:
        found["conv_1d"] = conv_BTR
    for name in ("rg_lru.a_gate", "rg_lru.input_gate"):
        if gate := within(params, name):
            found[name] = reference.block_diagonal(gate, conv_BTR)
    return found | {"rg_lru": h_BTR, "linear_out.input": gelu(before_BTR) * h_BTR}
