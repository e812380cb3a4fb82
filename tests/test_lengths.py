"""Lengths: pieces and buckets of documents against counting by hand, and what the two suites say of
models whose losses are known."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import BACKENDS, tiny

from implementations.engine import IGNORED, OptimizerConfig, load_engine
from suites import compose, length_domains, length_extrapolation
from suites.harness import data, documents, plan, train, trained
from suites.harness.data import Corpus
from suites.harness.run import DataConfig, Run, Start

TRAIN = [5, 9, 3, 12, 8, 30, 1, 16]  # tokens of the documents
HELD_OUT = [40, 7, 23, 6, 16, 65, 9, 12]
MODEL = tiny("griffin", pattern=("rg_lru", "mqa"), num_layers=2, window_size=8, d_model=16)
EXTRAPOLATION = length_extrapolation.Suite(
    num_steps=4, tokens_per_step=16, seq_lens=(8,), eval_seq_len=32, chunk_len=None,
    num_held_out_batches=4, activation_checkpointing=False, num_devices=1, rounds=1, seeds=(0,),
)  # fmt: skip
DOMAINS = length_domains.Suite(
    num_steps=4, tokens_per_step=32, length_buckets=(4, 8, 16), num_held_out_batches=2,
    activation_checkpointing=False, num_devices=1, rounds=1, seeds=(0,),
)  # fmt: skip


@pytest.fixture
def corpus(monkeypatch):
    """Token i of a split is i, so that a batch says where it is from."""
    made = {}
    for split, lengths in (("train", TRAIN), ("held_out", HELD_OUT)):
        made[f"{split}_tokens"] = np.arange(sum(lengths), dtype=np.uint8)
        made[f"{split}_starts"] = np.cumsum([0, *lengths[:-1]])
    corpus = Corpus(
        "counted", **made, vocab_size=256, digest="", bytes_per_token=1, unigram_bits_per_byte=1
    )
    monkeypatch.setattr(data, "open_corpus", lambda config: corpus)
    return corpus


def run_of(name, suite, backend="torch", **values):
    workloads = list(suite.workloads())
    return Run(
        suite=name, model=MODEL, backend=backend, dtype="float32", workload=workloads[0],
        data=DataConfig(name="counted", source="random"),
        optimizer=suite.optimizer(OptimizerConfig(), workloads[0]), **values,
    )  # fmt: skip


class Known:
    """An engine whose loss of a target is a function of the target's token and its position."""

    device_name = "cpu"

    def __init__(self, nll):
        self.nll, self.trained = nll, []

    def start_training(self, optimizer, *, activation_checkpointing=False):
        pass

    def train_step(self, batch):
        self.trained.append(batch)
        return 1.0

    def evaluate(self, batch):
        nll_BT = self.nll(batch.targets_BT.astype(float), batch.position_BT.astype(float))
        return np.where(batch.targets_BT == IGNORED, 0.0, nll_BT)

    def synchronize(self):
        pass

    def peak_memory_bytes(self):
        return None


def curve_of(samples, metric):
    return {s.at: s.value for s in samples if s.metric == metric}


# Pieces and buckets.


def test_pieces_follow_one_another_and_never_leave_their_document(corpus):
    pieces = documents.held_out_pieces(corpus, 10, 100)
    starts = np.cumsum([0, *HELD_OUT])
    expected = [
        (starts[d] + first, min(10, tokens - 1 - first), d)
        for d, tokens in enumerate(HELD_OUT)
        for first in range(0, tokens - 1, 10)
    ]
    found = zip(pieces.first, pieces.num_targets, pieces.document, strict=True)
    assert [tuple(map(int, piece)) for piece in found] == expected


def test_whole_pieces_come_first_and_then_the_longest_of_the_rest(corpus):
    whole = documents.held_out_pieces(corpus, 15, 5)
    assert list(whole.num_targets) == [15] * 5
    more = documents.held_out_pieces(corpus, 15, 10)
    lengths = sorted(min(15, n - 1 - i) for n in HELD_OUT for i in range(0, n - 1, 15))
    assert sorted(more.num_targets) == lengths[-10:]
    assert (np.diff(more.first) > 0).all()


