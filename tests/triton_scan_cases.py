"""One call of a scan of Triton in the interpreter, beside its truth: errors by field of parity.

Called in a process with TRITON_INTERPRET=1 (tests/interpreted.py). Inputs are rounded to their
dtype first, so that only the kernel's own error counts; what kernels shall write holds NaN before.
"""

import numpy as np
import torch
from conftest import tiny
from interpreted import poisoned

from implementations import ops as truth
from implementations import reference
from implementations.config import ModelConfig
from implementations.mixers.rg_lru import param_specs
from implementations.torch_backend import ops
from implementations.torch_backend.kernels.linear_scan import linear_scan
from implementations.torch_backend.kernels.rg_lru_step import rg_lru_step
from suites.ladder.check import error_of, to_bfloat16

# field: (largest, root mean square), both relative. A mean over few values is no mean: None.
Errors = dict[str, tuple[float, float | None]]
MANY = 256
KERNELS = {"attention": "plain", "layers": "plain"}


def op_errors(
    op: str, B: int, T: int, R: int, documents: str, variant: str, dtype: str, biases: bool = True
) -> Errors:
    """linear_scan or rg_lru, as parity calls it: values, and gradients of everything given."""
    config = sized(R, biases=biases)
    rng = np.random.default_rng([T, R])
    position_BT = positions(documents, B, T)
    if op == "linear_scan":
        a_BTR = rng.uniform(0.6, 0.9999, (B, T, R)).astype(np.float32)
        a_BTR[position_BT == 0] = 0
        params, inputs = {}, {"a_BTR": a_BTR, "x_BTR": normal(rng, B, T, R)}
    else:
        params = reference.within(drawn(config, rng), "rg_lru")
        inputs = {"x_BTR": normal(rng, B, T, R), "position_BT": position_BT}
    inputs["h0_BR"] = normal(rng, B, R)
    doutputs = (normal(rng, B, T, R), normal(rng, B, R))
    if dtype == "bfloat16":
        wide = truth.OPS[op].wide
        inputs = {k: v if k in wide or v.dtype.kind == "i" else to_bfloat16(v)
                  for k, v in inputs.items()}  # fmt: skip
        params = {k: v if k == "a_param" else to_bfloat16(v) for k, v in params.items()}
        doutputs = (to_bfloat16(doutputs[0]), doutputs[1])
    of_dtype = {k: getattr(torch, "float32" if k in truth.OPS[op].wide else dtype) for k in inputs}
    true = truth.call(op, config, params, inputs, doutputs)
    with poisoned():
        found = ops.call(
            op,
            ops.Settings(config, KERNELS | {"linear_scan": variant}, getattr(torch, dtype)),
            {name: torch.tensor(value) for name, value in params.items()},
            {
                name: torch.tensor(value).to(of_dtype[name])
                for name, value in inputs.items()
                if value.dtype.kind == "f"
            },
            {k: torch.tensor(v) for k, v in inputs.items() if v.dtype.kind == "i"},
            tuple(map(torch.tensor, doutputs)),
        )
    ours = dict(zip(true[0], found[0], strict=True))
    return errors(ours, true[0]) | {
        f"d{name}": error
        for part, wanted in zip(found[1:], true[1:], strict=True)
        for name, error in errors(part, wanted).items()
    }


def strided_errors(variant: str) -> Errors:
    """a and x lie in memory as [R, T, B], h0 has gaps, and the gradient is one number expanded."""
    rng = np.random.default_rng(0)
    a_BTR, x_BTR = rng.uniform(0.5, 1, (2, 37, 5)).astype(np.float32), normal(rng, 2, 37, 5)
    h0_BR = normal(rng, 2, 5)
    dh_BTR, dh_BR = np.ones_like(x_BTR), np.zeros_like(h0_BR)
    true = reference.linear_scan(a_BTR, x_BTR, h0_BR)
    true += reference.linear_scan_grad(a_BTR, x_BTR, h0_BR, dh_BTR, dh_BR)
    a, x = (torch.tensor(v.T.copy()).permute(2, 1, 0).requires_grad_() for v in (a_BTR, x_BTR))
    h0 = torch.tensor(np.repeat(h0_BR, 2, axis=1))[:, ::2].requires_grad_()
    assert not a.is_contiguous()
    assert not h0.is_contiguous()
    with poisoned():
        h, last = linear_scan(a, x, h0, variant)
        grads = torch.autograd.grad(h.sum(), (a, x, h0))
    names = ("h_BTR", "h_BR", "da_BTR", "dx_BTR", "dh0_BR")
    return errors(
        dict(zip(names, (h, last, *grads), strict=True)), dict(zip(names, true, strict=True))
    )


