"""What a model is: one frozen record that both backends build from, and the strict door into it."""

import math
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from implementations.mixers import MIXERS

LAMBDA_INITS = ("paper", "code")
DTYPES = ("float32", "bfloat16", "float64")
MAX_CONV_WIDTH = 8


@dataclass(frozen=True)
class Gate:
    """What a gate of the recurrent mixer is made of; gates.py has the equations."""

    has_recurrence_gate: bool = True  # r, of a_gate
    has_input_gate: bool = True  # i, of input_gate
    has_a_param: bool = True
    has_time_step: bool = False  # r is a step in time: neither decay_exponent nor normalize_input
    is_complex: bool = False  # channel k and k + d_rnn / 2 are one complex channel


GATES = {
    "rg_lru": Gate(),
    "no_recurrence_gate": Gate(has_recurrence_gate=False),
    "no_input_gate": Gate(has_input_gate=False),
    "lru": Gate(has_recurrence_gate=False, has_input_gate=False),
    "gru": Gate(has_input_gate=False, has_a_param=False, has_time_step=True),
    "mamba": Gate(has_input_gate=False, has_time_step=True),
    "cg_lru": Gate(is_complex=True),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of one language model (arXiv:2402.19427, sections 2 and 3).

    Defaults follow the paper where it speaks and the released code where it is silent; each
    conflict between the two is a field. ValueError names the field that cannot be built.
    """

    family: str
    size: str
    pattern: tuple[str, ...]  # mixers, repeated over depth; the last repetition may be cut short
    d_model: int
    d_rnn: int
    d_mlp: int
    num_layers: int
    num_heads: int  # query heads
    head_dim: int
    num_gate_blocks: int
    window_size: int | None  # keys a query may see, itself included; None: all
    num_kv_heads: int = 1  # 1 is MQA; num_heads is MHA
    vocab_size: int = 256
    conv_width: int = 4  # 0: no convolution
    gate: str = "rg_lru"
    decay_exponent: float = 8.0  # the paper's c: a_t = a^(c r_t)
    normalize_input: bool = True  # inputs times sqrt(1 - a_t^2)
    lambda_init: str = "paper"  # paper: a^c uniform in [0.9, 0.999]; code: a^2 in [0.9^2, 0.999^2]
    rope_fraction: float = 1.0  # share of each head's channels that is rotated (released code: 0.5)
    rope_base: float = 10000.0
    biases: bool = True
    window_extra_key: bool = False  # released code: a query sees window_size + 1 keys
    logit_soft_cap: float | None = None
    scale_embeddings: bool = False  # inputs times sqrt(d_model) (RecurrentGemma)
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("d_model", "d_rnn", "d_mlp", "num_layers", "num_heads", "head_dim",
                     "num_gate_blocks", "num_kv_heads", "vocab_size"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{self.title}: {name}={getattr(self, name)}; must be at least 1.")
        if not self.pattern:
            raise ValueError(f"{self.title}: pattern is empty; name at least one of {MIXERS}.")
        for mixer in self.pattern:
            choose("pattern", mixer, MIXERS, self.title)
        choose("gate", self.gate, tuple(GATES), self.title)
        choose("lambda_init", self.lambda_init, LAMBDA_INITS, self.title)
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(
                f"{self.title}: window_size={self.window_size}; must be at least 1, or null."
            )
        if not 0 <= self.conv_width <= MAX_CONV_WIDTH:
            raise ValueError(
                f"{self.title}: conv_width={self.conv_width}; must be from 0, which is no "
                f"convolution, to {MAX_CONV_WIDTH}."
            )
        if not (math.isfinite(self.decay_exponent) and self.decay_exponent > 0):
            raise ValueError(
                f"{self.title}: decay_exponent={self.decay_exponent}; must be positive."
            )
        if "rg_lru" in self.pattern:
            self._check_gate()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.title}: num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if not 0.0 <= self.rope_fraction <= 1.0 or (self.head_dim * self.rope_fraction) % 2:
            raise ValueError(
                f"{self.title}: rope_fraction={self.rope_fraction} of head_dim={self.head_dim} "
                "must be an even number of channels, between 0 and all of them."
            )
        if self.logit_soft_cap is not None and not self.logit_soft_cap > 0:
            raise ValueError(
                f"{self.title}: logit_soft_cap={self.logit_soft_cap}; must be positive, or null."
            )
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise ValueError(f"{self.title}: rms_norm_eps={self.rms_norm_eps}; must be positive.")

    def _check_gate(self) -> None:
        blocks, gate = self.num_gate_blocks, GATES[self.gate]
        if self.d_rnn % blocks:
            below = self.d_rnn // blocks * blocks
            near = [value for value in (below, below + blocks) if value]
            raise ValueError(
                f"{self.title}: d_rnn={self.d_rnn} is not a multiple of num_gate_blocks="
                f"{blocks}; use {' or '.join(map(str, near))}."
            )
        if gate.is_complex and self.d_rnn // blocks % 2:
            raise ValueError(
                f"{self.title}: gate={self.gate} pairs channels, and d_rnn={self.d_rnn} in "
                f"num_gate_blocks={blocks} makes blocks of {self.d_rnn // blocks}; must be even."
            )
        if not gate.has_time_step:
            return
        if not self.normalize_input:
            raise ValueError(
                f"{self.title}: normalize_input=false with gate={self.gate}, which has no "
                "sqrt(1 - a^2) to leave out; must be true."
            )
        if self.decay_exponent != type(self).decay_exponent:
            raise ValueError(
                f"{self.title}: decay_exponent={self.decay_exponent} with gate={self.gate}, which "
                f"has no such exponent; leave it at {type(self).decay_exponent}."
            )
        if not self.biases:
            raise ValueError(
                f"{self.title}: biases=false with gate={self.gate}, whose time step starts as the "
                "bias of a_gate; must be true."
            )

    @property
    def title(self) -> str:
        return f"model '{self.family}_{self.size}'"

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer of every layer, from the first to the last."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    @property
    def d_gate(self) -> int:
        """Outputs of each gate of the recurrent mixer: one for a channel, real or complex."""
        return self.d_rnn // 2 if GATES[self.gate].is_complex else self.d_rnn

    @property
    def num_visible_keys(self) -> int | None:
        """Keys that a query sees at most, itself included; None: all."""
        return None if self.window_size is None else self.window_size + self.window_extra_key

    @property
    def rope_dim(self) -> int:
        """Rotated channels of each head: the first ones."""
        return int(self.head_dim * self.rope_fraction)


def choose(key: str, value: str, known: tuple[str, ...], where: str) -> str:
    """The value, when it is one of the known ones; else ValueError with a suggestion."""
    if value in known:
        return value
    close = get_close_matches(str(value), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{where}: {key}={value!r} is not known; known: {', '.join(known)}.{hint}")


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """A frozen dataclass from plain YAML values; unknown, missing and mistyped keys are errors."""
    known = {field.name: field for field in fields(cls)}
    for key in values:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Known keys: {sorted(known)}."
            raise ValueError(f"{where}: unknown key {key!r}.{hint}")
    required = {
        k for k, f in known.items() if f.default is MISSING and f.default_factory is MISSING
    }
    if missing := sorted(required - values.keys()):
        raise ValueError(f"{where}: missing key {missing[0]!r}.")
    types = get_type_hints(cls)
    return cls(**{key: _typed(types[key], value, key, where) for key, value in values.items()})


def _typed(kind: Any, value: Any, key: str, where: str) -> Any:
    """The value as its annotated type: int for int, int or float for float, lists as tuples."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(_typed(get_args(option)[0], item, key, where) for item in value)
        if get_origin(option) is dict and isinstance(value, dict):
            kind = get_args(option)[1]
            return {str(k): _typed(kind, v, f"{key}.{k}", where) for k, v in value.items()}
        if option is Any:
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ValueError(f"{where}: {key}={value}; must be a finite number.")
            return float(value)
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option in (str, bool) and isinstance(value, option):
            return value
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    expected = expected.replace("NoneType", "null")
    raise ValueError(f"{where}: {key}={value!r} is not {expected}.")