def test_rows_are_documents_and_what_is_left_over_is_not_scored(corpus):
    spans = documents.of_lengths(corpus, "held_out", 6, 16)
    assert list(spans.document) == [1, 4, 6, 7]
    batches = list(
        documents.held_out_batches(corpus, spans[np.arange(3)], batch_size=2, seq_len=16)
    )
    assert [batch.tokens_BT.shape for batch, _ in batches] == [(2, 16), (2, 16)]
    starts = np.cumsum([0, *HELD_OUT])
    scored = []
    for batch, document_B in batches:
        is_scored = batch.targets_BT != IGNORED
        np.testing.assert_array_equal(
            batch.targets_BT[is_scored], batch.tokens_BT[is_scored] + 1
        )  # tokens count up
        position = batch.tokens_BT - starts[document_B][:, None]
        np.testing.assert_array_equal(position[is_scored], batch.position_BT[is_scored])
        scored += batch.targets_BT[is_scored].tolist()
    expected = [t for d in (1, 4, 6) for t in range(starts[d] + 1, starts[d + 1])]
    assert scored == expected


def test_training_rows_hold_documents_of_their_bucket_alone_and_from_their_beginning(corpus):
    spans = documents.of_lengths(corpus, "train", 4, 9)
    assert list(spans.document) == [0, 1, 4]
    shape = {"batch_size": 3, "seq_len": 20, "seed": 1}
    stream = documents.train_batches(corpus, spans, **shape)
    batches = [next(stream) for _ in range(20)]
    starts = np.cumsum([0, *TRAIN])
    seen = set()
    for batch in batches:
        document_BT = np.searchsorted(starts, batch.tokens_BT, side="right") - 1
        seen |= set(document_BT.ravel())
        np.testing.assert_array_equal(batch.tokens_BT - starts[document_BT], batch.position_BT)
        is_last = batch.tokens_BT + 1 == starts[document_BT + 1]
        np.testing.assert_array_equal(
            batch.targets_BT, np.where(is_last, IGNORED, batch.tokens_BT + 1)
        )
    assert seen == {0, 1, 4}
    again = next(documents.train_batches(corpus, spans, **shape, start_step=7))
    for name in ("tokens_BT", "targets_BT", "position_BT"):
        np.testing.assert_array_equal(getattr(again, name), getattr(batches[7], name))
        assert getattr(again, name).dtype == np.int32


def test_as_much_text_is_taken_as_is_allowed(corpus):
    spans = documents.of_lengths(corpus, "train", 0, 100)
    for most in (3, 20, 50, 1000):
        chosen = documents.limited(spans, most)
        left = [n for d, n in enumerate(TRAIN) if d not in chosen.document and n > 1]
        assert chosen.num_tokens.sum() <= most or len(chosen) == 1
        assert not left or chosen.num_tokens.sum() + max(left) > most
        assert (np.diff(chosen.first) > 0).all()


def test_the_standard_error_is_that_of_documents_not_of_tokens():
    """Equal documents: that of their means. Drawn often: what their mean scatters by."""
    means = np.array([1.0, 2.0, 4.0, 2.5])
    error = documents.standard_error(means * 7, np.full(4, 7))
    np.testing.assert_allclose(error, means.std(ddof=1) / 2)
    rng = np.random.default_rng(0)
    count = rng.integers(1, 20, (4000, 30))
    total = count * rng.normal(3, 1, (4000, 30))
    scatter = (total.sum(1) / count.sum(1)).std()
    said = np.mean([documents.standard_error(t, c) for t, c in zip(total, count, strict=True)])
    np.testing.assert_allclose(said, scatter, rtol=0.05)
    assert np.isnan(documents.standard_error(np.ones(3), np.array([2, 0, 0])))


# Extrapolation.


