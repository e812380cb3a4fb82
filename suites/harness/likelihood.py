"""Log-likelihoods of texts that follow other texts, batched, by any engine and any tokenizer of
`data`: what a multiple choice question asks of a language model.

Batches are made of requests in an order of their own, padded behind, in a few shapes: what one
request gets depends on which others there are, and never on where it stands among them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from implementations.engine import IGNORED, Batch, Engine
from suites.harness import corpora, stop
from suites.harness.measure import Diverged, progress
from suites.harness.run import DataConfig

Encode = Callable[[str], list[int]]

# Corpora put nothing before a document, so that no model has learned of a token to begin with.
START = "\n"  # stands before a continuation without a context
SHORTEST = 32  # tokens of a padded batch: each length is a program of its own


@dataclass(frozen=True)
class Request:
    """Tokens of a context and its continuation, of which the last ones are scored."""

    tokens: tuple[int, ...]
    num_scored: int


@dataclass(frozen=True)
class Score:
    log_likelihood: float  # nats, of all scored tokens together
    is_greedy: bool | None  # whether each is the most likely one; None: not asked for


def check_data(data: DataConfig) -> None:
    """ValueError, in one line, where `data` does not say how text becomes tokens."""
    if data.tokenizer is None and data.source in ("random", "tokens"):
        raise ValueError(
            f"{corpora.title(data)}: its tokenizer is not known, and questions are text; name the "
            "file: data=text data.tokenizer=bpe.json data.vocab_size=32000 (data=stdlib: bytes)."
        )
    if data.tokenizer is not None:
        corpora.check_tokenizer(data)


def encoder(data: DataConfig) -> Encode:
    """Text to tokens, as the corpora of `data` are made: bytes, or those of its tokenizer."""
    if data.tokenizer is None:
        return lambda text: list(text.encode("utf-8", errors="replace"))
    tokenizer = corpora.load_tokenizer(data.tokenizer, corpora.title(data))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def request(context: str, continuation: str, encode: Encode) -> Request:
    """Both texts as one, as a model has read them in training. Scored is what the context alone
    does not have: spaces at its end, as words begin with theirs, and a token that lies across."""
    stripped = context.rstrip()
    whole = encode(context + continuation)
    alone = encode(stripped)
    pairs = zip(whole, alone, strict=False)
    num_shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(whole), len(alone)))
    if num_shared == 0:
        return Request((*encode(START), *whole), len(whole))
    return Request(tuple(whole), len(whole) - num_shared)


def is_too_long(request: Request, seq_len: int) -> bool:
    """Whether the beginning of its context is cut off: a model reads seq_len tokens at most."""
    return len(request.tokens) > seq_len + 1


def scores(
    engine: Engine,
    requests: Sequence[Request],
    *,
    batch_size: int,
    seq_len: int,
    wants_greedy: bool = False,
) -> list[Score]:
    """Of each request, in the order of `requests`. batch_size is that of sequences of seq_len
    tokens; of shorter ones a batch has as many more."""
    made: list[Score | None] = [None] * len(requests)
    batches = list(_batched(requests, batch_size, seq_len))
    for number, (places, shape) in enumerate(batches, start=1):
        stop.check()
        batch = _batch([requests[place] for place in places], *shape)
        nll_BT = np.asarray(engine.evaluate(batch), np.float64)
        greedy_B = _are_greedy(engine, batch) if wants_greedy else [None] * len(places)
        for place, nll_T, is_greedy in zip(places, nll_BT, greedy_B, strict=False):
            total = -float(nll_T.sum())
            if not np.isfinite(total):
                raise Diverged(f"a log-likelihood is {total}: what is asked does not compute.")
            made[place] = Score(total, is_greedy)
        progress(number, len(batches))
    return made


def packed(requests: Sequence[Request]) -> Batch:
    """All requests, one after the other as documents of one sequence: what was asked, for a
    digest."""
    parts = [_batch([one], 1, len(one.tokens)) for one in requests]
    return Batch(
        *(
            np.concatenate([getattr(part, name)[0] for part in parts])[None]
            for name in ("tokens_BT", "targets_BT", "position_BT")
        )
    )


def _are_greedy(engine: Engine, batch: Batch) -> list[bool]:
    is_scored_BT = batch.targets_BT != IGNORED
    is_likeliest_BT = engine.logits(batch).argmax(-1) == batch.targets_BT
    return (is_likeliest_BT | ~is_scored_BT).all(1).tolist()


def _batched(
    requests: Sequence[Request], batch_size: int, seq_len: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """The places of the requests of each batch, and its shape (rows, tokens)."""
    by_len: dict[int, list[int]] = defaultdict(list)
    for place, one in enumerate(requests):
        if one.num_scored > seq_len:
            raise ValueError(
                f"a continuation has {one.num_scored} tokens; suite.seq_len={seq_len} is too few."
            )
        num_inputs = min(max(len(one.tokens) - 1, SHORTEST), seq_len)
        by_len[min(1 << (num_inputs - 1).bit_length(), seq_len)].append(place)
    for T, places in sorted(by_len.items()):
        places.sort(key=lambda place: (requests[place].tokens, requests[place].num_scored))
        B = min(batch_size * (seq_len // T), len(places))
        for start in range(0, len(places), B):
            yield places[start : start + B], (B, T)


def _batch(requests: Sequence[Request], B: int, T: int) -> Batch:
    """The ends of the requests, padded behind by tokens that are not scored: all models are causal.
    Rows that are left are empty."""
    tokens_BT = np.zeros((B, T), np.int32)
    targets_BT = np.full((B, T), IGNORED, np.int32)
    for row, one in enumerate(requests):
        tokens = np.array(one.tokens[-(T + 1) :], np.int32)
        end = len(tokens) - 1
        tokens_BT[row, :end] = tokens[:-1]
        targets_BT[row, end - one.num_scored : end] = tokens[len(tokens) - one.num_scored :]
    position_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return Batch(tokens_BT, targets_BT, position_BT)
