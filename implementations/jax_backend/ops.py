"""Every op of implementations/ops.py, called alone: for checks. Inputs by name, outputs as a tuple.

Twin: implementations/torch_backend/ops.py.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from implementations.config import ModelConfig
from implementations.engine import Kernels
from implementations.jax_backend import layers, model
from implementations.jax_backend.kernels.cross_entropy import cross_entropy as nll
from implementations.jax_backend.kernels.gate import bounded_sqrt as bounded_sqrt_of
from implementations.jax_backend.kernels.gated_gelu import gated_gelu
from implementations.jax_backend.kernels.linear_scan import linear_scan
from implementations.jax_backend.kernels.rg_lru import rg_lru as gated_scan
from implementations.jax_backend.kernels.rope import rope as rotate
from implementations.jax_backend.mixers import mqa, rg_lru
from implementations.mixers import MIXERS
from implementations.ops import OPS as TRUTH
from implementations.ops import chunks_of


class Settings(NamedTuple):
    config: ModelConfig
    kernels: Kernels
    dtype: str


def embed(s: Settings, params: dict, tokens_BT: Array) -> tuple:
    is_scaled = s.config.scale_embeddings
    return (layers.embed(params, tokens_BT, s.dtype, is_scaled=is_scaled),)


def rms_norm(s: Settings, params: dict, x_BTD: Array) -> tuple:
    return (layers.rms_norm(params, x_BTD, s.config.rms_norm_eps, s.kernels.layers),)


def linear(s: Settings, params: dict, x: Array) -> tuple:
    return (layers.linear(params, x),)


def gelu(s: Settings, params: dict, x: Array) -> tuple:
    return (gated_gelu(x, jnp.ones_like(x), s.kernels.layers),)


def causal_conv(
    s: Settings, params: dict, x_BTR: Array, position_BT: Array, conv_BWR: Array
) -> tuple:
    return layers.causal_conv(params, x_BTR, position_BT, conv_BWR, s.kernels.layers)


def block_diagonal(s: Settings, params: dict, x_BTR: Array) -> tuple:
    return (layers.block_diagonal(params, x_BTR),)


def bounded_sqrt(s: Settings, params: dict, x: Array) -> tuple:
    return (bounded_sqrt_of(x),)


def scan(s: Settings, params: dict, a_BTR: Array, x_BTR: Array, h0_BR: Array) -> tuple:
    return linear_scan(a_BTR, x_BTR, h0_BR, s.kernels.linear_scan)


def recurrence(s: Settings, params: dict, x_BTR: Array, position_BT: Array, h0_BR: Array) -> tuple:
    return rg_lru.rg_lru(params, x_BTR, position_BT, h0_BR, s.config, s.kernels.linear_scan)


def timed_recurrence(s: Settings, **inputs: Array) -> tuple:
    """From the gates' pre-activations on."""
    absent = dict.fromkeys(("a_gate_BTR", "input_gate_BTR", "a_param_R"))
    given = absent | inputs | rg_lru.form_of(s.config)
    return gated_scan(**given, variant=s.kernels.linear_scan)


def rope(s: Settings, params: dict, x_BTNH: Array, position_BT: Array) -> tuple:
    config = s.config
    return (rotate(x_BTNH, position_BT, config.rope_dim, config.rope_base, s.kernels.layers),)


def attention(
    s: Settings, params: dict, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, position_BT: Array
) -> tuple:
    inputs = (q_BTNH, k_BTKH, v_BTKH, position_BT)
    return mqa.attend_alone(*inputs, None, s.config, s.kernels.attention)[:1]


def unembed(s: Settings, params: dict, x_BTD: Array) -> tuple:
    return (layers.unembed(params, x_BTD, s.config.logit_soft_cap),)


def cross_entropy(s: Settings, params: dict, logits_BTV: Array, targets_BT: Array) -> tuple:
    return (nll(logits_BTV, targets_BT, s.kernels.layers),)


def mlp(s: Settings, params: dict, x: Array) -> tuple:
    return (layers.mlp(params, x, s.kernels.layers),)


def mixer(name: str, s: Settings, params: dict, x_BTD: Array, position_BT: Array) -> tuple:
    run = model.load_mixer(name).mixer
    return run(params, x_BTD, position_BT, None, config=s.config, kernels=s.kernels)[:1]


def chunks(name: str, s: Settings, params: dict, x_BTD: Array) -> tuple:
    B, T, _ = x_BTD.shape
    module, parts = model.load_mixer(name), []
    state = module.empty_state(s.config, B, T, x_BTD.dtype)
    for piece in chunks_of(s.config, T):
        position_BT = jnp.broadcast_to(
            jnp.arange(piece.start, piece.stop), (B, piece.stop - piece.start)
        )
        y_BTD, state = module.mixer(
            params, x_BTD[:, piece], position_BT, state, config=s.config, kernels=s.kernels
        )
        parts.append(y_BTD)
    return (jnp.concatenate(parts, axis=1),)


def layer(name: str, s: Settings, params: dict, x_BTD: Array, position_BT: Array) -> tuple:
    settings = {"name": name, "config": s.config, "kernels": s.kernels}
    return model.layer(params, x_BTD, position_BT, None, **settings)[:1]


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

    def run(params: dict, inputs: dict) -> tuple:
        # as in the loss: the embedding is not cast, so that tokens that recur sum up in float32
        cast = params if name == "embed" else model.cast(params, settings.dtype)
        return OPS[name](settings, model.nested(cast), **inputs, **integers)

    if TRUTH[name].backward is None:
        return run(params, inputs), {}, {}
    outputs, pull = jax.vjp(run, params, inputs)
    doutputs = tuple(d.astype(y.dtype) for d, y in zip(doutputs, outputs, strict=True))
    return outputs, *pull(doutputs)


def timed(
    name: str, settings: Settings, inputs: dict, integers: dict, doutputs: tuple | None
) -> tuple[tuple, dict]:
    """(outputs, gradients of the inputs where doutputs are given), of one of engine.TIMED_OPS."""

    def run(inputs: dict) -> tuple:
        return TIMED[name](settings, **inputs, **integers)

    if doutputs is None:
        return run(inputs), {}
    outputs, pull = jax.vjp(run, inputs)
    return outputs, *pull(doutputs)
