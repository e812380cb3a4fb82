"""aerie's parameters under the names and in the layout of transformers' RecurrentGemmaForCausalLM.

transformers keeps a linear weight as [out, in], a convolution as [R, 1, W], and the gates' biases
as [G, R / G]. Its model is this one only for some settings; the others are refused.
"""

import numpy as np

from implementations.config import ModelConfig
from implementations.engine import Unsupported
from implementations.parameters import ParamSpec, param_specs

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


def check(config: ModelConfig) -> None:
    """Unsupported names a setting that transformers' model does not have, or gets wrong.

    With a window of one key its cache cuts `keys[-0:]`, which are all of them, and decodes wrongly.
    """
    refused = {
        "logit_soft_cap": config.logit_soft_cap is None,
        "head_dim": config.head_dim * config.num_heads != config.d_model,
        "num_gate_blocks": "rg_lru" in config.pattern
        and config.num_gate_blocks != config.num_heads,
        "window_size": "mqa" in config.pattern and config.num_visible_keys == 1,
        "gate": "rg_lru" in config.pattern and config.gate != "rg_lru",
        "decay_exponent": config.decay_exponent != 8.0,
        "normalize_input": not config.normalize_input,
        "conv_width": config.conv_width == 0,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise Unsupported(
                f"{config.title}: transformers' RecurrentGemma cannot have {name}="
                f"{getattr(config, name)}; it needs a logit_soft_cap, head_dim = d_model / "
                "num_heads, num_gate_blocks = num_heads, a window of at least 2 keys, and the "
                "paper's rg_lru after a convolution."
            )


def theirs(config: ModelConfig, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, by the names of transformers; reshape each to its shape."""
    return {
        _name(config, spec.name): _turned(spec, values[spec.name]) for spec in param_specs(config)
    }


def ours(config: ModelConfig, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The way back from theirs(); biases that this config lacks are left out."""
    return {
        spec.name: _turned(spec, values[_name(config, spec.name)]).reshape(spec.shape)
        for spec in param_specs(config)
    }


def _turned(spec: ParamSpec, value: np.ndarray) -> np.ndarray:
    """From either layout to the other: of linear layers and taps the axes are reversed."""
    is_turned = ".linear_" in spec.name or spec.axes[0] == "taps"
    return value.T if is_turned else value


def _name(config: ModelConfig, name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, index, inner = name.split(".", 2)
    names = LAYER_NAMES | {"mixer.linear_out": OUTPUT_NAMES[config.layer_mixers[int(index)]]}
    if inner in names:
        return f"model.layers.{index}.{names[inner]}"
    module, leaf = inner.rsplit(".", 1)
    return f"model.layers.{index}.{names[module]}.{leaf}"
