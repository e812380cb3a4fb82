"""Planted defects: one-line faults of the two backends and of the floor below them, for proving
that the ladder sees them.

A defect replaces a piece of one source line when its module is imported, in memory: nothing on
disk changes. `level` is the lowest rung that can see it. Faults of the floor are of level "truth":
both backends would repeat them, or be held to them; finite differences and transformers'
RecurrentGemma see those. Modules are named, not imported: this file needs no framework.
"""

import importlib.util
import linecache
import sys
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader

LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5", "L7", "truth")


@dataclass(frozen=True)
class Defect:
    name: str
    module: str
    line: str  # a piece of one line of the module, which occurs once in it
    fault: str  # what stands in its place
    level: str

    @property
    def backend(self) -> str | None:
        """jax or torch; None on the floor, below both."""
        part = self.module.split(".")[1]
        return part.removesuffix("_backend") if part.endswith("_backend") else None

    @property
    def is_interpreted(self) -> bool:
        """Of a kernel that runs in its interpreter here."""
        return self.name.startswith(("torch_triton_", "jax_pallas_"))


def plant(defect: Defect) -> None:
    """Lets a later import of the module, in this process, compile the changed source."""
    if defect.module in sys.modules:
        raise ValueError(f"defect {defect.name}: {defect.module} is imported already.")
    spec = importlib.util.find_spec(defect.module)  # earlier plants of this module included
    source = changed(defect, spec.loader.get_source(defect.module))
    # Triton reads the source of a kernel as a traceback does, and that is the file's: not so here.
    linecache.cache[spec.origin] = (
        len(source),
        None,
        source.splitlines(keepends=True),
        spec.origin,
    )
    sys.meta_path.insert(0, _Finder(defect.module, spec, source))


def changed(defect: Defect, source: str) -> str:
    """The source with the fault in it."""
    if (found := source.count(defect.line)) != 1:
        raise ValueError(
            f"defect {defect.name}: {defect.line!r} occurs {found} times in {defect.module}; "
            "it must occur once."
        )
    return source.replace(defect.line, defect.fault)


class _Finder(MetaPathFinder):
    def __init__(self, name: str, spec: ModuleSpec, source: str):
        self.name, self.spec, self.source = name, spec, source

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(
            self.name,
            self.spec.origin,
            loader=_Loader(self.name, self.spec.origin, self.source),
            submodule_search_locations=self.spec.submodule_search_locations,
        )


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, source: str):
        super().__init__(name, path)
        self.source = source

    def get_source(self, fullname: str) -> str:
        return self.source

    def get_code(self, fullname: str):  # compiled anew: a .pyc is neither read nor written
        return compile(self.source, self.path, "exec", dont_inherit=True)


JAX = "implementations.jax_backend"
TORCH = "implementations.torch_backend"

