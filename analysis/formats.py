"""Text made safe for each format: Markdown, CSV and XML. HTML is in page.py, LaTeX in latex.py.

A label may hold anything; what a format would read as its own language is escaped there.
"""

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.load import SAMPLE_COLUMNS
from analysis.tables import Table

# Characters that neither XML nor a terminal can show
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# A spreadsheet would run a text that begins so as a formula
_FORMULA = re.compile(r"^[=+\-@\t\r](?=.)", re.DOTALL)
LARGE = 1_000_000  # rows of samples from which their CSV is compressed


def visible(text: Any) -> str:
    """Control characters become U+FFFD, so that every file of a report is valid UTF-8 and XML."""
    return _CONTROL.sub("\ufffd", str(text))


def markdown(text: Any) -> str:
    """One line of Markdown (GitHub's, with $math$) that reads as this text."""
    text = " ".join(visible(text).split())
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
    """UTF-8, a missing value is empty. A text that a spreadsheet would run as a formula gets an
    apostrophe in front; commas, quotes and newlines stand within quotes."""
    made = frame.copy(deep=False)
    for name in made.columns:
        if not pd.api.types.is_numeric_dtype(made[name].dtype):
            made[name] = made[name].map(_inert, na_action="ignore")
    made.to_csv(path, index=False, na_rep="", encoding="utf-8", lineterminator="\n")
    return path


def write_frame(frame: pd.DataFrame, folder: Path) -> None:
    """records.csv, a row an attempt, and samples.csv, a row a sample; joined on run_id and attempt
    they are the frame, which repeats every setting with every sample and would be 20 times as
    large. Millions of samples are compressed: samples.csv.gz."""
    from pyarrow import Table as Columns
    from pyarrow import csv

    key = ["run_id", "attempt"]
    facts = frame.drop(columns=list(SAMPLE_COLUMNS)).drop_duplicates(key)
    write_csv(facts, folder / "records.csv")
    samples = frame[[*key, *SAMPLE_COLUMNS]].copy()
    for name in (*key, "metric", "unit", "field"):  # few words, of many rows
        words = samples[name].astype("category")
        known = np.array([*map(_inert, words.cat.categories), None], dtype=object)
        samples[name] = known[words.cat.codes]  # the last one, of -1, is missing
    columns = Columns.from_pandas(samples, preserve_index=False)
    options = csv.WriteOptions(quoting_style="needed")
    if len(frame) < LARGE:
        csv.write_csv(columns, folder / "samples.csv", options)
        return
    path = folder / "samples.csv.gz"
    with gzip.GzipFile(path, "wb", compresslevel=1, mtime=0) as file:  # the same bytes each time
        csv.write_csv(columns, file, options)


def _inert(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return _FORMULA.sub(lambda found: f"'{found.group()}", visible(value))
