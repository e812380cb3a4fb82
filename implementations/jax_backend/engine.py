"""The JAX engine: pure functions, jitted once a shape; see implementations/engine.py.

Twin: implementations/torch_backend/engine.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh

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
    platform_of,
)
from implementations.jax_backend import data_parallel, model, ops
from implementations.jax_backend.activations import Watched
from implementations.jax_backend.kernels import attention, linear_scan, rms_norm
from implementations.jax_backend.kernels.cross_entropy import cross_entropy
from implementations.jax_backend.kernels.interpreter import interpreting
from implementations.jax_backend.layers import exact, unembed
from implementations.jax_backend.optimizer import adamw
from implementations.ops import OPS

jax.tree_util.register_dataclass(Batch, ["tokens_BT", "targets_BT", "position_BT"], [])

# What a TPU calls itself (jax.Device.device_kind), where we ask for it by another name.
DEVICE_NAMES = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


def resolve(kernels: Kernels, device_kind: str, dtype: str) -> dict[str, str]:
    """Kernel setting -> variant; Unsupported names one that is not offered, or cannot run here."""
    # in float64 what runs everywhere: the kernels of Pallas compute in float32, as fused does
    resolved = auto("jax", CPU if dtype == "float64" else device_kind) | kernels.chosen
    linear_scan.check(resolved["linear_scan"])
    attention.check(resolved["attention"])
    rms_norm.check(resolved["layers"])
    if dtype == "float64" and resolved["attention"] == "fused":
        raise Unsupported("kernels.attention=fused: JAX's softmax is float32, not float64.")
    pallas = {key: name for key, name in resolved.items() if name.startswith("pallas")}
    if not pallas and kernels.interpret:
        raise Unsupported("kernels.interpret=true, but none of the kernels is one of Pallas.")
    for key, name in pallas.items():
        needed, platform = name.removeprefix("pallas_"), platform_of(device_kind)
        if dtype == "float64":
            raise Unsupported(f"kernels.{key}={name} computes in float32: it has no float64.")
        if platform != needed and not (kernels.interpret and platform == CPU):
            raise Unsupported(
                f"kernels.{key}={name} needs a {needed.upper()}; on a CPU kernels.interpret=true "
                "runs it in Pallas' interpreter, for correctness only."
            )
    return resolved


def kernels_of(kernels: Kernels, device_kind: str, dtype: str) -> tuple[Kernels, dict[str, str]]:
    """The settings with every variant named, and what a record says of them."""
    resolved = resolve(kernels, device_kind, dtype)
    return replace(kernels, **resolved), resolved | {"program": "compiled"}


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
        self.config, self.dtype = config, check_dtype(dtype)
        self.num_devices = check_num_devices(num_devices)
        self.mesh: Mesh | None = None
        if num_devices > 1:
            check_several(kernels)
            data_parallel.join(device_kind, num_devices)
            self.mesh = data_parallel.open_mesh(find_devices(device_kind), num_devices)
        self.device = find_devices(device_kind, is_local=True)[0]
        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        self.kernels, self.resolved_kernels = kernels_of(kernels, device_kind, dtype)
        self.device_name = self.device.device_kind
        self.master_dtype = "float64" if dtype == "float64" else "float32"
        self._settings = {"config": config, "kernels": self.kernels}
        self._latest: Any = None  # of the last program started: what synchronize waits for
        self._optimizer_state = None
        self.load_parameters(parameters.draw(config, seed))

    def parameters(self) -> dict[str, np.ndarray]:
        return on_host(model.flat(self.params))

    def load_parameters(self, values: dict[str, np.ndarray]) -> None:
        parameters.check(self.config, values, "load_parameters")
        names = [spec.name for spec in parameters.param_specs(self.config)]
        self._replace_params(self._on_device({name: values[name] for name in names}))

    @on_one_device
    def logits(self, batch: Batch) -> np.ndarray:
        return np.asarray(_logits(self._compute_params, self._put(batch), **self._settings))

    @on_one_device
    def activations(self, batch: Batch) -> dict[str, np.ndarray]:
        return on_host(_activations(self._compute_params, self._put(batch), **self._settings))

    @on_one_device
    def op(
        self,
        name: str,
        params: dict[str, np.ndarray],
        inputs: dict[str, np.ndarray],
        doutputs: tuple[np.ndarray, ...],
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
        def put(value: np.ndarray, dtype: str) -> Array:
            return self._put(jnp.asarray(value, dtype))

        op = OPS[name]
        is_float = {key: value.dtype.kind == "f" for key, value in inputs.items()}
        outputs, dparams, dinputs = _op(
            {key: put(value, self.master_dtype) for key, value in params.items()},
            {
                key: put(value, self.master_dtype if key in op.wide else self.dtype)
                for key, value in inputs.items()
                if is_float[key]
            },
            {k: put(v, "int32") for k, v in inputs.items() if not is_float[k]},
            tuple(put(value, self.master_dtype) for value in doutputs),
            name=name,
            settings=ops.Settings(self.config, self.kernels, self.dtype),
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
        def put(value: np.ndarray, is_wide: bool) -> Array:
            return self._put(jnp.asarray(value, self.master_dtype if is_wide else self.dtype))

        is_float = {key: value.dtype.kind == "f" for key, value in inputs.items()}
        arguments = (
            {key: put(v, key in WIDE_INPUTS) for key, v in inputs.items() if is_float[key]},
            {k: self._put(jnp.asarray(v, "int32")) for k, v in inputs.items() if not is_float[k]},
            # of every state, and of the last one
            doutputs and (put(doutputs[0], False), put(doutputs[1], True)),
        )
        settings = ops.Settings(self.config, self.kernels, self.dtype)

        def run() -> tuple:
            found = _timed_op(*arguments, name=name, settings=settings)
            self._latest = found[0][-1]  # the last state: small, and ready when all of it is
            return found

        return run

    def loss_and_grad(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        loss, grads = _loss_and_grad(
            self.params, self._put_rows(batch), dtype=self.dtype, **self._settings, mesh=self.mesh
        )
        return float(loss), on_host(model.flat(grads))

    def evaluate(self, batch: Batch) -> np.ndarray:
        nll_BT = _evaluate(
            self._compute_params, self._put_rows(batch), **self._settings, mesh=self.mesh
        )
        return np.asarray(nll_BT, np.float32)

    def start_training(
        self, optimizer: OptimizerConfig, *, activation_checkpointing: bool = False
    ) -> None:
        self._train_settings = self._settings | {
            "optimizer": optimizer,
            "dtype": self.dtype,
            "activation_checkpointing": activation_checkpointing,
            "mesh": self.mesh,
        }
        self._optimizer_state = self._put(adamw(optimizer, self.config).init(self.params))

    def train_step(self, batch: Batch) -> Array:
        params, self._optimizer_state, loss = train_program(
            self.params, self._optimizer_state, self._put_rows(batch), **self._train_settings
        )
        self._replace_params(params)
        self._latest = loss
        return loss

    def training_state(self) -> dict[str, np.ndarray]:
        """Parameters by name; moments as first_moment.NAME and second_moment.NAME; step."""
        moments = {
            "first_moment": optax.tree.get(self._optimizer_state, "mu"),
            "second_moment": optax.tree.get(self._optimizer_state, "nu"),
        }
        step = self._optimizer_state[1].count
        return self.parameters() | on_host(model.flat(moments)) | {"step": np.array(step)}

    def load_training_state(self, state: dict[str, np.ndarray]) -> None:
        def part(prefix: str) -> dict:
            values = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
            parameters.check(self.config, values, "load_training_state")
            return self._on_device(values)

        names = [spec.name for spec in parameters.param_specs(self.config)]
        self.load_parameters({name: state[name] for name in names if name in state})
        loaded = optax.tree.set(
            self._optimizer_state,
            count=jnp.asarray(state["step"], jnp.int32),
            mu=part("first_moment."),
            nu=part("second_moment."),
        )
        # The count stands in two places of the state: donated, each needs a buffer of its own.
        self._optimizer_state = self._put(jax.tree.map(jnp.array, loaded))

    @on_one_device
    def prefill(
        self, prompt_BT: np.ndarray, *, capacity: int, chunk_len: int | None = None
    ) -> tuple[Array, tuple]:
        B, T = prompt_BT.shape
        cache = self.empty_cache(B, capacity=capacity)
        for start in range(0, T, chunk_len or T):
            chunk_BT = prompt_BT[:, start : start + (chunk_len or T)]
            logits_BTV, cache = self._extend(chunk_BT, cache, is_last_only=True)
        self._latest = _next_token(logits_BTV)
        return self._latest, cache

    @on_one_device
    def empty_cache(self, batch_size: int, *, capacity: int) -> tuple:
        """(states of every layer, position_B): positions are counted on the host."""
        with jax.default_device(self.device):
            states = _empty_states(self.config, batch_size, capacity, self.dtype)
        # put there, as the states that programs return: else each length would be compiled twice
        return self._put(states), np.zeros(batch_size, np.int32)

    @on_one_device
    def extend(self, tokens_BT: np.ndarray, cache: tuple) -> tuple[np.ndarray, tuple]:
        logits_BTV, cache = self._extend(tokens_BT, cache, is_last_only=False)
        return np.asarray(logits_BTV), cache

    @on_one_device
    def decode(self, token_B: Array, cache: tuple, *, num_tokens: int) -> tuple[Array, tuple]:
        states, position_B = cache
        self._check_room(cache, num_tokens)
        tokens_BT, states = decode_program(
            self._compute_params,
            self._put(token_B),
            states,
            self._put(position_B),
            num_tokens=num_tokens,
            **self._settings,
        )
        self._latest = tokens_BT
        return tokens_BT, (states, position_B + np.int32(num_tokens))

    def to_numpy(self, tokens: Array) -> np.ndarray:
        return np.array(tokens)

    def num_bytes(self, cache: tuple) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(cache[0]))

    def synchronize(self) -> None:
        jax.block_until_ready((self.params, self._latest))

    def peak_memory_bytes(self) -> int | None:
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")

    @property
    def _compute_params(self) -> dict:
        """The parameters in `dtype`, cast once."""
        if self._cast_params is None:
            self._cast_params = _cast(self.params, dtype=self.dtype)
        return self._cast_params

    def _replace_params(self, params: dict) -> None:
        self.params = params
        self._cast_params = params if self.dtype == self.master_dtype else None

    def _on_device(self, values: dict[str, np.ndarray]) -> dict:
        tree = model.nested({n: np.array(v, self.master_dtype) for n, v in values.items()})
        return self._put(tree)

    def _put(self, tree: Any) -> Any:
        """On the device; on all of several."""
        if self.mesh is None:
            return jax.device_put(tree, self.device)
        return data_parallel.put(tree, self.mesh, data_parallel.WHOLE)

    def _put_rows(self, batch: Batch) -> Batch:
        """On the device; on each of several its rows."""
        if self.mesh is None:
            return self._put(batch)
        check_num_devices(self.num_devices, batch)
        return data_parallel.put(batch, self.mesh, data_parallel.ROWS)

    def _extend(self, tokens_BT: np.ndarray, cache: tuple, *, is_last_only: bool) -> tuple:
        states, position_B = cache
        T = tokens_BT.shape[1]
        self._check_room(cache, T)
        position_BT = position_B[:, None] + np.arange(T, dtype=np.int32)
        logits_BTV, states = extend_program(
            self._compute_params,
            self._put(np.asarray(tokens_BT, np.int32)),
            states,
            self._put(position_BT),
            is_last_only=is_last_only,
            **self._settings,
        )
        return logits_BTV, (states, position_B + np.int32(T))

    def _check_room(self, cache: tuple, num_tokens: int) -> None:
        """ValueError where a cache of visible keys would have to forget one."""
        states, position_B = cache
        end, W = int(position_B.max()) + num_tokens, self.config.num_visible_keys
        for name, state in zip(self.config.layer_mixers, states, strict=True):
            capacity = state.k_BSKH.shape[1] if name == "mqa" else end
            if capacity < end and capacity != W:
                raise ValueError(f"the cache holds capacity={capacity} positions, not {end}.")


def find_devices(device_kind: str, *, is_local: bool = False) -> list[jax.Device]:
    """All devices of a kind: cpu, gpu, tpu, a TPU's (v5e), or part of a GPU's name (h200); or
    those of them that are this process's own."""
    devices = jax.devices(CPU) if device_kind == CPU else jax.devices()
    found = [device for device in devices if device_kind == CPU or is_kind(device, device_kind)]
    if not found:
        names = ", ".join(sorted({device.device_kind for device in devices}))
        raise Unsupported(f"JAX finds no device {device_kind!r} here; it finds: {names}.")
    return [d for d in found if d.process_index == jax.process_index()] if is_local else found


