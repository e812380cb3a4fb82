"""Logits from the tied embedding, and the negative log likelihood of targets in chunks of tokens.

Twin: implementations/torch_backend/kernels/cross_entropy.py.  Truth: implementations/reference.py.

`mean_cross_entropy` never holds all logits: of a chunk of tokens they are multiplied out, and with
them come the gradients of x and of the embedding, which the backward pass only scales. In bfloat16
every product takes bfloat16 and gives float32; the gradient of a logit is rounded for the last two.
Of 2048 tokens, D=1024 and V=262144 the gradient takes, compiled for a v5e, 1.5 GiB of temporaries
in bfloat16 (1.0 GiB in float32), where logits and their gradient would take 4: XLA writes a chunk's
logits once, and computes their gradient within the two products that it goes into.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from implementations.engine import IGNORED

# A chunk's logits take this much, but it is never of fewer tokens than make the float32 sum of the
# embedding's gradient a small part: each chunk reads and writes it, 8 bytes an element, for which
# its three products do 6 FLOP a token. 1024 tokens are 768 FLOP a byte; a v5e does 240 (197 TFLOP/s
# over 819 GB/s), a v5p and a v6e 166 and 560. Its logits are no more than that sum at D >= 1024.
CHUNK_BYTES = 2**26
MIN_CHUNK = 1024


def unembed(x_BTD: Array, weight_VD: Array, soft_cap: float | None) -> Array:
    """[B, T, V], float32 (float64 in float64); a soft cap c makes them c tanh(logits / c)."""
    B, T, D = x_BTD.shape
    logits_BTV = _product("nd,vd->nv", x_BTD.reshape(B * T, D), weight_VD).reshape(B, T, -1)
    return logits_BTV if soft_cap is None else soft_cap * jnp.tanh(logits_BTV / soft_cap)


def cross_entropy(logits_BTV: Array, targets_BT: Array, variant: str) -> Array:
    """Negative log likelihood of each target, nats; 0 where IGNORED."""
    if targets_BT.shape != logits_BTV.shape[:2]:
        raise ValueError(
            "cross_entropy needs logits [B, T, V] and targets [B, T]; "
            f"got logits {logits_BTV.shape}, targets {targets_BT.shape}."
        )
    compute = {"plain": _plain_rows}
    return compute[variant](logits_BTV, targets_BT)


def mean_cross_entropy(
    x_BTD: Array, weight_VD: Array, targets_BT: Array, soft_cap: float | None, variant: str
) -> Array:
    """The mean over scored targets, nats, of the logits that `unembed` makes of the weight in x's
    dtype; 0 where none is scored. The weight's gradient is a float32 (float64) sum over tokens."""
    if targets_BT.shape != x_BTD.shape[:2] or weight_VD.shape[1:] != x_BTD.shape[2:]:
        raise ValueError(
            "mean_cross_entropy needs x [B, T, D], weight [V, D] and targets [B, T]; "
            f"got x {x_BTD.shape}, weight {weight_VD.shape}, targets {targets_BT.shape}."
        )
    return VARIANTS[variant](x_BTD, weight_VD, targets_BT, soft_cap)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _plain(x_BTD: Array, weight_VD: Array, targets_BT: Array, soft_cap: float | None) -> Array:
    return _loss_and_grads(x_BTD, weight_VD, targets_BT, soft_cap, needs_grad=False)[0]


def _plain_fwd(*inputs) -> tuple[Array, tuple[Array, Array]]:
    return _loss_and_grads(*inputs, needs_grad=True)


def _plain_bwd(soft_cap: float | None, grads: tuple[Array, Array], dloss: Array) -> tuple:
    dx_BTD, dweight_VD = ((grad * dloss).astype(grad.dtype) for grad in grads)
    return dx_BTD, dweight_VD, None


_plain.defvjp(_plain_fwd, _plain_bwd)


def _loss_and_grads(
    x_BTD: Array, weight_VD: Array, targets_BT: Array, soft_cap: float | None, *, needs_grad: bool
) -> tuple[Array, tuple[Array, Array] | None]:
    """(loss, (dx, dweight) in the dtypes of x and weight)."""
    (B, T, D), V = x_BTD.shape, weight_VD.shape[0]
    cast_VD = weight_VD.astype(x_BTD.dtype)
    num_scored = jnp.maximum((targets_BT != IGNORED).sum(), 1)
    num_chunks = max(-(-B * T // max(CHUNK_BYTES // (4 * V), MIN_CHUNK)), 1)
    padding = -B * T % num_chunks  # tokens that are not scored, fewer than chunks: all are as long
    x_ND = jnp.pad(x_BTD.reshape(B * T, D), ((0, padding), (0, 0)))
    targets_N = jnp.pad(targets_BT.reshape(B * T), (0, padding), constant_values=IGNORED)
    chunks = x_ND.reshape(num_chunks, -1, D), targets_N.reshape(num_chunks, -1)

    def add_nll(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        x_CD, targets_C = chunk
        return total + _sum_nll(_product("cd,vd->cv", x_CD, cast_VD), targets_C, soft_cap), None

    def add_grads(totals: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple:
        (total, dweight_VD), (x_CD, targets_C) = totals, chunk
        logits_CV = _product("cd,vd->cv", x_CD, cast_VD)
        nll, dlogits_CV = jax.value_and_grad(_sum_nll)(logits_CV, targets_C, soft_cap)
        dlogits_CV = (dlogits_CV / num_scored).astype(x_CD.dtype)
        dx_CD = _product("cv,vd->cd", dlogits_CV, cast_VD).astype(x_CD.dtype)
        dweight_VD += _product("cv,cd->vd", dlogits_CV, x_CD)
        return (total + nll, dweight_VD), dx_CD

    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    total = jnp.zeros((), wide)
    if not needs_grad:
        total, _ = lax.scan(add_nll, total, chunks)
        return total / num_scored, None
    totals = (total, jnp.zeros((V, D), wide))
    (total, dweight_VD), dx = lax.scan(add_grads, totals, chunks)
    dx_BTD = dx.reshape(-1, D)[: B * T].reshape(B, T, D)
    return total / num_scored, (dx_BTD, dweight_VD.astype(weight_VD.dtype))


def _sum_nll(logits_CV: Array, targets_C: Array, soft_cap: float | None) -> Array:
    """Of logits before their cap."""
    if soft_cap is not None:
        logits_CV = soft_cap * jnp.tanh(logits_CV / soft_cap)
    return _plain_rows(logits_CV, targets_C).sum()


def _plain_rows(logits: Array, targets: Array) -> Array:
    is_scored = targets != IGNORED
    index = jnp.where(is_scored, targets, 0)[..., None]
    target = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    return jnp.where(is_scored, jax.nn.logsumexp(logits, axis=-1) - target, 0)


def _product(axes: str, left: Array, right: Array) -> Array:
    """In float32 (float64 in float64), whatever they are in."""
    dtype = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.einsum(axes, left, right, preferred_element_type=dtype)


VARIANTS = {"plain": _plain}
