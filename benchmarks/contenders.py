"""Who computes an op: our kernels and their peers, on the same inputs, and the float64 truth.

A peer is what PyTorch itself offers: the plain layers under torch.compile, the scan of
torch._higher_order_ops, FlexAttention and the backends of scaled_dot_product_attention. Where one
needs another layout than ours (keys repeated over heads), `prepare` makes it, outside the timing.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import BOTH, Case
from implementations.engine import IGNORED
from implementations.torch_backend.kernels import linear_scan as scans
from implementations.torch_backend.kernels.attention import attention, window_attention
from implementations.torch_backend.kernels.causal_conv import causal_conv
from implementations.torch_backend.kernels.cross_entropy import mean_cross_entropy
from implementations.torch_backend.kernels.gated_gelu import gated_gelu
from implementations.torch_backend.kernels.linear_scan import linear_scan
from implementations.torch_backend.kernels.rg_lru import rg_lru
from implementations.torch_backend.kernels.rms_norm import add_rms_norm, rms_norm
from implementations.torch_backend.kernels.rope import rope

EPS, ROPE_BASE = 1e-6, 10000.0
EVERYTHING = (...,)
SEED = 0
torch._dynamo.config.recompile_limit = 64  # the functions below are compiled for each shape


class Problem(NamedTuple):
    """`call(*inputs, *constants)` gives a tensor or several. Truth is held to a part of them: that
    of the outputs, from those of the inputs; gradients of the outputs are 0 elsewhere."""

    inputs: tuple[Tensor, ...]  # of floating numbers, each with a gradient
    constants: tuple
    ours: dict[str, Callable]
    peers: dict[str, Callable]
    truth: Callable  # of parts of the inputs, in float64
    parts: tuple[tuple, ...]  # index of each input
    out_parts: tuple[tuple, ...]  # index of each output
    prepare: dict[str, Callable] | None = None  # contender -> what makes its inputs


def problem(case: Case, device: str, *, is_check: bool) -> Problem:
    """is_check: for the comparison with truth, of a part."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int, dtype: str | None = None) -> Tensor:
        dtype = getattr(torch, dtype or case.dtype)
        made = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return made.requires_grad_()

    return PROBLEMS[case.op](case.shape, normal, device, is_check)


def called(problem: Problem, name: str) -> tuple[Callable, tuple[Tensor, ...]]:
    """The contender's function, and inputs of its own."""
    call = (problem.ours | problem.peers)[name]
    if name not in (problem.prepare or {}):
        return call, problem.inputs
    made = problem.prepare[name](*problem.inputs)
    return call, tuple(x.detach().requires_grad_() for x in made)


def work(problem: Problem, name: str, direction: str) -> Callable[[], object]:
    """What is timed: one call, and with it the gradients of all inputs."""
    call, inputs = called(problem, name)
    if direction != BOTH:

        def forward() -> object:
            with torch.no_grad():
                return call(*inputs, *problem.constants)

        return forward
    with torch.no_grad():
        outputs = several(call(*inputs, *problem.constants))
    douts = tuple(torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y) for y in outputs)

    def both() -> object:
        outputs = several(call(*inputs, *problem.constants))
        return torch.autograd.grad(outputs, inputs, douts)

    return both


