"""Logits over the tied embedding, and the negative log likelihood of targets in chunks of tokens.

Twin: implementations/jax_backend/kernels/cross_entropy.py.  Truth: implementations/reference.py.

`cross_entropy` of float32 logits moves 4 bytes an element forward and 8 backward (reads the logits;
reads them, writes their gradient); the sum of exponentials is kept, 4 bytes a row.

`mean_cross_entropy` never holds all logits: of a chunk of tokens they are multiplied out, and one
kernel goes over each row twice, first for the sum, then, while the row is in the cache, to write
the gradient of the mean loss; two products make of that the gradients of x and of the embedding.
The backward pass only scales them. In bfloat16 every product takes bfloat16 and gives float32, and
the gradient of a logit is rounded to bfloat16 for the last two; in float32 it takes the logit's
place.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from implementations.engine import IGNORED, Unsupported
from implementations.torch_backend.kernels.rms_norm import check

# A chunk's logits fit the L2 cache of a recent GPU (50 MB and more), but it is never of fewer
# tokens than make the float32 sum of the embedding's gradient a small part: each chunk reads and
# writes it, and where a byte has 300 FLOP and more (H100: 989 TFLOP/s over 3.35 TB/s), products of
# 2048 tokens, 2 FLOP a token and element, are longer than its 8 to 16 bytes.
CHUNK_BYTES = 2**26
MIN_CHUNK = 2048
# Elements of a tile: 16 a thread are four 16-byte loads of float32. A small vocabulary has several
# rows a program.
TILE = 2048
NUM_WARPS = 4


def unembed(x: Tensor, weight_VD: Tensor, soft_cap: float | None) -> Tensor:
    """Logits, float32 (float64 in float64); a soft cap c makes them c tanh(logits / c)."""
    if has_wide_product(x) and not torch.is_grad_enabled():
        # The same sums of exact products; a weight made wide would be most of a token's bytes.
        rows = _product(x.reshape(-1, x.shape[-1]), weight_VD.to(x.dtype).t())
        logits = rows.view(*x.shape[:-1], -1)
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), weight_VD.to(x.dtype).to(wide))
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, variant: str) -> Tensor:
    """Negative log likelihood of each target, nats; 0 where IGNORED. Triton: always float32."""
    if targets_BT.shape != logits_BTV.shape[:-1]:
        raise ValueError(
            f"cross_entropy needs one target a row; got logits {tuple(logits_BTV.shape)} and "
            f"targets {tuple(targets_BT.shape)}."
        )
    compute = {"plain": _plain_rows, "triton": _triton_rows}
    return compute[check(variant)](logits_BTV, targets_BT)


def mean_cross_entropy(
    x_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    soft_cap: float | None,
    variant: str,
) -> Tensor:
    """The mean over scored targets, nats, of the logits that `unembed` makes."""
    if targets_BT.shape != x_BTD.shape[:-1] or weight_VD.shape[1:] != x_BTD.shape[-1:]:
        raise ValueError(
            "mean_cross_entropy needs x [B, T, D], weight [V, D] and targets [B, T]; got x "
            f"{tuple(x_BTD.shape)}, weight {tuple(weight_VD.shape)}, targets "
            f"{tuple(targets_BT.shape)}."
        )
    compute = VARIANTS[check(variant)]
    return compute(x_BTD, weight_VD, targets_BT, soft_cap)


def _plain(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, soft_cap: float | None) -> Tensor:
    nll_BT = _plain_rows(unembed(x_BTD, weight_VD, soft_cap), targets_BT)
    return nll_BT.sum() / (targets_BT != IGNORED).sum().clamp(min=1)


def _plain_rows(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    nll = F.cross_entropy(
        logits_BTV.flatten(0, -2),
        targets_BT.flatten().long(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return nll.view(targets_BT.shape)


def _triton_rows(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    _check_dtype(logits_BTV)
    return _CrossEntropy.apply(logits_BTV.contiguous(), targets_BT.contiguous())


def _triton(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, soft_cap: float | None) -> Tensor:
    _check_dtype(x_BTD)
    # Within Function.forward gradients are off, and whether the caller's were is not known.
    needs_grad = torch.is_grad_enabled()
    return _MeanCrossEntropy.apply(
        x_BTD.contiguous(), weight_VD.contiguous(), targets_BT.contiguous(), soft_cap, needs_grad
    )


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"kernels.layers=triton has no cross entropy in {x.dtype}; use plain.")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        nll_BT = logits_BTV.new_empty(targets_BT.shape, dtype=torch.float32)
        total_BT = torch.empty_like(nll_BT)
        _launch(_nll_fwd_kernel, logits_BTV, targets_BT, nll_BT, total_BT)
        ctx.save_for_backward(logits_BTV, targets_BT, total_BT)
        return nll_BT

    @staticmethod
    def backward(ctx, dnll_BT: Tensor) -> tuple[Tensor, None]:
        logits_BTV, targets_BT, total_BT = ctx.saved_tensors
        dlogits_BTV = torch.empty_like(logits_BTV)
        operands = (targets_BT, total_BT, dnll_BT.contiguous(), dlogits_BTV)
        _launch(_nll_bwd_kernel, logits_BTV, *operands)
        return dlogits_BTV, None


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_BTD: Tensor,
        weight_VD: Tensor,
        targets_BT: Tensor,
        soft_cap: float | None,
        needs_grad: bool,
    ) -> Tensor:
        needs_dx, needs_dweight = (needs_grad and needed for needed in ctx.needs_input_grad[:2])
        V, D = weight_VD.shape
        x_ND, targets_N = x_BTD.view(-1, D), targets_BT.view(-1)
        cast_VD = weight_VD.to(x_BTD.dtype)
        nll_N = x_BTD.new_empty(targets_N.shape, dtype=torch.float32)
        num_scored = (targets_N != IGNORED).sum().clamp(min=1).float()
        dx_ND = torch.empty_like(x_ND) if needs_dx else None
        dweight_VD = None
        chunk = max(CHUNK_BYTES // (4 * V), MIN_CHUNK)
        for start in range(0, x_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            dlogits_CV = _chunk(
                x_ND[part],
                cast_VD,
                targets_N[part],
                num_scored,
                nll_N[part],
                soft_cap,
                needs_grad=needs_dx or needs_dweight,
            )
            if needs_dx:
                dx_ND[part] = _product(dlogits_CV, cast_VD)
            if needs_dweight:
                dweight_VD = _add_product(dweight_VD, dlogits_CV.t(), x_ND[part])
            del dlogits_CV  # before the next chunk's take its place
        if needs_dweight and dweight_VD is None:
            dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        ctx.save_for_backward(dx_ND, dweight_VD)
        ctx.shape, ctx.weight_dtype = x_BTD.shape, weight_VD.dtype
        return nll_N.sum() / num_scored

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple:
        """Scaled in place: of a second backward pass autograd says that they have changed."""
        dx_ND, dweight_VD = ctx.saved_tensors
        dx_BTD = None if dx_ND is None else dx_ND.mul_(dloss).view(ctx.shape)
        if dweight_VD is not None:
            dweight_VD = dweight_VD.mul_(dloss).to(ctx.weight_dtype)
        return dx_BTD, dweight_VD, None, None, None


def _chunk(
    x_CD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    num_scored: Tensor,
    nll_C: Tensor,
    soft_cap: float | None,
    *,
    needs_grad: bool,
) -> Tensor | None:
    """Writes nll; the gradient of the mean loss in the logits, in x's dtype."""
    logits_CV = _product(x_CD, weight_VD.t())
    if not needs_grad:
        _launch(_nll_fwd_kernel, logits_CV, targets_C, nll_C, None, soft_cap=soft_cap)
        return None
    is_float32 = x_CD.dtype == torch.float32
    dlogits_CV = logits_CV if is_float32 else torch.empty_like(logits_CV, dtype=x_CD.dtype)
    operands = (targets_C, num_scored, nll_C, dlogits_CV)
    _launch(_nll_both_kernel, logits_CV, *operands, soft_cap=soft_cap)
    return dlogits_CV


