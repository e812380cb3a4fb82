"""The recurrent block: two branches, a causal convolution, the RG-LRU, and their product.

Source: arXiv:2402.19427 section 2.4, equations 1 to 4 and 6.
"""

import math

from implementations.config import ModelConfig
from implementations.parameters import ParamSpec, linear_specs

# h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t): the paper counts 6 FLOPs an element (appendix D).
RECURRENCE_FLOPS = 6


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
    """State of one sequence: conv_width - 1 inputs in the model's dtype, and h in float32."""
    return config.d_rnn * 4 + (config.conv_width - 1) * config.d_rnn * itemsize


def mixing_flops(config: ModelConfig, num_keys: float) -> float:
    """FLOPs a token beyond its linear layers: convolution, block-diagonal gates, recurrence."""
    R = config.d_rnn
    gates = 2 * 2 * R * R // config.num_gate_blocks
    return 2 * config.conv_width * R + gates + RECURRENCE_FLOPS * R
