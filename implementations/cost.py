"""What a model costs, exactly where arithmetic can say it: parameters, FLOPs, bytes, memory.

Model FLOPs count matrix products, attention over the keys really visible, the convolution and the
recurrence; norms, activations and the softmax are left out, and nothing recomputed is counted. A
multiply-add is 2 FLOPs; a backward pass is twice its forward pass.
"""

from implementations.config import GATES, ModelConfig
from implementations.mixers import load_mixer, rg_lru
from implementations.parameters import param_specs

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float64": 8}


def num_params(config: ModelConfig) -> int:
    return sum(spec.size for spec in param_specs(config))


def num_params_non_embedding(config: ModelConfig) -> int:
    return num_params(config) - config.vocab_size * config.d_model


def mean_visible_keys(config: ModelConfig, seq_len: int) -> float:
    """Keys a query sees, averaged over a causal sequence: sum of min(i + 1, W) over seq_len."""
    W = config.num_visible_keys
    W = seq_len if W is None else min(W, seq_len)
    return (W * (W + 1) / 2 + (seq_len - W) * W) / seq_len


def visible_keys(config: ModelConfig, context: int) -> int:
    """Keys the next token sees when `context` positions are behind it, itself included."""
    W = config.num_visible_keys
    return context + 1 if W is None else min(W, context + 1)


def forward_flops_per_token(config: ModelConfig, num_keys: float) -> float:
    """Forward FLOPs of one token whose attention layers see num_keys keys each, logits included."""
    mixing = sum(load_mixer(m).mixing_flops(config, num_keys) for m in config.layer_mixers)
    linear = sum(spec.size for spec in param_specs(config) if spec.decayed)
    return 2 * linear + mixing + 2 * config.d_model * config.vocab_size


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs, averaged over a sequence of seq_len tokens of one document."""
    return 3 * forward_flops_per_token(config, mean_visible_keys(config, seq_len))


def prefill_flops(config: ModelConfig, batch_size: int, prompt_len: int) -> float:
    """FLOPs of a whole prompt; logits of the last position alone."""
    per_token = forward_flops_per_token(config, mean_visible_keys(config, prompt_len))
    logits = 2 * config.d_model * config.vocab_size
    return batch_size * (prompt_len * (per_token - logits) + logits)


def decode_flops(config: ModelConfig, batch_size: int, contexts: range) -> float:
    """FLOPs of decode steps, one for each context behind them."""
    keys = (visible_keys(config, context) for context in contexts)
    return batch_size * sum(forward_flops_per_token(config, num_keys) for num_keys in keys)


def recurrence_flops(config: ModelConfig, batch_size: int, seq_len: int) -> float:
    """Forward and backward FLOPs of one layer's recurrence, without its gates' products."""
    return 3 * rg_lru.recurrence_flops(config) * batch_size * seq_len * config.d_rnn


def cache_bytes(config: ModelConfig, *, batch_size: int, capacity: int, dtype: str) -> int:
    """Bytes of every layer's state for `capacity` positions, of the whole batch."""
    size = ITEMSIZE[dtype]
    layers = (load_mixer(m).state_bytes(config, capacity, size) for m in config.layer_mixers)
    return batch_size * sum(layers)


def param_bytes(config: ModelConfig, dtype: str) -> int:
    return num_params(config) * ITEMSIZE[dtype]


def decode_bytes(config: ModelConfig, *, batch_size: int, context: int, dtype: str) -> int:
    """Bytes that one decode step must move: every weight once, the visible cache (eq. 5)."""
    visible = cache_bytes(config, batch_size=batch_size, capacity=context + 1, dtype=dtype)
    return param_bytes(config, dtype) + visible


