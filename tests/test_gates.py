"""The gates of the recurrent mixer, in NumPy: against plain loops, each other and differences."""

import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny
from test_reference import POSITION_BT, B, T, check_gradient, normal, small, small_params

from implementations import cost, gates, reference
from implementations.config import GATES
from implementations.mixers import load_mixer
from implementations.parameters import draw, param_specs

EXACT = 1e-13  # two orders of the same float64 operations

SETTINGS = {
    **{gate: {"gate": gate} for gate in GATES},
    "another exponent": {"decay_exponent": 3.0},
    "inputs as they are": {"normalize_input": False},
    "complex inputs as they are": {"gate": "cg_lru", "normalize_input": False},
    "no biases": {"gate": "cg_lru", "biases": False},
}


def unit_of(**settings):
    """(config, parameters of its first unit, x, h0); blocks of four channels."""
    config = small("hawk", **settings)
    params = reference.within(small_params(config), "layers.0.mixer.rg_lru")
    return config, params, normal(B, T, config.d_rnn), normal(B, config.d_rnn, seed=5)


def gate_of(params, name, x_BTR):
    return reference.block_diagonal(reference.within(params, name), x_BTR)


def states(config, params, x_BTR, h0_BR, position_BT=POSITION_BT):
    return gates.rg_lru(config, params, x_BTR, position_BT, h0_BR)[0]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loop(alpha, beta, u, h0):
    """h_t = alpha h_{t-1} + beta u_t; at a document's start u_t."""
    h, before = np.zeros_like(u), np.broadcast_to(h0, u[:, 0].shape).copy()
    for b, t in np.ndindex(B, T):
        last = before[b] if t == 0 else h[b, t - 1]
        is_start = POSITION_BT[b, t] == 0
        h[b, t] = u[b, t] if is_start else alpha[b, t] * last + beta[b, t] * u[b, t]
    return h


# The equations of the paper, written down a second time.


@pytest.mark.parametrize("gate", ["gru", "mamba"])
def test_gates_of_appendix_a(gate):
    config, params, x, h0 = unit_of(gate=gate)
    r = sigmoid(gate_of(params, "a_gate", x))
    A = np.log1p(np.exp(params["a_param"])) if gate == "mamba" else 1.0
    alpha = (1 - r) ** A
    want = loop(alpha, (1 - alpha) / A, x, h0)
    np.testing.assert_allclose(states(config, params, x, h0), want, atol=1e-12)


def test_the_complex_gate_of_appendix_b():
    config, params, x, h0 = unit_of(gate="cg_lru", decay_exponent=3.0)
    half = config.d_rnn // 2
    r, i = sigmoid(gate_of(params, "a_gate", x)), sigmoid(gate_of(params, "input_gate", x))
    alpha = sigmoid(-params["a_param"]) ** (3 * r) * np.exp(1j * params["theta"] * r)
    z, z0 = x[..., :half] + 1j * x[..., half:], h0[:, :half] + 1j * h0[:, half:]
    want = loop(alpha, np.sqrt(1 - abs(alpha) ** 2), i * z, z0[0])
    found = states(config, params, x, np.tile(h0[:1], (B, 1)))
    np.testing.assert_allclose(found, np.concatenate([want.real, want.imag], -1), atol=1e-12)


# What one gate is of another.


def test_lru_is_rg_lru_with_gates_pinned_open():
    config, params, x, h0 = unit_of(gate="lru")
    whole = replace(config, gate="rg_lru")
    shut = {"weight": np.zeros((3, 4, 4)), "bias": np.full(12, 800.0)}  # its sigmoid is 1
    opened = reference.under(a_gate=shut, input_gate=shut) | params
    np.testing.assert_array_equal(states(config, params, x, h0), states(whole, opened, x, h0))


@pytest.mark.parametrize(("gate", "kept"), [("no_recurrence_gate", "input_gate"),
                                            ("no_input_gate", "a_gate")])  # fmt: skip
def test_one_gate_less_is_that_gate_pinned_open(gate, kept):
    config, params, x, h0 = unit_of(gate=gate)
    assert {name.partition(".")[0] for name in params} == {kept, "a_param"}
    (gone,) = {"a_gate", "input_gate"} - {kept}
    shut = {"weight": np.zeros((3, 4, 4)), "bias": np.full(12, 800.0)}
    opened = reference.under(**{gone: shut}) | params
    whole = replace(config, gate="rg_lru")
    np.testing.assert_array_equal(states(config, params, x, h0), states(whole, opened, x, h0))


