"""The recurrent block: two branches, a causal convolution, the RG-LRU, and their product.

Source: arXiv:2402.19427 section 2.4, equations 1 to 4 and 6.
"""

import math
from typing import Any

import numpy as np

from implementations import reference
from implementations.config import ModelConfig
from implementations.parameters import ParamSpec, linear_specs
from implementations.reference import Params, gelu, gelu_grad, linear, linear_grad, under, within

# h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t): the paper counts 6 FLOPs an element (appendix D).
RECURRENCE_FLOPS = 6
DECAY = 8.0  # the paper's c: a_t = a^(c r_t)


def param_specs(config: ModelConfig) -> list[ParamSpec]:
    D, R, G, W = config.d_model, config.d_rnn, config.num_gate_blocks, config.conv_width
    block = R // G
    specs = [
        *linear_specs(config, "linear_y", (D, R), ("model", "rnn")),
        *linear_specs(config, "linear_x", (D, R), ("model", "rnn")),
        # recurrentgemma: variance 0.01 / width
        ParamSpec("conv_1d.weight", (W, R), ("taps", "rnn"), "normal", math.sqrt(0.01 / W)),
    ]
    if config.biases:
        specs.append(ParamSpec("conv_1d.bias", (R,), ("rnn",), "zeros"))
    for gate in ("a_gate", "input_gate"):
        weight = (G, block, block)
        axes = ("gate_blocks", "gate_in", "gate_out")
        specs.append(ParamSpec(f"rg_lru.{gate}.weight", weight, axes, "normal", block**-0.5))
        if config.biases:
            specs.append(ParamSpec(f"rg_lru.{gate}.bias", (R,), ("rnn",), "zeros"))
    specs.append(ParamSpec("rg_lru.a_param", (R,), ("rnn",), f"a_param_{config.lambda_init}"))
    specs += linear_specs(config, "linear_out", (R, D), ("rnn", "model"), is_output=True)
    return specs


def state_bytes(config: ModelConfig, capacity: int, itemsize: int) -> int:
    """State of one sequence: conv_width - 1 inputs in its dtype, and h in at least float32."""
    return config.d_rnn * max(4, itemsize) + (config.conv_width - 1) * config.d_rnn * itemsize


def mixing_flops(config: ModelConfig, num_keys: float) -> float:
    """FLOPs a token beyond its linear layers: convolution, block-diagonal gates, recurrence."""
    R = config.d_rnn
    gates = 2 * 2 * R * R // config.num_gate_blocks
    return 2 * config.conv_width * R + gates + RECURRENCE_FLOPS * R


def forward(
    config: ModelConfig, params: Params, x_BTD: np.ndarray, position_BT: np.ndarray
) -> tuple[np.ndarray, Any]:
    """The equations in NumPy: y [B, T, D], and what backward needs."""
    before_BTR = linear(within(params, "linear_y"), x_BTD)
    x_BTR = linear(within(params, "linear_x"), x_BTD)
    conv = (params["conv_1d.weight"], params.get("conv_1d.bias"), x_BTR, position_BT)
    conv_BTR = reference.causal_conv(*conv)
    h0_BR = np.zeros_like(conv_BTR[:, 0])
    h_BTR, _ = rg_lru(within(params, "rg_lru"), conv_BTR, position_BT, h0_BR)
    y_BTD = linear(within(params, "linear_out"), gelu(before_BTR) * h_BTR)
    return y_BTD, (x_BTD, before_BTR, conv, conv_BTR, h_BTR)


def backward(
    config: ModelConfig, params: Params, saved: Any, dy_BTD: np.ndarray
) -> tuple[np.ndarray, Params]:
    """(dx, gradients by name)."""
    x_BTD, before_BTR, conv, conv_BTR, h_BTR = saved
    position_BT = conv[-1]
    gate_BTR = gelu(before_BTR)
    dout, dproduct_BTR = linear_grad(within(params, "linear_out"), gate_BTR * h_BTR, dy_BTD)
    zeros_BR = np.zeros_like(conv_BTR[:, 0])  # h0, and the gradient of the last state
    dunit, dconv_BTR, _ = rg_lru_grad(
        within(params, "rg_lru"),
        conv_BTR,
        position_BT,
        zeros_BR,
        dproduct_BTR * gate_BTR,
        zeros_BR,
    )
    dweight_WR, dbias_R, dinput_BTR = reference.causal_conv_grad(*conv, dconv_BTR)
    dconv = {"weight": dweight_WR} if dbias_R is None else {"weight": dweight_WR, "bias": dbias_R}
    dbefore_BTR = gelu_grad(before_BTR, dproduct_BTR * h_BTR)
    dlinear_y, dx_y_BTD = linear_grad(within(params, "linear_y"), x_BTD, dbefore_BTR)
    dlinear_x, dx_x_BTD = linear_grad(within(params, "linear_x"), x_BTD, dinput_BTR)
    grads = under(
        linear_y=dlinear_y, linear_x=dlinear_x, conv_1d=dconv, rg_lru=dunit, linear_out=dout
    )
    return dx_y_BTD + dx_x_BTD, grads


