"""The layers that every mixer and model is made of, as modules; weights map in to out: x @ weight.

Twin: implementations/jax_backend/layers.py.  Truth: implementations/reference.py.
A weight is cast to the dtype of its input where it is used, so that training keeps float32 ones.
`variant` is that of kernels.layers: which code computes the layers that are no matrix product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from implementations.config import ModelConfig
from implementations.torch_backend.kernels import cross_entropy
from implementations.torch_backend.kernels.causal_conv import causal_conv
from implementations.torch_backend.kernels.gated_gelu import gated_gelu
from implementations.torch_backend.kernels.rms_norm import add_rms_norm, rms_norm

# MKL computes a product with so few rows (decoding) on one thread; its transpose it shares.
# Measured on 2 cores, 4 x 256 by 256 x 768: 82 and 34 us.
MAX_FEW_ROWS = 8


class Linear(nn.Module):
    """x @ weight + bias. The weight [in, out] lies in memory as F.linear wants it: out by in."""

    def __init__(self, d_in: int, d_out: int, has_bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in).t())
        self.bias = nn.Parameter(torch.empty(d_out)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = cast(self.weight, x), cast(self.bias, x)
        num_rows = x.numel() // x.shape[-1]
        if x.is_cpu and 1 < num_rows <= MAX_FEW_ROWS:
            columns = weight.t() @ x.reshape(num_rows, -1).t()
            y = columns.t().contiguous() if bias is None else columns.t() + bias
            return y.contiguous().view(*x.shape[:-1], -1)
        return F.linear(x, weight.t(), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + scale), in float32 (float64 in float64)."""

    def __init__(self, d_model: int, eps: float, variant: str = "plain"):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(d_model))
        self.eps, self.variant = eps, variant

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, self.eps, self.variant)


class AddRMSNorm(RMSNorm):
    """The norm of x + branch, and that sum: the norm first, as it is what the layer gives."""

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        x, normed = add_rms_norm(x, branch, self.scale, self.eps, self.variant)
        return normed, x


class CausalConv(nn.Module):
    """One filter of W taps per channel; weight[W - 1] meets the current input.

    Inputs from before the document count as 0.
    """

    def __init__(self, conv_width: int, d_rnn: int, has_bias: bool, variant: str = "plain"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(conv_width, d_rnn))
        self.bias = nn.Parameter(torch.empty(d_rnn)) if has_bias else None
        self.variant = variant

    def forward(
        self, x_BTR: Tensor, position_BT: Tensor, conv_BWR: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """conv_BWR: the W - 1 inputs before x, None for zeros; returned anew, after x."""
        return causal_conv(x_BTR, self.weight, self.bias, position_BT, conv_BWR, self.variant)


class BlockDiagonal(nn.Module):
    """A linear layer in G blocks: each block of the input makes one block of the output.

    Calling it gives the products alone: the RG-LRU adds the bias where it reads them.
    """

    def __init__(self, num_blocks: int, d_in: int, d_out: int, has_bias: bool):
        super().__init__()
        shape = (num_blocks, d_in // num_blocks, d_out // num_blocks)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(d_out)) if has_bias else None

    def forward(self, x_BTR: Tensor) -> Tensor:
        G, d_in, _ = self.weight.shape
        x_GMI = x_BTR.reshape(-1, G, d_in).transpose(0, 1)
        out_GMJ = torch.bmm(x_GMI, cast(self.weight, x_BTR))
        return out_GMJ.transpose(0, 1).reshape(*x_BTR.shape[:-1], -1)

    def add_bias(self, product_BTR: Tensor) -> Tensor:
        return product_BTR if self.bias is None else product_BTR + cast(self.bias, product_BTR)


class MLP(nn.Module):
    """linear_down(gelu(linear_gate(x)) * linear_up(x))."""

    def __init__(self, config: ModelConfig, variant: str = "plain"):
        super().__init__()
        self.linear_gate = Linear(config.d_model, config.d_mlp, config.biases)
        self.linear_up = Linear(config.d_model, config.d_mlp, config.biases)
        self.linear_down = Linear(config.d_mlp, config.d_model, config.biases)
        self.variant = variant

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.linear_gate(x_BTD), self.linear_up(x_BTD)
        return self.linear_down(gated_gelu(gate_BTF, up_BTF, self.variant))


class Embedding(nn.Module):
    """One row per token, in and out."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def embed(self, tokens_BT: Tensor, dtype: torch.dtype, *, is_scaled: bool) -> Tensor:
        x_BTD = F.embedding(tokens_BT, self.weight).to(dtype)
        return x_BTD * x_BTD.new_full((), x_BTD.shape[-1] ** 0.5) if is_scaled else x_BTD

    def unembed(self, x_BTD: Tensor, soft_cap: float | None) -> Tensor:
        """Logits, float32 (float64 in float64); a soft cap c makes them c tanh(logits / c)."""
        return cross_entropy.unembed(x_BTD, self.weight, soft_cap)


def cast(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """The weight in the dtype of x."""
    return weight if weight is None or weight.dtype == x.dtype else weight.to(x.dtype)


def exact(x: Tensor) -> Tensor:
    """x in float32, or in float64 when it is."""
    return x.float() if x.dtype == torch.bfloat16 else x