def is_kind(device: jax.Device, device_kind: str) -> bool:
    wanted, name = device_kind.lower(), device.device_kind
    if wanted in DEVICE_NAMES:
        return name == DEVICE_NAMES[wanted]
    return wanted == device.platform or wanted in name.lower()


def on_host(values: dict[str, Array]) -> dict[str, np.ndarray]:
    """Copies as arrays; bfloat16, which NumPy lacks, as float32."""
    return {name: np.array(exact(value)) for name, value in values.items()}


# The programs: shared by all engines of equal settings, compiled once a shape.


def program(*, static: tuple[str, ...], donated: tuple[str, ...] = ()) -> Callable:
    """jax.jit, with products of float32 and float64 at full precision, and kernels interpreted as
    their settings say (both are read while tracing)."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def traced(*args, **kwargs):
            with jax.default_matmul_precision("highest"), interpreting(is_interpreted(kwargs)):
                return function(*args, **kwargs)

        return jax.jit(traced, static_argnames=static, donate_argnames=donated)

    return decorate


def is_interpreted(arguments: dict[str, Any]) -> bool:
    """Whether a program's settings, the keywords `kernels` or `settings`, ask for it."""
    kernels = arguments.get("kernels") or getattr(arguments.get("settings"), "kernels", None)
    return kernels is not None and kernels.interpret


