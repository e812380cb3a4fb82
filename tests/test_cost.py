"""Exact costs against the paper's numbers (arXiv:2402.19427, table 2 and section 5.1)."""

import numpy as np
import pytest
from conftest import FAMILIES, PATTERNS, tiny

from implementations import cost
from implementations.config import ModelConfig
from implementations.parameters import param_specs

# d_model, d_rnn, num_layers, num_heads: table 2.
SIZES = {
    "100m": (768, 1024, 12, 6),
    "200m": (1024, 1536, 12, 8),
    "400m": (1536, 2048, 12, 12),
    "1b": (2048, 2560, 24, 16),
    "3b": (3072, 4096, 24, 24),
    "7b": (4096, 5632, 32, 32),
    "14b": (5120, 8192, 40, 40),
}
# Non-embedding parameters, with the released code's biases and the paper's 16 gate blocks.
COUNTS = {
    "100m": {"mqa": 80_308_992, "hawk": 93_801_216, "griffin": 89_303_808},
    "200m": {"mqa": 141_681_664, "hawk": 173_716_480, "griffin": 163_038_208},
    "400m": {"mqa": 316_331_520, "hawk": 374_773_248, "griffin": 355_292_672},
    "1b": {"mqa": 1_120_372_736, "hawk": 1_304_225_792, "griffin": 1_242_941_440},
    "3b": {"mqa": 2_511_031_296, "hawk": 2_996_456_448, "griffin": 2_834_648_064},
    "7b": {"mqa": 5_940_449_280, "hawk": 7_176_425_472, "griffin": 6_790_182_912},
    "14b": {"mqa": 11_588_817_920, "hawk": 14_811_223_040, "griffin": 13_763_941_376},
}


def paper(family, size, **overrides):
    d_model, d_rnn, num_layers, num_heads = SIZES[size]
    fields = {
        "family": family, "size": size, "pattern": PATTERNS[family], "d_model": d_model,
        "d_rnn": d_rnn, "d_mlp": 3 * d_model, "num_layers": num_layers, "num_heads": num_heads,
        "head_dim": 128, "num_gate_blocks": 16, "vocab_size": 32_000,
        "window_size": None if family == "mqa" else 1024,
    }  # fmt: skip
    return ModelConfig(**(fields | overrides))


def recurrent_gemma(size, d_model, num_layers, num_heads):
    return ModelConfig(
        family="griffin", size=size, pattern=PATTERNS["griffin"], d_model=d_model, d_rnn=d_model,
        d_mlp=3 * d_model, num_layers=num_layers, num_heads=num_heads, head_dim=256,
        num_gate_blocks=num_heads, window_size=2048, vocab_size=256_000, rope_fraction=0.5,
        window_extra_key=True, lambda_init="code", logit_soft_cap=30.0, scale_embeddings=True,
    )  # fmt: skip


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("family", ["mqa", "hawk", "griffin"])
def test_the_sizes_of_the_paper_have_its_counts(family, size):
    assert cost.num_params_non_embedding(paper(family, size)) == COUNTS[size][family]


def test_recurrent_gemma_has_its_counts():
    two, nine = recurrent_gemma("2b", 2560, 26, 10), recurrent_gemma("9b", 4096, 38, 16)
    assert cost.num_params(two) == 2_682_862_080
    assert cost.num_params_non_embedding(two) == 2_027_502_080
    assert cost.num_params(nine) == 8_579_977_216
    assert cost.num_params_non_embedding(nine) == 7_531_401_216


def test_settings_of_the_gates_and_biases_change_the_counts_as_they_should():
    assert cost.num_params_non_embedding(paper("hawk", "7b", biases=False)) == 7_174_475_776
    assert cost.num_params_non_embedding(paper("hawk", "7b", num_gate_blocks=1)) == 9_079_590_912
    assert cost.num_params_non_embedding(paper("hawk", "7b", num_gate_blocks=32)) == 7_112_986_624


def test_local_and_global_attention_have_equal_parameters():
    assert cost.num_params(paper("mqa", "1b")) == cost.num_params(paper("mqa_local", "1b"))


