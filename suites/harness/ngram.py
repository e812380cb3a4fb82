"""What an order-3 n-gram model of bytes would reach: interpolated Kneser-Ney, in NumPy.

It learns from batches and is scored on batches as the models are: no context reaches across the
start of a document or of a window. The first byte after a start is predicted from one byte, all
others from two. Each order is discounted by D = n1 / (n1 + 2 n2), n1 and n2 being how many n-grams
were seen once and twice (Ney, Essen and Kneser, "On structuring probabilistic dependences in
stochastic language modelling", 1994); the lower orders count in how many contexts a byte was seen
(Kneser and Ney, "Improved backing-off for m-gram language modeling", 1995).
"""

from collections.abc import Iterable

import numpy as np

from implementations.engine import IGNORED, Batch

BYTES = 256


def bits_per_byte(train: Iterable[Batch], held_out: Iterable[Batch]) -> float:
    """Mean bits of the scored bytes of `held_out`, by a model of those of `train`."""
    model = Model(train)
    return float(np.concatenate([model.bits(batch) for batch in held_out]).mean())


class Model:
    def __init__(self, train: Iterable[Batch]) -> None:
        self.counts = counts = np.zeros(BYTES**3, np.uint32)
        for batch in train:
            code, _, has_two = _codes(batch)
            np.add.at(counts, code[has_two], 1)
        seen = counts.reshape(-1, BYTES, BYTES)
        continued = (seen > 0).sum(axis=0)  # [second, third]: after how many first bytes
        unigram = (continued > 0).sum(axis=0)
        discount = _discount(unigram)
        kept = np.maximum(unigram - discount, 0)
        # a model that saw nothing guesses all bytes alike
        p_one = (kept + (max(unigram.sum(), 1) - kept.sum()) / BYTES) / max(unigram.sum(), 1)
        self.p_two = _interpolated(continued, p_one[None, :])
        self.discount = _discount(counts)
        self.total = seen.sum(axis=2, dtype=np.int64).ravel()  # of each pair of bytes
        self.num_kinds = (seen > 0).sum(axis=2).ravel()  # how many bytes follow it

    def bits(self, batch: Batch) -> np.ndarray:
        """Of every scored byte, given the two before it, or the one."""
        code, pair, has_two = _codes(batch)
        p_two = self.p_two.ravel()[pair]
        context = code // BYTES
        total = np.maximum(self.total[context], 1)
        kept = np.maximum(self.counts[code] - self.discount, 0) / total
        left = np.where(
            self.total[context] > 0, self.discount * self.num_kinds[context] / total, 1.0
        )
        return -np.log2(np.where(has_two, kept + left * p_two, p_two))


def _codes(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every scored target: it and the two bytes before as one number, it and the one before,
    and whether there are two."""
    is_scored_BT = batch.targets_BT != IGNORED
    before_BT = np.roll(batch.tokens_BT, 1, axis=1)  # what it makes of the first column is not read
    pair_BT = batch.tokens_BT * BYTES + batch.targets_BT
    code_BT = before_BT * BYTES**2 + pair_BT
    return code_BT[is_scored_BT], pair_BT[is_scored_BT], (batch.position_BT > 0)[is_scored_BT]


def _interpolated(counts: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Probabilities [context, byte] of these counts, what is discounted being spread as `below`."""
    discount = _discount(counts)
    total = counts.sum(axis=1, keepdims=True)
    kept = np.maximum(counts - discount, 0)
    left = np.where(total > 0, total - kept.sum(axis=1, keepdims=True), 1)
    return (kept + left * below) / np.maximum(total, 1)


def _discount(counts: np.ndarray) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5
