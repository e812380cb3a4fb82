"""aerie's parameters in transformers' RecurrentGemmaForCausalLM: the peer, and an outside check.

transformers keeps a linear weight as [out, in], a convolution as [R, 1, W], and the gates' biases
as [G, R / G]. Its model is this one only for some settings; the others are refused.
"""

import math
from typing import Any

import numpy as np

from implementations.config import ModelConfig
from implementations.parameters import param_specs

BLOCK_TYPES = {"rg_lru": "recurrent", "mqa": "attention"}

NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.scale": "model.final_norm.weight",
}
LAYER_NAMES = {
    "mixer_norm.scale": "temporal_pre_norm.weight",
    "mlp_norm.scale": "channel_pre_norm.weight",
    "mixer.linear_q": "temporal_block.q_proj",
    "mixer.linear_k": "temporal_block.k_proj",
    "mixer.linear_v": "temporal_block.v_proj",
    "mixer.linear_x": "temporal_block.linear_x",
    "mixer.linear_y": "temporal_block.linear_y",
    "mixer.conv_1d": "temporal_block.conv_1d",
    "mixer.rg_lru.a_param": "temporal_block.rg_lru.recurrent_param",
    "mixer.rg_lru.a_gate.weight": "temporal_block.rg_lru.recurrent_gate_weight",
    "mixer.rg_lru.a_gate.bias": "temporal_block.rg_lru.recurrent_gate_bias",
    "mixer.rg_lru.input_gate.weight": "temporal_block.rg_lru.input_gate_weight",
    "mixer.rg_lru.input_gate.bias": "temporal_block.rg_lru.input_gate_bias",
    "mlp.linear_gate": "mlp_block.gate_proj",
    "mlp.linear_up": "mlp_block.up_proj",
    "mlp.linear_down": "mlp_block.down_proj",
}
OUTPUT_NAMES = {"rg_lru": "temporal_block.linear_out", "mqa": "temporal_block.o_proj"}


def hugging_face(config: ModelConfig, params: dict[str, np.ndarray]) -> Any:
    """A RecurrentGemmaForCausalLM in float32 with these parameters; absent biases become zeros."""
    import torch
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    check(config)
    window_size = config.num_visible_keys
    model = RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            num_hidden_layers=config.num_layers,
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=2 * config.d_mlp,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            lru_width=config.d_rnn,
            attention_window_size=2**30 if window_size is None else window_size,
            conv1d_width=config.conv_width,
            logits_soft_cap=config.logit_soft_cap,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rope_base,
                "partial_rotary_factor": config.rope_fraction,
            },
            block_types=[BLOCK_TYPES[mixer] for mixer in config.pattern],
            use_cache=False,
            pad_token_id=None,  # a padding token's embedding would get no gradient
            eos_token_id=None,  # generation never stops early
            bos_token_id=None,
            attn_implementation="eager",
        )
    )
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for name, value in translated(config, params).items():
        state[name] = torch.from_numpy(np.array(value, np.float32)).reshape(state[name].shape)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    factor = math.sqrt(config.d_model) if config.scale_embeddings else 1.0
    model.model.normalizer = torch.tensor(factor)  # theirs is rounded to bfloat16
    model.generation_config.use_cache = True  # generate() alone: the forward pass needs none
    return model.eval()


def check(config: ModelConfig) -> None:
    """ValueError for a setting that transformers' model does not have."""
    refused = {
        "logit_soft_cap": config.logit_soft_cap is None,
        "head_dim": config.head_dim * config.num_heads != config.d_model,
        "num_gate_blocks": "rg_lru" in config.pattern
        and config.num_gate_blocks != config.num_heads,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ValueError(
                f"{config.title}: transformers' RecurrentGemma cannot have {name}="
                f"{getattr(config, name)}; it needs a logit_soft_cap, head_dim = d_model / "
                "num_heads, and num_gate_blocks = num_heads."
            )


def translated(config: ModelConfig, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, under the names and in the layout of transformers."""
    result = {}
    for spec in param_specs(config):
        value = values[spec.name]
        if spec.axes[0] == "taps":
            value = value.T[:, None]
        elif spec.decayed:  # the weight of a linear layer
            value = value.T
        result[_name(config, spec.name)] = value
    return result


def _name(config: ModelConfig, name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, index, inner = name.split(".", 2)
    names = LAYER_NAMES | {"mixer.linear_out": OUTPUT_NAMES[config.layer_mixers[int(index)]]}
    if inner in names:
        return f"model.layers.{index}.{names[inner]}"
    module, leaf = inner.rsplit(".", 1)
    return f"model.layers.{index}.{names[module]}.{leaf}"
