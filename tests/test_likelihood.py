"""Log-likelihoods of continuations: against the engine's own logits, whatever the order and the
batch; where a context is cut, and where it ends and its continuation begins."""

import numpy as np
import pytest
from conftest import BACKENDS, tiny

from implementations.engine import IGNORED, Batch, load_engine
from suites.harness import data, likelihood
from suites.harness.likelihood import Request, request
from suites.harness.measure import Diverged
from suites.harness.run import DataConfig

TOLERANCE = 1e-5  # relative: float32, other shapes
SEQ_LEN = 64
BYTES = likelihood.encoder(DataConfig(name="stdlib", source="stdlib"))
MODEL = tiny(
    "griffin", pattern=("rg_lru", "mqa"), num_layers=2, window_size=8, d_model=16, d_rnn=24,
    d_mlp=32, num_heads=2, head_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request):
    return load_engine(request.param)(MODEL)


def some_requests() -> list[Request]:
    """Of 2 to 90 tokens: both sides of SEQ_LEN and of the shortest length, and one twice."""
    rng = np.random.default_rng(0)
    made = []
    for length in (2, 90, 33, 5, 34, 65, 66, 33, 5, 66):
        tokens = rng.integers(256, size=length).tolist()
        made.append(Request(tuple(tokens), int(rng.integers(1, min(length, 12)))))
    return [*made, made[0]]


def true_scores(engine, one: Request) -> tuple[float, bool]:
    """By the definition: alone in a batch, unpadded, from logits in float64."""
    tokens = np.array(one.tokens[-(SEQ_LEN + 1) :])[None]
    logits_TV = engine.logits(Batch.of(tokens))[0].astype(np.float64)
    logits_TV -= np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    places = np.arange(tokens.shape[1] - 1)[-one.num_scored :]
    targets = tokens[0, 1:][-one.num_scored :]
    return logits_TV[places, targets].sum(), (logits_TV[places].argmax(-1) == targets).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_the_logits(engine, batch_size):
    asked = some_requests()
    found = likelihood.scores(engine, asked, batch_size=batch_size, seq_len=SEQ_LEN)
    for one, score in zip(asked, found, strict=True):
        true, _ = true_scores(engine, one)
        assert abs(score.log_likelihood / true - 1) < TOLERANCE
        assert score.is_greedy is None


def test_what_is_most_likely_is_greedy(engine):
    context = (3, 1, 4)
    following = engine.logits(Batch.of(np.array([[*context, 0]])))[0, -1]
    asked = [Request((*context, int(token)), 1) for token in following.argsort()[[-1, -2, 0]]]
    found = likelihood.scores(engine, asked, batch_size=2, seq_len=SEQ_LEN, wants_greedy=True)
    assert [score.is_greedy for score in found] == [True, False, False]
    assert found[0].log_likelihood > found[1].log_likelihood > found[2].log_likelihood


def test_the_order_of_requests_changes_no_bit(engine):
    asked = some_requests()
    settings = {"batch_size": 2, "seq_len": SEQ_LEN}
    found = likelihood.scores(engine, asked, **settings)
    order = np.random.default_rng(1).permutation(len(asked))
    again = likelihood.scores(engine, [asked[place] for place in order], **settings)
    assert [found[place] for place in order] == again


def test_a_context_loses_its_beginning_where_it_does_not_fit(engine):
    tokens = tuple(np.random.default_rng(2).integers(256, size=SEQ_LEN + 30).tolist())
    settings = {"batch_size": 1, "seq_len": SEQ_LEN}
    fits = Request(tokens[-(SEQ_LEN + 1) :], 5)
    whole = Request(tokens, 5)
    assert likelihood.is_too_long(whole, SEQ_LEN)
    assert not likelihood.is_too_long(fits, SEQ_LEN)
    found = likelihood.scores(engine, [whole, fits], **settings)
    assert found[0] == found[1]
    shorter = likelihood.scores(engine, [Request(fits.tokens[1:], 5)], **settings)
    assert shorter[0] != found[0]  # all that fits is read


def test_a_continuation_that_does_not_fit_is_named(engine):
    asked = [Request(tuple(range(70)), SEQ_LEN + 1)]
    with pytest.raises(ValueError, match=r"65 tokens; suite\.seq_len=64"):
        likelihood.scores(engine, asked, batch_size=1, seq_len=SEQ_LEN)


class Broken:
    def evaluate(self, batch):
        return np.full(batch.tokens_BT.shape, np.nan, np.float32)


