"""The batches of a run: real text cached as tokens, cut the same way for every backend and resume.

A corpus is extracted once into `<cache>/<source>-<key>/`, where the key hashes the settings, the
files and the versions that its text depends on. Shards are written atomically beside it, so an
interrupted extraction goes on where it stopped, and the finished folder appears by one rename:
processes that extract at once do the work twice, never harm each other.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from implementations.engine import IGNORED, Batch
from suites.harness import corpora
from suites.harness.run import DataConfig

VERSION = 1  # of the cached layout and of the extraction; raise it when either changes
SPLITS = ("train", "held_out")
NUM_RANDOM_TOKENS = {"train": 1 << 20, "held_out": 1 << 16}
HASH_BLOCK = 1 << 22  # tokens read at once

Progress = Callable[[int, int], None]  # (done, total), bytes of source or tokens


@dataclass(frozen=True)
class Corpus:
    """Tokens [N] of both splits, on disk, and where their documents start (ascending, from 0)."""

    name: str
    train_tokens: np.ndarray
    train_starts: np.ndarray
    held_out_tokens: np.ndarray
    held_out_starts: np.ndarray
    vocab_size: int
    digest: str  # of tokens and document starts, whatever their dtype on disk
    bytes_per_token: float | None  # held-out text; None where only tokens are known
    unigram_bits_per_byte: float | None  # entropy of the held-out text's own byte frequencies


def random_tokens(batch_size: int, seq_len: int, *, vocab_size: int, seed: int) -> np.ndarray:
    """Uniform tokens [B, T], int32: prompts and batches of timing runs."""
    rng = np.random.default_rng(seed)
    return rng.integers(vocab_size, size=(batch_size, seq_len), dtype=np.int32)


def default_cache() -> Path:
    """$AERIE_CACHE, or ~/.cache/aerie."""
    return Path(os.environ.get("AERIE_CACHE") or Path.home() / ".cache" / "aerie")


def open_corpus(data: DataConfig, cache: Path | None = None) -> Corpus:
    """The cached corpus; extracted first, in this process, when there is none."""
    return prepare(data, cache, workers=1)


def prepare(
    data: DataConfig,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Extract and tokenize once, in `workers` processes (default: one a core), then open."""
    corpora.check(data)
    if data.source == "random":
        return _random_corpus(data)
    cache = default_cache() if cache is None else Path(cache)
    folder = cache / f"{data.source}-{_key(data)}"
    if not (folder / "corpus.json").exists():
        try:
            _extract(data, folder, workers or _num_cores(), progress)
        except FileNotFoundError:
            # Another process finished first and removed the shards that both were writing.
            if not (folder / "corpus.json").exists():
                raise
    return _load(data, folder)


def batches(
    corpus: Corpus, *, batch_size: int, seq_len: int, seed: int, start_step: int = 0
) -> Iterator[Batch]:
    """Random windows of the train split, without end; batch i depends on (seed, i) alone."""
    tokens, starts = corpus.train_tokens, corpus.train_starts
    last = _last_window(corpus, "train", seq_len)
    step = start_step
    while True:
        rng = np.random.default_rng((seed, step))
        yield _windows(tokens, starts, rng.integers(last + 1, size=batch_size), seq_len)
        step += 1


def held_out_batches(
    corpus: Corpus, *, batch_size: int, seq_len: int, num_batches: int | None = None
) -> Iterator[Batch]:
    """Windows spread evenly over the held-out split, no target in two of them; the same for all.

    Whole batches only, and fewer than num_batches where the text ends; None: as many as there are.
    """
    return _spread(corpus, "held_out", batch_size, seq_len, num_batches)


def train_sample(
    corpus: Corpus, *, batch_size: int, seq_len: int, num_batches: int
) -> Iterator[Batch]:
    """The same of the train split: as much text as a run of so many steps sees, no byte twice."""
    num_windows = _last_window(corpus, "train", seq_len) // seq_len + 1
    return _spread(corpus, "train", min(batch_size, num_windows), seq_len, num_batches)


