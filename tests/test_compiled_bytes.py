"""The bytes that a compiled program moves: read from a small one, and of the layers for a TPU."""

import pytest
from topologies import tpu

from benchmarks.compiled_bytes import Pass, measured, passes

# As XLA prints them. x is read whole, w (in VMEM, S(1)) costs nothing, of z a slice is used; the
# copy moves x to VMEM, which reads it; the cache is written in place, one row of it.
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p.0: bf16[8,128], p.1: bf16[8,128], p.2: f32[64,128]) -> (f32[8,128], bf16[8,128]) {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %p.2 = f32[64,128]{1,0:T(8,128)} parameter(2)
  %slice.1 = f32[8,128]{1,0:T(8,128)} slice(%p.2), slice={[8:16], [0:128]}
  %add.1 = bf16[8,128]{1,0:T(8,128)(2,1)} add(%p.0, %p.1)
  ROOT %tuple.1 = (f32[8,128]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%slice.1, %add.1)
}

%written (q.0: f32[64,128], q.1: f32[1,128], q.2: s32[]) -> f32[64,128] {
  %q.0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %q.1 = f32[1,128]{1,0:T(1,128)} parameter(1)
  %q.2 = s32[]{:T(128)} parameter(2)
  ROOT %dus.1 = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%q.0, %q.1, %q.2, %q.2)
}

ENTRY %main.1 (x: bf16[8,128], z: f32[64,128], row: f32[1,128], at: s32[]) -> f32[64,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %z = f32[64,128]{1,0:T(8,128)} parameter(1)
  %row = f32[1,128]{1,0:T(1,128)} parameter(2)
  %at = s32[]{:T(128)} parameter(3)
  %copy-start.1 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %w = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %made = (f32[8,128]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) fusion(%x, %w, /*i=2*/%z), kind=kLoop, calls=%fused
  %first = f32[8,128]{1,0:T(8,128)} get-tuple-element(%made), index=0
  %tanh.1 = f32[8,128]{1,0:T(8,128)} tanh(%first)
  ROOT %kept = f32[64,128]{1,0:T(8,128)} fusion(%z, %row, %at), kind=kLoop, calls=%written
}
"""  # noqa: E501


def test_each_operation_is_counted_once():
    assert passes(PROGRAM) == [
        Pass("copy-start.1", read=2048, written=0),
        Pass("made", read=2048 + 4096, written=4096),
        Pass("tanh.1", read=4096, written=4096),
        Pass("kept", read=512 + 4, written=512),
    ]


def test_a_loop_is_not_counted_as_nothing():
    loop = "  %loop = s32[]{:T(128)} while(%at), condition=%fused, body=%written\n  ROOT"
    with pytest.raises(ValueError, match="what a while moves is not counted"):
        passes(PROGRAM.replace("  ROOT %kept", f"{loop} %kept"))


def test_layers_move_little_more_than_they_must():
    """Of the convolution's gradient, as JAX derives it, XLA moved 2.2 times that."""
    tpu("v5e:2x2")
    rows = measured("v5e:2x2", ["causal_conv", "gated_gelu", "rg_lru_step"])
    assert len(rows) == 5
    for row in rows:
        assert 0.99 < row.ratio < 1.3, row