def train_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes that one step must move, activations not counted: parameters and two moments read and
    written, gradients written and read once their norm is known; in at least float32."""
    return 8 * num_params(config) * max(ITEMSIZE[dtype], 4)


def prefill_bytes(config: ModelConfig, *, batch_size: int, prompt_len: int, dtype: str) -> int:
    """Bytes that a prefill must move, activations not counted: every weight, the cache written."""
    written = cache_bytes(config, batch_size=batch_size, capacity=prompt_len, dtype=dtype)
    return param_bytes(config, dtype) + written


def gate_arrays(gate: str) -> float:
    """Gates of the recurrence, in arrays [B, T, R]: complex channels have half of one each."""
    num_gates = GATES[gate].has_recurrence_gate + GATES[gate].has_input_gate
    return num_gates / 2 if GATES[gate].is_complex else num_gates


def scan_arrays(op: str, gate: str = "rg_lru") -> tuple[float, float]:
    """[B, T, R] arrays that a scan must read or write once, forward and backward: of linear_scan a,
    x and h, then a, h, dh, da and dx; of rg_lru x, its gates and h, then those, dh, dx and the
    gradients of the gates."""
    gates = gate_arrays(gate)
    return {"linear_scan": (3, 5), "rg_lru": (2 + gates, 4 + 2 * gates)}[op]


def scan_bytes(
    config: ModelConfig, op: str, *, batch_size: int, seq_len: int, dtype: str, has_backward: bool
) -> int:
    """Bytes that one layer's scan alone must move: every array once, in `dtype`, and the first and
    the last state in float32 (backward their gradients). Positions and a_param are left out, which
    are 1/R and 1/BT of an array, and so is what a variant stores for itself."""
    forward, backward = scan_arrays(op, config.gate)
    num_arrays = forward + (backward if has_backward else 0)
    num_states = 2 * (2 if has_backward else 1)
    states = num_states * max(ITEMSIZE[dtype], 4)
    return int(batch_size * config.d_rnn * (num_arrays * seq_len * ITEMSIZE[dtype] + states))


def scan_memory_bytes(
    config: ModelConfig, op: str, *, batch_size: int, seq_len: int, dtype: str, has_backward: bool
) -> int:
    """Predicted peak of one layer's scan alone: the same arrays, as they are there at once; of
    linear_scan x too, which its backward pass does not read."""
    num_arrays = scan_arrays(op, config.gate)[has_backward] + (op == "linear_scan" and has_backward)
    return int(num_arrays * batch_size * seq_len * config.d_rnn * ITEMSIZE[dtype])


# Tokens whose logits the loss holds at once: so many bytes of them, and never fewer than these
# (the larger of both backends' kernels/cross_entropy.py).
LOSS_CHUNK_BYTES = 2**26
LOSS_MIN_CHUNK = 2048


def train_memory_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str,
    activation_checkpointing: bool = False,
) -> int:
    """Predicted peak of one training step: an estimate, from what the backward pass must keep.

    Parameters, gradients and two moments in float32; for every layer (or for one, and each layer's
    input, with checkpointing) the inputs of its products and gates; logits and their gradient in
    float32, of a chunk of tokens as the loss takes them. Fused attention is assumed: no score
    matrix is kept.
    """
    size = ITEMSIZE[dtype]
    master = max(size, 4)
    tokens = batch_size * seq_len
    D, R, F = config.d_model, config.d_rnn, config.d_mlp
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    kept = {
        "mqa": (2 * N + 2 * K) * H * size,
        # two branches, convolution, gates before sigmoid, product in dtype; a, x, h in float32
        "rg_lru": R * ((3 + (config.conv_width > 0) + gate_arrays(config.gate)) * size + 3 * 4),
    }
    layers = [kept[m] + (4 * D + 4 * F) * size for m in config.layer_mixers]
    per_token = max(layers) + len(layers) * D * size if activation_checkpointing else sum(layers)
    chunk = max(LOSS_CHUNK_BYTES // (4 * config.vocab_size), LOSS_MIN_CHUNK)
    logits = min(tokens, chunk) * 2 * config.vocab_size * 4
    return int(num_params(config) * 4 * master + tokens * per_token + logits)


def inference_memory_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    prompt_len: int,
    capacity: int,
    dtype: str,
    keeps_master: bool = True,
) -> int:
    """Predicted peak of prefill and decode: weights, cache, and one layer of prompt activations.

    An engine keeps its float32 weights beside those cast to bfloat16; a program alone does not.
    """
    size = ITEMSIZE[dtype]
    weights = param_bytes(config, dtype)
    if keeps_master and size < ITEMSIZE["float32"]:
        weights += param_bytes(config, "float32")
    widest = max(4 * config.d_mlp, 6 * config.d_rnn, 4 * config.num_heads * config.head_dim)
    activations = batch_size * prompt_len * (widest + 2 * config.d_model) * size
    cache = cache_bytes(config, batch_size=batch_size, capacity=capacity, dtype=dtype)
    return weights + cache + activations
