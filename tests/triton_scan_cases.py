"""One call of a scan of Triton in the interpreter, beside its truth: errors by field of parity.

Called in a process with TRITON_INTERPRET=1 (tests/interpreted.py). What kernels shall write holds
NaN before.
"""

from unittest import mock

import numpy as np
import torch
from interpreted import poisoned
from scan_cases import Errors, drawn, errors, normal, scan_case, sized

from implementations import ops as truth
from implementations import reference
from implementations.parameters import is_exact
from implementations.torch_backend import ops
from implementations.torch_backend.kernels.linear_scan import TILES, linear_scan
from implementations.torch_backend.kernels.rg_lru_step import rg_lru_step
from implementations.torch_backend.mixers.rg_lru import form_of
from suites.ladder.check import to_bfloat16

KERNELS = {"attention": "plain", "layers": "plain"}


def op_errors(variant: str, **shape) -> Errors:
    """linear_scan or rg_lru, as parity calls it: values, and gradients of everything given."""
    case = scan_case(**shape)
    with poisoned():
        outputs, dparams, dinputs = ops.call(
            case.op,
            ops.Settings(
                case.config, KERNELS | {"linear_scan": variant}, getattr(torch, case.dtype)
            ),
            {name: torch.tensor(value) for name, value in case.params.items()},
            {
                name: torch.tensor(value).to(getattr(torch, case.dtype_of(name)))
                for name, value in case.floats().items()
            },
            {name: torch.tensor(value) for name, value in case.integers().items()},
            tuple(map(torch.tensor, case.doutputs)),
        )
    return case.errors(tuple(map(array, outputs)), *map(arrays, (dparams, dinputs)))


def tile_errors(size: int, **shape) -> Errors:
    """op_errors with the tiles that many channels have, of which TILES has one for each size."""
    tiles = {kernel: ((0, sizes[size][1]),) for kernel, sizes in TILES.items()}
    with mock.patch.dict(TILES, tiles):
        return op_errors("triton", **shape)


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
    found = dict(zip(names, map(array, (h, last, *grads)), strict=True))
    return errors(found, dict(zip(names, true, strict=True)))


def step_errors(B: int, R: int, G: int, conv_width: int, dtype: str, **settings) -> Errors:
    """Tokens one by one, beside the recurrent block's equations over all that came before."""
    config = sized(R, num_gate_blocks=G, conv_width=conv_width, **settings)
    rng = np.random.default_rng([B, R, G])
    params = drawn(config, rng)
    num_tokens = conv_width + 3
    gate_BTR, x_BTR = normal(rng, 2, B, num_tokens, R)
    if dtype == "bfloat16":
        params = {k: v if is_exact(k) else to_bfloat16(v) for k, v in params.items()}
        gate_BTR, x_BTR = to_bfloat16(gate_BTR), to_bfloat16(x_BTR)
    position_BT = np.broadcast_to(np.arange(num_tokens), (B, num_tokens))
    conv = reference.within(params, "conv_1d")
    y_BTR = x_BTR
    if conv_width:
        y_BTR = reference.causal_conv(conv["weight"], conv.get("bias"), x_BTR, position_BT)
    if dtype == "bfloat16":  # what the convolution gives is rounded, for more tokens too
        y_BTR = to_bfloat16(y_BTR)
    unit = reference.within(params, "rg_lru")
    h0_BR = np.zeros((B, R), np.float32)
    h_BTR, _ = truth.OPS["rg_lru"].forward(
        config, unit, {"x_BTR": y_BTR, "position_BT": position_BT, "h0_BR": h0_BR}
    )
    true = {"out_BTR": reference.gelu(gate_BTR) * h_BTR, "h_BR": h_BTR[:, -1]}
    past = max(conv_width - 1, 0)
    if past:
        true["conv_BWR"] = x_BTR[:, num_tokens - past :]

    kind, weights = getattr(torch, dtype), {k: torch.tensor(v) for k, v in params.items()}
    conv_BWR = torch.zeros(B, past, R, dtype=kind)
    names = ("conv_1d.weight", "conv_1d.bias", "rg_lru.a_gate.weight", "rg_lru.input_gate.weight",
             "rg_lru.a_gate.bias", "rg_lru.input_gate.bias", "rg_lru.a_param")  # fmt: skip
    given = [weights.get(name) for name in names]
    form = form_of(config) | {"theta_R": weights.get("rg_lru.theta")}
    h_BR, outs = torch.zeros(B, R), []
    for t in range(num_tokens):
        with poisoned():
            outs.append(
                rg_lru_step(
                    torch.tensor(gate_BTR[:, t]).to(kind), torch.tensor(x_BTR[:, t]).to(kind),
                    *given, torch.tensor(position_BT[:, t]), conv_BWR, h_BR, **form,
                )
            )  # fmt: skip
    found = {"out_BTR": torch.stack(outs, 1), "h_BR": h_BR}
    if past:
        found["conv_BWR"] = conv_BWR
    return errors(arrays(found), true)


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: array(tensor) for name, tensor in tensors.items()}


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()