# XLA may drop a conversion to bfloat16 and back, never a reduce_precision to its 8 and 7 bits.
JAX_DEFECTS = (
    Defect(
        "jax_float32_parameters_in_float64",
        f"{JAX}.engine",
        "np.array(v, self.master_dtype)",
        "np.array(v, np.float32)",
        "L0",
    ),
    Defect(
        "jax_exact_gelu",
        f"{JAX}.kernels.gated_gelu",
        "approximate=True",
        "approximate=False",
        "L1",
    ),
    Defect(
        "jax_norm_epsilon",
        f"{JAX}.kernels.rms_norm",
        "keepdims=True) + eps)",
        "keepdims=True) + 1e-5)",
        "L1",
    ),
    Defect(
        "jax_conv_state_one_short",
        f"{JAX}.kernels.causal_conv",
        "past_BTR[:, T:]",
        "past_BTR[:, T - 1 : -1]",
        "L1",
    ),
    Defect(
        "jax_conv_reads_other_documents",
        f"{JAX}.kernels.causal_conv",
        "(position_BT >= offset)",
        "(position_BT >= 0)",
        "L1",
    ),
    Defect(
        "jax_soft_cap_without_division",  # released code's settings only
        f"{JAX}.kernels.cross_entropy",
        "jnp.tanh(logits_BTV / soft_cap)",
        "jnp.tanh(logits_BTV)",
        "L1",
    ),
    Defect(
        "jax_decay_without_factor",
        f"{JAX}.kernels.gate",
        "-exponent * jax.nn.softplus(",
        "-jax.nn.softplus(",
        "L1",
    ),
    Defect(
        "jax_scan_reads_other_documents",
        f"{JAX}.kernels.gate",
        "jnp.where(is_start, 0, jnp.exp(log_a))",
        "jnp.exp(log_a)",
        "L1",
    ),
    Defect(
        "jax_rope_on_every_channel",  # released code's settings only
        f"{JAX}.kernels.rope",
        "half = rope_dim // 2",
        "half = x_BTNH.shape[-1] // 2",
        "L1",
    ),
    Defect(
        "jax_window_one_less",
        f"{JAX}.kernels.attention",
        "jnp.minimum(reach_BT, window - 1)",
        "jnp.minimum(reach_BT, window - 2)",
        "L1",
    ),
    Defect(
        "jax_state_in_bfloat16",
        f"{JAX}.kernels.linear_scan",
        "h_BTR.astype(x_BTR.dtype), h_BR",
        "h_BTR.astype(x_BTR.dtype), lax.reduce_precision(h_BR, 8, 7)",
        "L1",
    ),
    Defect(
        "jax_low_precision_linear",
        f"{JAX}.layers",
        'x.reshape(-1, x.shape[-1]) @ params["weight"]',
        'x.reshape(-1, x.shape[-1]) @ (__import__("jax").lax.reduce_precision('
        'params["weight"], 8, 7)'
        ' if x.dtype == jnp.float32 else params["weight"])',
        "L2",
    ),
    Defect(
        "jax_unclipped_root",  # where 1 - a^2 is below 2.5e-7
        f"{JAX}.kernels.gate",
        "jnp.maximum(u, floor)",
        "u",
        "L3",
    ),
    Defect(
        "jax_last_state_without_gradient",
        f"{JAX}.kernels.linear_scan",
        "g_BR = dh_BTR[:, -1] + dh_BR",
        "g_BR = dh_BTR[:, -1]",
        "L3",
    ),
    Defect(
        "jax_decay_gradient_of_late_states",
        f"{JAX}.kernels.linear_scan",
        "dx_BTR[:, 1:] * h_BTR[:, :-1]",
        "dx_BTR[:, 1:] * h_BTR[:, 1:]",
        "L3",
    ),
    Defect(
        "jax_ring_wraps_early",
        f"{JAX}.kernels.attention_step",
        "position_BT[:, -num_slots:] % num_slots",
        "position_BT[:, -num_slots:] % max(num_slots - 1, 1)",
        "L1",
    ),
    Defect(
        "jax_chunk_drops_keys",
        f"{JAX}.mixers.mqa",
        "jnp.take_along_axis(x, slot_BS[:, :, None, None], axis=1)",
        "jnp.zeros_like(x)",
        "L1",
    ),
    Defect(
        "jax_decode_position_stands",
        f"{JAX}.engine",
        "states, position_B + 1)",
        "states, position_B)",
        "L4",
    ),
    Defect(
        "jax_mean_over_ignored_targets",
        f"{JAX}.kernels.cross_entropy",
        "(targets_BT != IGNORED).sum()",
        "targets_BT.size",
        "L4",
    ),
    Defect(
        "jax_adam_epsilon_inside_root",
        f"{JAX}.optimizer",
        "eps=optimizer.eps",
        "eps=0.0, eps_root=optimizer.eps",
        "L5",
    ),
    Defect(
        "jax_subtracted_square",
        f"{JAX}.kernels.gate",
        "-jnp.expm1(2 * log_a)",
        "1 - jax.lax.reduce_precision(jnp.exp(log_a), 8, 7) ** 2"
        " if a_gate.dtype == jnp.bfloat16 else -jnp.expm1(2 * log_a)",
        "L7",
    ),
    Defect(
        "jax_state_in_dtype_of_x",
        f"{JAX}.kernels.rg_lru",
        "h_BTR.astype(x_BTR.dtype), h_BR",
        "h_BTR.astype(x_BTR.dtype),"
        " __import__('jax').lax.reduce_precision(h_BR, 8, 7)"
        " if x_BTR.dtype == jnp.bfloat16 else h_BR",
        "L7",
    ),
    Defect(
        "jax_softmax_in_bfloat16",
        f"{JAX}.kernels.attention",
        "dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)",
        "dtype = q_BTNH.dtype",
        "L7",
    ),
    Defect(
        "jax_rope_in_bfloat16",
        f"{JAX}.kernels.rope",
        "dtype = jnp.promote_types(x_BTNH.dtype, jnp.float32)",
        "dtype = x_BTNH.dtype",
        "L7",
    ),
    Defect(
        "jax_rounded_copy_outlives_its_values",
        f"{JAX}.engine",
        "self._cast_params = params if self.dtype == self.master_dtype else None",
        "self._cast_params = params if self.dtype == self.master_dtype"
        " else getattr(self, '_cast_params', None)",
        "L7",
    ),
)

