"""Does a written report say what its samples say? Every cell is computed again from records.parquet
and held against what the files show: the page as HTML is parsed, Markdown and LaTeX as tables, CSV
as CSV. Figures are held against the SHA-256 that the page has of each, and the samples against the
records of the store, where it is at hand. A file that is gone is a difference."""

import csv
import gzip
import hashlib
import json
import math
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import derive, formats, latex, page, remember, report
from analysis.answer import answer, caveats
from analysis.load import RECORD_COLUMNS, SAMPLE_COLUMNS, load, read_parquet, words
from analysis.tables import Table
from suites.harness.record import METRICS

JUDGED = ("is_counted", "is_current")  # by the builds of the day of the report, not by records
GONE = "nothing: there is no such file"
NEAR = 1e-9  # relative: of a mean of logarithms taken in another order


@dataclass(frozen=True)
class Difference:
    where: str  # file, table, row and column
    says: str
    samples_say: str

    def __str__(self) -> str:
        return f"{self.where}: says {self.says!r}; the samples say {self.samples_say!r}"


@dataclass
class Verdict:
    cells: Counter = field(default_factory=Counter)  # that were looked at, by where
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be looked at

    def hold(self, where: str, says: Any, samples_say: Any) -> None:
        self.cells[_kind(where.split(",")[0])] += 1
        if says != samples_say:
            self.differences.append(Difference(where, str(says), str(samples_say)))


def verify(path: Path, store: Path | None = None) -> Verdict:
    """`path` is a report.html or its folder; `store` replaces the one that the page names."""
    path = Path(path)
    path = path / "report.html" if path.is_dir() else path
    folder = path.parent
    for file in (path, folder / report.RECORDS):
        if not file.is_file():
            raise ValueError(
                f"there is no {file}; a report is verified with its samples beside it."
            )
    shown = Shown(path.read_text(encoding="utf-8", errors="replace"))
    verdict = Verdict()
    verdict.hold(f"{path.name}, SHA-256 of {report.RECORDS}", shown.facts.get("digest"),
                 report.digest(folder / report.RECORDS))  # fmt: skip
    frame = read_parquet(folder / report.RECORDS)
    with remember.remembering():
        beside = [tuple(pair) for pair in shown.runs["beside"]]
        made = report.sections(frame, beside, title=shown.facts.get("title", ""))
        _verify_words(verdict, shown, frame, beside)
        tables = [table for section in made for table in section.tables if table.rows]
        _verify_page(verdict, shown, tables, frame)
        for name, parse, escape in (
            ("report.md", _markdown_tables, formats.markdown),
            ("report.tex", _latex_tables, latex.tex_cell),
        ):
            if (text := _text(verdict, folder, name)) is not None:
                _verify_text(verdict, name, parse(text), tables, escape)
        for table in (table for section in made for table in section.tables):
            file = f"tables/{table.name}.tex"
            if (text := _text(verdict, folder, file)) is None:
                continue
            if table.rows:
                _verify_text(verdict, file, _latex_tables(text), [table], latex.tex_cell)
            else:
                verdict.hold(file, text.strip(), latex.tex_table(table).strip())
        _verify_figures(verdict, shown, folder)
        raw = report.raw_tables(frame, beside, made)
        _verify_csv(verdict, folder, frame, raw)
        _verify_second_way(verdict, folder, frame, raw)
    _verify_store(verdict, frame, store or Path(shown.facts.get("store", "")))
    return verdict


# what the files show


@dataclass(frozen=True)
class ShownCell:
    text: str
    value: str | None  # that it is sorted by
    groups: tuple[int, ...]


