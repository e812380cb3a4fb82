"""AdamW as implementations/engine.py's OptimizerConfig says, built from torch.optim.

Twin: implementations/jax_backend/optimizer.py.
"""

import math

import torch
from torch import Tensor, nn

from implementations.config import ModelConfig
from implementations.engine import OptimizerConfig
from implementations.parameters import param_specs


def adamw(
    optimizer: OptimizerConfig, config: ModelConfig, params: dict[str, nn.Parameter]
) -> torch.optim.AdamW:
    """Adam with eps outside the root and decoupled decay of some; zero moments, step 0."""
    decay = {spec.name: optimizer.weight_decay * spec.decayed for spec in param_specs(config)}
    groups = [
        {"params": [params[name] for name in params if decay[name] == rate], "weight_decay": rate}
        for rate in sorted(set(decay.values()))
    ]
    adam = torch.optim.AdamW(
        groups,
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=True,
    )
    for parameter in params.values():
        adam.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return adam


def learning_rate(optimizer: OptimizerConfig, step: int) -> float:
    """The rate of a step, counted from 0: linear warm-up, then a cosine."""
    if step < optimizer.num_warmup_steps:
        return optimizer.learning_rate * (step + 1) / optimizer.num_warmup_steps
    num_decay_steps = max(optimizer.num_steps - optimizer.num_warmup_steps, 1)
    progress = min((step - optimizer.num_warmup_steps) / num_decay_steps, 1)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    decay = optimizer.final_fraction + (1 - optimizer.final_fraction) * cosine
    return optimizer.learning_rate * decay


def clip_by_global_norm(grads: list[Tensor], clip_norm: float) -> None:
    """In place: g * min(1, clip_norm / norm of all)."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_mul_(grads, (clip_norm / norm).clamp(max=1))
