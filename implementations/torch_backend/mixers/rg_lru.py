"""The recurrent block: two branches, a causal convolution, the RG-LRU, and their product.

Twin: implementations/jax_backend/mixers/rg_lru.py.  Truth: implementations/reference.py.
Source: arXiv:2402.19427 section 2.4; the clipped gradient: arXiv:2404.07839 and its code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from implementations.config import ModelConfig
from implementations.torch_backend.kernels.gated_gelu import gated_gelu
from implementations.torch_backend.kernels.linear_scan import linear_scan
from implementations.torch_backend.layers import BlockDiagonal, CausalConv, Linear, exact

DECAY = 8.0  # c of equation 3
MAX_SQRT_GRADIENT = 1000.0


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
        self.variant = kernels.get("layers", "plain")
        self.conv_1d = CausalConv(config.conv_width, config.d_rnn, config.biases, self.variant)
        self.rg_lru = RGLRU(config, kernels)
        self.linear_out = Linear(config.d_rnn, config.d_model, config.biases)

    def forward(
        self, x_BTD: Tensor, position_BT: Tensor, state: State | None
    ) -> tuple[Tensor, State | None]:
        conv_BWR, h_BR = (None, None) if state is None else state
        gate_BTR = self.linear_y(x_BTD)
        x_BTR = self.linear_x(x_BTD)
        x_BTR, conv_BWR = self.conv_1d(x_BTR, position_BT, conv_BWR)
        h_BTR, h_BR = self.rg_lru(x_BTR, position_BT, h_BR)
        out_BTD = self.linear_out(gated_gelu(gate_BTR, h_BTR, self.variant))
        return out_BTD, None if state is None else State(conv_BWR, h_BR)


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
        r_BTR = torch.sigmoid(exact(self.a_gate(x_BTR)))
        i_BTR = torch.sigmoid(exact(self.input_gate(x_BTR)))
        log_a_BTR = r_BTR * (-DECAY * F.softplus(exact(self.a_param)))
        # At a document start a = 0 and the scale is 1: exactly what log a = -inf gives.
        log_a_BTR = log_a_BTR.masked_fill((position_BT == 0)[:, :, None], float("-inf"))
        a_BTR = torch.exp(log_a_BTR)
        scale_BTR = bounded_sqrt(-torch.expm1(2 * log_a_BTR))  # sqrt(1 - a^2), no cancellation
        if h0_BR is None:
            h0_BR = a_BTR.new_zeros(a_BTR.shape[0], a_BTR.shape[2])
        x = scale_BTR * i_BTR * exact(x_BTR)
        h_BTR, h_BR = linear_scan(a_BTR, x, h0_BR, self.variant)
        return h_BTR.to(x_BTR.dtype), h_BR


def bounded_sqrt(u: Tensor) -> Tensor:
    """sqrt(u), its derivative held to at most MAX_SQRT_GRADIENT."""
    return _BoundedSqrt.apply(u) if u.requires_grad else torch.sqrt(u)


class _BoundedSqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return torch.sqrt(u)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grad * 0.5 * torch.rsqrt(u.clamp(min=1 / (4 * MAX_SQRT_GRADIENT**2)))
