"""The engine's programs compiled for a TPU that is not here: by libtpu, on a CPU, without an array.

No twin: PyTorch runs on no TPU. See Compiler in implementations/engine.py. Shapes of parameters are
those of the table (parameters.py); all else is what the engine would pass.
"""

import re
import time
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jax.stages import Traced

from implementations import parameters
from implementations.config import GATES, ModelConfig
from implementations.engine import (
    Batch,
    Compiled,
    CompileError,
    Kernels,
    OptimizerConfig,
    Unsupported,
    check_dtype,
    tpu_of,
)
from implementations.jax_backend import model, ops
from implementations.jax_backend.engine import (
    decode_program,
    extend_program,
    kernels_of,
    program,
    train_program,
)
from implementations.jax_backend.optimizer import adamw

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MAX_WORDS = 1000  # characters of an error: the program's text follows the cause


class Compiler:
    def __init__(self, config: ModelConfig, *, dtype: str, kernels: Kernels, topology: str) -> None:
        self.config, self.dtype = config, check_dtype(dtype)
        self.kernels, self.resolved_kernels = kernels_of(kernels, tpu_of(topology), dtype)
        device = first_device(topology)
        self.device_name = device.device_kind
        self._sharding = SingleDeviceSharding(device)
        self._settings = {"config": config, "kernels": self.kernels}

    def train(
        self,
        optimizer: OptimizerConfig,
        *,
        batch_size: int,
        seq_len: int,
        activation_checkpointing: bool = False,
    ) -> Compiled:
        tokens_BT = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)
        state = jax.eval_shape(adamw(optimizer, self.config).init, self._params)
        traced = train_program.trace(
            *self._there(self._params, state, Batch(tokens_BT, tokens_BT, tokens_BT)),
            optimizer=optimizer,
            dtype=self.dtype,
            activation_checkpointing=activation_checkpointing,
            **self._settings,
        )
        return compiled(traced)

    def prefill(self, *, batch_size: int, prompt_len: int, capacity: int) -> Compiled:
        tokens_BT = jax.ShapeDtypeStruct((batch_size, prompt_len), jnp.int32)
        states = self._states(batch_size, capacity)
        traced = extend_program.trace(
            *self._there(self._compute_params, tokens_BT, states, tokens_BT),
            is_last_only=True,
            **self._settings,
        )
        return compiled(traced)

    def decode(self, *, batch_size: int, capacity: int, num_tokens: int) -> Compiled:
        token_B = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        states = self._states(batch_size, capacity)
        traced = decode_program.trace(
            *self._there(self._compute_params, token_B, states, token_B),
            num_tokens=num_tokens,
            **self._settings,
        )
        return compiled(traced)

    def recurrence(self, *, batch_size: int, seq_len: int) -> Compiled:
        if "rg_lru" not in self.config.layer_mixers:
            raise Unsupported(f"family={self.config.family} has no recurrence to compile alone.")
        B, T, R = batch_size, seq_len, self.config.d_rnn
        gate, own = GATES[self.config.gate], self.config.d_gate
        x_BTR = jax.ShapeDtypeStruct((B, T, R), self.dtype)
        gate_BTR = jax.ShapeDtypeStruct((B, T, own), self.dtype)
        position_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
        param_R, h_BR = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((own,), (B, R)))
        inputs = {"x_BTR": x_BTR, "h0_BR": h_BR}
        for name, shape, is_there in (
            ("a_gate_BTR", gate_BTR, gate.has_recurrence_gate),
            ("input_gate_BTR", gate_BTR, gate.has_input_gate),
            ("a_param_R", param_R, gate.has_a_param),
            ("theta_R", param_R, gate.is_complex),
        ):
            if is_there:
                inputs[name] = shape
        there = self._there(inputs, position_BT, (x_BTR, h_BR))
        settings = ops.Settings(self.config, self.kernels, self.dtype)
        return compiled(recurrence_program.trace(*there, settings=settings))

    @property
    def _params(self) -> dict:
        specs = parameters.param_specs(self.config)
        return model.nested({s.name: jax.ShapeDtypeStruct(s.shape, jnp.float32) for s in specs})

    @property
    def _compute_params(self) -> dict:
        return jax.eval_shape(partial(model.cast, dtype=self.dtype), self._params)

    def _states(self, batch_size: int, capacity: int) -> tuple:
        shape = (self.config, batch_size, capacity, self.dtype)
        return jax.eval_shape(lambda: model.empty_states(*shape))

    def _there(self, *tree: Any) -> Any:
        """The shapes, on the device."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding), tree
        )


def first_device(topology: str) -> jax.Device:
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except jax.errors.JaxRuntimeError as error:
        raise Unsupported(f"topology {topology!r}: libtpu says: {words(error)}") from None
    return found.devices[0]


@program(static=("settings",))
def recurrence_program(
    inputs: dict, position_BT: Array, doutputs: tuple, *, settings: ops.Settings
) -> tuple:
    """Outputs, and the gradients of all inputs."""
    return ops.timed("rg_lru", settings, inputs, {"position_BT": position_BT}, doutputs)


def compiled(traced: Traced) -> Compiled:
    """The program for its device, and what is known of it."""
    start = time.perf_counter()
    try:
        made = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise refusal(words(error)) from None
    seconds = time.perf_counter() - start
    text = made.as_text()
    return Compiled(
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(made.memory_analysis()),
        collectives=dict(Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))),
        kernels=tuple(re.findall(r'%(\S+) = .*custom_call_target="tpu_custom_call"', text)),
    )


def refusal(said: str) -> Exception:
    """Beyond the device's memory (HBM), or beyond the compiler: a kernel's own memory (VMEM)."""
    kind = MemoryError if re.search(r"memory (on|space) hbm", said, re.IGNORECASE) else CompileError
    return kind(said)


def peak_memory_bytes(found: Any) -> int:
    """The larger of what the compiler allocates in all, gaps between buffers included, and of its
    own peak, where this version of JAX gives it. Neither bounds the other: of a training step of
    one layer and 32 x 2048 tokens it allocated 8.2 GiB and called 7.1 the peak; of a decoding loop
    0.68 and 0.74."""
    made = found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    return max(found.argument_size_in_bytes + made, getattr(found, "peak_memory_in_bytes", 0))


def words(error: Exception) -> str:
    """What the compiler says, on one line."""
    return " ".join(str(error).split())[:MAX_WORDS]
