"""LaTeX that pdflatex compiles whatever a label holds: escaping, and tables that fit their page."""

import re
import unicodedata
from functools import lru_cache
from math import ceil
from typing import Any

from analysis.formats import MANY, visible
from analysis.remember import remembered
from analysis.tables import Table

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"{\ttfamily\char34}",
    "`": r"{\ttfamily\char96}", "'": "'{}", "-": "{-}", "[": "{[}", "]": "{]}",
}  # fmt: skip
_SYMBOLS = {
    "\u00b0": r"\textdegree{}", "\u00b1": r"$\pm$", "\u00b5": r"$\mu$", "\u00b7": r"$\cdot$",
    "\u00d7": r"$\times$", "\u2013": "--", "\u2014": "---", "\u2018": "`", "\u2019": "'",
    "\u201c": "``", "\u201d": "''", "\u2026": r"\dots{}", "\u2192": r"$\to$",
    "\u2248": r"$\approx$", "\u2260": r"$\neq$", "\u2264": r"$\leq$", "\u2265": r"$\geq$",
    "\u221e": r"$\infty$", "\u00df": r"\ss{}", "\u00e6": r"\ae{}", "\u00c6": r"\AE{}",
    "\u00f8": r"\o{}", "\u00d8": r"\O{}", "\u0153": r"\oe{}", "\u0152": r"\OE{}",
    "\u00a0": "~", "\u0142": r"\l{}", "\u0141": r"\L{}", "\u0131": r"\i{}", "\u00a7": r"\S{}",
}  # fmt: skip
_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u",
    "\u0307": ".", "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c",
}  # fmt: skip
# After these a line may break, but not within a number: 1,024 and 0.5 stay whole
_BREAK = re.compile(r"(?<=[_/=:])|(?<=[.,-])(?=[^\d\u00a0])|(?<=\w{24})(?=\w)")

# The page is A4, on its side, with margins of 15 mm: 267 x 180 mm. Characters of a line of
# Latin Modern Sans at each size (a digit is half an em), and space between two columns in them.
SIZES = (("footnotesize", 152), ("scriptsize", 172), ("tiny", 240))
GAP = 2.5
MAX_LINES = 3  # of a row, on average: more ask for smaller type
LONG = 20  # lines from which a table may break over pages


class Tex(str):
    """LaTeX already: not escaped again."""


def tex(text: Any) -> Tex:
    """Text for LaTeX, in ASCII. A character that its fonts lack is named: [U+1F642]."""
    if isinstance(text, Tex):
        return text
    return Tex(_escaped(_line(text)))


@lru_cache(MANY)
def tex_cell(text: str) -> Tex:
    """As `tex`, with places to break a line: a word of a narrow column is seldom one word."""
    return Tex(r"\allowbreak{}".join(map(_escaped, filter(None, _BREAK.split(_whole(text))))))


def tex_code(text: str) -> Tex:
    """A command, broken at its spaces; what follows the first line is indented."""
    return Tex(r"{\ttfamily\raggedright\hangindent=2em " + tex(text) + r"\par}")


@remembered
def tex_table(table: Table) -> Tex:
    """A booktabs table, `longtable` where it is long, in the largest type that fits the width of a
    page on its side; columns of long texts wrap. Needs array, booktabs and longtable."""
    size, capacity, widths = _layout([table.header, *table.rows])
    spec = "".join(
        rf">{{\raggedright\arraybackslash}}p{{{width / capacity:.4f}\linewidth}}"
        for width in widths
    )
    head = _row([rf"\bfseries {tex_cell(name)}" for name in table.header])
    rows = [_row([tex_cell(text) for text in row]) for row in table.rows]
    if sum(_num_lines(row, widths) for row in table.rows) < LONG:
        lines = [rf"\noindent\begin{{tabular}}{{@{{}}{spec}@{{}}}}", r"\toprule", head,
                 r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]  # fmt: skip
    else:
        again = [r"\toprule", head, r"\midrule"]
        lines = [rf"\begin{{longtable}}{{@{{}}{spec}@{{}}}}", *again, r"\endfirsthead", *again,
                 r"\endhead", r"\bottomrule", r"\endfoot", *rows, r"\end{longtable}"]  # fmt: skip
    gap = r"\renewcommand{\arraystretch}{1.15}"
    gap += rf"\setlength{{\tabcolsep}}{{{GAP / 2}ex}}"
    return Tex(
        "\n".join([rf"% table: {table.name}", r"{" + rf"\{size}\sffamily{gap}", *lines, "}"])
    )


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _line(text: Any) -> str:
    return unicodedata.normalize("NFC", " ".join(visible(text).split()))


def _whole(text: str) -> str:
    """An interval, `[1.04, 2.98]`, stays in one line."""
    return re.sub(r"(\[[\d.,+e-]+,) ", "\\1\u00a0", _line(text))


def _escaped(text: str) -> str:
    return "".join(map(_character, text))


def _character(char: str) -> str:
    if char in _SPECIAL:
        return _SPECIAL[char]
    if " " <= char <= "~":
        return char
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    letter, *marks = unicodedata.normalize("NFD", char)
    if len(marks) == 1 and marks[0] in _ACCENTS and letter.isascii() and letter.isalpha():
        dotless = {"i": r"\i", "j": r"\j"}.get(letter, letter)
        return rf"\{_ACCENTS[marks[0]]}{{{dotless}}}"
    return "{[}U+" + f"{ord(char):04X}" + "{]}"


def _layout(rows: list[list[str]]) -> tuple[str, int, list[float]]:
    """The type size, the characters of a line, and the width of each column in characters."""
    columns = list(zip(*rows, strict=True))
    natural = [max(4, min(60, max(map(len, texts)))) for texts in columns]
    least = [max(map(_longest_word, texts)) for texts in columns]
    for size, capacity in SIZES:
        room = capacity - GAP * len(columns)
        if sum(least) > room:
            continue
        widths = _fill(least, natural, room)
        if sum(_num_lines(row, widths) for row in rows) <= MAX_LINES * len(rows):
            return size, capacity, widths
    if sum(least) > room:  # words overhang: no type is smaller
        widths = [width * room / sum(least) for width in least]
    return size, capacity, widths


def _fill(least: list[int], natural: list[int], room: float) -> list[float]:
    """Widths between the least and the natural: what is left goes where much is wanted."""
    wanted = [max(0, most - low) for low, most in zip(least, natural, strict=True)]
    share = min(1.0, (room - sum(least)) / max(1, sum(wanted)))
    return [low + share * more for low, more in zip(least, wanted, strict=True)]


@lru_cache(MANY)
def _longest_word(text: str) -> int:
    """Of the pieces between the places where a line may break."""
    pieces = [piece for word in _whole(text).split(" ") for piece in _BREAK.split(word)]
    return max(map(len, pieces), default=1) + 1


def _num_lines(row: list[str], widths: list[float]) -> int:
    return max(ceil(len(text) / width) for text, width in zip(row, widths, strict=True))
