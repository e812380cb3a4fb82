"""Where text comes from: the files of each source, cut into shards, and the reading of one shard.

A shard is some MB of one split, the unit of parallel and resumed work. Files are ordered by name
and, from NUM_FILES_TO_HASH of them, split by the hash of their name; with fewer, the tail of each
file is held out. Sources: `stdlib` and `docstrings` (real text that is on every machine that runs
us), and the user's `text`, `jsonl` and `tokens`.
"""

import ast
import glob
import hashlib
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from implementations.config import choose
from suites.harness.run import DataConfig

SOURCES = ("stdlib", "docstrings", "random", "text", "jsonl", "tokens")
# Dependencies that carry English prose; sympy and networkx arrive with torch.
PACKAGES = ("torch", "scipy", "numpy", "jax", "optax", "pandas", "matplotlib", "sympy", "networkx")
TOKEN_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
SUFFIXES = {"jsonl": (".jsonl",), "tokens": (".npy", ".bin")}  # taken from a folder
NUM_FILES_TO_HASH = 100  # below it, a hash of names splits too unevenly
SHARD_SIZE = 4 << 20  # bytes, or tokens of a token file
MIN_DOCSTRING_LEN = 80  # characters; shorter ones are labels, not prose
MAX_LINE = 1 << 16  # bytes; how far back a cut of plain text looks for a line


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file; elements, for a file of tokens."""

    path: str
    start: int
    stop: int
    is_continued: bool = False  # begins within a document


@dataclass(frozen=True)
class Shard:
    is_held_out: bool
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass(frozen=True)
class Extract:
    """What reading one shard gives: tokens, and how they divide into texts."""

    tokens: np.ndarray
    lengths: np.ndarray  # tokens of each text, int64
    begins: np.ndarray  # whether a text begins a document, bool
    text: np.ndarray  # the bytes of all texts; only of held-out shards, and where text is known
    text_lengths: np.ndarray  # bytes of each text, int64


def title(data: DataConfig) -> str:
    return f"data {data.name!r}"


def check(data: DataConfig) -> None:
    """ValueError, in one line, for settings that cannot give a corpus."""
    choose("source", data.source, SOURCES, title(data))
    choose("token_dtype", data.token_dtype, TOKEN_DTYPES, title(data))
    if not 0 < data.held_out_fraction < 1:
        raise ValueError(
            f"{title(data)}: held_out_fraction={data.held_out_fraction}; must be between 0 and 1."
        )
    takes_paths = data.source in ("text", "jsonl", "tokens")
    if takes_paths and not data.paths:
        raise ValueError(
            f"{title(data)}: paths is empty; name files, folders or globs: data.paths=[notes.txt]."
        )
    if not takes_paths and data.paths:
        raise ValueError(
            f"{title(data)}: source={data.source!r} takes no paths; use text, jsonl or tokens."
        )
    if data.tokenizer is not None:
        if data.source in ("random", "tokens"):
            raise ValueError(f"{title(data)}: source={data.source!r} takes no tokenizer.")
        check_tokenizer(data)
    elif data.source in ("stdlib", "docstrings", "text", "jsonl") and data.vocab_size < 256:
        raise ValueError(f"{title(data)}: vocab_size={data.vocab_size}; bytes need 256.")
    if data.vocab_size < 1:
        raise ValueError(f"{title(data)}: vocab_size={data.vocab_size}; must be at least 1.")


def check_tokenizer(data: DataConfig) -> None:
    num_tokens = load_tokenizer(data.tokenizer, title(data)).get_vocab_size()
    if data.vocab_size < num_tokens:
        raise ValueError(
            f"{title(data)}: vocab_size={data.vocab_size}, but {data.tokenizer} has "
            f"{num_tokens} tokens; set data.vocab_size={num_tokens}."
        )


def fingerprint(data: DataConfig) -> str:
    """Changes with the files that `data` names; cheap, for it is asked whenever text is opened."""
    if data.source == "docstrings":
        lines = [f"{name} {number}" for name, number in _versions().items()]
    else:
        stats = [(name, path, os.stat(path)) for name, path in find_files(data)]
        lines = [f"{name} {path} {stat.st_size} {stat.st_mtime_ns}" for name, path, stat in stats]
    if data.source in ("stdlib", "docstrings"):
        lines.append(sys.version)
    if data.tokenizer is not None:
        lines.append(
            Path(data.tokenizer).expanduser().read_text(encoding="utf-8", errors="replace")
        )
    return _digest(lines)


def find_files(data: DataConfig) -> list[tuple[str, str]]:
    """(name in the corpus, path) of every file, ordered by name."""
    if data.source == "stdlib":
        files = _python_files(sysconfig.get_path("stdlib"))
        return sorted((name, path) for name, path in files if _is_stdlib_text(name))
    if data.source == "docstrings":
        return sorted(
            (f"{package}/{name}", path)
            for package in _versions()
            for root in (find_spec(package).submodule_search_locations or [])
            for name, path in _python_files(root)
        )
    paths = {path for pattern in data.paths for path in _matches(pattern, data)}
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return sorted((os.path.relpath(path, root).replace(os.sep, "/"), path) for path in paths)


def plan_shards(data: DataConfig) -> list[Shard]:
    """All shards: the train split, then the held-out one, each in the order of its files."""
    splits: dict[bool, list[Piece]] = {False: [], True: []}
    files = find_files(data)
    by_hash = len(files) >= NUM_FILES_TO_HASH
    for name, path in files:
        size = _size(path, data)
        if by_hash:
            is_held_out = _hash_fraction(name) < data.held_out_fraction
            splits[is_held_out] += _pieces(path, 0, size, data)
        else:
            cut = _cut(path, 0, size, int(size * (1 - data.held_out_fraction)), data)
            splits[False] += _pieces(path, 0, cut, data)
            splits[True] += _pieces(path, cut, size, data)
    for is_held_out, pieces in splits.items():
        if not pieces:
            split = "held-out" if is_held_out else "train"
            raise empty_split(split, data)
    return [
        Shard(is_held_out, group)
        for is_held_out, pieces in splits.items()
        for group in _groups(pieces)
    ]


def empty_split(split: str, data: DataConfig) -> ValueError:
    return ValueError(
        f"{title(data)}: nothing is left for the {split} split; add text, or change "
        f"data.held_out_fraction={data.held_out_fraction}."
    )


def read_shard(shard: Shard, data: DataConfig) -> Extract:
    """The tokens of one shard; deterministic, so any process may do it, once or twice."""
    if data.source == "tokens":
        read = [(_read_tokens(piece, data), not piece.is_continued) for piece in shard.pieces]
        return _extract(read, [], data)
    reader = {"docstrings": _read_docstrings, "jsonl": _read_lines}.get(data.source, _read_text)
    texts = [text for piece in shard.pieces for text in reader(piece, data) if text[0]]
    if data.tokenizer is None:
        parts = [(np.frombuffer(text, np.uint8), begins) for text, begins in texts]
    else:
        tokenizer = load_tokenizer(data.tokenizer, title(data))
        decoded = [text.decode("utf-8", errors="replace") for text, _ in texts]
        encoded = tokenizer.encode_batch(decoded, add_special_tokens=False)
        parts = [
            (np.array(encoding.ids, np.int64), begins)
            for encoding, (_, begins) in zip(encoded, texts, strict=True)
        ]
    return _extract(parts, [text for text, _ in texts] if shard.is_held_out else [], data)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every token."""
    return np.min_scalar_type(max(vocab_size - 1, 1))


