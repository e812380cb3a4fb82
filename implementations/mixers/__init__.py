"""The temporal mixers by name; each module: parameters, states, costs and equations of one."""

from importlib import import_module
from types import ModuleType

MIXERS = ("mqa", "rg_lru")


def load_mixer(name: str) -> ModuleType:
    """The module that describes a mixer: param_specs, state_bytes, mixing_flops, equations."""
    return import_module(f"implementations.mixers.{name}")
