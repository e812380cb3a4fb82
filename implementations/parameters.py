"""The parameter table of a whole model: names, shapes, axes and initialization, drawn in NumPy.

Both backends fill themselves from these arrays; neither draws anything of its own. A weight maps
its first axis to its second (x @ weight), in both.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from implementations.config import ModelConfig
from implementations.mixers import load_mixer

# Initializations by name; all zero-mean normals are untruncated. std is used by "normal" alone.
INITS = (
    "normal", "zeros", "a_param_paper", "a_param_code", "a_param_one", "time_step", "phase",
)  # fmt: skip


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its dotted name, shape, logical axes (see sharding.py) and initialization."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str
    std: float = 0.0
    power: float = 0.0  # of "a_param_paper" alone
    decayed: bool = False  # weight decay applies: matrices of the linear layers, and nothing else

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def param_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter of the model, in order of depth."""
    D, F, V = config.d_model, config.d_mlp, config.vocab_size
    specs = [ParamSpec("embedding.weight", (V, D), ("vocab", "model"), "normal", D**-0.5)]
    for index, mixer in enumerate(config.layer_mixers):
        layer = [
            ParamSpec("mixer_norm.scale", (D,), ("model",), "zeros"),
            *prefixed("mixer", load_mixer(mixer).param_specs(config)),
            ParamSpec("mlp_norm.scale", (D,), ("model",), "zeros"),
            *prefixed(
                "mlp",
                [
                    *linear_specs(config, "linear_gate", (D, F), ("model", "mlp")),
                    *linear_specs(config, "linear_up", (D, F), ("model", "mlp")),
                    *linear_specs(config, "linear_down", (F, D), ("mlp", "model"), is_output=True),
                ],
            ),
        ]
        specs += prefixed(f"layers.{index}", layer)
    specs.append(ParamSpec("final_norm.scale", (D,), ("model",), "zeros"))
    return tuple(specs)


def linear_specs(
    config: ModelConfig,
    name: str,
    shape: tuple[int, int],
    axes: tuple[str, str],
    *,
    is_output: bool = False,
    has_bias: bool = True,
) -> Iterator[ParamSpec]:
    """Weight [in, out], variance 1/in (2/num_layers of that before a residual sum), and bias."""
    gain = 2 / config.num_layers if is_output else 1.0
    std = math.sqrt(gain / shape[0])
    yield ParamSpec(f"{name}.weight", shape, axes, "normal", std, decayed=True)
    if has_bias and config.biases:
        yield ParamSpec(f"{name}.bias", shape[1:], axes[1:], "zeros")


def prefixed(prefix: str, specs: list[ParamSpec]) -> list[ParamSpec]:
    return [replace(spec, name=f"{prefix}.{spec.name}") for spec in specs]


def is_exact(name: str) -> bool:
    """Whether a bfloat16 engine keeps a parameter in float32: those that are raised to a power, or
    turned by, at every step."""
    return name.rpartition(".")[2] in ("a_param", "theta")


def draw(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Initial values, float32, by name; each from its own generator, seeded by (seed, name)."""
    specs = param_specs(config)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # NumPy draws outside the lock
        values = pool.map(partial(_draw, seed=seed), specs)
        return {spec.name: value for spec, value in zip(specs, values, strict=True)}


def _draw(spec: ParamSpec, seed: int) -> np.ndarray:
    digest = hashlib.blake2b(spec.name.encode(), digest_size=8).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest, "little")])
    if spec.init == "zeros":
        return np.zeros(spec.shape, np.float32)
    if spec.init == "normal":
        value = spec.std * rng.standard_normal(spec.shape)
    elif spec.init == "a_param_paper":  # section 2.4: a^c uniform, a = exp(-softplus(a_param))
        value = _inverse_softplus(-np.log(rng.uniform(0.9, 0.999, spec.shape)) / spec.power)
    elif spec.init == "a_param_code":  # recurrentgemma: a^2 uniform
        value = _inverse_softplus(-np.log(rng.uniform(0.9**2, 0.999**2, spec.shape)) / 2)
    elif spec.init == "a_param_one":  # mamba: A = softplus(a_param) = 1
        value = np.full(spec.shape, _inverse_softplus(1.0))
    elif spec.init == "time_step":  # Mamba (arXiv:2312.00752): softplus(bias) log-uniform
        value = _inverse_softplus(np.exp(rng.uniform(*np.log((0.001, 0.1)), spec.shape)))
    elif spec.init == "phase":  # recurrentgemma: theta of the complex gate
        value = rng.uniform(0, 0.1 * np.pi, spec.shape)
    else:
        raise AssertionError(f"{spec.name}: init {spec.init!r} is not one of {INITS}")
    return value.astype(np.float32)


def _inverse_softplus(y: np.ndarray) -> np.ndarray:
    return np.log(np.expm1(y))


def save(path: Path, values: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file; names and shapes as in the table."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, path)


def load(path: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """Reads a safetensors file; ValueError names the first parameter that does not fit."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        values = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}).") from None
    check(config, values, str(path))
    return values


def check(config: ModelConfig, values: dict[str, np.ndarray], where: str) -> None:
    """Every parameter of the table, once, in its shape, and no other; else ValueError."""
    shapes = {spec.name: spec.shape for spec in param_specs(config)}
    for name, shape in shapes.items():
        if name not in values:
            raise ValueError(f"{where}: parameter {name!r} of {config.title} is missing.")
        if tuple(values[name].shape) != shape:
            raise ValueError(
                f"{where}: parameter {name!r} has shape {tuple(values[name].shape)}, "
                f"{config.title} needs {shape}."
            )
    if extra := sorted(values.keys() - shapes.keys()):
        raise ValueError(f"{where}: parameter {extra[0]!r} is not one of {config.title}.")