TORCH_DEFECTS = (
    Defect(
        "torch_output_bias_missing",
        f"{TORCH}.mixers.mqa",
        "Linear(N * H, D, config.biases)",
        "Linear(N * H, D, has_bias=False)",
        "L0",
    ),
    Defect(
        "torch_norm_without_one",
        f"{TORCH}.kernels.rms_norm",
        "rms_inverse * (1 + scale_D)",
        "rms_inverse * scale_D",
        "L1",
    ),
    Defect(
        "torch_conv_reversed",
        f"{TORCH}.kernels.causal_conv",
        "weight_WR = weight_WR.to(x_BTR.dtype)",
        "weight_WR = weight_WR.to(x_BTR.dtype).flip(0)",
        "L1",
    ),
    Defect(
        "torch_gate_blocks_transposed",
        f"{TORCH}.layers",
        "torch.bmm(x_GMI, cast(self.weight, x_BTR))",
        "torch.bmm(x_GMI, cast(self.weight, x_BTR).mT)",
        "L1",
    ),
    Defect(
        "torch_tied_embedding_scaled",
        f"{TORCH}.kernels.cross_entropy",
        "F.linear(x.to(wide), ",
        "F.linear(x.to(wide) * x.shape[-1] ** -0.5, ",
        "L1",
    ),
    Defect(
        "torch_decay_grows",  # a > 1: the root is of a negative number, and all is NaN
        f"{TORCH}.kernels.gate",
        "return -(1.0 if gate.has_time_step",
        "return (1.0 if gate.has_time_step",
        "L1",
    ),
    Defect(
        "torch_decay_parameter_negated",
        f"{TORCH}.kernels.gate",
        "softplus(a_param_R)",
        "softplus(-a_param_R)",
        "L1",
    ),
    Defect(
        "torch_rope_base",
        f"{TORCH}.kernels.rope",
        "1 / base**exponent",
        "1 / 1000.0**exponent",
        "L1",
    ),
    Defect(
        "torch_attention_reads_other_documents",
        f"{TORCH}.mixers.mqa",
        "torch.minimum(position_BT, torch.arange(T, device=position_BT.device))",
        "torch.arange(T, device=position_BT.device).expand_as(position_BT)",
        "L1",
    ),
    Defect(
        "torch_window_one_more",
        f"{TORCH}.kernels.attention",
        "reach_BT.clamp(max=window - 1)",
        "reach_BT.clamp(max=window)",
        "L1",
    ),
    Defect(
        "torch_low_precision_linear",
        f"{TORCH}.layers",
        "F.linear(x, weight.t(), bias)",
        "F.linear(x.bfloat16().float() if x.dtype == torch.float32 else x, weight.t(), bias)",
        "L2",
    ),
    Defect(
        "torch_unclipped_root",  # where 1 - a^2 is below 2.5e-7
        f"{TORCH}.kernels.gate",
        "u.clamp(min=1 / (4 * MAX_SQRT_GRADIENT**2))",
        "u",
        "L3",
    ),
    Defect(
        "torch_last_state_without_gradient",
        f"{TORCH}.kernels.linear_scan",
        "h_BTR[:, -1].clone()",
        "h_BTR[:, -1].detach() + 0 * h_BTR[:, -1]",
        "L3",
    ),
    Defect(
        "torch_scan_gradient_of_early_decay",
        f"{TORCH}.kernels.linear_scan",
        "a_rows[t + 1]",
        "a_rows[t]",
        "L3",
    ),
    Defect(
        "torch_residual_detached",
        f"{TORCH}.kernels.rms_norm",
        "x_BTD + branch_BTD",
        "x_BTD.detach() + branch_BTD",
        "L3",
    ),
    Defect(
        "torch_decode_keeps_old_conv_state",
        f"{TORCH}.kernels.causal_conv",
        "inputs_BSR[:, 1:].clone()",
        "conv_BWR.clone()",
        "L1",
    ),
    Defect(
        "torch_decode_state_in_bfloat16",
        f"{TORCH}.kernels.linear_scan",
        "h_BR[:, None].to(dtype), h_BR",
        "h_BR[:, None].to(dtype), h_BR.bfloat16().to(h_BR.dtype)",
        "L1",
    ),
    Defect(
        "torch_chunk_drops_recurrence",
        f"{TORCH}.mixers.rg_lru",
        "(None, None) if state is None else state",
        "(None, None) if state is None or x_BTD.shape[1] > 1 else state",
        "L1",
    ),
    Defect(
        "torch_ring_read_one_late",
        f"{TORCH}.mixers.mqa",
        "(position_BT[0, 0] + torch.arange(W, device=device))",
        "(position_BT[0, 0] + 1 + torch.arange(W, device=device))",
        "L1",
    ),
    Defect(
        "torch_targets_shifted_twice",
        f"{TORCH}.model",
        "mean_cross_entropy(x_BTD, weight_VD, targets_BT, soft_cap, self.variant)",
        "mean_cross_entropy(x_BTD[:, :-1], weight_VD, targets_BT[:, 1:], soft_cap, self.variant)",
        "L4",
    ),
    Defect(
        "torch_gradient_of_the_sum",
        f"{TORCH}.engine",
        "loss.backward()",
        "(loss * batch.targets_BT.size).backward()",
        "L4",
    ),
    Defect(
        "torch_decay_of_every_parameter",
        f"{TORCH}.optimizer",
        "optimizer.weight_decay * spec.decayed",
        "optimizer.weight_decay",
        "L5",
    ),
    Defect(
        "torch_clipping_of_each_tensor",
        f"{TORCH}.optimizer",
        "torch._foreach_mul_(grads, (clip_norm / norm).clamp(max=1))",
        "[grad.mul_((clip_norm / grad.norm()).clamp(max=1)) for grad in grads]",
        "L5",
    ),
    Defect(
        "torch_schedule_one_step_late",  # with one step of warm-up the first step has rate 0
        f"{TORCH}.optimizer",
        "optimizer.learning_rate * (step + 1)",
        "optimizer.learning_rate * step",
        "L5",
    ),
    Defect(
        "torch_subtracted_square",
        f"{TORCH}.kernels.gate",
        "-torch.expm1(2 * log_a_BTR)",
        "1 - torch.exp(log_a_BTR).bfloat16().float() ** 2"
        " if a_gate_BTR.dtype == torch.bfloat16 else -torch.expm1(2 * log_a_BTR)",
        "L7",
    ),
    Defect(
        "torch_state_in_dtype_of_x",
        f"{TORCH}.kernels.rg_lru",
        "h_BTR.to(x_BTR.dtype), h_BR",
        "h_BTR.to(x_BTR.dtype), h_BR.to(x_BTR.dtype).to(h_BR.dtype)",
        "L7",
    ),
    Defect(
        "torch_small_gradients_scaled_up",
        f"{TORCH}.optimizer",
        "(clip_norm / norm).clamp(max=1)",
        "(clip_norm / norm)",
        "L5",
    ),
    Defect(
        "torch_warm_up_not_divided",
        f"{TORCH}.optimizer",
        "(step + 1) / optimizer.num_warmup_steps",
        "(step + 1)",
        "L5",
    ),
    Defect(
        "torch_step_lost_in_a_checkpoint",
        f"{TORCH}.engine",
        'self._step = int(state["step"])',
        "self._step = 0",
        "L5",
    ),
    Defect(
        "torch_rounded_copy_outlives_its_values",
        f"{TORCH}.engine",
        "self._cast_model = self.model if self.dtype == self.master_dtype else None",
        "self._cast_model = self.model if self.dtype == self.master_dtype"
        " else getattr(self, '_cast_model', None)",
        "L7",
    ),
    Defect(
        "torch_gate_in_bfloat16",
        f"{TORCH}.kernels.gate",
        "torch.sigmoid(a_gate_BTR.to(dtype))",
        "torch.sigmoid(a_gate_BTR).to(dtype)",
        "L7",
    ),
)

