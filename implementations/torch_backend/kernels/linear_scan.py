"""Linear recurrence h_t = a_t * h_{t-1} + x_t over time, by name of variant.

Twin: implementations/jax_backend/kernels/linear_scan.py.  Truth: implementations/reference.py.
The state is float32 (float64 in float64), and every variant has gradients for a, x and h0, from
every state and from the last one.
"""

import torch
from torch import Tensor

from implementations.engine import Unsupported


def linear_scan(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """Returns every state, in x's dtype, and the last state, in h0's."""
    if a_BTR.shape != x_BTR.shape or h0_BR.shape != x_BTR[:, 0].shape:
        raise ValueError(
            "linear_scan needs a and x of one shape [B, T, R] and h0 of shape [B, R]; "
            f"got a {tuple(a_BTR.shape)}, x {tuple(x_BTR.shape)}, h0 {tuple(h0_BR.shape)}."
        )
    if h0_BR.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the recurrent state h0 must be float32 or float64, got {h0_BR.dtype}.")
    dtype = x_BTR.dtype
    a_BTR, x_BTR = a_BTR.to(h0_BR.dtype), x_BTR.to(h0_BR.dtype)
    if x_BTR.shape[1] == 1:
        h_BR = torch.addcmul(x_BTR[:, 0], a_BTR[:, 0], h0_BR)
        return h_BR[:, None].to(dtype), h_BR
    h_BTR, h_BR = VARIANTS[check(variant)](a_BTR, x_BTR, h0_BR)
    return h_BTR.to(dtype), h_BR


def check(variant: str) -> str:
    """The variant, when this backend has it; else Unsupported."""
    if variant not in VARIANTS:
        raise Unsupported(
            f"kernels.linear_scan={variant} is not offered by the torch backend; "
            f"offered: {', '.join(VARIANTS)}."
        )
    return variant


def _sequential(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over time, differentiated by autograd."""
    h_BR, states = h0_BR, []
    for a_BR, x_BR in zip(a_BTR.unbind(1), x_BTR.unbind(1), strict=True):
        h_BR = torch.addcmul(x_BR, a_BR, h_BR)
        states.append(h_BR)
    return torch.stack(states, 1), h_BR


def _associative(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Doubling: after step k, x_t holds the last 2^k terms; log2(T) passes over the data."""
    first_BR = torch.addcmul(x_BTR[:, 0], a_BTR[:, 0], h0_BR)
    x_BTR = torch.cat([first_BR[:, None], x_BTR[:, 1:]], 1)
    span = 1
    while span < x_BTR.shape[1]:
        tail_BTR = torch.addcmul(x_BTR[:, span:], a_BTR[:, span:], x_BTR[:, :-span])
        x_BTR = torch.cat([x_BTR[:, :span], tail_BTR], 1)
        a_BTR = torch.cat([a_BTR[:, :span], a_BTR[:, span:] * a_BTR[:, :-span]], 1)
        span *= 2
    return x_BTR, x_BTR[:, -1].clone()


def _analytic(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over contiguous rows, in place, and one reverse loop for the gradient: two custom
    ops, of which torch.compile sees the shapes and not the thousands of steps."""
    h_BTR = _analytic_forward(a_BTR, x_BTR, h0_BR)
    return h_BTR, h_BTR[:, -1].clone()  # a view would keep every state alive


@torch.library.custom_op("aerie::linear_scan", mutates_args=())
def _analytic_forward(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> Tensor:
    a_TBR = a_BTR.transpose(0, 1).contiguous()
    h_TBR = x_BTR.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    h_BR = h0_BR
    for a_BR, x_BR in zip(a_TBR.unbind(0), h_TBR.unbind(0), strict=True):
        h_BR = x_BR.addcmul_(a_BR, h_BR)
    return h_TBR.transpose(0, 1)


@_analytic_forward.register_fake
def _(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> Tensor:
    return _time_first(x_BTR)


@torch.library.custom_op("aerie::linear_scan_backward", mutates_args=())
def _analytic_backward(
    a_BTR: Tensor, h_BTR: Tensor, h0_BR: Tensor, dh_BTR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx_t = dh_t + a_{t+1} dx_{t+1};  da_t = dx_t h_{t-1};  dh0 = a_0 dx_0."""
    a_TBR, h_TBR = (x.transpose(0, 1).contiguous() for x in (a_BTR, h_BTR))
    dx_TBR = dh_BTR.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    a_rows, dx_rows = a_TBR.unbind(0), dx_TBR.unbind(0)
    dx_BR = dx_rows[-1]
    for t in range(len(dx_rows) - 2, -1, -1):
        dx_BR = dx_rows[t].addcmul_(a_rows[t + 1], dx_BR)
    da_TBR = torch.empty_like(a_TBR)
    torch.mul(dx_TBR[0], h0_BR, out=da_TBR[0])
    torch.mul(dx_TBR[1:], h_TBR[:-1], out=da_TBR[1:])
    return da_TBR.transpose(0, 1), dx_TBR.transpose(0, 1), a_rows[0] * dx_BR


@_analytic_backward.register_fake
def _(a_BTR: Tensor, h_BTR: Tensor, h0_BR: Tensor, dh_BTR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _time_first(a_BTR), _time_first(dh_BTR), torch.empty_like(h0_BR)


def _time_first(x_BTR: Tensor) -> Tensor:
    """An empty tensor of this shape that lies in memory as [T, B, R]."""
    B, T, R = x_BTR.shape
    return x_BTR.new_empty(T, B, R).transpose(0, 1)


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    a_BTR, _, h0_BR = inputs
    ctx.save_for_backward(a_BTR, output, h0_BR)


_analytic_forward.register_autograd(
    lambda ctx, dh_BTR: _analytic_backward(*ctx.saved_tensors, dh_BTR), setup_context=_save
)


VARIANTS = {"sequential": _sequential, "associative": _associative, "analytic": _analytic}
