"""What a backend must offer: the Engine protocol, its settings, and the way to load one."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from implementations.config import DTYPES, ModelConfig, choose

ENGINES = {
    "jax": "implementations.jax_backend.engine",
    "torch": "implementations.torch_backend.engine",
    "transformers": "implementations.transformers_backend.engine",
}
COMPILERS = {"jax": "implementations.jax_backend.ahead_of_time"}  # for devices that are not here
LINEAR_SCANS = ("auto", "sequential", "associative", "analytic", "triton", "triton_split",
                "pallas_tpu", "pallas_gpu")  # fmt: skip
ATTENTIONS = ("auto", "plain", "fused", "triton", "pallas_tpu", "pallas_gpu")
LAYERS = ("auto", "plain", "triton")
LANGUAGES = ("triton", "pallas")  # of the kernels that are ours: their variants begin with it
KERNEL_SETTINGS = ("linear_scan", "attention", "layers")  # of Kernels: each names a variant
CPU = "cpu"
TPUS = ("v4", "v5e", "v5p", "v6e")
TPU_SIDES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # dimensions of the chips' network
MAX_FLAT_SIDE = 16
# Ops that can be timed alone: rg_lru from its gates' pre-activations on, without the products that
# make them. What the model keeps in float32 stays so.
TIMED_OPS = ("linear_scan", "rg_lru")
WIDE_INPUTS = ("h0_BR", "a_param_R", "theta_R")
IGNORED = -1  # a target that is not scored


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which variant computes each op; what `auto` resolved to is in Engine.resolved_kernels."""

    linear_scan: str = "auto"
    attention: str = "auto"
    layers: str = "auto"  # norms, convolution, gated GeLU, rotation, loss
    interpret: bool = False  # run Triton and Pallas kernels in their interpreters: correctness only
    # torch.compile training, prefill and decode steps; JAX always compiles, transformers never
    compile: bool = False

    def __post_init__(self) -> None:
        choose("linear_scan", self.linear_scan, LINEAR_SCANS, "kernels")
        choose("attention", self.attention, ATTENTIONS, "kernels")
        choose("layers", self.layers, LAYERS, "kernels")

    @property
    def chosen(self) -> dict[str, str]:
        """Setting -> variant, of those that are not left to `auto`."""
        names = {setting: getattr(self, setting) for setting in KERNEL_SETTINGS}
        return {setting: name for setting, name in names.items() if name != "auto"}


def platform_of(device_kind: str) -> str:
    """cpu, tpu, or gpu: whatever is neither of the others."""
    if device_kind == CPU:
        return CPU
    return "tpu" if device_kind.lower() in ("tpu", *TPUS) else "gpu"


def tpu_of(topology: str) -> str:
    """The kind of TPU in a topology's name, v5e of v5e:2x2; ValueError where it is none."""
    kind, _, chips = topology.partition(":")
    sides = chips.split("x")
    if (
        kind not in TPU_SIDES
        or len(sides) != TPU_SIDES[kind]
        or not all(re.fullmatch("[1-9][0-9]?", side) for side in sides)
        or any(int(side) % 2 for side in sides[:2])
        or (len(sides) == 2 and max(map(int, sides)) > MAX_FLAT_SIDE)
    ):
        raise ValueError(
            f"topology {topology!r} is not known. A topology is a kind of TPU and its chips, by "
            "hosts of 2x2, in two dimensions up to 16x16 (v5e, v6e) or in three (v4, v5p): "
            "v5e:2x2, v6e:4x4, v4:2x2x1, v5p:2x2x2."
        )
    return kind


# (backend, platform) -> the variant that `auto` stands for in each setting. Layers of JAX are left
# to XLA, which fuses what lies between products. Attention on a CPU, measured on 2 cores at `tiny`,
# a step of 4096 tokens with global attention: fused 1.4 s and plain 4.2 in PyTorch, 7.5 and 2.0 in
# JAX; with a window they are equal.
AUTO = {
    ("jax", "cpu"): {"linear_scan": "analytic", "attention": "plain", "layers": "plain"},
    ("jax", "gpu"): {"linear_scan": "pallas_gpu", "attention": "fused", "layers": "plain"},
    ("jax", "tpu"): {"linear_scan": "pallas_tpu", "attention": "pallas_tpu", "layers": "plain"},
    ("torch", "cpu"): {"linear_scan": "analytic", "attention": "fused", "layers": "plain"},
    ("torch", "gpu"): {"linear_scan": "triton", "attention": "triton", "layers": "triton"},
}


def auto(backend: str, device_kind: str) -> dict[str, str]:
    """The variant that `auto` stands for in each setting; what cannot run at all is refused later,
    and named as PyTorch's on a CPU."""
    return AUTO.get((backend, platform_of(device_kind)), AUTO["torch", CPU])


