"""reference.py against finite differences and plain loops: the truth must itself be true."""

import math
from itertools import pairwise

import numpy as np
import pytest
from conftest import FAMILIES, tiny

from implementations import gates, reference
from implementations.engine import IGNORED, Batch, OptimizerConfig
from implementations.mixers import load_mixer
from implementations.parameters import draw, param_specs

STEP = 1e-4  # of a central difference of fourth order, along a direction of norm 1
TOLERANCE = 1e-9  # of a directional derivative, relative to the norm of the gradient
EXACT = 1e-13  # two orders of the same float64 operations

POSITION_BT = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 0, 1, 2, 3]])  # one document; three
B, T = POSITION_BT.shape

SETTINGS = {
    "default": {},
    "grouped heads": {"num_kv_heads": 2, "rope_fraction": 0.5},
    "released code": {
        "rope_fraction": 0.5,
        "window_extra_key": True,
        "lambda_init": "code",
        "logit_soft_cap": 3.0,
        "scale_embeddings": True,
    },
    "no biases": {"biases": False, "rope_fraction": 0.0},
}


def small(family, **overrides):
    """Smaller than tiny; three layers, so that griffin has each of its mixers; a window of 3."""
    sizes = {"d_model": 8, "d_rnn": 12, "d_mlp": 10, "num_layers": 3, "head_dim": 4,
             "num_gate_blocks": 3, "vocab_size": 11}  # fmt: skip
    return tiny(family, **sizes, window_size=None if family == "mqa" else 3, **overrides)


def small_params(config):
    """Drawn, and then moved off zero: biases and norm scales must matter too."""
    rng = np.random.default_rng(3)
    values = draw(config, seed=0).items()
    return {name: value + 0.3 * rng.standard_normal(value.shape) for name, value in values}


def packed_batch(config):
    rng = np.random.default_rng(1)
    tokens_BT, targets_BT = rng.integers(config.vocab_size, size=(2, B, T))
    targets_BT[:, :-1][POSITION_BT[:, 1:] == 0] = IGNORED
    return Batch(tokens_BT, targets_BT, POSITION_BT)


def check_gradient(function, inputs, grads):
    """The derivative along a random direction of each input, against a central difference."""
    rng = np.random.default_rng(2)
    for index, (value, grad) in enumerate(zip(inputs, grads, strict=True)):
        direction = rng.standard_normal(value.shape)
        direction /= np.linalg.norm(direction)
        values = {
            step: function(*inputs[:index], value + step * STEP * direction, *inputs[index + 1 :])
            for step in (-2, -1, 1, 2)
        }
        true = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * STEP)
        error = abs(true - np.sum(grad * direction))
        bound = TOLERANCE * max(np.linalg.norm(grad), 1.0)
        assert error < bound, f"input {index}: derivative {true:.3e}, error {error:.1e}"


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def loss_of(op):
    """(scalar function, dy): the sum of dy * op(...), whose gradient op_grad(..., dy) must be."""

    def weigh(*inputs):
        y = op(*inputs)
        return float(np.sum(y * normal(*y.shape, seed=9)))

    return weigh


def test_linear_scan():
    a, x, dh = np.random.default_rng(0).uniform(0.1, 0.9, (3, B, T, 5))
    h0, dh_last = normal(2, B, 5)

    def loss(a, x, h0):
        h, h_last = reference.linear_scan(a, x, h0)
        return np.sum(h * dh) + np.sum(h_last * dh_last)

    h, h_last = reference.linear_scan(a, x, h0)
    np.testing.assert_array_equal(h[:, 0], a[:, 0] * h0 + x[:, 0])
    np.testing.assert_array_equal(h[:, 4], a[:, 4] * h[:, 3] + x[:, 4])
    np.testing.assert_array_equal(h[:, -1], h_last)
    check_gradient(loss, (a, x, h0), reference.linear_scan_grad(a, x, h0, dh, dh_last))