def test_loss_by_position_is_exact_beyond_the_training_length(corpus):
    """Nats that are the position: every mean is known."""
    run = run_of("length_extrapolation", EXTRAPOLATION)
    engine = Known(lambda target, position: position)
    samples = list(length_extrapolation.measure(run, engine))
    assert len(engine.trained) == 4
    assert engine.trained[0].tokens_BT.shape == (2, 8)
    pieces = documents.held_out_pieces(corpus, 32, 4)
    assert list(pieces.num_targets) == [32, 22, 32, 32]
    position = np.concatenate([np.arange(n) for n in pieces.num_targets])
    edges = [0, 1, 2, 4, 8, 16, 32]
    inside = {a: position[(position >= a) & (position < b)].mean()
              for a, b in pairwise(edges)}  # fmt: skip
    assert curve_of(samples, "loss_by_position") == pytest.approx(inside)
    up_to = {b: position[position < b].mean() for b in edges[1:]}
    assert curve_of(samples, "loss_up_to") == pytest.approx(up_to)
    assert curve_of(samples, "num_documents") == dict.fromkeys(inside, 3)  # 0 and 5 in two pieces
    (loss,) = curve_of(samples, "loss").values()
    (beyond,) = curve_of(samples, "loss_beyond").values()
    assert loss == position[position < 8].mean()
    assert beyond == position[position >= 8].mean()
    assert max(curve_of(samples, "loss_error").values()) < 1  # of composition alone


def test_buckets_are_finer_where_training_never_went():
    edges = length_extrapolation.position_edges(512, 100)
    assert list(edges) == [0, 1, 2, 4, 8, 16, 32, 64, 80, 96, 100, 112, 128, 160, 192, 224, 256,
                           320, 384, 448]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_len", [5, 16])
def test_chunks_score_as_one_pass_does(corpus, backend, chunk_len):
    """Longer than the window, and of a length that no chunk divides."""
    engine = load_engine(backend)(MODEL)
    pieces = documents.held_out_pieces(corpus, 39, 2)
    ((batch, _),) = documents.held_out_batches(corpus, pieces, batch_size=2, seq_len=39)
    found = length_extrapolation.in_chunks(engine, batch, chunk_len=chunk_len)
    np.testing.assert_allclose(found, engine.evaluate(batch), atol=2e-5)
    assert (batch.targets_BT == IGNORED).any() or (batch.targets_BT.size == 78)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_follow_what_was_trained(corpus, backend):
    run = run_of("length_extrapolation", EXTRAPOLATION, backend)
    one, other = (
        list(length_extrapolation.measure(made, load_engine(backend)(MODEL)))
        for made in (run, replace(run, workload=replace(run.workload, chunk_len=7)))
    )
    for metric in ("train_loss", "loss_by_position", "loss_up_to"):
        assert curve_of(other, metric) == pytest.approx(curve_of(one, metric), abs=1e-4)


def test_documents_that_end_within_the_training_length_are_no_evidence(corpus):
    suite = replace(EXTRAPOLATION, seq_lens=(80,), tokens_per_step=80, eval_seq_len=96)
    run = run_of("length_extrapolation", suite)
    with pytest.raises(ValueError, match=r"longer than suite\.seq_len=80; the longest has 65"):
        list(length_extrapolation.measure(run, Known(lambda target, position: position)))


# Domains.


def test_each_bucket_is_scored_on_its_own_documents(corpus):
    """Nats that are the token: the mean of a bucket says whose tokens they are."""
    run = run_of("length_domains", DOMAINS)
    assert (run.workload.batch_size, run.workload.seq_len) == (4, 8)
    engine = Known(lambda target, position: target)
    samples = list(length_domains.measure(run, engine))
    starts = np.cumsum([0, *HELD_OUT])
    expected = {}
    for low, high in ((4, 8), (8, 16)):
        mine = [d for d, n in enumerate(HELD_OUT) if low < n <= high]
        targets = [t for d in mine for t in range(starts[d] + 1, starts[d + 1])]
        expected[high] = np.mean(targets)
    assert curve_of(samples, "loss_by_length") == expected
    assert curve_of(samples, "num_documents") == {8: 2, 16: 3}
    for batch in engine.trained:
        length = np.searchsorted(np.cumsum([0, *TRAIN]), batch.tokens_BT, side="right") - 1
        assert set(np.array(TRAIN)[length].ravel()) <= {5, 8}


