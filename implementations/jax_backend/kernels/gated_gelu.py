"""gelu(gate) * up, with the tanh approximation of the released code, one variant per name.

Twin: implementations/torch_backend/kernels/gated_gelu.py.  Truth: implementations/reference.py.

Compiled for a v5e it is one fusion forward and one backward, which move what must move and no more
(benchmarks/compiled_bytes.py).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def gated_gelu(gate: Array, up: Array, variant: str) -> Array:
    if gate.shape != up.shape:
        raise ValueError(f"gated_gelu needs one shape; got gate {gate.shape}, up {up.shape}.")
    return VARIANTS[variant](gate, up)


def _plain(gate: Array, up: Array) -> Array:
    is_narrow = gate.dtype == jnp.bfloat16
    return (_gelu_of_bfloat16(gate) if is_narrow else _gelu(gate)) * up


_gelu = partial(jax.nn.gelu, approximate=True)


@jax.custom_jvp
def _gelu_of_bfloat16(x: Array) -> Array:
    """Computed in float32; its slope, all that the backward pass keeps, rounded once. In bfloat16
    throughout the gradient was wrong by 1.8e-2; so it is by 5e-3, as in PyTorch."""
    return _gelu(x.astype(jnp.float32)).astype(x.dtype)


@_gelu_of_bfloat16.defjvp
def _gelu_of_bfloat16_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    wide = x.astype(jnp.float32)
    y, slope = jax.jvp(_gelu, (wide,), (jnp.ones_like(wide),))
    return y.astype(x.dtype), slope.astype(x.dtype) * dx


VARIANTS = {"plain": _plain}