def test_causal_conv():
    weight_WR, bias_R, x_BTR, dy_BTR = normal(4, 5), normal(5), normal(B, T, 5), normal(B, T, 5)
    y_BTR = reference.causal_conv(weight_WR, bias_R, x_BTR, POSITION_BT)
    for b, t in np.ndindex(B, T):
        taps = min(3, POSITION_BT[b, t]) + 1
        want = bias_R + sum(weight_WR[3 - back] * x_BTR[b, t - back] for back in range(taps))
        np.testing.assert_allclose(y_BTR[b, t], want, atol=EXACT)

    grads = reference.causal_conv_grad(weight_WR, bias_R, x_BTR, POSITION_BT, dy_BTR)
    check_gradient(
        lambda *inputs: np.sum(dy_BTR * reference.causal_conv(*inputs, POSITION_BT)),
        (weight_WR, bias_R, x_BTR),
        grads,
    )
    assert reference.causal_conv_grad(weight_WR, None, x_BTR, POSITION_BT, dy_BTR)[1] is None


def test_causal_conv_may_be_wider_than_the_sequence():
    weight_WR, x_BTR = normal(9, 5), normal(1, 2, 5)
    y_BTR = reference.causal_conv(weight_WR, None, x_BTR, np.array([[0, 1]]))
    np.testing.assert_allclose(
        y_BTR[0, 1], weight_WR[8] * x_BTR[0, 1] + weight_WR[7] * x_BTR[0, 0], atol=EXACT
    )


def test_block_diagonal():
    weight, bias, x_BTR = normal(2, 3, 3), normal(6), normal(B, T, 6)
    dense = np.zeros((6, 6))
    dense[:3, :3], dense[3:, 3:] = weight

    def op(weight, bias, x):
        return reference.block_diagonal({"weight": weight, "bias": bias}, x)

    y_BTR = op(weight, bias, x_BTR)
    np.testing.assert_allclose(y_BTR, x_BTR @ dense + bias, atol=EXACT)
    params = {"weight": weight, "bias": bias}
    grads, dx = reference.block_diagonal_grad(params, x_BTR, normal(*y_BTR.shape, seed=9))
    check_gradient(loss_of(op), (weight, bias, x_BTR), (grads["weight"], grads["bias"], dx))


def test_linear():
    weight, bias, x = normal(6, 4), normal(4), normal(B, T, 6)

    def op(weight, bias, x):
        return reference.linear({"weight": weight, "bias": bias}, x)

    params = {"weight": weight, "bias": bias}
    grads, dx = reference.linear_grad(params, x, normal(B, T, 4, seed=9))
    check_gradient(loss_of(op), (weight, bias, x), (grads["weight"], grads["bias"], dx))


def test_mlp():
    x = normal(B, T, 6)
    names = ["linear_gate.weight", "linear_up.weight", "linear_down.weight", "linear_up.bias"]
    values = [normal(6, 8, seed=1), normal(6, 8, seed=2), normal(8, 6, seed=3), normal(8, seed=4)]

    def op(*values_and_x):
        return reference.mlp(dict(zip(names, values_and_x, strict=False)), values_and_x[-1])

    params = dict(zip(names, values, strict=True))
    grads, dx = reference.mlp_grad(params, x, normal(B, T, 6, seed=9))
    check_gradient(loss_of(op), (*values, x), (*(grads[name] for name in names), dx))


def test_rms_norm():
    scale, x = normal(6), normal(B, T, 6)

    def op(scale, x):
        return reference.rms_norm(scale, x, 0.1)

    y = op(np.zeros(6), x)
    np.testing.assert_allclose(y, x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1), atol=EXACT)
    grads = reference.rms_norm_grad(scale, x, 0.1, normal(B, T, 6, seed=9))
    check_gradient(loss_of(op), (scale, x), grads)