@program(static=("dtype",))
def _cast(params: dict, *, dtype: str) -> dict:
    return model.cast(params, dtype)


@program(static=("config", "kernels"))
def _logits(params: dict, batch: Batch, **settings) -> Array:
    return model.logits(params, batch, **settings)


@program(static=("config", "kernels", "mesh"))
def _evaluate(params: dict, batch: Batch, *, mesh: Mesh | None, **settings) -> Array:
    def evaluate(params: dict, batch: Batch) -> Array:
        logits_BTV = model.logits(params, batch, **settings)
        return cross_entropy(logits_BTV, batch.targets_BT, settings["kernels"].layers)

    return data_parallel.gathered(evaluate, mesh)(params, batch)


@program(static=("config", "kernels"))
def _activations(params: dict, batch: Batch, **settings) -> dict[str, Array]:
    found: dict[str, Array] = {}
    logits_BTV = model.logits(Watched(params, found), batch, **settings)
    return found | {"logits": logits_BTV}


@program(static=("name", "settings"))
def _op(
    params: dict,
    inputs: dict,
    integers: dict,
    doutputs: tuple,
    *,
    name: str,
    settings: ops.Settings,
) -> tuple[tuple, dict, dict]:
    return ops.call(name, settings, params, inputs, integers, doutputs)


