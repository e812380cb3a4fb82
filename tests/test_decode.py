"""Prefill in any chunks, then decode, equals one forward pass; caches have the predicted bytes."""

from importlib import import_module
from itertools import accumulate, pairwise

import numpy as np
import pytest
from conftest import BACKENDS, tiny

from implementations import cost
from implementations.engine import Batch, Kernels, load_engine

WINDOW = {"window_size": 8}
HYBRID = {"pattern": ("rg_lru", "mqa"), "num_layers": 2}  # the whole of it, and quick to compile
MODELS = {
    "mqa": tiny("mqa", num_layers=1),
    "mqa_local": tiny("mqa_local", num_layers=1, **WINDOW),
    "hawk": tiny("hawk", num_layers=1),
    "griffin": tiny("griffin", **HYBRID, **WINDOW),
    "grouped": tiny("mqa_local", num_layers=1, num_kv_heads=2, **WINDOW),
    "released": tiny(
        "griffin",
        window_extra_key=True,
        rope_fraction=0.5,
        lambda_init="code",
        logit_soft_cap=30.0,
        scale_embeddings=True,
        **HYBRID,
        **WINDOW,
    ),
    "bare": tiny("hawk", num_layers=1, biases=False, conv_width=1),
}
B, T = 2, 45  # more than 5 windows: the ring wraps, and wraps again
# Chunks of one token, of less than a window (8 keys, 9 in `released`) and of several, from many
# places of the ring; few different lengths, as each is compiled.
CHUNKS = [(1, 5, 1, 20, 5, 1, 1, 5, 1, 5), (20, 20, 5), (5,) * 9]
CASES = [(model, "float64") for model in MODELS] + [("griffin", "float32")]
TOLERANCE = {"float32": 5e-6, "float64": 1e-13}  # of the largest logit; measured < 1e-6, 2e-15


def engine_of(backend, model, dtype="float32", **settings):
    return load_engine(backend)(MODELS[model], dtype=dtype, seed=1, **settings)


def tokens_of(num_tokens):
    return np.random.default_rng(0).integers(256, size=(B, num_tokens + 1))


