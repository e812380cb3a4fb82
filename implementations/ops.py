"""Every op of a model by name, with its truth: what both backends must compute when called alone.

An op is called with its parameters (a flat dict, names as below the op's own place in
parameters.py) and its inputs by name. Engine.op(name, ...) calls a backend's; `forward` and
`backward` here are the equations of reference.py. Ops with a dot are those of one mixer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from implementations import gates, reference
from implementations.config import ModelConfig
from implementations.mixers import MIXERS, load_mixer
from implementations.reference import Params

Arrays = dict[str, np.ndarray]
Forward = Callable[..., tuple[np.ndarray, ...]]
Backward = Callable[..., tuple[Params, Arrays]]


@dataclass(frozen=True)
class Op:
    """forward(config, params, inputs) -> outputs; backward(config, params, inputs, *doutputs) ->
    gradients of the parameters and of the differentiable inputs, each by name."""

    outputs: tuple[str, ...]
    forward: Forward
    backward: Backward | None  # None: it serves inference alone
    wide: tuple[str, ...] = ()  # inputs that a bfloat16 engine keeps in float32


def _embed(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
    scale = np.sqrt(config.d_model) if config.scale_embeddings else 1.0
    return (params["weight"][inputs["tokens_BT"]] * scale,)


def _embed_grad(config: ModelConfig, params: Params, inputs: Arrays, dx_BTD: np.ndarray) -> tuple:
    scale = np.sqrt(config.d_model) if config.scale_embeddings else 1.0
    dweight_VD = np.zeros_like(params["weight"])
    np.add.at(dweight_VD, inputs["tokens_BT"], dx_BTD * scale)
    return {"weight": dweight_VD}, {}


def _unembed(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
    return (reference.soft_cap(inputs["x_BTD"] @ params["weight"].T, config.logit_soft_cap),)


def _unembed_grad(config: ModelConfig, params: Params, inputs: Arrays, dy: np.ndarray) -> tuple:
    uncapped_BTV = inputs["x_BTD"] @ params["weight"].T
    dy = reference.soft_cap_grad(uncapped_BTV, config.logit_soft_cap, dy)
    dweight_VD = np.einsum("btv,btd->vd", dy, inputs["x_BTD"], optimize=True)
    return {"weight": dweight_VD}, {"x_BTD": dy @ params["weight"]}


def _rms_norm(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
    return (reference.rms_norm(params["scale"], inputs["x_BTD"], config.rms_norm_eps),)


def _rms_norm_grad(config: ModelConfig, params: Params, inputs: Arrays, dy: np.ndarray) -> tuple:
    dscale_D, dx_BTD = reference.rms_norm_grad(
        params["scale"], inputs["x_BTD"], config.rms_norm_eps, dy
    )
    return {"scale": dscale_D}, {"x_BTD": dx_BTD}


def _map(function: Callable) -> Forward:
    """Of a reference function of (params, x)."""
    return lambda config, params, inputs: (function(params, *inputs.values()),)


def _map_grad(function: Callable) -> Backward:
    def backward(config: ModelConfig, params: Params, inputs: Arrays, dy: np.ndarray) -> tuple:
        ((name, x),) = inputs.items()
        grads, dx = function(params, x, dy)
        return grads, {name: dx}

    return backward


def _causal_conv(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
    all_BSR, position_BS = _after_state(inputs)
    y_BSR = reference.causal_conv(params["weight"], params.get("bias"), all_BSR, position_BS)
    past = inputs["conv_BWR"].shape[1]
    return y_BSR[:, past:], all_BSR[:, all_BSR.shape[1] - past :]


def _causal_conv_grad(
    config: ModelConfig, params: Params, inputs: Arrays, dy_BTR: np.ndarray, dconv_BWR: np.ndarray
) -> tuple:
    all_BSR, position_BS = _after_state(inputs)
    past = inputs["conv_BWR"].shape[1]
    dy_BSR = np.concatenate([np.zeros_like(inputs["conv_BWR"]), dy_BTR], axis=1)
    dweight_WR, dbias_R, dall_BSR = reference.causal_conv_grad(
        params["weight"], params.get("bias"), all_BSR, position_BS, dy_BSR
    )
    dall_BSR[:, dall_BSR.shape[1] - past :] += dconv_BWR
    grads = {"weight": dweight_WR} | ({} if dbias_R is None else {"bias": dbias_R})
    return grads, {"x_BTR": dall_BSR[:, past:], "conv_BWR": dall_BSR[:, :past]}


def _after_state(inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """The inputs with those of the state before them, and positions for all."""
    conv_BWR, position_BT = inputs["conv_BWR"], inputs["position_BT"]
    past = conv_BWR.shape[1]
    early_BW = position_BT[:, :1] + np.arange(-past, 0)
    return (
        np.concatenate([conv_BWR, inputs["x_BTR"]], axis=1),
        np.concatenate([early_BW, position_BT], axis=1),
    )


def _linear_scan(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
    return reference.linear_scan(inputs["a_BTR"], inputs["x_BTR"], inputs["h0_BR"])


def _linear_scan_grad(config: ModelConfig, params: Params, inputs: Arrays, *dy) -> tuple:
    da, dx, dh0 = reference.linear_scan_grad(inputs["a_BTR"], inputs["x_BTR"], inputs["h0_BR"], *dy)
    return {}, {"a_BTR": da, "x_BTR": dx, "h0_BR": dh0}


def _rg_lru(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
    return gates.rg_lru(config, params, inputs["x_BTR"], inputs["position_BT"], inputs["h0_BR"])


def _rg_lru_grad(config: ModelConfig, params: Params, inputs: Arrays, *dy: np.ndarray) -> tuple:
    grads, dx, dh0 = gates.rg_lru_grad(
        config, params, inputs["x_BTR"], inputs["position_BT"], inputs["h0_BR"], *dy
    )
    return grads, {"x_BTR": dx, "h0_BR": dh0}


def _rope(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
    return (
        reference.rope(inputs["x_BTNH"], inputs["position_BT"], config.rope_dim, config.rope_base),
    )


def _rope_grad(config: ModelConfig, params: Params, inputs: Arrays, dy: np.ndarray) -> tuple:
    dx = reference.rope_grad(inputs["position_BT"], config.rope_dim, config.rope_base, dy)
    return {}, {"x_BTNH": dx}


def _attention(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
    return (reference.attention(*inputs.values(), config.num_visible_keys),)


def _attention_grad(config: ModelConfig, params: Params, inputs: Arrays, dy: np.ndarray) -> tuple:
    grads = reference.attention_grad(*inputs.values(), config.num_visible_keys, dy)
    return {}, dict(zip(("q_BTNH", "k_BTKH", "v_BTKH"), grads, strict=True))


def _cross_entropy(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
    return (reference.cross_entropy(inputs["logits_BTV"], inputs["targets_BT"]),)


def _cross_entropy_grad(config: ModelConfig, params: Params, inputs: Arrays, dy) -> tuple:
    return {}, {"logits_BTV": reference.cross_entropy_grad(*inputs.values(), dy)}


def _elementwise(op: Callable, op_grad: Callable) -> tuple[Forward, Backward]:
    def forward(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
        return (op(inputs["x"]),)

    def backward(config: ModelConfig, params: Params, inputs: Arrays, dy: np.ndarray) -> tuple:
        return {}, {"x": op_grad(inputs["x"], dy)}

    return forward, backward


def _mixer(name: str) -> Op:
    def forward(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
        return load_mixer(name).forward(config, params, *inputs.values())[:1]

    def backward(config: ModelConfig, params: Params, inputs: Arrays, dy: np.ndarray) -> tuple:
        _, saved = load_mixer(name).forward(config, params, *inputs.values())
        dx_BTD, grads = load_mixer(name).backward(config, params, saved, dy)
        return grads, {"x_BTD": dx_BTD}

    return Op(("y_BTD",), forward, backward)


def _chunks(name: str) -> Op:
    """The mixer over one document in the pieces of chunks_of(), each from the state of the last."""

    def forward(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
        (x_BTD,) = inputs.values()
        position_BT = np.broadcast_to(np.arange(x_BTD.shape[1]), x_BTD.shape[:2])
        return load_mixer(name).forward(config, params, x_BTD, position_BT)[:1]

    return Op(("y_BTD",), forward, None)


def chunks_of(config: ModelConfig, seq_len: int) -> Iterator[slice]:
    """One token, up to a window, more than a window, most of the rest, then token by token."""
    W = config.num_visible_keys or seq_len // 4
    stops = [stop for stop in (1, W, 2 * W + 1, seq_len - 7) if stop < seq_len - 7]
    stops = dict.fromkeys((0, *stops, *range(max(seq_len - 7, 1), seq_len + 1)))
    for start, stop in pairwise(stops):
        yield slice(start, stop)


def _layer(name: str) -> Op:
    def forward(config: ModelConfig, params: Params, inputs: Arrays) -> tuple:
        return reference.layer(config, name, params, *inputs.values())[:1]

    def backward(config: ModelConfig, params: Params, inputs: Arrays, dy: np.ndarray) -> tuple:
        _, saved = reference.layer(config, name, params, *inputs.values())
        grads, dx_BTD = reference.layer_grad(config, name, params, saved, dy)
        return grads, {"x_BTD": dx_BTD}

    return Op(("y_BTD",), forward, backward)


# From the smallest to those made of them: the first that is wrong is where the fault lies.
OPS: dict[str, Op] = {
    "embed": Op(("x_BTD",), _embed, _embed_grad),
    "rms_norm": Op(("y_BTD",), _rms_norm, _rms_norm_grad),
    "linear": Op(("y",), _map(reference.linear), _map_grad(reference.linear_grad)),
    "gelu": Op(("y",), *_elementwise(reference.gelu, reference.gelu_grad)),
    "causal_conv": Op(("y_BTR", "conv_BWR"), _causal_conv, _causal_conv_grad),
    "block_diagonal": Op(
        ("y_BTR",), _map(reference.block_diagonal), _map_grad(reference.block_diagonal_grad)
    ),
    "bounded_sqrt": Op(
        ("y",), *_elementwise(reference.bounded_sqrt, reference.bounded_sqrt_grad), wide=("x",)
    ),
    "linear_scan": Op(
        ("h_BTR", "h_BR"), _linear_scan, _linear_scan_grad, wide=("a_BTR", "x_BTR", "h0_BR")
    ),
    "rg_lru": Op(("h_BTR", "h_BR"), _rg_lru, _rg_lru_grad, wide=("h0_BR",)),
    "rope": Op(("y_BTNH",), _rope, _rope_grad),
    "attention": Op(("y_BTNH",), _attention, _attention_grad),
    "unembed": Op(("logits_BTV",), _unembed, _unembed_grad),
    "cross_entropy": Op(("nll_BT",), _cross_entropy, _cross_entropy_grad, wide=("logits_BTV",)),
    "mlp": Op(("y_BTD",), _map(reference.mlp), _map_grad(reference.mlp_grad)),
    **{f"mixer.{name}": _mixer(name) for name in MIXERS},
    **{f"chunks.{name}": _chunks(name) for name in MIXERS},
    **{f"layer.{name}": _layer(name) for name in MIXERS},
}


def call(
    name: str,
    config: ModelConfig,
    params: Params,
    inputs: Arrays,
    doutputs: tuple[np.ndarray, ...],
) -> tuple[Arrays, Params, Arrays]:
    """The truth of Engine.op."""
    op = OPS[name]
    params, inputs = _wide(params), _wide(inputs)
    outputs = dict(zip(op.outputs, op.forward(config, params, inputs), strict=True))
    if op.backward is None:
        return outputs, {}, {}
    doutputs = (np.asarray(value, np.float64) for value in doutputs)
    return outputs, *op.backward(config, params, inputs, *doutputs)


def _wide(arrays: Arrays) -> Arrays:
    return {k: v if v.dtype.kind == "i" else np.asarray(v, np.float64) for k, v in arrays.items()}
