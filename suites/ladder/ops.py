"""L1, L2, L3 (and in bfloat16 L7): every op of the model alone, from inputs that are exact.

Shapes are those of the run: its model's widths, its packed documents, more than three windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from implementations import ops, parameters, reference
from implementations.config import ModelConfig
from implementations.engine import LANGUAGES, Engine
from implementations.reference import Params
from suites.harness.run import Run
from suites.ladder.check import Check, section_of, to_bfloat16
from suites.ladder.model import moved_parameters, packed_batches

VALUES = {"float64": "L1", "float32": "L2", "bfloat16": "L7"}
# The settings of the kernels that each op calls: with other ones it is the same program.
KERNELS = {
    "embed": (),
    "rms_norm": ("layers",),
    "linear": (),
    "gelu": ("layers",),
    "causal_conv": ("layers",),
    "block_diagonal": (),
    "bounded_sqrt": (),
    "linear_scan": ("linear_scan",),
    "rg_lru": ("linear_scan",),
    "rope": ("layers",),
    "attention": ("attention",),
    "unembed": (),
    "cross_entropy": ("layers",),
    "mlp": ("layers",),
    **{f"{kind}.rg_lru": ("linear_scan", "layers") for kind in ("mixer", "chunks", "layer")},
    **{f"{kind}.mqa": ("attention", "layers") for kind in ("mixer", "chunks", "layer")},
}
LONG = 600  # tokens: more than kernels that split time take at once
MANY = (4, 1024)  # sequences, tokens: a gradient summed over them in bfloat16 loses a tenth
GRADIENTS = {"float64": "L3", "float32": "L3", "bfloat16": "L7"}


@dataclass(frozen=True)
class Case:
    """One call of an op; `name` is the op's, with what is special about the call."""

    name: str
    params: Params
    inputs: dict[str, np.ndarray]

    @property
    def op(self) -> str:
        return self.name.partition(" ")[0]


def checks(run: Run, engine: Engine) -> Iterator[Check]:
    values, gradients = VALUES[run.dtype], GRADIENTS[run.dtype]
    rng = np.random.default_rng([run.seed, 2])
    chosen = run.kernels.chosen
    for case in cases(run):
        if chosen and not chosen.keys() & set(KERNELS[case.op]):
            continue
        case = _rounded(case) if run.dtype == "bfloat16" else case
        op = ops.OPS[case.op]
        shapes = op.forward(run.model, case.params, case.inputs)
        doutputs = tuple(rng.standard_normal(y.shape).astype(np.float32) for y in shapes)
        if run.dtype == "bfloat16":
            doutputs = tuple(map(to_bfloat16, doutputs))
        arguments = (case.params, case.inputs, doutputs)
        outputs, dparams, dinputs = engine.op(case.op, *arguments)
        true = ops.call(case.op, run.model, *arguments)
        for level, prefix, ours, wanted in (
            (values, "", outputs, true[0]),
            (gradients, "d", dparams, true[1]),
            (gradients, "d", dinputs, true[2]),
        ):
            for name, want in wanted.items():
                yield Check(f"{level}/{case.name}/{prefix}{name}", ours.get(name), want)
        if run.dtype == "bfloat16" and "h_BR" in outputs:
            h_BR = outputs["h_BR"]  # rounding it loses less than the gates have lost before
            is_rounded = np.mean(h_BR == to_bfloat16(h_BR)) > 0.5
            yield Check(f"{values}/{case.name}/h_BR rounded", np.array(is_rounded), np.array(0))


def cases(run: Run) -> Iterator[Case]:
    """Every op that the model is made of, the smallest first."""
    config, rng = run.model, np.random.default_rng([run.seed, 3])
    params = moved_parameters(run)
    batch = next(packed_batches(run))
    B, T = batch.tokens_BT.shape
    D, F = config.d_model, config.d_mlp

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    first = reference.within(params, "layers.0")
    x_BTD = normal(B, T, D)
    linear = reference.within(first, "mlp.linear_up")
    embedding = reference.within(params, "embedding")
    yield Case("embed", embedding, {"tokens_BT": batch.tokens_BT})
    yield Case("rms_norm", reference.within(first, "mlp_norm"), {"x_BTD": x_BTD})
    yield Case("rms_norm of small inputs", reference.within(first, "mlp_norm"),
               {"x_BTD": np.float32(2e-3) * x_BTD})  # fmt: skip
    yield Case("linear", linear, {"x": x_BTD})
    yield Case("linear of one token", linear, {"x": x_BTD[:, :1]})
    many_BTD = normal(*MANY, D)
    yield Case("embed of one token often", embedding, {"tokens_BT": np.zeros(MANY, np.int32)})
    yield Case("rms_norm of many tokens", reference.within(first, "mlp_norm"), {"x_BTD": many_BTD})
    yield Case("linear of many tokens", linear, {"x": many_BTD})
    yield Case("gelu", {}, {"x": 2 * normal(B, T, F)})
    if "rg_lru" in config.layer_mixers:
        yield from _recurrent_cases(config, params, batch.position_BT, normal, rng)
        if section_of(run) in LANGUAGES:
            yield from _long_cases(config, params, normal, rng)
    if "mqa" in config.layer_mixers:
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        yield Case("rope", {}, {"x_BTNH": normal(B, T, N, H), "position_BT": batch.position_BT})
        # scores that differ by 10 and more: a softmax that is rounded shows
        heads = {"q_BTNH": 3 * normal(B, T, N, H), "k_BTKH": 3 * normal(B, T, K, H)}
        heads |= {"v_BTKH": normal(B, T, K, H), "position_BT": batch.position_BT}
        yield Case("attention", {}, heads)
    yield Case("unembed", embedding, {"x_BTD": x_BTD})
    logits = {"logits_BTV": 3 * normal(B, T, config.vocab_size), "targets_BT": batch.targets_BT}
    yield Case("cross_entropy", {}, logits)
    yield Case("mlp", reference.within(first, "mlp"), {"x": x_BTD})
    for name in dict.fromkeys(config.layer_mixers):
        layer = reference.within(params, f"layers.{config.layer_mixers.index(name)}")
        packed = {"x_BTD": x_BTD, "position_BT": batch.position_BT}
        yield Case(f"mixer.{name}", reference.within(layer, "mixer"), packed)
        yield Case(f"chunks.{name}", reference.within(layer, "mixer"), {"x_BTD": x_BTD})
        yield Case(f"layer.{name}", layer, packed)


