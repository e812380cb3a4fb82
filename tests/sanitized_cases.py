"""Every Triton op once, forward and backward, under the sanitizer and on poisoned memory: odd
sizes, so that each block has lanes past an end, several documents, and several programs."""

import torch
from interpreted import poisoned
from sanitizer import sanitize
from torch import Tensor

from implementations.torch_backend.kernels.attention import attention
from implementations.torch_backend.kernels.attention_step import attention_step
from implementations.torch_backend.kernels.causal_conv import causal_conv
from implementations.torch_backend.kernels.cross_entropy import cross_entropy, mean_cross_entropy
from implementations.torch_backend.kernels.gated_gelu import gated_gelu
from implementations.torch_backend.kernels.linear_scan import linear_scan
from implementations.torch_backend.kernels.rg_lru import rg_lru
from implementations.torch_backend.kernels.rg_lru_step import rg_lru_step
from implementations.torch_backend.kernels.rms_norm import add_rms_norm, rms_norm
from implementations.torch_backend.kernels.rope import rope

B, T, D, R, N, H, V, WIDTH = 2, 37, 70, 70, 4, 16, 300, 4
LONG = 600  # three chunks of the split scans


class Inputs:
    """Random leaves, kept to look at their gradients."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.leaves = dtype, []
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator).to(dtype or self.dtype)
        self.leaves.append(x.requires_grad_())
        return x

    def wide(self, *shape: int) -> Tensor:
        return self(*shape, dtype=torch.float32)


def positions(length: int = T) -> Tensor:
    """Documents of 11 tokens."""
    return (torch.arange(length) % 11).expand(B, length).contiguous()


def targets() -> Tensor:
    return torch.arange(B * T).reshape(B, T) % (V + 1) - 1  # the first one is IGNORED


def scan(x: Inputs, variant: str, length: int):
    a_BTR = torch.sigmoid(x(B, length, R))
    return linear_scan(a_BTR, x(B, length, R), x.wide(B, R), variant)


def gated_scan(x: Inputs, variant: str, length: int):
    gates = (x(B, length, R), x(B, length, R), x.wide(R), x.wide(R))
    inputs = (x(B, length, R), *gates, x.wide(R))
    return rg_lru(*inputs, positions(length), x.wide(B, R), variant)


def attend(x: Inputs) -> Tensor:
    last_BT, reach_BT = torch.arange(T).expand(B, T), positions().clamp(max=7)
    return attention(x(B, T, N, H), x(B, T, 1, H), x(B, T, 1, H), last_BT, reach_BT, "triton")


def decode(x: Inputs) -> Tensor:
    """A step in a full ring of 19 slots; in place, so without gradients."""
    with torch.no_grad():
        step = (x(B, N, H), x(B, 1, H), x(B, 1, H), torch.full((B,), 25))
        slots = (x(B, 19, 1, H).detach(), x(B, 19, 1, H).detach())
        return attention_step(*step, *slots, H, 10000.0)


def decode_recurrence(x: Inputs) -> Tensor:
    """A step of 3 gate blocks in place, so without gradients."""
    with torch.no_grad():
        state = (x(B, WIDTH - 1, 69).detach(), x.wide(B, 69).detach())
        weights = (x.wide(WIDTH, 69), x.wide(69), x(3, 23, 23), x(3, 23, 23))
        biases = (x.wide(69), x.wide(69), x.wide(69))
        return rg_lru_step(x(B, 69), x(B, 69), *weights, *biases, torch.full((B,), 5), *state)


OPS = {
    "linear_scan": lambda x: scan(x, "triton", T),
    "linear_scan_split": lambda x: scan(x, "triton_split", LONG),
    "rg_lru": lambda x: gated_scan(x, "triton", T),
    "rg_lru_split": lambda x: gated_scan(x, "triton_split", LONG),
    "rms_norm": lambda x: rms_norm(x(B, T, D), x.wide(D), 1e-6, "triton"),
    "add_rms_norm": lambda x: add_rms_norm(x(B, T, D), x(B, T, D), x.wide(D), 1e-6, "triton"),
    "gated_gelu": lambda x: gated_gelu(x(B, T, D), x(B, T, D), "triton"),
    "causal_conv": lambda x: causal_conv(
        x(B, T, R), x.wide(WIDTH, R), x.wide(R), positions(), x(B, WIDTH - 1, R), "triton"
    ),
    "cross_entropy": lambda x: cross_entropy(x(B, T, V), targets(), "triton"),
    "mean_cross_entropy": lambda x: mean_cross_entropy(
        x(B, T, D), x.wide(V, D), targets(), 30.0, "triton"
    ),
    "rope": lambda x: rope(x(B, T, N, H), positions(), H // 2, 10000.0, "triton"),
    "attention": attend,
    "attention_step": decode,
    "rg_lru_step": decode_recurrence,
}


def sanitized_case(op: str, dtype: str) -> tuple[int, list[str], list[str]]:
    """Launches, the sanitizer's problems, and which results or gradients are not finite."""
    inputs = Inputs(getattr(torch, dtype))
    with sanitize() as report, poisoned():
        outputs = OPS[op](inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = []
        if any(output.requires_grad for output in outputs):
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            grads = [leaf.grad for leaf in inputs.leaves]
    found = {f"output {n}": x for n, x in enumerate(outputs)}
    found |= {f"gradient {n}": x for n, x in enumerate(grads)}
    bad = [name for name, x in found.items() if x is None or not x.isfinite().all()]
    return report.num_launches, report.problems, bad
