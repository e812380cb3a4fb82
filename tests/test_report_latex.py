"""The report as LaTeX: pdflatex compiles it, whatever a label holds, and wide tables fit."""

import os
import re
import shutil
import subprocess
import unicodedata

import pandas as pd
import pytest
from test_report_page import HOSTILE, hostile  # noqa: F401, a fixture

from analysis import latex, tables


@pytest.fixture
def pdflatex(tmp_path):
    """Compiles a document in a folder of its own, and returns the log."""
    if shutil.which("pdflatex") is None or not _has_booktabs():
        reason = "pdflatex with booktabs is missing: texlive-latex-base, texlive-latex-recommended"
        if os.environ.get("AERIE_REQUIRE_LATEX") == "1":
            pytest.fail(reason)
        pytest.skip(reason)

    def compile_(document: str) -> str:
        (tmp_path / "it.tex").write_text(document, encoding="ascii")
        done = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "it.tex"],
            cwd=tmp_path, capture_output=True, encoding="latin-1", timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:]
        assert (tmp_path / "it.pdf").read_bytes()[:5] == b"%PDF-"
        return done.stdout

    return compile_


def _has_booktabs() -> bool:
    if shutil.which("kpsewhich") is None:
        return False
    return subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode == 0


def document(body: str) -> str:
    """As one writes a paper that takes our tables in."""
    return "\n".join(
        [r"\documentclass{article}", r"\usepackage[a4paper,landscape,margin=15mm]{geometry}",
         r"\usepackage{array,booktabs,longtable}", r"\begin{document}", body, r"\end{document}"]
    )  # fmt: skip


def table_of(rows, header=None):
    header = header or [f"column_{n}" for n in range(len(rows[0]))]
    return tables.Table("t", "T", header, rows, pd.DataFrame(rows))


def test_the_report_compiles_alone(quickstart_report, pdflatex):
    log = pdflatex(quickstart_report[1].with_name("report.tex").read_text(encoding="ascii"))
    assert "Overfull" not in log


def test_a_hostile_report_compiles(hostile, pdflatex):  # noqa: F811
    pdflatex(hostile.with_name("report.tex").read_text(encoding="ascii"))


def test_the_tables_alone_compile_in_another_document(quickstart_report, pdflatex):
    paths = sorted((quickstart_report[1].parent / "tables").glob("*.tex"))
    assert len(paths) > 5
    pdflatex(document("\n\n".join(rf"\input{{{path}}}" for path in paths)))


def test_every_character_compiles(pdflatex):
    """All of the first 700, all that we name, and others of each kind."""
    codes = [*range(700), *map(ord, latex._SYMBOLS), 0x3B1, 0x4E2D, 0x1F642, 0xFFFD, 0x10FFFF]
    text = "\n\n".join(latex.tex(f"x{chr(code)}y") for code in codes)
    pdflatex(document(text))
    assert text.isascii()


@pytest.mark.parametrize(
    ("text", "want"),
    [("50%_a&b #1", r"50\%\_a\&b \#1"), ("$x$ {y} \\z", r"\$x\$ \{y\} \textbackslash{}z"),
     ("caf\u00e9", r"caf\'{e}"), ("\u00ef", r'\"{\i}'), ("\u2264 1", r"$\leq$ 1"),
     ("\U0001f642", "{[}U+1F642{]}"), ("a\nb\x00", "a b{[}U+FFFD{]}"), ("~^<>|", None)],
)  # fmt: skip
def test_text_is_escaped(text, want):
    found = latex.tex(text)
    if want is None:
        assert not set(found) & set("~^<>|")
    else:
        assert found == want


def test_what_is_escaped_is_not_escaped_again():
    assert latex.tex(latex.tex("50%")) == r"50\%"


def test_a_decomposed_accent_reads_as_the_composed_one():
    assert latex.tex(unicodedata.normalize("NFD", "\u00e9")) == latex.tex("\u00e9")


@pytest.mark.parametrize(
    ("text", "want"),
    [("1,024.5", "1,024.5"), ("a_b c", r"a\_\allowbreak{}b c"), ("a, b", r"a,\allowbreak{} b")],
)
def test_a_line_breaks_after_signs_and_not_within_numbers(text, want):
    assert latex.tex_cell(text) == want


@pytest.mark.parametrize("num_columns", [2, 12, 18])
@pytest.mark.parametrize("num_rows", [3, 120])
def test_wide_and_long_tables_fit_the_page(pdflatex, num_columns, num_rows):
    words = [
        "learning_rate=0.003, num_steps=200",
        "training_speed",
        "0.79x [0.78, 0.81]",
        "302,912",
    ]
    rows = [[words[n % len(words)] for n in range(num_columns)] for _ in range(num_rows)]
    made = latex.tex_table(table_of(rows))
    assert num_rows < latex.LONG or "longtable" in made
    log = pdflatex(document(made))
    assert not re.findall(r"Overfull .hbox \((?:[1-9]\d+|[5-9])\.", log)
