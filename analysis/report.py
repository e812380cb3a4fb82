"""The report of a store: one self-contained HTML page; the same as Markdown and LaTeX; its tables
as CSV and LaTeX, its figures as SVG and PNG, its samples as Parquet and CSV."""

import hashlib
import html
import io
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from analysis import (
    claims,
    derive,
    downstream,
    figures,
    formats,
    latex,
    lengths,
    page,
    quality,
    recall,
    remember,
    settings,
    style,
    tables,
)
from analysis.answer import answer, caveats
from analysis.aside import aside
from analysis.load import load, write_parquet
from analysis.tables import Table

QUESTION = (
    "Which architecture is better, at what cost, and is that the architecture or the framework?"
)
RECORDS = "records.parquet"
MOST_FORKS = 4  # that draw figures: each has memory of its own
LARGE = 500_000  # samples from which a report is made on all cores
HERE = Path(__file__).parent

MOST_VALUES = 12  # of a setting that are put side by side, one pair after the other
Pair = tuple[str, str, str]  # a setting, and two values of it that are put side by side


@dataclass(frozen=True)
class Drawing:
    name: str
    caption: str
    svg: str  # inline, in the colours of the page
    command: str  # that draws it again


@dataclass(frozen=True)
class Section:
    """A part of the report under one heading: tables, then drawings."""

    anchor: str
    title: str
    tables: Sequence[Table] = ()
    drawings: Sequence[Drawing] = ()
    note: str = ""
    empty: str = "None."  # what it says when it has nothing
    is_folded: bool = False  # each table waits behind its title


def sections(
    frame: pd.DataFrame,
    beside: Sequence[Pair],
    drawings: Sequence[Drawing] = (),
    title: str = "",
    single: Mapping[str, list[Table]] | None = None,
) -> list[Section]:
    """The report from top to bottom, below the answer. To add a section: a line here. `single`:
    single_tables(), where these are made already."""
    single = single_tables(frame, beside, title) if single is None else single
    claimed, tasks, answered, domains = (
        [Section(name, table.title, [table]) for table in single[name] if table.rows]
        for name in ("claims", "recall", "downstream", "lengths")
    )
    brief = [table for table in comparison_tables(frame, beside, is_brief=True) if table.rows]
    learned, ablations = single["quality"], single["ablations"]
    return [
        *(claimed if _is_of_paper(title) else ()),
        Section("matching", "Matching certificate", single["matching"]),
        Section("tables", "Side by side", [*brief, *single["bounds"]],
                note=_sweeps(frame), empty="No run in this store can be compared."),
        *([Section("quality", "What was learned", learned)] if learned else ()),
        Section("figures", "Figures", drawings=drawings, note=FIGURES_NOTE,
                empty="No completed run to draw."),
        *tasks,
        *answered,
        *([Section("ablations", "Ablations", ablations)] if ablations else ()),
        *domains,
        Section("metrics", "Every metric", metric_tables(frame, beside), is_folded=True),
        *(() if _is_of_paper(title) else claimed),
        Section("parity", "Parity", single["parity"]),
        Section("failures", "Failures and frontier", single["failures"]),
        Section("machines", "Machines and versions", single["machines"]),
    ]  # fmt: skip


def single_tables(
    frame: pd.DataFrame, beside: Sequence[Pair], title: str = ""
) -> dict[str, list[Table]]:
    """By section the tables that hold no pairs of cells."""
    derive.summary(frame)  # claims forget what they alone derive, and others need this
    baselines = {by: first for by, _, first in beside if by != "backend"}
    bounds, peaks = tables.bounds(frame), tables.peaks(frame)
    return {
        "claims": [claims.table(frame, is_whole=_is_of_paper(title))],
        "matching": [tables.certificate(frame)],
        "bounds": [bounds] if bounds.rows else [],
        "quality": quality.tables(frame),
        "recall": [recall.table(frame)],
        "downstream": [downstream.table(frame)],
        "ablations": tables.ablations(frame, baselines),
        "lengths": [lengths.table(frame)],
        "parity": [tables.parity(frame)],
        "failures": [tables.failures(frame), tables.frontier(frame)],
        "machines": [tables.machines(frame), *([peaks] if peaks.rows else [])],
    }


def _is_of_paper(title: str) -> bool:
    """Whose reports hold every claim, and on top."""
    return title.startswith("paper/")


FIGURES_NOTE = (
    "Families are colours, frameworks are markers and line styles. Intervals are 95%, over "
    "processes, drawn from two on."
)


