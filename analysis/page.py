"""What the HTML page adds to a table: sort values, marks, links to runs; and its colours."""

import base64
import hashlib
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup, escape

from analysis import derive, formats, vocabulary
from analysis.tables import Table
from analysis.wording import NONE

# Text is ink, soft, good, alarm or link, on paper or band: contrast is at least 4.5 (tested).
PALETTE = {
    "light": {"paper": "#ffffff", "band": "#f4f6f8", "line": "#d8dee4", "ink": "#1b232b",
              "soft": "#55616d", "good": "#0b6e4f", "alarm": "#a83208", "link": "#0a5c9e"},
    "dark": {"paper": "#14181c", "band": "#1d2329", "line": "#38424c", "ink": "#e4e9ee",
             "soft": "#a3aeb9", "good": "#4cc38a", "alarm": "#ff9166", "link": "#74b8f0"},
}  # fmt: skip
# Beginning of a cell's text -> its class and a small mark: colour never speaks alone.
MARKS = {
    "green": ("good", "\u2713"), "matched": ("good", "\u2713"), "RED": ("alarm", "\u2717"),
    "DIFFERS": ("alarm", "\u2717"), "equivalent": ("", "="), "inconclusive": ("", "?"),
    "not resolved": ("", "?"), "unpaired": ("", "\u2260"),
}  # fmt: skip
WAYS = {" faster": "\u25b2", " better": "\u25b2", " slower": "\u25bc", " worse": "\u25bc"}
MAX_RUNS = 200  # that a page lists behind one number; the CSV names all
LONG_WORD = 24
_STRIP = ("metric", "speedup", "speedup_low", "speedup_high")
REACH = 4.0  # the strip beside a ratio goes from 1/4 to 4

_NUMBER = re.compile(r"^[-+]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?(?=x|$|\s)")


class Cell(NamedTuple):
    """`lead` and `rest` together are the text of the table: a value, and its interval or why."""

    lead: str
    rest: str
    value: float | None  # what it is sorted by, where it is a number
    is_number: bool
    look: str
    mark: str
    groups: str  # of runs behind it, by their places in the page's list
    is_long: bool  # a word of it: it may break anywhere
    is_stop: bool  # of the tab key: the other cells of its row lead to the same runs
    strip: dict[str, float] | None  # a ratio with its interval, on [-1, 1]


class Runs:
    """The runs behind the numbers of a page, each named once."""

    def __init__(self, frame: pd.DataFrame) -> None:
        names = ["attempt", "seed", "round", "outcome"]
        rows = derive.runs(frame)[["run_id", *names]].astype(object)
        rows = rows.where(rows.notna(), None)
        self._known = {row[0]: row for row in rows.itertuples(index=False, name=None)}
        self._groups: dict[str, int] = {}
        self._places: dict[str, int] = {}

    def group(self, run_ids: Any) -> int | None:
        """The place of a group of runs, given their ids with spaces between."""
        if not isinstance(run_ids, str) or not run_ids:
            return None
        return self._groups.setdefault(run_ids, len(self._groups))

    def to_json(self) -> dict[str, Any]:
        """`groups`: how many, then places in `runs`; `runs`: id, attempt, seed, round, outcome."""
        groups = []
        for text in self._groups:
            ids = [name for name in dict.fromkeys(text.split()) if name in self._known]
            places = [self._places.setdefault(name, len(self._places)) for name in ids[:MAX_RUNS]]
            groups.append([len(ids), *places])
        return {"groups": groups, "runs": [self._known[name] for name in self._places]}


def cells(table: Table, runs: Runs) -> Iterator[list[Cell]]:
    """What the page shows of each row."""
    behind = [table.runs.get(name, table.runs.get("", ())) for name in table.header]
    wanted = {*_STRIP, *table.numbers.values(), *(name for names in behind for name in names)}
    raw = table.frame[[name for name in table.frame if name in wanted]][: len(table.rows)]
    for row, facts in zip(table.rows, raw.to_dict("records"), strict=True):
        groups: dict[tuple[str, ...], str] = {}
        for names in behind:
            if names not in groups:
                found = [runs.group(facts.get(name)) for name in names]
                groups[names] = " ".join(str(group) for group in found if group is not None)
        made = []
        for place, (name, text) in enumerate(zip(table.header, row, strict=True)):
            column = table.numbers.get(name)
            seen = _seen(text)
            made.append(
                Cell(
                    lead=seen.lead,
                    rest=seen.rest,
                    value=seen.number if column is None else _finite(facts[column]),
                    is_number=seen.number is not None,
                    look=seen.look,
                    mark=seen.mark,
                    groups=groups[behind[place]],
                    is_long=seen.is_long,
                    is_stop=name in table.numbers if table.numbers else place == 0,
                    strip=_strip(facts) if column == "ratio" else None,
                )
            )
        yield made


