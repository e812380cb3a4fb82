"""What is derived from one frame is derived once, within a block that says so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pandas as pd

_memory: dict[tuple, tuple[pd.DataFrame, Any]] | None = None


@contextmanager
def remembering() -> Iterator[None]:
    """Within the block, what is derived from one frame is derived once. What a block within it is
    the first to derive is forgotten at the end of that. Frames and results must not be changed in
    place there."""
    global _memory
    before, _memory = _memory, dict(_memory or {})
    try:
        yield
    finally:
        _memory = before


def remembered(function: Callable) -> Callable:
    @wraps(function)
    def recall(frame: pd.DataFrame, *args: Any, **options: Any) -> Any:
        if _memory is None:
            return function(frame, *args, **options)
        key = (function, id(frame), args, *sorted(options.items()))
        if key not in _memory:
            # the frame kept: its id stays its own
            _memory[key] = (frame, function(frame, *args, **options))
        return _memory[key][1]

    return recall