def several(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def true_values(problem: Problem, direction: str) -> tuple[list[Tensor], list[Tensor]]:
    """(gradients of the outputs' parts, values), in float64: outputs, then gradients of inputs."""
    inputs = [
        x.detach()[part].double().requires_grad_()
        for x, part in zip(problem.inputs, problem.parts, strict=True)
    ]
    outputs = several(problem.truth(*inputs))
    generator = torch.Generator(outputs[0].device).manual_seed(SEED)
    made = {"generator": generator, "device": outputs[0].device, "dtype": torch.bfloat16}
    douts = [torch.randn(y.shape, **made).double() for y in outputs]
    grads = torch.autograd.grad(outputs, inputs, douts) if direction == BOTH else ()
    return douts, [x.detach() for x in (*outputs, *grads)]


def relative_error(
    problem: Problem, name: str, direction: str, truth: tuple[list[Tensor], list[Tensor]]
) -> float:
    """The largest of all tensors: largest error over largest value."""
    call, inputs = called(problem, name)
    douts, wanted = truth
    with torch.set_grad_enabled(direction == BOTH):
        outputs = several(call(*inputs, *problem.constants))
    found = [y.detach()[part] for y, part in zip(outputs, problem.out_parts, strict=True)]
    if direction == BOTH:
        given = [torch.zeros_like(y) for y in outputs]
        for dy, part, value in zip(given, problem.out_parts, douts, strict=True):
            dy[part] = value.to(dy.dtype)
        grads = torch.autograd.grad(outputs, inputs, given)
        for dx, x, part in zip(grads, problem.inputs, problem.parts, strict=True):
            repeated = dx.dim() == 4 and dx.shape[2] != x.shape[2]
            found.append((dx.double().sum(2, keepdim=True) if repeated else dx)[part])
    errors = []
    for value, true in zip(found, wanted, strict=True):
        error, size = (value.double() - true).abs().max(), true.abs().max().clamp(min=1e-30)
        errors.append(float(error / size))
    return max(errors, key=lambda e: float("inf") if e != e else e)  # NaN is the largest


@cache
def compiled(function: Callable) -> Callable:
    """One for the process, so that shapes compiled once stay so."""
    return torch.compile(function, dynamic=False)


def positions(shape: dict, device: str, *, carried: int = 0) -> Tensor:
    """[B, T]: documents of a given length, `carried` tokens of the first one before; or one."""
    T, document = shape["T"], shape.get("document")
    time_T = torch.arange(T, device=device)
    time_T = time_T if document is None else (time_T + carried) % document
    return time_T.expand(shape["B"], T)


def every(size: int, num_parts: int) -> slice:
    """About so many indices, spread out; odd strides, to meet all places in a tile."""
    return slice(None, None, max(size // num_parts, 1) | 1)


def higher_order_scan(a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> tuple[Tensor, Tensor]:
    h_BTR = _HigherOrderScan.apply(a_BTR, x_BTR, h0_BR)
    return h_BTR, h_BTR[:, -1]


class _HigherOrderScan(torch.autograd.Function):
    """With the backward pass as a scan too: PyTorch's own makes T by T matrices."""

    @staticmethod
    def forward(ctx, a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> Tensor:
        first_BTR = x_BTR[:, :1] + a_BTR[:, :1] * h0_BR[:, None]
        h_BTR = _scanned(a_BTR, torch.cat([first_BTR, x_BTR[:, 1:]], 1))
        ctx.save_for_backward(a_BTR, h_BTR, h0_BR)
        return h_BTR

    @staticmethod
    def backward(ctx, dh_BTR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a_BTR, h_BTR, h0_BR = ctx.saved_tensors
        next_BTR = torch.cat([a_BTR[:, 1:], torch.zeros_like(a_BTR[:, :1])], 1)
        dx_BTR = _scanned(next_BTR.flip(1), dh_BTR.flip(1)).flip(1)
        before_BTR = torch.cat([h0_BR[:, None], h_BTR[:, :-1]], 1)
        return dx_BTR * before_BTR, dx_BTR, a_BTR[:, 0] * dx_BTR[:, 0]


def _scanned(a_BTR: Tensor, x_BTR: Tensor) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def then(p: tuple, q: tuple) -> tuple:
        return p[0] * q[0], q[0] * p[1] + q[1]

    mode = "pointwise" if a_BTR.is_cuda else "generic"
    return associative_scan(then, (a_BTR, x_BTR), 1, combine_mode=mode)[1]


HIGHER_ORDER = "compiled_scan"  # a variant that is a peer's, and in this process alone
scans.VARIANTS.setdefault(HIGHER_ORDER, higher_order_scan)


def by_variant(function: Callable) -> tuple[dict, dict]:
    """(ours, peers) of an op of the recurrence."""
    ours = {v: bound(function, v) for v in ("triton", "triton_split")}
    peers = {v: bound(function, v) for v in ("analytic", "associative")}
    return ours, peers | {HIGHER_ORDER: compiled(bound(function, HIGHER_ORDER))}


@cache
def bound(function: Callable, variant: str) -> Callable:
    return lambda *arguments: function(*arguments, variant)


def _rg_lru(shape: dict, normal: Callable, device: str, is_check: bool) -> Problem:
    B, T, R = (shape[axis] for axis in "BTR")
    gates = [normal(B, T, R) for _ in range(3)]
    params = [normal(R, dtype="float32") for _ in range(3)]
    inputs = (*gates, *params, normal(B, R, dtype="float32"))
    position_BT = positions(shape, device, carried=5)  # the state before the first counts
    ours, peers = by_variant(_rg_lru_of)
    part = (..., every(R, 13))

    def truth(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return _rg_lru_of(*parts, position_BT, "associative")

    return Problem(inputs, (position_BT,), ours, peers, truth, (part,) * 7, (part,) * 2)


def _rg_lru_of(x, a_gate, input_gate, a_bias, input_bias, a_param, h0, position_BT, variant):
    params = (a_bias, input_bias, a_param)
    return rg_lru(x, a_gate, input_gate, *params, position_BT, h0, variant)


def _linear_scan(shape: dict, normal: Callable, device: str, is_check: bool) -> Problem:
    B, T, R = (shape[axis] for axis in "BTR")
    a_BTR = torch.sigmoid(3 + normal(B, T, R).detach())
    if "document" in shape:
        a_BTR = a_BTR * (positions(shape, device) != 0)[:, :, None]
    inputs = (a_BTR.requires_grad_(), normal(B, T, R), normal(B, R, dtype="float32"))
    ours, peers = by_variant(linear_scan)
    truth, part = bound(linear_scan, "associative"), (..., every(R, 13))
    return Problem(inputs, (), ours, peers, truth, (part,) * 3, (part,) * 2)


def _attention(shape: dict, normal: Callable, device: str, is_check: bool) -> Problem:
    B, T, N, H = (shape[axis] for axis in "BTNH")
    W = shape.get("W")
    inputs = (normal(B, T, N, H), normal(B, T, 1, H), normal(B, T, 1, H))
    position_BT = positions(shape, device)
    last_BT = torch.arange(T, device=device).expand(B, T)
    rows = every(T, 61)
    reach_BT = position_BT if W is None else position_BT.clamp(max=W - 1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if W is None:
            return attention(q, k, v, last_BT, position_BT, "triton")
        return window_attention(q, k, v, position_BT, W, "triton")

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, last_BT[:, rows], reach_BT[:, rows], "plain")

    def repeat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return q, *(x.expand(B, T, N, H).contiguous() for x in (k, v))

    mask_TS = None
    if W is not None:  # added to the scores: a mask of truth values would be made one at each call
        behind_TS = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
        mask_TS = torch.zeros(T, T, device=device, dtype=inputs[0].dtype)
        mask_TS.masked_fill_((behind_TS < 0) | (behind_TS >= W), float("-inf"))
    backends = {
        "sdpa_flash": (SDPBackend.FLASH_ATTENTION, True),
        "sdpa_cudnn": (SDPBackend.CUDNN_ATTENTION, True),
        "sdpa_flash_repeated": (SDPBackend.FLASH_ATTENTION, False),
        "sdpa_cudnn_repeated": (SDPBackend.CUDNN_ATTENTION, False),
        "sdpa_efficient_repeated": (SDPBackend.EFFICIENT_ATTENTION, False),
    }
    peers = {
        name: sdpa(backend, is_grouped, mask_TS)
        for name, (backend, is_grouped) in backends.items()
        if W is None or "flash" not in name  # it takes no mask
    }
    return Problem(
        inputs,
        (),
        {"triton": ours},
        peers | {"flex_attention": flex(T, W, device)},
        truth,
        ((slice(None), rows), EVERYTHING, EVERYTHING),
        ((slice(None), rows),),
        {name: repeat for name in peers if name.endswith("repeated")},
    )


def sdpa(backend: SDPBackend, is_grouped: bool, mask_TS: Tensor | None) -> Callable:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            heads = [x.transpose(1, 2) for x in (q, k, v)]
            mask = {"is_causal": True} if mask_TS is None else {"attn_mask": mask_TS}
            out_BNTH = F.scaled_dot_product_attention(*heads, **mask, enable_gqa=is_grouped)
        return out_BNTH.transpose(1, 2)

    return call


def flex(T: int, W: int | None, device: str) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    made = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not made:  # only where it is called: in the discarded first call
            made.append(create_block_mask(seen_within(W or T), None, None, T, T, device=device))
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        [mask] = made
        return compiled(flex_attention)(*heads, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return call


@cache
def seen_within(W: int) -> Callable:
    return lambda b, h, q, k: (q >= k) & (q - k < W)


def _layer(function: Callable, shapes: Callable, parts: tuple, num_outputs: int = 1) -> Callable:
    """Of kernels.layers: the peer is the plain variant, compiled. `shapes`: of activations, then of
    float32 parameters; `parts`: of inputs, then of outputs."""

    def make(shape: dict, normal: Callable, device: str, is_check: bool) -> Problem:
        inputs, params = shapes(shape)
        inputs = [normal(*x) for x in inputs] + [normal(*x, dtype="float32") for x in params]
        position_BT = positions(shape, device)
        split = len(parts) - num_outputs

        def truth(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            return function(*tensors, position_BT, "plain")

        return Problem(
            tuple(inputs),
            (position_BT,),
            {"triton": bound(function, "triton")},
            {"compiled": compiled(bound(function, "plain"))},
            truth,
            parts[:split],
            parts[split:],
        )

    return make


def _mean_cross_entropy(shape: dict, normal: Callable, device: str, is_check: bool) -> Problem:
    """The embedding in float32, as in training. For the check only rows of the part are scored."""
    B, T, D, V = (shape[axis] for axis in "BTDV")
    weight_VD = (normal(V, D, dtype="float32").detach() * D**-0.5).requires_grad_()
    targets_BT = torch.arange(B * T, device=device).view(B, T) * 7919 % V
    rows = every(T, 29)
    if is_check:
        is_scored = torch.zeros(T, dtype=torch.bool, device=device)
        is_scored[rows] = True
        targets_BT = targets_BT.where(is_scored, IGNORED)

    def truth(x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        return mean_cross_entropy(x_BTD, weight_VD, targets_BT[:, rows], None, "plain")

    def of_variant(variant: str) -> Callable:
        return lambda x, weight, targets: mean_cross_entropy(x, weight, targets, None, variant)

    return Problem(
        (normal(B, T, D), weight_VD),
        (targets_BT,),
        {"triton": of_variant("triton")},
        {"plain": of_variant("plain"), "compiled": compiled(_rounded_logits)},
        truth,
        ((slice(None), rows), EVERYTHING),
        (EVERYTHING,),
    )


def _rounded_logits(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """As it is usually written: the product in x's dtype, the loss in float32."""
    logits = F.linear(x_BTD, weight_VD.to(x_BTD.dtype)).flatten(0, 1).float()
    return F.cross_entropy(logits, targets_BT.flatten(), ignore_index=IGNORED)


def _rows(*axes: str) -> Callable:
    return lambda shape: tuple(shape[axis] for axis in axes)


CHANNELS = (..., slice(None, None, 7))
PROBLEMS = {
    "rg_lru": _rg_lru,
    "linear_scan": _linear_scan,
    "attention": _attention,
    "mean_cross_entropy": _mean_cross_entropy,
    "causal_conv": _layer(
        lambda x, weight, bias, position, v: causal_conv(x, weight, bias, position, None, v)[0],
        lambda s: ([_rows(*"BTR")(s)], [(4, s["R"]), (s["R"],)]),
        (CHANNELS,) * 4,
    ),
    "rms_norm": _layer(
        lambda x, scale, position, v: rms_norm(x, scale, EPS, v),
        lambda s: ([_rows(*"BTD")(s)], [(s["D"],)]),
        (EVERYTHING,) * 3,
    ),
    "add_rms_norm": _layer(
        lambda x, branch, scale, position, v: add_rms_norm(x, branch, scale, EPS, v),
        lambda s: ([_rows(*"BTD")(s)] * 2, [(s["D"],)]),
        (EVERYTHING,) * 5,
        num_outputs=2,
    ),
    "gated_gelu": _layer(
        lambda gate, up, position, v: gated_gelu(gate, up, v),
        lambda s: ([_rows(*"BTF")(s)] * 2, []),
        (EVERYTHING,) * 3,
    ),
    "rope": _layer(
        lambda x, position, v: rope(x, position, x.shape[-1], ROPE_BASE, v),
        lambda s: ([_rows(*"BTNH")(s)], []),
        (EVERYTHING,) * 2,
    ),
}
