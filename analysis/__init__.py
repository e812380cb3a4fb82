"""Records to pages: load, derive, statistics, matching, tables, figures, style, report."""

from importlib import import_module
from typing import Any

_HOME = {
    "load": "analysis.load",  # the module itself, which is callable
    "write_parquet": "analysis.load",
    "write_report": "analysis.report",
    "side_by_side": "analysis.tables",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """`analysis.load(store)` and its like, imported at first use: pandas takes a second."""
    if name not in _HOME:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    module = import_module(_HOME[name])
    return module if name == "load" else getattr(module, name)
