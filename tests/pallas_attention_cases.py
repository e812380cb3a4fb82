"""What tests/test_pallas_attention.py runs in the interpreter's worker."""

from unittest import mock

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import races
from attention_cases import Case, case_of
from jax import Array

from implementations.jax_backend.kernels import attention_tpu
from implementations.jax_backend.kernels.attention import attention, window_attention
from implementations.jax_backend.kernels.interpreter import interpreting


def attention_errors(*, index: str = "", is_contiguous: bool = True, **arguments):
    """Forward and backward, of a case of attention_cases.py. JAX has but one index, one layout."""
    case = case_of(**arguments)
    return attention_cases.errors(case.want, results(case, **arguments))


def attention_errors_in_parts(**arguments) -> dict[str, float]:
    """As long sequences and wide heads are cut: here a fetch is one block, a part one head."""
    with (
        mock.patch.object(attention_tpu, "FETCH_BYTES", 256 * 128 * 4),
        mock.patch.object(attention_tpu, "CHANNELS", {4: 128}),
    ):
        return attention_errors(**arguments)


def attention_races(**arguments) -> tuple[dict[str, float], list[bool]]:
    """Errors where a TPU's memories are simulated, and whether each kernel raced."""
    case = case_of(**arguments)
    with races.watched() as found:
        got = results(case, mode=races.MODE, **arguments)
    return attention_cases.errors(case.want, got), [kernel.races_found for kernel in found]


def beyond_the_keys() -> dict[str, np.ndarray]:
    """Results, where query 3 of 7 has its last key far beyond those that are there."""
    case = case_of(T=7, window=None)
    last_BT = case.last_BT.copy()
    last_BT[:, 3] = 1000
    got = results(case._replace(last_BT=last_BT), window=None)
    return got | {"want": case.want["y"]}


def results(
    case: Case, *, window: int | None, dtype: str = "float32", mode=True, **_
) -> dict[str, np.ndarray]:
    last_BT, reach_BT = (jnp.asarray(x, jnp.int32) for x in (case.last_BT, case.position_BT))

    @jax.jit
    def run(q: Array, k: Array, v: Array, dy: Array) -> list[Array]:
        def attend(q: Array, k: Array, v: Array) -> Array:
            if window is None:
                return attention(q, k, v, last_BT, reach_BT, "pallas_tpu")
            return window_attention(q, k, v, reach_BT, window, "pallas_tpu")

        y, pull = jax.vjp(attend, q, k, v)
        return [y, *pull(dy)]

    with interpreting(mode):
        got = run(*(jnp.asarray(x, dtype) for x in case[:4]))
    assert {y.dtype for y in got} == {jnp.dtype(dtype)}
    return {name: np.asarray(y, np.float32) for name, y in zip(case.want, got, strict=True)}
