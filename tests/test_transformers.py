"""transformers' RecurrentGemma beside the reference and both backends: code that is not ours."""

import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import BACKENDS, FAMILIES, tiny

from implementations import cost, reference
from implementations.engine import (
    IGNORED,
    Batch,
    Kernels,
    OptimizerConfig,
    Unsupported,
    load_engine,
)
from implementations.parameters import draw

# Relative to the largest true value. The other two are measured here at 3e-2 and 4e-7: float64
# is float32 inside its norms and its recurrence.
TOLERANCE = {"logits": 1e-5, "gradient": 1e-4}  # float32
OTHER_DTYPES = {"bfloat16": 6e-2, "float64": 2e-6}

RELEASED_CODE = {
    "d_model": 48,  # whose square root scales the inputs, and is no bfloat16 number
    "head_dim": 12,
    "window_size": 8,
    "rope_fraction": 0.5,
    "window_extra_key": True,
    "lambda_init": "code",
    "logit_soft_cap": 3.0,
    "scale_embeddings": True,
}
SETTINGS = {
    "released code": RELEASED_CODE,
    "grouped heads": RELEASED_CODE | {"num_kv_heads": 2},
    "all channels turn": RELEASED_CODE | {"rope_fraction": 1.0, "rope_base": 100.0},
    "no biases, all keys": RELEASED_CODE | {"biases": False, "window_size": None},
}
T = 40  # more than 4 windows of 9 keys: rings wrap
PROMPT_LEN = 20


def moved_params(config):
    """Drawn, and then moved off zero: biases and norm scales must matter too."""
    rng = np.random.default_rng(3)
    drawn = draw(config, seed=0).items()
    moved = {name: value + 0.05 * rng.standard_normal(value.shape) for name, value in drawn}
    return {name: value.astype(np.float32) for name, value in moved.items()}


def engine_of(backend, config, **settings):
    engine = load_engine(backend)(config, **settings)
    engine.load_parameters(moved_params(config))
    return engine


def batch_of(config):
    return Batch.of(np.random.default_rng(0).integers(config.vocab_size, size=(2, T + 1)))


def relative_error(true, ours):
    return np.abs(true - ours).max() / np.abs(true).max()


def extended(engine, tokens_BT, chunk_len):
    """Logits of a prompt in pieces of chunk_len tokens, and of every token after it by itself."""
    cache = engine.empty_cache(len(tokens_BT), capacity=T)
    ends = [*range(0, PROMPT_LEN, chunk_len), *range(PROMPT_LEN, T + 1)]
    parts = []
    for first, last in pairwise(ends):
        logits_BTV, cache = engine.extend(tokens_BT[:, first:last], cache)
        parts.append(logits_BTV)
    return np.concatenate(parts, axis=1), cache


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits(family, settings):
    """In one pass, and again from its cache, whose window holds all keys but the query's own."""
    config = tiny(family, num_layers=3, **SETTINGS[settings])
    batch = batch_of(config)
    true = reference.logits(config, moved_params(config), batch.tokens_BT, batch.position_BT)
    engine = engine_of("transformers", config)
    from_cache, cache = extended(engine, batch.tokens_BT, PROMPT_LEN)
    for ours in (engine.logits(batch), from_cache):
        error = relative_error(true, ours)
        assert error < TOLERANCE["logits"], f"relative error {error:.1e}"
    W = config.window_size
    kept = config if W is None else replace(config, window_size=W - 1)
    predicted = cost.cache_bytes(kept, batch_size=2, capacity=T, dtype="float32")
    assert engine.num_bytes(cache) == predicted


@pytest.mark.parametrize("settings", ["released code", "no biases, all keys"])
def test_transformers_computes_the_same_gradients(settings):
    config = tiny("griffin", num_layers=3, **SETTINGS[settings])
    batch = batch_of(config)
    is_scored_BT = batch.position_BT >= [[7], [0]]
    batch = replace(batch, targets_BT=np.where(is_scored_BT, batch.targets_BT, IGNORED))
    true_loss, true = reference.loss_and_grad(config, moved_params(config), batch)
    engine = engine_of("transformers", config)
    loss, grads = engine.loss_and_grad(batch)
    assert loss == pytest.approx(true_loss, rel=TOLERANCE["logits"])
    assert engine.evaluate(batch).sum() == pytest.approx(true_loss * is_scored_BT.sum(), rel=1e-5)
    assert list(grads) == list(true)
    for name, value in true.items():
        error = relative_error(value, grads[name])
        assert error < TOLERANCE["gradient"], f"{name}: relative error {error:.1e}"


def test_every_parameter_of_transformers_is_one_of_ours():
    from implementations.transformers_backend import weights

    config = tiny("griffin", num_layers=3, **RELEASED_CODE)
    engine = engine_of("transformers", config)
    given = weights.theirs(config, moved_params(config))
    assert given.keys() == dict(engine.model.named_parameters()).keys()
    for name, value in engine.parameters().items():
        np.testing.assert_array_equal(value, moved_params(config)[name])


