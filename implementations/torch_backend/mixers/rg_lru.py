"""The recurrent block: two branches, a causal convolution, the RG-LRU, and their product.

Twin: implementations/jax_backend/mixers/rg_lru.py.  Truth: implementations/reference.py.
Source: arXiv:2402.19427 section 2.4; the clipped gradient: arXiv:2404.07839 and its code.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from implementations.config import ModelConfig
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
    shape = (batch_size, config.conv_width - 1, config.d_rnn)
    conv_BWR = torch.zeros(shape, dtype=dtype, device=device)
    return State(conv_BWR, exact(conv_BWR.new_zeros(batch_size, config.d_rnn)))


class Mixer(nn.Module):
    def __init__(self, config: ModelConfig, kernels: dict[str, str]):
        super().__init__()
        self.linear_y = Linear(config.d_model, config.d_rnn, config.biases)
        self.linear_x = Linear(config.d_model, config.d_rnn, config.biases)
        self.variant = kernels["layers"]
        self.conv_1d = CausalConv(config.conv_width, config.d_rnn, config.biases, self.variant)
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
        x_BTR, conv_BWR = self.conv_1d(x_BTR, position_BT, conv_BWR)
        h_BTR, h_BR = self.rg_lru(x_BTR, position_BT, h_BR)
        out_BTD = self.linear_out(gated_gelu(gate_BTR, h_BTR, self.variant))
        return out_BTD, None if state is None else State(conv_BWR, h_BR)

    def step(self, gate_BR: Tensor, x_BR: Tensor, position_B: Tensor, state: State) -> Tensor:
        """gelu(gate) * h of one token; the state is written in place."""
        conv, unit = self.conv_1d, self.rg_lru
        weights = (conv.weight, conv.bias, unit.a_gate.weight, unit.input_gate.weight,
                   unit.a_gate.bias, unit.input_gate.bias, unit.a_param)  # fmt: skip
        return rg_lru_step(gate_BR, x_BR, *weights, position_B, *state)


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit: a_t = exp(-8 softplus(a_param) r_t)."""

    def __init__(self, config: ModelConfig, kernels: dict[str, str]):
        super().__init__()
        self.a_gate = BlockDiagonal(config.num_gate_blocks, config.d_rnn, config.biases)
        self.input_gate = BlockDiagonal(config.num_gate_blocks, config.d_rnn, config.biases)
        self.a_param = nn.Parameter(torch.empty(config.d_rnn))
        self.variant = kernels["linear_scan"]

    def forward(
        self, x_BTR: Tensor, position_BT: Tensor, h0_BR: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Every state in x's dtype, and the last one in float32."""
        gates = (self.a_gate(x_BTR), self.input_gate(x_BTR), self.a_gate.bias, self.input_gate.bias)
        return rg_lru(x_BTR, *gates, self.a_param, position_BT, h0_BR, self.variant)
