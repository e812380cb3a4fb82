"""The recurrent block: two branches, a causal convolution, the RG-LRU, and their product.

Twin: implementations/jax_backend/mixers/rg_lru.py.  Truth: implementations/reference.py.
Source: arXiv:2402.19427 section 2.4; the clipped gradient: arXiv:2404.07839 and its code.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from implementations.config import GATES, ModelConfig
from implementations.torch_backend.kernels.gated_gelu import gated_gelu
from implementations.torch_backend.kernels.rg_lru import FUSED, rg_lru
from implementations.torch_backend.kernels.rg_lru_step import rg_lru_step
from implementations.torch_backend.layers import BlockDiagonal, CausalConv, Linear, exact


class State(NamedTuple):
    """The last conv_width - 1 inputs of the convolution, and h in float32."""

    conv_BWR: Tensor
    h_BR: Tensor


def empty_state(
    config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> State:
    """capacity does not matter here: the state has one size."""
    shape = (batch_size, max(config.conv_width - 1, 0), config.d_rnn)
    conv_BWR = torch.zeros(shape, dtype=dtype, device=device)
    return State(conv_BWR, exact(conv_BWR.new_zeros(batch_size, config.d_rnn)))


class Mixer(nn.Module):
    def __init__(self, config: ModelConfig, kernels: dict[str, str]):
        super().__init__()
        self.linear_y = Linear(config.d_model, config.d_rnn, config.biases)
        self.linear_x = Linear(config.d_model, config.d_rnn, config.biases)
        self.variant = kernels["layers"]
        conv = (config.conv_width, config.d_rnn, config.biases, self.variant)
        self.conv_1d = CausalConv(*conv) if config.conv_width else None
        self.rg_lru = RGLRU(config, kernels)
        self.linear_out = Linear(config.d_rnn, config.d_model, config.biases)

    def forward(
        self, x_BTD: Tensor, position_BT: Tensor, state: State | None
    ) -> tuple[Tensor, State | None]:
        conv_BWR, h_BR = (None, None) if state is None else state
        gate_BTR = self.linear_y(x_BTD)
        x_BTR = self.linear_x(x_BTD)
        if state is not None and x_BTD.shape[1] == 1 and self.rg_lru.variant in FUSED:
            out_BR = self.step(gate_BTR[:, 0], x_BTR[:, 0], position_BT[:, 0], state)
            return self.linear_out(out_BR)[:, None], state
        if self.conv_1d is not None:
            x_BTR, conv_BWR = self.conv_1d(x_BTR, position_BT, conv_BWR)
        h_BTR, h_BR = self.rg_lru(x_BTR, position_BT, h_BR)
        out_BTD = self.linear_out(gated_gelu(gate_BTR, h_BTR, self.variant))
        return out_BTD, None if state is None else State(conv_BWR, h_BR)

    def step(self, gate_BR: Tensor, x_BR: Tensor, position_B: Tensor, state: State) -> Tensor:
        """gelu(gate) * h of one token; the state is written in place."""
        unit = self.rg_lru
        conv_weight, conv_bias = _arrays(self.conv_1d)
        a_weight, a_bias = _arrays(unit.a_gate)
        input_weight, input_bias = _arrays(unit.input_gate)
        weights = (conv_weight, conv_bias, a_weight, input_weight, a_bias, input_bias, unit.a_param)
        return rg_lru_step(
            gate_BR, x_BR, *weights, position_B, *state, theta_R=unit.theta, **unit.form
        )


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit, or another gate of implementations/gates.py; what a
    gate lacks is None."""

    def __init__(self, config: ModelConfig, kernels: dict[str, str]):
        super().__init__()
        gate, C = GATES[config.gate], config.d_gate
        blocks = (config.num_gate_blocks, config.d_rnn, C, config.biases)
        self.a_gate = BlockDiagonal(*blocks) if gate.has_recurrence_gate else None
        self.input_gate = BlockDiagonal(*blocks) if gate.has_input_gate else None
        self.a_param = nn.Parameter(torch.empty(C)) if gate.has_a_param else None
        self.theta = nn.Parameter(torch.empty(C)) if gate.is_complex else None
        self.variant, self.form = kernels["linear_scan"], form_of(config)

    def forward(
        self, x_BTR: Tensor, position_BT: Tensor, h0_BR: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Every state in x's dtype, and the last one in float32."""
        layers = (self.a_gate, self.input_gate)
        products = (None if layer is None else layer(x_BTR) for layer in layers)
        biases = (None if layer is None else layer.bias for layer in layers)
        inputs = (x_BTR, *products, *biases, self.a_param, position_BT, h0_BR, self.variant)
        return rg_lru(*inputs, theta_R=self.theta, **self.form)


def _arrays(layer: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """Its weight and its bias."""
    return (None, None) if layer is None else (layer.weight, layer.bias)


def form_of(config: ModelConfig) -> dict[str, Any]:
    """What a config says of the equations."""
    names = ("gate", "decay_exponent", "normalize_input")
    return {name: getattr(config, name) for name in names}
