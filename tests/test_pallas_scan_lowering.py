"""Every scan of JAX lowers for TPU and GPU; those of Pallas for TPU compile for real ones.

A compiler needs no device, only libtpu (the extra `tpu`), and says what Mosaic's lowering alone
does not: that blocks fit in a core's memory, and that every access is one the chip has.
"""

from functools import partial

import jax
import pytest
from jax.sharding import SingleDeviceSharding
from topologies import tpu

from implementations.engine import Unsupported
from implementations.jax_backend.kernels.linear_scan import linear_scan
from implementations.jax_backend.kernels.rg_lru import rg_lru

pytestmark = pytest.mark.usefixtures("in_32_bits")

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
ON = {
    "sequential": ("tpu", "cuda"),
    "associative": ("tpu", "cuda"),
    "analytic": ("tpu", "cuda"),
    "pallas_tpu": ("tpu",),
    "pallas_gpu": ("cuda",),
}
B, T, R = 2, 2048, 2560  # channels of the paper's 1b
RAGGED = (3, 300, 200)
SMALL = (1, 7, 3)


def shapes_of(op: str, B: int, T: int, R: int, dtype: str, sharding=None) -> list:
    """Of the inputs, then of the gradients of both outputs."""

    def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    steps, state = shape(B, T, R, dtype=dtype), shape(B, R)
    if op == "linear_scan":
        return [steps, steps, state, steps, state]
    return [*[steps] * 3, shape(R), shape(B, T, dtype="int32"), state, steps, state]


def with_gradients(op: str, variant: str, *inputs: jax.Array) -> tuple:
    *inputs, dh_BTR, dh_BR = inputs
    run = linear_scan if op == "linear_scan" else rg_lru
    outputs, pull = jax.vjp(lambda *inputs: run(*inputs, variant), *inputs)
    return outputs, pull((dh_BTR, dh_BR))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("variant", "platform"), [(v, p) for v, on in ON.items() for p in on])
@pytest.mark.parametrize("op", ["linear_scan", "rg_lru"])
def test_every_variant_lowers(op, variant, platform, dtype):
    traced = jax.jit(partial(with_gradients, op, variant)).trace(*shapes_of(op, B, T, R, dtype))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    target = {"pallas_tpu": "tpu_custom_call", "pallas_gpu": "triton"}.get(variant)
    assert target is None or target in text


def test_a_cpu_lowers_for_a_tpu_what_a_tpu_would_run():
    """The loop of `sequential` is unrolled but on a CPU, wherever it is compiled."""
    traced = jax.jit(partial(with_gradients, "linear_scan", "sequential")).trace(
        *shapes_of("linear_scan", 1, 64, 3, "float32")
    )
    lines = [traced.lower(lowering_platforms=(on,)).as_text().count("\n") for on in ("cpu", "tpu")]
    assert lines[1] > 2 * lines[0]


@pytest.mark.parametrize("op", ["linear_scan", "rg_lru"])
def test_more_elements_than_32_bits_count_are_refused(op):
    with pytest.raises(Unsupported, match="batch 64 x 8192 steps x 4096 channels") as refusal:
        jax.eval_shape(
            partial(with_gradients, op, "pallas_gpu"), *shapes_of(op, 64, 8192, 4096, "bfloat16")
        )
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("op", ["linear_scan", "rg_lru"])
def test_kernels_compile_for_real_tpus(op, topology, dtype):
    compile_for(tpu(topology), op, (B, T, R), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [RAGGED, SMALL], ids=["ragged", "small"])
@pytest.mark.parametrize("op", ["linear_scan", "rg_lru"])
def test_kernels_compile_for_odd_shapes(op, shape, dtype):
    compile_for(tpu("v5e:2x2"), op, shape, dtype)


def compile_for(device: jax.Device, op: str, shape: tuple[int, int, int], dtype: str) -> None:
    shapes = shapes_of(op, *shape, dtype, SingleDeviceSharding(device))
    compiled = jax.jit(partial(with_gradients, op, "pallas_tpu")).trace(*shapes).lower().compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