def open_tokens(path: str, data: DataConfig) -> np.ndarray:
    """A user's file of tokens as a memmap [N]: a 1-D .npy, or raw numbers of data.token_dtype."""
    where = f"{title(data)}: {path}"
    if path.endswith(".npy"):
        tokens = np.load(path, mmap_mode="r")
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"{where} holds {tokens.dtype} of shape {tokens.shape}; tokens are 1-D integers."
            )
        return tokens
    dtype = np.dtype(data.token_dtype)
    size = os.path.getsize(path)
    if size % dtype.itemsize:
        raise ValueError(
            f"{where} has {size} bytes, not a multiple of {dtype.itemsize}; is "
            f"data.token_dtype={data.token_dtype} right?"
        )
    return np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)


def check_tokens(tokens: np.ndarray, offset: int, path: str, data: DataConfig) -> None:
    """ValueError naming the first token outside the vocabulary."""
    bad = (tokens < 0) | (tokens >= data.vocab_size)
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"{title(data)}: {path}: token {tokens[first]} at position {offset + first} is outside "
            f"the vocabulary; data.vocab_size={data.vocab_size}."
        )


@lru_cache(maxsize=2)
def load_tokenizer(path: str, where: str) -> Any:
    """A `tokenizers.Tokenizer`, from its JSON file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{where}: no tokenizer file {path!r}.{_suggestion(path)}")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(
            f"{where}: a tokenizer needs the extra hf: pip install 'aerie[hf]'."
        ) from None
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        is_tokenizer = "model" in json.loads(text)
    except (json.JSONDecodeError, TypeError):
        is_tokenizer = False
    if not is_tokenizer:
        raise ValueError(f"{where}: {path} is not a JSON file of the tokenizers library.")
    return Tokenizer.from_str(text)


# Files ------------------------------------------------------------------------------------------


def _python_files(root: str) -> Iterator[tuple[str, str]]:
    """(name relative to root, path) of every .py file, installed packages left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages")]
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                yield os.path.relpath(path, root).replace(os.sep, "/"), path