def step_errors(B: int, R: int, G: int, conv_width: int, dtype: str, biases: bool = True) -> Errors:
    """Tokens one by one, beside the recurrent block's equations over all that came before."""
    config = sized(R, num_gate_blocks=G, conv_width=conv_width, biases=biases)
    rng = np.random.default_rng([B, R, G])
    params = drawn(config, rng)
    num_tokens = conv_width + 3
    gate_BTR, x_BTR = normal(rng, 2, B, num_tokens, R)
    if dtype == "bfloat16":
        params = {k: v if k.endswith("a_param") else to_bfloat16(v) for k, v in params.items()}
        gate_BTR, x_BTR = to_bfloat16(gate_BTR), to_bfloat16(x_BTR)
    position_BT = np.broadcast_to(np.arange(num_tokens), (B, num_tokens))
    conv = reference.within(params, "conv_1d")
    y_BTR = reference.causal_conv(conv["weight"], conv.get("bias"), x_BTR, position_BT)
    if dtype == "bfloat16":  # what the convolution gives is rounded, for more tokens too
        y_BTR = to_bfloat16(y_BTR)
    unit = reference.within(params, "rg_lru")
    h0_BR = np.zeros((B, R), np.float32)
    h_BTR, _ = truth.OPS["rg_lru"].forward(
        config, unit, {"x_BTR": y_BTR, "position_BT": position_BT, "h0_BR": h0_BR}
    )
    true = {"out_BTR": reference.gelu(gate_BTR) * h_BTR, "h_BR": h_BTR[:, -1],
            "conv_BWR": x_BTR[:, num_tokens - conv_width + 1 :]}  # fmt: skip

    kind, weights = getattr(torch, dtype), {k: torch.tensor(v) for k, v in params.items()}
    conv_BWR = torch.zeros(B, conv_width - 1, R, dtype=kind)
    h_BR, outs = torch.zeros(B, R), []
    for t in range(num_tokens):
        with poisoned():
            outs.append(
                rg_lru_step(
                    torch.tensor(gate_BTR[:, t]).to(kind), torch.tensor(x_BTR[:, t]).to(kind),
                    weights["conv_1d.weight"], weights.get("conv_1d.bias"),
                    weights["rg_lru.a_gate.weight"], weights["rg_lru.input_gate.weight"],
                    weights.get("rg_lru.a_gate.bias"), weights.get("rg_lru.input_gate.bias"),
                    weights["rg_lru.a_param"], torch.tensor(position_BT[:, t]), conv_BWR, h_BR,
                )
            )  # fmt: skip
    return errors({"out_BTR": torch.stack(outs, 1), "h_BR": h_BR, "conv_BWR": conv_BWR}, true)


def sized(R: int, **overrides) -> ModelConfig:
    num_gate_blocks = 4 if R % 4 == 0 else 1
    return tiny("hawk", d_rnn=R, **{"num_gate_blocks": num_gate_blocks} | overrides)


def drawn(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Parameters of a mixer of which none is 0; memories from short to very long."""
    params = {
        spec.name: normal(rng, *spec.shape) * np.float32(spec.shape[0] ** -0.5)
        for spec in param_specs(config)
    }
    R = config.d_rnn
    return params | {"rg_lru.a_param": -rng.uniform(0.5, 9, R).astype(np.float32)}


def positions(documents: str, B: int, T: int) -> np.ndarray:
    """one: a document a row; later: begun before; some: starts mid-block; each: at every token."""
    position_T = {
        "one": np.arange(T),
        "later": np.arange(T) + 3,
        "some": np.arange(T) % 13,
        "each": np.zeros(T, int),
    }[documents]
    return np.tile(position_T, (B, 1)).astype(np.int32)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def errors(ours: dict[str, torch.Tensor], true: dict[str, np.ndarray]) -> Errors:
    found = {}
    for name, want in true.items():
        error = error_of(ours[name].detach().float().numpy(), want)
        found[name] = (error.largest, error.rms if want.size >= MANY else None)
    return found
