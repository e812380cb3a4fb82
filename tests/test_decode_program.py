"""JAX decodes in one compiled loop that owns its caches: what the optimized programs say."""

import re

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny
from jax.sharding import SingleDeviceSharding
from topologies import tpu

from implementations.engine import Kernels
from implementations.jax_backend import engine, model
from implementations.parameters import param_specs

MODELS = {
    "mqa": tiny("mqa", num_layers=2),
    "hawk": tiny("hawk", num_layers=2),
    "griffin": tiny("griffin", num_layers=3),
}
# On a TPU a slot is a row of tiles, and no cache fits in its VMEM (128 MiB): XLA moves one that
# does there and back.
WIDE = {"head_dim": 128, "window_size": 8192}
KERNELS = Kernels(linear_scan="analytic", attention="plain", layers="plain")


def program_of(config, device, *, B, capacity, dtype):
    """(the optimized program, its states)."""
    shapes = {s.name: jax.ShapeDtypeStruct(s.shape, "float32") for s in param_specs(config)}
    params = jax.eval_shape(lambda p: model.cast(p, dtype), model.nested(shapes))
    states = jax.eval_shape(lambda: model.empty_states(config, B, capacity, dtype))
    token_B = jax.ShapeDtypeStruct((B,), jnp.int32)
    place = SingleDeviceSharding(device)
    there = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, token_B, states, token_B),
    )
    traced = engine.decode_program.trace(*there, num_tokens=4, config=config, kernels=KERNELS)
    return traced.lower().compile().as_text(), states


def check(text, states):
    """One loop; every state is its own result; no keys or values are copied. (The states of a
    recurrent layer are few, and each token writes them all.)"""
    assert len(re.findall(r" while\(", text)) == 1
    assert len(re.findall(r"(?:may|must)-alias", text)) == len(jax.tree.leaves(states))
    for name, x in (pair for state in states for pair in state._asdict().items()):
        if name in ("k_BSKH", "v_BSKH"):
            sizes = ",(?:1,)?".join(str(size) for size in x.shape if size > 1)
            made = re.findall(rf"%(\S+) = \(?\w+\[{sizes}\].* (copy|copy-start|scatter)\(", text)
            assert "scatter" in dict(made).values(), f"{name} is not found"
            copies = [copy for copy, operation in made if operation != "scatter"]
            assert not copies, f"{name} is copied: {copies}"


@pytest.mark.parametrize("name", MODELS)
def test_decoding_on_a_cpu_copies_no_cache(name):
    check(*program_of(MODELS[name], jax.devices("cpu")[0], B=3, capacity=24, dtype="float32"))


@pytest.mark.parametrize("name", MODELS)
def test_decoding_on_a_tpu_copies_no_cache(name):
    config = tiny(name, num_layers=MODELS[name].num_layers, **WIDE)
    check(*program_of(config, tpu("v5e:2x2"), B=64, capacity=8192, dtype="bfloat16"))