def _is_stdlib_text(name: str) -> bool:
    """Not what a build or an administrator generates: it differs between machines."""
    return not name.startswith(("_sysconfigdata", "sitecustomize", "config-", "ensurepip/_bundled"))


def _matches(pattern: str, data: DataConfig) -> list[str]:
    """The files that one entry of `paths` stands for, absolute."""
    expanded = os.path.abspath(os.path.expanduser(pattern))
    suffixes = SUFFIXES.get(data.source)
    if os.path.isfile(expanded):
        found = [expanded]
    elif os.path.isdir(expanded):
        found = [path for path in _walk(expanded) if _is_wanted(path, suffixes)]
    elif glob.has_magic(expanded):
        found = [p for p in glob.glob(expanded, recursive=True) if os.path.isfile(p)]
        if not found:
            parent = os.path.dirname(re.split(r"[*?[]", expanded)[0])
            hint = "" if os.path.isdir(parent) else _suggestion(parent)
            raise ValueError(f"{title(data)}: the glob {pattern!r} matches no file.{hint}")
    else:
        raise ValueError(f"{title(data)}: no file or folder {pattern!r}.{_suggestion(pattern)}")
    if not found:
        kinds = "text" if suffixes is None else " or ".join(suffixes)
        raise ValueError(f"{title(data)}: the folder {pattern!r} holds no {kinds} file.")
    if data.source == "tokens" and (odd := [p for p in found if not p.endswith(suffixes)]):
        raise ValueError(f"{title(data)}: {odd[0]} is neither .npy nor .bin.")
    return found


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _is_wanted(path: str, suffixes: tuple[str, ...] | None) -> bool:
    """Of a folder: files with the suffix of their source; text is a file without NUL bytes."""
    if suffixes is not None:
        return path.endswith(suffixes)
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return b"\0" not in file.read(8192)


def _suggestion(path: str) -> str:
    """` Did you mean ...?`, from the neighbours of the first missing part of the path."""
    missing = Path(os.path.expanduser(path))
    rest: list[str] = []
    while not missing.parent.exists():
        rest.insert(0, missing.name)
        missing = missing.parent
    if missing.exists() or not missing.parent.is_dir():
        return ""
    neighbours = [entry.name for entry in os.scandir(missing.parent)]
    close = get_close_matches(missing.name, neighbours, n=1)
    return f" Did you mean {str(missing.parent.joinpath(close[0], *rest))!r}?" if close else ""


def _versions() -> dict[str, str]:
    """The installed ones of PACKAGES."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            if find_spec(name) is not None:
                found[name] = version(name)
    return found


def _digest(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _hash_fraction(name: str) -> float:
    """Uniform in [0, 1), from the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def _size(path: str, data: DataConfig) -> int:
    return len(open_tokens(path, data)) if data.source == "tokens" else os.path.getsize(path)


# Cutting ----------------------------------------------------------------------------------------