def test_elementwise_functions():
    x = np.linspace(-4, 4, 33)
    dy = normal(33, seed=9)
    check_gradient(loss_of(reference.gelu), (x,), (reference.gelu_grad(x, dy),))
    check_gradient(
        loss_of(lambda x: reference.soft_cap(x, 2.0)), (x,), (reference.soft_cap_grad(x, 2.0, dy),)
    )
    check_gradient(loss_of(reference.softplus), (x,), (dy * reference.sigmoid(x),))
    exact = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert 1e-5 < np.abs(reference.gelu(x) - exact).max() < 1e-3  # the tanh form, not the exact one
    np.testing.assert_allclose(reference.sigmoid(x), 1 / (1 + np.exp(-x)), atol=EXACT)
    np.testing.assert_array_equal(reference.soft_cap(x, None), x)


def test_the_derivative_of_the_square_root_is_bounded_by_1000():
    u, dy = np.linspace(0.01, 1.0, 20), normal(20, seed=9)
    check_gradient(loss_of(reference.bounded_sqrt), (u,), (reference.bounded_sqrt_grad(u, dy),))
    edge = 1 / (4 * 1000.0**2)
    u = np.array([0.0, 1e-300, edge / 2, edge, 4 * edge])
    slope = reference.bounded_sqrt_grad(u, np.ones(5))
    np.testing.assert_allclose(slope, [1000, 1000, 1000, 1000, 500])


def test_rope_turns_pairs_by_the_position_and_keeps_the_rest():
    x_BTNH = normal(B, T, 2, 8)
    y_BTNH = reference.rope(x_BTNH, POSITION_BT, 4, 10000.0)
    np.testing.assert_array_equal(y_BTNH[..., 4:], x_BTNH[..., 4:])
    turned = (x_BTNH[..., :2] + 1j * x_BTNH[..., 2:4]) * np.exp(
        1j * POSITION_BT[:, :, None, None] * np.array([1.0, 0.01])
    )
    np.testing.assert_allclose(y_BTNH[..., :2], turned.real, atol=EXACT)
    np.testing.assert_allclose(y_BTNH[..., 2:4], turned.imag, atol=EXACT)
    np.testing.assert_array_equal(reference.rope(x_BTNH, POSITION_BT, 0, 1e4), x_BTNH)

    dx = reference.rope_grad(POSITION_BT, 4, 10000.0, normal(*x_BTNH.shape, seed=9))
    check_gradient(loss_of(lambda x: reference.rope(x, POSITION_BT, 4, 10000.0)), (x_BTNH,), (dx,))


