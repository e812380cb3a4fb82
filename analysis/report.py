"""The report of a store: one self-contained HTML page, and the same as Markdown, CSV and PNG."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from analysis import (
    checks,
    derive,
    figures,
    remember,
    settings,
    statistics,
    style,
    tables,
    vocabulary,
)
from analysis.load import load, write_parquet
from analysis.tables import Table

QUESTION = (
    "Which architecture is better, at what cost, and is that the architecture or the framework?"
)


@dataclass(frozen=True)
class Drawing:
    name: str
    caption: str
    svg: str  # inline, in the colours of the page
    png: str  # path relative to the report


def write_report(
    store: Path,
    out: Path,
    *,
    title: str,
    command: str,
    frame: pd.DataFrame | None = None,
    defaults: Mapping[str, Iterable[str]] | None = None,
) -> Path:
    """Writes report.html, report.md, records.parquet, tables/*.csv and figures/*.png into `out`;
    returns the path of report.html. `frame` replaces what analysis.load(store) gives; `defaults`
    are the values that configs/ have: the baselines of ablations."""
    frame = load(Path(store)) if frame is None else frame
    with remember.remembering():
        return _write(frame, Path(store), Path(out), title, command, defaults)


def _write(
    frame: pd.DataFrame,
    store: Path,
    out: Path,
    title: str,
    command: str,
    defaults: Mapping[str, Iterable[str]] | None,
) -> Path:
    (out / "figures").mkdir(parents=True, exist_ok=True)
    (out / "tables").mkdir(exist_ok=True)
    write_parquet(frame, out / "records.parquet")

    beside = comparison_tables(frame, defaults=defaults)
    drawings = draw(frame, out)
    rest = {
        "parity": tables.parity(frame),
        "certificate": tables.certificate(frame),
        "failures": tables.failures(frame),
        "frontier": tables.frontier(frame),
        "machines": tables.machines(frame),
        "peaks": tables.peaks(frame),
        "bounds": tables.bounds(frame),
    }
    for table in [*beside, *rest.values()]:
        table.write_csv(out / "tables")
    runs = derive.runs(frame)
    context = {
        "title": title,
        "command": command,
        "question": QUESTION,
        "answer": answer(frame, beside),
        "caveats": caveats(frame),
        "glances": [
            table
            for table in comparison_tables(frame, is_brief=True, defaults=defaults)
            if table.rows
        ],
        "sections": [(table, list(_by_suite(table))) for table in beside if table.rows],
        "drawings": drawings,
        **rest,
        "num_runs": len(runs),
        "num_completed": int((runs["outcome"] == "completed").sum()),
        "written_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "store": str(store),
    }
    (out / "report.md").write_text(_render("report.md.j2", context), encoding="utf-8")
    path = out / "report.html"
    path.write_text(_render("report.html.j2", context), encoding="utf-8")
    return path


def comparison_tables(
    frame: pd.DataFrame,
    *,
    is_brief: bool = False,
    defaults: Mapping[str, Iterable[str]] | None = None,
) -> list[Table]:
    """JAX beside PyTorch, each other family beside MQA, and of each setting of model, kernels or
    optimizer that was varied every other value beside its baseline: that of `defaults`, if it was
    measured."""
    pairs = [("backend", "jax", "torch")]
    families = settings.values_of(frame, "family")
    if "mqa" in families:
        pairs += [("family", family, "mqa") for family in families if family != "mqa"]
    for by, values in settings.varying(frame).items():
        if by in settings.RESOLVED or by.startswith(("model.", "kernels.", "optimizer.")):
            baseline = settings.baseline_of(by, values, defaults)
            pairs += [(by, value, baseline) for value in values if value != baseline]
    return [tables.side_by_side(frame, *pair, is_brief=is_brief) for pair in pairs]


def answer(frame: pd.DataFrame, beside: list[Table] | None = None) -> list[str]:
    """Two sentences with numbers: the architectures, then the frameworks."""
    beside = comparison_tables(frame) if beside is None else beside
    return [_architectures(frame, beside), _frameworks(beside[0].frame)]


def caveats(frame: pd.DataFrame) -> list[str]:
    """What the numbers are too few, too old or too unchecked to say."""
    made = []
    cells = derive.summary(frame)
    timed = cells[cells["metric"].isin(vocabulary.TIMES)]
    few = timed.loc[timed["num_rounds"] < statistics.MIN_ROUNDS, "num_rounds"]
    if len(few):
        low, high = int(few.min()), int(few.max())
        rounds = _count(high, "round") if low == high else f"{low} to {high} rounds"
        some = "Timings" if len(few) == len(timed) else f"{len(few)} of {len(timed)} timings"
        made.append(
            f"{some} have {rounds}: too few for a verdict, which needs "
            f"{statistics.MIN_ROUNDS}; their comparisons are inconclusive."
        )
    runs = derive.runs(frame)
    programs = set(runs.loc[runs["suite"].isin(set(timed["suite"])), "program"].dropna())
    if programs >= {"eager", "compiled"}:
        made.append(
            "JAX ran compiled programs and PyTorch eager code: small models feel the difference "
            "most, in decoding above all. kernels.compile=true compiles PyTorch too."
        )
    if mixed := int((cells.drop_duplicates("cell_id")["num_builds"] > 1).sum()):
        made.append(f"{_count(mixed, 'cell')} mix runs of several builds.")
    if resumed := int((runs["num_segments"] > 1).sum()):
        made.append(
            f"{_count(resumed, 'run')} went on from a checkpoint: seconds, start-up times and peak "
            "memory are those of the last process alone; losses are of all steps."
        )
    quality = cells[cells["suite"] == "language_modeling"]
    if len(quality):
        seeds = int(quality["num_seeds"].min())
        if seeds == 1:
            made.append(
                "Language modeling has one seed: no spread between seeds is known, so a small "
                "difference may be chance."
            )
        elif seeds < 3:
            made.append(f"Language modeling has {seeds} seeds; 3 or more are needed for a spread.")
    speeds = cells[cells["metric"].isin(vocabulary.SPEEDS)]
    bare = int((speeds["parity"] != checks.GREEN).sum())
    if bare:
        made.append(
            f"{bare} of {len(speeds)} speed numbers are {checks.UNVERIFIED}: no green parity "
            "record of the same kernels, head_dim, dtype, device and build."
        )
    if len(cells) and (odd := int(cells["num_outliers"].sum())):
        made.append(f"{_count(odd, 'repeat')} lie far from their median: flagged, not dropped.")
    if stale := int((runs["is_current"] == False).sum()):  # noqa: E712 - the column knows null
        made.append(f"{_count(stale, 'run')} came from an older build and are marked stale.")
    return made


def draw(frame: pd.DataFrame, out: Path) -> list[Drawing]:
    """Every figure that has data, as a PNG file and as inline SVG."""
    made = []
    for name, function in figures.FIGURES.items():
        with style.looks(name):
            figure = function(frame)
            if figure is None:
                continue
            path = f"figures/{name}.png"
            FigureCanvasAgg(figure).print_png(out / path)  # savefig would draw twice
            made.append(Drawing(name, figures.caption(name), _svg(figure, name), path))
    return made


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page: transparent, text and axes in the page's own colour."""
    figure.set_layout_engine("none")  # the places that the PNG has found hold
    figure.patch.set_visible(False)
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(style.INK, "currentColor")
    label = figures.caption(name).replace("&", "and").replace('"', "'").replace("<", "")
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _by_suite(table: Table) -> Iterator[Table]:
    for suite in dict.fromkeys(table.frame["suite"]):
        yield tables.of_suite(table, suite)


def _architectures(frame: pd.DataFrame, beside: list[Table]) -> str:
    """The family of least held-out loss, and what its training step and its tokens cost."""
    cells = derive.summary(frame)
    bits = cells[cells["metric"] == "bits_per_byte"].sort_values("value", kind="stable")
    parts = []
    leader = None
    if len(bits):
        first = bits.iloc[0]
        group = bits["cell_id"].map(settings.shared(settings.asked(frame), "family"))
        same = bits[(group == group.iloc[0]) & (bits["family"] != first["family"])]
        same = same.drop_duplicates("family")
        others = [f"{v:.3f} for {style.family_label(f)}" for f, v in
                  zip(same["family"], same["value"], strict=True)]  # fmt: skip
        against = f", against {' and '.join(others)}" if others else ""
        seeds = _count(int(first["num_seeds"]), "seed")
        leader = first["family"]
        verb = "reaches the fewest" if others else "reaches"
        parts.append(
            f"{style.family_label(leader)} {verb} held-out bits per byte at size "
            f"{first['size']}, {first['value']:.3f}{against} "
            f"({style.backend_label(first['backend'])}, {seeds})"
        )
    for table in (table for table in beside if table.name.startswith("family_")):
        found = table.frame
        family = table.name.removeprefix("family_").removesuffix("_mqa")
        if leader not in (None, "mqa", family):
            continue
        for metric, what in (("step_time_ms", "a training step"), ("tpot_ms", "a decoded token")):
            part = found[(found["metric"] == metric) & found["speedup"].notna()]
            if len(part):
                costs = 1 / part["speedup"].astype(float)
                mark = "" if _verified(part) else f" [{checks.UNVERIFIED}]"
                name = style.family_label(family)
                parts.append(f"{what} of {name} takes {_range(costs)} of MQA's time{mark}")
    if not parts:
        return "No completed run compares the architectures."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _frameworks(found: pd.DataFrame) -> str:
    """How far the same model differs between JAX and PyTorch."""
    parts = []
    ratios = found[found["speedup"].notna()]
    compared = [
        ("training", ratios[ratios["metric"] == "step_time_ms"]),
        ("decoding", ratios[ratios["metric"] == "tpot_ms"]),
    ]
    scans = ratios[ratios["metric"] == "op_time_ms"]
    for names, part in scans.groupby(["linear_scan_ours", "linear_scan_baseline"]):
        variants = " beside ".join(dict.fromkeys(names))
        compared.append((f"the recurrence alone ({variants})", part))
    for what, part in compared:
        if len(part):
            mark = "" if _verified(part) else f" [{checks.UNVERIFIED}]"
            verdicts = part["verdict"].value_counts()
            words = ", ".join(f"{count} {name}" for name, count in verdicts.items())
            parts.append(
                f"in {what} JAX is {_range(part['speedup'].astype(float))} as fast as PyTorch over "
                f"{_count(len(part), 'matched cell')} ({words}){mark}"
            )
    quality = found[(found["metric"] == "bits_per_byte") & found["difference"].notna()]
    if len(quality):
        apart = quality["difference"].astype(float).abs().max()
        parts.append(f"held-out bits per byte differ between them by {apart:.4f} at most")
    if not parts:
        return "No completed run compares the frameworks."
    text = "; ".join(parts)
    return f"The same model in both frameworks: {text}."


def _verified(part: pd.DataFrame) -> bool:
    return bool(
        (part["parity_ours"] == checks.GREEN).all()
        and (part["parity_baseline"] == checks.GREEN).all()
    )


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}x", f"{values.max():.2f}x"
    return low if low == high else f"{low} to {high}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _render(template: str, context: dict) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["number"] = _is_number
    return environment.get_template(template).render(context) + "\n"


def _is_number(text: str) -> bool:
    return bool(re.match(r"^[-+]?[\d.,]+(x|$|\s)", text))
