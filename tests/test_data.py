"""Corpora and batches: the same for every backend, process and resume; bad input is one line."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from implementations.config import build
from implementations.engine import IGNORED
from suites.harness import corpora, tasks
from suites.harness import data as harness_data
from suites.harness.data import (
    batch_digest,
    batches,
    held_out_batches,
    open_corpus,
    prepare,
    random_tokens,
    train_sample,
)
from suites.harness.run import DataConfig


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three text files of 400 numbered lines each; one more that is binary, one hidden."""
    folder = tmp_path / "books"
    folder.mkdir()
    for name in "abc":
        lines = [f"{name} {i} is a line of text\n" for i in range(400)]
        (folder / f"{name}.txt").write_text("".join(lines))
    (folder / "picture").write_bytes(b"PNG\0\0")
    (folder / ".hidden").write_text("not to be read")
    return folder


def text_of(paths, **settings) -> DataConfig:
    values = {"name": "mine", "source": "text", "paths": [str(path) for path in paths]}
    return build(DataConfig, values | settings, "data")


def documents(tokens, starts) -> list[bytes]:
    bounds = [*starts.tolist(), len(tokens)]
    return [bytes(tokens[a:b]) for a, b in pairwise(bounds)]


@contextmanager
def refused(message):
    """ValueError that says `message`, in one line."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        yield
    assert "\n" not in str(error.value)


# Batches


def test_a_window_resets_at_document_starts(cache, tmp_path):
    lines = ["abc", "d", "efghij", "kl"] * 40
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    corpus = open_corpus(text_of([path], source="jsonl"), cache)
    B, T = 5, 30
    stream = batches(corpus, batch_size=B, seq_len=T, seed=0)
    train = bytes(corpus.train_tokens)
    starts = set(corpus.train_starts.tolist())
    for batch in islice(stream, 4):
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == batch.position_BT.dtype == "int32"
        assert batch.tokens_BT.shape == batch.targets_BT.shape == batch.position_BT.shape == (B, T)
        for row in range(B):
            window = bytes(batch.tokens_BT[row].astype(np.uint8))
            firsts = [m.start() for m in re.finditer(f"(?={window.decode()})", train.decode())]
            assert any(
                (batch.position_BT[row] == positions(first, T, starts)).all()
                and (batch.targets_BT[row] == targets(train, first, T, starts)).all()
                for first in firsts
            )
    assert (batch.targets_BT == IGNORED).any()


def positions(first, T, starts) -> list[int]:
    found, position = [], 0
    for index in range(first, first + T):
        position = 0 if index in starts else position
        found.append(position)
        position += 1
    return found


def targets(train, first, T, starts) -> list[int]:
    return [IGNORED if i + 1 in starts else train[i + 1] for i in range(first, first + T)]


def test_a_stream_resumes_at_any_step(cache, folder):
    corpus = open_corpus(text_of([folder]), cache)
    whole = list(islice(batches(corpus, batch_size=3, seq_len=16, seed=7), 6))
    resumed = list(islice(batches(corpus, batch_size=3, seq_len=16, seed=7, start_step=4), 2))
    assert batch_digest(whole[4:]) == batch_digest(resumed)
    assert batch_digest(whole[:2]) != batch_digest(resumed)
    other = batches(corpus, batch_size=3, seq_len=16, seed=8)
    assert batch_digest(whole, 6) != batch_digest(other, 6)


def test_held_out_windows_never_overlap_and_need_no_seed(cache, folder):
    corpus = open_corpus(text_of([folder], held_out_fraction=0.2), cache)
    T = 50
    every = list(held_out_batches(corpus, batch_size=1, seq_len=T))
    num_targets = sum(batch.targets_BT.size for batch in every)
    assert len(corpus.held_out_tokens) - T <= num_targets < len(corpus.held_out_tokens)
    rows = np.concatenate([batch.tokens_BT for batch in every])
    assert (rows.ravel() == corpus.held_out_tokens[: rows.size]).all()

    few = list(held_out_batches(corpus, batch_size=2, seq_len=T, num_batches=3))
    assert len(few) == 3
    assert batch_digest(few) == batch_digest(
        held_out_batches(corpus, batch_size=2, seq_len=T, num_batches=3)
    )
    last = bytes(few[-1].tokens_BT[-1].astype(np.uint8))
    held_out = bytes(corpus.held_out_tokens)
    assert held_out.index(last) > len(held_out) * 2 // 3  # spread over all of the text


def test_a_sample_of_the_train_split_has_no_byte_twice(cache, folder):
    corpus = open_corpus(text_of([folder]), cache)
    few = list(train_sample(corpus, batch_size=2, seq_len=64, num_batches=5))
    assert [batch.tokens_BT.shape for batch in few] == [(2, 64)] * 5
    train = bytes(corpus.train_tokens.astype(np.uint8))
    rows = [bytes(row.astype(np.uint8)) for batch in few for row in batch.tokens_BT]
    places = [train.index(row) for row in rows]  # lines are numbered: each is there once
    assert np.diff(places).min() >= 64
    assert places[-1] > len(train) * 2 // 3
    every = list(train_sample(corpus, batch_size=4, seq_len=64, num_batches=10**9))
    assert len(train) - 5 * 64 < sum(batch.tokens_BT.size for batch in every) <= len(train)
    (whole,) = train_sample(corpus, batch_size=8, seq_len=len(train) - 1, num_batches=3)
    assert whole.tokens_BT.shape == (1, len(train) - 1)


def test_too_long_a_sequence_is_named(cache, folder):
    corpus = open_corpus(text_of([folder]), cache)
    with refused("seq_len=1000000; must be between 1 and"):
        next(batches(corpus, batch_size=1, seq_len=10**6, seed=0))
    with refused("fewer than batch_size=1000000"):
        next(held_out_batches(corpus, batch_size=10**6, seq_len=8))


def test_random_tokens_depend_on_the_seed_alone():
    tokens = random_tokens(4, 64, vocab_size=10, seed=1)
    assert tokens.dtype == np.int32
    assert tokens.shape == (4, 64)
    assert set(tokens.ravel().tolist()) == set(range(10))
    assert (tokens == random_tokens(4, 64, vocab_size=10, seed=1)).all()
    assert (tokens != random_tokens(4, 64, vocab_size=10, seed=2)).any()
    corpus = open_corpus(DataConfig(name="random", source="random", vocab_size=1000))
    assert corpus.train_tokens.max() == 999
    assert corpus.bytes_per_token is None


# Sources


def test_stdlib_is_split_by_file_and_opened_from_the_cache(cache, monkeypatch):
    data = DataConfig(name="stdlib", source="stdlib")
    root = Path(os.__file__).parent
    names = ["os.py", "json/__init__.py", *(f"{x}.py" for x in ("ast", "abc", "re/_parser"))]
    monkeypatch.setattr(corpora, "NUM_FILES_TO_HASH", 2)
    monkeypatch.setattr(
        corpora, "_python_files", lambda _: ((name, str(root / name)) for name in names)
    )
    monkeypatch.setattr(corpora, "_hash_fraction", lambda name: 0.0 if name == "os.py" else 0.5)
    corpus = open_corpus(data, cache)
    kept = documents(corpus.train_tokens, corpus.train_starts)
    assert kept == [(root / name).read_bytes() for name in sorted(names) if name != "os.py"]
    assert bytes(corpus.held_out_tokens) == (root / "os.py").read_bytes()
    assert corpus.bytes_per_token == 1.0
    counts = np.bincount(corpus.held_out_tokens)
    share = counts[counts > 0] / counts.sum()
    assert math.isclose(corpus.unigram_bits_per_byte, -(share * np.log2(share)).sum())

    monkeypatch.setattr(corpora, "read_shard", None)  # a second extraction would call it
    assert open_corpus(data, cache).digest == corpus.digest


def test_the_standard_library_is_large_and_names_decide_its_split():
    files = corpora.find_files(DataConfig(name="stdlib", source="stdlib"))
    names = [name for name, _ in files]
    assert names == sorted(names)
    assert len(names) > corpora.NUM_FILES_TO_HASH
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name for name in names)
    fractions = [corpora._hash_fraction(name) for name in names]
    assert 0.02 < np.mean(np.array(fractions) < 0.05) < 0.09
    assert corpora._hash_fraction("os.py") == 0.943812766417913  # on every machine


def test_docstrings_are_long_unique_and_one_document_a_file(cache, tmp_path, monkeypatch):
    long = "Prose that goes on and on, " * 4
    sources = {
        "one.py": f'"""{long}one."""\ndef f():\n    """{long}shared."""\n    """not it"""\n',
        "three.py": f'class C:\n    """{long}shared."""\n    def f(self):\n        """short"""\n',
        "two.py": f'def f():\n    """{long}two.\n\n    Indented."""\n',
        "zero.py": f'"""{long}one."""\nclass C:\n    def f(self):\n        """{long}zero."""\n'
        f'def g():\n    """{long}last."""\n',
        "broken.py": f'def f(:\n    """{long}"""\n',
    }
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    files = [(f"pkg/{name}", str(tmp_path / name)) for name in sorted(sources)]
    monkeypatch.setattr(corpora, "find_files", lambda data: files)
    monkeypatch.setattr(corpora, "NUM_FILES_TO_HASH", 2)
    monkeypatch.setattr(corpora, "_hash_fraction", lambda name: 0.01 if "three" in name else 0.5)
    with pytest.raises(ValueError, match="nothing is left for the held-out split"):
        open_corpus(DataConfig(name="d", source="docstrings"), cache)  # its one docstring is old

    monkeypatch.setattr(corpora, "_hash_fraction", lambda name: 0.01 if "two" in name else 0.5)
    corpus = open_corpus(DataConfig(name="d", source="docstrings"), cache / "again")
    assert documents(corpus.train_tokens, corpus.train_starts) == [
        f"{long}one.\n\n{long}shared.\n\n".encode(),
        f"{long}zero.\n\n{long}last.\n\n".encode(),  # its first docstring is that of one.py
    ]
    assert bytes(corpus.held_out_tokens) == f"{long}two.\n\nIndented.\n\n".encode()


def test_text_files_keep_their_tail_apart(cache, folder):
    corpus = open_corpus(text_of([folder], held_out_fraction=0.1), cache)
    train = documents(corpus.train_tokens, corpus.train_starts)
    held_out = documents(corpus.held_out_tokens, corpus.held_out_starts)
    files = [(folder / f"{name}.txt").read_bytes() for name in "abc"]
    assert [a + b for a, b in zip(train, held_out, strict=True)] == files
    assert all(part.endswith(b"text\n") for part in train)
    for whole, part in zip(files, held_out, strict=True):
        assert 0.1 <= len(part) / len(whole) < 0.11

    same = open_corpus(text_of([folder / "*.txt"], held_out_fraction=0.1), cache)
    one_by_one = [folder / f"{name}.txt" for name in "cab"]
    assert same.digest == corpus.digest
    assert open_corpus(text_of(one_by_one, held_out_fraction=0.1), cache).digest == corpus.digest


def test_text_is_read_again_when_it_changes(cache, folder):
    before = open_corpus(text_of([folder]), cache)
    with (folder / "b.txt").open("a") as file:
        file.write("one more line\n")
    after = open_corpus(text_of([folder]), cache)
    assert before.digest != after.digest
    assert bytes(after.held_out_tokens).count(b"one more line") == 1


def test_a_long_file_is_cut_between_characters_and_stays_one_document(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "SHARD_SIZE", 1000)
    text = "\N{SNOWMAN}" * 4000  # 12,000 bytes without a line end
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    data = text_of([tmp_path / "x.txt"])
    shards = corpora.plan_shards(data)
    assert len(shards) > 10
    for shard in shards:
        bytes(corpora.read_shard(shard, data).tokens).decode("utf-8")
    corpus = open_corpus(data, cache)
    assert corpus.train_starts.tolist() == corpus.held_out_starts.tolist() == [0]
    whole = bytes(corpus.train_tokens) + bytes(corpus.held_out_tokens)
    assert whole.decode("utf-8") == text


@pytest.mark.parametrize("shard_size", [1, 50, 1 << 20])
def test_lines_of_jsonl_are_documents(cache, tmp_path, monkeypatch, shard_size):
    monkeypatch.setattr(corpora, "SHARD_SIZE", shard_size)
    texts = [f"line {i}\nof text" * (i % 3 + 1) for i in range(40)]
    (tmp_path / "x.jsonl").write_text("\n\n".join(json.dumps({"body": t}) for t in texts))
    corpus = open_corpus(text_of([tmp_path], source="jsonl", field="body"), cache)
    found = [
        *documents(corpus.train_tokens, corpus.train_starts),
        *documents(corpus.held_out_tokens, corpus.held_out_starts),
    ]
    assert found == [text.encode() for text in texts]
    assert 1 <= len(corpus.held_out_starts) <= 4


@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_one_file_of_tokens_is_mapped_where_it_lies(cache, tmp_path, suffix):
    tokens = np.random.default_rng(0).integers(5000, size=1000).astype(np.uint16)
    path = tmp_path / f"x.{suffix}"
    np.save(path, tokens) if suffix == "npy" else tokens.tofile(path)
    corpus = open_corpus(text_of([path], source="tokens", vocab_size=5000), cache)
    assert isinstance(corpus.train_tokens, np.memmap)
    assert (np.concatenate([corpus.train_tokens, corpus.held_out_tokens]) == tokens).all()
    assert len(corpus.held_out_tokens) == 50
    assert corpus.vocab_size == 5000
    assert corpus.bytes_per_token is corpus.unigram_bits_per_byte is None
    assert not list(cache.rglob("*.bin"))


def test_several_files_of_tokens_are_documents(cache, tmp_path):
    for name, first in (("a.npy", 0), ("b.npy", 1000)):
        np.save(tmp_path / name, np.arange(first, first + 100))
    corpus = open_corpus(text_of([tmp_path], source="tokens", vocab_size=1100), cache)
    assert corpus.train_tokens.dtype == np.uint16
    assert corpus.train_starts.tolist() == [0, 95]
    assert corpus.train_tokens[94:96].tolist() == [94, 1000]
    assert corpus.held_out_starts.tolist() == [0, 5]


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """A BPE of 300 tokens, trained on the text of `folder`."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([f"{x} 12 is a line of text\n" for x in "abc"], trainer)
    bpe.save(str(tmp_path / "bpe.json"))
    return tmp_path / "bpe.json"


