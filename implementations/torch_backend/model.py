"""The language model: embedding, residual layers of mixer and MLP, norm, tied logits; its loss.

Twin: implementations/jax_backend/model.py.  Parameters have the names and shapes of
implementations/parameters.py.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from implementations.config import ModelConfig
from implementations.parameters import is_exact
from implementations.torch_backend.kernels.cross_entropy import cross_entropy, mean_cross_entropy
from implementations.torch_backend.layers import MLP, AddRMSNorm, Embedding, RMSNorm


def load_mixer(name: str) -> ModuleType:
    return import_module(f"implementations.torch_backend.mixers.{name}")


def cast(model: "Model") -> None:
    """Parameters in the dtype of products, but for those that are never below float32."""
    for name, parameter in model.named_parameters():
        if not is_exact(name):
            parameter.data = parameter.data.to(model.dtype)


def empty_states(
    config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> tuple:
    mixers = map(load_mixer, config.layer_mixers)
    return tuple(m.empty_state(config, batch_size, capacity, dtype, device) for m in mixers)


class Model(nn.Module):
    def __init__(self, config: ModelConfig, kernels: dict[str, str], dtype: torch.dtype):
        super().__init__()
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, kernels, name) for name in config.layer_mixers)
        self.variant = kernels["layers"]
        self.final_norm = RMSNorm(config.d_model, config.rms_norm_eps, self.variant)
        self.config, self.dtype = config, dtype

    def forward(
        self,
        tokens_BT: Tensor,
        position_BT: Tensor,
        states: tuple | None,
        *,
        activation_checkpointing: bool = False,
    ) -> tuple[Tensor, tuple | None]:
        """(The last norm's output [B, T, D], states). states=None: empty, and none come back."""
        is_scaled = self.config.scale_embeddings
        x_BTD = self.embedding.embed(tokens_BT, self.dtype, is_scaled=is_scaled)
        new_states = []
        for index, layer in enumerate(self.layers):
            state = None if states is None else states[index]
            if activation_checkpointing:
                x_BTD, state = checkpoint(layer, x_BTD, position_BT, state, use_reentrant=False)
            else:
                x_BTD, state = layer(x_BTD, position_BT, state)
            new_states.append(state)
        return self.final_norm(x_BTD), None if states is None else tuple(new_states)

    def unembed(self, x_BTD: Tensor) -> Tensor:
        return self.embedding.unembed(x_BTD, self.config.logit_soft_cap)

    def logits(self, tokens_BT: Tensor, position_BT: Tensor) -> Tensor:
        x_BTD, _ = self.forward(tokens_BT, position_BT, None)
        return self.unembed(x_BTD)

    def evaluate(self, tokens_BT: Tensor, targets_BT: Tensor, position_BT: Tensor) -> Tensor:
        """Negative log likelihood of each target, [B, T], nats; 0 where IGNORED."""
        return cross_entropy(self.logits(tokens_BT, position_BT), targets_BT, self.variant)

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        position_BT: Tensor,
        activation_checkpointing: bool = False,
    ) -> Tensor:
        """Mean over scored targets, nats."""
        x_BTD, _ = self.forward(
            tokens_BT, position_BT, None, activation_checkpointing=activation_checkpointing
        )
        weight_VD, soft_cap = self.embedding.weight, self.config.logit_soft_cap
        return mean_cross_entropy(x_BTD, weight_VD, targets_BT, soft_cap, self.variant)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, kernels: dict[str, str], name: str):
        super().__init__()
        variant = kernels["layers"]
        self.mixer_norm = RMSNorm(config.d_model, config.rms_norm_eps, variant)
        self.mixer = load_mixer(name).Mixer(config, kernels)
        self.mlp_norm = AddRMSNorm(config.d_model, config.rms_norm_eps, variant)
        self.mlp = MLP(config, variant)

    def forward(
        self, x_BTD: Tensor, position_BT: Tensor, state: tuple | None
    ) -> tuple[Tensor, tuple | None]:
        mixed_BTD, state = self.mixer(self.mixer_norm(x_BTD), position_BT, state)
        normed_BTD, x_BTD = self.mlp_norm(x_BTD, mixed_BTD)
        return x_BTD + self.mlp(normed_BTD), state
