"""Whether Pallas kernels are interpreted: a mode of tracing, as one process may do both.

Twin: implementations/torch_backend/kernels/interpreter.py, where the environment decides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# What pl.pallas_call takes as `interpret`: False, True (as XLA operations), or the parameters of
# the interpreter that simulates a TPU's memories.
_mode: ContextVar[Any] = ContextVar("mode", default=False)


@contextmanager
def interpreting(mode: Any) -> Iterator[None]:
    """Kernels that are traced within are interpreted so."""
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def mode() -> Any:
    """Of the program that is being traced: for `pl.pallas_call(..., interpret=mode())`."""
    return _mode.get()