def _recurrent_cases(
    config: ModelConfig, params: Params, position_BT: np.ndarray, normal, rng
) -> Iterator[Case]:
    B, T = position_BT.shape
    R, past = config.d_rnn, max(config.conv_width - 1, 0)
    index = config.layer_mixers.index("rg_lru")
    mixer = reference.within(params, f"layers.{index}.mixer")
    conv, unit = reference.within(mixer, "conv_1d"), reference.within(mixer, "rg_lru")
    gate = reference.within(unit, "a_gate") or reference.within(unit, "input_gate")
    x_BTR = normal(B, T, R)
    # What follows on a state: row 0 goes on with a document that is past + 1 inputs old.
    later_BT = position_BT.copy()
    is_first = np.cumsum(position_BT[0] == 0) == 1
    later_BT[0, is_first] += past + 1
    for name, t, position in (
        ("causal_conv", T, position_BT),
        ("causal_conv after a state", T, later_BT),
        ("causal_conv of one token", 1, np.full((B, 1), past + 1)),
    ):
        inputs = {"x_BTR": x_BTR[:, :t], "position_BT": position}
        if conv:
            yield Case(name, conv, inputs | {"conv_BWR": normal(B, past, R)})
    many_BTR = normal(*MANY, R)
    if gate:
        yield Case("block_diagonal", gate, {"x_BTR": x_BTR})
        yield Case("block_diagonal of many tokens", gate, {"x_BTR": many_BTR})
    inputs = {"x_BTR": many_BTR, "position_BT": np.tile(np.arange(MANY[1]), (MANY[0], 1))}
    inputs |= {"conv_BWR": np.zeros((MANY[0], past, R), np.float32)}
    if conv:
        yield Case("causal_conv of many tokens", conv, inputs)
    small = 10 ** rng.uniform(-14, 0, (B, T, R)).astype(np.float32)
    small[:, ::7] = 0.0  # where the slope of the root has no end
    yield Case("bounded_sqrt", {}, {"x": small})
    a_BTR = rng.uniform(0.8, 0.9999, (B, T, R)).astype(np.float32)
    a_BTR[position_BT == 0] = 0.0
    a_BTR[0, 0] = 0.9  # goes on from h0
    for name, t in (("linear_scan", T), ("linear_scan of one token", 1)):
        inputs = {"a_BTR": a_BTR[:, :t], "x_BTR": x_BTR[:, :t], "h0_BR": normal(B, R)}
        yield Case(name, {}, inputs)
    inputs = {"x_BTR": x_BTR, "position_BT": later_BT, "h0_BR": normal(B, R)}
    yield Case("rg_lru", unit, inputs)
    # Gates that are their biases are exact in every dtype: then all inside is float32's error.
    even = {name: np.zeros_like(v) if v.ndim == 3 else v for name, v in unit.items()}
    yield Case("rg_lru of even gates", even, inputs)


def _long_cases(config: ModelConfig, params: Params, normal, rng) -> Iterator[Case]:
    """One document that goes on, and another."""
    R, index = config.d_rnn, config.layer_mixers.index("rg_lru")
    unit = reference.within(params, f"layers.{index}.mixer.rg_lru")
    position_BT = np.arange(7, 7 + LONG)[None].astype(np.int32)
    position_BT[:, LONG - 50 :] = np.arange(50)
    a_BTR = rng.uniform(0.8, 0.9999, (1, LONG, R)).astype(np.float32)
    a_BTR[position_BT == 0] = 0.0
    x_BTR, h0_BR = normal(1, LONG, R), normal(1, R)
    inputs = {"a_BTR": a_BTR, "x_BTR": x_BTR, "h0_BR": h0_BR}
    yield Case("linear_scan of a long sequence", {}, inputs)
    inputs = {"x_BTR": x_BTR, "position_BT": position_BT, "h0_BR": h0_BR}
    yield Case("rg_lru of a long sequence", unit, inputs)


def _rounded(case: Case) -> Case:
    """What a bfloat16 engine can hold exactly: its error is then its arithmetic's alone."""
    wide = ops.OPS[case.op].wide
    inputs = {
        name: value if name in wide or value.dtype.kind == "i" else to_bfloat16(value)
        for name, value in case.inputs.items()
    }
    params = {
        name: value if parameters.is_exact(name) else to_bfloat16(value)
        for name, value in case.params.items()
    }
    return Case(case.name, params, inputs)
