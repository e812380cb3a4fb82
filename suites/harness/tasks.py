"""Synthetic tasks: sequences that hold an answer, and the places where it is asked for.

An example is one sequence of seq_len tokens; its targets are IGNORED but where the answer is
scored. What a batch holds depends on (seed, step) alone, and what is evaluated on the length alone,
so every family, backend and resumed run sees the same.

selective_copying   "Mamba" (arXiv:2312.00752, sections 3.1 and 4.1, appendix E.1) and "Griffin"
                    (arXiv:2402.19427, section 6.2, appendix H: 16 tokens to copy, length 1024)
induction_heads     the same places; Mamba's and Griffin's models train at length 256
associative_recall  multi-query: "Zoology" (arXiv:2312.04927, section 4 and appendix), and its code,
                    HazyResearch/zoology, zoology/data/multiquery_ar.py
phonebook           "Repeat After Me" (arXiv:2402.01032, section 4), and its code,
                    sjelassi/transformers_ssm_copy, pretrained_exps/data_utils.py
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from implementations.config import choose
from implementations.engine import IGNORED, Batch
from suites.harness.run import DataConfig

Example = tuple[np.ndarray, np.ndarray]  # tokens and targets, [B, T]
HELD_OUT = 0x61657269  # seeds what is evaluated: three numbers, where training has two

POWER = 0.01  # zoology's power_a: queries come soon after their pairs, and seldom late
PHONE_EXAMPLES = 2  # entries of the book repeated before the question
PHONE_DIGITS = 10
FIRST_NAMES = (
    "Ada", "Alan", "Alice", "Amir", "Anna", "Arthur", "Ben", "Carla", "Carol", "Chen", "Clara",
    "Daniel", "David", "Diana", "Dora", "Edgar", "Elena", "Emil", "Emma", "Eric", "Eva",
    "Felix", "Fiona", "Frank", "Grace", "Hana", "Helen", "Henry", "Ida", "Igor", "Irene",
    "Ivan", "Jack", "Jane", "Jonas", "Julia", "Karl", "Kate", "Laura", "Leo", "Lina", "Lucas",
    "Maria", "Mark", "Nina", "Noah", "Olga", "Oscar",
)  # fmt: skip
LAST_NAMES = (
    "Adams", "Allen", "Baker", "Banks", "Bell", "Berg", "Black", "Brown", "Carter", "Clark",
    "Cole", "Cook", "Cruz", "Davis", "Diaz", "Evans", "Fisher", "Ford", "Foster", "Garcia",
    "Gray", "Green", "Hall", "Harris", "Hill", "Hunt", "Jones", "Kelly", "Kim", "King", "Klein",
    "Lee", "Lopez", "Meyer", "Miller", "Moore", "Nguyen", "Novak", "Owens", "Park", "Price",
    "Reed", "Rossi", "Silva", "Smith", "Stone", "Ward", "Young",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    examples: Callable[[np.random.Generator, int, int, DataConfig], Example]
    shortest: Callable[[DataConfig], int]  # sequence that holds an example
    least_vocab: Callable[[DataConfig], int]
    has_items: bool = True  # data.num_items says how much an example asks for


def is_task(data: DataConfig) -> bool:
    return data.source in TASKS


def check(data: DataConfig, seq_lens: tuple[int, ...] = ()) -> None:
    """ValueError, in one line, for settings or lengths that give no example."""
    where = f"data {data.name!r}"
    choose("source", data.source, tuple(TASKS), where)
    task = TASKS[data.source]
    if data.paths or data.tokenizer is not None:
        raise ValueError(f"{where}: a task takes neither paths nor tokenizer.")
    if task.has_items != (data.num_items > 0):
        wanted = "must be at least 1" if task.has_items else "must be 0, for this task has one"
        raise ValueError(f"{where}: num_items={data.num_items}; {wanted}.")
    if data.vocab_size < task.least_vocab(data):
        raise ValueError(
            f"{where}: vocab_size={data.vocab_size}; must be at least {task.least_vocab(data)}."
        )
    for seq_len in seq_lens:
        if seq_len < task.shortest(data):
            raise ValueError(
                f"{where}: seq_len={seq_len}; an example needs at least {task.shortest(data)}."
            )


def batches(
    data: DataConfig, *, batch_size: int, seq_len: int, seed: int, start_step: int = 0
) -> Iterator[Batch]:
    """Examples to train on, without end; batch i depends on (seed, i) alone."""
    step = start_step
    while True:
        yield examples(data, batch_size, seq_len, np.random.default_rng((seed, step)))
        step += 1


def held_out(data: DataConfig, *, num_examples: int, seq_len: int) -> Batch:
    """Examples to evaluate on: of one length always the same, whatever the seed of the run."""
    rng = np.random.default_rng((HELD_OUT, seq_len, HELD_OUT))
    return examples(data, num_examples, seq_len, rng)


def examples(data: DataConfig, num: int, seq_len: int, rng: np.random.Generator) -> Batch:
    tokens_BT, targets_BT = TASKS[data.source].examples(rng, num, seq_len, data)
    position_BT = np.tile(np.arange(seq_len, dtype=np.int32), (num, 1))
    return Batch(tokens_BT.astype(np.int32), targets_BT.astype(np.int32), position_BT)


# The tasks --------------------------------------------------------------------------------------


def selective_copying(rng: np.random.Generator, B: int, T: int, data: DataConfig) -> Example:
    """num_items tokens at random places among noise; at the end as many markers, at which the
    model gives the tokens back, in their order.

        0 0 3 0 1 0 0 2 | 4 4 4        (noise 0, marker 4)
                          3 1 2

    Of T positions the last num_items are the markers. Mamba's vocabulary of 16 has the noise among
    them; the marker is the 17th. Neither paper prints its layout: this is that of the copying task
    on which Mamba's is built (state-spaces/s4).
    """
    marker, length = data.vocab_size - 1, T - data.num_items
    items = rng.integers(1, marker, (B, data.num_items))
    tokens_BT = np.zeros((B, T), np.int64)
    np.put_along_axis(tokens_BT, np.sort(_places(rng, B, length, data.num_items)), items, axis=1)
    tokens_BT[:, length:] = marker
    targets_BT = np.full((B, T), IGNORED)
    targets_BT[:, length:] = items
    return tokens_BT, targets_BT


def induction_heads(rng: np.random.Generator, B: int, T: int, data: DataConfig) -> Example:
    """A special token at a random place of random ones, and again at the end, where the model
    names the token that followed it.

        1 3 S 2 0 3 1 S        (special S)
                      2
    """
    special = data.vocab_size - 1
    tokens_BT = rng.integers(special, size=(B, T))
    place_B = rng.integers(T - 2, size=B)
    tokens_BT[np.arange(B), place_B] = special
    tokens_BT[:, -1] = special
    targets_BT = np.full((B, T), IGNORED)
    targets_BT[:, -1] = tokens_BT[np.arange(B), place_B + 1]
    return tokens_BT, targets_BT


def associative_recall(rng: np.random.Generator, B: int, T: int, data: DataConfig) -> Example:
    """num_items pairs of key and value, then each key once more, at which the model names its
    value. Other places are random tokens.

        2 8 4 7 . . 4 . . . . . 2 . . .
                    7           8

    Keys are of the lower half of the vocabulary (0 left out), values of the upper one, both
    without repetition. Keys come back at even distances after the pairs, drawn without replacement
    with zoology's power law.
    """
    half, num = data.vocab_size // 2, data.num_items
    keys = 1 + _places(rng, B, half - 1, num)
    values = half + _places(rng, B, data.vocab_size - half, num)
    start = 2 * num
    gaps = np.arange(1, (T - start) // 2 + 1)
    # the largest of log p plus Gumbel noise are draws without replacement, in their order
    score = rng.gumbel(size=(B, len(gaps))) + (POWER - 1) * np.log(gaps)
    place_BK = start + 2 * np.argsort(-score, axis=1)[:, :num]

    tokens_BT = rng.integers(data.vocab_size, size=(B, T))
    tokens_BT[:, 0:start:2], tokens_BT[:, 1:start:2] = keys, values
    np.put_along_axis(tokens_BT, place_BK, keys, axis=1)
    targets_BT = np.full((B, T), IGNORED)
    np.put_along_axis(targets_BT, place_BK, values, axis=1)
    return tokens_BT, targets_BT


def phonebook(rng: np.random.Generator, B: int, T: int, data: DataConfig) -> Example:
    """A book in bytes, as many entries as fit; two of them as examples; a name of another, and its
    number, of which the digits are scored.

        Ada Reed: 6190324477      <- an entry a line, its first digit 6 to 9
        ...
                                  <- an empty line
        Olga Kim: 7730019246      <- two of the entries
        Jack Hall: 9041177352
                                  <- an empty line
        Ada Reed: 6190324477

    Given the digits before it each digit is predicted, so all ten are right exactly where greedy
    decoding gives the number. Names are of our own lists (the paper's are drawn from a package,
    `names`), no name twice. Newlines fill up what is left of T.
    """
    tokens_BT = np.full((B, T), ord("\n"))
    targets_BT = np.full((B, T), IGNORED)
    for row in range(B):
        text = _book(rng, T + 1)  # of which the last digit is a target alone
        tokens_BT[row, : len(text) - 1] = text[:-1]
        answer = slice(len(text) - 1 - PHONE_DIGITS, len(text) - 1)
        targets_BT[row, answer] = text[-PHONE_DIGITS:]
    return tokens_BT, targets_BT


def _book(rng: np.random.Generator, most: int) -> np.ndarray:
    """The bytes of one phonebook with its question and answer, `most` of them at most."""
    most_entries = min(len(FIRST_NAMES) * len(LAST_NAMES), most // _ENTRY[0])
    names = rng.permutation(len(FIRST_NAMES) * len(LAST_NAMES))[:most_entries]
    digits = rng.integers(10, size=(most_entries, PHONE_DIGITS))
    digits[:, 0] = rng.integers(6, 10, most_entries)
    entries = []
    for name, number in zip(names, digits, strict=True):
        first, last = divmod(int(name), len(LAST_NAMES))
        number = "".join(map(str, number))
        entries.append(f"{FIRST_NAMES[first]} {LAST_NAMES[last]}: {number}")
    # what is repeated of the first entries; they stand anywhere in the book
    repeated = sum(len(entry) + 1 for entry in entries[: PHONE_EXAMPLES + 1]) + 1
    lengths = np.cumsum([len(entry) + 1 for entry in entries])
    kept = entries[: np.searchsorted(lengths, most - repeated, side="right")]
    assert len(kept) > PHONE_EXAMPLES, (most, len(kept))
    book = "\n".join(kept[i] for i in rng.permutation(len(kept)))
    *shown, asked = kept[: PHONE_EXAMPLES + 1]
    text = "\n".join([book, "", *shown, "", asked])
    return np.frombuffer(text.encode(), np.uint8)


# Bytes of the shortest and the longest line.
_ENTRY = tuple(
    of(map(len, FIRST_NAMES)) + of(map(len, LAST_NAMES)) + len(" : \n") + PHONE_DIGITS
    for of in (min, max)
)


def _places(rng: np.random.Generator, B: int, size: int, num: int) -> np.ndarray:
    """num of the numbers below size, none twice, in random order, [B, num]."""
    return np.argsort(rng.random((B, size)), axis=1)[:, :num]


TASKS = {
    "selective_copying": Task(selective_copying, lambda data: 2 * data.num_items, lambda data: 3),
    "induction_heads": Task(induction_heads, lambda data: 3, lambda data: 2, has_items=False),
    "associative_recall": Task(
        associative_recall, lambda data: 4 * data.num_items, lambda data: 2 * data.num_items + 2
    ),
    "phonebook": Task(
        phonebook,
        lambda data: 2 * (PHONE_EXAMPLES + 1) * _ENTRY[1] + 1,
        lambda data: 128,
        has_items=False,
    ),
}