@pytest.mark.parametrize("num_visible_keys", [None, 3, 1])
def test_attention(num_visible_keys):
    N, K, H = 4, 2, 5
    q_BTNH = normal(B, T, N, H)
    k_BSKH, v_BSKH = normal(2, B, T, K, H, seed=1)

    def op(q, k, v):
        return reference.attention(q, k, v, POSITION_BT, num_visible_keys)

    y_BTNH = op(q_BTNH, k_BSKH, v_BSKH)
    for b, t, n in np.ndindex(B, T, N):
        W = T if num_visible_keys is None else num_visible_keys
        keys = slice(t - min(POSITION_BT[b, t], W - 1), t + 1)
        score = k_BSKH[b, keys, n // 2] @ q_BTNH[b, t, n] / math.sqrt(H)
        want = np.exp(score) @ v_BSKH[b, keys, n // 2] / np.exp(score).sum()
        np.testing.assert_allclose(y_BTNH[b, t, n], want, atol=EXACT)

    dy = normal(*y_BTNH.shape, seed=9)
    seen = (q_BTNH, k_BSKH, v_BSKH, POSITION_BT, num_visible_keys)
    check_gradient(loss_of(op), (q_BTNH, k_BSKH, v_BSKH), reference.attention_grad(*seen, dy))


def test_cross_entropy():
    logits_BTV = 5 * normal(B, T, 6)
    targets_BT = np.random.default_rng(0).integers(6, size=(B, T))
    targets_BT[0, 2] = IGNORED
    nll_BT = reference.cross_entropy(logits_BTV, targets_BT)
    assert nll_BT[0, 2] == 0.0
    row = logits_BTV[1, 3]
    assert nll_BT[1, 3] == pytest.approx(np.log(np.exp(row).sum()) - row[targets_BT[1, 3]])
    dlogits = reference.cross_entropy_grad(logits_BTV, targets_BT, normal(B, T, seed=9))
    check_gradient(
        loss_of(lambda x: reference.cross_entropy(x, targets_BT)), (logits_BTV,), (dlogits,)
    )
    far = reference.cross_entropy(np.array([[[1e4, 0.0]]]), np.array([[1]]))
    assert far[0, 0] == 1e4  # no overflow


def test_rg_lru_follows_the_equations_of_the_paper():
    config = small("hawk")
    params = reference.within(small_params(config), "layers.0.mixer.rg_lru")
    x_BTR = normal(B, T, config.d_rnn)
    r, i = (
        reference.sigmoid(reference.block_diagonal(reference.within(params, gate), x_BTR))
        for gate in ("a_gate", "input_gate")
    )
    a = reference.sigmoid(-params["a_param"]) ** (8 * r)  # equation 3
    want = np.zeros_like(x_BTR)
    for b, t in np.ndindex(B, T):
        if POSITION_BT[b, t] == 0:
            want[b, t] = i[b, t] * x_BTR[b, t]
        else:
            scale = np.sqrt(1 - a[b, t] ** 2)
            want[b, t] = a[b, t] * want[b, t - 1] + scale * i[b, t] * x_BTR[b, t]
    h_BTR, h_BR = gates.rg_lru(config, params, x_BTR, POSITION_BT, normal(B, config.d_rnn))
    np.testing.assert_allclose(h_BTR, want, atol=1e-12)
    np.testing.assert_array_equal(h_BTR[:, -1], h_BR)


def test_gradients_of_rg_lru_stay_finite_where_a_is_one():
    config = small("hawk")
    params = reference.within(small_params(config), "layers.0.mixer.rg_lru")
    params["a_param"] = np.full(config.d_rnn, -800.0)  # softplus is 0: the root's slope has no end
    x_BTR, dh_BTR = normal(2, B, T, config.d_rnn)
    h0_BR, dh_last_BR = normal(2, B, config.d_rnn)
    grads, dx_BTR, dh0_BR = gates.rg_lru_grad(
        config, params, x_BTR, POSITION_BT, h0_BR, dh_BTR, dh_last_BR
    )
    assert all(np.isfinite(value).all() for value in (*grads.values(), dx_BTR, dh0_BR))


@pytest.mark.parametrize("mixer", ["mqa", "rg_lru"])
def test_mixer_gradients(mixer):
    config = small("griffin", num_kv_heads=2)
    index = config.layer_mixers.index(mixer)
    params = reference.within(small_params(config), f"layers.{index}.mixer")
    module, names = load_mixer(mixer), list(params)
    x_BTD = normal(B, T, config.d_model)
    _, saved = module.forward(config, params, x_BTD, POSITION_BT)
    dx, grads = module.backward(config, params, saved, normal(*x_BTD.shape, seed=9))
    assert {n: g.shape for n, g in grads.items()} == {n: p.shape for n, p in params.items()}

    def op(x, *values):
        return module.forward(config, dict(zip(names, values, strict=True)), x, POSITION_BT)[0]

    check_gradient(loss_of(op), (x_BTD, *params.values()), (dx, *(grads[name] for name in names)))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_the_loss_in_every_parameter(family, settings):
    config = small(family, **SETTINGS[settings])
    params, batch = small_params(config), packed_batch(config)
    names = [spec.name for spec in param_specs(config)]
    loss, grads = reference.loss_and_grad(config, params, batch)
    assert list(grads) == names == list(params)
    assert all(np.abs(grad).max() > 0 for grad in grads.values())

    def loss_at(*values):
        nll_BT = reference.evaluate(config, dict(zip(names, values, strict=True)), batch)
        return nll_BT.sum() / np.count_nonzero(batch.targets_BT != IGNORED)

    assert loss == pytest.approx(loss_at(*params.values()), rel=EXACT)
    check_gradient(loss_at, tuple(params.values()), tuple(grads.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_separate_documents(family):
    config = small(family, num_kv_heads=2)
    params, batch = small_params(config), packed_batch(config)
    packed_BTV = reference.logits(config, params, batch.tokens_BT, batch.position_BT)
    starts = [*np.flatnonzero(POSITION_BT[1] == 0), T]
    for start, end in pairwise(starts):
        tokens_BT = batch.tokens_BT[1:, start:end]
        alone_BTV = reference.logits(config, params, tokens_BT, np.arange(end - start)[None])
        np.testing.assert_allclose(packed_BTV[1:, start:end], alone_BTV, atol=1e-12)


def test_settings_change_the_logits():
    config = small("griffin")
    params, batch = small_params(config), packed_batch(config)
    plain = reference.logits(config, params, batch.tokens_BT, batch.position_BT)
    for overrides in ({"rope_fraction": 0.5}, {"rope_base": 100.0}, {"window_extra_key": True},
                      {"logit_soft_cap": 3.0}, {"scale_embeddings": True}):  # fmt: skip
        changed = small("griffin", **overrides)
        logits = reference.logits(changed, params, batch.tokens_BT, batch.position_BT)
        assert np.abs(logits - plain).max() > 1e-3, overrides


def test_a_batch_without_scored_targets_has_no_loss_and_no_gradient():
    config = small("hawk")
    batch = packed_batch(config)
    nothing = Batch(batch.tokens_BT, np.full_like(batch.targets_BT, IGNORED), batch.position_BT)
    loss, grads = reference.loss_and_grad(config, small_params(config), nothing)
    assert loss == 0.0
    assert all(np.all(grad == 0) for grad in grads.values())


def test_learning_rate_warms_up_and_falls_to_its_fraction():
    optimizer = OptimizerConfig(
        learning_rate=1.0, num_warmup_steps=4, num_steps=12, final_fraction=0.2
    )
    rates = [reference.learning_rate(optimizer, step) for step in (0, 3, 4, 8, 12, 50)]
    np.testing.assert_allclose(rates, [0.25, 1.0, 1.0, 0.6, 0.2, 0.2])
    flat = OptimizerConfig(num_warmup_steps=3, num_steps=3)
    assert reference.learning_rate(flat, 2) == pytest.approx(flat.learning_rate)


def test_train_follows_the_rule_of_adamw():
    config = small("griffin")
    params, batch = small_params(config), packed_batch(config)
    optimizer = OptimizerConfig(num_warmup_steps=1, num_steps=4, clip_norm=0.05)
    losses, trained = reference.train(config, params, [batch, batch], optimizer)

    decayed = {spec.name for spec in param_specs(config) if spec.decayed}
    assert "layers.0.mixer.linear_x.weight" in decayed
    assert not {"embedding.weight", "layers.0.mixer.rg_lru.a_param"} & decayed
    values = {name: value.copy() for name, value in params.items()}
    m = {name: 0.0 for name in params}
    v = {name: 0.0 for name in params}
    for step in range(2):
        loss, grads = reference.loss_and_grad(config, values, batch)
        assert loss == pytest.approx(losses[step], rel=EXACT)
        norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
        assert norm > optimizer.clip_norm
        for name, grad in grads.items():
            clipped = grad * optimizer.clip_norm / norm
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.95 * v[name] + 0.05 * clipped**2
            ratio = m[name] / (1 - 0.9 ** (step + 1))
            ratio = ratio / (np.sqrt(v[name] / (1 - 0.95 ** (step + 1))) + 1e-8)
            if name in decayed:
                ratio = ratio + 0.1 * values[name]
            values[name] = values[name] - reference.learning_rate(optimizer, step) * ratio
    for name, value in values.items():
        np.testing.assert_allclose(trained[name], value, atol=1e-12, err_msg=name)


def test_training_lowers_the_loss():
    config = small("griffin")
    batch = packed_batch(config)
    optimizer = OptimizerConfig(num_warmup_steps=2, num_steps=12, learning_rate=0.02)
    losses, _ = reference.train(config, draw(config, seed=0), [batch] * 12, optimizer)
    assert losses[-1] < losses[0] - 0.5
