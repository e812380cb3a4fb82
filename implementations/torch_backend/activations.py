"""The output of every layer by the path of its parameters: for checks.

Twin: implementations/jax_backend/activations.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the block, what every module is given is kept as PATH.input, its output (the first of
    several, with its bias where that is added later) as PATH."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            found[f"{path}.input"] = inputs[0]
            output = output[0] if isinstance(output, tuple) else output
            found[path] = module.add_bias(output) if hasattr(module, "add_bias") else output

        return hook

    hooks = [
        module.register_forward_hook(keep(path)) for path, module in model.named_modules() if path
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
