"""Attention for TPUs, in Pallas: the variant pallas_tpu of attention.py.

Twin: _triton of implementations/torch_backend/kernels/attention.py.
Truth: implementations/reference.py.

A program holds BLOCK queries of the heads of one group that fit, and walks over the blocks of keys
that some query among them sees: which ones is counted beforehand, from the first and last visible
key of each query. So a window or packed documents cost what they see, rounded to blocks, whatever
their values; a window of W costs (W + BLOCK) / W of the least work. Keys come to VMEM by fetches of
several blocks, which stay while the next queries need them.

Scores are kept transposed, keys down the sublanes and queries along the lanes: what belongs to one
query (bounds, largest score, total, logsumexp) is then one row, and neither its sums nor its
broadcasts cross lanes. One mask serves all heads of a group (MQA: all heads), which also share the
keys of their products. No head is transposed in memory: arrays are [B, time, heads * H], as the
linear maps before and after have them.

FLOPs for each pair of query and key and head: 4 H forward and 14 H backward (7 products; 5 would do
in one kernel, had it room for float32 sums of dk and dv of all keys, or of dq of all queries).
Elements moved, in units of B T N H: forward 2, dq 4, dk and dv 2 (fetch + W) / fetch; those of the
keys are few in MQA, and each query and head has one float32 of logsumexp and one of out * dout.

Why not the library's splash attention, which compiles for the same TPUs: its mask is fixed with the
program, so that every length and chunk is a mask of its own, and documents are segment ids, whose
hidden blocks it visits all the same. By the instructions alone it is no worse. In bundles that
libtpu schedules for a v5e (static: a count, not a time; 16 heads of 128 in bfloat16, 2048 tokens of
one document, a window of 1024, forward and backward, jax 0.10.2) this file takes 0.61 million;
splash in blocks of 512 takes 0.80 with two kernels backward, and 0.61 with one, which writes a
bfloat16 part of dq for each block of keys (here 4 times dq, 16 times at 8192 tokens).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from implementations.engine import Unsupported
from implementations.jax_backend.kernels.interpreter import mode

LANES = 128  # of a vector register: a head is padded to a multiple
# Queries, and keys, of one product. Bundles of all three inner loops (as above, 16 heads): on a v5e
# 19.1 thousand for blocks of 256 and 5.1 for 128, of which 256 queries in a window of 1024 meet 5
# and 18; on a v6e, whose matrix units are twice as wide, 10.7 and 4.5. So 128 is 4 % better on a
# v5e in that window, and 256 is 6 % better there without one and 34 % on a v6e.
BLOCK = 256
# Heads whose scores are computed before they are used, so that the matrix units work on one head
# while the vector unit works on another: 11 % fewer bundles for dq, 6 % forward, on a v5e.
AHEAD = 3
# What fits 16 MiB of VMEM on every TPU, two blocks of each array at a time: channels of the heads
# of a program, by bytes of an element (a product in float32 is several in bfloat16, whose operands
# lie there too), and bytes of the keys of a fetch.
CHANNELS = {2: 2048, 4: 512}
FETCH_BYTES = 2**18
LOG2_E = 1.4426950408889634


def attention_tpu(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    last_BT: Array,
    reach_BT: Array,
    window: int | None = None,
) -> Array:
    """As attention.attention; a query that sees no key gets 0. Given a window, last must count up
    by one and reach be below it: the grid is then no longer than a window needs."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    dtype = v_BSKH.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise Unsupported(f"kernels.attention=pallas_tpu computes in float32, not in {dtype}.")
    shape = _Shape.of(B, T, S, K, N // K, H, dtype.itemsize, window)

    def flat(x: Array, length: int) -> Array:
        """[B, length, heads * width]: no head is moved, and its slice is whole registers."""
        pad = ((0, 0), (0, length - x.shape[1]), (0, 0), (0, shape.width - H))
        return jnp.pad(x.astype(dtype), pad).reshape(B, length, -1)

    # Queries of the padding see what the last one sees, and get no gradient.
    range_BXT = jnp.stack([jnp.maximum(last_BT - reach_BT, 0), jnp.minimum(last_BT, S - 1)], 1)
    range_BXT = jnp.pad(range_BXT.astype(jnp.int32), ((0, 0), (0, 0), (0, shape.T - T)), "edge")
    inputs = flat(q_BTNH, shape.T), flat(k_BSKH, shape.S), flat(v_BSKH, shape.S), range_BXT
    return _attention(shape, *inputs).reshape(B, shape.T, N, -1)[:, :T, :, :H]


@dataclass(frozen=True)
class _Shape:
    B: int
    T: int  # padded, as S and width
    S: int
    K: int  # groups
    C: int  # parts of a group, each a program's
    F: int  # heads of such a part
    H: int
    width: int  # of a head
    fetch: int
    fetches: int  # at most, that a block of queries sees a part of
    rows: int  # at most, blocks of queries that see a part of one fetch

    @classmethod
    def of(
        cls, B: int, T: int, S: int, K: int, G: int, H: int, itemsize: int, window: int | None
    ) -> "_Shape":
        T, width = _round_up(T, BLOCK), _round_up(H, LANES)
        fits = max(CHANNELS[itemsize] // width, 1)
        F = max(n for n in range(1, min(fits, G) + 1) if G % n == 0)
        num_fetches = pl.cdiv(S, FETCH_BYTES // (width * itemsize))
        fetch = _round_up(pl.cdiv(S, num_fetches), BLOCK)
        fetches, rows = num_fetches, T // BLOCK
        if window is not None:  # n keys in a row lie in (n - 1) / fetch + 1 fetches, rounded up
            fetches = min(fetches, pl.cdiv(window + BLOCK - 2, fetch) + 1)
            rows = min(rows, pl.cdiv(window + fetch - 2, BLOCK) + 1)
        return cls(B, T, num_fetches * fetch, K, G // F, F, H, width, fetch, fetches, rows)

    @property
    def num_rows(self) -> int:
        return self.T // BLOCK

    @property
    def num_fetches(self) -> int:
        return self.S // self.fetch

    @property
    def per_fetch(self) -> int:
        return self.fetch // BLOCK

    @property
    def scale(self) -> float:
        return self.H**-0.5

    def heads(self) -> list[tuple[slice, slice]]:
        """(row of its statistics, its channels) of every head of a program."""
        return [
            (slice(f, f + 1), slice(f * self.width, (f + 1) * self.width)) for f in range(self.F)
        ]


def _round_up(n: int, multiple: int) -> int:
    return pl.cdiv(n, multiple) * multiple


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(s: _Shape, q_BTX: Array, k_BSX: Array, v_BSX: Array, range_BXT: Array) -> Array:
    return _attention_fwd(s, q_BTX, k_BSX, v_BSX, range_BXT)[0]


def _attention_fwd(
    s: _Shape, q_BTX: Array, k_BSX: Array, v_BSX: Array, range_BXT: Array
) -> tuple[Array, tuple]:
    heads, keys, ranges, stats = _specs(s, partial(_place_by_rows, s))
    out_BTX, lse = _call(
        partial(_forward_kernel, s),
        grid=(s.B, s.K, s.C, s.num_rows, s.fetches),
        num_parallel=4,
        prefetched=_blocks_seen(s, range_BXT),
        inputs=[(ranges, range_BXT), (heads, q_BTX), (keys, k_BSX), (keys, v_BSX)],
        outputs=[(heads, _like(q_BTX)), (stats, _stats(s))],
        scratch=[(s.F * s.width, BLOCK), (s.F, BLOCK), (s.F, BLOCK)],
        name="attention_forward",
    )
    return out_BTX, (q_BTX, k_BSX, v_BSX, range_BXT, out_BTX, lse)


def _attention_bwd(s: _Shape, saved: tuple, dout_BTX: Array) -> tuple:
    q_BTX, k_BSX, v_BSX, range_BXT, out_BTX, lse = saved
    seen = _blocks_seen(s, range_BXT)
    heads, keys, ranges, stats = _specs(s, partial(_place_by_rows, s))
    dq_BTX, delta = _call(
        partial(_dq_kernel, s),
        grid=(s.B, s.K, s.C, s.num_rows, s.fetches),
        num_parallel=4,
        prefetched=seen,
        inputs=[(ranges, range_BXT), (heads, q_BTX), (heads, out_BTX), (heads, dout_BTX),
                (keys, k_BSX), (keys, v_BSX), (stats, lse)],
        outputs=[(heads, _like(q_BTX)), (stats, _stats(s))],
        scratch=[(s.F * s.width, BLOCK)],
        name="attention_dq",
    )  # fmt: skip
    heads, keys, ranges, stats = _specs(s, partial(_place_by_fetches, s))
    dk_BSX, dv_BSX = _call(
        partial(_dkv_kernel, s),
        grid=(s.B, s.K, s.num_fetches, s.C, s.rows),
        num_parallel=3,
        prefetched=[*seen, *_rows_seeing(s, *seen)],
        inputs=[(ranges, range_BXT), (heads, q_BTX), (heads, dout_BTX), (keys, k_BSX),
                (keys, v_BSX), (stats, lse), (stats, delta)],
        outputs=[(keys, _like(k_BSX)), (keys, _like(v_BSX))],
        scratch=[(s.fetch, s.width)] * 2,
        name="attention_dkv",
    )  # fmt: skip
    return dq_BTX, dk_BSX, dv_BSX, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _blocks_seen(s: _Shape, range_BXT: Array) -> list[Array]:
    """[B * num_rows], twice: the blocks of keys, from and up to, that a block of queries sees."""
    first, last = (x.reshape(s.B * s.num_rows, BLOCK) for x in (range_BXT[:, 0], range_BXT[:, 1]))
    begin = jnp.minimum(first.min(1), s.S - 1) // BLOCK
    return [begin, jnp.maximum(last.max(1) // BLOCK + 1, begin)]


def _rows_seeing(s: _Shape, begin: Array, end: Array) -> list[Array]:
    """[B * num_fetches], twice: the blocks of queries, from and up to, that see a part of it."""
    begin, end = (x.reshape(s.B, s.num_rows, 1) for x in (begin, end))
    start = jnp.arange(s.num_fetches, dtype=jnp.int32) * s.per_fetch
    sees = (begin < start + s.per_fetch) & (end > start)
    row = jnp.arange(s.num_rows, dtype=jnp.int32)[:, None]
    begin = jnp.where(sees, row, s.num_rows).min(1)
    end = jnp.where(sees, row + 1, 0).max(1)
    return [begin.reshape(-1), end.reshape(-1)]


def _place_by_rows(s: _Shape, b, k, c, i, step, begin, end) -> tuple:
    """(b, k, c, block of queries, fetch) of a program. Where it has nothing to do, it stays with
    the latest fetch: none is started."""
    at = b * s.num_rows + i
    d = lax.div(begin[at], s.per_fetch) + step
    return b, k, c, i, lax.max(lax.min(d, lax.div(end[at] - 1, s.per_fetch)), 0)


def _place_by_fetches(s: _Shape, b, k, d, c, step, _, __, begin, end) -> tuple:
    at = b * s.num_fetches + d
    return b, k, c, lax.max(lax.min(begin[at] + step, end[at] - 1), 0), d


def _specs(s: _Shape, place: Callable) -> tuple[pl.BlockSpec, ...]:
    """How a program sees queries, keys, the range of keys of each query, and its statistics."""

    def spec(block: tuple, index: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(block, lambda *grid: index(*place(*grid)))

    return (
        spec((None, BLOCK, s.F * s.width), lambda b, k, c, i, d: (b, i, k * s.C + c)),
        spec((None, s.fetch, s.width), lambda b, k, c, i, d: (b, d, k)),
        spec((None, 2, BLOCK), lambda b, k, c, i, d: (b, 0, i)),
        spec((None, None, s.F, BLOCK), lambda b, k, c, i, d: (b, k * s.C + c, 0, i)),
    )


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _stats(s: _Shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((s.B, s.K * s.C, s.F, s.T), jnp.float32)


def _call(
    kernel: Callable,
    *,
    grid: tuple[int, ...],
    num_parallel: int,
    prefetched: list[Array],
    inputs: list[tuple[pl.BlockSpec, Array]],
    outputs: list[tuple[pl.BlockSpec, jax.ShapeDtypeStruct]],
    scratch: list[tuple[int, int]],
    name: str,
) -> list[Array]:
    """The kernel's references: prefetched, inputs in their order, outputs, scratch (float32)."""
    in_specs, arrays = zip(*inputs, strict=True)
    out_specs, out_shape = zip(*outputs, strict=True)
    order = ("parallel",) * num_parallel + ("arbitrary",) * (len(grid) - num_parallel)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(block, jnp.float32) for block in scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        interpret=mode(),
        name=name,
    )(*prefetched, *arrays)


def _forward_kernel(
    s: _Shape,
    begin_ref,  # [B * num_rows]
    end_ref,  # [B * num_rows]
    range_ref,  # [2, BLOCK]
    q_ref,  # [BLOCK, F * width]
    k_ref,  # [fetch, width]
    v_ref,  # [fetch, width]
    out_ref,  # [BLOCK, F * width]
    lse_ref,  # [F, BLOCK]: base 2
    sum_ref,  # [F * width, BLOCK]: of weighted values, transposed as the scores
    top_ref,  # [F, BLOCK]
    total_ref,  # [F, BLOCK]
):
    step = pl.program_id(4)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = jnp.full_like(top_ref, -1e30)  # finite: a row may see nothing for a while
        total_ref[...] = jnp.zeros_like(total_ref)

    def visit(keys: pl.Slice, seen: Array) -> None:
        k, v = k_ref[keys, :], v_ref[keys, :]
        v_HS = v.T

        def products(row: slice, head: slice) -> tuple[Array]:
            return (_dot(k, q_ref[:, head].T),)

        def attend(row: slice, head: slice, scores: Array) -> None:
            scores = jnp.where(seen, scores * (s.scale * LOG2_E), -jnp.inf)
            top = jnp.maximum(top_ref[row, :], scores.max(0, keepdims=True))
            shrink = jnp.exp2(top_ref[row, :] - top)
            weights = jnp.exp2(scores - top)
            top_ref[row, :] = top
            total_ref[row, :] = total_ref[row, :] * shrink + weights.sum(0, keepdims=True)
            sum_ref[head, :] = sum_ref[head, :] * shrink + _dot(v_HS, weights.astype(v.dtype))

        _for_heads(s, products, attend)

    at = pl.program_id(0) * s.num_rows + pl.program_id(3)
    d = lax.div(begin_ref[at], s.per_fetch) + step
    _for_keys(s, visit, range_ref, begin_ref[at], end_ref[at], d)

    @pl.when(step == s.fetches - 1)
    def _():
        total = jnp.where(total_ref[...] > 0, total_ref[...], 1)
        lse_ref[...] = top_ref[...] + jnp.log2(total)
        for row, head in s.heads():
            out_ref[:, head] = (sum_ref[head, :] / total[row]).T.astype(out_ref.dtype)


def _dq_kernel(
    s: _Shape,
    begin_ref,  # [B * num_rows]
    end_ref,  # [B * num_rows]
    range_ref,  # [2, BLOCK]
    q_ref,  # [BLOCK, F * width]
    out_ref,  # [BLOCK, F * width]
    dout_ref,  # [BLOCK, F * width]
    k_ref,  # [fetch, width]
    v_ref,  # [fetch, width]
    lse_ref,  # [F, BLOCK]
    dq_ref,  # [BLOCK, F * width]
    delta_ref,  # [F, BLOCK]: sums of out * dout, written for _dkv_kernel too
    sum_ref,  # [F * width, BLOCK]
):
    step = pl.program_id(4)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        for row, head in s.heads():
            product = out_ref[:, head].astype(jnp.float32) * dout_ref[:, head].astype(jnp.float32)
            delta_ref[row, :] = product.T.sum(0, keepdims=True)

    def visit(keys: pl.Slice, seen: Array) -> None:
        k, v = k_ref[keys, :], v_ref[keys, :]
        k_HS = k.T

        def products(row: slice, head: slice) -> tuple[Array, Array]:
            return _dot(k, q_ref[:, head].T), _dot(v, dout_ref[:, head].T)

        def attend(row: slice, head: slice, scores: Array, dweights: Array) -> None:
            weights = _weights(s, scores, seen, lse_ref[row, :])
            dscores = weights * (dweights - delta_ref[row, :])
            sum_ref[head, :] += _dot(k_HS, dscores.astype(k.dtype))

        _for_heads(s, products, attend)

    at = pl.program_id(0) * s.num_rows + pl.program_id(3)
    d = lax.div(begin_ref[at], s.per_fetch) + step
    _for_keys(s, visit, range_ref, begin_ref[at], end_ref[at], d)

    @pl.when(step == s.fetches - 1)
    def _():
        for _, head in s.heads():
            dq_ref[:, head] = (sum_ref[head, :] * s.scale).T.astype(dq_ref.dtype)


def _dkv_kernel(
    s: _Shape,
    begin_ref,  # [B * num_rows]
    end_ref,  # [B * num_rows]
    row_begin_ref,  # [B * num_fetches]
    row_end_ref,  # [B * num_fetches]
    range_ref,  # [2, BLOCK]
    q_ref,  # [BLOCK, F * width]
    dout_ref,  # [BLOCK, F * width]
    k_ref,  # [fetch, width]
    v_ref,  # [fetch, width]
    lse_ref,  # [F, BLOCK]
    delta_ref,  # [F, BLOCK]
    dk_ref,  # [fetch, width]
    dv_ref,  # [fetch, width]
    dk_sum_ref,  # [fetch, width]
    dv_sum_ref,  # [fetch, width]
):
    b, d, c, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))

    @pl.when((c == 0) & (step == 0))
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def visit(keys: pl.Slice, seen: Array) -> None:
        k, v = k_ref[keys, :], v_ref[keys, :]
        dk = dv = jnp.zeros((BLOCK, s.width), jnp.float32)

        def products(row: slice, head: slice) -> tuple[Array, Array]:
            return _dot(k, q_ref[:, head].T), _dot(v, dout_ref[:, head].T)

        def attend(row: slice, head: slice, scores: Array, dweights: Array) -> None:
            nonlocal dk, dv
            q, dout = q_ref[:, head], dout_ref[:, head]
            weights = _weights(s, scores, seen, lse_ref[row, :])
            dscores = weights * (dweights - delta_ref[row, :])
            dv += _dot(weights.astype(dout.dtype), dout)
            dk += _dot(dscores.astype(q.dtype), q)

        _for_heads(s, products, attend)
        dk_sum_ref[keys, :] += dk
        dv_sum_ref[keys, :] += dv

    i = row_begin_ref[b * s.num_fetches + d] + step

    @pl.when(i < row_end_ref[b * s.num_fetches + d])
    def _():
        at = b * s.num_rows + i
        _for_keys(s, visit, range_ref, begin_ref[at], end_ref[at], d)

    @pl.when((c == s.C - 1) & (step == s.rows - 1))
    def _():
        dk_ref[...] = (dk_sum_ref[...] * s.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


def _for_keys(s: _Shape, visit: Callable, range_ref, begin, end, d) -> None:
    """Visits the blocks of keys from begin to end that are those of fetch d: with where they lie
    in it, and which are seen, [keys, queries]."""
    first, last = range_ref[:1, :], range_ref[1:, :]

    def body(j, _):
        keys = pl.ds(pl.multiple_of((j - d * s.per_fetch) * BLOCK, BLOCK), BLOCK)
        key = j * BLOCK + lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 0)
        visit(keys, (key >= first) & (key <= last))

    lax.fori_loop(lax.max(begin, d * s.per_fetch), lax.min(end, (d + 1) * s.per_fetch), body, None)


def _for_heads(s: _Shape, products: Callable, attend: Callable) -> None:
    """attend(row, head, *products(row, head)), the products AHEAD heads before."""
    heads = s.heads()
    waiting = [products(*head) for head in heads[:AHEAD]]
    for f, head in enumerate(heads):
        if f + AHEAD < s.F:
            waiting.append(products(*heads[f + AHEAD]))
        attend(*head, *waiting[f])


def _weights(s: _Shape, scores: Array, seen: Array, lse: Array) -> Array:
    return jnp.where(seen, jnp.exp2(scores * (s.scale * LOG2_E) - lse), 0)


def _dot(a: Array, b: Array) -> Array:
    """In float32; a precision set outside, in a program of float32 parameters, is not meant for
    bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
