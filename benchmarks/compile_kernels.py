"""Every Triton kernel as it ships, compiled ahead of time, and what the compiler made of it.

    python benchmarks/compile_kernels.py [--json] [--target sm_90 ...] [--kernel rms_norm ...]

No GPU is needed. A stub stands in for the driver, the public ops are called on `meta` tensors,
forward and backward, and each launch is compiled instead: with the signature, the block sizes and
the warps that the launch itself chose. So nothing here repeats a configuration; CASES holds shapes.

Registers, stack and instructions are read from the binary. `spill_bytes` counts the bytes of a
thread's loads and stores in local memory, as `ptxas -v` does, or its stack frame if that is more
(on AMD its scratch; scalars that wait in lanes of vector registers, `lane`, cost no memory). The
compiler does not refuse a kernel that asks for more shared or tensor memory than a chip has, the
launch does; so it is compared here. Exit code 1 when a kernel spills, does not fit, or does not
compile.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's folder would hide Python's own statistics
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import inspect
import json
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from unittest import mock

import torch
import triton
from torch._library.custom_ops import CustomOpDef
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from implementations.config import GATES

NUM_PROCESSES = 2


@dataclass(frozen=True)
class Chip:
    target: GPUTarget
    shared_bytes: int  # the most that one block may have
    max_grid_yz: int
    tensor_columns: int = 0  # of tensor memory, where accumulators of matrix products lie


# A100, H100 and H200, B200, MI300. CUDA C++ programming guide, table of compute capabilities
# (163 KiB, 227 KiB); CDNA3 ISA: 64 KiB of LDS.
CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 166912, 65535),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 232448, 65535),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 232448, 65535, tensor_columns=512),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65536, 2**31 - 1),
}

# The instructions that matter, as the rows name them, by what they are looked for as.
INSTRUCTIONS = {
    "matrix": r"[HIQ]G?MMA|UTC\w*MMA|v_mfma",
    "load_16_bytes": r"(?:LDG|LDGSTS)\b.*\.(?:128|256)(?![0-9A-Z])|(?:global|buffer)_load_dwordx4",
    "async_copy": r"LDGSTS|UTMALDG|UBLKCP|(?:global|buffer)_load_\w*lds",
    "local": r"LDL|STL|scratch_",
    "lane": r"v_writelane",  # how AMD spills a scalar: into a lane of a vector register
}


@dataclass(frozen=True)
class Row:
    kernel: str  # file.function
    target: str
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_columns: int
    instructions: dict[str, int]  # by mnemonic, with the width in bits of a 16-byte load

    def total(self, kind: str) -> int:
        """How many instructions of a kind of INSTRUCTIONS."""
        pattern = re.compile(INSTRUCTIONS[kind])
        return sum(count for name, count in self.instructions.items() if pattern.match(name))


# --- What is compiled: every op on meta tensors, at the widths of the paper's 1b (D 2048, R 2560,
# heads of 128) and with the heads of 256 of RecurrentGemma. B and T choose no kernel, except that B
# chooses the tiles of the scans, and that the parts of a decode step are there for few sequences.

DTYPES = ("bfloat16", "float32")
B, T, D, F, R, N, V, WIDTH, WINDOW = 4, 8192, 2048, 6144, 2560, 16, 32000, 4, 1024


def empty(*shape: int, dtype: str = "float32", grad: bool = True) -> torch.Tensor:
    dtype = getattr(torch, dtype)
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def positions(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def linear_scan(dtype: str) -> None:
    from implementations.torch_backend.kernels.linear_scan import linear_scan

    for variant, num_sequences in scans():
        shape = (num_sequences, T, R)
        a_BTR, x_BTR = empty(*shape, dtype=dtype), empty(*shape, dtype=dtype)
        backward(*linear_scan(a_BTR, x_BTR, empty(num_sequences, R), variant))


def rg_lru(dtype: str) -> None:
    from implementations.torch_backend.kernels.rg_lru import rg_lru

    for variant, num_sequences in scans():
        gates = [empty(num_sequences, T, R, dtype=dtype) for _ in range(3)]
        inputs = (*gates, empty(R), empty(R), empty(R), positions(num_sequences, T))
        backward(*rg_lru(*inputs, empty(num_sequences, R), variant))


def scans() -> Iterator[tuple[str, int]]:
    """Variants, and numbers of sequences that among them meet every tile."""
    from implementations.torch_backend.kernels.linear_scan import TILES

    least = {least for tiles in TILES.values() for least, _ in tiles}
    yield from (("triton", max(-(-channels // R), 1)) for channels in sorted(least))
    yield from (("triton", B), ("triton_split", B))


def rg_lru_step(dtype: str) -> None:
    from implementations.torch_backend.kernels.rg_lru_step import rg_lru_step

    for width, num_blocks in ((R, 16), (4096, 16)):
        for num_sequences in (1, 64):
            x_BR = empty(num_sequences, width, dtype=dtype, grad=False)
            block = width // num_blocks
            weight_GIJ = empty(num_blocks, block, block, dtype=dtype, grad=False)
            bias_R = empty(width, grad=False)
            conv_BWR = empty(num_sequences, WIDTH - 1, width, dtype=dtype, grad=False)
            rg_lru_step(
                x_BR, x_BR, empty(WIDTH, width, dtype=dtype, grad=False), bias_R, weight_GIJ,
                weight_GIJ, bias_R, bias_R, bias_R, positions(num_sequences), conv_BWR,
                empty(num_sequences, width, grad=False),
            )  # fmt: skip


def gates(dtype: str) -> None:
    """The other gates of rg_lru and of its step, by their switches."""
    from implementations.torch_backend.kernels.rg_lru import rg_lru
    from implementations.torch_backend.kernels.rg_lru_step import rg_lru_step

    for gate, normalize_input in other_gates():
        kind, form = GATES[gate], {"gate": gate, "normalize_input": normalize_input}
        own, block = R // 2 if kind.is_complex else R, R // 16
        has = (kind.has_recurrence_gate, kind.has_input_gate)
        biases = [empty(own) if one else None for one in has]
        a_param_R = empty(own) if kind.has_a_param else None
        form["theta_R"] = empty(own) if kind.is_complex else None

        products = [empty(B, T, own, dtype=dtype) if one else None for one in has]
        inputs = (empty(B, T, R, dtype=dtype), *products, *biases, a_param_R, positions(B, T))
        backward(*rg_lru(*inputs, empty(B, R), "triton", **form))

        with torch.no_grad():
            x_BR, weight_GIJ = empty(B, R, dtype=dtype), empty(16, block, own // 16, dtype=dtype)
            weights = [weight_GIJ if one else None for one in has]
            state = (empty(B, 0, R, dtype=dtype), empty(B, R))
            inputs = (x_BR, x_BR, None, None, *weights, *biases, a_param_R, positions(B), *state)
            rg_lru_step(*inputs, **form)


def other_gates() -> Iterator[tuple[str, bool]]:
    """(gate, normalize_input)"""
    yield "rg_lru", False
    for gate in GATES:
        if gate != "rg_lru":
            yield gate, True


def attention(dtype: str) -> None:
    from implementations.torch_backend.kernels.attention import attention

    for head_dim in (128, 256):
        k_BSKH, v_BSKH = (empty(B, T, 1, head_dim, dtype=dtype) for _ in range(2))
        q_BTNH, index_BT = empty(B, T, N, head_dim, dtype=dtype), positions(B, T)
        backward(attention(q_BTNH, k_BSKH, v_BSKH, index_BT, index_BT, "triton"))


def attention_step(dtype: str) -> None:
    from implementations.torch_backend.kernels.attention_step import attention_step

    for head_dim in (128, 256):
        for num_sequences in (1, 64):
            one = empty(num_sequences, 1, head_dim, dtype=dtype, grad=False)
            slots = empty(num_sequences, WINDOW, 1, head_dim, dtype=dtype, grad=False)
            q_BNH = empty(num_sequences, N, head_dim, dtype=dtype, grad=False)
            step = (one, one, positions(num_sequences), slots, slots.clone())
            attention_step(q_BNH, *step, head_dim, 10000.0)


def rope(dtype: str) -> None:
    from implementations.torch_backend.kernels.rope import rope

    for head_dim, rope_dim in ((128, 128), (256, 128)):
        for num_heads in (N, 1):
            x_BTNH = empty(B, T, num_heads, head_dim, dtype=dtype)
            backward(rope(x_BTNH, positions(B, T), rope_dim, 10000.0, "triton"))


def rms_norm(dtype: str) -> None:
    from implementations.torch_backend.kernels.rms_norm import add_rms_norm, rms_norm

    for width in (D, R):  # R is no power of two
        x, branch = (empty(B, T, width, dtype=dtype) for _ in range(2))
        backward(rms_norm(x, empty(width), 1e-6, "triton"))
        backward(*add_rms_norm(x, branch, empty(width), 1e-6, "triton"))


def gated_gelu(dtype: str) -> None:
    from implementations.torch_backend.kernels.gated_gelu import gated_gelu

    backward(gated_gelu(empty(B, T, F, dtype=dtype), empty(B, T, F, dtype=dtype), "triton"))


def causal_conv(dtype: str) -> None:
    from implementations.torch_backend.kernels.causal_conv import causal_conv

    for bias_R, conv_BWR in ((empty(R), empty(B, WIDTH - 1, R, dtype=dtype)), (None, None)):
        x_BTR, weight_WR = empty(B, T, R, dtype=dtype), empty(WIDTH, R)
        backward(*causal_conv(x_BTR, weight_WR, bias_R, positions(B, T), conv_BWR, "triton"))


def cross_entropy(dtype: str) -> None:
    from implementations.torch_backend.kernels.cross_entropy import (
        cross_entropy,
        mean_cross_entropy,
    )

    backward(cross_entropy(empty(B, T, V, dtype=dtype), positions(B, T), "triton"))
    for soft_cap in (None, 30.0):
        x_BTD = empty(B, T, D, dtype=dtype)
        backward(mean_cross_entropy(x_BTD, empty(V, D), positions(B, T), soft_cap, "triton"))


# name: calls the op in one dtype, forward and backward
CASES: dict[str, Callable[[str], None]] = {
    case.__name__: case
    for case in (
        linear_scan,
        rg_lru,
        rg_lru_step,
        gates,
        attention,
        attention_step,
        rope,
        rms_norm,
        gated_gelu,
        causal_conv,
        cross_entropy,
    )
}


# --- The command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--target", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--kernel", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    rows, problems = compile_all(arguments.kernel, arguments.target)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print_table(rows)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def compile_all(kernels: list[str], targets: list[str]) -> tuple[list[Row], list[str]]:
    """The rows of these ops on these targets, and what is wrong, a line each."""
    refuse_interpreter()
    rows: list[Row] = []
    problems: list[str] = []
    jobs = [(kernel, dtype, target) for kernel in kernels for dtype in DTYPES for target in targets]
    # spawn: a fork of a process with torch's threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=context) as pool:
        futures = {pool.submit(_compile_case, *job): job for job in jobs}
        for future in as_completed(futures):
            kernel, dtype, target = futures[future]
            if error := future.exception():
                said = f"{type(error).__name__}: {error}"
                problems.append(f"{kernel} {dtype} on {target}: {said}")
            else:
                found, seconds = future.result()
                said = f"{len(found)} kernels in {seconds:.1f} s"
                rows += found
            print(f"{target} {kernel} {dtype}: {said}", file=sys.stderr, flush=True)
    rows = sorted({json.dumps(asdict(row)): row for row in rows}.values(), key=str)
    return rows, problems + [problem for row in rows for problem in problems_of(row)]


def _compile_case(kernel: str, dtype: str, target: str) -> tuple[list[Row], float]:
    begin = time.monotonic()
    rows = compile_launches(lambda: CASES[kernel](dtype), target)
    return rows, time.monotonic() - begin


def problems_of(row: Row) -> Iterator[str]:
    where = f"{row.kernel} on {row.target} ({row.config})"
    if row.spill_bytes:
        yield f"{where}: spills {row.spill_bytes} bytes, with {row.registers} registers."
    chip = CHIPS[row.target]
    for needed, limit, what in (
        (row.shared_bytes, chip.shared_bytes, "bytes of shared memory"),
        (row.tensor_columns, chip.tensor_columns, "columns of tensor memory"),
    ):
        if needed > limit:
            yield f"{where}: needs {needed} {what}; the chip has {limit}."


def print_table(rows: list[Row]) -> None:
    heads = (
        "kernel",
        "target",
        "registers",
        "spill B",
        "shared B",
        "TMEM",
        "instructions",
        "config",
    )
    lines = [heads]
    for row in rows:
        seen = ", ".join(f"{name} {count}" for name, count in row.instructions.items())
        numbers = (row.registers, row.spill_bytes, row.shared_bytes, row.tensor_columns)
        lines.append((row.kernel, row.target, *map(str, numbers), seen or "-", row.config))
    widths = [max(len(line[n]) for line in lines) for n in range(len(heads))]
    for line in lines:
        print("  ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)).rstrip())


def refuse_interpreter() -> None:
    if triton.knobs.runtime.interpret:
        raise SystemExit(
            "TRITON_INTERPRET is set, so that kernels are interpreted and cannot be compiled: "
            "unset it."
        )


# --- Compilation without a launch


def compile_launches(run: Callable[[], None], target: str) -> list[Row]:
    """A row for each different kernel that `run` launches."""
    refuse_interpreter()
    compiled: dict[str, Row] = {}
    compile_one = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        kernel = compile_one(self, *args, grid=grid, warmup=True, **kwargs)
        if callable(grid):
            grid = grid(self.signature.bind(*args, **_arguments(self, kwargs)).arguments)
        limit = CHIPS[target].max_grid_yz
        assert all(0 < n <= limit for n in grid[1:]), f"{self}: grid {grid} passes {limit} in y, z"
        if kernel.hash not in compiled:
            compiled[kernel.hash] = _row(self, kernel, target)
        return kernel

    with (
        _driver(target),
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(CustomOpDef, "__call__", _call_real),
    ):
        run()
    return list(compiled.values())


def _arguments(function: JITFunction, kwargs: dict) -> dict:
    """Those for the kernel; the others, like num_warps, are for the launch."""
    return {name: value for name, value in kwargs.items() if name in function.arg_names}


class _Driver:
    """As much of a driver as compilation asks for."""

    def __init__(self, target: str):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.target].target

    def get_current_device(self) -> str:
        return self.target  # Triton keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _driver(target: str) -> Iterator[None]:
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver.set_active(before)


def _call_real(op: CustomOpDef, *args, **kwargs):
    """Calls a custom op of torch outside of the dispatcher, which on meta tensors runs the op's
    fake, and a fake launches nothing."""
    bound = inspect.signature(op._init_fn).bind(*args, **kwargs)
    bound.apply_defaults()
    if op._backward_fn is None:
        return op._init_fn(*bound.args, **bound.kwargs)
    functions = {
        "forward": op._init_fn,
        "setup_context": op._setup_context_fn or (lambda ctx, inputs, output: None),
        "backward": op._backward_fn,
    }
    functions = {name: staticmethod(function) for name, function in functions.items()}
    real = type(op._init_fn.__name__, (torch.autograd.Function,), functions)
    return real.apply(*bound.args, **bound.kwargs)


def _row(function: JITFunction, kernel, target: str) -> Row:
    metadata = kernel.metadata
    read = read_cuda if metadata.target.backend == "cuda" else _read_hip
    registers, spill_bytes, instructions = read(kernel)
    return Row(
        kernel=f"{function.module.rpartition('.')[2]}.{function.fn.__name__}",
        target=target,
        config=_config(function, kernel),
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=metadata.shared,
        tensor_columns=getattr(metadata, "tmem_size", None) or 0,
        instructions=instructions,
    )


def _config(function: JITFunction, kernel) -> str:
    """The dtypes of the pointers, the constants, and how many warps run it."""
    signature = kernel.src.signature.values()
    floats = [name for name, kind in kernel.src.signature.items() if kind.startswith("fp")]
    assert not floats, f"{function.__name__}: {floats} would be doubles in a program of Inductor"
    dtypes = dict.fromkeys(kind[1:] for kind in signature if kind.startswith("*"))
    constants = [
        f"{function.arg_names[path[0]]}={value}" for path, value in kernel.src.constants.items()
    ]
    warps = f"num_warps={kernel.metadata.num_warps}"
    return " ".join([",".join(dtypes), *constants, warps])


def read_cuda(kernel) -> tuple[int, int, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tools = triton.knobs.nvidia
        usage = _output(tools.cuobjdump.path, "-res-usage", str(cubin))
        code = _output(tools.nvdisasm.path, "-c", "--no-dataflow", str(cubin))  # a third faster
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, f"cuobjdump says nothing of registers: {usage}"
    registers, stack, local = map(int, found.groups())
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    assert lines, "nvdisasm printed no instruction"
    widths = [re.search(r"\.(\d+)$", name) for name in lines if re.match("LDL|STL", name)]
    spilled = sum(int(width[1]) // 8 if width else 4 for width in widths)
    return registers, max(stack + local, spilled), _instructions(lines)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_hip(kernel) -> tuple[int, int, dict[str, int]]:
    assembly = kernel.asm["amdgcn"]

    def entry(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, f"the assembly has no {name}"
        return int(found[1])

    scratch = max(entry("private_segment_fixed_size"), 4 * entry("vgpr_spill_count"))
    lines = re.findall(r"^\s+([a-z]\w+)(.*)$", assembly, re.MULTILINE)
    # A load into LDS is a plain load by its name, and a word after its operands.
    names = [f"{name}_lds" if re.search(r"\blds\b", rest) else name for name, rest in lines]
    return entry("vgpr_count"), scratch, _instructions(names)


def _instructions(lines: list[str]) -> dict[str, int]:
    """LDG.E.128.CONSTANT is counted as LDG.128, and HMMA.16816.F32 as HMMA."""
    patterns = [re.compile(pattern) for pattern in INSTRUCTIONS.values()]
    counts = Counter(line for line in lines if any(p.match(line) for p in patterns))
    merged: Counter[str] = Counter()
    for name, count in counts.items():
        width = re.search(r"\.(?:128|256)(?![0-9A-Z])", name)
        wide = width and name.startswith("LDG")
        merged[name.partition(".")[0] + (width[0] if wide else "")] += count
    return dict(sorted(merged.items()))


if __name__ == "__main__":
    sys.exit(main())
