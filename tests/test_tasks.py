"""Synthetic tasks: every example holds its answer, and what a batch holds depends on its place."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from implementations.engine import IGNORED
from suites.harness import tasks
from suites.harness.run import DataConfig

SMALL = {
    "selective_copying": {"vocab_size": 6, "num_items": 3},
    "induction_heads": {"vocab_size": 5},
    "associative_recall": {"vocab_size": 12, "num_items": 2},
    "phonebook": {"vocab_size": 256},
}
LENGTH = {"phonebook": 300}


def data_of(name, **settings):
    return DataConfig(name=name, source=name, **(SMALL[name] | settings))


def example(name, seed=0, seq_len=None, **settings):
    """Tokens and targets of one example."""
    rng = np.random.default_rng(seed)
    batch = tasks.examples(data_of(name, **settings), 1, seq_len or LENGTH.get(name, 16), rng)
    return batch.tokens_BT[0], batch.targets_BT[0]


def digest(batch):
    return [part.tobytes() for part in (batch.tokens_BT, batch.targets_BT, batch.position_BT)]


class Drawn:
    """A generator whose every number is known."""

    def __init__(self, integers=(), random=(), gumbel=()):
        self.given = {"integers": list(integers), "random": list(random), "gumbel": list(gumbel)}

    def _next(self, kind):
        return np.array(self.given[kind].pop(0))

    def integers(self, *bounds, size=None):
        return self._next("integers")

    def random(self, size):
        return self._next("random")

    def gumbel(self, size):
        return self._next("gumbel")


def test_selective_copying_by_hand():
    rng = Drawn(integers=[[[3, 1, 2]]], random=[[[0.9, 0.3, 0.8, 0.1, 0.7, 0.2]]])
    tokens, targets = tasks.selective_copying(rng, 1, 9, data_of("selective_copying"))
    assert tokens.tolist() == [[0, 3, 0, 1, 0, 2, 5, 5, 5]]
    assert targets.tolist() == [[-1, -1, -1, -1, -1, -1, 3, 1, 2]]


def test_induction_heads_by_hand():
    rng = Drawn(integers=[[[1, 3, 2, 0, 3, 1, 2]], [2]])
    tokens, targets = tasks.induction_heads(rng, 1, 7, data_of("induction_heads"))
    assert tokens.tolist() == [[1, 3, 4, 0, 3, 1, 4]]
    assert targets.tolist() == [[-1, -1, -1, -1, -1, -1, 0]]


def test_associative_recall_by_hand():
    """The example in the docstring of zoology's generator, at its vocabulary of 12."""
    keys = [[0.2, 0.0, 0.9, 0.1, 0.3]]  # 2, 4 come first: numbers 1 to 5 less one
    values = [[0.5, 0.1, 0.0, 0.4, 0.3, 0.2]]
    late = [[0.0, -9.0, -9.0, 9.0, -9.0, -9.0]]  # key 2 at the fourth distance, key 4 at the first
    fill = [[9] * 16]
    rng = Drawn(integers=[fill], random=[keys, values], gumbel=[late])
    tokens, targets = tasks.associative_recall(rng, 1, 16, data_of("associative_recall"))
    assert tokens.tolist() == [[2, 8, 4, 7, 4, 9, 9, 9, 9, 9, 2, 9, 9, 9, 9, 9]]
    assert targets.tolist() == [[-1, -1, -1, -1, 7, -1, -1, -1, -1, -1, 8, -1, -1, -1, -1, -1]]


seeds = st.integers(0, 2**32)


@given(seeds, st.integers(1, 6), st.integers(0, 40))
def test_selective_copying_gives_all_items_back_in_order(seed, num_items, noise):
    tokens, targets = example("selective_copying", seed, 2 * num_items + noise, num_items=num_items)
    context, answer = tokens[:-num_items], tokens[-num_items:]
    assert (answer == 5).all()
    assert (context < 5).all()
    assert targets[-num_items:].tolist() == context[context > 0].tolist()
    assert (targets[:-num_items] == IGNORED).all()


@given(seeds, st.integers(3, 60))
def test_an_induction_head_would_find_the_answer(seed, seq_len):
    tokens, targets = example("induction_heads", seed, seq_len)
    first, last = np.flatnonzero(tokens == 4)
    assert last == seq_len - 1
    assert first < last - 1
    assert targets[last] == tokens[first + 1]
    assert (targets[:last] == IGNORED).all()


@given(seeds, st.integers(1, 5), st.integers(0, 10))
def test_associative_recall_asks_each_key_once(seed, num_pairs, extra):
    tokens, targets = example(
        "associative_recall", seed, 4 * num_pairs + extra, vocab_size=20, num_items=num_pairs
    )
    start = 2 * num_pairs
    pairs = dict(zip(tokens[:start:2].tolist(), tokens[1:start:2].tolist(), strict=True))
    asked = np.flatnonzero(targets != IGNORED)
    assert len(pairs) == len(asked) == len(set(pairs.values())) == num_pairs
    assert set(pairs) <= set(range(1, 10))
    assert set(pairs.values()) <= set(range(10, 20))
    assert (asked >= start).all()
    assert (asked % 2 == 0).all()
    assert {tokens[i]: targets[i] for i in asked} == pairs


