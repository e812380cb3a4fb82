"""Rotary positions (RoPE) of queries and keys, one variant per name.

Twin: implementations/torch_backend/kernels/rope.py.  Truth: implementations/reference.py.

Compiled for a v5e alone it moves 1.5 times what must move, forward and backward: XLA writes both
halves before it joins them (benchmarks/compiled_bytes.py). Joined before they are rotated, it
writes the whole once more than it must: 2.0 times.
"""

import jax.numpy as jnp
from jax import Array


def rope(x_BTNH: Array, position_BT: Array, rope_dim: int, base: float, variant: str) -> Array:
    """Rotates channel i against channel i + rope_dim / 2, by position * base^(-2 i / rope_dim)."""
    B, T, _, H = x_BTNH.shape
    if position_BT.shape != (B, T):
        raise ValueError(f"rope: position must be {(B, T)}, got {position_BT.shape}.")
    if rope_dim % 2 or not 0 <= rope_dim <= H:
        raise ValueError(f"rope: rope_dim={rope_dim}; must be even, and at most {H}.")
    return VARIANTS[variant](x_BTNH, position_BT, rope_dim, base) if rope_dim else x_BTNH


def _plain(x_BTNH: Array, position_BT: Array, rope_dim: int, base: float) -> Array:
    half = rope_dim // 2
    dtype = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    rate_H = 1 / base ** (jnp.arange(half, dtype=dtype) / half)
    angle_BT1H = position_BT[:, :, None, None].astype(dtype) * rate_H
    cos, sin = jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)
    first = x_BTNH[..., :half].astype(dtype)
    second = x_BTNH[..., half : 2 * half].astype(dtype)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rotated = [part.astype(x_BTNH.dtype) for part in rotated]
    return jnp.concatenate([*rotated, x_BTNH[..., 2 * half :]], axis=-1)


VARIANTS = {"plain": _plain}