class Shown(HTMLParser):
    """What a reader of the page sees: its tables, its sentences, its figures, and the runs behind
    its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[ShownCell]]] = {}  # the first line is the header
        self.words: dict[str, list[str]] = {"answer": [], "caveat": []}
        self.facts: dict[str, str] = {}
        self.runs: dict[str, Any] = {"groups": [], "runs": [], "beside": []}
        self._lines: list[list[ShownCell]] | None = None
        self._end: str | None = None  # the tag that ends what is being read
        self._texts: list[str] = []
        self._attributes: dict[str, str | None] = {}
        self._hidden: list[str] = []
        self.figures = {  # digests of what is drawn in the page
            name: hashlib.sha256(svg.encode()).hexdigest()
            for name, svg in re.findall(
                r'<figure id="figure-(\w+)">\s*<div [^>]*>(.*?)</div>', text, flags=re.S
            )
        }
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if self._hidden or found.get("aria-hidden") == "true":
            self._hidden.append(tag)
        if tag == "table" and "data-table" in found:
            self._lines = self.tables.setdefault(found["data-table"] or "", [])
        elif tag == "tr" and self._lines is not None:
            self._lines.append([])
        if self._end is None and (
            (tag in ("td", "th") and self._lines is not None)
            or "data-check" in found
            or found.get("id") in ("digest", "store", "title", "run-list")
        ):
            self._end, self._texts, self._attributes = tag, [], found
        elif tag == "a" and self._end is not None and "data-runs" in found:
            self._attributes = self._attributes | {"data-runs": found["data-runs"]}

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass  # <path/>, <wbr/>: nothing to read

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            self._hidden.pop()
        if tag == "table":
            self._lines = None
        if tag != self._end:
            return
        text, found = _plain("".join(self._texts)), self._attributes
        self._end = None
        if "data-check" in found:
            self.words.setdefault(found["data-check"] or "", []).append(text)
        elif found.get("id") == "run-list":
            self.runs = json.loads(text)
        elif found.get("id") in ("digest", "store", "title"):
            self.facts[found["id"] or ""] = text
        elif self._lines:
            groups = tuple(int(number) for number in (found.get("data-runs") or "").split())
            self._lines[-1].append(ShownCell(text, found.get("data-value"), groups))

    def handle_data(self, data: str) -> None:
        if self._end is not None and not self._hidden:
            self._texts.append(data)

    def run_ids(self, group: int) -> list[str]:
        _, *places = self.runs["groups"][group]
        return [self.runs["runs"][place][0] for place in places]


def _plain(text: str) -> str:
    return " ".join(formats.visible(text).split())


def _markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """Name to lines of cells, still escaped; the first is the header."""
    made: dict[str, list[list[str]]] = {}
    lines: list[list[str]] | None = None
    for line in text.splitlines():
        if found := re.fullmatch(r"<!-- table: (\S+) -->", line):
            lines = made.setdefault(found[1], [])
        elif line.startswith("| ") and lines is not None:
            cells = re.split(r" (?<!\\)\|(?: |$)", line[2:])[:-1]
            if set(cells) != {"---"}:
                lines.append([cell.strip() for cell in cells])
        elif line:
            lines = None
    return made


def _latex_tables(text: str) -> dict[str, list[list[str]]]:
    """As _markdown_tables; the header of a long table stands there twice."""
    made: dict[str, list[list[str]]] = {}
    lines: list[list[str]] | None = None
    for line in text.splitlines():
        if found := re.fullmatch(r"% table: (\S+)", line):
            lines = made.setdefault(found[1], [])
        elif line.endswith(r" \\") and lines is not None:
            cells = [cell.removeprefix(r"\bfseries ") for cell in line[:-3].split(" & ")]
            if not (len(lines) == 1 and line.startswith(r"\bfseries ")):
                lines.append(cells)
    return made


# held against the samples


def _text(verdict: Verdict, folder: Path, file: str) -> str | None:
    """None where the file is gone, which is a difference."""
    if (folder / file).is_file():
        return (folder / file).read_text(encoding="utf-8", errors="replace")
    verdict.hold(file, GONE, "a table" if "/" in file else "a report")
    return None


def _verify_figures(verdict: Verdict, shown: Shown, folder: Path) -> None:
    """By the digests that the page took when they were drawn: nothing is drawn again."""
    known = shown.runs.get("figures", {})
    verdict.hold("report.html, its figures", sorted(shown.figures), sorted(known))
    for name, wanted in known.items():
        if name in shown.figures:
            verdict.hold(f"report.html, figure {name}, SHA-256",
                         shown.figures[name], wanted["inline"])  # fmt: skip
        for end in ("svg", "png"):
            file = folder / "figures" / f"{name}.{end}"
            says = report.digest(file) if file.is_file() else GONE
            verdict.hold(f"figures/{file.name}, SHA-256", says, wanted[end])


def _verify_words(
    verdict: Verdict, shown: Shown, frame: pd.DataFrame, beside: list[report.Pair]
) -> None:
    tables = report.comparison_tables(frame, beside)
    wanted = {"answer": answer(frame, tables), "caveat": caveats(frame)}
    for name, texts in wanted.items():
        says = shown.words[name]
        verdict.hold(f"report.html, number of {name} lines", len(says), len(texts))
        for place, (one, other) in enumerate(zip(says, texts, strict=False), 1):
            verdict.hold(f"report.html, {name} {place}", one, _plain(other))


def _verify_page(verdict: Verdict, shown: Shown, tables: list[Table], frame: pd.DataFrame) -> None:
    _same_tables(verdict, "report.html", shown.tables, tables)
    for table in tables:
        lines = shown.tables.get(table.name, [[]])
        where = f"report.html, table {table.name}"
        texts = [[cell.text for cell in line] for line in lines]
        if not _same_shape(verdict, where, texts, table):
            continue
        runs = page.Runs(frame)
        for line, row, texts in zip(lines[1:], page.cells(table, runs), table.rows, strict=True):
            for name, cell, wanted, text in zip(table.header, line, row, texts, strict=True):
                place = f"{where}, row {_label(texts)}, column {name}"
                verdict.hold(place, cell.text, _plain(text))
                value = None if wanted.value is None else str(wanted.value)
                if cell.value != value:
                    verdict.hold(f"{place}, its data-value", cell.value, value)
        listed = runs.to_json()
        for line, row, texts in zip(lines[1:], page.cells(table, runs), table.rows, strict=True):
            for name, cell, wanted in zip(table.header, line, row, strict=True):
                ids = [listed["runs"][n][0] for group in wanted.groups.split()
                       for n in listed["groups"][int(group)][1:]]  # fmt: skip
                says = [run_id for group in cell.groups for run_id in shown.run_ids(group)]
                if says != ids:
                    place = f"{where}, row {_label(texts)}, column {name}, its runs"
                    verdict.hold(place, " ".join(says), " ".join(ids))


def _verify_text(
    verdict: Verdict,
    file: str,
    found: dict[str, list[list[str]]],
    tables: list[Table],
    escape: Any,
) -> None:
    _same_tables(verdict, file, found, tables)
    for table in tables:
        lines, where = found.get(table.name, [[]]), f"{file}, table {table.name}"
        header = [escape(name) for name in table.header]
        if not _same_shape(verdict, where, [[], *lines[1:]], table, with_header=False):
            continue
        for line, texts in ((lines[0], table.header), *zip(lines[1:], table.rows, strict=True)):
            for name, says, text in zip(header, line, texts, strict=False):
                place = f"{where}, row {_label(texts)}, column {name}"
                verdict.hold(place, says.strip(), str(escape(text)).strip())


def _same_tables(verdict: Verdict, file: str, found: Iterable[str], tables: list[Table]) -> None:
    verdict.hold(f"{file}, its tables", sorted(found), sorted(table.name for table in tables))


def _same_shape(
    verdict: Verdict, where: str, lines: list[list[str]], table: Table, *, with_header: bool = True
) -> bool:
    if with_header:
        verdict.hold(f"{where}, its columns", lines[0], [_plain(name) for name in table.header])
    verdict.hold(f"{where}, its rows", len(lines) - 1, len(table.rows))
    widths = {len(line) for line in lines[1:]} or {len(table.header)}
    verdict.hold(f"{where}, cells of its rows", widths, {len(table.header)})
    return len(lines) - 1 == len(table.rows) and widths == {len(table.header)}


def _verify_csv(verdict: Verdict, folder: Path, frame: pd.DataFrame, tables: list[Table]) -> None:
    """The same files are written again, from the samples, and read beside those of the report."""
    with tempfile.TemporaryDirectory() as name:
        again = Path(name)
        (again / "tables").mkdir()
        formats.write_frame(frame, again)
        for table in tables:
            formats.write_csv(table.frame, again / table.file)
        for path in sorted(path for path in again.rglob("*") if path.is_file()):
            file = str(path.relative_to(again))
            if not (folder / file).is_file():
                verdict.hold(file, GONE, "a table")
                continue
            header: list[str] = []
            for row, (says, wanted) in enumerate(_beside(folder / file, path)):
                header = header or wanted
                if says == wanted:
                    verdict.cells[_kind(file)] += len(wanted)
                elif len(says) != len(wanted):
                    verdict.hold(f"{file}, row {row}, its cells", len(says), len(wanted))
                else:
                    for column, one, other in zip(header, says, wanted, strict=True):
                        verdict.hold(f"{file}, row {row}, column {column}", one, other)


def _beside(one: Path, other: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Lines of two CSV files; an empty one where a file has ended."""
    with _opened(one) as first, _opened(other) as second:
        left, right = csv.reader(first), csv.reader(second)
        while True:
            pair = next(left, None), next(right, None)
            if pair == (None, None):
                return
            yield pair[0] or [], pair[1] or []