# In Triton's kernels, which are interpreted to see it.
TRITON_DEFECTS = (
    Defect(
        "torch_triton_beyond_the_end",
        f"{TORCH}.kernels.linear_scan",
        "a = tl.where(t < stop, a, 1.0)",
        "a = tl.where(t < stop, a, 0.0)",
        "L2",
    ),
    Defect(
        "torch_triton_last_gradient_dropped",
        f"{TORCH}.kernels.linear_scan",
        "in_chunks(launch, dh_BR.contiguous(), T,",
        "in_chunks(launch, torch.zeros_like(dh_BR), T,",
        "L3",
    ),
    Defect(
        "torch_triton_chunk_starts_empty",
        f"{TORCH}.kernels.linear_scan",
        "torch.cat([h0_BR[:, None], state_BCR[:, :-1]], 1)",
        "torch.cat([h0_BR[:, None], state_BCR[:, :-1] * 0], 1)",
        "L2",
    ),
    Defect(
        "torch_triton_no_reset",
        f"{TORCH}.kernels.gate",
        "is_start = position == 0",
        "is_start = position == -1",
        "L2",
    ),
    Defect(
        "torch_triton_gradient_of_decay",
        f"{TORCH}.kernels.gate",
        "dlog_a = g * a * (h - a * slope * inflow)",
        "dlog_a = g * a * (h + a * slope * inflow)",
        "L3",
    ),
    Defect(
        "torch_triton_window_one_short",
        f"{TORCH}.kernels.attention",
        "return (key >= first) & (key <= last)",
        "return (key > first) & (key <= last)",
        "L2",
    ),
    Defect(
        "torch_triton_norm_without_one",
        f"{TORCH}.kernels.rms_norm",
        "y = x * rms_inverse[:, None] * (1 + scale)[None, :]",
        "y = x * rms_inverse[:, None] * scale[None, :]",
        "L2",
    ),
    Defect(
        "torch_triton_conv_leaks",
        f"{TORCH}.kernels.causal_conv",
        "seen = mask & (position >= offset)[:, None]",
        "seen = mask & (position >= 0)[:, None]",
        "L2",
    ),
    Defect(
        "torch_triton_gelu_slope",
        f"{TORCH}.kernels.gated_gelu",
        "inner = 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)",
        "inner = 1.5957691216057308 * (1 + 0.044715 * x * x)",
        "L3",
    ),
    Defect(
        "torch_triton_stale_value",
        f"{TORCH}.kernels.attention_step",
        "v = tl.where(is_new, new_v[None, :], v)",
        "v = tl.where(is_new, 0 * new_v[None, :], v)",
        "L2",
    ),
    Defect(
        "torch_triton_conv_state_stays",
        f"{TORCH}.kernels.rg_lru_step",
        "tl.store(conv_ptr + (w - 1) * R, earlier, mask=inside)",
        "tl.store(conv_ptr + w * R, earlier, mask=inside)",
        "L2",
    ),
    Defect(
        "torch_triton_mean_over_all",
        f"{TORCH}.kernels.cross_entropy",
        "return nll_N.sum() / num_scored",
        "return nll_N.mean()",
        "L4",
    ),
)