def _groups(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Neighbours together, up to about SHARD_SIZE."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.stop - piece.start > SHARD_SIZE:
            yield tuple(group)
            group, size = [], 0
        group.append(piece)
        size += piece.stop - piece.start
    if group:
        yield tuple(group)


def _pieces(path: str, start: int, stop: int, data: DataConfig) -> Iterator[Piece]:
    """The range in parts of about SHARD_SIZE; files of Python, parsed whole, are never cut."""
    is_continued = False
    while start < stop:
        end = stop
        if stop - start > SHARD_SIZE and data.source in ("text", "jsonl", "tokens"):
            end = _cut(path, start, stop, start + SHARD_SIZE, data)
        yield Piece(path, start, end, is_continued)
        start, is_continued = end, data.source != "jsonl"


def _cut(path: str, start: int, stop: int, near: int, data: DataConfig) -> int:
    """Where to cut [start, stop): the last line that begins by `near`, if there is one.

    Lines of .jsonl are never cut: the answer may be the next line, or `start` for a single line
    (which stays whole, and first). Plain text is cut between characters when a line is too long.
    """
    if data.source == "tokens":
        return near
    with open(path, "rb") as file:
        is_jsonl = data.source == "jsonl"
        lowest = start if is_jsonl else near - min(MAX_LINE, (near - start) // 4)
        end = near
        while end > lowest:
            begin = max(lowest, end - MAX_LINE)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0 and begin + newline + 1 > start:
                return begin + newline + 1
            end = begin
        file.seek(near)
        if is_jsonl:
            file.readline()
            return min(file.tell(), stop)
        ahead = file.read(4)  # at most three bytes of UTF-8 continue a character
        return near + next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)


# Reading ----------------------------------------------------------------------------------------


def _read_bytes(piece: Piece) -> bytes:
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        return file.read(piece.stop - piece.start)


def _read_text(piece: Piece, data: DataConfig) -> Iterator[tuple[bytes, bool]]:
    yield _read_bytes(piece), not piece.is_continued


def _read_lines(piece: Piece, data: DataConfig) -> Iterator[tuple[bytes, bool]]:
    """One document a line of .jsonl."""
    for number, line in enumerate(_read_bytes(piece).split(b"\n")):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{_line(piece, number, data)}: not JSON: {error}.") from None
        if not isinstance(values, dict) or not isinstance(values.get(data.field), str):
            known = sorted(values) if isinstance(values, dict) else []
            close = get_close_matches(data.field, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Its keys: {known}."
            if data.field in known:
                hint = f" It holds {type(values[data.field]).__name__}."
            raise ValueError(
                f"{_line(piece, number, data)}: no text under field={data.field!r}.{hint}"
            )
        yield values[data.field].encode("utf-8", errors="replace"), True


def _line(piece: Piece, number: int, data: DataConfig) -> str:
    before = _read_bytes(Piece(piece.path, 0, piece.start)).count(b"\n")
    return f"{title(data)}: {piece.path}:{before + number + 1}"


def _read_docstrings(piece: Piece, data: DataConfig) -> Iterator[tuple[bytes, bool]]:
    """The long docstrings of one file, in the order of its lines; what does not parse has none."""
    source = _read_bytes(piece)
    if b'"""' not in source and b"'''" not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    docstrings = (ast.get_docstring(node) for node in nodes)
    long = [text for text in docstrings if text and len(text) > MIN_DOCSTRING_LEN]
    for i, text in enumerate(long):
        yield f"{text}\n\n".encode("utf-8", errors="replace"), i == 0


def _read_tokens(piece: Piece, data: DataConfig) -> np.ndarray:
    tokens = np.asarray(open_tokens(piece.path, data)[piece.start : piece.stop])
    check_tokens(tokens, piece.start, piece.path, data)
    return tokens


def _extract(parts: list[tuple[np.ndarray, bool]], texts: list[bytes], data: DataConfig) -> Extract:
    dtype = token_dtype(data.vocab_size)
    return Extract(
        np.concatenate([np.zeros(0, dtype), *(tokens.astype(dtype) for tokens, _ in parts)]),
        np.array([len(tokens) for tokens, _ in parts], np.int64),
        np.array([begins for _, begins in parts], bool),
        np.frombuffer(b"".join(texts), np.uint8),
        np.array([len(text) for text in texts], np.int64),
    )
