"""The PyTorch engine: one nn.Module with float32 parameters; see implementations/engine.py.

Twin: implementations/jax_backend/engine.py.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from implementations import parameters
from implementations.config import ModelConfig
from implementations.engine import (
    CPU,
    WIDE_INPUTS,
    Batch,
    Kernels,
    OptimizerConfig,
    Unsupported,
    auto,
    check_dtype,
    check_num_devices,
    check_several,
    on_one_device,
)
from implementations.ops import OPS
from implementations.torch_backend import data_parallel, model, ops
from implementations.torch_backend.activations import watched
from implementations.torch_backend.kernels import attention, interpreter, linear_scan, rms_norm
from implementations.torch_backend.layers import exact
from implementations.torch_backend.optimizer import adamw, clip_by_global_norm, learning_rate

MAX_PROGRAMS = 256  # of one function: shapes that one process may compile
# A token of a small model takes under a millisecond, and what is not arithmetic shows: checking the
# modules takes 0.09 ms a token (their settings, in one string, are checked instead), and a C++
# caller is faster than a Python one.
UNCHANGED = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
DECODE_OPTIONS = {
    "cpu": UNCHANGED | {"cpp_wrapper": True, "size_asserts": False},
    "cuda": UNCHANGED,
}
MOMENTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}

Step = Callable[[Tensor, Tensor, tuple], tuple[Tensor, Tensor, tuple]]  # token, position, states


class Cache(NamedTuple):
    states: tuple
    position: int  # of the next token, counted on the host


def resolve(kernels: Kernels, device_kind: str, dtype: str) -> dict[str, str]:
    """Kernel setting -> variant; Unsupported names one that is not offered, or cannot run here."""
    # in float64 what runs everywhere: the kernels of Triton compute in float32
    resolved = auto("torch", CPU if dtype == "float64" else device_kind) | kernels.chosen
    linear_scan.check(resolved["linear_scan"])
    attention.check(resolved["attention"])
    rms_norm.check(resolved["layers"])
    triton = [
        f"kernels.{key}={name}" for key, name in resolved.items() if name.startswith("triton")
    ]
    if not triton:
        if kernels.interpret:
            raise Unsupported("kernels.interpret=true, but none of the kernels is one of Triton.")
        return resolved
    if dtype == "float64":
        raise Unsupported(f"{triton[0]} computes in float32: it has no float64.")
    if kernels.interpret and kernels.compile:
        raise Unsupported("kernels.interpret=true: interpreted kernels cannot be compiled too.")
    if device_kind == CPU and not kernels.interpret:
        raise Unsupported(
            f"{triton[0]} needs a GPU; on a CPU kernels.interpret=true runs it in Triton's "
            "interpreter, for correctness only."
        )
    if kernels.interpret != interpreter.is_interpreting():
        raise Unsupported(
            "kernels.interpret=true needs TRITON_INTERPRET=1 in the environment that Python is "
            "started in."
            if kernels.interpret
            else f"{triton[0]} would be interpreted: unset TRITON_INTERPRET before Python is "
            "started, or say kernels.interpret=true."
        )
    return resolved


class Engine:
    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: str = "float32",
        kernels: Kernels = Kernels(),
        device_kind: str = CPU,
        num_devices: int = 1,
        seed: int = 0,
    ) -> None:
        self.config, self.dtype = config, getattr(torch, check_dtype(dtype))
        self.num_devices = check_num_devices(num_devices)
        if num_devices > 1:
            check_several(kernels)
            data_parallel.choose_device(device_kind, num_devices)
        self.device = find_device(device_kind)
        resolved = resolve(kernels, device_kind, dtype)
        if kernels.interpret:
            interpreter.mend()
        self.kernels = kernels
        self.resolved_kernels = resolved | {"program": "compiled" if kernels.compile else "eager"}
        self._is_captured = self.device.type != CPU
        self.device_name = (
            CPU if self.device.type == CPU else torch.cuda.get_device_name(self.device)
        )
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self.master_dtype = torch.float64 if dtype == "float64" else torch.float32
        self.model = model.Model(config, resolved, self.dtype)
        self.model.to(self.device, self.master_dtype)
        self._loss = self._compiled(self.model.loss)
        self._forward = self._compiled(forward)
        self._decode_step = self._compiled(decode_step, DECODE_OPTIONS[self.device.type])
        self._settings = repr((config, resolved, dtype))
        self._optimizer: torch.optim.AdamW | None = None
        if num_devices > 1:
            data_parallel.join(self.device)
        self.load_parameters(parameters.draw(config, seed))

    def parameters(self) -> dict[str, np.ndarray]:
        return on_host(self._params)

    def load_parameters(self, values: dict[str, np.ndarray]) -> None:
        parameters.check(self.config, values, "load_parameters")
        write(self._params, values)
        self._drop_cast()

    @on_one_device
    def logits(self, batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            tokens_BT, _, position_BT = self._put(batch)
            return self._compute_model.logits(tokens_BT, position_BT).cpu().numpy()

    @on_one_device
    @torch.inference_mode()
    def activations(self, batch: Batch) -> dict[str, np.ndarray]:
        tokens_BT, _, position_BT = self._put(batch)
        with watched(self._compute_model) as found:
            x_BTD, _ = self._compute_model(tokens_BT, position_BT, None)
        given = {"embedding": found["layers.0.input"], "logits": self._compute_model.unembed(x_BTD)}
        return on_host(found | given)  # a module of two functions has no hook

    @on_one_device
    def op(
        self,
        name: str,
        params: dict[str, np.ndarray],
        inputs: dict[str, np.ndarray],
        doutputs: tuple[np.ndarray, ...],
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
        def put(value: np.ndarray, dtype: torch.dtype) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=self.device)

        op = OPS[name]
        is_float = {key: value.dtype.kind == "f" for key, value in inputs.items()}
        outputs, dparams, dinputs = ops.call(
            name,
            ops.Settings(self.config, self.resolved_kernels, self.dtype),
            {key: put(value, self.master_dtype) for key, value in params.items()},
            {
                key: put(value, self.master_dtype if key in op.wide else self.dtype)
                for key, value in inputs.items()
                if is_float[key]
            },
            {k: put(v, torch.int64) for k, v in inputs.items() if not is_float[k]},
            tuple(put(value, self.master_dtype) for value in doutputs),
        )
        outputs = dict(zip(op.outputs, outputs, strict=True))
        return on_host(outputs), on_host(dparams), on_host(dinputs)

    @on_one_device
    def prepare_op(
        self,
        name: str,
        inputs: dict[str, np.ndarray],
        doutputs: tuple[np.ndarray, ...] | None = None,
    ) -> Callable[[], tuple]:
        def put(value: np.ndarray, is_wide: bool) -> Tensor:
            dtype = self.master_dtype if is_wide else self.dtype
            return torch.tensor(value, dtype=dtype, device=self.device)

        is_float = {key: value.dtype.kind == "f" for key, value in inputs.items()}
        floats = {key: put(v, key in WIDE_INPUTS) for key, v in inputs.items() if is_float[key]}
        integers = {
            key: torch.tensor(v, dtype=torch.int64, device=self.device)
            for key, v in inputs.items()
            if not is_float[key]
        }
        function = self._compiled(ops.TIMED[name])
        compute = partial(
            function,
            ops.Settings(self.config, self.resolved_kernels, self.dtype),
            **floats,
            **integers,
        )
        if doutputs is None:
            return torch.inference_mode()(lambda: (compute(), {}))
        # of every state, and of the last one
        doutputs = (put(doutputs[0], False), put(doutputs[1], True))
        for value in floats.values():
            value.requires_grad_()

        def run() -> tuple:
            outputs = compute()
            grads = torch.autograd.grad(outputs, tuple(floats.values()), doutputs)
            return outputs, dict(zip(floats, grads, strict=True))

        return run

    def loss_and_grad(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        loss = self._backward(batch, activation_checkpointing=False)
        grads = on_host({name: value.grad for name, value in self._params.items()})
        self.model.zero_grad()
        return float(loss), grads

    def evaluate(self, batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            nll_BT = self._compute_model.evaluate(*self._put(self._rows(batch))).float()
            if self.num_devices > 1:
                nll_BT = data_parallel.gathered(nll_BT)
            return nll_BT.cpu().numpy()

    def start_training(
        self, optimizer: OptimizerConfig, *, activation_checkpointing: bool = False
    ) -> None:
        self._optimizer_config = optimizer
        self._activation_checkpointing = activation_checkpointing
        self._step = 0
        self._optimizer = adamw(optimizer, self.config, self._params)

    def train_step(self, batch: Batch) -> Tensor:
        loss = self._backward(batch, activation_checkpointing=self._activation_checkpointing)
        grads = [parameter.grad for parameter in self.model.parameters()]
        clip_by_global_norm(grads, self._optimizer_config.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._optimizer_config, self._step)
        self._optimizer.step()
        self.model.zero_grad()
        self._step += 1
        self._drop_cast()
        return loss

    def training_state(self) -> dict[str, np.ndarray]:
        """Parameters by name; moments as first_moment.NAME and second_moment.NAME; step."""
        moments = {}
        for prefix in MOMENTS:
            moments |= {f"{prefix}.{n}": value for n, value in self._moments(prefix).items()}
        return self.parameters() | on_host(moments) | {"step": np.array(self._step, np.int32)}

    def load_training_state(self, state: dict[str, np.ndarray]) -> None:
        self.load_parameters({name: state[name] for name in self._params if name in state})
        for prefix in MOMENTS:
            prefixed = f"{prefix}."
            values = {
                n.removeprefix(prefixed): v for n, v in state.items() if n.startswith(prefixed)
            }
            parameters.check(self.config, values, "load_training_state")
            write(self._moments(prefix), values)
        self._step = int(state["step"])
        for parameter in self._params.values():
            self._optimizer.state[parameter]["step"].fill_(self._step)

    @on_one_device
    @torch.inference_mode()
    def prefill(
        self, prompt_BT: np.ndarray, *, capacity: int, chunk_len: int | None = None
    ) -> tuple[Tensor, Cache]:
        B, T = prompt_BT.shape
        cache = self.empty_cache(B, capacity=capacity)
        for start in range(0, T, chunk_len or T):
            x_BTD, cache = self._extend(prompt_BT[:, start : start + (chunk_len or T)], cache)
        return next_token(self._compute_model, x_BTD), cache

    @on_one_device
    def empty_cache(self, batch_size: int, *, capacity: int) -> Cache:
        states = model.empty_states(self.config, batch_size, capacity, self.dtype, self.device)
        return Cache(states, 0)

    @on_one_device
    @torch.inference_mode()
    def extend(self, tokens_BT: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
        x_BTD, cache = self._extend(tokens_BT, cache)
        return self._compute_model.unembed(x_BTD).cpu().numpy(), cache

    @on_one_device
    @torch.inference_mode()
    def decode(self, token_B: Any, cache: Cache, *, num_tokens: int) -> tuple[Tensor, Cache]:
        self._check_room(cache, num_tokens)
        states, position = cache
        token_B = torch.as_tensor(np.asarray(token_B) if isinstance(token_B, list) else token_B)
        token_B = token_B.to(self.device, torch.int64)
        position_BT = torch.full((token_B.shape[0], 1), position, device=self.device)
        step = partial(self._decode_step, self._settings, self._compute_model)
        if self._is_captured:
            step = self._captured(step, token_B, position_BT, states)
        tokens = []
        for _ in range(num_tokens):
            token_B, position_BT, states = step(token_B, position_BT, states)
            tokens.append(token_B)
        if isinstance(step, Graph):  # whose own serve other caches too
            states = step.unload(cache.states)
        return torch.stack(tokens, 1), Cache(states, position + num_tokens)

    def to_numpy(self, tokens: Tensor) -> np.ndarray:
        return tokens.cpu().numpy().copy()

    def num_bytes(self, cache: Cache) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves(cache.states))

    def synchronize(self) -> None:
        if self.device.type != CPU:
            torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int | None:
        return None if self.device.type == CPU else torch.cuda.max_memory_allocated(self.device)

    @property
    def _params(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @property
    def _compute_model(self) -> model.Model:
        """The model with parameters in `dtype`, cast once."""
        if self._cast_model is None:
            self._cast_model = copy.deepcopy(self.model)
            model.cast(self._cast_model)
        return self._cast_model

    def _captured(self, step: Step, token_B: Tensor, position_BT: Tensor, states: tuple) -> "Graph":
        """The graph of a step on caches of this shape: made once, for these weights in place."""
        shapes = (tuple(leaf.shape for leaf in leaves(states)), token_B.shape)
        if shapes not in self._graphs:  # it holds a cache: one at a time
            self._graphs = {shapes: Graph(step, token_B, position_BT, states)}
        self._graphs[shapes].load(token_B, position_BT, states)
        return self._graphs[shapes]

    def _drop_cast(self) -> None:
        self._graphs: dict[tuple, Graph] = {}
        self._cast_model = self.model if self.dtype == self.master_dtype else None

    def _compiled(self, function: Any, options: dict[str, Any] | None = None) -> Any:
        """One program for each shape, as in JAX; never eager code in the place of one."""
        if not self.kernels.compile:
            return function
        torch._dynamo.config.recompile_limit = MAX_PROGRAMS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(function, dynamic=False, options=options)

    def _moments(self, prefix: str) -> dict[str, Tensor]:
        key = MOMENTS[prefix]
        return {name: self._optimizer.state[p][key] for name, p in self._params.items()}

    def _put(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        arrays = (batch.tokens_BT, batch.targets_BT, batch.position_BT)
        tensors = map(torch.tensor, arrays)
        if self.device.type == CPU:
            return tuple(tensors)
        # pinned, a copy does not wait for the step before it
        return tuple(x.pin_memory().to(self.device, non_blocking=True) for x in tensors)

    def _backward(self, batch: Batch, *, activation_checkpointing: bool) -> Tensor:
        rows = self._rows(batch)
        loss = self._loss(*self._put(rows), activation_checkpointing)
        loss.backward()
        loss = loss.detach()
        if self.num_devices > 1:
            loss = data_parallel.summed(loss, list(self.model.parameters()), rows, batch)
        return loss

    def _rows(self, batch: Batch) -> Batch:
        """What this device computes of a batch."""
        if self.num_devices == 1:
            return batch
        return data_parallel.rows(batch, check_num_devices(self.num_devices, batch))

    def _extend(self, tokens_BT: np.ndarray, cache: Cache) -> tuple[Tensor, Cache]:
        B, T = tokens_BT.shape
        self._check_room(cache, T)
        states, position = cache
        position_BT = torch.arange(position, position + T, device=self.device).expand(B, T)
        tokens_BT = torch.tensor(tokens_BT, device=self.device)
        x_BTD, states = self._forward(self._compute_model, tokens_BT, position_BT, states)
        return x_BTD, Cache(states, position + T)

    def _check_room(self, cache: Cache, num_tokens: int) -> None:
        """ValueError where a cache of visible keys would have to forget one."""
        end, W = cache.position + num_tokens, self.config.num_visible_keys
        for name, state in zip(self.config.layer_mixers, cache.states, strict=True):
            capacity = state.k_BSKH.shape[1] if name == "mqa" else end
            if capacity < end and capacity != W:
                raise ValueError(f"the cache holds capacity={capacity} positions, not {end}.")


class Graph:
    """A decode step as a CUDA graph: all its kernels are launched at once, without Python between
    them, on a token, a position and a cache of its own."""

    def __init__(self, step: Step, token_B: Tensor, position_BT: Tensor, states: tuple) -> None:
        self.inputs = (token_B.clone(), position_BT.clone(), copied(states))

        def advance() -> None:
            self._write(*step(*self.inputs))

        self.replay = capture(advance)

    def load(self, token_B: Tensor, position_BT: Tensor, states: tuple) -> None:
        self._write(token_B, position_BT, states)

    def __call__(
        self, token_B: Tensor, position_BT: Tensor, states: tuple
    ) -> tuple[Tensor, Tensor, tuple]:
        """The next of what is loaded; the arguments are what the last call gave."""
        self.replay()
        token_B, position_BT, states = self.inputs
        return token_B.clone(), position_BT, states

    def unload(self, states: tuple) -> tuple:
        """Written into the cache that was loaded, which is used up."""
        states = tuple(type(state)(*leaves((state,))) for state in states)
        for new, mine in zip(leaves(states), leaves(self.inputs[2]), strict=True):
            new.copy_(mine)
        return states

    def _write(self, token_B: Tensor, position_BT: Tensor, states: tuple) -> None:
        for mine, new in zip(
            (*self.inputs[:2], *leaves(self.inputs[2])),
            (token_B, position_BT, *leaves(states)),
            strict=True,
        ):
            if mine is not new:
                mine.copy_(new)


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """Launches again what the function launched, which runs before, to compile its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def leaves(states: tuple) -> list[Tensor]:
    return [leaf for state in states for leaf in state if isinstance(leaf, Tensor)]


