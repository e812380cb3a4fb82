"""What XLA makes of the layers that have no Pallas kernel: the bytes its programs move on a TPU.

    python benchmarks/compiled_bytes.py [--topology v5e:2x2] [--json] [--op causal_conv ...]

No TPU is needed: libtpu compiles for a real one. Counted are the arrays in HBM that each operation
of the optimized program reads and writes; of an operand of which a fusion uses slices alone, only
these; what stays in VMEM is free. Beside it stand the bytes that must move, each input and output
once, as in benchmarks/cases.py. Forward and backward are one program with a barrier between them,
as in training, and XLA chooses what it keeps. A v5e and a v6e have 128 MiB of VMEM, where XLA keeps
an array of 64 MiB between two operations; one that is larger moves more, as on a v5p (64 MiB). No
time is measured or claimed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's folder would hide Python's own statistics
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ROOT = Path(__file__).resolve().parent.parent

from benchmarks import cases
from implementations.jax_backend.kernels.attention_step import attention_step
from implementations.jax_backend.kernels.causal_conv import causal_conv
from implementations.jax_backend.kernels.gated_gelu import gated_gelu
from implementations.jax_backend.kernels.rg_lru_step import rg_lru_step
from implementations.jax_backend.kernels.rms_norm import add_rms_norm, rms_norm
from implementations.jax_backend.kernels.rope import rope

# --- What a program moves.

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done"}
MOVES = {"copy-start": 0, "slice-start": 1}  # between memories: where their result names the target
SLICES = {"slice", "dynamic-slice", "gather"}  # read what they give
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place: read and write this operand
LOOPS = {"while", "conditional", "call"}
NUM_BITS = {"pred": 8, "token": 0}  # of others the digits of the name: bf16, s32, f8e4m3


class Buffer(NamedTuple):
    num_bytes: int
    is_in_hbm: bool


@dataclass(frozen=True)
class Instruction:
    name: str
    operation: str
    buffers: tuple[Buffer, ...]
    operands: tuple[str, ...]
    rest: str  # attributes, or the index of a parameter
    is_root: bool

    @property
    def num_bytes(self) -> int:
        return sum(buffer.num_bytes for buffer in self.buffers)

    @property
    def hbm_bytes(self) -> int:
        return sum(buffer.num_bytes for buffer in self.buffers if buffer.is_in_hbm)


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Pass:
    """One operation of a program that touches HBM, and the bytes it reads and writes there."""

    name: str
    read: int
    written: int


def passes(text: str) -> list[Pass]:
    """Of an optimized program without loops, as XLA prints it."""
    computations, entry = parsed(text)
    program = computations[entry]
    found = [_pass(one, program, computations) for one in program.values()]
    return [one for one in found if one.read or one.written]


def _pass(one: Instruction, program: Computation, computations: dict[str, Computation]) -> Pass:
    if one.operation in LOOPS:
        raise ValueError(f"{one.name}: what a {one.operation} moves is not counted.")
    if one.operation in FREE or '"AllocateBuffer"' in one.rest:
        return Pass(one.name, 0, 0)
    if one.operation in MOVES:
        source, target = program[one.operands[0]], one.buffers[MOVES[one.operation]]
        read = target.num_bytes if source.hbm_bytes else 0
        return Pass(one.name, read, target.num_bytes if target.is_in_hbm else 0)
    called = re.search(r"calls=%?([\w.-]+)", one.rest)
    if called and one.operation == "fusion":
        within = computations[called[1]]
    else:  # alone it is a fusion of itself
        inputs = [
            Instruction(name, "parameter", program[name].buffers, (), str(index), False)
            for index, name in enumerate(one.operands)
        ]
        within = {each.name: each for each in [*inputs, one]}
    parameters = {int(x.rest): x.name for x in within.values() if x.operation == "parameter"}
    read: dict[str, int] = {}
    for index, name in enumerate(one.operands):
        used = _used(parameters[index], within) if program[name].hbm_bytes else 0
        read[name] = min(read.get(name, 0) + used, program[name].hbm_bytes)
    (root,) = (each for each in within.values() if each.is_root or each is one)
    return Pass(one.name, sum(read.values()), min(one.hbm_bytes, _made(root, within)))


def _used(name: str, within: Computation) -> int:
    """Bytes of a value within a fusion that those who take it need."""
    total = 0
    for one in within.values():
        if name not in one.operands:
            continue
        if one.operation == "bitcast":
            total += _used(one.name, within)
        elif one.operation in SLICES and name == one.operands[0]:
            total += one.num_bytes
        elif not (one.operation in UPDATES and name == one.operands[0]):
            total += within[name].num_bytes
    return total


def _made(root: Instruction, within: Computation) -> int:
    """Bytes that a fusion writes, wherever they lie."""
    if root.operation in ("bitcast", "tuple"):
        return sum(_made(within[name], within) for name in root.operands)
    if root.operation in UPDATES:
        return within[root.operands[UPDATES[root.operation]]].num_bytes
    return root.num_bytes


def parsed(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, the name of the one that is entered)."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*)", line):
            made, rest = _split(found[3])
            operation, _, rest = rest.partition("(")
            inside, rest = _split("(" + rest)
            operands = tuple(re.findall(r"%([\w.-]+)", inside))
            rest = inside[1:-1] if operation == "parameter" else rest
            current[found[2]] = Instruction(
                found[2], operation, _buffers(made), operands, rest, bool(found[1])
            )
    if not entry:
        raise ValueError("this is no program: it has no ENTRY.")
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """The first word, parentheses held together, and what follows."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and (character == " " or text[: index + 1].startswith("(")):
            return text[: index + 1].strip(), text[index + 1 :].strip()
    return text, ""


def _buffers(made: str) -> tuple[Buffer, ...]:
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", made)
    return tuple(
        Buffer(
            math.prod(map(int, filter(None, sizes.split(",")))) * num_bits(kind) // 8,
            is_in_hbm=not re.search(r"S\(\d+\)", layout),
        )
        for kind, sizes, layout in found
    )


def num_bits(kind: str) -> int:
    return NUM_BITS[kind] if kind in NUM_BITS else int(re.search(r"\d+", kind)[0])


# --- What is compiled: the layers at the widths of the paper's 1b, in bfloat16.

EPS, BASE = 1e-6, 10000.0


@dataclass(frozen=True)
class Row:
    op: str
    direction: str
    shape: str
    needed_bytes: int
    moved_bytes: int
    num_passes: int

    @property
    def ratio(self) -> float:
        return self.moved_bytes / self.needed_bytes


def bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def positions(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


# op -> (a function of arrays, those of shape that are differentiated, and those that are not)
LAYERS: dict[str, Callable] = {
    "rms_norm": lambda B, T, D: (
        lambda x, scale: rms_norm(x, scale, EPS, "plain"),
        (bfloat16(B, T, D), bfloat16(D)),
        (),
    ),
    "add_rms_norm": lambda B, T, D: (
        lambda x, branch, scale: add_rms_norm(x, branch, scale, EPS, "plain"),
        (bfloat16(B, T, D), bfloat16(B, T, D), bfloat16(D)),
        (),
    ),
    "gated_gelu": lambda B, T, F: (
        lambda gate, up: gated_gelu(gate, up, "plain"),
        (bfloat16(B, T, F), bfloat16(B, T, F)),
        (),
    ),
    "causal_conv": lambda B, T, R: (
        lambda x, weight, bias, position: causal_conv(x, weight, bias, position, None, "plain")[0],
        (bfloat16(B, T, R), bfloat16(4, R), bfloat16(R)),
        (positions(B, T),),
    ),
    "rope": lambda B, T, N, H: (
        lambda x, position: rope(x, position, H, BASE, "plain"),
        (bfloat16(B, T, N, H),),
        (positions(B, T),),
    ),
}


def layer_row(case: cases.Case, place: jax.sharding.Sharding) -> Row:
    call, inputs, integers = LAYERS[case.op](**case.shape)

    def forward(inputs: tuple, integers: tuple):
        return call(*inputs, *integers)

    def both(inputs: tuple, integers: tuple, doutputs):
        outputs, pull = jax.vjp(lambda *inputs: call(*inputs, *integers), *inputs)
        outputs, doutputs = lax.optimization_barrier((outputs, doutputs))
        return outputs, pull(doutputs)

    if case.direction == cases.FORWARD:
        found = compiled_passes(forward, (inputs, integers), place)
    else:
        doutputs = jax.eval_shape(forward, inputs, integers)
        found = compiled_passes(both, (inputs, integers, doutputs), place)
    return row(case.op, case.direction, case.shape_text, case.num_bytes, found)


def step_rows(place: jax.sharding.Sharding) -> list[Row]:
    """Of one token. A cache is larger than what VMEM holds, as those of many layers are."""
    B, R, N, H, S = 64, 2560, 16, 128, 8192
    x_BR, q_BNH, k_B1H, k_BS1H = (
        bfloat16(*shape) for shape in ((B, R), (B, N, H), (B, 1, H), (B, S, 1, H))
    )
    recurrence = compiled_passes(
        lambda *inputs: rg_lru_step(*inputs, "analytic"),
        (x_BR, x_BR, x_BR, float32(R), positions(B, 1), float32(B, R)),
        place,
        donated=(5,),
    )
    attention = compiled_passes(
        lambda *inputs: attention_step(*inputs, "plain"),
        (q_BNH, k_B1H, k_B1H, positions(B, 1), k_BS1H, k_BS1H),
        place,
        donated=(4, 5),
    )
    return [
        row("rg_lru_step", cases.FORWARD, f"B={B} R={R}", B * R * (3 * 2 + 2 * 4), recurrence),
        row("attention_step", cases.FORWARD, f"B={B} S={S} N={N} H={H}", 4 * B * S * H, attention),
    ]


def row(op: str, direction: str, shape: str, needed_bytes: int, found: list[Pass]) -> Row:
    moved = sum(one.read + one.written for one in found)
    return Row(op, direction, shape, needed_bytes, moved, len(found))


def compiled_passes(
    function: Callable, inputs: tuple, place: jax.sharding.Sharding, donated: tuple[int, ...] = ()
) -> list[Pass]:
    def there(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    with jax.default_matmul_precision("highest"):
        traced = jax.jit(function, donate_argnums=donated).trace(*jax.tree.map(there, inputs))
    return passes(traced.lower().compile().as_text())


def measured(topology: str, ops: list[str] | None = None) -> list[Row]:
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    place = jax.sharding.SingleDeviceSharding(found.devices[0])
    chosen = [case for case in cases.layer_cases() if not ops or case.op in ops]
    rows = [layer_row(case, place) for case in chosen]
    return rows + [row for row in step_rows(place) if not ops or row.op in ops]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--op", nargs="*", choices=[*LAYERS, "rg_lru_step", "attention_step"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measured(arguments.topology, arguments.op)
    if arguments.json:
        print(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=1))
        return 0
    print(f"{'op':15} {'direction':17} {'shape':24} {'MB needed':>9} {'moved':>9} ratio passes")
    for one in rows:
        megabytes = f"{one.needed_bytes / 1e6:9.1f} {one.moved_bytes / 1e6:9.1f}"
        place = f"{one.op:15} {one.direction:17} {one.shape:24}"
        print(f"{place} {megabytes} {one.ratio:5.2f} {one.num_passes:6}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
