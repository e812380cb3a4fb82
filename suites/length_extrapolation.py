"""Length extrapolation: train at one length, then predict held-out documents far beyond it.

Question: does the loss go on falling with position where training never went, as for a state of
fixed size, or does it rise? Position is counted from where a piece of a document begins. Of each
bucket of positions there is the mean, and its standard error over documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np

from implementations.engine import IGNORED, Batch, Engine, OptimizerConfig
from suites.harness import data, documents, train
from suites.harness.measure import peak_memory_bytes, sample
from suites.harness.record import Sample
from suites.harness.run import Run, Workload

FIRST_FINE = 64  # position from which buckets are a quarter of an octave wide


@dataclass(frozen=True, kw_only=True)
class Suite:
    num_steps: int
    tokens_per_step: int
    seq_lens: tuple[int, ...]
    eval_seq_len: int
    chunk_len: int | None
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
        if not self.seq_lens or min(self.seq_lens) < 1:
            raise ValueError(f"suite.seq_lens={list(self.seq_lens)}; must be lengths from 1 on.")
        if any(self.tokens_per_step % seq_len for seq_len in self.seq_lens):
            raise ValueError(
                f"suite.tokens_per_step={self.tokens_per_step}: must be a multiple of each of "
                f"suite.seq_lens={list(self.seq_lens)}, so that all runs see equally many tokens."
            )
        if self.eval_seq_len <= max(self.seq_lens):
            raise ValueError(
                f"suite.eval_seq_len={self.eval_seq_len}; must be beyond every training length of "
                f"suite.seq_lens={list(self.seq_lens)}."
            )
        if self.chunk_len is not None and self.chunk_len < 1:
            raise ValueError(f"suite.chunk_len={self.chunk_len}; must be at least 1, or null.")
        if self.chunk_len is not None and self.num_devices > 1:
            raise ValueError(
                f"suite.chunk_len={self.chunk_len}: chunks are evaluated on one device, not "
                f"suite.num_devices={self.num_devices}; set suite.chunk_len=null."
            )

    def workloads(self) -> Iterator[Workload]:
        for seq_len in self.seq_lens:
            yield Workload(
                phase="train",
                batch_size=self.tokens_per_step // seq_len,
                seq_len=seq_len,
                eval_seq_len=self.eval_seq_len,
                chunk_len=self.chunk_len or 0,
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
    num_rows = _num_rows(work)
    most = work.num_held_out_batches * num_rows
    pieces = documents.held_out_pieces(corpus, work.eval_seq_len, most)
    if not (pieces.num_targets > work.seq_len).any():
        raise ValueError(
            f"data {corpus.name!r}: no held-out document is longer than suite.seq_len="
            f"{work.seq_len}; the longest has {pieces.num_targets.max(initial=0) + 1:,} tokens."
        )
    curve = yield from train.train(run, engine, partial(batches, run))

    edges = position_edges(work.eval_seq_len, work.seq_len)
    bucket_T = np.searchsorted(edges, np.arange(work.eval_seq_len), side="right") - 1
    total, count = np.zeros((2, corpus.held_out_starts.size, len(edges)))  # [documents, buckets]
    rows = documents.held_out_batches(
        corpus, pieces, batch_size=num_rows, seq_len=work.eval_seq_len
    )
    num_batches = -(-len(pieces) // num_rows)
    score = partial(in_chunks, engine, chunk_len=work.chunk_len) if work.chunk_len else None
    for (batch, document_B), nll_BT in train.scored(run, engine, rows, num_batches, curve, score):
        place = document_B[:, None], bucket_T[None, :]
        np.add.at(total, place, nll_BT)
        np.add.at(count, place, batch.targets_BT != IGNORED)
    train.finite(float(total.sum()), "evaluation")
    yield from _by_position(total, count, edges, work.seq_len, work.eval_seq_len)
    if (memory := peak_memory_bytes(engine)) is not None:
        yield sample("peak_memory_bytes", memory)


def _num_rows(work: Workload) -> int:
    """Of an evaluated batch: as many tokens as a training step has, as far as they divide."""
    share = work.batch_size * work.seq_len // (work.eval_seq_len * work.num_devices)
    return max(1, share) * work.num_devices


def position_edges(length: int, trained: int) -> np.ndarray:
    """Where buckets of positions begin: 0, 1, 2, 4, 8, ...; from FIRST_FINE on four in an octave;
    and where training ended."""
    edges = {0, trained}
    octave = 1
    while octave < length:
        edges |= {octave * (4 + k) // 4 for k in range(4 if octave >= FIRST_FINE else 1)}
        octave *= 2
    return np.array(sorted(edge for edge in edges if edge < length))


def in_chunks(engine: Engine, batch: Batch, *, chunk_len: int) -> np.ndarray:
    """What engine.evaluate gives for rows of one document, through the cache: memory grows with
    the length, and not with its square."""
    B, T = batch.tokens_BT.shape
    cache = engine.empty_cache(B, capacity=T)
    nll_BT = np.zeros((B, T))
    for start in range(0, T, chunk_len):
        here = slice(start, start + chunk_len)
        logits_BTV, cache = engine.extend(batch.tokens_BT[:, here], cache)
        nll_BT[:, here] = _cross_entropy(logits_BTV.astype(np.float64), batch.targets_BT[:, here])
    return nll_BT


def _cross_entropy(logits_BTV: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
    """Nats; 0 where a target is IGNORED."""
    shifted_BTV = logits_BTV - logits_BTV.max(-1, keepdims=True)
    target_BT1 = np.maximum(targets_BT, 0)[..., None]
    target_BT = np.take_along_axis(shifted_BTV, target_BT1, -1)[..., 0]
    nll_BT = np.log(np.exp(shifted_BTV).sum(-1)) - target_BT
    return np.where(targets_BT == IGNORED, 0.0, nll_BT)


def _by_position(
    total: np.ndarray, count: np.ndarray, edges: np.ndarray, trained: int, length: int
) -> Iterator[Sample]:
    """The loss within the training length, and of what follows it; then of every bucket, by where
    it begins, and of all positions up to its end, by that."""
    is_within = edges < trained
    yield sample("loss", total[:, is_within].sum() / count[:, is_within].sum())
    yield sample("loss_beyond", total[:, ~is_within].sum() / count[:, ~is_within].sum())
    so_far = total.sum(0).cumsum() / count.sum(0).cumsum()
    stops = [*map(int, edges[1:]), length]
    for number, start in enumerate(edges):
        here, num_targets = total[:, number], count[:, number]
        if not num_targets.any():
            return
        at = int(start)
        yield sample("loss_by_position", here.sum() / num_targets.sum(), at=at)
        yield sample("loss_up_to", so_far[number], at=stops[number])
        yield sample("num_documents", np.count_nonzero(num_targets), at=at)
        if np.isfinite(error := documents.standard_error(here, num_targets)):
            yield sample("loss_error", error, at=at)
