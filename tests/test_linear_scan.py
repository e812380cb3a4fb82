"""linear_scan, every CPU variant of both backends, against a float64 loop: values and gradients."""

from importlib import import_module

import numpy as np
import pytest
from conftest import BACKENDS, tiny

from implementations.engine import Kernels, Unsupported, load_engine

VARIANTS = ("sequential", "associative", "analytic")
SHAPES = [(1, 1, 1), (2, 7, 3), (2, 16, 8), (3, 37, 5)]  # one step; odd; power of two; ragged
TOLERANCE = {"float32": 3e-6, "float64": 1e-13}  # of the largest true value; measured < 1e-6, 1e-14


@pytest.fixture(params=BACKENDS)
def scan_and_grad(request):
    """NumPy in, NumPy out: (h, h_last, da, dx, dh0) for the incoming dh and dh_last."""
    return {"jax": jax_scan_and_grad, "torch": torch_scan_and_grad}[request.param]


def jax_scan_and_grad(a, x, h0, dh, dh_last, variant, dtype):
    import jax

    op = import_module("implementations.jax_backend.kernels.linear_scan").linear_scan
    with jax.enable_x64(dtype == "float64"):
        values = [jax.numpy.asarray(value, dtype) for value in (a, x, h0, dh, dh_last)]

        @jax.jit
        def run(a, x, h0, dh, dh_last):
            outputs, pull = jax.vjp(lambda *inputs: op(*inputs, variant), a, x, h0)
            return (*outputs, *pull((dh, dh_last)))

        return [np.asarray(value, np.float64) for value in run(*values)]


def torch_scan_and_grad(a, x, h0, dh, dh_last, variant, dtype):
    import torch

    op = import_module("implementations.torch_backend.kernels.linear_scan").linear_scan
    dtype = getattr(torch, dtype)
    inputs = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (a, x, h0)]
    outputs = op(*inputs, variant)
    incoming = [torch.tensor(value, dtype=dtype) for value in (dh, dh_last)]
    gradients = torch.autograd.grad(outputs, inputs, incoming)
    return [value.detach().double().numpy() for value in (*outputs, *gradients)]


def true_scan_and_grad(a, x, h0, dh, dh_last):
    h, previous, state = np.empty_like(x), np.empty_like(x), h0
    for t in range(x.shape[1]):
        previous[:, t] = state
        h[:, t] = state = a[:, t] * state + x[:, t]
    da, dx, flowing = np.empty_like(x), np.empty_like(x), dh_last
    for t in reversed(range(x.shape[1])):
        dx[:, t] = flowing = dh[:, t] + flowing
        da[:, t] = flowing * previous[:, t]
        flowing = flowing * a[:, t]
    return h, state, da, dx, flowing


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("B", "T", "R"), SHAPES)
def test_matches_the_recurrence(scan_and_grad, B, T, R, variant, dtype):
    rng = np.random.default_rng(0)
    a = rng.uniform(0.5, 0.999, (B, T, R))
    a[:, ::5] = 0  # document starts: the state is dropped, and gradients stop
    x, dh = rng.standard_normal((2, B, T, R))
    h0, dh_last = rng.standard_normal((2, B, R))
    if T == 1:
        a[:] = 0.9  # or the only gradient of h0 would be 0
    # Rounded first: the inputs are exact in both dtypes, so that only the op's own error counts.
    inputs = [value.astype(np.float32).astype(np.float64) for value in (a, x, h0, dh, dh_last)]

    true = true_scan_and_grad(*inputs)
    ours = scan_and_grad(*inputs, variant, dtype)

    for name, want, got in zip(["h", "h_last", "da", "dx", "dh0"], true, ours, strict=True):
        error = np.abs(want - got).max() / max(np.abs(want).max(), 1)
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e} in {dtype}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_reaches_the_first_state(scan_and_grad, variant):
    """No reset in sight: dh0 is the product of all decays."""
    a = np.full((1, 4, 2), 0.5)
    zeros = np.zeros_like(a)
    *_, dh0 = scan_and_grad(a, zeros, zeros[:, 0], zeros, np.ones((1, 2)), variant, "float32")
    np.testing.assert_array_equal(dh0, np.full((1, 2), 0.5**4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_that_do_not_fit_are_named(backend):
    framework = {"jax": "jax.numpy", "torch": "torch"}[backend]
    op = import_module(f"implementations.{backend}_backend.kernels.linear_scan").linear_scan
    zeros = import_module(framework).zeros
    with pytest.raises(ValueError, match="one shape"):
        op(zeros((1, 3, 2)), zeros((1, 4, 2)), zeros((1, 2)), "analytic")


@pytest.mark.parametrize("backend", BACKENDS)
def test_unknown_devices_and_kernels_are_unsupported(backend):
    Engine = load_engine(backend)
    for kernels in (Kernels(linear_scan="pallas_tpu"), Kernels(attention="pallas_gpu")):
        with pytest.raises(Unsupported) as failure:
            Engine(tiny("hawk"), kernels=kernels)
        assert "\n" not in str(failure.value)
    with pytest.raises(Unsupported, match="v5e"):
        Engine(tiny("hawk"), device_kind="v5e")
