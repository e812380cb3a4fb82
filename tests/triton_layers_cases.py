"""One call of a Triton layer in the interpreter, beside its truth: relative errors by tensor.

Called in a process with TRITON_INTERPRET=1 (tests/interpreted.py). Inputs are rounded to their
dtype first, so that only the kernel's own error counts; what kernels shall write holds NaN before.
"""

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from interpreted import poisoned
from torch import Tensor

from implementations import ops, reference
from implementations.engine import IGNORED, Unsupported
from implementations.torch_backend.kernels import (
    causal_conv,
    cross_entropy,
    gated_gelu,
    rms_norm,
)

EPS = 1e-6
Errors = dict[str, float]


def rms_norm_case(
    B: int, T: int, D: int, dtype: str, *, is_strided: bool = False, size: float = 1.0
) -> Errors:
    """size: of the inputs; where it is small, eps counts."""
    rng = np.random.default_rng(0)
    x, dy = drawn(rng, dtype, (2, B, T, D))
    x = rounded(size * x, dtype)
    (scale,) = drawn(rng, "float32", (1, D))
    true = (
        reference.rms_norm(scale, x, EPS),
        *reversed(reference.rms_norm_grad(scale, x, EPS, dy)),
    )
    inputs = [given(x, dtype, is_strided), given(scale, "float32")]
    ours = pulled(lambda x, s: rms_norm.rms_norm(x, s, EPS, "triton"), inputs, [dy])
    return errors(("y", "dx", "dscale"), true, ours, dtype)


