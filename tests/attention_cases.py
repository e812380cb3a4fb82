"""Attention as every kernel of ours is held to it: the cases, their inputs and their truth."""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from implementations import reference

# Of the largest true value. Measured 8e-7 and 5e-3 in Triton's interpreter; a bfloat16 result is
# rounded to 2e-3 of itself.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}

# Pairwise over lengths, windows, documents, heads, head_dim and dtype, not the full product.
ATTENTIONS = [
    {"T": 1, "window": None},
    {"T": 1, "window": 1, "num_heads": 6, "num_kv_heads": 2},
    {"T": 7, "window": 1, "dtype": "bfloat16"},
    {"T": 7, "window": 32, "documents": "some", "head_dim": 12, "index": "int32"},
    {"T": 7, "window": None, "documents": "each", "num_kv_heads": 2},
    {"T": 100, "window": 1, "head_dim": 12},
    {"T": 100, "window": 32, "documents": "some", "num_kv_heads": 2, "batch_size": 2},
    {"T": 100, "window": 32, "documents": "each", "dtype": "bfloat16", "is_contiguous": False},
    {"T": 100, "window": None, "documents": "some", "dtype": "bfloat16", "num_kv_heads": 4},
    {"T": 257, "window": 1, "documents": "each", "num_kv_heads": 2, "dtype": "bfloat16"},
    {"T": 257, "window": 32, "documents": "one", "index": "int32", "is_contiguous": False},
    {"T": 257, "window": 300, "documents": "some", "head_dim": 12, "num_heads": 3},
    {"T": 257, "window": None, "documents": "one", "dtype": "bfloat16", "head_dim": 12},
    {"T": 257, "window": None, "documents": "some", "batch_size": 2, "is_contiguous": False},
    {"T": 33, "window": None, "head_dim": 130, "num_heads": 2},
    {"T": 33, "window": 20, "head_dim": 256, "num_heads": 2, "dtype": "bfloat16"},
]
CHUNKS = [
    {"T": 1, "past": 40, "window": None},
    {"T": 7, "past": 32, "window": 32, "num_kv_heads": 2},
    {"T": 100, "past": 57, "window": 57, "dtype": "bfloat16"},
    {"T": 50, "past": 201, "window": None, "head_dim": 12, "index": "int32"},
]
DOCUMENTS = {  # starts of documents, in a row of T tokens
    "one": lambda T: [0],
    "some": lambda T: [0, T // 3, T // 2 + 1],
    "each": lambda T: range(T),
}


class Case(NamedTuple):
    """T queries after keys that have none."""

    q_BTNH: np.ndarray
    k_BSKH: np.ndarray
    v_BSKH: np.ndarray
    dy_BTNH: np.ndarray
    last_BT: np.ndarray
    position_BT: np.ndarray
    want: dict[str, np.ndarray]


def case_of(
    *,
    T: int,
    window: int | None,
    documents: str = "one",
    num_heads: int = 4,
    num_kv_heads: int = 1,
    head_dim: int = 16,
    batch_size: int = 1,
    past: int = 0,
    dtype: str = "float32",
) -> Case:
    B, S, N, K, H = batch_size, past + T, num_heads, num_kv_heads, head_dim
    q, k, v, dy = (normal(i, shape, dtype) for i, shape in enumerate(
        [(B, S, N, H), (B, S, K, H), (B, S, K, H), (B, S, N, H)]))  # fmt: skip
    position_BS = np.stack([positions(S, documents if row == 0 else "one") for row in range(B)])
    dy[:, :past] = 0
    want = {"y": reference.attention(q, k, v, position_BS, window)[:, past:]}
    dq, dk, dv = reference.attention_grad(q, k, v, position_BS, window, dy)
    want |= {"dq": dq[:, past:], "dk": dk, "dv": dv}
    last_BT = np.broadcast_to(np.arange(past, S), (B, T))
    return Case(q[:, past:], k, v, dy[:, past:], last_BT, position_BS[:, past:], want)


def normal(seed: int, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Values that the dtype holds exactly."""
    x = np.random.default_rng(seed).standard_normal(shape)
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float64)


def positions(T: int, documents: str) -> np.ndarray:
    position = np.arange(T)
    for start in DOCUMENTS[documents](T):
        position[start:] = np.arange(T - start)
    return position


def errors(want: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> dict[str, float]:
    """A true value of 0 (the gradient of a lone key's score) counts as one of size 1."""
    out = {}
    for name, true in want.items():
        size = np.abs(true).max()
        difference = np.abs(got[name].astype(np.float64) - true).max()
        out[name] = float(difference / (size if size > 1e-9 else 1.0))
    return out


def check(errors: dict[str, float], tolerance: float) -> None:
    assert not {name: error for name, error in errors.items() if not error < tolerance}, errors
