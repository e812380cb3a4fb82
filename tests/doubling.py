"""A compiler whose recurrence is one small kernel, for tests of what is said of kernels.

Child processes learn of it through a sitecustomize.py on PYTHONPATH (see doubling_path).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from implementations.engine import Compiled
from implementations.jax_backend import ahead_of_time

SITE = """
import sys
sys.path.insert(0, {tests!r})
import implementations.engine
implementations.engine.COMPILERS["jax"] = "doubling"
"""


class Compiler(ahead_of_time.Compiler):
    def recurrence(self, *, batch_size: int, seq_len: int) -> Compiled:
        """One kernel over one block of batch_size x seq_len float32."""
        x = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.float32)
        double = pl.pallas_call(_double_kernel, out_shape=x, name="double")
        return ahead_of_time.compiled(jax.jit(double).trace(*self._there(x)))


def _double_kernel(x_ref, out_ref):
    out_ref[...] = 2 * x_ref[...]


def doubling_path(folder: Path) -> Path:
    """A folder for PYTHONPATH that puts this compiler in JAX's place in any process."""
    tests = Path(__file__).resolve().parent
    (folder / "sitecustomize.py").write_text(SITE.format(tests=str(tests)))
    return folder