def test_all_runs_see_equally_many_tokens_a_step_and_as_much_text(corpus):
    works = list(DOMAINS.workloads())
    assert [(w.batch_size, w.seq_len) for w in works] == [(4, 8), (2, 16)]
    texts = {w.seq_len: length_domains._trained(corpus, w) for w in works}
    assert sorted(texts[8].num_tokens) == [5, 8]
    assert len(texts[16]) == 1  # of 9, 12 and 16 tokens: two would be more than 13
    run = run_of("length_domains", DOMAINS)
    samples = length_domains.measure(run, Known(lambda target, position: target))
    assert curve_of(samples, "num_passes") == {None: 4 * 32 / 13}


@pytest.mark.parametrize(
    ("suite", "values", "message"),
    [
        (EXTRAPOLATION, {"eval_seq_len": 8}, "eval_seq_len=8"),
        (EXTRAPOLATION, {"tokens_per_step": 20}, "tokens_per_step=20"),
        (EXTRAPOLATION, {"chunk_len": 0}, "chunk_len=0"),
        (EXTRAPOLATION, {"chunk_len": 8, "num_devices": 2}, "chunk_len=null"),
        (EXTRAPOLATION, {"seq_lens": (0,)}, "seq_lens"),
        (EXTRAPOLATION, {"num_steps": 0}, "num_steps=0"),
        (DOMAINS, {"length_buckets": (8, 8, 16)}, "ascending"),
        (DOMAINS, {"length_buckets": (8, 16)}, "length_buckets"),
        (DOMAINS, {"tokens_per_step": 40}, "tokens_per_step=40"),
    ],
)
def test_a_wrong_setting_is_named(suite, values, message):
    with pytest.raises(ValueError, match=message):
        replace(suite, **values)


def test_from_a_checkpoint_there_is_one_run_and_no_bucket_of_its_own(corpus):
    start = Start("somewhere", "digest")
    runs = [replace(run_of("length_domains", DOMAINS), workload=work)
            for work in DOMAINS.workloads()]  # fmt: skip
    made = [trained.started(run, start) for run in runs]
    assert len({run.run_id for run in made}) == 1
    assert {(run.workload.seq_len, run.workload.batch_size) for run in made} == {(16, 2)}
    engine = Known(lambda target, position: target)
    trains = list(length_domains.measure(runs[0], engine))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "load", lambda run, engine: None)
        evaluates = list(length_domains.measure(made[0], engine))
    assert curve_of(evaluates, "loss_by_length") == curve_of(trains, "loss_by_length")
    assert not {"loss", "num_passes", "train_loss"} & {s.metric for s in evaluates}


def test_a_bucket_without_documents_is_named(corpus):
    run = run_of("length_domains", replace(DOMAINS, length_buckets=(100, 128, 256),
                                           tokens_per_step=256))  # fmt: skip
    with pytest.raises(ValueError, match="held-out split has 0 documents of 101 to 128 tokens"):
        list(length_domains.measure(run, Known(lambda target, position: target)))


def test_a_loss_that_is_not_finite_has_diverged(corpus):
    run = run_of("length_domains", DOMAINS)
    with pytest.raises(train.Diverged, match="evaluation at length 8"):
        list(length_domains.measure(run, Known(lambda target, position: target * np.nan)))


# Experiments.


def runs_of(*overrides):
    request = compose.read(overrides)
    return [run for settings in request.settings for run in plan.expand(settings)]


@pytest.mark.parametrize("name", ["length_extrapolation", "sequence_lengths", "length_domains"])
def test_an_experiment_asks_every_family_with_three_seeds_at_both_scales(name):
    assert compose.read([f"experiment={name}"]).question.endswith("?")
    for scale, kind, size in (([], "h100", "100m"), (["scale=cpu"], "cpu", "tiny")):
        runs = runs_of(f"experiment={name}", *scale)
        assert {(run.device_kind, run.model.size) for run in runs} == {(kind, size)}
        assert {run.model.family for run in runs} >= {"mqa", "hawk", "griffin"}
        quality = [run for run in runs if run.suite.startswith("length")]
        assert {run.seed for run in quality} == {0, 1, 2}
        assert len({run.workload.batch_size * run.workload.seq_len for run in quality}) == 1
