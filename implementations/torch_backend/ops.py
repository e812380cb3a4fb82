"""Every op of implementations/ops.py, called alone: for checks. Inputs by name, outputs as a tuple.

Twin: implementations/jax_backend/ops.py.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from implementations.config import ModelConfig
from implementations.mixers import MIXERS
from implementations.ops import OPS as TRUTH
from implementations.ops import chunks_of
from implementations.torch_backend import layers, model
from implementations.torch_backend.kernels.cross_entropy import cross_entropy as nll_of
from implementations.torch_backend.kernels.gate import bounded_sqrt as root
from implementations.torch_backend.kernels.gated_gelu import gated_gelu
from implementations.torch_backend.kernels.linear_scan import linear_scan
from implementations.torch_backend.kernels.rg_lru import rg_lru as gated_scan
from implementations.torch_backend.kernels.rope import rope as turn
from implementations.torch_backend.mixers import mqa, rg_lru


class Settings(NamedTuple):
    config: ModelConfig
    kernels: dict[str, str]
    dtype: torch.dtype

    @property
    def layers(self) -> str:
        return self.kernels["layers"]


def embed(s: Settings, params: dict, tokens_BT: Tensor) -> tuple:
    module = loaded(layers.Embedding(*params["weight"].shape), params)
    return (module.embed(tokens_BT, s.dtype, is_scaled=s.config.scale_embeddings),)


def rms_norm(s: Settings, params: dict, x_BTD: Tensor) -> tuple:
    module = layers.RMSNorm(x_BTD.shape[-1], s.config.rms_norm_eps, s.layers)
    return (loaded(module, params)(x_BTD),)


def linear(s: Settings, params: dict, x: Tensor) -> tuple:
    return (loaded(layers.Linear(*params["weight"].shape, "bias" in params), params)(x),)


def gelu(s: Settings, params: dict, x: Tensor) -> tuple:
    """Of a product with ones: the kernel alone."""
    return (gated_gelu(x, torch.ones_like(x), s.layers),)


def causal_conv(
    s: Settings, params: dict, x_BTR: Tensor, position_BT: Tensor, conv_BWR: Tensor
) -> tuple:
    module = layers.CausalConv(*params["weight"].shape, "bias" in params, s.layers)
    return loaded(module, params)(x_BTR, position_BT, conv_BWR)


def block_diagonal(s: Settings, params: dict, x_BTR: Tensor) -> tuple:
    G, I, J = params["weight"].shape  # noqa: E741
    module = loaded(layers.BlockDiagonal(G, G * I, G * J, "bias" in params), params)
    return (module.add_bias(module(x_BTR)),)


def bounded_sqrt(s: Settings, params: dict, x: Tensor) -> tuple:
    return (root(x),)


def scan(s: Settings, params: dict, a_BTR: Tensor, x_BTR: Tensor, h0_BR: Tensor) -> tuple:
    return linear_scan(a_BTR, x_BTR, h0_BR, s.kernels["linear_scan"])


def recurrence(
    s: Settings, params: dict, x_BTR: Tensor, position_BT: Tensor, h0_BR: Tensor
) -> tuple:
    return loaded(rg_lru.RGLRU(s.config, s.kernels), params)(x_BTR, position_BT, h0_BR)


def timed_recurrence(s: Settings, **inputs: Tensor) -> tuple:
    """From the gates' pre-activations on, which hold their biases."""
    absent = dict.fromkeys(("a_gate_BTR", "input_gate_BTR", "a_param_R"))
    biases = {"a_bias_R": None, "input_bias_R": None}
    given = absent | inputs | biases | rg_lru.form_of(s.config)
    return gated_scan(**given, variant=s.kernels["linear_scan"])


def rope(s: Settings, params: dict, x_BTNH: Tensor, position_BT: Tensor) -> tuple:
    rotation = (s.config.rope_dim, s.config.rope_base)
    return (turn(x_BTNH, position_BT, *rotation, s.layers),)


def attention(
    s: Settings, params: dict, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, position_BT: Tensor
) -> tuple:
    inputs = (q_BTNH, k_BTKH, v_BTKH, position_BT)
    return (mqa.attend_alone(*inputs, s.config, s.kernels["attention"]),)


