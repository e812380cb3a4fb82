"""The output of every layer by the path of its parameters: for checks.

Twin: implementations/torch_backend/activations.py.  Functions marked @watched leave what they were
given and what they gave where their parameters are `Watched`; with plain ones they do nothing.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from jax import Array


class Watched(dict):
    """A tree of parameters that knows its path, and where outputs are written."""

    def __init__(self, tree: dict, found: dict[str, Array], path: str = "") -> None:
        start = f"{path}." if path else ""
        super().__init__(
            {
                key: Watched(value, found, f"{start}{key}") if isinstance(value, dict) else value
                for key, value in tree.items()
            }
        )
        self.path, self.found = path, found


def watched(function: Callable) -> Callable:
    """Of (params, x, ...): x is kept as PATH.input, the output (the first of several) as PATH."""

    @wraps(function)
    def call(params: dict, x: Array, *args: Any, **settings: Any) -> Any:
        made = function(params, x, *args, **settings)
        if isinstance(params, Watched):
            params.found[f"{params.path}.input"] = x
            params.found[params.path] = made[0] if isinstance(made, tuple) else made
        return made

    return call