@pytest.mark.parametrize(("model", "dtype"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_equal_one_forward_pass(backend, model, dtype):
    engine = engine_of(backend, model, dtype)
    batch = Batch.of(tokens_of(T))
    true = engine.logits(batch)
    for chunks in CHUNKS:
        cache = engine.empty_cache(B, capacity=T)
        for start, stop in pairwise((0, *accumulate(chunks))):
            ours, cache = engine.extend(batch.tokens_BT[:, start:stop], cache)
            error = np.abs(ours - true[:, start:stop]).max() / np.abs(true).max()
            assert ours.shape == (B, stop - start, 256)
            assert error < TOLERANCE[dtype], f"{start} to {stop} of {chunks}: error {error:.1e}"


@pytest.mark.parametrize("chunk_len", [None, 5])
@pytest.mark.parametrize("model", ["mqa", "griffin"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoded_tokens_are_those_of_forward_passes(backend, model, chunk_len):
    """Each decoded token is the most probable one after all that came before it."""
    engine = engine_of(backend, model, "float64")
    prompt_BT = tokens_of(15)[:, :15].astype(np.int32)
    token_B, cache = engine.prefill(prompt_BT, capacity=T, chunk_len=chunk_len)
    first, cache = engine.decode(token_B, cache, num_tokens=15)
    rest, cache = engine.decode(first[:, -1], cache, num_tokens=15)
    predicted = cost.cache_bytes(MODELS[model], batch_size=B, capacity=T, dtype="float64")
    assert engine.num_bytes(cache) == predicted

    decoded = [np.asarray(token_B)[:, None], np.asarray(first), np.asarray(rest)]
    tokens_BT = np.concatenate([prompt_BT, *decoded], axis=1)
    assert tokens_BT.shape == (B, T + 1)
    logits_BTV = engine.logits(Batch.of(tokens_BT))
    np.testing.assert_array_equal(tokens_BT[:, 15:], logits_BTV.argmax(-1)[:, 14:])


@pytest.mark.parametrize("capacity", [5, 8, 45])  # less than the window, the window, more
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_has_the_predicted_bytes(backend, model, dtype, capacity):
    engine = engine_of(backend, model, dtype)
    predicted = cost.cache_bytes(MODELS[model], batch_size=B, capacity=capacity, dtype=dtype)
    assert engine.num_bytes(engine.empty_cache(B, capacity=capacity)) == predicted


@pytest.mark.parametrize("model", ["mqa", "griffin"])
def test_a_torch_cache_keeps_nothing_else_alive(model):
    """A view would: the states of a prompt are cut from tensors as long as the prompt."""
    engine = engine_of("torch", model)
    _, cache = engine.prefill(tokens_of(40)[:, :40], capacity=T)
    leaves = [leaf for state in cache.states for leaf in state if hasattr(leaf, "untyped_storage")]
    assert sum(leaf.untyped_storage().nbytes() for leaf in leaves) == engine.num_bytes(cache)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_smaller_than_the_window_is_enough(backend):
    """The window is 8, the sequence 7: a ring of 7 slots forgets nothing."""
    engine = engine_of(backend, "mqa_local", "float64")
    batch = Batch.of(tokens_of(7))
    true = engine.logits(batch)
    first, cache = engine.extend(batch.tokens_BT[:, :5], engine.empty_cache(B, capacity=7))
    rest, _ = engine.extend(batch.tokens_BT[:, 5:], cache)
    error = np.abs(np.concatenate([first, rest], axis=1) - true).max() / np.abs(true).max()
    assert error < TOLERANCE["float64"]


@pytest.mark.parametrize("model", ["mqa", "mqa_local", "grouped"])
@pytest.mark.parametrize(("backend", "attention"), [("jax", "fused"), ("torch", "plain")])
def test_the_attention_that_is_not_automatic_decodes_alike(backend, attention, model):
    engine = engine_of(backend, model, kernels=Kernels(attention=attention))
    batch = Batch.of(tokens_of(T))
    true = engine_of(backend, model, "float64").logits(batch)
    cache = engine.empty_cache(B, capacity=T)
    parts = []
    for start, stop in pairwise((0, 20, 40, 45)):
        logits_BTV, cache = engine.extend(batch.tokens_BT[:, start:stop], cache)
        parts.append(logits_BTV)
    for ours in (engine.logits(batch), np.concatenate(parts, axis=1)):
        assert np.abs(ours - true).max() / np.abs(true).max() < TOLERANCE["float32"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_cache_says_so(backend):
    """Global attention forgets nothing: past its capacity it stops, in one sentence."""
    engine = engine_of(backend, "mqa")
    token_B, cache = engine.prefill(tokens_of(6)[:, :6], capacity=8)
    with pytest.raises(ValueError, match="capacity=8"):
        engine.decode(token_B, cache, num_tokens=3)


def test_a_length_is_one_program_on_an_empty_cache_and_on_a_full_one():
    engine = engine_of("jax", "hawk")
    programs = import_module("implementations.jax_backend.engine").extend_program
    before = programs._cache_size()
    tokens_BT = tokens_of(10)
    _, cache = engine.extend(tokens_BT[:, :5], engine.empty_cache(B, capacity=T))
    engine.extend(tokens_BT[:, 5:10], cache)
    assert programs._cache_size() == before + 1


@pytest.mark.parametrize("model", ["griffin", "mqa"])
def test_a_captured_step_serves_every_cache(monkeypatch, model):
    """As on a GPU, where a graph of the step has a cache of its own; here what it captured is
    called again."""
    engine_module = import_module("implementations.torch_backend.engine")
    config = MODELS[model]
    plain, captured = (load_engine("torch")(config, seed=1) for _ in range(2))
    monkeypatch.setattr(engine_module, "capture", lambda function: function)
    captured._is_captured = True
    prompts = np.random.default_rng(3).integers(config.vocab_size, size=(2, B, 11)).astype(np.int32)

    def both(engine):
        """Two caches of one shape, decoded in turn, and one of another shape."""
        caches = [engine.prefill(prompt_BT, capacity=40) for prompt_BT in prompts]
        found = []
        for num_tokens in (5, 3):
            for index, (token_B, cache) in enumerate(caches):
                tokens_BT, cache = engine.decode(token_B, cache, num_tokens=num_tokens)
                caches[index] = (tokens_BT[:, -1], cache)
                found.append(tokens_BT.numpy())
        token_B, cache = engine.prefill(prompts[0, :1], capacity=40)
        found.append(engine.decode(token_B, cache, num_tokens=20)[0].numpy())
        empty = engine.empty_cache(B, capacity=12)
        found.append(engine.decode(np.zeros(B, np.int64), empty, num_tokens=12)[0].numpy())
        return found

    for want, got in zip(both(plain), both(captured), strict=True):
        np.testing.assert_array_equal(got, want)
    assert len(captured._graphs) == 1  # it has a cache of its own