def test_what_does_not_compute_has_diverged():
    with pytest.raises(Diverged):
        likelihood.scores(Broken(), [Request((1, 2), 1)], batch_size=1, seq_len=SEQ_LEN)


class Recorder:
    """Takes note of batches, and finds everything equally likely."""

    def __init__(self):
        self.batches = []

    def evaluate(self, batch):
        self.batches.append(batch)
        return (batch.targets_BT != IGNORED).astype(np.float32)


def test_batches_are_of_few_shapes_and_of_as_many_tokens():
    recorder = Recorder()
    asked = [Request(tuple(range(1, length)), 1) for length in range(3, 130)]
    likelihood.scores(recorder, asked, batch_size=2, seq_len=128)
    shapes = {batch.tokens_BT.shape for batch in recorder.batches}
    assert shapes == {(8, 32), (4, 64), (2, 128)}
    scored = sum(int((batch.targets_BT != IGNORED).sum()) for batch in recorder.batches)
    assert scored == len(asked)


def test_batches_hold_the_same_requests_in_whatever_order_they_come():
    digests = []
    for asked in (some_requests(), some_requests()[::-1]):
        recorder = Recorder()
        likelihood.scores(recorder, asked, batch_size=2, seq_len=SEQ_LEN)
        digests.append(data.batch_digest(recorder.batches))
    assert digests[0] == digests[1]


def test_a_length_that_is_no_power_of_two_is_not_exceeded():
    recorder = Recorder()
    likelihood.scores(recorder, [Request(tuple(range(90)), 1)], batch_size=1, seq_len=75)
    assert [batch.tokens_BT.shape for batch in recorder.batches] == [(1, 75)]


@pytest.mark.parametrize(
    ("context", "continuation", "scored"),
    [
        ("Question: why?\nAnswer:", " because", " because"),
        ("ends in a space ", "word", " word"),  # as words have been read in training
        ("two\n\n", " x", "\n\n x"),
        ("caf\u00e9", "\u00e9\u20ac", "\u00e9\u20ac"),  # of several bytes each
        ("", "alone", "alone"),
        ("  ", "alone", "  alone"),
    ],
)
def test_bytes_are_cut_where_the_continuation_begins(context, continuation, scored):
    found = request(context, continuation, BYTES)
    assert bytes(found.tokens[-found.num_scored :]).decode() == scored
    start = context if context.strip() else likelihood.START + context
    assert bytes(found.tokens).decode() == start + continuation


def bpe(tmp_path) -> DataConfig:
    """Bytes, and `bc` as one token."""
    from tokenizers import Tokenizer, models

    vocab = {letter: number for number, letter in enumerate("abcd\n ")} | {"bc": 6}
    path = tmp_path / "bpe.json"
    Tokenizer(models.BPE(vocab, [("b", "c")])).save(str(path))
    return DataConfig(name="text", source="text", tokenizer=str(path), vocab_size=7)


def test_a_token_across_the_boundary_is_scored(tmp_path):
    encode = likelihood.encoder(bpe(tmp_path))
    assert encode("abc") == [0, 6]
    assert request("ab", "c", encode) == Request((0, 6), 1)  # and not nothing
    assert request("ab", "d", encode) == Request((0, 1, 3), 1)
    assert request("b", "c", encode) == Request((4, 6), 1)  # nothing is left of the context


@pytest.mark.parametrize("source", ["random", "tokens"])
def test_data_that_does_not_say_its_tokenizer_is_refused(source):
    with pytest.raises(ValueError, match=r"^[^\n]*data\.tokenizer=bpe\.json[^\n]*$"):
        likelihood.check_data(DataConfig(name=source, source=source))
    likelihood.check_data(DataConfig(name="text", source="text"))  # bytes; its text is not read


def test_a_tokenizer_of_more_tokens_than_the_vocabulary_is_refused(tmp_path):
    config = bpe(tmp_path)
    likelihood.check_data(config)
    small = DataConfig(name="text", source="text", tokenizer=config.tokenizer, vocab_size=5)
    with pytest.raises(ValueError, match=r"set data\.vocab_size=7"):
        likelihood.check_data(small)


def test_what_was_asked_has_a_digest():
    asked = some_requests()
    digests = [data.batch_digest([likelihood.packed(some)])
               for some in (asked, list(asked), asked[:-1], asked[::-1])]  # fmt: skip
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    other = [asked[0], Request(asked[1].tokens, asked[1].num_scored + 1), *asked[2:]]
    assert data.batch_digest([likelihood.packed(other)]) != digests[0]
