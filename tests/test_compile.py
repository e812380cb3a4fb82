"""kernels.compile=true in PyTorch: other programs, the same numbers. Needs a C++ compiler."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny

from implementations.engine import Batch, Kernels, OptimizerConfig, load_engine

pytestmark = pytest.mark.slow

CONFIG = tiny("griffin", pattern=("rg_lru", "mqa"), num_layers=2, window_size=8)
# To float64, of a gradient's largest value. Measured over 3 seeds: 1.6e-6 and 4.0e-2; eager code
# 1.5e-6 and 3.2e-2 (it rounds to bfloat16 in other places).
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-2}


def engine_of(*, compile: bool = True, dtype: str = "float32", seed: int = 0):
    return load_engine("torch")(CONFIG, dtype=dtype, kernels=Kernels(compile=compile), seed=seed)


def tokens_of(B: int, T: int) -> np.ndarray:
    return np.random.default_rng(B).integers(CONFIG.vocab_size, size=(B, T)).astype(np.int32)


def decoded(engine, prompt_BT: np.ndarray, num_tokens: int) -> np.ndarray:
    token_B, cache = engine.prefill(prompt_BT, capacity=prompt_BT.shape[1] + num_tokens)
    tokens_BT, _ = engine.decode(token_B, cache, num_tokens=num_tokens)
    return tokens_BT.numpy()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compiled_gradients_are_true(dtype):
    batch = Batch.of(tokens_of(2, 26))
    starts_BT = batch.position_BT.copy()
    starts_BT[0, 15:] -= 15
    batch = replace(batch, position_BT=starts_BT)
    true_loss, true = engine_of(compile=False, dtype="float64").loss_and_grad(batch)
    loss, grads = engine_of(dtype=dtype).loss_and_grad(batch)
    assert loss == pytest.approx(true_loss, rel=TOLERANCE[dtype])
    for name, grad in true.items():
        error = np.abs(grads[name] - grad).max() / np.abs(grad).max()
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def test_a_compiled_decode_step_follows_every_batch_and_every_new_weight():
    """Its program is found without looking at the modules again: it must still read them."""
    eager, compiled = engine_of(compile=False), engine_of()
    for B in (1, 3, 1):
        want, got = (decoded(engine, tokens_of(B, 11), 13) for engine in (eager, compiled))
        np.testing.assert_array_equal(got, want)
    other = engine_of(compile=False, seed=1)
    assert (decoded(other, tokens_of(3, 11), 13) != decoded(eager, tokens_of(3, 11), 13)).any()
    compiled.load_parameters(other.parameters())
    want, got = (decoded(engine, tokens_of(3, 11), 13) for engine in (other, compiled))
    np.testing.assert_array_equal(got, want)


def test_two_engines_in_one_process_keep_their_programs_apart():
    """Equal shapes, other constants inside the program: the first one's must not be taken."""
    other = replace(CONFIG, rope_base=100.0, rms_norm_eps=1e-2)
    prompt_BT = tokens_of(3, 11)
    for config in (CONFIG, other):
        want, got = (
            decoded(load_engine("torch")(config, kernels=Kernels(compile=c)), prompt_BT, 13)
            for c in (False, True)
        )
        np.testing.assert_array_equal(got, want)


def test_decoding_between_training_steps_uses_the_latest_weights():
    """In bfloat16 the weights of decoding are a copy, made anew after a step."""
    batch, prompt_BT = Batch.of(tokens_of(2, 26)), tokens_of(2, 9)
    engine = engine_of(dtype="bfloat16")
    engine.start_training(OptimizerConfig(num_warmup_steps=0, learning_rate=0.1))
    before = decoded(engine, prompt_BT, 8)
    engine.train_step(batch)
    after = decoded(engine, prompt_BT, 8)
    assert (after != before).any()
    fresh = engine_of(dtype="bfloat16")
    fresh.load_parameters(engine.parameters())
    np.testing.assert_array_equal(after, decoded(fresh, prompt_BT, 8))
