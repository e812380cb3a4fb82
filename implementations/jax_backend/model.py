"""The language model: embedding, residual layers of mixer and MLP, norm, tied logits; its loss.

Twin: implementations/torch_backend/model.py.  Parameters are a nested dict: the dotted names of
implementations/parameters.py, split at the dots.
"""

from functools import partial
from importlib import import_module
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array

from implementations.config import ModelConfig
from implementations.engine import Batch, Kernels
from implementations.jax_backend.activations import watched
from implementations.jax_backend.kernels.cross_entropy import mean_cross_entropy
from implementations.jax_backend.layers import add_rms_norm, embed, mlp, rms_norm, unembed
from implementations.parameters import is_exact


def load_mixer(name: str) -> ModuleType:
    return import_module(f"implementations.jax_backend.mixers.{name}")


def nested(values: dict[str, Array]) -> dict:
    """Values by dotted name -> a tree of dicts."""
    tree: dict = {}
    for name, value in values.items():
        *folders, leaf = name.split(".")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[leaf] = value
    return tree


def flat(tree: dict, prefix: str = "") -> dict[str, Array]:
    """The inverse of nested."""
    values = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        values |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return values


def cast(params: dict, dtype: str) -> dict:
    """Parameters in the dtype of products, but for those that are never below float32."""

    def cast_one(path: tuple, value: Array) -> Array:
        return value if is_exact(path[-1].key) else value.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast_one, params)


def empty_states(config: ModelConfig, batch_size: int, capacity: int, dtype: str) -> tuple:
    mixers = map(load_mixer, config.layer_mixers)
    return tuple(m.empty_state(config, batch_size, capacity, jnp.dtype(dtype)) for m in mixers)


def forward(
    params: dict,
    tokens_BT: Array,
    position_BT: Array,
    states: tuple | None,
    *,
    config: ModelConfig,
    kernels: Kernels,
    activation_checkpointing: bool = False,
) -> tuple[Array, tuple | None]:
    """(The last norm's output [B, T, D], states). states=None: empty, and none come back."""
    dtype = params["final_norm"]["scale"].dtype
    x_BTD = embed(params["embedding"], tokens_BT, dtype, is_scaled=config.scale_embeddings)
    new_states = []
    for index, name in enumerate(config.layer_mixers):
        run = partial(layer, name=name, config=config, kernels=kernels)
        if activation_checkpointing:
            run = jax.checkpoint(run)
        state = None if states is None else states[index]
        x_BTD, state = run(params["layers"][str(index)], x_BTD, position_BT, state)
        new_states.append(state)
    x_BTD = rms_norm(params["final_norm"], x_BTD, config.rms_norm_eps, kernels.layers)
    return x_BTD, None if states is None else tuple(new_states)


@watched
def layer(
    params: dict,
    x_BTD: Array,
    position_BT: Array,
    state: tuple | None,
    *,
    name: str,
    config: ModelConfig,
    kernels: Kernels,
) -> tuple[Array, tuple | None]:
    normed_BTD = rms_norm(params["mixer_norm"], x_BTD, config.rms_norm_eps, kernels.layers)
    mixed_BTD, state = load_mixer(name).mixer(
        params["mixer"], normed_BTD, position_BT, state, config=config, kernels=kernels
    )
    x_BTD, normed_BTD = add_rms_norm(
        params["mlp_norm"], x_BTD, mixed_BTD, config.rms_norm_eps, kernels.layers
    )
    return x_BTD + mlp(params["mlp"], normed_BTD, kernels.layers), state


def logits(params: dict, batch: Batch, *, config: ModelConfig, kernels: Kernels) -> Array:
    x_BTD, _ = forward(
        params, batch.tokens_BT, batch.position_BT, None, config=config, kernels=kernels
    )
    return unembed(params["embedding"], x_BTD, config.logit_soft_cap)


def loss(
    params: dict,
    batch: Batch,
    *,
    config: ModelConfig,
    kernels: Kernels,
    dtype: str,
    activation_checkpointing: bool = False,
) -> Array:
    """Mean over scored targets, nats; params in the master dtype."""
    embedding, params = params["embedding"], cast(params, dtype)
    x_BTD, _ = forward(
        params | {"embedding": embedding},  # not cast: tokens that recur sum up in float32
        batch.tokens_BT,
        batch.position_BT,
        None,
        config=config,
        kernels=kernels,
        activation_checkpointing=activation_checkpointing,
    )
    weight_VD, soft_cap = embedding["weight"], config.logit_soft_cap
    return mean_cross_entropy(x_BTD, weight_VD, batch.targets_BT, soft_cap, kernels.layers)