def add_rms_norm_case(
    B: int, T: int, D: int, dtype: str, *, is_strided: bool = False, pulled_by: str = "both"
) -> Errors:
    """pulled_by: which of the two outputs have a gradient."""
    rng = np.random.default_rng(1)
    x, branch, dsum, dy = drawn(rng, dtype, (4, B, T, D))
    (scale,) = drawn(rng, "float32", (1, D))
    total = rounded(x + branch, dtype)  # the norm is of what the sum is rounded to
    dsum, dy = dsum * (pulled_by != "norm"), dy * (pulled_by != "sum")
    dscale, dx = reference.rms_norm_grad(scale, total, EPS, dy)
    dx = dx + dsum
    true = (total, reference.rms_norm(scale, total, EPS), dx, dx, dscale)

    def call(x: Tensor, branch: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm.add_rms_norm(x, branch, scale, EPS, "triton")

    incoming = [None if pulled_by == "norm" else dsum, None if pulled_by == "sum" else dy]
    inputs = [given(x, dtype, is_strided), given(branch, dtype), given(scale, "float32")]
    ours = pulled(call, inputs, incoming)
    return errors(("sum", "y", "dx", "dbranch", "dscale"), true, ours, dtype)


def gated_gelu_case(
    B: int, T: int, F: int, dtype: str, *, is_strided: bool = False, size: float = 2.0
) -> Errors:
    """size: of the gate; where it is large, exponentials leave the range of float32."""
    rng = np.random.default_rng(2)
    gate, up, dout = drawn(rng, dtype, (3, B, T, F))
    gate = rounded(size * gate, dtype)
    gelu = reference.gelu(gate)
    true = (gelu * up, reference.gelu_grad(gate, dout * up), gelu * dout)
    inputs = [given(gate, dtype, is_strided), given(up, dtype, is_strided)]
    ours = pulled(lambda g, u: gated_gelu.gated_gelu(g, u, "triton"), inputs, [dout])
    return errors(("out", "dgate", "dup"), true, ours, dtype)


def causal_conv_case(
    B: int,
    T: int,
    R: int,
    dtype: str,
    *,
    width: int = 4,
    starts: str = "one",
    has_state: bool = True,
    has_bias: bool = True,
    is_strided: bool = False,
    index: str = "int32",
) -> Errors:
    """starts: one document that goes on from the state, or `some`, or at `every` token."""
    rng = np.random.default_rng(3)
    x, dy = drawn(rng, dtype, (2, B, T, R))
    conv, dconv = drawn(rng, dtype, (2, B, width - 1, R))
    weight, bias = drawn(rng, "float32", (width, R)), drawn(rng, "float32", (1, R))[0]
    position = documents(B, T, starts, width if has_state else 0)
    params = {"weight": weight} | ({"bias": bias} if has_bias else {})
    truth = {"x_BTR": x, "position_BT": position, "conv_BWR": conv if has_state else 0 * conv}
    outputs, dparams, dinputs = ops.call("causal_conv", None, params, truth, (dy, dconv))
    true = {**outputs, **under_d(dparams), **under_d(dinputs)}

    inputs = {"x_BTR": given(x, dtype, is_strided), "weight": given(weight, "float32")}
    if has_bias:
        inputs["bias"] = given(bias, "float32")
    if has_state:
        inputs["conv_BWR"] = given(conv, dtype, is_strided)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        at = torch.tensor(position, dtype=getattr(torch, index))
        arguments = (named["x_BTR"], named["weight"], named.get("bias"), at)
        return causal_conv.causal_conv(*arguments, named.get("conv_BWR"), "triton")

    # Without a state nothing asks for the gradient of the next one.
    ours = pulled(call, list(inputs.values()), [dy, dconv if has_state else None])
    names = ["y_BTR", "conv_BWR", *under_d(inputs)]
    if not has_state:
        true = true | under_d(ops.call("causal_conv", None, params, truth, (dy, 0 * dconv))[2])
    return errors(names, [true[name] for name in names], ours, dtype)


def cross_entropy_case(
    B: int, T: int, V: int, dtype: str, *, is_strided: bool = False, index: str = "int32"
) -> Errors:
    rng = np.random.default_rng(4)
    (logits,) = drawn(rng, dtype, (1, B, T, V))
    logits = rounded(5 * logits, dtype)
    (dnll,) = drawn(rng, "float32", (1, B, T))
    targets = chosen(rng, B, T, V)
    true = (
        reference.cross_entropy(logits, targets),
        reference.cross_entropy_grad(logits, targets, dnll),
    )
    at = torch.tensor(targets, dtype=getattr(torch, index))
    inputs = [given(logits, dtype, is_strided)]
    ours = pulled(lambda x: cross_entropy.cross_entropy(x, at, "triton"), inputs, [dnll])
    # The value is float32 whatever the logits are.
    return errors(("nll",), true, ours, "float32") | errors(("dlogits",), true[1:], ours[1:], dtype)


def mean_cross_entropy_case(
    B: int,
    T: int,
    D: int,
    V: int,
    dtype: str,
    *,
    soft_cap: float | None = None,
    chunk: int = 2**30,
    variant: str = "triton",
    dloss: float = 1.0,
    weight_dtype: str = "float32",
    all_ignored: bool = False,
) -> Errors:
    """chunk: tokens whose logits are there at one time."""
    rng = np.random.default_rng(5)
    (x,) = drawn(rng, dtype, (1, B, T, D))
    (weight,) = drawn(rng, dtype, (1, V, D))
    weight = rounded(5 * D**-0.5 * weight, dtype)
    targets = chosen(rng, B, T, V)
    if all_ignored:
        targets[:] = IGNORED
    num_scored = max(np.count_nonzero(targets != IGNORED), 1)
    uncapped = x @ weight.T
    logits = reference.soft_cap(uncapped, soft_cap)
    loss = reference.cross_entropy(logits, targets).sum() / num_scored
    dlogits = reference.cross_entropy_grad(logits, targets, np.full((B, T), dloss / num_scored))
    dlogits = reference.soft_cap_grad(uncapped, soft_cap, dlogits)
    true = (loss, dlogits @ weight, np.einsum("btv,btd->vd", dlogits, x))
    at = torch.tensor(targets)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy.mean_cross_entropy(x, weight, at, soft_cap, variant)

    with (
        mock.patch.object(cross_entropy, "CHUNK_BYTES", 4 * V * chunk),
        mock.patch.object(cross_entropy, "MIN_CHUNK", 1),
    ):
        inputs = [given(x, dtype), given(weight, weight_dtype)]
        ours = pulled(call, inputs, [np.array(dloss)])
        with torch.no_grad():
            again = call(*inputs)
    found = errors(("loss", "without grad"), [loss, loss], [ours[0], again], "float32")
    return found | errors(("dx", "dweight"), true[1:], ours[1:], dtype)


def mean_cross_entropy_asked(which: str) -> None:
    rng = np.random.default_rng(6)
    (x,), (weight,) = drawn(rng, "float32", (1, 2, 5, 8)), drawn(rng, "float32", (1, 11, 8))
    targets = torch.tensor(chosen(rng, 2, 5, 11))
    inputs = given(x, "float32"), given(weight, "float32")
    if which == "weight of bfloat16":
        inputs = given(x, "bfloat16"), given(weight, "bfloat16")

    def loss() -> Tensor:
        return cross_entropy.mean_cross_entropy(*inputs, targets, None, "triton")

    alone = {"x alone": 1, "weight alone": 0}.get(which)
    if alone is not None:
        want = torch.autograd.grad(loss(), inputs)
        inputs[alone].requires_grad_(False)
        loss().backward()
        assert inputs[alone].grad is None
        torch.testing.assert_close(inputs[1 - alone].grad, want[1 - alone], rtol=0, atol=0)
    elif which == "twice":  # gradients that were scaled in place are not scaled again unseen
        value = loss()
        value.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
    else:
        loss().backward()
        assert [value.grad.dtype for value in inputs] == [torch.bfloat16] * 2


def wrong_target() -> list[str]:
    """A row with a target that is no token, in both functions."""
    targets = torch.tensor([[1, 7]])
    x, weight = torch.ones(1, 2, 3), torch.ones(7, 3)
    nll = cross_entropy.cross_entropy(x @ weight.t(), targets, "triton")
    mean = cross_entropy.mean_cross_entropy(x, weight, targets, None, "triton")
    assert nll[0, 0].isfinite()
    return [str(nll[0, 1].item()), str(mean.item())]


def refusal(op: str) -> str:
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    integers = torch.zeros(1, 2, dtype=torch.int32)
    calls = {
        "rms_norm": lambda: rms_norm.rms_norm(x, x[0, 0], EPS, "triton"),
        "gated_gelu": lambda: gated_gelu.gated_gelu(x, x, "triton"),
        "causal_conv": lambda: causal_conv.causal_conv(x, x[0], None, integers, None, "triton"),
        "cross_entropy": lambda: cross_entropy.cross_entropy(x, integers, "triton"),
    }
    with pytest.raises(Unsupported) as refused:
        calls[op]()
    return str(refused.value)


def drawn(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers that dtype can hold."""
    return rounded(rng.standard_normal(shape), dtype)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return torch.tensor(values).to(getattr(torch, dtype)).double().numpy()


def given(values: np.ndarray, dtype: str, is_strided: bool = False) -> Tensor:
    """A leaf; strided: with its first two axes the other way about in memory, in every other row
    of twice as many."""
    tensor = torch.tensor(values).to(getattr(torch, dtype))
    if is_strided:
        wide = tensor.transpose(0, 1).repeat_interleave(2, -1).contiguous()
        tensor = wide[..., ::2].transpose(0, 1)
        assert not tensor.is_contiguous() or tensor.numel() <= 1
    return tensor.detach().requires_grad_()


def documents(B: int, T: int, starts: str, first: int) -> np.ndarray:
    """Positions; the first document of each row goes on from position `first`."""
    position = np.broadcast_to(np.arange(T) + first, (B, T)).copy()
    if starts == "every":
        position[:] = 0
    if starts == "some":  # at 0, in the middle of a tile, twice in a row, near its end
        for row in range(B):
            for start in (0, 1, 5 + row, T // 2, T // 2 + 1, 3 * T // 4 + row):
                if start < T:
                    position[row, start:] = np.arange(T - start)
    return position


def chosen(rng: np.random.Generator, B: int, T: int, V: int) -> np.ndarray:
    """Targets, every third of them not scored; the first and the last token among the others."""
    targets = rng.integers(V, size=(B, T))
    targets.flat[:: max(targets.size // 3, 1)] = V - 1
    targets.flat[2::3] = IGNORED
    targets.flat[0] = 0
    return targets


def under_d(values: dict) -> dict:
    return {f"d{name}": value for name, value in values.items()}


def pulled(call: Callable, inputs: list[Tensor], incoming: list[np.ndarray | None]) -> list[Tensor]:
    """Outputs, and the gradients of all inputs for those outputs that have one coming in."""
    with poisoned():
        outputs = call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (y, torch.tensor(dy).to(y.dtype))
            for y, dy in zip(outputs, incoming, strict=True)
            if dy is not None
        ]
        doutputs = [dy for _, dy in pairs]
        grads = torch.autograd.grad([y for y, _ in pairs], inputs, doutputs, allow_unused=True)
    for x, grad in zip(inputs, grads, strict=True):
        assert grad is None or grad.dtype == x.dtype
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
    return [value.detach() for value in (*outputs, *grads)]


def errors(names, true, ours, dtype: str) -> Errors:
    """Of the largest true value (of 1 where all are 0); inf where a value is not a number."""
    found = {}
    for name, want, got in zip(names, true, ours, strict=False):
        got = got.double().numpy()
        assert got.shape == np.shape(want), f"{name}: shape {got.shape}, not {np.shape(want)}"
        error = np.abs(got - want).max(initial=0) / (np.abs(want).max(initial=0) or 1)
        found[name] = float(error) if np.isfinite(got).all() else float("inf")
    return found
