"""Batches by document: pieces of held-out documents, and documents of one bucket of lengths.

A row begins where its document or its piece of one does, and no row holds two of them unless it is
packed for training; what is left of a row is padding, which is not scored. Models are causal and
no end of a document is ever a target: of a document that is cut nothing is seen but its beginning.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from implementations.engine import IGNORED, Batch
from suites.harness.data import Corpus


@dataclass(frozen=True)
class Spans:
    """Stretches of one split's tokens, each within a document."""

    first: np.ndarray  # [N] where each begins
    num_targets: np.ndarray  # [N] one less than its tokens
    document: np.ndarray  # [N] which it belongs to

    @property
    def num_tokens(self) -> np.ndarray:
        return self.num_targets + 1

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, chosen: np.ndarray) -> "Spans":
        return Spans(self.first[chosen], self.num_targets[chosen], self.document[chosen])


def spread(spans: Spans, most: int) -> Spans:
    """At most so many, evenly over the split."""
    most = min(most, len(spans))
    return spans[np.arange(most) * len(spans) // max(most, 1)]


def limited(spans: Spans, num_tokens: int) -> Spans:
    """Some of them, drawn at random, that have at most so many tokens together; one at least."""
    order = np.random.default_rng(0).permutation(len(spans))
    is_within = spans.num_tokens[order].cumsum() <= num_tokens
    return spans[np.sort(order[is_within | (np.arange(len(order)) == 0)])]


def held_out_pieces(corpus: Corpus, seq_len: int, most: int) -> Spans:
    """Consecutive pieces of held-out documents, of seq_len targets; where these are too few, the
    longest of those that end before, which count at the positions that they have."""
    whole = _documents(corpus.held_out_tokens, corpus.held_out_starts)
    num_pieces = -(-whole.num_targets // seq_len)
    document = np.repeat(whole.document, num_pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    left = np.repeat(whole.num_targets, num_pieces) - number * seq_len
    first = np.repeat(whole.first, num_pieces) + number * seq_len
    pieces = Spans(first, np.minimum(left, seq_len), document)
    is_full = pieces.num_targets == seq_len
    if is_full.sum() >= most:
        return spread(pieces[is_full], most)
    return pieces[np.sort(np.argsort(-pieces.num_targets, kind="stable")[:most])]


def of_lengths(corpus: Corpus, split: str, low: int, high: int) -> Spans:
    """The documents of a split that have more than `low` tokens, and at most `high`."""
    starts = getattr(corpus, f"{split}_starts")
    whole = _documents(getattr(corpus, f"{split}_tokens"), starts)
    return whole[(whole.num_tokens > low) & (whole.num_tokens <= high)]


def held_out_batches(
    corpus: Corpus, spans: Spans, *, batch_size: int, seq_len: int
) -> Iterator[tuple[Batch, np.ndarray]]:
    """(batch, document [B] of each row), one span a row; the rows of the last batch that are left
    over are padding."""
    for start in range(0, len(spans), batch_size):
        rows = spans[np.arange(start, min(start + batch_size, len(spans)))]
        spare = (0, batch_size - len(rows))
        first_B, num_targets_B = np.pad(rows.first, spare), np.pad(rows.num_targets, spare)
        index_BT = first_B[:, None] + np.arange(seq_len + 1)
        is_token_BT = np.arange(seq_len + 1) <= num_targets_B[:, None]
        token_BT = corpus.held_out_tokens[np.where(is_token_BT, index_BT, 0)].astype(np.int32)
        position_T = np.arange(seq_len, dtype=np.int32)
        batch = Batch(
            tokens_BT=np.where(is_token_BT, token_BT, 0)[:, :-1],
            targets_BT=np.where(is_token_BT, token_BT, np.int32(IGNORED))[:, 1:],
            position_BT=np.tile(position_T, (batch_size, 1)),
        )
        yield batch, np.pad(rows.document, spare)


def train_batches(
    corpus: Corpus, spans: Spans, *, batch_size: int, seq_len: int, seed: int, start_step: int = 0
) -> Iterator[Batch]:
    """Rows full of random documents of the train split, one after the other and the last cut,
    without end; batch i depends on (seed, i) alone."""
    most = seq_len // int(spans.num_tokens.min()) + 1  # documents that fill a row, however short
    step = start_step
    while True:
        rng = np.random.default_rng((seed, step))
        chosen = rng.integers(len(spans), size=(batch_size, most))
        rows = [_packed(corpus.train_tokens, spans[row], seq_len) for row in chosen]
        yield Batch(*map(np.stack, zip(*rows, strict=True)))
        step += 1


def standard_error(total: np.ndarray, count: np.ndarray) -> float:
    """Of sum(total) / sum(count), over documents [N] that were drawn whole: tokens of one document
    are not independent. NaN for one document."""
    total, count = total[count > 0], count[count > 0]
    if (n := len(count)) < 2:
        return float("nan")
    rest = total - total.sum() / count.sum() * count
    return float(np.sqrt(n / (n - 1) * (rest**2).sum()) / count.sum())


def _documents(tokens: np.ndarray, starts: np.ndarray) -> Spans:
    """All with a target."""
    num_tokens = np.diff(np.append(starts, len(tokens)))
    spans = Spans(np.asarray(starts), num_tokens - 1, np.arange(len(starts)))
    return spans[spans.num_targets > 0]


def _packed(
    tokens: np.ndarray, spans: Spans, seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, targets and positions of one row."""
    num_tokens = spans.num_tokens
    parts = [tokens[a : a + n] for a, n in zip(spans.first, num_tokens, strict=True)]
    token_T = np.concatenate(parts)[: seq_len + 1].astype(np.int32)
    document_T = np.repeat(np.arange(len(spans)), num_tokens)[: seq_len + 1]
    position_T = np.concatenate([np.arange(n, dtype=np.int32) for n in num_tokens])
    is_same_T = document_T[1:] == document_T[:-1]
    targets_T = np.where(is_same_T, token_T[1:], np.int32(IGNORED))
    return token_T[:-1], targets_T, position_T[:seq_len]
