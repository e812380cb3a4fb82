"""One call of a scan of Pallas in an interpreter, beside its truth: errors by field of parity."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import races
from scan_cases import Errors, scan_case

from implementations.engine import Kernels
from implementations.jax_backend import ops
from implementations.jax_backend.kernels.interpreter import interpreting

KERNELS = Kernels(attention="plain", layers="plain")


def op_errors(variant: str, mode: Any = True, **shape) -> Errors:
    """linear_scan or rg_lru, as parity calls it: values, and gradients of everything given."""
    case = scan_case(**shape)
    settings = ops.Settings(case.config, replace(KERNELS, linear_scan=variant), case.dtype)
    run = jax.jit(partial(ops.call, case.op, settings))  # as one program: quicker to compile
    with interpreting(mode):
        outputs, dparams, dinputs = run(
            {name: jnp.asarray(value) for name, value in case.params.items()},
            {
                name: jnp.asarray(value, case.dtype_of(name))
                for name, value in case.floats().items()
            },
            {name: jnp.asarray(value) for name, value in case.integers().items()},
            tuple(map(jnp.asarray, case.doutputs)),
        )
    return case.errors(tuple(map(array, outputs)), *map(arrays, (dparams, dinputs)))


def op_races(**shape) -> tuple[Errors, list[bool]]:
    """Errors where a TPU's memories are simulated, and whether each kernel raced."""
    with races.watched() as found:
        errors = op_errors("pallas_tpu", races.MODE, **shape)
    return errors, [kernel.races_found for kernel in found]


def arrays(values: dict) -> dict[str, np.ndarray]:
    return {name: array(value) for name, value in values.items()}


def array(value: jnp.ndarray) -> np.ndarray:
    return np.asarray(value, np.float32)
