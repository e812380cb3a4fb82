"""Language modeling: train on real text for a fixed number of tokens, then predict held-out text.

Question: which architecture learns more from the same tokens, in the same order? Bits per byte
compare across tokenizers. Beside them stand two that know little: the unigram entropy of the same
text, which is what guessing by frequency alone would reach, and an order-3 n-gram model that saw as
much of the same text.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np

from implementations.engine import IGNORED, Batch, Engine, OptimizerConfig
from suites.harness import data, ngram, train
from suites.harness.measure import counted_as, peak_memory_bytes, sample
from suites.harness.record import Sample
from suites.harness.run import Run, Workload

# Of the curve of held-out loss. Training losses are of other text at each point: what a family
# needs to reach the end of another's curve is told by text that is always the same. A point in
# STEPS_A_PROBE steps is one batch, which costs a third of a step: 8% of a run at most.
NUM_PROBES = 25
STEPS_A_PROBE = 100


@dataclass(frozen=True, kw_only=True)
class Suite:
    num_steps: int
    batch_size: int
    seq_len: int
    num_held_out_batches: int
    activation_checkpointing: bool
    num_devices: int
    rounds: int
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for key in ("num_steps", "seq_len", "num_held_out_batches"):
            if getattr(self, key) < 1:
                raise ValueError(f"suite.{key}={getattr(self, key)}; must be at least 1.")

    def workloads(self) -> Iterator[Workload]:
        yield Workload(
            phase="train",
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            num_steps=self.num_steps,
            num_held_out_batches=self.num_held_out_batches,
            activation_checkpointing=self.activation_checkpointing,
            num_devices=self.num_devices,
        )

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        """The schedule ends with the run; warm-up is at most a tenth of it."""
        num_warmup_steps = min(base.num_warmup_steps, workload.num_steps // 10)
        return replace(base, num_steps=workload.num_steps, num_warmup_steps=num_warmup_steps)


def batches(run: Run, start_step: int = 0) -> Iterator[Batch]:
    work, corpus = run.workload, data.open_corpus(run.data)
    shape = {"batch_size": work.batch_size, "seq_len": work.seq_len}
    return data.batches(corpus, **shape, seed=run.seed, start_step=start_step)


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    work = run.workload
    corpus = data.open_corpus(run.data)
    shape = {"batch_size": work.batch_size, "seq_len": work.seq_len}

    def at_step(step: int) -> Iterator[Sample]:
        return probe(run, engine, corpus, step)

    curve = yield from train.train(run, engine, partial(batches, run), at_step)

    nlls, positions = [], []  # nats of every scored target, in float64; its position
    num_batches = work.num_held_out_batches
    held_out = data.held_out_batches(corpus, **shape, num_batches=num_batches)
    for batch, nll_BT in train.scored(run, engine, held_out, num_batches, curve):
        is_scored_BT = batch.targets_BT != IGNORED
        nlls.append(nll_BT[is_scored_BT])
        positions.append(batch.position_BT[is_scored_BT])
    nll, position = np.concatenate(nlls), np.concatenate(positions)
    loss = train.finite(float(nll.mean()), "evaluation")
    yield sample("loss", loss)
    if corpus.bytes_per_token is not None:  # tokens alone do not say how much text they are
        yield sample("bits_per_byte", loss / (math.log(2) * corpus.bytes_per_token))
    if corpus.unigram_bits_per_byte is not None:
        yield sample("unigram_bits_per_byte", corpus.unigram_bits_per_byte)
    for start, mean in loss_by_position(nll, position):
        yield sample("loss_by_position", mean, at=start)
    if (memory := peak_memory_bytes(engine)) is not None:
        yield sample("peak_memory_bytes", memory)
    are_bytes = corpus.bytes_per_token is not None and run.data.tokenizer is None
    if are_bytes and run.checkpoint is None:  # what a checkpoint has seen is not known here
        seen = data.train_sample(corpus, **shape, num_batches=work.num_steps)
        held_out = data.held_out_batches(corpus, **shape, num_batches=num_batches)
        yield sample("ngram_bits_per_byte", ngram.bits_per_byte(seen, held_out))


def probe(run: Run, engine: Engine, corpus: data.Corpus, step: int) -> Iterator[Sample]:
    """The held-out loss after some of the points of the training curve, and after the last step;
    of fewer batches than the final one where training is short."""
    work = run.workload
    interval = max(1, work.num_steps // NUM_PROBES)
    if step % interval and step != work.num_steps:
        return
    shape = {"batch_size": work.batch_size, "seq_len": work.seq_len}
    num_batches = min(work.num_held_out_batches, max(1, work.num_steps // STEPS_A_PROBE))
    with counted_as("evaluate"):
        nlls = [
            np.asarray(engine.evaluate(batch), np.float64)[batch.targets_BT != IGNORED]
            for batch in data.held_out_batches(corpus, **shape, num_batches=num_batches)
        ]
    loss = train.finite(float(np.concatenate(nlls).mean()), f"evaluation after step {step}")
    yield sample("held_out_loss", loss, at=step)


def loss_by_position(nll: np.ndarray, position: np.ndarray) -> Iterator[tuple[int, float]]:
    """(first position, mean loss) of the buckets 0, 1, 2-3, 4-7, 8-15, ... of a document."""
    bucket = np.where(position > 0, np.floor(np.log2(np.maximum(position, 1))).astype(int) + 1, 0)
    for index in np.unique(bucket):
        start = 0 if index == 0 else 2 ** (int(index) - 1)
        yield start, float(nll[bucket == index].mean())
