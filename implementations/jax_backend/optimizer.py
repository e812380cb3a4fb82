"""AdamW as implementations/engine.py's OptimizerConfig says, built from optax.

Twin: implementations/torch_backend/optimizer.py.
"""

import jax.numpy as jnp
import optax
from jax import Array

from implementations.config import ModelConfig
from implementations.engine import OptimizerConfig
from implementations.jax_backend.model import nested
from implementations.parameters import param_specs


def adamw(optimizer: OptimizerConfig, config: ModelConfig) -> optax.GradientTransformation:
    """Clipping of the global norm, then Adam (eps outside the root), decay, and the rate."""
    is_decayed = nested({spec.name: spec.decayed for spec in param_specs(config)})
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.scale_by_adam(b1=optimizer.beta1, b2=optimizer.beta2, eps=optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, mask=is_decayed),
        optax.scale_by_learning_rate(lambda step: learning_rate(optimizer, step)),
    )


def learning_rate(optimizer: OptimizerConfig, step: Array) -> Array:
    """The rate of a step, counted from 0: linear warm-up, then a cosine."""
    warm_up = (step + 1) / max(optimizer.num_warmup_steps, 1)
    num_decay_steps = max(optimizer.num_steps - optimizer.num_warmup_steps, 1)
    progress = jnp.clip((step - optimizer.num_warmup_steps) / num_decay_steps, 0, 1)
    cosine = (1 + jnp.cos(jnp.pi * progress)) / 2
    decay = optimizer.final_fraction + (1 - optimizer.final_fraction) * cosine
    is_warming_up = step < optimizer.num_warmup_steps
    return optimizer.learning_rate * jnp.where(is_warming_up, warm_up, decay)