def test_a_tokenizer_file_makes_tokens_and_bytes_per_token(cache, folder, tokenizer):
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(tokenizer))
    V = bpe.get_vocab_size()
    settings = {"tokenizer": str(tokenizer), "vocab_size": V, "held_out_fraction": 0.1}
    corpus = open_corpus(text_of([folder], **settings), cache)
    plain = open_corpus(text_of([folder], held_out_fraction=0.1), cache)
    first = corpus.train_tokens[: corpus.train_starts[1]].tolist()
    text = documents(plain.train_tokens, plain.train_starts)[0].decode()
    assert first == bpe.encode(text, add_special_tokens=False).ids
    ratio = len(plain.held_out_tokens) / len(corpus.held_out_tokens)
    assert corpus.bytes_per_token == ratio > 1.5
    assert corpus.unigram_bits_per_byte == plain.unigram_bits_per_byte


def test_a_tokenizer_needs_its_extra_and_its_vocabulary(cache, folder, tokenizer, monkeypatch):
    corpora.load_tokenizer.cache_clear()
    with refused("tokens; set data.vocab_size="):
        open_corpus(text_of([folder], tokenizer=str(tokenizer)), cache)
    corpora.load_tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with refused("needs the extra hf: pip install 'aerie[hf]'."):
        open_corpus(text_of([folder], tokenizer=str(tokenizer)), cache)