def _opened(path: Path) -> Any:
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8", newline="")


def _verify_second_way(
    verdict: Verdict, folder: Path, frame: pd.DataFrame, tables: list[Table]
) -> None:
    """The values and speedups of comparisons once more, by no code of the report: from the samples
    of the very runs that its CSV names, with the standard library's median and logarithms."""
    samples = frame[frame["value"].notna()]
    samples = samples.assign(at=samples["at"].astype("float64").fillna(-1.0))
    counted = samples[samples["is_counted"].fillna(False).astype(bool)]
    key = ["run_id", "metric", "at"]
    medians = counted.groupby(key, sort=False)["value"].agg(list).map(statistics.median).to_dict()
    rounds = derive.runs(frame).set_index("run_id")[["seed", "round"]]
    rounds = dict(zip(rounds.index, rounds.itertuples(index=False, name=None), strict=True))
    for table in tables:
        file = folder / table.file
        if "run_ids_ours" not in table.frame or not file.is_file():
            continue
        for place, row in enumerate(pd.read_csv(file, keep_default_na=True).to_dict("records"), 1):
            where = f"{table.file}, row {place}"
            at = -1.0 if pd.isna(row["at"]) else float(row["at"])
            sides = {}
            for side in ("ours", "baseline"):
                names = row[f"run_ids_{side}"]
                ids = names.split() if isinstance(names, str) else []
                sides[side] = {
                    rounds.get(name): medians[name, row["metric"], at]
                    for name in ids
                    if (name, row["metric"], at) in medians
                }
                value = statistics.median(sides[side].values()) if sides[side] else math.nan
                _near(verdict, f"{where}, column value_{side}", row[f"value_{side}"], value)
            both = sorted(sides["ours"].keys() & sides["baseline"].keys())
            better = METRICS[row["metric"]].better if row["metric"] in METRICS else None
            if better and both and len(both) == row["num_paired_rounds"]:
                ours, baseline = ([sides[side][one] for one in both] for side in sides)
                if min(*ours, *baseline) > 0:
                    logs = [math.log(b / a) for a, b in zip(ours, baseline, strict=True)]
                    sign = 1 if better == "lower" else -1
                    speedup = math.exp(sign * statistics.fmean(logs))
                    _near(verdict, f"{where}, column speedup", row["speedup"], speedup)


