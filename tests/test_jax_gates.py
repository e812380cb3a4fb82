"""The gates in JAX, by every variant that is composed: values and gradients beside the floor's, in
float64; what one gate is of another; and the angles of a long sequence.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny
from scan_cases import normal, positions

from implementations import ops as truth
from implementations import reference
from implementations.config import GATES
from implementations.engine import Kernels
from implementations.jax_backend import ops
from implementations.jax_backend.kernels.rg_lru import rg_lru
from implementations.parameters import param_specs

B, T, R = 2, 37, 16
EXACT = 1e-12  # of the largest true value, in float64; measured < 1e-14
KERNELS = Kernels(linear_scan="analytic", attention="plain", layers="plain")
LONG = 20_000  # tokens
TOLERANCE = 1e-5  # of these in float32; measured 3.7e-6, and 1.4e-4 of phases summed in float32

QUICK = [({"gate": gate}, "analytic") for gate in GATES]
OTHERS = [
    (settings, variant)
    for gate, kind in GATES.items()
    for variant in ("analytic", "associative", "sequential")
    for settings in (
        {"gate": gate},
        *(
            ()
            if kind.has_time_step
            else (
                {"gate": gate, "normalize_input": False, "decay_exponent": 4.0},
                {"gate": gate, "biases": False, "num_gate_blocks": 1},
            )
        ),
    )
    if (settings, variant) not in QUICK
]


def small(**settings):
    return tiny("hawk", **{"d_model": 8, "d_rnn": R, "num_gate_blocks": 4} | settings)


def drawn(config, part, rng):
    """Parameters below a part of the first layer, none 0; memories from short to very long."""
    specs = {spec.name: spec.shape for spec in param_specs(config)}
    params = {
        name: normal(rng, *shape) * np.float32(shape[0] ** -0.5)
        for name, shape in reference.within(specs, "layers.0.mixer").items()
    }
    if "rg_lru.a_param" in params:
        params["rg_lru.a_param"] = -rng.uniform(0.5, 9, config.d_gate).astype(np.float32)
    return reference.within(params, part) if part else params


def errors(op, config, params, inputs, variant="analytic"):
    """Of an op's outputs, and of the gradients of all that it is given, in float64."""
    rng = np.random.default_rng(1)
    made = truth.OPS[op].forward(config, params, inputs)
    doutputs = tuple(normal(rng, *y.shape) for y in made)
    true = truth.call(op, config, params, inputs, doutputs)
    kernels = replace(KERNELS, linear_scan=variant)
    with jax.enable_x64(True):
        floats, integers = {}, {}
        for name, value in inputs.items():
            (integers if value.dtype.kind == "i" else floats)[name] = jnp.asarray(value)
        run = jax.jit(partial(ops.call, op, ops.Settings(config, kernels, "float64")))
        ours = run(
            {name: jnp.asarray(value, "float64") for name, value in params.items()},
            {name: jnp.asarray(value, "float64") for name, value in floats.items()},
            integers,
            tuple(jnp.asarray(value, "float64") for value in doutputs),
        )
    outputs = dict(zip(true[0], ours[0], strict=True))
    found = {}
    for got, wanted in zip((outputs, *ours[1:]), true, strict=True):
        assert got.keys() == wanted.keys()
        for name, want in wanted.items():
            found[name] = np.abs(np.asarray(got[name]) - want).max() / np.abs(want).max()
    return found


