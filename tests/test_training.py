"""Training, both backends: it learns, resumes exactly, and takes the same AdamW steps."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from conftest import BACKENDS, tiny

from implementations.engine import IGNORED, Batch, OptimizerConfig, load_engine
from implementations.parameters import param_specs

# One layer of each kind; window and documents shorter than the sequence.
CONFIG = tiny("griffin", num_layers=3, window_size=8)
OPTIMIZER = OptimizerConfig(num_warmup_steps=2, num_steps=10, clip_norm=0.5)

# Difference of two parameters after three steps, relative to the largest change of their tensor.
# Measured: 4.4e-3 in float32 (Adam divides by the gradient's size: where that is small, rounding
# errors are not), 2.8e-7 in float64 (optax computes the rate in float32).
STEP_TOLERANCE = {"float32": 2e-2, "float64": 2e-6}


def batches(count: int) -> list[Batch]:
    """Random tokens, two documents in the first row; the target across them is not scored."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        tokens_BT = rng.integers(0, CONFIG.vocab_size, (2, 25)).astype(np.int32)
        batch = Batch.of(tokens_BT)
        position_BT = batch.position_BT.copy()
        position_BT[0, 15:] -= 15
        targets_BT = batch.targets_BT.copy()
        targets_BT[0, 14] = IGNORED
        out.append(replace(batch, targets_BT=targets_BT, position_BT=position_BT))
    return out


def trained(backend: str, steps: list[Batch], *, dtype: str = "float32", **settings):
    engine = load_engine(backend)(CONFIG, dtype=dtype)
    engine.start_training(
        settings.pop("optimizer", OPTIMIZER),
        activation_checkpointing=settings.pop("activation_checkpointing", False),
    )
    losses = [float(engine.train_step(batch)) for batch in steps]
    return engine, losses


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_falls_on_a_repeated_batch(backend):
    _, losses = trained(backend, batches(1) * 10)
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_loss_is_that_of_loss_and_grad(backend):
    (batch,) = batches(1)
    loss, _ = load_engine(backend)(CONFIG).loss_and_grad(batch)
    _, losses = trained(backend, [batch])
    assert losses[0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_changes_no_gradient(backend):
    """The first moment after one step is the clipped gradient, times 1 - beta1."""
    kept, _ = trained(backend, batches(1))
    recomputed, _ = trained(backend, batches(1), activation_checkpointing=True)
    want, got = kept.training_state(), recomputed.training_state()
    for spec in param_specs(CONFIG):
        name = f"first_moment.{spec.name}"
        error = np.abs(got[name] - want[name]).max() / np.abs(want[name]).max()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradients_of_many_tokens_do_not_stop_growing(backend):
    """Sums over 8,192 tokens, half of them the same, against float32. Measured: 1.4e-2 in both;
    summed in bfloat16, 0.69 of embedding.weight and 0.55 of conv_1d.bias were lost."""
    config = tiny("griffin", pattern=("rg_lru", "mqa"), num_layers=2)
    tokens_BT = np.minimum(np.random.default_rng(0).geometric(0.5, (32, 257)) - 1, 255)
    batch = Batch.of(tokens_BT)
    _, true = load_engine(backend)(config).loss_and_grad(batch)
    _, ours = load_engine(backend)(config, dtype="bfloat16").loss_and_grad(batch)
    for name, grad in true.items():
        error = np.abs(ours[name] - grad).max() / np.abs(grad).max()
        assert error < 5e-2, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loaded_state_continues_as_if_never_stopped(backend):
    first, second, third = batches(3)
    engine, _ = trained(backend, [first, second])
    state = engine.training_state()
    loss = float(engine.train_step(third))

    other = load_engine(backend)(CONFIG, seed=1)
    other.start_training(OPTIMIZER)
    other.load_training_state(state)
    assert float(other.train_step(third)) == loss
    want, got = engine.training_state(), other.training_state()
    assert want.keys() == got.keys()
    assert int(got["step"]) == 3
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_clipped_by_their_global_norm(backend):
    (batch,) = batches(1)
    engine, _ = trained(backend, [batch])
    _, grads = load_engine(backend)(CONFIG).loss_and_grad(batch)
    norm = np.sqrt(sum((grad.astype(np.float64) ** 2).sum() for grad in grads.values()))
    assert norm > OPTIMIZER.clip_norm  # else nothing is tested
    state = engine.training_state()
    for name, grad in grads.items():
        want = (1 - OPTIMIZER.beta1) * grad * OPTIMIZER.clip_norm / norm
        got = state[f"first_moment.{name}"]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_decay_applies_to_the_weights_of_linear_layers_alone(backend):
    plain, _ = trained(backend, batches(1), optimizer=replace(OPTIMIZER, weight_decay=0.0))
    decayed, _ = trained(backend, batches(1))
    before = load_engine(backend)(CONFIG).parameters()
    want, got = plain.parameters(), decayed.parameters()
    rate = OPTIMIZER.learning_rate / OPTIMIZER.num_warmup_steps
    for spec in param_specs(CONFIG):
        expected = -rate * OPTIMIZER.weight_decay * before[spec.name] * spec.decayed
        change = got[spec.name] - want[spec.name]
        np.testing.assert_allclose(change, expected, rtol=0, atol=3e-7, err_msg=spec.name)
        assert spec.decayed == (np.abs(change).max() > 1e-5)


@pytest.mark.parametrize("dtype", STEP_TOLERANCE)
def test_three_adamw_steps_agree(dtype):
    steps = batches(3)
    before = load_engine("torch")(CONFIG, dtype=dtype).parameters()
    (ours, our_losses), (theirs, their_losses) = (
        trained(backend, steps, dtype=dtype) for backend in BACKENDS
    )
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-5)
    want, got = ours.parameters(), theirs.parameters()
    for name, start in before.items():
        moved = np.abs(want[name] - start).max()
        error = np.abs(got[name] - want[name]).max() / moved
        assert moved > 0, name
        assert error < STEP_TOLERANCE[dtype], f"{name}: relative error {error:.1e} in {dtype}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_schedule_warms_up_and_falls_along_a_cosine(backend):
    learning_rate = import_module(f"implementations.{backend}_backend.optimizer").learning_rate
    optimizer = OptimizerConfig(
        learning_rate=2.0, num_warmup_steps=4, num_steps=12, final_fraction=0.1
    )
    wanted = {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 6: 1.7363961, 8: 1.1, 12: 0.2, 20: 0.2}
    for step, rate in wanted.items():
        assert float(learning_rate(optimizer, step)) == pytest.approx(rate, rel=1e-6), step


@pytest.mark.parametrize("backend", BACKENDS)
def test_schedule_without_warm_up_starts_at_the_top(backend):
    learning_rate = import_module(f"implementations.{backend}_backend.optimizer").learning_rate
    optimizer = OptimizerConfig(learning_rate=2.0, num_warmup_steps=0, num_steps=1)
    assert float(learning_rate(optimizer, 0)) == pytest.approx(2.0)
    assert float(learning_rate(optimizer, 1)) == pytest.approx(0.2)