@program(static=("name", "settings"))
def _timed_op(
    inputs: dict, integers: dict, doutputs: tuple | None, *, name: str, settings: ops.Settings
) -> tuple[tuple, dict]:
    return ops.timed(name, settings, inputs, integers, doutputs)


@program(static=("config", "kernels", "dtype", "mesh"))
def _loss_and_grad(params: dict, batch: Batch, **settings) -> tuple[Array, dict]:
    return loss_and_grad(params, batch, **settings)


def loss_and_grad(
    params: dict, batch: Batch, *, mesh: Mesh | None, **settings
) -> tuple[Array, dict]:
    compute = jax.value_and_grad(partial(model.loss, **settings))
    return data_parallel.summed(compute, mesh)(params, batch)


@program(
    static=("config", "kernels", "dtype", "optimizer", "activation_checkpointing", "mesh"),
    donated=("params", "state"),
)
def train_program(
    params: dict,
    state: tuple,
    batch: Batch,
    *,
    optimizer: OptimizerConfig,
    mesh: Mesh | None = None,
    **settings,
) -> tuple[dict, tuple, Array]:
    loss, grads = loss_and_grad(params, batch, mesh=mesh, **settings)
    updates, state = adamw(optimizer, settings["config"]).update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_states(config: ModelConfig, batch_size: int, capacity: int, dtype: str) -> tuple:
    return model.empty_states(config, batch_size, capacity, dtype)


@program(static=("config", "kernels", "is_last_only"), donated=("states",))
def extend_program(
    params: dict,
    tokens_BT: Array,
    states: tuple,
    position_BT: Array,
    *,
    is_last_only: bool,
    **settings,
) -> tuple[Array, tuple]:
    x_BTD, states = model.forward(params, tokens_BT, position_BT, states, **settings)
    x_BTD = x_BTD[:, -1:] if is_last_only else x_BTD
    soft_cap = settings["config"].logit_soft_cap
    return unembed(params["embedding"], x_BTD, soft_cap), states


@jax.jit
def _next_token(logits_BTV: Array) -> Array:
    return jnp.argmax(logits_BTV[:, -1], axis=-1).astype(jnp.int32)


@program(static=("config", "kernels", "num_tokens"), donated=("states",))
def decode_program(
    params: dict, token_B: Array, states: tuple, position_B: Array, *, num_tokens: int, **settings
) -> tuple[Array, tuple]:
    soft_cap = settings["config"].logit_soft_cap

    def step(carry: tuple, _: None) -> tuple[tuple, Array]:
        token_B, states, position_B = carry
        x_BTD, states = model.forward(
            params, token_B[:, None], position_B[:, None], states, **settings
        )
        token_B = _next_token(unembed(params["embedding"], x_BTD, soft_cap))
        return (token_B, states, position_B + 1), token_B

    carry = (token_B, states, position_B)
    (_, states, _), tokens_TB = lax.scan(step, carry, length=num_tokens)
    return tokens_TB.swapaxes(0, 1), states
