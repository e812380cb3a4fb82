"""reference.py against transformers' RecurrentGemma: same weights, same logits and gradients."""

import numpy as np
import pytest
from conftest import FAMILIES, tiny

from benchmarks.recurrent_gemma import hugging_face, translated
from implementations import reference
from implementations.engine import Batch
from implementations.parameters import draw

TOLERANCE = {"logits": 1e-5, "gradient": 1e-4}  # float32, relative to the largest true value

RELEASED_CODE = {
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


def moved_params(config):
    """Drawn, and then moved off zero: biases and norm scales must matter too."""
    rng = np.random.default_rng(3)
    drawn = draw(config, seed=0).items()
    moved = {name: value + 0.05 * rng.standard_normal(value.shape) for name, value in drawn}
    return {name: value.astype(np.float32) for name, value in moved.items()}


def relative_error(true, ours):
    return np.abs(true - ours).max() / np.abs(true).max()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits(family, settings):
    import torch

    config = tiny(family, num_layers=3, **SETTINGS[settings])
    params = moved_params(config)
    batch = Batch.of(np.random.default_rng(0).integers(config.vocab_size, size=(2, 41)))
    true = reference.logits(config, params, batch.tokens_BT, batch.position_BT)
    with torch.inference_mode():
        theirs = hugging_face(config, params)(torch.from_numpy(np.int64(batch.tokens_BT))).logits
    error = relative_error(true, theirs.numpy())
    assert error < TOLERANCE["logits"], f"relative error {error:.1e}"


def test_transformers_computes_the_same_gradients():
    import torch

    config = tiny("griffin", num_layers=3, **RELEASED_CODE)
    params = moved_params(config)
    batch = Batch.of(np.random.default_rng(0).integers(config.vocab_size, size=(2, 41)))
    loss, grads = reference.loss_and_grad(config, params, batch)

    model = hugging_face(config, params)
    logits_BTV = model(torch.from_numpy(np.int64(batch.tokens_BT))).logits
    targets = torch.from_numpy(np.int64(batch.targets_BT)).flatten()
    theirs = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets)
    theirs.backward()
    assert theirs.item() == pytest.approx(loss, rel=TOLERANCE["logits"])
    found = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    true = translated(config, grads)
    assert found.keys() == true.keys()
    for name, value in true.items():
        error = relative_error(value.reshape(found[name].shape), found[name])
        assert error < TOLERANCE["gradient"], f"{name}: relative error {error:.1e}"


def test_transformers_generates_the_same_tokens_from_its_cache():
    import torch

    config = tiny("griffin", num_layers=3, **RELEASED_CODE)
    params = moved_params(config)
    prompt_BT = np.random.default_rng(0).integers(config.vocab_size, size=(2, 20))
    model = hugging_face(config, params)
    assert model.generation_config.use_cache
    with torch.inference_mode():
        found = model.generate(
            torch.from_numpy(prompt_BT), do_sample=False, pad_token_id=0, max_new_tokens=12
        ).numpy()
    position_BT = np.broadcast_to(np.arange(31), (2, 31))
    logits_BTV = reference.logits(config, params, found[:, :-1], position_BT)
    np.testing.assert_array_equal(found[:, 20:], logits_BTV[:, 19:].argmax(-1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"logit_soft_cap": None}, "logit_soft_cap"), ({"num_gate_blocks": 8}, "num_gate_blocks")],
)
def test_settings_that_transformers_lacks_are_refused(overrides, message):
    config = tiny("griffin", **(RELEASED_CODE | overrides))
    with pytest.raises(ValueError, match=message):
        hugging_face(config, draw(config, seed=0))
