"""JAX's causal_conv, whose gradient is written by hand: every gradient beside the reference's, its
state's too, of sequences shorter than the state and longer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from implementations import reference
from implementations.jax_backend.kernels.causal_conv import causal_conv

B, R = 2, 5
TOLERANCE = 1e-13  # of the largest true value, in float64; measured < 1e-15


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_gradients_are_those_of_one_longer_sequence(T, width, has_bias):
    """Of the state and x together, of which the state's own outputs do not count."""
    rng = np.random.default_rng(0)
    past = width - 1
    x, dy = rng.standard_normal((2, B, T, R))
    conv, dlast = rng.standard_normal((2, B, past, R))
    weight, bias = rng.standard_normal((width, R)), rng.standard_normal(R) if has_bias else None
    position = np.stack([np.arange(T) + 5, np.arange(T) % 3]).astype(np.int32)

    before = np.zeros((B, past, R))
    dweight, dbias, dboth = reference.causal_conv_grad(
        weight,
        bias,
        np.concatenate([conv, x], axis=1),
        np.concatenate([np.zeros((B, past), np.int32), position], axis=1),
        np.concatenate([before, dy], axis=1),
    )
    dboth[:, T:] += dlast
    true = (dboth[:, past:], dweight, dbias, dboth[:, :past])

    with jax.enable_x64(True):
        inputs = [None if v is None else jnp.asarray(v) for v in (x, weight, bias, conv)]

        @jax.jit
        def gradients(inputs, doutputs):
            def run(x, weight, bias, conv):
                return causal_conv(x, weight, bias, position, conv, "plain")

            return jax.vjp(run, *inputs)[1](doutputs)

        ours = gradients(inputs, (jnp.asarray(dy), jnp.asarray(dlast)))
    for name, want, got in zip(["dx", "dweight", "dbias", "dconv"], true, ours, strict=True):
        if want is None:
            assert got is None
        elif want.size:
            error = np.abs(want - np.asarray(got)).max() / np.abs(want).max()
            assert error < TOLERANCE, f"{name}: {error:.1e}"
