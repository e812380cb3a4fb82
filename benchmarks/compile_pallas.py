"""Every Pallas kernel for GPU, compiled ahead of time, and what the compiler made of it.

    python benchmarks/compile_pallas.py [--json] [--target sm_90 ...]

No GPU is needed: JAX lowers each kernel to Triton's language, and Triton compiles that. XLA has a
Triton of its own, of another version, so registers are an estimate. Rows, limits and exit code are
those of compile_kernels.py. Kernels for TPU: `aerie compile`, phase `kernel`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's folder would hide Python's own statistics
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import triton
from jax._src.interpreters import mlir  # noqa: F401, registers the dialects of a lowered module
from jax._src.lib import triton as dialect
from jax._src.lib.mlir import ir

from benchmarks.compile_kernels import (
    CHIPS,
    DTYPES,
    B,
    R,
    Row,
    T,
    other_gates,
    print_table,
    problems_of,
    read_cuda,
)
from implementations.config import GATES
from implementations.jax_backend.kernels.linear_scan import linear_scan
from implementations.jax_backend.kernels.rg_lru import rg_lru

TARGETS = [name for name, chip in CHIPS.items() if chip.target.backend == "cuda"]


@dataclass(frozen=True)
class Lowered:
    name: str
    form: str
    num_warps: int
    num_stages: int
    code: str  # in Triton's intermediate representation


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def scans(dtype: str) -> Iterator[Lowered]:
    steps, state = shape(B, T, R, dtype=dtype), shape(B, R)
    inputs = {"a_BTR": steps, "x_BTR": steps, "h0_BR": state}
    yield from lowered(linear_scan, inputs, (steps, state), "")
    for gate, normalize_input in (("rg_lru", True), *other_gates()):
        kind, own = GATES[gate], R // 2 if GATES[gate].is_complex else R
        products, params = shape(B, T, own, dtype=dtype), shape(own)
        inputs = {
            "x_BTR": steps,
            "a_gate_BTR": products if kind.has_recurrence_gate else None,
            "input_gate_BTR": products if kind.has_input_gate else None,
            "a_param_R": params if kind.has_a_param else None,
            "position_BT": shape(B, T, dtype="int32"),
            "h0_BR": state,
            "theta_R": params if kind.is_complex else None,
        }
        op = partial(rg_lru, gate=gate, normalize_input=normalize_input)
        form = gate if normalize_input else f"{gate}, inputs as they are"
        yield from lowered(op, inputs, (steps, state), form)


def lowered(op, inputs: dict, doutputs: tuple, form: str) -> Iterator[Lowered]:
    """The kernels of an op, forward and backward."""

    def run(inputs: dict, doutputs: tuple) -> tuple:
        op_of = partial(op, variant="pallas_gpu")
        outputs, pull = jax.vjp(lambda inputs: op_of(**inputs), inputs)
        return outputs, pull(doutputs)

    module = jax.jit(run).trace(inputs, doutputs).lower(lowering_platforms=("cuda",))
    for call in calls(module.compiler_ir("stablehlo").operation):
        settings = ir.DictAttr(call.attributes["mhlo.backend_config"])
        with ir.Context() as context:
            dialect.dialect.register_dialect(context)
            code = str(ir.Module.parse(settings["ir"].value_bytes))
        numbers = [ir.IntegerAttr(settings[key]).value for key in ("num_warps", "num_stages")]
        yield Lowered(ir.StringAttr(settings["name"]).value, form, *numbers, code)


def calls(operation) -> Iterator:
    """Every call of a Triton kernel within."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                target = inner.operation.attributes
                if "call_target_name" in target and "triton" in str(target["call_target_name"]):
                    yield inner.operation
                yield from calls(inner.operation)


def compiled(kernel: Lowered, dtype: str, target: str) -> Row:
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kernel.name}.ttir"
        path.write_text(kernel.code)
        made = triton.compile(str(path), target=CHIPS[target].target, options=options)
    registers, spill_bytes, instructions = read_cuda(made)
    return Row(
        kernel=kernel.name,
        target=target,
        config=" ".join(filter(None, (kernel.form, dtype, f"num_warps={kernel.num_warps}"))),
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=made.metadata.shared,
        tensor_columns=getattr(made.metadata, "tmem_size", None) or 0,
        instructions=instructions,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    arguments = parser.parse_args()
    rows = [
        compiled(kernel, dtype, target)
        for dtype in DTYPES
        for kernel in scans(dtype)
        for target in arguments.target
    ]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print_table(rows)
    problems = [problem for row in rows for problem in problems_of(row)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