def unsupported(
    backend: str, device_kind: str, chosen: dict[str, str], interpret: bool
) -> str | None:
    """Why a backend cannot run on a kind of device with these kernels, as far as names tell."""
    platform = platform_of(device_kind)
    if backend != "jax" and platform == "tpu":
        return f"backend={backend} runs on no TPU ({device_kind})."
    for setting, name in chosen.items():
        language, _, wanted = name.partition("_")
        needed = {"triton": "gpu", "pallas": wanted}.get(language)
        if needed not in (None, platform) and not (interpret and platform == CPU):
            return f"kernels.{setting}={name} needs a {needed.upper()}, not {device_kind}."
    return None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay, clipping of the global norm and decoupled decay.

    The rate of step s (from 0) is learning_rate * (s + 1) / num_warmup_steps while s is below
    num_warmup_steps, then a cosine from learning_rate down to final_fraction of it at num_steps.
    Decay applies to the weights of linear layers alone (ParamSpec.decayed).
    """

    name: str = "adamw"
    learning_rate: float = 3e-3
    num_warmup_steps: int = 20
    num_steps: int = 200
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip_norm", "num_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer: {name}={getattr(self, name)}; must be positive.")
        for name in ("beta1", "beta2", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer: {name}={getattr(self, name)}; must be in [0, 1].")
        if not 0 <= self.num_warmup_steps <= self.num_steps:
            raise ValueError(
                f"optimizer: num_warmup_steps={self.num_warmup_steps}; must be between 0 and "
                f"num_steps={self.num_steps}."
            )


@dataclass(frozen=True)
class Batch:
    """One batch of packed sequences, int32 on the host; the same arrays reach both backends."""

    tokens_BT: np.ndarray
    targets_BT: np.ndarray  # the next token; IGNORED where it belongs to another document
    position_BT: np.ndarray  # position within the document; 0 is a document start

    @classmethod
    def of(cls, tokens_BT: np.ndarray) -> "Batch":
        """One document a row: T + 1 tokens make T inputs and T targets."""
        B, T = tokens_BT.shape[0], tokens_BT.shape[1] - 1
        position_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
        tokens_BT = tokens_BT.astype(np.int32)
        return cls(tokens_BT[:, :-1], tokens_BT[:, 1:], position_BT)


class Unsupported(Exception):
    """These settings can run nowhere, or not on this device; the message is one line."""


class CompileError(Exception):
    """What a compiler refuses, in its words: one line."""


def check_num_devices(num_devices: int, batch: Batch | None = None) -> int:
    """ValueError where there is none, or where they do not share a batch's rows equally."""
    if num_devices < 1:
        raise ValueError(f"engine: num_devices={num_devices}; must be at least 1.")
    if batch is not None and batch.tokens_BT.shape[0] % num_devices:
        raise ValueError(
            f"engine: a batch of {batch.tokens_BT.shape[0]} rows does not divide by "
            f"num_devices={num_devices}."
        )
    return num_devices


def check_several(kernels: Kernels) -> None:
    """Unsupported where several devices do not offer what these kernels are for."""
    if kernels.interpret:
        raise Unsupported("kernels.interpret=true interprets kernels on one device, not several.")


def on_one_device(method: Callable) -> Callable:
    """A method of an Engine that several devices do not offer."""

    @wraps(method)
    def checked(self: "Engine", *args, **kwargs):
        if self.num_devices > 1:
            raise Unsupported(
                f"{method.__name__} is for one device: num_devices={self.num_devices} train and "
                "evaluate alone."
            )
        return method(self, *args, **kwargs)

    return checked


