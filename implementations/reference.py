"""The equations in float64 NumPy, with gradients: the truth that every kernel and model is held to.

Ops come in pairs: `op(*inputs)`, and `op_grad(*inputs, dy)`, the gradients of its inputs in order;
they compute in the dtype they are given. The functions on a whole model convert to float64. Written
for clarity and for independence from both backends, never for speed.

Shapes: B batch, T and S time, D d_model, R d_rnn, F d_mlp, N query heads, K key-value heads,
H head_dim, G gate blocks, I and J widths in and out of one block, W taps, V vocabulary.
`params` is a flat dict, dotted name -> array; a mixer gets its own, prefix stripped.
"""

import math
from collections.abc import Iterable

import numpy as np

from implementations.config import ModelConfig
from implementations.engine import IGNORED, Batch, OptimizerConfig
from implementations.mixers import load_mixer
from implementations.parameters import param_specs

Params = dict[str, np.ndarray]

MAX_SQRT_GRADIENT = 1000.0  # released code: keeps the gradient finite where a is close to 1


# Recurrence and convolution.


def linear_scan(
    a_BTR: np.ndarray, x_BTR: np.ndarray, h0_BR: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """h_t = a_t h_{t-1} + x_t: every state, and the last one."""
    h_BTR = np.empty_like(x_BTR)
    h_BR = h0_BR
    for t in range(x_BTR.shape[1]):
        h_BR = a_BTR[:, t] * h_BR + x_BTR[:, t]
        h_BTR[:, t] = h_BR
    return h_BTR, h_BR


def linear_scan_grad(
    a_BTR: np.ndarray,
    x_BTR: np.ndarray,
    h0_BR: np.ndarray,
    dh_BTR: np.ndarray,
    dh_last_BR: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(da, dx, dh0): the same recurrence, backwards in time, over a_{t+1}."""
    h_BTR, _ = linear_scan(a_BTR, x_BTR, h0_BR)
    before_BTR = np.concatenate([h0_BR[:, None], h_BTR[:, :-1]], axis=1)
    dx_BTR = np.empty_like(x_BTR)
    carry_BR = dh_last_BR
    for t in reversed(range(x_BTR.shape[1])):
        dx_BTR[:, t] = carry_BR + dh_BTR[:, t]
        carry_BR = a_BTR[:, t] * dx_BTR[:, t]
    return dx_BTR * before_BTR, dx_BTR, carry_BR


def causal_conv(
    weight_WR: np.ndarray, bias_R: np.ndarray | None, x_BTR: np.ndarray, position_BT: np.ndarray
) -> np.ndarray:
    """Depthwise; weight[W - 1] meets the current input. Before a document's start inputs are 0."""
    W, T = weight_WR.shape[0], x_BTR.shape[1]
    y_BTR = np.zeros_like(x_BTR) if bias_R is None else np.zeros_like(x_BTR) + bias_R
    for back in range(min(W, T)):
        inside_BT1 = (position_BT >= back)[:, back:, None]
        y_BTR[:, back:] += weight_WR[W - 1 - back] * x_BTR[:, : T - back] * inside_BT1
    return y_BTR


def causal_conv_grad(
    weight_WR: np.ndarray,
    bias_R: np.ndarray | None,
    x_BTR: np.ndarray,
    position_BT: np.ndarray,
    dy_BTR: np.ndarray,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(dweight, dbias, dx)."""
    W, T = weight_WR.shape[0], x_BTR.shape[1]
    dweight_WR, dx_BTR = np.zeros_like(weight_WR), np.zeros_like(x_BTR)
    for back in range(min(W, T)):
        inner_BTR = dy_BTR[:, back:] * (position_BT >= back)[:, back:, None]
        dweight_WR[W - 1 - back] = np.sum(inner_BTR * x_BTR[:, : T - back], axis=(0, 1))
        dx_BTR[:, : T - back] += weight_WR[W - 1 - back] * inner_BTR
    return dweight_WR, None if bias_R is None else dy_BTR.sum((0, 1)), dx_BTR


def bounded_sqrt(u: np.ndarray) -> np.ndarray:
    """The square root; its derivative, below, never exceeds MAX_SQRT_GRADIENT."""
    return np.sqrt(u)


def bounded_sqrt_grad(u: np.ndarray, dy: np.ndarray) -> np.ndarray:
    return dy / (2 * np.sqrt(np.maximum(u, 1 / (4 * MAX_SQRT_GRADIENT**2))))


# Linear maps: {"weight": [in, out], "bias": [out]}, the bias absent where there is none.


def linear(params: Params, x: np.ndarray) -> np.ndarray:
    y = x @ params["weight"]
    return y + params["bias"] if "bias" in params else y


def linear_grad(params: Params, x: np.ndarray, dy: np.ndarray) -> tuple[Params, np.ndarray]:
    """(gradients by name, dx)."""
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    grads = {"weight": rows.T @ drows}
    if "bias" in params:
        grads["bias"] = drows.sum(0)
    return grads, dy @ params["weight"].T


def block_diagonal(params: Params, x_BTR: np.ndarray) -> np.ndarray:
    """weight [G, I, J]: channels in G consecutive blocks, each with its own matrix; bias [R]."""
    G, I, _ = params["weight"].shape  # noqa: E741
    x_BTGI = x_BTR.reshape(*x_BTR.shape[:-1], G, I)
    y_BTR = np.einsum("btgi,gij->btgj", x_BTGI, params["weight"], optimize=True)
    y_BTR = y_BTR.reshape(*x_BTR.shape[:-1], -1)
    return y_BTR + params["bias"] if "bias" in params else y_BTR


def block_diagonal_grad(
    params: Params, x_BTR: np.ndarray, dy_BTR: np.ndarray
) -> tuple[Params, np.ndarray]:
    """(gradients by name, dx)."""
    G, I, J = params["weight"].shape  # noqa: E741
    x_BTGI = x_BTR.reshape(*x_BTR.shape[:-1], G, I)
    dy_BTGJ = dy_BTR.reshape(*dy_BTR.shape[:-1], G, J)
    grads = {"weight": np.einsum("btgi,btgj->gij", x_BTGI, dy_BTGJ, optimize=True)}
    if "bias" in params:
        grads["bias"] = dy_BTR.sum((0, 1))
    dx_BTGI = np.einsum("btgj,gij->btgi", dy_BTGJ, params["weight"], optimize=True)
    return grads, dx_BTGI.reshape(x_BTR.shape)


def mlp(params: Params, x_BTD: np.ndarray) -> np.ndarray:
    """linear_down(gelu(linear_gate x) * linear_up x): section 2.2."""
    gate_BTF = gelu(linear(within(params, "linear_gate"), x_BTD))
    up_BTF = linear(within(params, "linear_up"), x_BTD)
    return linear(within(params, "linear_down"), gate_BTF * up_BTF)


def mlp_grad(params: Params, x_BTD: np.ndarray, dy_BTD: np.ndarray) -> tuple[Params, np.ndarray]:
    """(gradients by name, dx)."""
    gate, up, down = (within(params, f"linear_{name}") for name in ("gate", "up", "down"))
    before_BTF, up_BTF = linear(gate, x_BTD), linear(up, x_BTD)
    gate_BTF = gelu(before_BTF)
    ddown, dinner_BTF = linear_grad(down, gate_BTF * up_BTF, dy_BTD)
    dgate, dx_gate_BTD = linear_grad(gate, x_BTD, gelu_grad(before_BTF, dinner_BTF * up_BTF))
    dup, dx_up_BTD = linear_grad(up, x_BTD, dinner_BTF * gate_BTF)
    grads = under(linear_gate=dgate, linear_up=dup, linear_down=ddown)
    return grads, dx_gate_BTD + dx_up_BTD


def layer(
    config: ModelConfig, name: str, params: Params, x_BTD: np.ndarray, position_BT: np.ndarray
) -> tuple[np.ndarray, tuple]:
    """u = x + mixer(norm(x)); u + mlp(norm(u)); and what its gradient needs: x, the mixer's, u."""
    eps = config.rms_norm_eps
    normed_BTD = rms_norm(params["mixer_norm.scale"], x_BTD, eps)
    mixed_BTD, mixer_saved = load_mixer(name).forward(
        config, within(params, "mixer"), normed_BTD, position_BT
    )
    u_BTD = x_BTD + mixed_BTD
    y_BTD = u_BTD + mlp(within(params, "mlp"), rms_norm(params["mlp_norm.scale"], u_BTD, eps))
    return y_BTD, (x_BTD, mixer_saved, u_BTD)


def layer_grad(
    config: ModelConfig, name: str, params: Params, saved: tuple, dy_BTD: np.ndarray
) -> tuple[Params, np.ndarray]:
    """(gradients by name, dx)."""
    eps = config.rms_norm_eps
    x_BTD, mixer_saved, u_BTD = saved
    normed_BTD = rms_norm(params["mlp_norm.scale"], u_BTD, eps)
    dmlp, dnormed_BTD = mlp_grad(within(params, "mlp"), normed_BTD, dy_BTD)
    dmlp_scale, du_BTD = rms_norm_grad(params["mlp_norm.scale"], u_BTD, eps, dnormed_BTD)
    du_BTD = du_BTD + dy_BTD
    dnormed_BTD, dmixer = load_mixer(name).backward(
        config, within(params, "mixer"), mixer_saved, du_BTD
    )
    dmixer_scale, dx_BTD = rms_norm_grad(params["mixer_norm.scale"], x_BTD, eps, dnormed_BTD)
    norms = {"mixer_norm.scale": dmixer_scale, "mlp_norm.scale": dmlp_scale}
    return norms | under(mixer=dmixer, mlp=dmlp), dx_BTD + du_BTD


# Norm and elementwise functions.


def rms_norm(scale_D: np.ndarray, x_BTD: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * (1 + scale)."""
    return x_BTD / np.sqrt(np.mean(x_BTD**2, axis=-1, keepdims=True) + eps) * (1 + scale_D)


def rms_norm_grad(
    scale_D: np.ndarray, x_BTD: np.ndarray, eps: float, dy_BTD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(dscale, dx)."""
    inverse_BT1 = 1 / np.sqrt(np.mean(x_BTD**2, axis=-1, keepdims=True) + eps)
    unit_BTD = x_BTD * inverse_BT1
    dunit_BTD = dy_BTD * (1 + scale_D)
    along_BT1 = np.mean(dunit_BTD * unit_BTD, axis=-1, keepdims=True)
    dscale_D = np.sum(dy_BTD * unit_BTD, axis=(0, 1))
    return dscale_D, inverse_BT1 * (dunit_BTD - unit_BTD * along_BT1)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of GELU (released code)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_grad(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    slope = math.sqrt(2 / math.pi)
    tanh = np.tanh(slope * (x + 0.044715 * x**3))
    inner = slope * (1 + 3 * 0.044715 * x**2)
    return dy * 0.5 * (1 + tanh + x * (1 - tanh**2) * inner)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))  # exact near 0 too, where 1 + tanh cancels


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def soft_cap(x: np.ndarray, cap: float | None) -> np.ndarray:
    """cap * tanh(x / cap): within (-cap, cap); None leaves x as it is."""
    return x if cap is None else cap * np.tanh(x / cap)


def soft_cap_grad(x: np.ndarray, cap: float | None, dy: np.ndarray) -> np.ndarray:
    return dy if cap is None else dy * (1 - np.tanh(x / cap) ** 2)


# Attention.


def rope(x_BTNH: np.ndarray, position_BT: np.ndarray, rope_dim: int, base: float) -> np.ndarray:
    """Rotary positions: channel i turns with channel i + rope_dim / 2, the others stay."""
    half = rope_dim // 2
    frequency = base ** (-np.arange(half) / max(half, 1))
    angle = position_BT[:, :, None, None] * frequency
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = x_BTNH[..., :half], x_BTNH[..., half:rope_dim]
    turned = [first * cos - second * sin, second * cos + first * sin, x_BTNH[..., rope_dim:]]
    return np.concatenate(turned, axis=-1)


def rope_grad(
    position_BT: np.ndarray, rope_dim: int, base: float, dy_BTNH: np.ndarray
) -> np.ndarray:
    """dx: a rotation's transpose turns back."""
    return rope(dy_BTNH, -position_BT, rope_dim, base)


def is_visible(position_BT: np.ndarray, num_visible_keys: int | None) -> np.ndarray:
    """[B, T, S]: whether query t sees key s, at a distance of at most min(W - 1, position of t)."""
    T = position_BT.shape[1]
    distance_TS = np.arange(T)[:, None] - np.arange(T)
    reach_BT = position_BT
    if num_visible_keys is not None:
        reach_BT = np.minimum(reach_BT, num_visible_keys - 1)
    return (distance_TS >= 0) & (distance_TS <= reach_BT[:, :, None])


def attention(
    q_BTNH: np.ndarray,
    k_BSKH: np.ndarray,
    v_BSKH: np.ndarray,
    position_BT: np.ndarray,
    num_visible_keys: int | None,
) -> np.ndarray:
    """Softmax attention, scores times head_dim^-1/2; head n uses key-value head n // (N / K)."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKMH = q_BTNH.reshape(B, T, K, N // K, H)
    probability_BKMTS = _attention_weights(q_BTKMH, k_BSKH, position_BT, num_visible_keys)
    y_BTKMH = np.einsum("bkmts,bskh->btkmh", probability_BKMTS, v_BSKH, optimize=True)
    return y_BTKMH.reshape(B, T, N, H)


def attention_grad(
    q_BTNH: np.ndarray,
    k_BSKH: np.ndarray,
    v_BSKH: np.ndarray,
    position_BT: np.ndarray,
    num_visible_keys: int | None,
    dy_BTNH: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dq, dk, dv)."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKMH, dy_BTKMH = (array.reshape(B, T, K, N // K, H) for array in (q_BTNH, dy_BTNH))
    p_BKMTS = _attention_weights(q_BTKMH, k_BSKH, position_BT, num_visible_keys)
    dp_BKMTS = np.einsum("btkmh,bskh->bkmts", dy_BTKMH, v_BSKH, optimize=True)
    dscore = p_BKMTS * (dp_BKMTS - np.sum(p_BKMTS * dp_BKMTS, axis=-1, keepdims=True)) * H**-0.5
    dq_BTKMH = np.einsum("bkmts,bskh->btkmh", dscore, k_BSKH, optimize=True)
    dk_BSKH = np.einsum("bkmts,btkmh->bskh", dscore, q_BTKMH, optimize=True)
    dv_BSKH = np.einsum("bkmts,btkmh->bskh", p_BKMTS, dy_BTKMH, optimize=True)
    return dq_BTKMH.reshape(B, T, N, H), dk_BSKH, dv_BSKH


def _attention_weights(
    q_BTKMH: np.ndarray, k_BSKH: np.ndarray, position_BT: np.ndarray, num_visible_keys: int | None
) -> np.ndarray:
    score_BKMTS = np.einsum("btkmh,bskh->bkmts", q_BTKMH, k_BSKH, optimize=True)
    score_BKMTS *= q_BTKMH.shape[-1] ** -0.5
    visible_BTS = is_visible(position_BT, num_visible_keys)
    score_BKMTS = np.where(visible_BTS[:, None, None], score_BKMTS, -np.inf)
    weight_BKMTS = np.exp(score_BKMTS - score_BKMTS.max(-1, keepdims=True))
    return weight_BKMTS / weight_BKMTS.sum(-1, keepdims=True)


# Loss.


def cross_entropy(logits_BTV: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
    """Negative log likelihood of each target, [B, T], nats; 0 where IGNORED."""
    top_BT1 = logits_BTV.max(-1, keepdims=True)
    total_BT1 = top_BT1 + np.log(np.exp(logits_BTV - top_BT1).sum(-1, keepdims=True))
    is_scored_BT = targets_BT != IGNORED
    index_BT1 = np.where(is_scored_BT, targets_BT, 0)[..., None]
    nll_BT1 = total_BT1 - np.take_along_axis(logits_BTV, index_BT1, axis=-1)
    return np.where(is_scored_BT, nll_BT1[..., 0], 0.0)


def cross_entropy_grad(
    logits_BTV: np.ndarray, targets_BT: np.ndarray, dnll_BT: np.ndarray
) -> np.ndarray:
    """dlogits."""
    weight_BTV = np.exp(logits_BTV - logits_BTV.max(-1, keepdims=True))
    dlogits_BTV = weight_BTV / weight_BTV.sum(-1, keepdims=True)
    is_scored_BT1 = (targets_BT != IGNORED)[..., None]
    index_BT1 = np.where(is_scored_BT1, targets_BT[..., None], 0)
    at_target_BT1 = np.take_along_axis(dlogits_BTV, index_BT1, axis=-1)
    np.put_along_axis(dlogits_BTV, index_BT1, at_target_BT1 - 1, axis=-1)
    return np.where(is_scored_BT1, dlogits_BTV, 0.0) * dnll_BT[..., None]


# The whole model, in float64.


def logits(
    config: ModelConfig, params: Params, tokens_BT: np.ndarray, position_BT: np.ndarray
) -> np.ndarray:
    """[B, T, V]."""
    return _forward(config, _float64(params), tokens_BT, position_BT)[0]


def evaluate(config: ModelConfig, params: Params, batch: Batch) -> np.ndarray:
    """Negative log likelihood of each target, [B, T], nats; 0 where IGNORED."""
    return cross_entropy(
        logits(config, params, batch.tokens_BT, batch.position_BT), batch.targets_BT
    )


def activations(config: ModelConfig, params: Params, batch: Batch) -> Params:
    """The output of every layer, by the name of its parameters and in the order of computation;
    before a layer that ends a block, its input too (`linear_out.input`: of the attention)."""
    params = _float64(params)
    logits_BTV, saved = _forward(config, params, batch.tokens_BT, batch.position_BT)
    *layers, last_BTD = saved
    found = {"embedding": layers[0][0]}
    for index, (name, (x_BTD, mixer_saved, u_BTD)) in enumerate(
        zip(config.layer_mixers, layers, strict=True)
    ):
        inner = within(params, f"layers.{index}")
        normed_BTD = rms_norm(inner["mlp_norm.scale"], u_BTD, config.rms_norm_eps)
        gate, up = (within(inner, f"mlp.linear_{part}") for part in ("gate", "up"))
        next_BTD = layers[index + 1][0] if index + 1 < len(layers) else last_BTD
        found |= under(
            **{
                f"layers.{index}": {
                    "mixer_norm": rms_norm(inner["mixer_norm.scale"], x_BTD, config.rms_norm_eps),
                    **under(
                        mixer=load_mixer(name).activations(within(inner, "mixer"), mixer_saved)
                    ),
                    "mixer": u_BTD - x_BTD,
                    "mlp_norm": normed_BTD,
                    "mlp.linear_gate": linear(gate, normed_BTD),
                    "mlp.linear_up": linear(up, normed_BTD),
                    "mlp": next_BTD - u_BTD,
                }
            }
        )
        found[f"layers.{index}"] = next_BTD
    found["final_norm"] = rms_norm(params["final_norm.scale"], last_BTD, config.rms_norm_eps)
    return found | {"logits": logits_BTV}


def loss_and_grad(config: ModelConfig, params: Params, batch: Batch) -> tuple[float, Params]:
    """Mean loss over scored targets, nats per token, and its gradient by parameter name."""
    params = _float64(params)
    logits_BTV, saved = _forward(config, params, batch.tokens_BT, batch.position_BT)
    num_scored = max(np.count_nonzero(batch.targets_BT != IGNORED), 1)
    loss = float(cross_entropy(logits_BTV, batch.targets_BT).sum() / num_scored)
    dnll_BT = np.full(batch.targets_BT.shape, 1 / num_scored)
    dlogits_BTV = cross_entropy_grad(logits_BTV, batch.targets_BT, dnll_BT)
    grads = _backward(config, params, batch.tokens_BT, saved, dlogits_BTV)
    return loss, {spec.name: grads[spec.name] for spec in param_specs(config)}


def _forward(
    config: ModelConfig, params: Params, tokens_BT: np.ndarray, position_BT: np.ndarray
) -> tuple[np.ndarray, list]:
    """Logits, and of every layer what its backward pass needs; then the last x."""
    eps, saved = config.rms_norm_eps, []
    x_BTD = params["embedding.weight"][tokens_BT]
    if config.scale_embeddings:
        x_BTD = x_BTD * math.sqrt(config.d_model)
    for index, name in enumerate(config.layer_mixers):
        x_BTD, layer_saved = layer(
            config, name, within(params, f"layers.{index}"), x_BTD, position_BT
        )
        saved.append(layer_saved)
    saved.append(x_BTD)
    last_BTD = rms_norm(params["final_norm.scale"], x_BTD, eps)
    return soft_cap(last_BTD @ params["embedding.weight"].T, config.logit_soft_cap), saved


def _backward(
    config: ModelConfig,
    params: Params,
    tokens_BT: np.ndarray,
    saved: list,
    dlogits_BTV: np.ndarray,
) -> Params:
    eps, grads = config.rms_norm_eps, {}
    embedding_VD = params["embedding.weight"]
    *saved, x_BTD = saved
    last_BTD = rms_norm(params["final_norm.scale"], x_BTD, eps)
    uncapped_BTV = last_BTD @ embedding_VD.T
    dlogits_BTV = soft_cap_grad(uncapped_BTV, config.logit_soft_cap, dlogits_BTV)
    dembedding_VD = np.einsum("btv,btd->vd", dlogits_BTV, last_BTD, optimize=True)
    grads["final_norm.scale"], dx_BTD = rms_norm_grad(
        params["final_norm.scale"], x_BTD, eps, dlogits_BTV @ embedding_VD
    )
    for index, name in reversed(list(enumerate(config.layer_mixers))):
        dlayer, dx_BTD = layer_grad(
            config, name, within(params, f"layers.{index}"), saved[index], dx_BTD
        )
        grads |= under(**{f"layers.{index}": dlayer})
    if config.scale_embeddings:
        dx_BTD = dx_BTD * math.sqrt(config.d_model)
    np.add.at(dembedding_VD, tokens_BT, dx_BTD)
    grads["embedding.weight"] = dembedding_VD
    return grads


# The optimizer, in float64: OptimizerConfig says what it does.


def learning_rate(optimizer: OptimizerConfig, step: int) -> float:
    """The rate of a step, counted from 0: linear warm-up, then a cosine down to num_steps."""
    if step < optimizer.num_warmup_steps:
        return optimizer.learning_rate * (step + 1) / optimizer.num_warmup_steps
    length = max(optimizer.num_steps - optimizer.num_warmup_steps, 1)
    progress = min((step - optimizer.num_warmup_steps) / length, 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    fraction = optimizer.final_fraction
    return optimizer.learning_rate * (fraction + (1 - fraction) * cosine)


def adamw(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    step: int,
    params: Params,
    grads: Params,
    moments: tuple[Params, Params],
) -> tuple[Params, tuple[Params, Params]]:
    """New parameters and moments after the update number `step`, counted from 0.

    The gradient's global norm is clipped, both moments are corrected for their zero start, eps is
    added outside the root; decay, on the decayed parameters alone, is scaled by the rate too.
    """
    rate = learning_rate(optimizer, step)
    beta1, beta2 = optimizer.beta1, optimizer.beta2
    norm = math.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
    shrink = min(1.0, optimizer.clip_norm / norm) if norm > 0 else 1.0
    updated, first, second = {}, {}, {}
    for spec in param_specs(config):
        name = spec.name
        grad = grads[name] * shrink
        first[name] = beta1 * moments[0][name] + (1 - beta1) * grad
        second[name] = beta2 * moments[1][name] + (1 - beta2) * grad**2
        mean = first[name] / (1 - beta1 ** (step + 1))
        square = second[name] / (1 - beta2 ** (step + 1))
        decay = optimizer.weight_decay * params[name] if spec.decayed else 0.0
        updated[name] = params[name] - rate * (mean / (np.sqrt(square) + optimizer.eps) + decay)
    return updated, (first, second)


def train(
    config: ModelConfig, params: Params, batches: Iterable[Batch], optimizer: OptimizerConfig
) -> tuple[list[float], Params]:
    """One step a batch, from zero moments: the loss before each step, and the last parameters."""
    params, losses = _float64(params), []
    zeros = {name: np.zeros_like(value) for name, value in params.items()}
    moments = (zeros, zeros)
    for step, batch in enumerate(batches):
        loss, grads = loss_and_grad(config, params, batch)
        losses.append(loss)
        params, moments = adamw(config, optimizer, step, params, grads, moments)
    return losses, params


# Names.


def within(params: Params, prefix: str) -> Params:
    """The parameters below a prefix, which is stripped."""
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in params.items() if name.startswith(start)}


def under(**groups: Params) -> Params:
    """The inverse of within: every group's parameters, below the group's name."""
    return {
        f"{key}.{name}": value for key, group in groups.items() for name, value in group.items()
    }


def _float64(params: Params) -> Params:
    return {name: np.asarray(value, np.float64) for name, value in params.items()}
