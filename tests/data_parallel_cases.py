"""What one rank of a data-parallel engine computes: `python data_parallel_cases.py BACKEND FAMILY
NUM_DEVICES SEED PATH`. PATH is a .npz of losses, gradients and the state of training."""

import os
import sys
from dataclasses import replace

import numpy as np
from conftest import tiny

from implementations.engine import IGNORED, Batch, OptimizerConfig, load_engine

OPTIMIZER = OptimizerConfig(num_warmup_steps=2, num_steps=10, clip_norm=0.5)
MODELS = {
    "griffin": {"num_layers": 3, "window_size": 8},  # shorter than documents
    "mqa": {"num_layers": 2},
}


def batches(seed: int, count: int = 4) -> list[Batch]:
    """Random tokens, 8 rows: of four devices the first has two documents in a row, the second
    scores nothing, the third little, and the last all."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        batch = Batch.of(rng.integers(0, 256, (8, 25)).astype(np.int32))
        targets_BT, position_BT = batch.targets_BT.copy(), batch.position_BT.copy()
        for row, start in ((0, 15), (5, 9)):
            position_BT[row, start:] -= start
            targets_BT[row, start - 1] = IGNORED
        targets_BT[2:4] = IGNORED
        targets_BT[4, 3:] = IGNORED
        made.append(replace(batch, targets_BT=targets_BT, position_BT=position_BT))
    return made


def compute(backend: str, family: str, num_devices: int, seed: int) -> dict[str, np.ndarray]:
    engine = load_engine(backend)(
        tiny(family, **MODELS[family]), num_devices=num_devices, seed=seed
    )
    first, *rest = batches(seed)
    loss, grads = engine.loss_and_grad(first)
    engine.start_training(OPTIMIZER)
    losses = [loss, *(float(engine.train_step(batch)) for batch in (first, *rest))]
    found = {f"grad.{name}": grad for name, grad in grads.items()}
    state = engine.training_state()
    return {"losses": losses, "nll_BT": engine.evaluate(first)} | found | state


if __name__ == "__main__":
    backend, family, num_devices, seed, path = sys.argv[1:]
    np.savez(path, **compute(backend, family, int(num_devices), int(seed)))
    os._exit(0)  # as children of the harness: no rank waits for another's end