@pytest.mark.parametrize(
    ("settings", "variant"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_gate_and_its_gradients_are_true(settings, variant):
    config, rng = small(**settings), np.random.default_rng(0)
    inputs = {"x_BTR": normal(rng, B, T, R), "position_BT": positions("some", B, T)}
    inputs["position_BT"][0] += 3  # the first row goes on with a document
    inputs["h0_BR"] = normal(rng, B, R)
    found = errors("rg_lru", config, drawn(config, "rg_lru", rng), inputs, variant)
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("settings", [{"gate": "cg_lru", "conv_width": 0}, {"gate": "mamba"}],
                         ids=["cg_lru without a convolution", "mamba"])  # fmt: skip
@pytest.mark.parametrize("op", ["mixer.rg_lru", "chunks.rg_lru"])
def test_a_block_is_true_whole_and_in_pieces(op, settings):
    """In pieces down to single tokens, each from the state of the last."""
    config, rng = small(window_size=8, **settings), np.random.default_rng(0)
    inputs = {"x_BTD": normal(rng, B, T, config.d_model)}
    if op.startswith("mixer"):
        inputs["position_BT"] = positions("some", B, T)
    found = errors(op, config, drawn(config, "", rng), inputs)
    assert max(found.values()) < EXACT, found


# What one gate is of another.


def states(gate, *inputs, **settings):
    """In float64."""
    with jax.enable_x64(True):
        position_BT = jnp.asarray(positions("some", B, T))
        x, a_gate, input_gate, a_param = (v if v is None else jnp.asarray(v) for v in inputs)
        h0_BR = jnp.zeros((B, x.shape[2]))
        given = (x, a_gate, input_gate, a_param, position_BT, h0_BR, "analytic")
        return np.asarray(rg_lru(*given, gate=gate, **settings)[0])


def test_lru_is_rg_lru_with_its_gates_pinned_open():
    rng = np.random.default_rng(0)
    x_BTR, a_param_R = rng.standard_normal((B, T, R)), -rng.uniform(0.5, 9, R)
    is_open = np.full_like(x_BTR, 800.0)  # the sigmoid of which is 1
    pinned = states("rg_lru", x_BTR, is_open, is_open, a_param_R)
    np.testing.assert_array_equal(states("lru", x_BTR, None, None, a_param_R), pinned)


def test_cg_lru_without_phase_is_two_real_channels_that_share_gates():
    rng = np.random.default_rng(0)
    x_BTR, a_param_R = rng.standard_normal((B, T, R)), -rng.uniform(0.5, 9, R // 2)
    gates = rng.standard_normal((2, B, T, R // 2))
    ours = states("cg_lru", x_BTR, *gates, a_param_R, theta_R=np.zeros(R // 2))
    doubled = (np.concatenate([v, v], axis=-1) for v in (*gates, a_param_R))
    np.testing.assert_allclose(ours, states("rg_lru", x_BTR, *doubled), atol=1e-15)


def test_a_gate_is_given_what_it_has_and_nothing_else():
    x_BTR = jnp.zeros((B, T, R))
    rest = (jnp.zeros((B, T), jnp.int32), jnp.zeros((B, R)), "analytic")
    with pytest.raises(ValueError, match=r"gate=lru needs a_gate None, got \(2, 37, 16\)"):
        rg_lru(x_BTR, x_BTR, None, jnp.zeros(R), *rest, gate="lru")
    halves = (x_BTR[..., : R // 2],) * 2
    with pytest.raises(ValueError, match=r"gate=cg_lru needs theta \(8,\), got None"):
        rg_lru(x_BTR, *halves, jnp.zeros(R // 2), *rest, gate="cg_lru")


def test_angles_keep_their_digits_in_a_long_sequence():
    """After thousands of radians the last state is as true as after a few."""
    config, rng = small(gate="cg_lru", d_rnn=8, num_gate_blocks=1), np.random.default_rng(0)
    params = drawn(config, "rg_lru", rng)
    params |= {name: 0 * v for name, v in params.items() if name.startswith("a_gate")}
    params["theta"] = np.linspace(0.1, 0.3, 4, dtype=np.float32)
    params["a_param"] = np.full(4, -6, np.float32)  # a memory of a hundred tokens
    inputs = {"x_BTR": normal(rng, 1, LONG, 8), "position_BT": np.arange(LONG)[None] + 1,
              "h0_BR": normal(rng, 1, 8)}  # fmt: skip
    want_BTR, _ = truth.OPS["rg_lru"].forward(config, params, inputs)
    settings = ops.Settings(config, KERNELS, "float32")
    with jax.enable_x64(False):
        tree = {name: jnp.asarray(v) for name, v in params.items()}
        given = {name: jnp.asarray(v) for name, v in inputs.items()}
        found_BTR, _ = ops.OPS["rg_lru"](settings, ops.model.nested(tree), **given)
    error = np.abs(np.asarray(found_BTR) - want_BTR)[:, -1000:].max() / np.abs(want_BTR).max()
    assert error < TOLERANCE, f"{error:.1e}"