# In Pallas' kernels, which are interpreted to see it.
PALLAS_DEFECTS = (
    Defect(
        "jax_pallas_beyond_the_end",
        f"{JAX}.kernels.linear_scan_tpu",
        "a_buffer[:, first:, :] = jnp.ones_like",
        "a_buffer[:, first:, :] = jnp.zeros_like",
        "L2",
    ),
    Defect(
        "jax_pallas_piece_starts_empty",
        f"{JAX}.kernels.linear_scan_tpu",
        "firsts[s] = state",
        "firsts[s] = 0 * state",
        "L2",
    ),
    Defect(
        "jax_pallas_last_gradient_dropped",
        f"{JAX}.kernels.rg_lru_tpu",
        "(h0_BR[:, None], dh_BR[:, None])",
        "(h0_BR[:, None], 0 * dh_BR[:, None])",
        "L3",
    ),
    Defect(
        "jax_pallas_no_reset",
        f"{JAX}.kernels.gate",
        "jnp.where(position == 0,",
        "jnp.where(position == -1,",
        "L2",
    ),
    Defect(
        "jax_pallas_gradient_of_decay",
        f"{JAX}.kernels.gate",
        "h - across * entering",
        "h + across * entering",
        "L3",
    ),
    Defect(
        "jax_pallas_window_one_short",
        f"{JAX}.kernels.attention_tpu",
        "(key >= first) & (key <= last)",
        "(key > first) & (key <= last)",
        "L2",
    ),
    Defect(
        "jax_pallas_softmax_gradient",
        f"{JAX}.kernels.attention_tpu",
        "delta_ref[row, :] = product.T.sum(0, keepdims=True)",
        "delta_ref[row, :] = 0 * product.T.sum(0, keepdims=True)",
        "L3",
    ),
    Defect(
        "jax_pallas_gradient_without_first_state",
        f"{JAX}.kernels.linear_scan_gpu",
        "jnp.where(t == 0, h0, h)",
        "jnp.where(t == -1, h0, h)",
        "L3",
    ),
)

