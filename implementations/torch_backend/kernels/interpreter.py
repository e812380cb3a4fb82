"""Triton's CPU interpreter, mended: right in bfloat16, and fast where it loops over elements.

As shipped (3.6 and 3.7) it holds bfloat16 as its bits in uint16 and computes on the bits: products
are garbage, and float32 is cut off instead of rounded. Nothing warns. `mend` gives these values a
NumPy type of their own, whose arithmetic rounds to nearest even as the hardware does. A scan or a
reduction by a function of ours walks its axis in slices, in the same order and to the same values.
Compiled kernels are not touched.
"""

import inspect
from dataclasses import replace

import numpy as np
import triton
import triton.language as tl

# What is replaced, or called, with the parameters it is known to have.
KNOWN_API = {
    "_get_np_dtype": ("tt_dtype",),
    "_patch_lang": ("fn",),
    "InterpreterBuilder.cast_impl": ("self", "src", "dst_type"),
    "InterpreterBuilder.create_fma": ("self", "x", "y", "z"),
    "ReduceOps.sum": ("self", "input"),
    "ReduceOps.generic_reduce": ("self", "input"),
    "ReduceOps.to_tensor": ("self", "ret", "dtype"),
    "ScanOps.generic_scan": ("self", "input"),
    "ScanOps.to_tensor": ("self", "ret", "dtype"),
    "TensorHandle": ("data", "dtype", "attr"),
    "_LangPatchScope.restore": ("self",),
}


def is_interpreting() -> bool:
    """Whether TRITON_INTERPRET was set when triton was imported: it decides for the whole process
    what triton.jit makes, of Triton's own functions as of ours."""
    return not isinstance(tl.cdiv, triton.JITFunction)


def mend() -> None:
    """Mends the interpreter of this process; a second call does nothing."""
    interpreter = _interpreter()
    if hasattr(interpreter.InterpreterBuilder, "get_bf16"):  # Triton's has none: we were here
        return
    _mend_bfloat16(interpreter)
    _mend_scans(interpreter)
    _mend_calls(interpreter)


def _interpreter():
    """Triton's module, when every name that is replaced is there as it was in 3.6 and 3.7."""
    try:
        from triton.runtime import interpreter

        for path, parameters in KNOWN_API.items():
            found = interpreter
            for name in path.split("."):
                found = getattr(found, name)
            if tuple(inspect.signature(found).parameters) != parameters:
                raise AttributeError(f"{path}{inspect.signature(found)}")
        _ = interpreter.interpreter_builder.options.sanitize_overflow
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"the interpreter of Triton {triton.__version__} is not the one of 3.6 and 3.7 that "
            f"kernels.interpret mends ({error}); install triton>=3.6,<3.8."
        ) from None
    return interpreter


def _mend_bfloat16(interpreter) -> None:
    from ml_dtypes import bfloat16  # NumPy's arithmetic, comparisons, casts: nearest even

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    stored, dtypes = interpreter._get_np_dtype, {tl.bfloat16.name: np.dtype(bfloat16)}
    exact_sum = interpreter.ReduceOps.sum

    def np_dtype(tt_dtype):
        scalar = tt_dtype.scalar
        if scalar.name not in dtypes:  # Triton builds its whole table at every question
            dtypes[scalar.name] = stored(scalar)
        return dtypes[scalar.name]

    def cast_impl(self, src, dst_type):
        return handle(src.data.astype(np_dtype(dst_type)), dst_type.scalar)

    def create_fma(self, x, y, z):
        if z.dtype.scalar != tl.bfloat16:
            return handle(x.data * y.data + z.data, z.dtype.scalar)
        x, y, z = (operand.data.astype(np.float32) for operand in (x, y, z))
        return handle((x * y + z).astype(bfloat16), tl.bfloat16)  # one rounding, as in hardware

    def sum(self, input):
        """In float32, rounded once: the order of a bfloat16 sum is nobody's promise."""
        if input.dtype.scalar != tl.bfloat16:
            return exact_sum(self, input)
        data = input.handle.data.astype(np.float32)
        total = np.sum(data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(total.astype(bfloat16), tl.bfloat16)

    interpreter._get_np_dtype = np_dtype
    interpreter.ReduceOps.sum = sum
    builder.cast_impl = cast_impl
    builder.create_fma = create_fma
    builder.get_bf16 = lambda self, value: handle(np.array([value], bfloat16), tl.bfloat16)


def _mend_scans(interpreter) -> None:
    def generic_scan(self, input):
        rows = list(_fold(self, [tensor.handle.data for tensor in input], input))
        return [
            self.to_tensor(np.stack(row, self.axis), tensor.dtype)
            for row, tensor in zip(zip(*rows, strict=True), input, strict=True)
        ]

    def generic_reduce(self, input):
        axis, shape = self.axis, input[0].handle.data.shape
        arrays = [tensor.handle.data for tensor in input]
        if axis is None:
            arrays = [array.reshape(-1) for array in arrays]
        for last in _fold(self, arrays, input):  # noqa: B007, the last one is the reduction
            pass
        if self.keep_dims:
            kept = [1] * len(shape) if axis is None else [*shape[:axis], 1, *shape[axis + 1 :]]
            last = [array.reshape(kept) for array in last]
        return [
            self.to_tensor(array, tensor.dtype) for array, tensor in zip(last, input, strict=True)
        ]

    interpreter.ScanOps.generic_scan = generic_scan
    interpreter.ReduceOps.generic_reduce = generic_reduce


def _fold(operation, arrays: list[np.ndarray], input):
    """Yields the running combination at each index of the axis, one array per input."""
    dtypes = [tensor.dtype for tensor in input]
    axis = operation.axis or 0

    def tensors(slices):
        return [operation.to_tensor(x, dtype) for x, dtype in zip(slices, dtypes, strict=True)]

    running = None
    for slices in zip(*(np.moveaxis(array, axis, 0) for array in arrays), strict=True):
        if running is not None:
            combined = operation.combine_fn.fn(*tensors(running), *tensors(slices))
            combined = combined if isinstance(combined, tuple) else (combined,)
            slices = [
                np.broadcast_to(
                    # A number in one place, where Triton holds an array of one element.
                    c.handle.data.reshape(x.shape) if isinstance(c, tl.tensor) else c,
                    x.shape,
                ).astype(x.dtype)
                for c, x in zip(combined, slices, strict=True)
            ]
        running = slices
        yield running


def _mend_calls(interpreter) -> None:
    """A launch patches the language once, not again in every call of a device function (which costs
    as much as a hundred operations); and overflow is not computed only to be ignored."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)  # read in debug mode only
    patch, scopes = interpreter._patch_lang, {}  # by the language modules that are patched

    class Scope:
        def restore(self) -> None:
            while scopes:
                scopes.popitem()[1].restore()

    def patch_once(fn) -> Scope:
        modules = frozenset(
            id(value) for value in fn.__globals__.values() if value is tl or value is tl.core
        )
        if modules not in scopes:
            scopes[modules] = patch(fn)
        return Scope()

    interpreter._patch_lang = patch_once
