"""The gates of the recurrent mixer, element by element: composed, and for the fused kernels.

Twin: implementations/jax_backend/kernels/gate.py.  Truth: implementations/gates.py.
Source: arXiv:2402.19427 section 2.4, appendices A and B; the clipped gradient: arXiv:2404.07839 and
its code.

All are h_t = a h_{t-1} + beta i x, with log a = rate * decay. GATE, a gate's name, is a switch of
the fused kernels when they are compiled: what a gate lacks is not loaded, computed or stored. The
complex one is two real channels to them, k and k + R / 2, with the gates of k: what turns a state
by theta r is undone before them, and done after them (see turned).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from implementations.config import GATES, Gate

MAX_SQRT_GRADIENT = 1000.0

LOG2_E = tl.constexpr(1.4426950408889634)
MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


# Composed.


def decay_of(a_param_R: Tensor | None, gate: Gate, exponent: float) -> Tensor | None:
    """log a where the rate is 1; None where that is -1 (gru)."""
    if a_param_R is None:
        return None
    return -(1.0 if gate.has_time_step else exponent) * softplus(a_param_R)


def coefficients(
    a_gate_BTR: Tensor | None,
    input_gate_BTR: Tensor | None,
    decay_R: Tensor | None,
    position_BT: Tensor,
    gate: Gate,
    normalize_input: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """(a, beta i) of every step, in dtype; None stands for 1. The gates hold their biases. At a
    document's start a is 0 and beta 1, which is what log a = -inf makes of most gates."""
    is_start_BT1 = (position_BT == 0)[:, :, None]
    if a_gate_BTR is None:
        log_a_BTR = decay_R.expand(*position_BT.shape, -1)
    elif gate.has_time_step:
        rate_BTR = softplus(a_gate_BTR.to(dtype))
        log_a_BTR = -rate_BTR if decay_R is None else rate_BTR * decay_R
    else:
        log_a_BTR = torch.sigmoid(a_gate_BTR.to(dtype)) * decay_R
    log_a_BTR = log_a_BTR.masked_fill(is_start_BT1, float("-inf"))
    scale_BTR = None
    if gate.has_time_step:
        scale_BTR = -torch.expm1(log_a_BTR)  # 1 - a, no cancellation
        if decay_R is not None:
            scale_BTR = torch.where(is_start_BT1, 1.0, scale_BTR / -decay_R)
    elif normalize_input:
        scale_BTR = bounded_sqrt(-torch.expm1(2 * log_a_BTR))
    if input_gate_BTR is not None:
        i_BTR = torch.sigmoid(input_gate_BTR.to(dtype))
        scale_BTR = i_BTR if scale_BTR is None else scale_BTR * i_BTR
    return torch.exp(log_a_BTR), scale_BTR


def phases(a_gate_BTR: Tensor, a_bias_R: Tensor | None, theta_R: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angle by which each state is turned since the first step: the sum of
    theta r. It is summed in float64, as it grows with time and its differences count."""
    a_gate_BTR = a_gate_BTR.to(theta_R.dtype)
    if a_bias_R is not None:
        a_gate_BTR = a_gate_BTR + a_bias_R
    step_BTR = theta_R * torch.sigmoid(a_gate_BTR)
    phase_BTR = torch.cumsum(step_BTR, 1, dtype=torch.float64).remainder(2 * torch.pi)
    phase_BTR = phase_BTR.to(theta_R.dtype)
    return phase_BTR.cos(), phase_BTR.sin()


def turned(x_BTR: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Channels k and k + R / 2, as a complex one, times cos + j sin. With the phase p_t, which is
    the sum of what turns h, g_t = e^(-j p_t) h_t is a recurrence of real coefficients: it has
    g_t = a g_{t-1} + e^(-j p_t) x_t where h_t = a e^(j (p_t - p_{t-1})) h_{t-1} + x_t."""
    first_BTR, second_BTR = x_BTR.to(cos_BTR.dtype).chunk(2, -1)
    return torch.cat(
        [
            first_BTR * cos_BTR - second_BTR * sin_BTR,
            second_BTR * cos_BTR + first_BTR * sin_BTR,
        ],
        -1,
    )


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40.0)  # beyond 20, its own, float64 still sees a difference


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


# Within kernels. All is float32.


@triton.constexpr_function
def has_time_step(gate: str) -> bool:
    return GATES[gate].has_time_step


@triton.constexpr_function
def has_recurrence_gate(gate: str) -> bool:
    return GATES[gate].has_recurrence_gate


@triton.constexpr_function
def has_input_gate(gate: str) -> bool:
    return GATES[gate].has_input_gate


@triton.constexpr_function
def has_a_param(gate: str) -> bool:
    return GATES[gate].has_a_param


@triton.constexpr_function
def is_complex(gate: str) -> bool:
    return GATES[gate].is_complex


@triton.jit
def gates_of(channel, R, GATE: tl.constexpr):
    """How many channels have gates of their own, and whose gates a channel has."""
    num, own = R, channel
    if is_complex(GATE):
        num = R // 2
        own = channel % num
    return num, own


@triton.jit
def load(ptr, at, mask):
    """In float32; 0 where there is no such array."""
    value = 0.0
    if ptr is not None:
        value = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_decay(ptr, at, mask):
    """log a where the rate is 1; -1 where there is no such array, and beyond the channels."""
    value = -1.0
    if ptr is not None:
        value = tl.load(ptr + at, mask=mask, other=-1.0)
    return value