class Engine(Protocol):
    """One model in one framework, its parameters drawn from (config, seed).

    Loss is the mean over scored targets, nats per token. Calls may return before the device is
    done: synchronize() waits. `dtype` is that of activations and matrix products; training keeps
    float32 parameters and moments, prefill and decode use parameters cast to `dtype` once. In
    float64 everything is float64. Raises Unsupported for kernels that the device lacks.

    On several devices (num_devices > 1) training and evaluation are data-parallel: every device
    holds all parameters and takes its share of a batch's rows, in order. A run may then be several
    processes (Rank): each is given the whole batch, and gets the whole result. What is said of one
    device holds of all: the loss is the mean over the targets scored in the whole batch, and
    gradients are summed over devices before their norm is clipped. The other methods raise
    Unsupported, and so does a number of devices that is not the one found.
    """

    config: ModelConfig
    # kernel setting -> the variant that computes it; program -> compiled or eager
    resolved_kernels: dict[str, str]
    device_name: str
    num_devices: int

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: str = "float32",
        kernels: Kernels = Kernels(),
        device_kind: str = CPU,
        num_devices: int = 1,
        seed: int = 0,
    ) -> None: ...

    def parameters(self) -> dict[str, np.ndarray]:
        """Host copies by name, in the master dtype: float32, or float64 in a float64 engine."""

    def load_parameters(self, values: dict[str, np.ndarray]) -> None: ...

    def logits(self, batch: Batch) -> np.ndarray:
        """[B, T, V], float32 (float64 in a float64 engine)."""

    def loss_and_grad(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and its gradient by parameter name."""

    def activations(self, batch: Batch) -> dict[str, np.ndarray]:
        """What every layer gives, by the path of its parameters; PATH.input: what it is given."""

    def op(
        self,
        name: str,
        params: dict[str, np.ndarray],
        inputs: dict[str, np.ndarray],
        doutputs: tuple[np.ndarray, ...],
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """One op of implementations/ops.py alone: outputs, and for the gradients doutputs of them
        those of the parameters and of the inputs, each by name."""

    def prepare_op(
        self,
        name: str,
        inputs: dict[str, np.ndarray],
        doutputs: tuple[np.ndarray, ...] | None = None,
    ) -> Callable[[], Any]:
        """One op of TIMED_OPS with its inputs on the device, to be timed: each call computes its
        outputs, and for the gradients doutputs of them those of the inputs, on the device too."""

    def evaluate(self, batch: Batch) -> np.ndarray:
        """Negative log likelihood of each target, [B, T], nats, float32; 0 where IGNORED."""

    def start_training(
        self, optimizer: OptimizerConfig, *, activation_checkpointing: bool = False
    ) -> None:
        """Zero moments, step 0. With checkpointing the backward pass recomputes each layer."""

    def train_step(self, batch: Batch) -> Any:
        """One optimizer step; the loss before it, still on the device (float() reads it)."""

    def training_state(self) -> dict[str, np.ndarray]:
        """Parameters, moments and step, by name: what a checkpoint must hold."""

    def load_training_state(self, state: dict[str, np.ndarray]) -> None: ...

    def prefill(self, prompt_BT: np.ndarray, *, capacity: int, chunk_len: int | None = None):
        """(next token [B], cache): the prompt in one piece, or in pieces of chunk_len tokens.

        capacity is the number of positions the cache must hold, prompt and new tokens together.
        """

    def empty_cache(self, batch_size: int, *, capacity: int) -> Any: ...

    def extend(self, tokens_BT: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """(logits [B, T, V] on the host, cache): the next T tokens of each sequence. For checks."""

    def decode(self, token_B: Any, cache: Any, *, num_tokens: int) -> tuple[Any, Any]:
        """(tokens [B, num_tokens], cache): greedy, one program. The cache given is used up."""

    def to_numpy(self, tokens: Any) -> np.ndarray:
        """What prefill or decode gave, on the host, in memory of its own."""

    def num_bytes(self, cache: Any) -> int:
        """Bytes of all states in the cache (its position counter not counted)."""

    def synchronize(self) -> None: ...

    def peak_memory_bytes(self) -> int | None:
        """Highest allocation on the device so far (on the first, where a process holds several);
        None where the device does not count (a CPU)."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of one program. Of FLOPs and times it says too, and is wrong: on a
    model of 14 billion parameters half the FLOPs, and a negative time."""

    seconds: float  # that it took
    peak_memory_bytes: int  # of the device: arguments, results and what lives between them
    collectives: dict[str, int]  # between devices, by kind
    kernels: tuple[str, ...]  # hand-written ones in it, by the names they have in the program


class Compiler(Protocol):
    """The programs of one model as its Engine runs them, compiled for one device of a topology
    that is not here. No array is made. What does not compile raises CompileError; what does not
    fit in the device's memory MemoryError; both in the compiler's words."""

    config: ModelConfig
    resolved_kernels: dict[str, str]
    device_name: str

    def __init__(
        self, config: ModelConfig, *, dtype: str, kernels: Kernels, topology: str
    ) -> None: ...

    def train(
        self,
        optimizer: OptimizerConfig,
        *,
        batch_size: int,
        seq_len: int,
        activation_checkpointing: bool = False,
    ) -> Compiled:
        """One optimizer step."""

    def prefill(self, *, batch_size: int, prompt_len: int, capacity: int) -> Compiled:
        """A prompt in one piece, into an empty cache."""

    def decode(self, *, batch_size: int, capacity: int, num_tokens: int) -> Compiled:
        """num_tokens steps in one program."""

    def recurrence(self, *, batch_size: int, seq_len: int) -> Compiled:
        """The RG-LRU of one layer from its gates on, forward and backward."""


def load_engine(name: str) -> type[Engine]:
    """The Engine class of a backend; importing it imports the framework."""
    if name not in ENGINES:
        raise ValueError(
            f"backend {name!r} is not known; known: {', '.join(ENGINES)}. "
            "To add one, see ENGINES in implementations/engine.py."
        )
    return import_module(ENGINES[name]).Engine


def load_compiler(name: str) -> type[Compiler]:
    """The Compiler class of a backend; importing it imports the framework."""
    return import_module(COMPILERS[name]).Compiler


def check_dtype(dtype: str) -> str:
    return choose("dtype", dtype, DTYPES, "engine")
