"""The n-gram model that language models are held against: its definition, and its bounds."""

import math
from collections import Counter

import numpy as np
import pytest

from implementations.engine import IGNORED, Batch
from suites.harness import ngram


def batch_of(texts: list[bytes], starts: tuple[int, ...] = ()) -> Batch:
    """One window a text; a document starts at each of `starts` in every one of them."""
    token_BT = np.array([list(text) for text in texts], np.int32)
    T = token_BT.shape[1]
    position = np.array([i - max(s for s in (0, *starts) if s <= i) for i in range(T)])
    is_start = np.isin(np.arange(1, T), starts)
    return Batch(
        tokens_BT=token_BT[:, :-1],
        targets_BT=np.where(is_start, IGNORED, token_BT[:, 1:]).astype(np.int32),
        position_BT=np.broadcast_to(position[:-1], (len(texts), T - 1)).astype(np.int32),
    )


def kneser_ney(train: bytes, text: bytes) -> float:
    """Mean bits of text[2:], by dictionaries; the definition, word for word."""
    counts = Counter(zip(train, train[1:], train[2:], strict=False))
    pairs = Counter((b, c) for _, b, c in counts)
    singles = Counter(c for _, c in pairs)

    def discount(table):
        once = sum(n == 1 for n in table.values())
        return once / (once + 2 * sum(n == 2 for n in table.values())) if once else 0.5

    def smoothed(table, context, last, below):
        seen = {key: n for key, n in table.items() if key[:-1] == context}
        if not seen:
            return below
        d, total = discount(table), sum(seen.values())
        kept = max(seen.get((*context, last), 0) - d, 0)
        return (kept + sum(min(d, n) for n in seen.values()) * below) / total

    bits = 0.0
    for a, b, c in zip(text, text[1:], text[2:], strict=False):
        p = smoothed({(k,): n for k, n in singles.items()}, (), c, 1 / 256)
        p = smoothed(pairs, (b,), c, p)
        bits -= math.log2(smoothed(counts, (a, b), c, p))
    return bits / (len(text) - 2)


def test_it_is_interpolated_kneser_ney():
    rng = np.random.default_rng(0)
    train, text = (bytes(rng.choice([97, 98, 99, 100], n, p=[0.5, 0.3, 0.15, 0.05]))
                   for n in (400, 60))  # fmt: skip
    text += b"z" + text  # a byte that was never seen
    held_out = batch_of([text])
    held_out.targets_BT[:, 0] = IGNORED  # the first has one byte before it alone
    ours = ngram.bits_per_byte([batch_of([train])], [held_out])
    assert ours == pytest.approx(kneser_ney(train, text), rel=1e-12)


@pytest.mark.parametrize("train", [b"", b"abc", b"the cat sat on the mat and the dog " * 5])
def test_probabilities_of_all_bytes_sum_to_one(train):
    model = ngram.Model([batch_of([train])] if train else [])
    for before in (b"th", b"zz", b"e "):
        every = batch_of([before + bytes([last]) for last in range(256)])
        every.targets_BT[:, 0] = IGNORED
        assert (2.0 ** -model.bits(every)).sum() == pytest.approx(1)
        one = batch_of([before[1:] + bytes([last]) for last in range(256)])
        assert (2.0 ** -model.bits(one)).sum() == pytest.approx(1)


def test_no_context_reaches_across_a_document_start():
    model = ngram.Model([batch_of([b"abcd" * 8])])
    (whole, cut) = (batch_of([b"ab" + b"cdab"], starts) for starts in ((), (2,)))
    assert (cut.targets_BT == IGNORED).sum() == 1
    # of b, c, d, a, b: c begins a document, so that d has one byte before it
    _, known, *rest = model.bits(whole)[1:]
    fresh, *others = model.bits(cut)[1:]
    assert known < fresh
    assert others == rest


def test_more_text_is_better_than_frequencies_alone():
    rng = np.random.default_rng(1)
    words = [b"alpha ", b"beta ", b"gamma ", b"delta "]
    text = b"".join(words[i] for i in rng.integers(4, size=600))
    share = np.bincount(np.frombuffer(text, np.uint8)) / len(text)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    held_out = [batch_of([text[-800:]])]
    few, many = (ngram.bits_per_byte([batch_of([text[:n]])], held_out) for n in (60, 2000))
    assert many < few
    assert many < 0.5 * entropy