# Wrong requests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "textt"}, "source='textt' is not known; known: stdlib"),
        ({"paths": []}, "paths is empty; name files, folders or globs"),
        ({"source": "stdlib"}, "source='stdlib' takes no paths"),
        ({"held_out_fraction": 1.0}, "held_out_fraction=1.0; must be between 0 and 1."),
        ({"vocab_size": 128}, "vocab_size=128; bytes need 256."),
        ({"tokenizer": "bpe.jsn"}, "no tokenizer file 'bpe.jsn'. Did you mean 'bpe.json'?"),
        ({"tokenizer": "books/a.txt"}, "is not a JSON file of the tokenizers library."),
        ({"token_dtype": "uint17"}, "Did you mean 'uint16'?"),
        ({"paths": ["boks"]}, "no file or folder 'boks'. Did you mean 'books'?"),
        ({"paths": ["boks/a.txt"]}, "no file or folder 'boks/a.txt'. Did you mean 'books/a.txt'?"),
        ({"paths": ["books/a.tx"]}, "Did you mean 'books/a.txt'?"),
        ({"paths": ["books/*.md"]}, "the glob 'books/*.md' matches no file."),
        ({"paths": ["boks/*.txt"]}, "matches no file. Did you mean"),
        ({"paths": ["void"]}, "the folder 'void' holds no text file."),
        ({"paths": ["empty.txt"]}, "nothing is left for the train split"),
        ({"source": "jsonl", "paths": ["one.jsonl"]}, "nothing is left for the held-out split"),
        ({"source": "jsonl", "paths": ["bad.jsonl"]}, "bad.jsonl:3: not JSON"),
        ({"source": "jsonl", "paths": ["key.jsonl"]}, "'text'. Did you mean 'txt'?"),
        ({"source": "tokens", "paths": ["books/a.txt"]}, "a.txt is neither .npy nor .bin."),
        ({"source": "tokens", "paths": ["flat.npy"]}, "tokens are 1-D integers."),
        ({"source": "tokens", "paths": ["odd.bin"]}, "is data.token_dtype=uint16 right?"),
        ({"source": "tokens", "paths": ["big.npy"]}, "token 256 at position 3 is outside"),
        ({"source": "tokens", "paths": ["big.npy", "flat.npy"]}, "are 1-D integers"),
    ],
)
def test_a_wrong_request_is_one_line(cache, folder, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    Path("void").mkdir()
    Path("empty.txt").touch()
    Path("bpe.json").write_text("{}")
    Path("one.jsonl").write_text('{"text": "alone"}\n')
    Path("bad.jsonl").write_text('{"text": "a"}\n\n{"text": \n{"text": "b"}\n')
    Path("key.jsonl").write_text('{"txt": "a"}\n{"txt": "b"}\n')
    Path("odd.bin").write_bytes(b"123")
    np.save("flat.npy", np.zeros((2, 2)))
    np.save("big.npy", np.array([1, 2, 3, 256, 5]))
    with refused(message):
        open_corpus(text_of(**({"paths": [folder]} | settings)), cache)


# Extraction


def test_prepare_in_parallel_equals_one_process(cache, folder, monkeypatch):
    monkeypatch.setattr(corpora, "SHARD_SIZE", 4000)
    seen = []
    parallel = prepare(text_of([folder]), cache, 2, lambda done, total: seen.append((done, total)))
    monkeypatch.undo()
    alone = open_corpus(text_of([folder]), cache / "other")
    assert parallel.digest == alone.digest
    assert seen == sorted(seen)
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == sum(p.stat().st_size for p in folder.glob("*.txt"))
    assert [path.name.count(".shards") for path in cache.glob("text-*")] == [0]


def test_an_interrupted_extraction_goes_on(cache, folder, monkeypatch):
    monkeypatch.setattr(corpora, "SHARD_SIZE", 4000)
    data = text_of([folder])
    read_shard = corpora.read_shard
    calls = []

    def interrupted(shard, data):
        calls.append(shard)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read_shard(shard, data)

    monkeypatch.setattr(corpora, "read_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_corpus(data, cache)
    corpus = open_corpus(data, cache)
    num_shards = len(corpora.plan_shards(data))
    assert len(calls) == num_shards + 1  # only the interrupted shard was read twice
    monkeypatch.setattr(corpora, "read_shard", read_shard)
    assert corpus.digest == open_corpus(data, cache / "whole").digest


@pytest.mark.parametrize("moment", ["_write_shard", "_assemble", "_content_digest"])
def test_a_process_that_comes_second_reads_the_first_ones_work(cache, folder, monkeypatch, moment):
    data = text_of([folder])
    ours = getattr(harness_data, moment)
    rivals = []

    def overtaken(*args):
        monkeypatch.setattr(harness_data, moment, ours)
        rivals.append(open_corpus(data, cache))  # publishes, and removes all shards
        return ours(*args)

    monkeypatch.setattr(harness_data, moment, overtaken)
    corpus = open_corpus(data, cache)
    assert corpus.digest == rivals[0].digest
    assert len(list(cache.iterdir())) == 1


def test_processes_that_start_together_agree(cache, folder):
    code = (
        "import sys; from pathlib import Path\n"
        "from suites.harness.data import open_corpus\n"
        "from suites.harness.run import DataConfig\n"
        "data = DataConfig(name='x', source='text', paths=(sys.argv[1],))\n"
        "print(open_corpus(data, Path(sys.argv[2])).digest)\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(cache)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    digests = [process.communicate(timeout=60)[0].strip() for process in started]
    assert {process.returncode for process in started} == {0}
    assert len(set(digests)) == 1
    assert digests[0]


def test_the_cache_is_where_the_environment_says(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("AERIE_CACHE", str(tmp_path / "here"))
    before = open_corpus(text_of([folder]))
    assert (tmp_path / "here").is_dir()
    shutil.rmtree(tmp_path / "here")
    assert open_corpus(text_of([folder], name="renamed")).digest == before.digest


def test_every_data_config_is_a_data_config():
    import yaml

    found = sorted((Path(__file__).parent.parent / "configs" / "data").glob("*.yaml"))
    assert {path.stem for path in found} >= {"stdlib", "docstrings", "random"}
    for path in found:
        data = build(DataConfig, yaml.safe_load(path.read_text()), path.name)
        assert data.name == path.stem
        if tasks.is_task(data):
            tasks.check(data, (1024,))
        elif data.source in ("text", "jsonl", "tokens"):
            with pytest.raises(ValueError, match="paths is empty"):
                corpora.check(data)
        else:
            corpora.check(data)