def has_wide_product(x: Tensor) -> bool:
    """Whether torch.mm gives float32 for operands of x's dtype: on CUDA, and not on AMD's."""
    return x.dtype == torch.bfloat16 and x.is_cuda and torch.version.hip is None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, whatever they are in."""
    if has_wide_product(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in place: a product that begins with what is there."""
    if total is None:
        return _product(left, right)
    if has_wide_product(left):
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    return total.addmm_(left.float(), right.float())


def _launch(kernel, logits: Tensor, *operands: Tensor | None, soft_cap: float | None = None):
    V = logits.shape[-1]
    num_rows = logits.numel() // max(V, 1)
    block_V = min(triton.next_power_of_2(V), TILE)
    block_rows = TILE // block_V
    if num_rows:
        kernel[(triton.cdiv(num_rows, block_rows),)](
            logits,
            *operands,
            num_rows,
            V=V,
            CAP=soft_cap,
            IGNORED=IGNORED,
            BLOCK_ROWS=block_rows,
            BLOCK_V=block_V,
            num_warps=NUM_WARPS,
        )


@triton.jit
def _rows(targets_ptr, num_rows, IGNORED: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The program's first row, in int64 as first * V passes 2**31; its rows counted from there,
    whether they are there, their targets, whether they are scored."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    is_row = first + row < num_rows
    target = tl.load(targets_ptr + first + row, mask=is_row, other=IGNORED)
    return first, row, is_row, target, target != IGNORED


@triton.jit
def _capped(logit, CAP: tl.constexpr):
    """(CAP * tanh(logit / CAP), its slope), without a CAP (logit, 1); exp of no positive number, so
    that none overflows, and the first terms of tanh near 0, where its difference would cancel."""
    if CAP is not None:
        u = logit / CAP
        e = tl.exp(-2 * tl.abs(u))
        inverse = 1 / (1 + e)
        far = tl.where(u >= 0, 1.0, -1.0) * (1 - e) * inverse
        square = u * u
        # The next term is below 3e-8 of the sum where |u| < 0.2.
        near = u * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        logit = CAP * tl.where(tl.abs(u) < 0.2, near, far)
        slope = 4 * e * inverse * inverse
    else:
        slope = tl.full(logit.shape, 1.0, tl.float32)
    return logit, slope


@triton.jit
def _log_sum(
    logits_ptr,
    row,
    is_row,
    V: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The logarithm of the sum of exp(logits) of each row, in one pass."""
    top = tl.full([BLOCK_ROWS], -1e30, tl.float32)  # finite: no -inf - -inf
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in tl.range(0, V, BLOCK_V, num_stages=3):
        token = start + tl.arange(0, BLOCK_V)
        mask = is_row[:, None] & (token < V)[None, :]
        at = row[:, None] * V + token[None, :]
        logit = tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32)
        logit, _ = _capped(logit, CAP)
        logit = tl.where((token < V)[None, :], logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logit - new_top[:, None]), 1)
        top = new_top
    return top + tl.log(total)


@triton.jit
def _store_nll(
    logits_ptr, nll_ptr, row, is_row, target, is_scored, log_sum,
    V: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """A target outside the vocabulary makes the loss NaN: nothing is read there."""
    is_token = is_scored & (target >= 0) & (target < V)
    at_target = tl.load(logits_ptr + row * V + target, mask=is_token, other=float("nan"))
    at_target, _ = _capped(at_target.to(tl.float32), CAP)
    nll = tl.where(is_scored, log_sum - at_target, 0.0)
    tl.store(nll_ptr + row, nll, mask=is_row)


@triton.jit
def _store_gradient(
    logits_ptr, dlogits_ptr, row, is_row, target, log_sum, dnll,
    V: tl.constexpr, CAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(softmax - one at the target) * dnll, through the cap; dnll is 0 where IGNORED."""
    for start in tl.range(0, V, BLOCK_V, num_stages=3):
        token = start + tl.arange(0, BLOCK_V)
        mask = is_row[:, None] & (token < V)[None, :]
        at = row[:, None] * V + token[None, :]
        logit = tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32)
        logit, slope = _capped(logit, CAP)
        is_target = token[None, :] == target[:, None]
        gradient = tl.exp(logit - log_sum[:, None]) - tl.where(is_target, 1.0, 0.0)
        gradient = gradient * dnll[:, None] * slope
        tl.store(dlogits_ptr + at, gradient.to(dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _nll_fwd_kernel(
    logits_ptr,  # [num_rows, V]
    targets_ptr,  # [num_rows]
    nll_ptr,  # [num_rows] float32
    total_ptr,  # [num_rows] float32: the log of the sum of exponentials, or None
    num_rows,
    V: tl.constexpr,
    CAP: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    first, row, is_row, target, is_scored = _rows(targets_ptr, num_rows, IGNORED, BLOCK_ROWS)
    logits_ptr += first * V
    log_sum = _log_sum(logits_ptr, row, is_row, V, CAP, BLOCK_ROWS, BLOCK_V)
    _store_nll(logits_ptr, nll_ptr + first, row, is_row, target, is_scored, log_sum, V, CAP)
    if total_ptr is not None:
        tl.store(total_ptr + first + row, log_sum, mask=is_row)


@triton.jit(do_not_specialize=["num_rows"])
def _nll_bwd_kernel(
    logits_ptr,  # [num_rows, V]
    targets_ptr,  # [num_rows]
    total_ptr,  # [num_rows] float32
    dnll_ptr,  # [num_rows] float32
    dlogits_ptr,  # [num_rows, V]
    num_rows,
    V: tl.constexpr,
    CAP: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    first, row, is_row, target, is_scored = _rows(targets_ptr, num_rows, IGNORED, BLOCK_ROWS)
    logits_ptr += first * V
    log_sum = tl.load(total_ptr + first + row, mask=is_row, other=0.0)
    dnll = tl.load(dnll_ptr + first + row, mask=is_scored, other=0.0).to(tl.float32)
    dlogits_ptr += first * V
    _store_gradient(logits_ptr, dlogits_ptr, row, is_row, target, log_sum, dnll, V, CAP, BLOCK_V)


@triton.jit(do_not_specialize=["num_rows"])
def _nll_both_kernel(
    logits_ptr,  # [num_rows, V]
    targets_ptr,  # [num_rows]
    num_scored_ptr,  # [] float32
    nll_ptr,  # [num_rows] float32
    dlogits_ptr,  # [num_rows, V]: may be the logits themselves
    num_rows,
    V: tl.constexpr,
    CAP: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    first, row, is_row, target, is_scored = _rows(targets_ptr, num_rows, IGNORED, BLOCK_ROWS)
    logits_ptr += first * V
    log_sum = _log_sum(logits_ptr, row, is_row, V, CAP, BLOCK_ROWS, BLOCK_V)
    _store_nll(logits_ptr, nll_ptr + first, row, is_row, target, is_scored, log_sum, V, CAP)
    # In place another warp writes where the target's logit is read.
    tl.debug_barrier()
    dnll = tl.where(is_scored, 1 / tl.load(num_scored_ptr), 0.0)
    dlogits_ptr += first * V
    _store_gradient(logits_ptr, dlogits_ptr, row, is_row, target, log_sum, dnll, V, CAP, BLOCK_V)


VARIANTS = {"plain": _plain, "triton": _triton}
