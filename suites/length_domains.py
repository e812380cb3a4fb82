"""Length as a domain: train on documents of one bucket of lengths, evaluate on every bucket.

Question: does a model learn the text, or the lengths that it was given? Varis and Bojar
(arXiv:2109.07276) found that a Transformer that translates is best at the lengths that it was
trained on. A run trains in one bucket, the one that ends at its seq_len. All see equally many
tokens a step, equally many steps, and as much different text: what the smallest bucket has. Texts
of different lengths differ in more: runs compare within an evaluated bucket, not between two.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import ClassVar

import numpy as np

from implementations.engine import IGNORED, Batch, Engine, OptimizerConfig
from suites.harness import data, documents, train
from suites.harness.measure import peak_memory_bytes, sample
from suites.harness.record import Sample
from suites.harness.run import Run, Workload


@dataclass(frozen=True, kw_only=True)
class Suite:
    num_steps: int
    tokens_per_step: int
    length_buckets: tuple[int, ...]
    num_held_out_batches: int
    activation_checkpointing: bool
    num_devices: int
    rounds: int
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for key in ("num_steps", "num_held_out_batches"):
            if getattr(self, key) < 1:
                raise ValueError(f"suite.{key}={getattr(self, key)}; must be at least 1.")
        edges = list(self.length_buckets)
        is_ascending = all(low < high for low, high in pairwise(edges))
        if len(edges) < 3 or edges[0] < 1 or not is_ascending:
            raise ValueError(
                f"suite.length_buckets={edges}; must be at least three ascending lengths from 1 "
                "on, the ends of two buckets or more: [64,128,256]."
            )
        if any(self.tokens_per_step % high for high in edges[1:]):
            raise ValueError(
                f"suite.tokens_per_step={self.tokens_per_step}: must be a multiple of the end of "
                f"every bucket, {edges[1:]}, so that all runs see equally many tokens."
            )

    def workloads(self) -> Iterator[Workload]:
        for high in self.length_buckets[1:]:
            yield Workload(
                phase="train",
                batch_size=self.tokens_per_step // high,
                seq_len=high,
                length_buckets=self.length_buckets,
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
    """Documents of the bucket that ends at seq_len, and no others."""
    work, corpus = run.workload, data.open_corpus(run.data)
    spans = _trained(corpus, work)
    shape = {"batch_size": work.batch_size, "seq_len": work.seq_len}
    return documents.train_batches(corpus, spans, **shape, seed=run.seed, start_step=start_step)


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    work = run.workload
    corpus = data.open_corpus(run.data)
    tokens_per_batch = work.batch_size * work.seq_len
    held_out = {}  # end of a bucket -> its documents, so many that their rows are as many tokens
    for low, high in pairwise(work.length_buckets):
        most = work.num_held_out_batches * tokens_per_batch // high
        held_out[high] = documents.spread(_documents(corpus, "held_out", low, high, 2), most)
    if run.checkpoint is None:
        text = _trained(corpus, work).num_tokens.sum()
        yield sample("num_passes", work.num_steps * tokens_per_batch / text)
    curve = yield from train.train(run, engine, partial(batches, run))

    for high, spans in held_out.items():
        batch_size = tokens_per_batch // high
        rows = documents.held_out_batches(corpus, spans, batch_size=batch_size, seq_len=high)
        num_batches = -(-len(spans) // batch_size)
        total, count = np.zeros((2, corpus.held_out_starts.size))  # [documents]
        for (batch, document_B), nll_BT in train.scored(run, engine, rows, num_batches, curve):
            np.add.at(total, document_B, nll_BT.sum(1))
            np.add.at(count, document_B, (batch.targets_BT != IGNORED).sum(1))
        loss = train.finite(float(total.sum() / count.sum()), f"evaluation at length {high}")
        if high == work.seq_len and run.checkpoint is None:
            yield sample("loss", loss)
        yield sample("loss_by_length", loss, at=high)
        yield sample("num_documents", len(spans), at=high)
        yield sample("loss_error", documents.standard_error(total, count), at=high)
    if (memory := peak_memory_bytes(engine)) is not None:
        yield sample("peak_memory_bytes", memory)


def _trained(corpus: data.Corpus, work: Workload) -> documents.Spans:
    """The same amount of text in every bucket."""
    found = {
        high: _documents(corpus, "train", low, high, least=1)
        for low, high in pairwise(work.length_buckets)
    }
    most = min(spans.num_tokens.sum() for spans in found.values())
    return documents.limited(found[work.seq_len], most)


def _documents(corpus: data.Corpus, split: str, low: int, high: int, least: int) -> documents.Spans:
    spans = documents.of_lengths(corpus, split, low, high)
    if len(spans) < least:
        raise ValueError(
            f"data {corpus.name!r}: the {split.replace('_', '-')} split has {len(spans)} documents "
            f"of {low + 1} to {high} tokens, and {least} are needed; change suite.length_buckets."
        )
    return spans