def test_transformers_generates_the_same_tokens_from_its_cache():
    """By its own generate(), which is what the peers' benchmark times, and by the engine."""
    import torch

    config = tiny("griffin", num_layers=3, **RELEASED_CODE)
    prompt_BT = batch_of(config).tokens_BT[:, :PROMPT_LEN]
    engine = engine_of("transformers", config)
    model = engine.model
    assert model.generation_config.use_cache
    with torch.inference_mode():
        found = model.generate(
            torch.from_numpy(np.int64(prompt_BT)),
            do_sample=False,
            pad_token_id=0,
            max_new_tokens=12,
        ).numpy()
    position_BT = np.broadcast_to(np.arange(31), (2, 31))
    logits_BTV = reference.logits(config, moved_params(config), found[:, :-1], position_BT)
    np.testing.assert_array_equal(found[:, 20:], logits_BTV[:, 19:].argmax(-1))
    token_B, cache = engine.prefill(prompt_BT, capacity=32)
    np.testing.assert_array_equal(token_B, found[:, 20])
    np.testing.assert_array_equal(engine.decode(token_B, cache, num_tokens=11)[0], found[:, 21:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_our_backends_compute_what_transformers_computes(backend):
    """Logits in one pass; those of chunks and single tokens from a cache; greedy tokens."""
    config = tiny("griffin", num_layers=3, **RELEASED_CODE)
    batch = batch_of(config)
    prompt_BT = batch.tokens_BT[:, :PROMPT_LEN]
    theirs, ours = engine_of("transformers", config), engine_of(backend, config)

    error = relative_error(theirs.logits(batch), ours.logits(batch))
    assert error < TOLERANCE["logits"], f"logits: relative error {error:.1e}"
    true, _ = extended(theirs, batch.tokens_BT, PROMPT_LEN)
    from_cache, _ = extended(ours, batch.tokens_BT, 5)
    error = relative_error(true, from_cache)
    assert error < TOLERANCE["logits"], f"from the cache: relative error {error:.1e}"

    decoded = []
    for engine, chunk_len in ((theirs, None), (ours, 5)):
        token_B, cache = engine.prefill(prompt_BT, capacity=T, chunk_len=chunk_len)
        first_B = np.asarray(token_B).copy()  # decode may use its inputs up
        tokens_BT, _ = engine.decode(token_B, cache, num_tokens=T - PROMPT_LEN - 1)
        decoded.append(np.concatenate([first_B[:, None], np.asarray(tokens_BT)], axis=1))
    np.testing.assert_array_equal(*decoded)


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_other_dtypes_round_as_they_must_and_no_more(dtype):
    """Nor are parameters rounded, which are asked back: they are the ones that were given."""
    config = tiny("griffin", num_layers=3, **RELEASED_CODE)
    batch, params = batch_of(config), moved_params(config)
    engine = engine_of("transformers", config, dtype=dtype)
    true = reference.logits(config, params, batch.tokens_BT, batch.position_BT)
    loss, grads = engine.loss_and_grad(batch)
    for ours in (engine.logits(batch), extended(engine, batch.tokens_BT, PROMPT_LEN)[0]):
        assert ours.dtype == ("float64" if dtype == "float64" else "float32")
        assert relative_error(true, ours) < OTHER_DTYPES[dtype]
    true_loss, true = reference.loss_and_grad(config, params, batch)
    assert loss == pytest.approx(true_loss, rel=OTHER_DTYPES[dtype])
    # the frequencies of the rotation and the scale of the inputs
    assert all(buffer.dtype.itemsize >= 4 for buffer in engine.model.buffers())
    for name, value in engine.parameters().items():
        np.testing.assert_array_equal(value, params[name])
        assert grads[name].dtype == value.dtype
        assert relative_error(true[name], grads[name]) < OTHER_DTYPES[dtype]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"logit_soft_cap": None}, "logit_soft_cap"),
        ({"head_dim": 32}, "head_dim"),
        ({"num_gate_blocks": 8}, "num_gate_blocks"),
        ({"window_size": 1, "window_extra_key": False}, "window_size"),
        ({"gate": "mamba"}, "gate"),
        ({"gate": "lru"}, "gate"),
        ({"decay_exponent": 4.0}, "decay_exponent"),
        ({"normalize_input": False}, "normalize_input"),
        ({"conv_width": 0}, "conv_width"),
    ],
)
def test_settings_that_transformers_lacks_are_refused(overrides, message):
    config = tiny("griffin", **(RELEASED_CODE | overrides))
    with pytest.raises(Unsupported, match=f"cannot have {message}=") as error:
        load_engine("transformers")(config)
    assert "\n" not in str(error.value)


def test_work_that_transformers_cannot_do_is_refused():
    config = tiny("griffin", num_layers=3, **RELEASED_CODE)
    engine = load_engine("transformers")(config)
    batch = batch_of(config)
    packed = replace(batch, position_BT=batch.position_BT % 7)
    cases = {
        "several documents": lambda: engine.logits(packed),
        "in one piece": lambda: engine.prefill(batch.tokens_BT, capacity=T, chunk_len=5),
        "no optimizer": lambda: engine.start_training(OptimizerConfig()),
        "linear_scan=triton": lambda: load_engine("transformers")(
            config, kernels=Kernels(linear_scan="triton")
        ),
    }
    for message, work in cases.items():
        with pytest.raises(Unsupported, match=message) as error:
            work()
        assert "\n" not in str(error.value)


def test_where_transformers_is_missing_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "implementations.transformers_backend.engine", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Unsupported, match=r"pip install 'aerie\[hf\]'"):
        load_engine("transformers")