@triton.jit
def store(ptr, at, value, mask):
    """Where there is such an array."""
    if ptr is not None:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def step(
    x, a_gate, input_gate, a_bias, input_bias, decay, keep, jump,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """(a, inflow) of h_t = a h_{t-1} + inflow."""
    a, log_a, _ = decayed(a_gate, a_bias, decay, keep, jump, GATE)
    scale, _ = _scale(a, log_a, decay, keep, GATE, NORMALIZE)
    return a, scale * _gated(x, input_gate, input_bias, GATE)


@triton.jit
def step_grad(
    g, h, x, input_gate, input_bias, decay, a, log_a, rate, keep,
    MAX_SQRT_GRADIENT: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """What g, the gradient of h_t, and the state h before it make of x, both gates and decay; of
    what a gate lacks, 0."""
    scale, inverse = _scale(a, log_a, decay, keep, GATE, NORMALIZE)
    inflow = _gated(x, input_gate, input_bias, GATE)
    dlog_a, ddecay = g * a * h, 0.0
    if has_time_step(GATE):  # scale = (1 - a) / -decay
        dlog_a += g * a * inflow * (1 / decay)
    elif NORMALIZE:
        # the slope of sqrt(u), 1 / (2 sqrt(u)), is held at its maximum; u = 1 - a^2
        slope = tl.minimum(inverse, 2 * MAX_SQRT_GRADIENT)
        dlog_a = g * a * (h - a * slope * inflow)
    if has_a_param(GATE):
        ddecay = dlog_a * keep * rate
        if has_time_step(GATE):
            ddecay -= g * inflow * scale * keep * (1 / decay)
    da_gate, dinput_gate, dx = 0.0, 0.0, g * scale
    if has_time_step(GATE):  # the slope of softplus, a sigmoid, from its value
        da_gate = dlog_a * decay * keep * _one_minus(tl.exp2(rate * MINUS_LOG2_E), -rate)
    elif has_recurrence_gate(GATE):
        da_gate = dlog_a * decay * keep * rate * (1 - rate)
    if has_input_gate(GATE):
        i = sigmoid_of(input_gate, input_bias)
        dinput_gate = dx * x * i * (1 - i)
        dx *= i
    return dx, da_gate, dinput_gate, ddecay


@triton.jit
def decayed(a_gate, a_bias, decay, keep, jump, GATE: tl.constexpr):
    """(a, log a, rate)."""
    rate = 1.0
    if has_time_step(GATE):
        rate = softplus_of(a_gate + a_bias)
    elif has_recurrence_gate(GATE):
        rate = sigmoid_of(a_gate, a_bias)
    log_a = rate * (decay * keep) + jump
    return tl.exp2(log_a * LOG2_E), log_a, rate


@triton.jit
def keep_and_jump(position, is_there):
    """log a = keep * (rate decay) + jump: at a document start a is 0, beyond the end it is 1."""
    is_start = position == 0
    keep = tl.where(is_start | (is_there == 0), 0.0, 1.0)
    return keep, tl.where(is_start, -1000.0, 0.0)


@triton.jit
def _scale(a, log_a, decay, keep, GATE: tl.constexpr, NORMALIZE: tl.constexpr):
    """beta, and what its gradient needs beside it: 1 / beta where it is sqrt(1 - a^2)."""
    scale, inverse = 1.0, 1.0
    if has_time_step(GATE):
        scale = _one_minus(a, log_a)
        if has_a_param(GATE):
            scale *= tl.where(keep > 0, -1 / decay, 1.0)
    elif NORMALIZE:
        rest = _one_minus(a, log_a)
        square = rest * (2 - rest)  # 1 - a^2 = (1 - a) (1 + a)
        inverse = tl.rsqrt(tl.maximum(square, 1e-30))
        scale = square * inverse
    return scale, inverse


@triton.jit
def _one_minus(a, log_a):
    """1 - a, from its series where a is near 1 and the difference would cancel (error below
    6e-8)."""
    series = 1 / 24 + log_a * (1 / 120 + log_a * (1 / 720))
    series = 1 + log_a * (1 / 2 + log_a * (1 / 6 + log_a * series))
    return tl.where(log_a > -0.25, -log_a * series, 1 - a)


@triton.jit
def _gated(x, input_gate, input_bias, GATE: tl.constexpr):
    return sigmoid_of(input_gate, input_bias) * x if has_input_gate(GATE) else x


@triton.jit
def sigmoid_of(gate, bias):
    """1 / (1 + exp(-gate - bias)): the reciprocal as the square of a reciprocal root, which is one
    instruction where a division is six."""
    root = tl.rsqrt(1 + tl.exp2(gate * MINUS_LOG2_E + bias * MINUS_LOG2_E))
    return root * root


@triton.jit
def softplus_of(x):
    """log(1 + exp(x)) to the last digits, where exp(x) is small too: log(1 + u) = 2 artanh(s)."""
    u = tl.exp(-tl.abs(x))
    s = u / (2 + u)
    square = s * s
    series = 1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * series))
    return tl.maximum(x, 0.0) + 2 * s * series