def test_without_a_phase_the_complex_gate_is_two_real_channels_that_share_gates():
    config, params, x, h0 = unit_of(gate="cg_lru")
    params["theta"] = np.zeros_like(params["theta"])
    half = config.d_rnn // 2
    found = states(config, params, x, h0)
    a_gate, i_gate = gate_of(params, "a_gate", x), gate_of(params, "input_gate", x)
    log_alpha = -8 * reference.softplus(params["a_param"]) * sigmoid(a_gate)
    alpha, beta = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    for part in (slice(None, half), slice(half, None)):
        for b in range(B):
            want = loop(alpha, beta, sigmoid(i_gate) * x[..., part], h0[b, part])
            np.testing.assert_allclose(found[b, :, part], want[b], atol=1e-12)


def test_mamba_with_a_of_one_is_gru():
    config, params, x, h0 = unit_of(gate="gru")
    one = np.full(config.d_rnn, np.log(np.expm1(1.0)))
    found = states(replace(config, gate="mamba"), params | {"a_param": one}, x, h0)
    np.testing.assert_allclose(states(config, params, x, h0), found, rtol=0, atol=EXACT)


def test_inputs_as_they_are():
    config, params, x, h0 = unit_of(normalize_input=False)
    alpha = sigmoid(-params["a_param"]) ** (8 * sigmoid(gate_of(params, "a_gate", x)))
    want = loop(alpha, np.ones_like(alpha), sigmoid(gate_of(params, "input_gate", x)) * x, h0[0])
    found = states(config, params, x, np.tile(h0[:1], (B, 1)))
    np.testing.assert_allclose(found, want, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_a_state_carries_on(gate):
    config, params, x, h0 = unit_of(gate=gate)
    position_BT = np.tile(np.arange(3, 3 + T), (B, 1))
    whole, last = gates.rg_lru(config, params, x, position_BT, h0)
    first, middle = gates.rg_lru(config, params, x[:, :4], position_BT[:, :4], h0)
    rest, end = gates.rg_lru(config, params, x[:, 4:], position_BT[:, 4:], middle)
    np.testing.assert_allclose(np.concatenate([first, rest], 1), whole, atol=EXACT)
    np.testing.assert_allclose(end, last, atol=EXACT)


# Gradients.


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients(name):
    config, params, x, h0 = unit_of(**SETTINGS[name])
    dh, dh_last = normal(B, T, config.d_rnn, seed=9), normal(B, config.d_rnn, seed=8)
    position_BT = POSITION_BT + np.array([[2], [0]])  # row 0 goes on from h0
    names = list(params)

    def loss(x, h0, *values):
        given = dict(zip(names, values, strict=True))
        h, last = gates.rg_lru(config, given, x, position_BT, h0)
        return np.sum(h * dh) + np.sum(last * dh_last)

    grads, dx, dh0 = gates.rg_lru_grad(config, params, x, position_BT, h0, dh, dh_last)
    assert {n: g.shape for n, g in grads.items()} == {n: p.shape for n, p in params.items()}
    assert all(np.abs(g).max() > 0 for g in grads.values())
    check_gradient(loss, (x, h0, *params.values()), (dx, dh0, *(grads[n] for n in names)))


@pytest.mark.parametrize("settings", [{"conv_width": 0}, {"conv_width": 8}, {"gate": "cg_lru"}])
def test_mixer_gradients(settings):
    config = small("hawk", **settings)
    params = reference.within(small_params(config), "layers.0.mixer")
    assert any(name.startswith("conv_1d") for name in params) == (config.conv_width > 0)
    module, names = load_mixer("rg_lru"), list(params)
    x_BTD, dy_BTD = normal(B, T, config.d_model), normal(B, T, config.d_model, seed=9)
    _, saved = module.forward(config, params, x_BTD, POSITION_BT)
    dx, grads = module.backward(config, params, saved, dy_BTD)
    assert grads.keys() == params.keys()

    def loss(x, *values):
        given = dict(zip(names, values, strict=True))
        return np.sum(dy_BTD * module.forward(config, given, x, POSITION_BT)[0])

    check_gradient(loss, (x_BTD, *params.values()), (dx, *(grads[n] for n in names)))


# Parameters, states and costs.


@pytest.mark.parametrize("gate", GATES)
def test_initial_values(gate):
    config = tiny("hawk", gate=gate, d_rnn=4096, num_layers=1)
    params = reference.within(draw(config, seed=0), "layers.0.mixer.rg_lru")
    params = {name: value.astype(np.float64) for name, value in params.items()}
    width = config.d_rnn // (2 if gate == "cg_lru" else 1)
    kind = GATES[gate]
    if kind.has_time_step:
        step = np.log(reference.softplus(params["a_gate.bias"]))
        low, high = np.log(0.001), np.log(0.1)
        assert step.min() > low - 1e-4
        assert step.max() < high + 1e-4
        assert abs(step.mean() - (low + high) / 2) < 0.1
    elif kind.has_recurrence_gate:
        assert params["a_gate.weight"].shape == (4, 1024, width // 4)
        assert not params["a_gate.bias"].any()
        assert params["a_gate.bias"].shape == (width,)
    if gate == "mamba":
        np.testing.assert_allclose(reference.softplus(params["a_param"]), 1.0, atol=1e-6)
    if gate == "cg_lru":
        theta = params["theta"]
        assert theta.min() > 0
        assert theta.max() < 0.1 * np.pi
        assert abs(theta.mean() - 0.05 * np.pi) < 0.01


def test_a_to_the_exponent_is_uniform_whatever_the_exponent():
    config = tiny("hawk", decay_exponent=2.0, d_rnn=4096, num_layers=1)
    a_param = draw(config, seed=0)["layers.0.mixer.rg_lru.a_param"].astype(np.float64)
    power = np.exp(-2 * reference.softplus(a_param))
    assert power.min() > 0.9 - 1e-6
    assert power.max() < 0.999 + 1e-6
    assert abs(power.mean() - 0.9495) < 0.002


@pytest.mark.parametrize(
    ("gate", "num_gates", "others", "flops"),
    [  # gates of R R / G weights and R biases; parameters a channel beside them; FLOPs a channel
        ("rg_lru", 2, 1, 6),
        ("no_recurrence_gate", 1, 1, 6),
        ("no_input_gate", 1, 1, 5),
        ("lru", 0, 1, 5),
        ("gru", 1, 0, 3),
        ("mamba", 1, 1, 5),
        ("cg_lru", 1, 1, 7),  # two gates of half the outputs; a_param and theta of half
    ],
)
def test_costs(gate, num_gates, others, flops):
    config = tiny("hawk", gate=gate, num_layers=1)
    R, G = config.d_rnn, config.num_gate_blocks
    unit = [s for s in param_specs(config) if ".rg_lru." in s.name]
    assert sum(s.size for s in unit) == num_gates * (R * R // G + R) + others * R
    products = num_gates * 2 * R * R // G
    mixing = load_mixer("rg_lru").mixing_flops(config, 1)
    assert mixing == 2 * config.conv_width * R + products + flops * R
    assert cost.scan_arrays("rg_lru", gate) == (2 + num_gates, 4 + 2 * num_gates)


def test_a_state_without_a_convolution_is_h_alone():
    sizes = [
        cost.cache_bytes(
            tiny("hawk", conv_width=W, num_layers=1), batch_size=1, capacity=9, dtype="bfloat16"
        )
        for W in (0, 1, 2)
    ]
    assert sizes == [96 * 4, 96 * 4, 96 * 4 + 96 * 2]


# The door.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "grru"}, "gate='grru' is not known; known: rg_lru, no_recurrence_gate,"),
        ({"gate": "gru", "normalize_input": False}, "normalize_input=false with gate=gru"),
        ({"gate": "mamba", "decay_exponent": 4.0}, "decay_exponent=4.0 with gate=mamba"),
        ({"gate": "gru", "biases": False}, "biases=false with gate=gru"),
        ({"gate": "cg_lru", "d_rnn": 60}, "makes blocks of 15; must be even."),
        ({"decay_exponent": 0.0}, "decay_exponent=0.0; must be positive."),
        ({"conv_width": -1}, "conv_width=-1; must be from 0, which is no convolution, to 8."),
        ({"conv_width": 9}, "conv_width=9; must be from 0"),
    ],
)
def test_what_cannot_be_is_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tiny("hawk", **settings)
    assert "\n" not in str(error.value)


def test_a_model_without_a_recurrence_takes_no_notice_of_its_gate():
    assert tiny("mqa", gate="gru", biases=False).gate == "gru"