def activations(params: Params, saved: Any) -> Params:
    """What forward computed on its way, by the name of the layer that gives it."""
    _, before_BTR, conv, conv_BTR, h_BTR = saved
    return {
        "linear_y": before_BTR,
        "linear_x": conv[2],
        "conv_1d": conv_BTR,
        "rg_lru.a_gate": reference.block_diagonal(within(params, "rg_lru.a_gate"), conv_BTR),
        "rg_lru.input_gate": reference.block_diagonal(
            within(params, "rg_lru.input_gate"), conv_BTR
        ),
        "rg_lru": h_BTR,
        "linear_out.input": gelu(before_BTR) * h_BTR,
    }


def rg_lru(
    params: Params, x_BTR: np.ndarray, position_BT: np.ndarray, h0_BR: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Every state h_t, and the last one; at a document's start h_t = i_t x_t."""
    a_BTR, input_BTR, _ = _recurrence(params, x_BTR, position_BT)
    return reference.linear_scan(a_BTR, input_BTR, h0_BR)


def rg_lru_grad(
    params: Params,
    x_BTR: np.ndarray,
    position_BT: np.ndarray,
    h0_BR: np.ndarray,
    dh_BTR: np.ndarray,
    dh_last_BR: np.ndarray,
) -> tuple[Params, np.ndarray, np.ndarray]:
    """(gradients by name, dx, dh0)."""
    a_BTR, input_BTR, (r_BTR, i_BTR, log_a_BTR, scale_BTR) = _recurrence(params, x_BTR, position_BT)
    da_BTR, dinput_BTR, dh0_BR = reference.linear_scan_grad(
        a_BTR, input_BTR, h0_BR, dh_BTR, dh_last_BR
    )
    # d log_a, through a and through scale = sqrt(u), u = 1 - exp(2 log_a); none where a is reset.
    du_BTR = reference.bounded_sqrt_grad(-np.expm1(2 * log_a_BTR), dinput_BTR * i_BTR * x_BTR)
    dlog_a_BTR = np.exp(log_a_BTR) * da_BTR - 2 * np.exp(2 * log_a_BTR) * du_BTR
    dlog_a_BTR = np.where(position_BT[..., None] == 0, 0.0, dlog_a_BTR)

    softplus_R = reference.softplus(params["a_param"])
    slope_R = reference.sigmoid(params["a_param"])
    da_param_R = np.sum(-DECAY * dlog_a_BTR * r_BTR, axis=(0, 1)) * slope_R
    dr_BTR = -DECAY * softplus_R * dlog_a_BTR * r_BTR * (1 - r_BTR)
    di_BTR = dinput_BTR * scale_BTR * x_BTR * i_BTR * (1 - i_BTR)
    da_gate, dx_a = reference.block_diagonal_grad(within(params, "a_gate"), x_BTR, dr_BTR)
    dinput_gate, dx_i = reference.block_diagonal_grad(within(params, "input_gate"), x_BTR, di_BTR)
    grads = under(a_gate=da_gate, input_gate=dinput_gate) | {"a_param": da_param_R}
    return grads, dinput_BTR * scale_BTR * i_BTR + dx_a + dx_i, dh0_BR


def _recurrence(params: Params, x_BTR: np.ndarray, position_BT: np.ndarray) -> tuple:
    """(a, scale * i * x) of the linear recurrence, and the gates behind them."""
    is_start_BT1 = position_BT[..., None] == 0
    r_BTR = reference.sigmoid(reference.block_diagonal(within(params, "a_gate"), x_BTR))
    i_BTR = reference.sigmoid(reference.block_diagonal(within(params, "input_gate"), x_BTR))
    log_a_BTR = -DECAY * reference.softplus(params["a_param"]) * r_BTR
    scale_BTR = reference.bounded_sqrt(-np.expm1(2 * log_a_BTR))  # sqrt(1 - a^2), exact near 1
    scale_BTR = np.where(is_start_BT1, 1.0, scale_BTR)
    a_BTR = np.where(is_start_BT1, 0.0, np.exp(log_a_BTR))
    return a_BTR, scale_BTR * i_BTR * x_BTR, (r_BTR, i_BTR, log_a_BTR, scale_BTR)
