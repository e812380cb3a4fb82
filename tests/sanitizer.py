"""What Triton's interpreter does not notice: addresses out of bounds, and programs of one launch
that read or write what another one writes. (It runs them one after the other, on one heap.)

    with sanitize() as report:
        kernel[grid](...)
    assert not report.problems
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

# On either side of every tensor of a launch, so that what lies just outside of one is never
# inside of another. Only reserved: nothing touches it.
GUARD_BYTES = 1 << 22
MAX_PROBLEMS = 20  # a wrong stride is wrong in every program

UNSUPPORTED = (
    "create_atomic_cas",
    "create_atomic_rmw",
    "create_make_tensor_descriptor",
    "create_descriptor_load",
    "create_descriptor_store",
    "create_descriptor_gather",
    "create_descriptor_scatter",
)


@dataclass
class Report:
    num_launches: int = 0
    num_loads: int = 0
    num_stores: int = 0
    out_of_bounds: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return self.out_of_bounds + self.conflicts


@contextmanager
def sanitize(*tensors: Tensor) -> Iterator[Report]:
    """Watches every launch inside. In bounds are the tensors of the launch, and these."""
    report = Report()
    launch = _Launch(report, tensors)
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    init_args, restore_args = executor._init_args_hst, executor._restore_args_dev
    load, store = builder.create_masked_load, builder.create_masked_store

    def init_args_hst(self, args_dev, kwargs):
        args, kwargs = init_args(self, args_dev, kwargs)
        return launch.begin(self.fn.__name__, self.arg_names, args, kwargs)

    def restore_args_dev(self, args_dev, args_hst, kwargs, kwargs_hst):
        args_hst, kwargs_hst = launch.end()
        restore_args(self, args_dev, args_hst, kwargs, kwargs_hst)

    def create_masked_load(self, ptrs, mask, *rest):
        report.num_loads += 1
        return load(self, ptrs, launch.check("load", self.grid_idx, ptrs, mask), *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        report.num_stores += 1
        mask = launch.check("store", self.grid_idx, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def refuse(name):
        def refused(*_, **__):
            raise NotImplementedError(f"the sanitizer does not follow {name}.")

        return refused

    with ExitStack() as stack:
        for owner, name, function in (
            (executor, "_init_args_hst", init_args_hst),
            (executor, "_restore_args_dev", restore_args_dev),
            (builder, "create_masked_load", create_masked_load),
            (builder, "create_masked_store", create_masked_store),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        for name in UNSUPPORTED:
            stack.enter_context(mock.patch.object(builder, name, refuse(name)))
        yield report


class _Launch:
    """The launch that runs: its tensors, moved apart, and what its programs touched."""

    def __init__(self, report: Report, tensors: tuple[Tensor, ...]):
        self.report = report
        self.extra = [(*_span(tensor), f"tensor {n}") for n, tensor in enumerate(tensors)]

    def begin(self, kernel: str, names: list[str], args: list, kwargs: dict) -> tuple[list, dict]:
        self.kernel, self.arguments = kernel, (args, kwargs)
        self.spans, self.buffers, self.touched = [*self.extra], {}, []
        self.report.num_launches += 1
        moved = [self._move(name, arg) for name, arg in zip(names, args, strict=False)]
        return moved, {name: self._move(name, arg) for name, arg in kwargs.items()}

    def _move(self, name: str, arg):
        if isinstance(arg, tuple):
            return tuple(self._move(name, item) for item in arg)
        if not hasattr(arg, "data_ptr") and not hasattr(arg, "block_shape"):
            return arg
        if not isinstance(arg, Tensor):
            raise NotImplementedError(f"the sanitizer does not follow a {type(arg).__name__}.")
        storage = arg.untyped_storage()
        begin = GUARD_BYTES + storage.data_ptr() % 64  # aligned as it was
        if storage.data_ptr() not in self.buffers:
            buffer = torch.empty(storage.nbytes() + begin + GUARD_BYTES + 64, dtype=torch.uint8)
            begin -= buffer.data_ptr() % 64
            theirs = torch.empty(0, dtype=torch.uint8).set_(storage)
            ours = buffer[begin : begin + storage.nbytes()]
            ours.copy_(theirs)
            self.buffers[storage.data_ptr()] = (theirs, ours)
        ours = self.buffers[storage.data_ptr()][1]
        moved = torch.empty(0, dtype=torch.uint8).set_(
            ours.untyped_storage(),
            ours.storage_offset() + arg.storage_offset() * arg.element_size(),
            (0,),
        )
        moved = moved.view(arg.dtype).as_strided(arg.shape, arg.stride())
        self.spans.append((*_span(moved), name))
        return moved

    def end(self) -> tuple[list, dict]:
        for theirs, ours in self.buffers.values():
            theirs.copy_(ours)
        self._find_conflicts()
        return self.arguments

    def check(self, access: str, program: tuple, ptrs, mask) -> interpreter.TensorHandle:
        """The mask without the lanes that are out of bounds; every touched address is kept."""
        address = np.asarray(ptrs.data).astype(np.int64)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        active = np.broadcast_to(mask.data, address.shape).astype(bool)
        inside = np.zeros(address.shape, bool)
        for begin, end, _ in self.spans:
            inside |= (address >= begin) & (address + size <= end)
        outside = address[active & ~inside]
        if outside.size and len(self.report.out_of_bounds) < MAX_PROBLEMS:
            self.report.out_of_bounds.append(
                f"{_line()}: a {access} of {self.kernel}, program {program}: {outside.size} of "
                f"{active.sum()} elements; the first lies {self._place(int(outside[0]), size)}."
            )
        active &= inside
        self.touched.append((program, access == "store", np.unique(address[active])))
        return interpreter.TensorHandle(active, tl.int1)

    def _place(self, address: int, size: int) -> str:
        def distance(span) -> int:
            return max(span[0] - address, address - span[1])

        if not self.spans:
            return "in no tensor"
        begin, end, name = min(self.spans, key=distance)
        if address < begin:
            return f"{(begin - address) // size} before {name}"
        return f"{(address - end) // size + 1} after the end of {name}"

    def _find_conflicts(self) -> None:
        programs = {program: n for n, (program, _, _) in enumerate(self.touched)}
        if len(programs) < 2:
            return
        address = np.concatenate([a for _, _, a in self.touched])
        sizes = [a.size for _, _, a in self.touched]
        owner = np.repeat([programs[program] for program, _, _ in self.touched], sizes)
        writes = np.repeat([is_store for _, is_store, _ in self.touched], sizes)
        if not address.size:
            return
        order = np.lexsort((owner, address))
        address, owner, writes = address[order], owner[order], writes[order]
        first = np.flatnonzero(np.diff(address, prepend=address[0] - 1))
        last = np.append(first[1:], address.size) - 1
        shared = (owner[first] != owner[last]) & np.logical_or.reduceat(writes, first)
        names = {n: program for program, n in programs.items()}
        found: dict[str, list[int]] = {}
        for n in np.flatnonzero(shared):
            name = next(name for begin, end, name in self.spans if begin <= address[first[n]] < end)
            found.setdefault(name, []).append(n)
        for name, groups in found.items():
            one, other = (names[owner[edge[groups[0]]]] for edge in (first, last))
            self.report.conflicts.append(
                f"{self.kernel}: {len(groups)} elements of {name} are written by one program and "
                f"written or read by another; the first by {one} and {other}."
            )


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and one past the last."""
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _line() -> str:
    """Of the kernel: the innermost frame that is neither Triton's nor ours."""
    ours = (str(Path(triton.__file__).parent), __file__)
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
