"""Attention in Pallas for TPUs: interpreted, against the float64 reference; compiled for real ones.

A compiler needs no device, only libtpu (the extra `tpu`).
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import ATTENTIONS, CHUNKS, TOLERANCE, check
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import SingleDeviceSharding
from topologies import tpu

from implementations.engine import Unsupported
from implementations.jax_backend.kernels import attention, attention_tpu
from implementations.jax_backend.kernels.attention import window_attention

pytestmark = pytest.mark.usefixtures("in_32_bits")


@pytest.fixture
def in_worker(interpreted):
    return partial(interpreted, "pallas_attention_cases", backend="pallas")


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_and_its_gradients_match_the_reference(in_worker, case):
    check(in_worker("attention_errors", **case), TOLERANCE[case.get("dtype", "float32")])


@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_queries_after_a_state_see_its_keys(in_worker, case):
    check(in_worker("attention_errors", **case), TOLERANCE[case.get("dtype", "float32")])


@pytest.mark.parametrize("window", [None, 20])
def test_a_sequence_of_several_fetches_and_parts_of_a_group(in_worker, window):
    case = {"T": 600, "window": window, "documents": "some", "num_heads": 2, "past": 100}
    check(in_worker("attention_errors_in_parts", **case), TOLERANCE["float32"])


@pytest.mark.parametrize("case", [
    {"T": 33, "window": 20, "documents": "some", "num_heads": 2},
    {"T": 7, "window": None, "num_heads": 2, "num_kv_heads": 2, "dtype": "bfloat16"},
], ids=str)  # fmt: skip
def test_no_access_is_out_of_bounds_or_races(in_worker, case):
    errors, has_raced = in_worker("attention_races", **case)
    check(errors, TOLERANCE[case.get("dtype", "float32")])
    assert has_raced == [False] * 3  # forward, dq, dk and dv


def test_a_query_that_sees_nothing_is_no_nan(in_worker):
    """It does not occur, but a key that is not there must not spoil the others."""
    got = in_worker("beyond_the_keys")
    assert not got["y"][:, 3].any()
    others = np.arange(7) != 3
    np.testing.assert_allclose(got["y"][:, others], got["want"][:, others], atol=1e-5)
    assert all(np.isfinite(value).all() for value in got.values())


def test_blocks_are_visited_that_a_query_sees_and_no_others():
    """Of 3000 tokens in a window of 500, with documents that begin at 1000 and 1500."""
    T, position_T = 3000, np.arange(3000)
    position_T[1000:] -= 1000
    position_T[1500:] -= 500
    s = attention_tpu._Shape.of(1, T, T, 1, 1, 128, 2, 500)
    index_T = np.pad(np.arange(T), (0, s.T - T), mode="edge")
    first_T = index_T - np.minimum(position_T[index_T], 499)
    seen = attention_tpu._blocks_seen(s, jnp.asarray([[first_T, index_T]], jnp.int32))
    begin, end = map(np.asarray, seen)
    key = np.arange(s.S)
    mask = (key >= first_T[:, None]) & (key <= index_T[:, None])
    sees = mask.reshape(s.num_rows, 256, -1, 256).any((1, 3))
    block = np.arange(s.S // 256)
    np.testing.assert_array_equal(sees, (block >= begin[:, None]) & (block < end[:, None]))
    per_fetch = sees.reshape(s.num_rows, s.num_fetches, -1).any(2)
    assert per_fetch.sum(1).max() <= s.fetches < s.num_fetches
    assert per_fetch.sum(0).max() <= s.rows < s.num_rows
    begin, end = map(np.asarray, attention_tpu._rows_seeing(s, *seen))
    row = np.arange(s.num_rows)[:, None]
    np.testing.assert_array_equal(per_fetch, (row >= begin) & (row < end))


def test_float64_is_refused():
    x = np.zeros((1, 1, 1, 8))
    with jax.enable_x64(True), pytest.raises(Unsupported, match="not in float64"):
        attention_tpu.attention_tpu(*map(jnp.asarray, (x, x, x)), *jnp.zeros((2, 1, 1), int))


# Compiled


def attend_and_pull(q: Array, k: Array, v: Array, reach_BT: Array, dy: Array, *, variant: str):
    y, pull = jax.vjp(lambda *qkv: window_attention(*qkv, reach_BT, 1024, variant), q, k, v)
    return y, pull(dy)


def shapes(**placed) -> list[jax.ShapeDtypeStruct]:
    """Of a layer of Griffin at 1b."""
    q, kv = ((1, 2048, n, 128) for n in (16, 1))
    return [
        jax.ShapeDtypeStruct(shape, jnp.int32 if shape == (1, 2048) else jnp.bfloat16, **placed)
        for shape in (q, kv, kv, (1, 2048), q)
    ]


def test_it_lowers_for_a_tpu_at_any_matmul_precision():
    for precision in ("highest", "bfloat16"):
        with jax.default_matmul_precision(precision):
            traced = jax.jit(partial(attend_and_pull, variant="pallas_tpu")).trace(*shapes())
            text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("@tpu_custom_call") == 3


def test_it_compiles_for_a_v5e():
    placed = shapes(sharding=SingleDeviceSharding(tpu("v5e:2x2")))
    traced = jax.jit(partial(attend_and_pull, variant="pallas_tpu")).trace(*placed)
    compiled = traced.lower().compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3


# On a GPU, where `fused` is cuDNN


def lowered_for(platform: str) -> str:
    traced = jax.jit(partial(attend_and_pull, variant="fused")).trace(*shapes())
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_fused_is_cudnns_kernel_on_a_gpu_of_nvidia(monkeypatch):
    """Lowered alone: nothing here could compile it."""
    assert "__cudnn$" not in lowered_for("cuda")  # JAX refuses to trace it without a cuDNN
    monkeypatch.setattr(attention, "get_backend", lambda: SimpleNamespace(platform_version="cuda"))
    cudnn = SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", cudnn)
    text = lowered_for("cuda")
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
    assert "__cudnn$" not in lowered_for("cpu")