def _near(verdict: Verdict, where: str, says: float, value: float) -> None:
    is_same = math.isclose(says, value, rel_tol=NEAR) or (math.isnan(says) and math.isnan(value))
    verdict.hold(where, "the same" if is_same else says, "the same" if is_same else value)


def _verify_store(verdict: Verdict, frame: pd.DataFrame, store: Path) -> None:
    if not (store / "runs").is_dir():
        verdict.notes.append(f"the records are not in {store}: {report.RECORDS} is all there is.")
        return
    key = ["run_id", "attempt"]
    named = [name for name in RECORD_COLUMNS if name not in (*JUDGED, *key)]
    samples = list(SAMPLE_COLUMNS)
    recorded = load(store)
    facts = [words(rows.drop_duplicates(key)[[*key, *named]]) for rows in (frame, recorded)]
    found = facts[0][key].merge(facts[1][key], on=key, how="left", indicator="is_here")
    if gone := int((found["is_here"] != "both").sum()):
        verdict.notes.append(f"{gone} attempts of the report are no longer in {store}.")
    here = found.loc[found["is_here"] == "both", key]
    measured = [words(rows[[*key, *samples]]) for rows in (frame, recorded)]
    for columns, parts in ((named, facts), (samples, measured)):
        placed = [rows.merge(here, on=key) for rows in parts]
        placed = [rows.assign(sample=rows.groupby(key, sort=False).cumcount()) for rows in placed]
        both = placed[0].merge(placed[1], on=[*key, "sample"], how="outer",
                               suffixes=("", "_store"), indicator="is_in")  # fmt: skip
        for row in both[both["is_in"] != "both"].to_dict("records"):
            texts = ("a sample", "none") if row["is_in"] == "left_only" else ("none", "a sample")
            verdict.hold(f"{report.RECORDS}, run {row['run_id']}, {row['sample']}", *texts)
        both = both[both["is_in"] == "both"]
        for name in columns:
            one, other = both[name], both[f"{name}_store"]
            is_same = ((one == other).fillna(False) | (one.isna() & other.isna())).astype(bool)
            verdict.cells[f"values of {store}"] += int(is_same.sum())
            for place in both.index[~is_same]:
                row = both.loc[place]
                sample = f", {row['metric']}, sample {row['sample']}" if "metric" in row else ""
                where = f"{report.RECORDS}, run {row['run_id']}{sample}, column {name}"
                verdict.hold(where, row[name], row[f"{name}_store"])


@cache
def _kind(file: str) -> str:
    """`cells of report.html`, `cells of tables/*.csv`, `files of figures/*.svg` and so on."""
    path = Path(file)
    if path.parent.name == "figures":
        return f"files of figures/*{path.suffix}"
    return f"cells of {f'tables/*{path.suffix}' if path.parent.name == 'tables' else path}"


def _label(texts: list[str]) -> str:
    return "/".join(_plain(text) for text in texts[:4])