def rows(table: Table, runs: Runs) -> Iterator[Markup]:
    """The rows of a table in HTML; the first cell is its head. By hand, since a page may have tens
    of thousands of cells."""
    numeric = numeric_columns(table)
    for row in cells(table, runs):
        parts = []
        for place, cell in enumerate(row):
            tag, scope = ("td", "") if place else ("th", ' scope="row"')
            looks = (cell.look, "long" * cell.is_long, "number" * numeric[place])
            look = " ".join(filter(None, looks))
            value = "" if cell.value is None else f' data-value="{cell.value}"'
            inside = _inside(cell.lead, cell.rest, cell.mark, cell.is_number)
            inside += _strip_svg(**cell.strip) if cell.strip else ""
            if cell.groups:
                stop = "" if cell.is_stop else ' tabindex="-1"'
                inside = f'<a href="#runs" data-runs="{cell.groups}"{stop}>{inside}</a>'
            kind = f' class="{look}"' if look else ""
            parts.append(f"<{tag}{scope}{kind}{value}>{inside}</{tag}>")
        yield Markup(f"<tr>{''.join(parts)}</tr>")


def broken(text: str) -> Markup:
    """A name that may break after each underscore."""
    return Markup(str(escape(formats.visible(text))).replace("_", "_<wbr>"))


def numeric_columns(table: Table) -> list[bool]:
    """Which columns hold numbers and dashes alone."""
    made = []
    for texts in zip(*table.rows, strict=True):
        known = [text for text in texts if text != NONE]
        made.append(bool(known) and all(_NUMBER.fullmatch(text) for text in known))
    return made or [False] * len(table.header)


def number(text: str) -> float | None:
    """The number that a text begins with: `1,024` and `0.97x [0.95, 0.99]`, not `2 x 512`."""
    found = _NUMBER.match(text)
    return float(found.group().replace(",", "")) if found else None


def marked(text: str) -> tuple[str, str]:
    """Class and mark of a verdict, a parity or a match; empty for all else."""
    if "UNVERIFIED" in text:
        return "alarm", "!"
    for ending, mark in WAYS.items():
        if text.endswith(ending):
            return "", mark
    for beginning, found in MARKS.items():
        if text == beginning or text.startswith((f"{beginning} ", f"{beginning}:")):
            return found
    return "", ""


def script_hash(script: str) -> str:
    """For the page's Content-Security-Policy: no other script runs in it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


class _Seen(NamedTuple):
    """What a text alone says of its cell."""

    lead: str
    rest: str
    number: float | None
    look: str
    mark: str
    is_long: bool


@lru_cache(formats.MANY)
def _seen(text: str) -> _Seen:
    is_long = max(map(len, text.split()), default=0) > LONG_WORD
    return _Seen(*_split(text), number(text), *marked(text), is_long)


@lru_cache(formats.MANY)
def _inside(lead: str, rest: str, mark: str, is_number: bool) -> str:
    made = escape(formats.visible(lead))
    if mark:
        made = (
            f'<span class="lead"><span class="mark" aria-hidden="true">{mark}</span>{made}</span>'
        )
    elif rest:
        made = f'<span class="lead">{made}</span>'
    elif not (" " in lead or "=" in lead):
        made = broken(lead)
    if rest:
        rest = rest.replace(", ", ",\u00a0") if is_number else rest
        made = f'{made}<span class="rest">{escape(formats.visible(rest))}</span>'
    return str(made)


def _strip_svg(at: float, low: float, high: float) -> str:
    stroke = 'vector-effect="non-scaling-stroke"/>'
    line = f"M0-10V10M{100 * low:.1f} 0H{100 * high:.1f}"
    return (
        '<svg class="strip" aria-hidden="true" viewBox="-100 -10 200 20" '
        f'preserveAspectRatio="none"><path d="{line}" stroke="currentColor" stroke-width="1.5" '
        f'{stroke}<path d="M{100 * at:.1f}-7V7" stroke="var(--link)" stroke-width="3.5" '
        f"{stroke}</svg>"
    )


def _split(text: str) -> tuple[str, str]:
    """A value, and the interval or the words in brackets after it."""
    found = re.match(r"^(\S+(?: \S+)?)( [\[(].*)$", text, re.DOTALL)
    return (found[1], found[2]) if found else (text, "")


def _finite(value: Any) -> float | None:
    return None if value is None or pd.isna(value) or math.isinf(value) else float(value)


def _strip(facts: dict[str, Any]) -> dict[str, float] | None:
    """Places of a speedup and its ends between 1/4 (-1) and 4 (1), by their logarithms."""
    speedup = _finite(facts["speedup"])
    if not speedup or facts["metric"] in vocabulary.QUALITIES:  # these show their difference
        return None
    ends = [_finite(facts[f"speedup_{end}"]) or speedup for end in ("low", "high")]
    places = [math.log(value) / math.log(REACH) for value in (speedup, *ends)]
    at, low, high = (round(max(-1.0, min(1.0, place)), 3) for place in places)
    return {"at": at, "low": low, "high": high}