def write_report(
    store: Path,
    out: Path,
    *,
    title: str,
    command: str,
    frame: pd.DataFrame | None = None,
    question: str = QUESTION,
    redraw: str = "aerie report",
    defaults: Mapping[str, Iterable[str]] | None = None,
) -> Path:
    """Writes report.html, report.md, report.tex, records.parquet, records.csv, tables/ and figures/
    into `out`; returns the path of report.html. `frame` replaces what analysis.load(store) gives;
    `command` measured it, `redraw` draws it; `defaults` are the values that configs/ have: the
    baselines of ablations."""
    frame = load(Path(store)) if frame is None else frame
    out = Path(out)
    _clear(out)
    is_large = len(frame) >= LARGE
    begin = partial(aside, is_worth_it=is_large)
    with remember.remembering():
        written = begin(partial(_write_samples, frame, out))
        beside = pairs(frame, defaults)
        said = {"caveats": caveats(frame)}  # what it derives, all that is begun below needs too
        single = begin(partial(single_tables, frame, beside, title))
        whole = comparison_tables(frame, beside)
        drawn = [begin(partial(draw, frame, out, redraw, names)) for names in _shares(is_large)]
        said["answer"] = answer(frame, whole)
        made = sections(frame, beside, title=title, single=single())
        _write_tables(out, made, raw_tables(frame, beside, made))
        written()
        drawings = sorted((drawing for part in drawn for drawing in part()), key=_order)
        made = [
            replace(section, drawings=drawings) if section.anchor == "figures" else section
            for section in made
        ]
        runs = derive.runs(frame)
        context = said | {
            "title": title,
            "command": command,
            "redraw": redraw,
            "check": f"aerie report --verify {out}",
            "question": question,
            "sections": made,
            "beside": beside,
            "num_runs": len(runs),
            "num_completed": int((runs["outcome"] == "completed").sum()),
            "written_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "store": str(store),
            "samples_csv": next(out.glob("samples.csv*")).name,
            "digest": digest(out / RECORDS),
            "figures": digests(out, drawings),
        }
        for name, render in (("md", _markdown), ("tex", _tex), ("html", _html)):
            with (out / f"report.{name}").open("w", encoding="utf-8") as file:
                render(context, frame).dump(file)  # part by part: never the whole text at once
                file.write("\n")
    return out / "report.html"


def pairs(frame: pd.DataFrame, defaults: Mapping[str, Iterable[str]] | None = None) -> list[Pair]:
    """JAX beside PyTorch (where both ran, or nothing else is compared), each other family beside
    MQA, and of each setting of model, kernels or optimizer that was varied every other value beside
    its baseline: that of `defaults`, if it was measured. A setting of very many values is a sweep,
    and no list of pairs."""
    made = []
    families = settings.values_of(frame, "family")
    if "mqa" in families:
        made += [("family", family, "mqa") for family in families if family != "mqa"]
    for by, values in _varied(frame).items():
        if len(values) <= MOST_VALUES:
            baseline = settings.baseline_of(by, values, defaults)
            made += [(by, value, baseline) for value in values if value != baseline]
    if not made or len(settings.values_of(frame, "backend")) > 1:
        made.insert(0, ("backend", "jax", "torch"))
    return made


def _varied(frame: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    return {
        by: values
        for by, values in settings.varying(frame).items()
        if by in settings.RESOLVED or by.startswith(("model.", "kernels.", "optimizer."))
    }


def _sweeps(frame: pd.DataFrame) -> str:
    """Which settings have too many values to be put side by side."""
    return " ".join(
        f"{by} has {len(values):,} values, which are not paired here; aerie compare --by {by} "
        "puts them side by side."
        for by, values in _varied(frame).items()
        if len(values) > MOST_VALUES
    )


def comparison_tables(
    frame: pd.DataFrame, beside: Sequence[Pair], *, is_brief: bool = False
) -> list[Table]:
    return [tables.side_by_side(frame, *pair, is_brief=is_brief) for pair in beside]


def metric_tables(frame: pd.DataFrame, beside: Sequence[Pair]) -> list[Table]:
    """Every metric of each suite, side by side."""
    made = []
    for pair in beside:
        whole = tables.side_by_side(frame, *pair)
        for suite in dict.fromkeys(whole.frame["suite"]):
            made.append(tables.side_by_side(frame, *pair, suite=suite))
    return made


def raw_tables(frame: pd.DataFrame, beside: Sequence[Pair], made: Sequence[Section]) -> list[Table]:
    """Those that have a CSV file of their own: of a comparison the whole one."""
    shown = [table for section in made for table in section.tables]
    return [*comparison_tables(frame, beside), *(table for table in shown if not table.csv)]


def _clear(out: Path) -> None:
    """What an earlier report left: all files are of this one."""
    if not (out / "report.html").is_file():
        return
    drawn = [
        out / "figures" / f"{name}.{end}" for name in figures.FIGURES for end in ("png", "svg")
    ]
    patterns = ("records.csv", "samples.csv*", "tables/*.csv", "tables/*.tex")
    for path in (*drawn, *(path for pattern in patterns for path in out.glob(pattern))):
        path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(out: Path, drawings: Iterable[Drawing]) -> dict[str, dict[str, str]]:
    """SHA-256 of each figure, by its name: as it stands in the page, and its files."""
    return {
        drawing.name: {"inline": hashlib.sha256(drawing.svg.encode()).hexdigest()}
        | {end: digest(out / "figures" / f"{drawing.name}.{end}") for end in ("svg", "png")}
        for drawing in drawings
    }


def draw(
    frame: pd.DataFrame, out: Path, redraw: str, names: Sequence[str] | None = None
) -> list[Drawing]:
    """Every figure that has data (or those of these names), as PNG and SVG files and inline."""
    folder = out / "figures"
    made = []
    for name in figures.FIGURES if names is None else names:
        with style.looks(name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # of a label: a box stands for it
            figure = figures.FIGURES[name](frame)
            if figure is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            FigureCanvasAgg(figure).print_png(folder / f"{name}.png")  # savefig draws twice
            svg = _svg(figure)
        (folder / f"{name}.svg").write_text(_standing_alone(svg), encoding="utf-8")
        command = f"{redraw} --figure {name}"
        inline = _inline(svg, figures.describe(name, figure))
        made.append(Drawing(name, figures.caption(name), inline, command))
    return made


def _shares(is_large: bool) -> list[list[str]]:
    """The names of all figures; for each core some, of a large report."""
    names = list(figures.FIGURES)
    cores = min(MOST_FORKS, len(os.sched_getaffinity(0))) if is_large else 1
    return [names[core::cores] for core in range(cores)]


def _order(drawing: Drawing) -> int:
    return list(figures.FIGURES).index(drawing.name)


def _svg(figure: Figure) -> str:
    """The element, without a background; ids that nothing points at are left out, as a page of
    several figures would have each of them twice."""
    figure.set_layout_engine("none")  # the places that the PNG has found hold
    figure.patch.set_visible(False)
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    text = formats.visible(file.getvalue())
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])


