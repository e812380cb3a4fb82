"""Norm, gated GELU, causal convolution and cross entropy in Triton's interpreter, against float64.

Values and every gradient; lengths about tiles, odd widths, strides, packed documents, states. Pairs
of settings, not all products of them: the cases are in tests/triton_layers_cases.py.
"""

import pytest

from implementations.engine import Unsupported

# Of a tensor's largest true value. Measured: at most 1.1e-6 and 4.8e-3.
TOLERANCE = {"float32": 4e-6, "bfloat16": 8e-3}
# What is float32 in a bfloat16 model too: sums over rows, losses; and what is only copied.
WIDE = {
    "rms_norm": {"dscale"},
    "add_rms_norm": {"sum", "dscale"},
    "gated_gelu": set(),
    "causal_conv": {"dweight", "dbias", "conv_BWR"},
    "cross_entropy": {"nll"},
    "mean_cross_entropy": {"loss", "without grad"},
}

CASES = [
    # one row; fewer rows than a tile; ragged rows and channels; several tiles a program
    ("rms_norm", {"B": 1, "T": 1, "D": 3}),
    ("rms_norm", {"B": 2, "T": 7, "D": 65, "is_strided": True}),
    ("rms_norm", {"B": 2, "T": 100, "D": 64}),
    ("rms_norm", {"B": 1, "T": 7, "D": 1024, "size": 1e-3}),
    ("rms_norm", {"B": 1, "T": 3, "D": 3000}),
    ("add_rms_norm", {"B": 1, "T": 1, "D": 3}),
    ("add_rms_norm", {"B": 2, "T": 7, "D": 65, "is_strided": True}),
    ("add_rms_norm", {"B": 1, "T": 257, "D": 64}),
    ("add_rms_norm", {"B": 1, "T": 7, "D": 1024, "pulled_by": "norm"}),
    ("add_rms_norm", {"B": 1, "T": 7, "D": 96, "pulled_by": "sum"}),
    ("gated_gelu", {"B": 1, "T": 1, "F": 3}),
    ("gated_gelu", {"B": 2, "T": 7, "F": 65, "is_strided": True}),
    ("gated_gelu", {"B": 2, "T": 100, "F": 64}),
    ("gated_gelu", {"B": 1, "T": 7, "F": 1024, "size": 40.0}),
    ("causal_conv", {"B": 2, "T": 1, "R": 3}),
    ("causal_conv", {"B": 2, "T": 2, "R": 3, "starts": "some", "is_strided": True}),
    ("causal_conv", {"B": 2, "T": 7, "R": 65, "index": "int64"}),
    ("causal_conv", {"B": 2, "T": 100, "R": 65, "starts": "some", "has_state": False}),
    ("causal_conv", {"B": 1, "T": 257, "R": 3, "starts": "every", "width": 8}),
    ("causal_conv", {"B": 2, "T": 600, "R": 3, "starts": "some", "is_strided": True}),
    ("causal_conv", {"B": 1, "T": 5, "R": 1024, "width": 2, "has_bias": False}),
    ("causal_conv", {"B": 1, "T": 7, "R": 3, "width": 1}),
    ("causal_conv", {"B": 1, "T": 32, "R": 3, "width": 8, "has_state": False}),
    # a vocabulary of less than a tile, of several rows a tile, of more than one tile
    ("cross_entropy", {"B": 1, "T": 1, "V": 5}),
    ("cross_entropy", {"B": 2, "T": 7, "V": 300, "is_strided": True}),
    ("cross_entropy", {"B": 1, "T": 100, "V": 1000, "index": "int64"}),
    ("cross_entropy", {"B": 1, "T": 3, "V": 5000}),
    ("mean_cross_entropy", {"B": 1, "T": 1, "D": 3, "V": 5}),
    ("mean_cross_entropy", {"B": 2, "T": 7, "D": 65, "V": 300, "chunk": 5}),
    ("mean_cross_entropy", {"B": 2, "T": 20, "D": 16, "V": 1000, "chunk": 20, "soft_cap": 2.0}),
    ("mean_cross_entropy", {"B": 1, "T": 3, "D": 16, "V": 5000, "soft_cap": 30.0, "dloss": 0.3}),
    ("mean_cross_entropy", {"B": 1, "T": 7, "D": 16, "V": 50, "all_ignored": True}),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("op", "arguments"), CASES, ids=[" ".join(map(str, (op, *c.values()))) for op, c in CASES]
)
def test_values_and_gradients_are_true(interpreted, op, arguments, dtype):
    found = interpreted("triton_layers_cases", f"{op}_case", dtype=dtype, **arguments)
    assert len(found) >= 2
    for name, error in found.items():
        limit = TOLERANCE["float32" if name in WIDE[op] else dtype]
        assert error < limit, f"{name}: relative error {error:.1e} in {dtype}"


@pytest.mark.parametrize("which", ["weight of bfloat16", "x alone", "weight alone", "twice"])
def test_the_mean_has_the_gradients_that_are_asked_for(interpreted, which):
    interpreted("triton_layers_cases", "mean_cross_entropy_asked", which=which)


def test_a_target_outside_the_vocabulary_makes_the_loss_nan(interpreted):
    assert interpreted("triton_layers_cases", "wrong_target") == ["nan", "nan"]


@pytest.mark.parametrize("op", ["rms_norm", "gated_gelu", "causal_conv", "cross_entropy"])
def test_float64_is_left_to_plain(interpreted, op):
    assert "use plain" in interpreted("triton_layers_cases", "refusal", op=op)


def test_shapes_that_do_not_fit_are_named():
    import torch

    from implementations.torch_backend.kernels import (
        causal_conv,
        cross_entropy,
        gated_gelu,
        rms_norm,
    )

    x = torch.zeros(2, 5, 3)
    position = torch.zeros(2, 5, dtype=torch.int32)
    weight = torch.zeros(4, 3)
    for call in (
        lambda: rms_norm.rms_norm(x, torch.zeros(4), 1e-6, "plain"),
        lambda: rms_norm.add_rms_norm(x, x[:1], torch.zeros(3), 1e-6, "plain"),
        lambda: gated_gelu.gated_gelu(x, x.double(), "plain"),
        lambda: causal_conv.causal_conv(x, weight, None, position[:, :4], None, "plain"),
        lambda: causal_conv.causal_conv(x, weight, torch.zeros(4), position, None, "plain"),
        lambda: causal_conv.causal_conv(x, weight, None, position, x, "plain"),
        lambda: cross_entropy.cross_entropy(x, position[:1], "plain"),
        lambda: cross_entropy.mean_cross_entropy(x, weight[:, :2], position, None, "plain"),
    ):
        with pytest.raises(ValueError, match="need"):
            call()
    with pytest.raises(Unsupported, match="offered: plain, triton"):
        gated_gelu.gated_gelu(x, x, "trition")
