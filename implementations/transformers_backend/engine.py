"""transformers' RecurrentGemma behind the Engine protocol: not our code, to be measured against.

Its model, its attention (eager) and its cache, unchanged; ours are the weights, the settings, and
the greedy loop around its forward pass. What it cannot do is Unsupported: training, documents
packed into one sequence, and a prompt in pieces. It shares no code with the other two backends, so
that a change of theirs makes no run of this one stale.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from implementations import parameters
from implementations.config import ModelConfig
from implementations.engine import (
    CPU,
    IGNORED,
    Batch,
    Kernels,
    OptimizerConfig,
    Unsupported,
    check_dtype,
    check_num_devices,
)
from implementations.transformers_backend import weights

try:
    from transformers import DynamicCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
except ModuleNotFoundError as error:
    raise Unsupported(
        f"backend 'transformers' needs {error.name}, which is not installed: "
        "pip install 'aerie[hf]'."
    ) from None

BLOCK_TYPES = {"rg_lru": "recurrent", "mqa": "attention"}
ALL_KEYS = 2**30  # its window has no other word for every key
# What may be asked for: nothing, or by the name that ours has for what it does.
OFFERED = {
    "linear_scan": ("auto", "sequential"),
    "attention": ("auto", "plain"),
    "layers": ("auto", "plain"),
}


class Cache(NamedTuple):
    """Keys and values grow inside `attention`, so that an older Cache is used up."""

    attention: DynamicCache
    recurrences: tuple[tuple[Tensor, Tensor], ...]  # (conv_BRW, h_BR) of each recurrent layer
    position: int  # of the next token


class Engine:
    """Parameters and activations in `dtype`; float32 inside norms, softmax and recurrence always.

    So float64 is no closer than float32 there. In bfloat16 the float32 parameters stay on the
    host, the model has them rounded, and its bfloat16 gradients are returned as float32.
    `kernels.compile` is not heeded: its loop over time, in Python, is too long to compile.
    """

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
        self.config, self.dtype = config, getattr(torch, check_dtype(dtype))
        if check_num_devices(num_devices) > 1:
            raise Unsupported(f"backend 'transformers' runs on one device: not {num_devices}.")
        self.num_devices = num_devices
        weights.check(config)
        for op, names in OFFERED.items():
            if getattr(kernels, op) not in names:
                raise Unsupported(
                    f"kernels.{op}={getattr(kernels, op)}: transformers offers {', '.join(names)}."
                )
        self.resolved_kernels = {
            "linear_scan": "transformers",
            "attention": "eager",
            "layers": "eager",
            "program": "eager",
        }
        self.device = find_device(device_kind)
        self.device_name = (
            CPU if self.device.type == CPU else torch.cuda.get_device_name(self.device)
        )
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.master_dtype = np.float64 if dtype == "float64" else np.float32
        self.model = build_model(config, self.dtype, self.device)
        self._recurrent_blocks = [
            layer.temporal_block
            for mixer, layer in zip(config.layer_mixers, self.model.model.layers, strict=True)
            if mixer == "rg_lru"
        ]
        self.load_parameters(parameters.draw(config, seed))

    def parameters(self) -> dict[str, np.ndarray]:
        if self._masters is not None:
            return {name: value.copy() for name, value in self._masters.items()}
        return self._by_our_names({n: p.detach() for n, p in self.model.named_parameters()})

    def load_parameters(self, values: dict[str, np.ndarray]) -> None:
        """Biases that the config lacks are zeros: the model always has them."""
        parameters.check(self.config, values, "load_parameters")
        is_rounded = self.dtype == torch.bfloat16
        self._masters = (
            {name: np.array(value, self.master_dtype) for name, value in values.items()}
            if is_rounded
            else None
        )
        given = weights.theirs(self.config, values)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in given:
                    value = torch.from_numpy(np.array(given[name]))
                    parameter.copy_(value.reshape(parameter.shape))
                else:
                    parameter.zero_()

    @torch.inference_mode()
    def logits(self, batch: Batch) -> np.ndarray:
        return exact(self._forward(batch)).cpu().numpy()

    def loss_and_grad(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        nll_BT = self._nll(batch)
        loss = nll_BT.sum() / max((batch.targets_BT != IGNORED).sum(), 1)
        loss.backward()
        grads = self._by_our_names({n: p.grad for n, p in self.model.named_parameters()})
        self.model.zero_grad()
        return loss.item(), grads

    @torch.inference_mode()
    def evaluate(self, batch: Batch) -> np.ndarray:
        return self._nll(batch).float().cpu().numpy()

    def start_training(
        self, optimizer: OptimizerConfig, *, activation_checkpointing: bool = False
    ) -> None:
        self._refuse_training()

    def train_step(self, batch: Batch) -> Any:
        self._refuse_training()

    def training_state(self) -> dict[str, np.ndarray]:
        self._refuse_training()

    def load_training_state(self, state: dict[str, np.ndarray]) -> None:
        self._refuse_training()

    @torch.inference_mode()
    def prefill(
        self, prompt_BT: np.ndarray, *, capacity: int, chunk_len: int | None = None
    ) -> tuple[Tensor, Cache]:
        B, T = prompt_BT.shape
        cache = self.empty_cache(B, capacity=capacity)
        for start in range(0, T, chunk_len or T):
            tokens_BT = self._put(prompt_BT[:, start : start + (chunk_len or T)])
            logits_BTV, cache = self._extend(tokens_BT, cache, num_logits=1)
        return logits_BTV[:, -1].argmax(-1), cache

    def empty_cache(self, batch_size: int, *, capacity: int) -> Cache:
        """Keys and values grow with the tokens, up to the window: capacity bounds nothing here.

        Not by its own _setup_cache, whose convolution state has d_model channels, not d_rnn.
        """
        B, R, W = batch_size, self.config.d_rnn, self.config.conv_width - 1
        recurrences = tuple(
            (
                torch.zeros(B, R, W, dtype=self.dtype, device=self.device),
                torch.zeros(B, R, dtype=torch.float32, device=self.device),
            )
            for _ in self._recurrent_blocks
        )
        return Cache(DynamicCache(config=self.model.config), recurrences, 0)

    @torch.inference_mode()
    def extend(self, tokens_BT: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
        logits_BTV, cache = self._extend(self._put(tokens_BT), cache)
        return exact(logits_BTV).cpu().numpy(), cache

    @torch.inference_mode()
    def decode(self, token_B: Any, cache: Cache, *, num_tokens: int) -> tuple[Tensor, Cache]:
        token_B = torch.as_tensor(np.asarray(token_B) if isinstance(token_B, list) else token_B)
        token_B = token_B.to(self.device, torch.int64)
        tokens = []
        for _ in range(num_tokens):
            logits_BTV, cache = self._extend(token_B[:, None], cache, num_logits=1)
            token_B = logits_BTV[:, -1].argmax(-1)
            tokens.append(token_B)
        return torch.stack(tokens, 1), cache

    def to_numpy(self, tokens: Tensor) -> np.ndarray:
        return tokens.cpu().numpy().copy()

    def num_bytes(self, cache: Cache) -> int:
        """Of the values in use: right after a prefill its keys are views of a whole prompt's."""
        leaves = [leaf for state in cache.recurrences for leaf in state]
        for layer in cache.attention.layers:
            leaves += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if leaf is not None)

    def synchronize(self) -> None:
        if self.device.type != CPU:
            torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int | None:
        return None if self.device.type == CPU else torch.cuda.max_memory_allocated(self.device)

    def _put(self, tokens_BT: np.ndarray) -> Tensor:
        return torch.tensor(tokens_BT, dtype=torch.int64, device=self.device)

    def _forward(self, batch: Batch) -> Tensor:
        """Its recurrence and attention restart at a position of 0, its convolution does not."""
        if (batch.position_BT != np.arange(batch.position_BT.shape[1])).any():
            raise Unsupported(
                "transformers' RecurrentGemma cannot hold several documents in one sequence: its "
                "convolution reads across their borders."
            )
        return self.model(self._put(batch.tokens_BT), use_cache=False).logits

    def _nll(self, batch: Batch) -> Tensor:
        nll = cross_entropy(
            exact(self._forward(batch)).flatten(0, 1),
            self._put(batch.targets_BT).flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        return nll.view(batch.targets_BT.shape)

    def _extend(
        self, tokens_BT: Tensor, cache: Cache, *, num_logits: int = 0
    ) -> tuple[Tensor, Cache]:
        """Logits of the last num_logits tokens, 0 meaning all. The model keeps the states of its
        recurrent layers in the layers: they are put there, and taken away again."""
        T = tokens_BT.shape[1]
        if cache.position > 0 and T > 1:
            raise Unsupported(
                "transformers' RecurrentGemma takes a prompt in one piece, and one token at a "
                "time after it: longer pieces would start from an empty convolution."
            )
        for block, (conv_BRW, h_BR) in zip(self._recurrent_blocks, cache.recurrences, strict=True):
            block.conv1d_state, block.rg_lru.recurrent_states = conv_BRW, h_BR
        position_1T = torch.arange(cache.position, cache.position + T, device=self.device)[None]
        # Without attention there is nothing to mask, and its cache has no length to ask for.
        mask = None if "mqa" in self.config.layer_mixers else {"sliding_attention": None}
        logits_BTV = self.model(
            tokens_BT,
            position_ids=position_1T,
            attention_mask=mask,
            past_key_values=cache.attention,
            use_cache=True,
            logits_to_keep=num_logits,
        ).logits
        recurrences = tuple(
            (block.conv1d_state, block.rg_lru.recurrent_states) for block in self._recurrent_blocks
        )
        for block in self._recurrent_blocks:
            block.conv1d_state = block.rg_lru.recurrent_states = None
        return logits_BTV, Cache(cache.attention, recurrences, cache.position + T)

    def _by_our_names(self, values: dict[str, Tensor]) -> dict[str, np.ndarray]:
        on_host = {name: exact(value).cpu().numpy() for name, value in values.items()}
        return {name: value.copy() for name, value in weights.ours(self.config, on_host).items()}

    def _refuse_training(self) -> None:
        raise Unsupported("backend 'transformers' has no optimizer: train with jax or torch.")


def build_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> RecurrentGemmaForCausalLM:
    """Its model with parameters in dtype, their values still to be loaded.

    Only parameters are cast: model.to(dtype) would round the frequencies of the rotation too.
    """
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
            attention_window_size=ALL_KEYS if window_size is None else window_size,
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
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    factor = math.sqrt(config.d_model) if config.scale_embeddings else 1.0
    # Theirs is rounded to bfloat16; its forward pass casts this one to the dtype of activations.
    model.model.normalizer = torch.tensor(factor, dtype=torch.float64)
    model.generation_config.use_cache = True  # generate() alone: the forward pass needs none
    return model.to(device).eval()


def find_device(device_kind: str) -> torch.device:
    """The CPU, or the current CUDA device where its own name holds the kind (h200)."""
    if device_kind == CPU:
        return torch.device(CPU)
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else CPU
    if device_kind.lower() not in found.lower():
        raise Unsupported(f"PyTorch finds no device {device_kind!r} here; it finds: {found}.")
    return torch.device("cuda", torch.cuda.current_device())


def exact(x: Tensor) -> Tensor:
    """x in float32, or in float64 when it is."""
    return x.float() if x.dtype == torch.bfloat16 else x
