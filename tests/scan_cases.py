"""What kernels of a scan are called with in tests of either language, and what is true of it.

Inputs are rounded to their dtype first, so that only the kernel's own error counts.
"""

from dataclasses import dataclass

import numpy as np
from conftest import tiny

from implementations import ops as truth
from implementations import reference
from implementations.config import ModelConfig
from implementations.mixers.rg_lru import param_specs
from implementations.parameters import is_exact
from suites.ladder.check import error_of, to_bfloat16, tolerances

# B, T, R, documents, dtype: pairwise over length, channels, documents and dtype, not the full
# product. Blocks of the kernels are 64, 256 and 512 wide, so that some of these are whole ones.
SHAPES = [
    (1, 1, 3, "later", "float32"),
    (2, 1, 65, "one", "bfloat16"),
    (2, 7, 65, "each", "float32"),
    (1, 7, 1024, "some", "bfloat16"),
    (1, 100, 3, "some", "bfloat16"),
    (2, 100, 65, "later", "float32"),
    (1, 257, 65, "some", "float32"),
    (1, 257, 3, "each", "bfloat16"),
    (1, 64, 1024, "later", "float32"),  # whole tiles of Triton's
]
# of kernels that walk time in chunks, or blocks, of 256
LONG_SHAPES = [
    (1, 1, 65, "later", "float32"),
    (1, 7, 3, "some", "bfloat16"),
    (2, 256, 3, "later", "float32"),  # one whole chunk
    (1, 257, 65, "later", "float32"),  # and one step more
    (1, 257, 1024, "some", "bfloat16"),
    (1, 600, 3, "later", "bfloat16"),
    (2, 600, 65, "some", "float32"),
    (1, 600, 3, "each", "float32"),
]

# field: (largest, root mean square), both relative. A mean over few values is no mean: None.
Errors = dict[str, tuple[float, float | None]]
MANY = 256


@dataclass(frozen=True)
class Case:
    """One op as parity calls it, and what is true of it: outputs, and gradients of everything."""

    op: str
    dtype: str
    config: ModelConfig
    params: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    doutputs: tuple[np.ndarray, ...]

    def dtype_of(self, name: str) -> str:
        """Of an input."""
        return "float32" if name in truth.OPS[self.op].wide else self.dtype

    def floats(self) -> dict[str, np.ndarray]:
        return {k: v for k, v in self.inputs.items() if v.dtype.kind == "f"}

    def integers(self) -> dict[str, np.ndarray]:
        return {k: v for k, v in self.inputs.items() if v.dtype.kind == "i"}

    def errors(self, outputs: tuple, dparams: dict, dinputs: dict) -> Errors:
        """Of what a kernel found: arrays as NumPy's."""
        true = truth.call(self.op, self.config, self.params, self.inputs, self.doutputs)
        found = errors(dict(zip(true[0], outputs, strict=True)), true[0])
        for ours, wanted in zip((dparams, dinputs), true[1:], strict=True):
            found |= {f"d{name}": error for name, error in errors(ours, wanted).items()}
        return found


def scan_case(op: str, B: int, T: int, R: int, documents: str, dtype: str, **settings) -> Case:
    """linear_scan or rg_lru, of a model of these settings."""
    config = sized(R, **settings)
    rng = np.random.default_rng([T, R])
    position_BT = positions(documents, B, T)
    if op == "linear_scan":
        a_BTR = rng.uniform(0.6, 0.9999, (B, T, R)).astype(np.float32)
        a_BTR[position_BT == 0] = 0
        params, inputs = {}, {"a_BTR": a_BTR, "x_BTR": normal(rng, B, T, R)}
    else:
        params = reference.within(drawn(config, rng), "rg_lru")
        inputs = {"x_BTR": normal(rng, B, T, R), "position_BT": position_BT}
    inputs["h0_BR"] = normal(rng, B, R)
    doutputs = (normal(rng, B, T, R), normal(rng, B, R))
    if dtype == "bfloat16":
        wide = truth.OPS[op].wide
        inputs = {k: v if k in wide or v.dtype.kind == "i" else to_bfloat16(v)
                  for k, v in inputs.items()}  # fmt: skip
        params = {k: v if is_exact(k) else to_bfloat16(v) for k, v in params.items()}
        doutputs = (to_bfloat16(doutputs[0]), doutputs[1])
    return Case(op, dtype, config, params, inputs, doutputs)


def sized(R: int, **overrides) -> ModelConfig:
    num_gate_blocks = 4 if R % 4 == 0 else 1
    return tiny("hawk", d_rnn=R, **{"num_gate_blocks": num_gate_blocks} | overrides)


def drawn(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Parameters of a mixer of which none is 0; memories from short to very long."""
    params = {
        spec.name: normal(rng, *spec.shape) * np.float32(spec.shape[0] ** -0.5)
        for spec in param_specs(config)
    }
    if "rg_lru.a_param" in params:
        params["rg_lru.a_param"] = -rng.uniform(0.5, 9, config.d_gate).astype(np.float32)
    return params


def positions(documents: str, B: int, T: int) -> np.ndarray:
    """one: a document a row; later: begun before; some: starts mid-block; each: at every token."""
    position_T = {
        "one": np.arange(T),
        "later": np.arange(T) + 3,
        "some": np.arange(T) % 13,
        "each": np.zeros(T, int),
    }[documents]
    return np.tile(position_T, (B, 1)).astype(np.int32)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def errors(ours: dict[str, np.ndarray], true: dict[str, np.ndarray]) -> Errors:
    found = {}
    for name, want in true.items():
        error = error_of(ours[name], want)
        found[name] = (error.largest, error.rms if want.size >= MANY else None)
    return found


def within(found: Errors, op: str, dtype: str, language: str) -> None:
    """Fails when an error is beyond the tolerance of parity for the same field."""
    limits = tolerances()["ours"][dtype] | tolerances()[language].get(dtype, {})
    beyond = {}
    for name, (largest, rms) in found.items():
        limit = limits[f"{op}/{name}"]
        if largest > limit["largest"] or (rms is not None and rms > limit["rms"]):
            beyond[name] = (largest, rms, limit)
    assert found
    assert not beyond
