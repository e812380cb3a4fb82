"""gelu(gate) * up, the tanh approximation of GELU.

Twin: implementations/jax_backend/kernels/gated_gelu.py.  Truth: implementations/reference.py.

With u = sqrt(2 / pi) (x + 0.044715 x^3), gelu(x) = x (1 + tanh u) / 2 = x sigmoid(2 u): in this
form the tails, where 1 + tanh cancels, keep their digits. Bytes an element of bfloat16 (float32:
twice as many): forward 6 (reads gate, up; writes the product), backward 10 (reads gate, up, dout;
writes dgate, dup). Nothing but the inputs is kept for it.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from implementations.config import choose
from implementations.engine import Unsupported

# Elements of a program of 4 warps: 16 a thread are two 16-byte loads of bfloat16 an operand. There
# is no loop to pipeline; other programs on the processor hide the latency.
BLOCK = 2048
NUM_WARPS = 4


def gated_gelu(gate: Tensor, up: Tensor, variant: str) -> Tensor:
    """In gate's dtype; computed in float32 (plain: float64 in float64)."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gated_gelu needs gate and up of one shape and dtype; got {gate.dtype} "
            f"{tuple(gate.shape)} and {up.dtype} {tuple(up.shape)}."
        )
    return VARIANTS[choose("layers", variant, VARIANTS, "kernels")](gate, up)


def _plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _triton(gate: Tensor, up: Tensor) -> Tensor:
    if gate.dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"kernels.layers=triton has no GELU in {gate.dtype}; use plain.")
    return _GatedGelu.apply(gate.contiguous(), up.contiguous())


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        if num_elements := gate.numel():
            _gated_gelu_fwd_kernel[(triton.cdiv(num_elements, BLOCK),)](
                gate, up, out, num_elements, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        if num_elements := gate.numel():
            _gated_gelu_bwd_kernel[(triton.cdiv(num_elements, BLOCK),)](
                gate,
                up,
                dout.contiguous(),
                dgate,
                dup,
                num_elements,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
        return dgate, dup


@triton.jit
def _sigmoid_and_slope(u):
    """(sigmoid(u), its derivative), by exp of no positive number, so that none overflows."""
    e = tl.exp(-tl.abs(u))
    inverse = 1 / (1 + e)
    return tl.where(u >= 0, inverse, e * inverse), e * inverse * inverse


# num_elements is specialised on its divisibility by 16, without which the mask of a 16-byte load is
# not known to be one: at most three programs, and one for all lengths of a model of even widths.
@triton.jit
def _gated_gelu_fwd_kernel(
    gate_ptr,  # [num_elements]
    up_ptr,  # [num_elements]
    out_ptr,  # [num_elements]
    num_elements,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_elements
    x = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    # 2 sqrt(2 / pi) = 1.5957691216057308
    weight, _ = _sigmoid_and_slope(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    tl.store(out_ptr + at, (x * weight * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_gelu_bwd_kernel(
    gate_ptr,  # [num_elements]
    up_ptr,  # [num_elements]
    dout_ptr,  # [num_elements]
    dgate_ptr,  # [num_elements]
    dup_ptr,  # [num_elements]
    num_elements,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_elements
    x = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
    weight, slope = _sigmoid_and_slope(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    inner = 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)
    dgate = dout * up * (weight + x * slope * inner)
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + at, (dout * x * weight).to(dup_ptr.dtype.element_ty), mask=mask)


VARIANTS = {"plain": _plain, "triton": _triton}
