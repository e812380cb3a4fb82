"""Text made safe for each format: Markdown, CSV and XML. HTML is in page.py, LaTeX in latex.py.

A label may hold anything; what a format would read as its own language is escaped there.
"""

import gzip
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import csv

from analysis.load import SAMPLE_COLUMNS
from analysis.tables import Table

# Characters that neither XML nor a terminal can show
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# A spreadsheet would run a text that begins so as a formula
_FORMULA = re.compile(r"^[=+\-@\t\r](?=.)", re.DOTALL)
MANY = 2**16  # texts of which it is kept how they are written: most cells repeat another one's
LARGE = 1_000_000  # rows of samples from which their CSV is compressed


def visible(text: Any) -> str:
    """Control characters become U+FFFD, so that every file of a report is valid UTF-8 and XML."""
    return _CONTROL.sub("\ufffd", str(text))


def markdown(text: Any) -> str:
    """One line of Markdown (GitHub's, with $math$) that reads as this text."""
    return _markdown(visible(text))


@lru_cache(MANY)
def _markdown(text: str) -> str:
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|~$])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word it is no emphasis
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)  # a link needs it; an interval does not
    return re.sub(r"^#", r"\\#", text)


def markdown_table(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(markdown(text) or ' ' for text in line)} |" for line in lines)


def markdown_code(text: str) -> str:
    """A fenced block; the fence is longer than any row of backticks within."""
    ticks = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}\n{visible(text)}\n{fence}"


def write_csv(frame: pd.DataFrame, path: Path) -> Path:
    """UTF-8, a missing value is empty, texts stand within quotes. A text that a spreadsheet would
    run as a formula gets an apostrophe in front. A path x.gz is compressed."""
    columns = {}
    for name in frame.columns:
        column = frame[name]
        if not pd.api.types.is_numeric_dtype(column.dtype):
            words = column.astype("category")  # few, of many rows
            texts = pa.array(map(_inert, words.cat.categories), pa.string())
            codes = words.cat.codes.to_numpy()
            places = pa.array(codes.astype("int64"), mask=codes < 0)
            columns[name] = texts.take(places)
        else:
            columns[name] = pa.array(column, from_pandas=True)
    table = pa.table(columns)
    options = csv.WriteOptions(quoting_style="needed")
    if path.suffix != ".gz":
        csv.write_csv(table, path, options)
        return path
    with gzip.GzipFile(path, "wb", compresslevel=1, mtime=0) as file:  # the same bytes each time
        csv.write_csv(table, file, options)
    return path


def write_frame(frame: pd.DataFrame, folder: Path) -> None:
    """records.csv, a row an attempt, and samples.csv, a row a sample; joined on run_id and attempt
    they are the frame, which repeats every setting with every sample and would be 20 times as
    large. Millions of samples are compressed: samples.csv.gz."""
    key = ["run_id", "attempt"]
    settings = [name for name in frame.columns if name not in SAMPLE_COLUMNS]
    write_csv(frame.loc[~frame.duplicated(key), settings], folder / "records.csv")
    end = "csv" if len(frame) < LARGE else "csv.gz"
    write_csv(frame[[*key, *SAMPLE_COLUMNS]], folder / f"samples.{end}")


def _inert(value: Any) -> str:
    return _FORMULA.sub(lambda found: f"'{found.group()}", visible(value))