@pytest.mark.parametrize(
    ("family", "capacity", "num_bytes"),
    [
        ("mqa", 512, 6_291_456),
        ("mqa", 2048, 25_165_824),
        ("mqa", 8192, 100_663_296),
        ("hawk", 512, 614_400),  # h in float32, three inputs of the convolution in bfloat16
        ("hawk", 100_000, 614_400),
        ("griffin", 1024, 4_603_904),
        ("griffin", 8192, 4_603_904),  # a window of 1024 keys
    ],
)
def test_cache_bytes_of_the_paper_row_1b(family, capacity, num_bytes):
    config = paper(family, "1b")
    found = cost.cache_bytes(config, batch_size=1, capacity=capacity, dtype="bfloat16")
    assert found == num_bytes
    many = cost.cache_bytes(config, batch_size=16, capacity=capacity, dtype="bfloat16")
    assert many == 16 * num_bytes


def test_an_extra_key_takes_a_slot():
    config = tiny("mqa_local", num_layers=1, window_extra_key=True)  # 33 keys; k and v of 16
    assert cost.cache_bytes(config, batch_size=1, capacity=99, dtype="float32") == 33 * 2 * 16 * 4
    assert cost.cache_bytes(config, batch_size=1, capacity=9, dtype="float32") == 9 * 2 * 16 * 4


@pytest.mark.parametrize("window_size", [None, 1, 4, 32])
@pytest.mark.parametrize("seq_len", [1, 4, 33, 100])
@pytest.mark.parametrize("window_extra_key", [False, True])
def test_mean_visible_keys_counts_the_causal_window(window_size, seq_len, window_extra_key):
    config = tiny("mqa", window_size=window_size, window_extra_key=window_extra_key)
    reach = seq_len if window_size is None else window_size + window_extra_key
    counts = [sum(0 <= t - s < reach for s in range(seq_len)) for t in range(seq_len)]
    assert cost.mean_visible_keys(config, seq_len) == pytest.approx(np.mean(counts), rel=1e-12)
    assert [cost.visible_keys(config, context) for context in range(seq_len)] == counts


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_flops_are_those_of_every_matrix_product(family):
    config, num_keys = tiny(family), 10.0
    products = {"embedding.weight": 2 * 256 * 64}  # the logits; the lookup is free
    for spec in param_specs(config):
        if spec.name.endswith("_gate.weight") and "rg_lru" in spec.name:
            products[spec.name] = 2 * 4 * 24 * 24  # a block of d_rnn / num_gate_blocks channels
        elif "conv_1d.weight" in spec.name:
            products[spec.name] = 2 * 4 * 96
        elif spec.name.endswith("weight") and spec.name != "embedding.weight":
            products[spec.name] = 2 * spec.shape[0] * spec.shape[1]
    attention = config.layer_mixers.count("mqa") * 2 * (2 * 4 * 16 * num_keys)
    recurrence = config.layer_mixers.count("rg_lru") * 6 * 96
    want = sum(products.values()) + attention + recurrence
    assert cost.forward_flops_per_token(config, num_keys) == want


def test_train_flops_are_three_forward_passes():
    config = tiny("griffin")
    mean = cost.mean_visible_keys(config, 100)
    assert cost.train_flops_per_token(config, 100) == 3 * cost.forward_flops_per_token(config, mean)


def test_prefill_computes_logits_once():
    config = tiny("griffin")
    logits = 2 * config.d_model * config.vocab_size
    forward = cost.forward_flops_per_token(config, cost.mean_visible_keys(config, 64))
    assert cost.prefill_flops(config, 2, 64) == 2 * (64 * forward - 63 * logits)


def test_a_decode_step_moves_the_weights_and_the_visible_cache():
    config = paper("mqa", "1b")
    weights = cost.param_bytes(config, "bfloat16")
    assert weights == 2 * (COUNTS["1b"]["mqa"] + 32_000 * 2048)
    moved = cost.decode_bytes(config, batch_size=16, context=2047, dtype="bfloat16")
    assert moved == weights + 16 * 25_165_824


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_memory_grows_with_the_batch_and_falls_with_checkpointing(family):
    config = tiny(family)
    small, large, checkpointed = (
        cost.train_memory_bytes(config, seq_len=512, dtype="float32", **settings)
        for settings in (
            {"batch_size": 1},
            {"batch_size": 8},
            {"batch_size": 8, "activation_checkpointing": True},
        )
    )
    assert 16 * cost.num_params(config) < small < checkpointed < large


def test_predicted_memory_holds_logits_of_a_chunk_alone():
    config = tiny("hawk", vocab_size=256_000)
    shape = {"seq_len": 2048, "dtype": "bfloat16"}
    one, eight = (cost.train_memory_bytes(config, batch_size=B, **shape) for B in (1, 8))
    logits = 2 * 2048 * config.vocab_size * 4
    assert logits < one
    assert eight - one < logits