# "Peer": against transformers' RecurrentGemma, same weights. "Differences": the loss along random
# directions against loss_and_grad. Most faults of an equation, not of its gradient, show in both.
FLOOR_DEFECTS = (
    Defect(
        "truth_half_of_rope_dim",  # peer: it is given rope_fraction, not rope_dim
        "implementations.config",
        "int(self.head_dim * self.rope_fraction)",
        "int(self.head_dim * self.rope_fraction) // 2",
        "truth",
    ),
    Defect(
        "truth_no_weight_decayed",  # definitions
        "implementations.parameters",
        "std, decayed=True)",
        "std)",
        "truth",
    ),
    Defect(
        "truth_exact_gelu",
        "implementations.reference",
        "np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))",
        "np.vectorize(math.erf)(x / math.sqrt(2))",
        "truth",
    ),
    Defect(
        "truth_rope_frequency",  # peer
        "implementations.reference",
        "base ** (-np.arange(half) / max(half, 1))",
        "base ** (-np.arange(half) / max(rope_dim, 1))",
        "truth",
    ),
    Defect(
        "truth_window_one_more",  # peer
        "implementations.reference",
        "np.minimum(reach_BT, num_visible_keys - 1)",
        "np.minimum(reach_BT, num_visible_keys)",
        "truth",
    ),
    Defect(
        "truth_score_gradient_unscaled",  # differences
        "implementations.reference",
        "keepdims=True)) * H**-0.5",
        "keepdims=True))",
        "truth",
    ),
    Defect(
        "truth_soft_cap_slope",  # differences, with a soft cap
        "implementations.reference",
        "(1 - np.tanh(x / cap) ** 2)",
        "(1 - np.tanh(x / cap))",
        "truth",
    ),
    Defect(
        "truth_repeated_tokens_overwrite",  # differences: a token that recurs has one gradient
        "implementations.reference",
        "np.add.at(dembedding_VD, tokens_BT, dx_BTD)",
        "dembedding_VD[tokens_BT] += dx_BTD",
        "truth",
    ),
    Defect(
        "truth_decay_factor",  # peer
        "implementations.gates",
        "slowest_C = config.decay_exponent * slowest_C",
        "slowest_C = config.decay_exponent / 2 * slowest_C",
        "truth",
    ),
    Defect(
        "truth_root_gradient_halved",  # differences
        "implementations.gates",
        "- 2 * np.exp(2 * log_alpha_BTC) * dsquare_BTC",
        "- np.exp(2 * log_alpha_BTC) * dsquare_BTC",
        "truth",
    ),
    Defect(
        "truth_input_gradient_of_the_values_alone",  # differences
        "implementations.mixers.mqa",
        "dx_BTD += dx",
        "dx_BTD = dx",
        "truth",
    ),
    Defect(
        "truth_initial_width_of_the_output",  # definitions
        "implementations.parameters",
        "math.sqrt(gain / shape[0])",
        "math.sqrt(gain / shape[1])",
        "truth",
    ),
    Defect(
        "truth_mixers_shifted",  # definitions
        "implementations.config",
        "self.pattern[i % len(self.pattern)]",
        "self.pattern[(i + 1) % len(self.pattern)]",
        "truth",
    ),
)

DEFECTS = JAX_DEFECTS + PALLAS_DEFECTS + TORCH_DEFECTS + TRITON_DEFECTS + FLOOR_DEFECTS