def copied(states: tuple) -> tuple:
    """The same states elsewhere, every one with slots to read."""
    return tuple(type(state)(*(leaf.clone() for leaf in leaves((state,)))) for state in states)


def next_token(model: model.Model, x_BTD: Tensor) -> Tensor:
    return model.unembed(x_BTD[:, -1]).argmax(-1)


def forward(
    model: model.Model, tokens_BT: Tensor, position_BT: Tensor, states: tuple
) -> tuple[Tensor, tuple]:
    return model(tokens_BT, position_BT, states)


def decode_step(
    settings: str, model: model.Model, token_B: Tensor, position_BT: Tensor, states: tuple
) -> tuple[Tensor, Tensor, tuple]:
    """settings is all that makes the model's program: it is checked where the modules are not."""
    assert settings
    x_BTD, states = model(token_B[:, None], position_BT, states)
    return next_token(model, x_BTD), position_BT + 1, states


def find_device(device_kind: str) -> torch.device:
    """The CPU, or the current CUDA device where its own name holds the kind (h200)."""
    if device_kind == CPU:
        return torch.device(CPU)
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else CPU
    if device_kind.lower() not in found.lower():
        raise Unsupported(f"PyTorch finds no device {device_kind!r} here; it finds: {found}.")
    return torch.device("cuda", torch.cuda.current_device())


def on_host(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies as arrays; bfloat16, which NumPy lacks, as float32."""
    return {name: exact(value.detach()).cpu().numpy().copy() for name, value in values.items()}


def write(tensors: dict[str, Tensor], values: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(np.array(values[name])))