def _standing_alone(svg: str) -> str:
    """A file: on white, whatever page shows it."""
    head, rest = svg.split(">", 1)
    white = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>{white}{rest}'


def _inline(svg: str, words: str) -> str:
    """In a page: text and axes in its own colour, as wide as it lets them be; for who cannot see
    it, in words."""
    text = svg.replace(style.INK, "currentColor")
    for size in ("width", "height"):
        text = re.sub(rf'<svg ([^>]*?){size}="[^"]*"', r"<svg \1", text, count=1)
    label = html.escape(formats.visible(words))
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _write_samples(frame: pd.DataFrame, out: Path) -> None:
    write_parquet(frame, out / RECORDS)
    formats.write_frame(frame, out)


def _write_tables(out: Path, made: Sequence[Section], raw: Sequence[Table]) -> None:
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for table in raw:
        formats.write_csv(table.frame, out / table.file)
    for section in made:
        for table in section.tables:
            path = out / "tables" / f"{table.name}.tex"
            path.write_text(latex.tex_table(table) + "\n", encoding="utf-8")


def _html(context: dict[str, Any], frame: pd.DataFrame) -> Any:
    environment = _environment(autoescape=True, finalize=_visible)
    environment.filters["broken"] = page.broken
    runs = page.Runs(frame)
    js = (HERE / "report.js").read_text(encoding="utf-8")
    extra = {
        "css": (HERE / "report.css").read_text(encoding="utf-8"),
        "js": js,
        "script_hash": page.script_hash(js),
        "palette": page.PALETTE,
        "numeric_columns": page.numeric_columns,
        "rows": lambda table: page.rows(table, runs),
        "run_list": lambda: (
            {name: context[name] for name in ("store", "beside", "figures")} | runs.to_json()
        ),
    }
    return environment.get_template("report.html.j2").stream(context | extra)


def _markdown(context: dict[str, Any], frame: pd.DataFrame) -> Any:
    environment = _environment(finalize=lambda value: _escaped(value, formats.markdown))
    extra = {
        "markdown_table": lambda table: Made(formats.markdown_table(table)),
        "markdown_code": lambda text: Made(formats.markdown_code(text)),
        "markdown_line": lambda text: Made(f"`{text}`" if "`" not in text else text),
    }
    return environment.get_template("report.md.j2").stream(context | extra)


def _tex(context: dict[str, Any], frame: pd.DataFrame) -> Any:
    environment = _environment(
        finalize=lambda value: _escaped(value, latex.tex),
        block_start_string="<%", block_end_string="%>",
        variable_start_string="<<", variable_end_string=">>",
        comment_start_string="<#", comment_end_string="#>",
    )  # fmt: skip
    extra = {"tex_table": latex.tex_table, "tex_code": latex.tex_code, "tex_path": latex.Tex}
    return environment.get_template("report.tex.j2").stream(context | extra)


class Made(str):
    """In the language of its format already: not escaped again."""


def _escaped(value: Any, escape: Any) -> str:
    return value if isinstance(value, (Made, latex.Tex)) else escape(value)


def _visible(value: Any) -> Any:
    return formats.visible(value) if type(value) is str else value


def _environment(**settings: Any) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **settings,
    )
