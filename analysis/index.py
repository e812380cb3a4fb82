"""What the record files of a store say, as one Arrow table: a row a record, by the names of files.

`index.parquet` in the store is a cache of it: files whose place, size or time it does not know are
read. Where they, and what it knows of files that are gone, are more than a hundredth of it, it is
written anew, as a whole. It may be deleted at any time; several processes may renew it at once, and
the last one stays. Its pages have checksums: an index that was damaged is none.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
from pyarrow import compute, parquet

from analysis.aside import aside
from suites.harness.record import Record

INDEX = "index.parquet"
VERSION = b"aerie"  # the key of an index's version in its metadata
CHUNK = 500  # records that are read at a time
MANY = 4 * CHUNK  # records from which a process on each core reads them, and progress is shown
MOST_UNKNOWN = 0.01  # of an index: what it lacks, or holds of files that are gone
LARGE = 20_000  # folders from which another process looks at half of them: half a second of work

Make = Callable[[list[Record]], pa.Table]
File = tuple[str, str, int, int]  # as in FILE; one that was replaced differs in size or time
FILE = {"folder": pa.string(), "file": pa.string(), "num_bytes": pa.int64(), "mtime_ns": pa.int64()}


def table_of(store: Path, make: Make, version: str) -> pa.Table:
    """The rows that `make` gives for the records of a store, with the columns FILE beside them.
    An index of another version is none."""
    runs = store / "runs"
    folders = _folders(runs)
    half = len(folders) // 2
    # begun before any thread of ours
    others = aside(partial(_files, runs, folders[:half]), is_worth_it=len(folders) >= LARGE)
    with ThreadPoolExecutor(1) as pool:  # Arrow reads beside Python's look at every folder
        index = pool.submit(_read, store / INDEX, version)
        found = {*_files(runs, folders[half:]), *others()}
    table = _with_files(make([]), []) if index.result() is None else index.result()
    known = list(zip(*(table[name].to_pylist() for name in FILE), strict=True))
    new = sorted(found.difference(known))
    if len(known) == len(found) and not new:
        return table
    kept = table.filter(pa.array([file in found for file in known], pa.bool_()))
    table = pa.concat_tables([kept, *_read_files(runs, new, make)])
    table = table.unify_dictionaries().combine_chunks()
    by_name = [("folder", "ascending"), ("file", "ascending")]
    table = table.take(compute.sort_indices(table.select(["folder", "file"]), by_name))
    if MOST_UNKNOWN * len(known) < len(new) + len(known) - len(kept):
        with suppress(OSError):  # a store that cannot be written can still be read
            _write(table, store / INDEX, version)
    return table


def _folders(runs: Path) -> list[str]:
    try:
        return os.listdir(runs)
    except FileNotFoundError:
        return []


def _files(runs: Path, folders: list[str]) -> list[File]:
    """The records in these folders, as FILE has them."""
    made = []
    for folder in folders:
        with (
            suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(f"{runs}/{folder}") as files,
        ):
            for file in files:
                if file.name.endswith(".json") and not file.name.startswith("."):
                    stat = file.stat()
                    made.append((folder, file.name, stat.st_size, stat.st_mtime_ns))
    return made


def _read_files(runs: Path, files: list[File], make: Make) -> Iterator[pa.Table]:
    read = partial(_read_chunk, runs, make)
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    if len(files) < MANY:
        yield from map(read, chunks)
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    # forked, so that a script of a user's need not guard its main part
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        yield from track(
            pool.map(read, chunks),
            f"Reading {len(files):,} records",
            total=len(chunks),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )


def _read_chunk(runs: Path, make: Make, files: list[File]) -> pa.Table:
    records, there = [], []
    for file in files:
        with suppress(FileNotFoundError):  # deleted meanwhile
            records.append(_record(runs / file[0] / file[1]))
            there.append(file)
    return _with_files(make(records), there)


def _record(path: Path) -> Record:
    try:
        return Record.from_json(json.loads(path.read_bytes()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record ({error}): move it out of the store.") from error


def _with_files(table: pa.Table, files: list[File]) -> pa.Table:
    for place, (name, kind) in enumerate(FILE.items()):
        table = table.append_column(name, pa.array([file[place] for file in files], kind))
    return table


def _read(path: Path, version: str) -> pa.Table | None:
    """The index, or None where it is absent, of another version, unreadable or damaged."""
    with (
        suppress(OSError, ValueError, pa.ArrowException),
        parquet.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        if (file.schema_arrow.metadata or {}).get(VERSION) == version.encode():
            return file.read().combine_chunks()
    return None


def _write(table: pa.Table, path: Path, version: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    table = table.replace_schema_metadata({VERSION: version.encode()})
    try:
        parquet.write_table(table, temporary, write_page_checksum=True, write_statistics=False)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