@given(seeds, st.integers(200, 700))
def test_a_phonebook_holds_the_number_that_it_asks_for(seed, seq_len):
    tokens, targets = example("phonebook", seed, seq_len)
    asked = np.flatnonzero(targets != IGNORED)
    number = bytes(targets[asked].astype(np.uint8)).decode()
    text = bytes(tokens.astype(np.uint8)).decode()
    assert (np.diff(asked) == 1).all()
    assert re.fullmatch("[6-9][0-9]{9}", number)
    question = text[: asked[0] + 1]
    assert text[asked[0] + 1 :].rstrip("\n") == number[:-1]
    book, shown, name = question.split("\n\n")
    lines = book.split("\n")
    assert len({line.split(":")[0] for line in lines}) == len(lines)
    assert set(shown.split("\n")) <= set(lines)
    assert len(set(shown.split("\n"))) == 2
    assert f"{name}{number}" in lines
    assert f"{name}{number}" not in shown
    assert seq_len - asked[-1] <= tasks._ENTRY[1]  # one entry more would not fit


def test_a_long_phonebook_ends_where_names_do():
    tokens, targets = example("phonebook", seq_len=2**17)
    text = bytes(tokens.astype(np.uint8)).decode()
    names = [line.split(":")[0] for line in text.split("\n\n")[0].split("\n")]
    assert len(names) == len(set(names)) == len(tasks.FIRST_NAMES) * len(tasks.LAST_NAMES)
    assert (targets != IGNORED).sum() == tasks.PHONE_DIGITS


def test_items_lie_anywhere_and_each_place_is_as_likely():
    batch = tasks.examples(data_of("induction_heads"), 4000, 12, np.random.default_rng(0))
    place = (batch.tokens_BT[:, :-1] == 4).argmax(axis=1)
    assert set(place) == set(range(10))  # the last one is before the one that is followed by S
    assert np.bincount(place).min() > 4000 / 10 * 0.8
    data = data_of("selective_copying", num_items=2)
    batch = tasks.examples(data, 4000, 10, np.random.default_rng(0))
    share = (batch.tokens_BT[:, :8] > 0).mean(axis=0)
    np.testing.assert_allclose(share, 2 / 8, atol=0.03)


def test_queries_are_drawn_with_zoologys_power_law():
    """One pair: its query lies at distance d with probability proportional to d ** (0.01 - 1)."""
    data = data_of("associative_recall", num_items=1)
    batch = tasks.examples(data, 20000, 14, np.random.default_rng(0))
    place = (batch.targets_BT != IGNORED).argmax(axis=1)
    wanted = np.arange(1.0, 7.0) ** (0.01 - 1)
    share = np.bincount((place - 2) // 2, minlength=6) / len(place)
    np.testing.assert_allclose(share, wanted / wanted.sum(), atol=0.01)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_batch_depends_on_seed_and_step_alone(name):
    shape = {"batch_size": 3, "seq_len": LENGTH.get(name, 16)}
    whole = tasks.batches(data_of(name), **shape, seed=1)
    first = [digest(next(whole)) for _ in range(4)]
    resumed = tasks.batches(data_of(name), **shape, seed=1, start_step=2)
    assert [digest(next(resumed)) for _ in range(2)] == first[2:]
    assert len({one[0] for one in first}) == 4
    other = tasks.batches(data_of(name), **shape, seed=2)
    assert digest(next(other)) != first[0]
    batch = next(tasks.batches(data_of(name), **shape, seed=1))
    assert {part.dtype for part in vars(batch).values()} == {np.dtype("int32")}
    assert (batch.position_BT == np.arange(shape["seq_len"])).all()
    assert batch.tokens_BT.min() >= 0
    assert batch.tokens_BT.max() < data_of(name).vocab_size


@pytest.mark.parametrize("name", tasks.TASKS)
def test_what_is_held_out_is_fixed_and_never_trained_on_by_seed(name):
    length = LENGTH.get(name, 16)
    held = tasks.held_out(data_of(name), num_examples=8, seq_len=length)
    again = tasks.held_out(data_of(name), num_examples=8, seq_len=length)
    assert digest(held) == digest(again)
    for seed in (0, tasks.HELD_OUT):
        batch = next(tasks.batches(data_of(name), batch_size=8, seq_len=length, seed=seed))
        assert digest(batch) != digest(held)


@pytest.mark.parametrize(
    ("name", "settings", "seq_len", "hint"),
    [
        ("selective_copying", {"num_items": 0}, 16, "num_items=0; must be at least 1"),
        ("induction_heads", {"num_items": 4}, 16, "num_items=4; must be 0"),
        ("selective_copying", {}, 5, "seq_len=5; an example needs at least 6"),
        ("associative_recall", {"num_items": 6}, 64, "vocab_size=12; must be at least 14"),
        ("induction_heads", {"paths": ("a",)}, 16, "neither paths nor tokenizer"),
        ("phonebook", {}, 64, "seq_len=64"),
        ("phonebook", {"source": "phonebok"}, 64, "Did you mean 'phonebook'"),
    ],
)
def test_a_setting_that_gives_no_example_is_named(name, settings, seq_len, hint):
    values = {"name": name, "source": name} | SMALL[name] | settings
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        tasks.check(DataConfig(**values), (seq_len,))
    assert hint in str(error.value)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_shortest_sequence_that_is_allowed_holds_an_example(name):
    data = data_of(name)
    shortest = tasks.TASKS[name].shortest(data)
    tasks.check(data, (shortest,))
    for seed in range(20):
        batch = tasks.examples(data, 2, shortest, np.random.default_rng(seed))
        assert (batch.targets_BT != IGNORED).any(axis=1).all()