def batch_digest(stream: Iterable[Batch], num_batches: int = 8) -> str:
    """Hash of the first batches of a stream: equal digests, equal data in equal order."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in islice(stream, num_batches):
        for array in (batch.tokens_BT, batch.targets_BT, batch.position_BT):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array, "<i4"))
    return digest.hexdigest()


# Batches ----------------------------------------------------------------------------------------


def _spread(
    corpus: Corpus, split: str, batch_size: int, seq_len: int, num_batches: int | None
) -> Iterator[Batch]:
    last = _last_window(corpus, split, seq_len)
    num_windows = last // seq_len + 1
    whole = num_windows // batch_size
    num_batches = whole if num_batches is None else min(num_batches, whole)
    if num_batches < 1:
        raise ValueError(
            f"data {corpus.name!r}: the {split.replace('_', '-')} split has {num_windows} windows "
            f"of seq_len={seq_len}, fewer than batch_size={batch_size}; lower one of them."
        )
    tokens, starts = (getattr(corpus, f"{split}_{name}") for name in ("tokens", "starts"))
    chosen = np.arange(num_batches * batch_size) * num_windows // (num_batches * batch_size)
    for window_B in chosen.reshape(num_batches, batch_size):
        yield _windows(tokens, starts, window_B * seq_len, seq_len)


def _last_window(corpus: Corpus, split: str, seq_len: int) -> int:
    """Where the last whole window of seq_len + 1 tokens begins."""
    num_tokens = len(getattr(corpus, f"{split}_tokens"))
    if seq_len < 1 or num_tokens < seq_len + 1:
        raise ValueError(
            f"data {corpus.name!r}: seq_len={seq_len}; must be between 1 and {num_tokens - 1}, "
            f"for the {split.replace('_', '-')} split has {num_tokens} tokens."
        )
    return num_tokens - seq_len - 1


def _windows(tokens: np.ndarray, starts: np.ndarray, first_B: np.ndarray, seq_len: int) -> Batch:
    """Windows of seq_len + 1 tokens; position 0 at their beginning and at document starts."""
    index_BT = first_B[:, None] + np.arange(seq_len + 1)
    token_BT = np.stack([tokens[first : first + seq_len + 1] for first in first_B])
    token_BT = token_BT.astype(np.int32)
    document_BT = np.searchsorted(starts, index_BT, side="right") - 1
    start_BT = np.maximum(starts[document_BT], first_B[:, None])
    is_same_BT = document_BT[:, 1:] == document_BT[:, :-1]
    return Batch(
        tokens_BT=np.ascontiguousarray(token_BT[:, :-1]),
        targets_BT=np.where(is_same_BT, token_BT[:, 1:], np.int32(IGNORED)),
        position_BT=(index_BT - start_BT)[:, :-1].astype(np.int32),
    )


# The cache --------------------------------------------------------------------------------------


def _key(data: DataConfig) -> str:
    values = {k: v for k, v in asdict(data).items() if k not in ("name", "paths", "tokenizer")}
    text = json.dumps([VERSION, values, corpora.fingerprint(data)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _extract(data: DataConfig, folder: Path, workers: int, progress: Progress | None) -> None:
    """Publish `folder`: every shard, then both splits in order, then one rename."""
    work = folder.with_name(f"{folder.name}.shards")
    work.mkdir(parents=True, exist_ok=True)
    building = work / f"building-{uuid.uuid4().hex[:8]}"
    if data.source == "tokens" and len(files := corpora.find_files(data)) == 1:
        splits = _splits_in_place(files[0][1], data, progress)
        building.mkdir()
        for split in SPLITS:
            _save(building / f"{split}_starts.npy", np.zeros(1, np.int64))
        summary = {"byte_counts": None, "dtype": None, "splits": splits}
    else:
        shards = corpora.plan_shards(data)
        _write_shards(shards, data, work, workers, progress)
        building.mkdir()
        summary = _assemble(shards, data, work, building)
    summary["digest"] = _content_digest(summary, data, building)
    with (building / "corpus.json").open("w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1)
        _sync(file)
    try:
        building.rename(folder)
    except OSError:
        if not (folder / "corpus.json").exists():
            raise
    shutil.rmtree(work, ignore_errors=True)


def _write_shards(
    shards: list[corpora.Shard],
    data: DataConfig,
    work: Path,
    workers: int,
    progress: Progress | None,
) -> None:
    """Those shards that are not there yet; progress counts the others as done."""
    paths = [work / f"{i:06d}.npz" for i in range(len(shards))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    total = sum(shard.size for shard in shards)
    done = total - sum(shards[i].size for i in missing)

    def advance(i: int | None = None) -> None:
        nonlocal done
        done += 0 if i is None else shards[i].size
        if progress is not None:
            progress(done, total)

    advance()
    if workers == 1 or len(missing) < 2:
        for i in missing:
            _write_shard(shards[i], data, paths[i])
            advance(i)
        return
    # Imported here: a run whose corpus is there need not wait for them.
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    # Spawned, not forked: the caller may hold a framework with threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing)), context, _start_worker) as pool:
        jobs = {pool.submit(_write_shard, shards[i], data, paths[i]): i for i in missing}
        try:
            for job in as_completed(jobs):
                job.result()
                advance(jobs[job])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _write_shard(shard: corpora.Shard, data: DataConfig, path: Path) -> None:
    extract = corpora.read_shard(shard, data)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("wb") as file:
        np.savez(file, **vars(extract))
        _sync(file)
    temporary.replace(path)


def _assemble(
    shards: list[corpora.Shard], data: DataConfig, work: Path, building: Path
) -> dict[str, Any]:
    """Shards in order into one file of tokens a split; equal docstrings are kept once."""
    seen: set[bytes] | None = set() if data.source == "docstrings" else None
    byte_counts = np.zeros(256, np.int64)
    splits = {}
    for split in SPLITS:
        starts: list[int] = []
        num_tokens = 0
        begins = True
        with (building / f"{split}.bin").open("wb") as file:
            for i, shard in enumerate(shards):
                if shard.is_held_out != (split == "held_out"):
                    continue
                with np.load(work / f"{i:06d}.npz") as arrays:
                    extract = corpora.Extract(**arrays)
                ends = np.cumsum(extract.lengths)
                is_kept = _is_new(extract, ends, seen)
                for keep, begin, length in zip(
                    is_kept, extract.begins, extract.lengths.tolist(), strict=True
                ):
                    begins = begins or bool(begin)
                    if keep:
                        if begins:
                            starts.append(num_tokens)
                        num_tokens += length
                        begins = False
                file.write(extract.tokens[np.repeat(is_kept, extract.lengths)].data)
                if len(extract.text):
                    kept = extract.text[np.repeat(is_kept, extract.text_lengths)]
                    byte_counts += np.bincount(kept, minlength=256)
            _sync(file)
        if not num_tokens:
            raise corpora.empty_split(split.replace("_", "-"), data)
        _save(building / f"{split}_starts.npy", np.array(starts, np.int64))
        splits[split] = {"path": f"{split}.bin", "start": 0, "stop": num_tokens}
    return {
        "byte_counts": byte_counts.tolist() if byte_counts.any() else None,
        "dtype": str(corpora.token_dtype(data.vocab_size)),
        "splits": splits,
    }


def _is_new(extract: corpora.Extract, ends: np.ndarray, seen: set[bytes] | None) -> np.ndarray:
    """[texts] which to keep: the ones with tokens and, given `seen`, only the first of equals."""
    is_kept = extract.lengths > 0
    if seen is not None:
        for i, (end, length) in enumerate(zip(ends, extract.lengths, strict=True)):
            text = hashlib.blake2b(extract.tokens[end - length : end], digest_size=16).digest()
            is_kept[i] &= text not in seen
            seen.add(text)
    return is_kept


def _splits_in_place(
    path: str, data: DataConfig, progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """One file of tokens is checked and read where it lies: it may be larger than the cache."""
    tokens = corpora.open_tokens(path, data)
    for start in range(0, len(tokens), HASH_BLOCK):
        block = np.asarray(tokens[start : start + HASH_BLOCK])
        corpora.check_tokens(block, start, path, data)
        if progress is not None:
            progress(start + len(block), len(tokens))
    cut = int(len(tokens) * (1 - data.held_out_fraction))
    ranges = {"train": (0, cut), "held_out": (cut, len(tokens))}
    for split, (start, stop) in ranges.items():
        if start == stop:
            raise corpora.empty_split(split.replace("_", "-"), data)
    return {
        split: {"path": path, "start": start, "stop": stop}
        for split, (start, stop) in ranges.items()
    }


def _load(data: DataConfig, folder: Path) -> Corpus:
    summary = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    arrays = _arrays(summary, data, folder)
    counts = summary["byte_counts"]
    return Corpus(
        name=data.name,
        **arrays,
        vocab_size=data.vocab_size,
        digest=summary["digest"],
        bytes_per_token=None if counts is None else sum(counts) / len(arrays["held_out_tokens"]),
        unigram_bits_per_byte=None if counts is None else _entropy(np.array(counts)),
    )


def _arrays(summary: dict[str, Any], data: DataConfig, folder: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for split, place in summary["splits"].items():
        if summary["dtype"] is None:
            tokens = corpora.open_tokens(place["path"], data)
        else:
            tokens = np.memmap(folder / place["path"], summary["dtype"], mode="r")
        arrays[f"{split}_tokens"] = tokens[place["start"] : place["stop"]]
        arrays[f"{split}_starts"] = np.load(folder / f"{split}_starts.npy")
    return arrays


def _content_digest(summary: dict[str, Any], data: DataConfig, folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(_arrays(summary, data, folder).items()):
        digest.update(f"{name} {len(array)}\n".encode())
        for start in range(0, len(array), HASH_BLOCK):
            digest.update(np.ascontiguousarray(array[start : start + HASH_BLOCK], "<i8"))
    return digest.hexdigest()


def _entropy(counts: np.ndarray) -> float:
    """Bits per symbol of the frequencies."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _random_corpus(data: DataConfig) -> Corpus:
    """Uniform tokens, one document a split: for timing, where text would only cost."""
    values: dict[str, np.ndarray] = {}
    digest = hashlib.blake2b(f"random {VERSION} {data.vocab_size}".encode(), digest_size=16)
    for seed, (split, num_tokens) in enumerate(NUM_RANDOM_TOKENS.items()):
        tokens = random_tokens(1, num_tokens, vocab_size=data.vocab_size, seed=seed)[0]
        values |= {f"{split}_tokens": tokens, f"{split}_starts": np.zeros(1, np.int64)}
        digest.update(np.ascontiguousarray(tokens, "<i4"))
    return Corpus(
        name=data.name,
        **values,
        vocab_size=data.vocab_size,
        digest=digest.hexdigest(),
        bytes_per_token=None,
        unigram_bits_per_byte=None,
    )


def _num_cores() -> int:
    """Cores that this process may use; macOS knows only how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