def unembed(s: Settings, params: dict, x_BTD: Tensor) -> tuple:
    module = loaded(layers.Embedding(*params["weight"].shape), params)
    return (module.unembed(x_BTD, s.config.logit_soft_cap),)


def cross_entropy(s: Settings, params: dict, logits_BTV: Tensor, targets_BT: Tensor) -> tuple:
    return (nll_of(logits_BTV, targets_BT, s.layers),)


def mlp(s: Settings, params: dict, x: Tensor) -> tuple:
    return (loaded(layers.MLP(s.config, s.layers), params)(x),)


def mixer(name: str, s: Settings, params: dict, x_BTD: Tensor, position_BT: Tensor) -> tuple:
    module = model.load_mixer(name).Mixer(s.config, s.kernels)
    return loaded(module, params)(x_BTD, position_BT, None)[:1]


def chunks(name: str, s: Settings, params: dict, x_BTD: Tensor) -> tuple:
    B, T, _ = x_BTD.shape
    kind, parts = model.load_mixer(name), []
    module = loaded(kind.Mixer(s.config, s.kernels), params)
    state = kind.empty_state(s.config, B, T, x_BTD.dtype, x_BTD.device)
    for piece in chunks_of(s.config, T):
        position_T = torch.arange(piece.start, piece.stop, device=x_BTD.device)
        y_BTD, state = module(x_BTD[:, piece], position_T.expand(B, -1), state)
        parts.append(y_BTD)
    return (torch.cat(parts, 1),)


def layer(name: str, s: Settings, params: dict, x_BTD: Tensor, position_BT: Tensor) -> tuple:
    module = model.Layer(s.config, s.kernels, name)
    return loaded(module, params)(x_BTD, position_BT, None)[:1]


OPS = {
    "embed": embed,
    "rms_norm": rms_norm,
    "linear": linear,
    "gelu": gelu,
    "causal_conv": causal_conv,
    "block_diagonal": block_diagonal,
    "bounded_sqrt": bounded_sqrt,
    "linear_scan": scan,
    "rg_lru": recurrence,
    "rope": rope,
    "attention": attention,
    "unembed": unembed,
    "cross_entropy": cross_entropy,
    "mlp": mlp,
    **{f"mixer.{name}": partial(mixer, name) for name in MIXERS},
    **{f"chunks.{name}": partial(chunks, name) for name in MIXERS},
    **{f"layer.{name}": partial(layer, name) for name in MIXERS},
}
TIMED = {"linear_scan": partial(scan, params={}), "rg_lru": timed_recurrence}


def call(
    name: str, settings: Settings, params: dict, inputs: dict, integers: dict, doutputs: tuple
) -> tuple[tuple, dict, dict]:
    """(outputs, gradients of the parameters, gradients of the inputs)."""
    params = {key: nn.Parameter(value) for key, value in params.items()}
    if TRUTH[name].backward is None:
        with torch.no_grad():
            return OPS[name](settings, params, **inputs, **integers), {}, {}
    inputs = {key: value.requires_grad_() for key, value in inputs.items()}
    outputs = OPS[name](settings, params, **inputs, **integers)
    sources = [*params.values(), *inputs.values()]
    pulled = [(y, d.to(y.dtype)) for y, d in zip(outputs, doutputs, strict=True) if y.requires_grad]
    pulled, doutputs = zip(*pulled, strict=True)
    grads = torch.autograd.grad(pulled, sources, doutputs, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(sources, grads, strict=True)]
    return (
        tuple(y.detach() for y in outputs),
        dict(zip(params, grads, strict=False)),
        dict(zip(inputs, grads[len(params) :], strict=True)),
    )


def loaded(module: nn.Module, params: dict[str, nn.Parameter]) -> nn.Module:
    """The module with these very parameters, laid out in memory as its own."""
    for name, parameter in list(module.named_parameters()):
        path, _, leaf = name.rpartition(".")
        value = params[name]
        if value.stride() != parameter.stride():
            empty = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
            value.data = empty.copy_(value.data)
        setattr(module.get_submodule(path), leaf, value)
    return module
