"""JAX's mean_cross_entropy in chunks of tokens: values and gradients beside the float64 reference,
and that no more logits than a chunk's are there at one time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from topologies import tpu

from implementations import reference
from implementations.engine import IGNORED
from implementations.jax_backend.kernels import cross_entropy

B, T, D, V = 2, 7, 65, 300
# Of the largest true value; measured < 3e-15, 6e-7, 5e-3 (gradients rounded to bfloat16).
TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 1e-2}
CASES = {
    "one chunk": {},
    "equal chunks": {"chunk": 7},
    "a ragged last chunk": {"chunk": 5},
    "a token a chunk": {"chunk": 1},
    "a soft cap": {"chunk": 5, "soft_cap": 2.0},
    "all ignored": {"chunk": 5, "all_ignored": True},
    "a scaled loss": {"chunk": 5, "dloss": 0.3},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_chunks_give_the_mean_and_its_gradients(monkeypatch, case, dtype):
    settings = {"chunk": B * T, "soft_cap": None, "all_ignored": False, "dloss": 1.0}
    settings |= CASES[case]
    soft_cap = settings["soft_cap"]
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * V * settings["chunk"])
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK", 1)
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((B, T, D)), rng.standard_normal((V, D)) / 2
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[0, 1] = targets[1, -1] = IGNORED
    if settings["all_ignored"]:
        targets[:] = IGNORED

    with jax.enable_x64(dtype == "float64"):
        x, weight = jnp.asarray(x, dtype), jnp.asarray(weight, dtype)
        master = weight.astype(jnp.promote_types(dtype, jnp.float32))

        @jax.jit
        def run(x, weight, dloss):
            def loss(x, weight):
                return cross_entropy.mean_cross_entropy(x, weight, targets, soft_cap, "plain")

            value, pull = jax.vjp(loss, x, weight)
            return value, loss(x, weight), *pull(dloss)

        ours = run(x, master, jnp.asarray(settings["dloss"], master.dtype))
    assert [value.dtype for value in ours[1:]] == [master.dtype, x.dtype, master.dtype]

    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    uncapped = x @ weight.T
    logits = reference.soft_cap(uncapped, soft_cap)
    num_scored = max((targets != IGNORED).sum(), 1)
    loss = reference.cross_entropy(logits, targets).sum() / num_scored
    dnll = np.full((B, T), settings["dloss"] / num_scored)
    dlogits = reference.cross_entropy_grad(logits, targets, dnll)
    dlogits = reference.soft_cap_grad(uncapped, soft_cap, dlogits)
    true = (loss, loss, dlogits @ weight, np.einsum("btv,btd->vd", dlogits, x))

    for name, want, got in zip(["loss", "without grad", "dx", "dweight"], true, ours, strict=True):
        error = np.abs(want - np.asarray(got, np.float64)).max()
        limit = TOLERANCE["float32" if want.ndim == 0 and dtype == "bfloat16" else dtype]
        largest = np.abs(want).max() or 1
        assert error <= limit * largest, f"{name}: error {error / largest:.1e} in {dtype}"


def test_a_target_outside_the_vocabulary_is_no_number():
    x, weight, targets = jnp.ones((1, 2, 3)), jnp.ones((7, 3)), jnp.array([[1, 7]])
    assert jnp.isnan(cross_entropy.mean_cross_entropy(x, weight, targets, None, "plain"))


@pytest.mark.parametrize(
    ("place", "dtype"), [("cpu", "float32"), ("cpu", "bfloat16"), ("v5e:2x2", "bfloat16")]
)
def test_logits_are_never_there_at_one_time(place, dtype):
    """Compiled, not run: 8192 tokens and 65536 words have 2 GiB of logits."""
    B, T, D, V = 4, 2048, 256, 65536
    device = jax.devices("cpu")[0] if place == "cpu" else tpu(place)
    there = SingleDeviceSharding(device)
    shapes = [((B, T, D), dtype), ((V, D), "float32"), ((B, T), "int32")]
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=there) for shape, dtype in shapes]

    def loss(x, weight, targets):
        return cross_entropy.mean_cross_entropy(x, weight, targets, None, "plain")

    made = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(*inputs).lower().compile()
    found = made.memory_analysis()
    assert found.temp_size_in_bytes < B * T * V * 4 / 2
