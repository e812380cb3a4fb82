"""From a store to what is read: the frame with its builds judged, the page, the printed tables."""

import itertools
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from implementations.config import choose
from suites import compose, display
from suites.harness import provenance
from suites.harness.plan import FINISHED
from suites.harness.run import Run

DEFAULT_STORE = Path("results/raw")
TITLE = "aerie"  # of the report of a whole store


def report_path(store: Path, out: Path | None, title: str) -> Path:
    """results/reports/<title> for results/raw; a folder `report` inside any other store. An
    experiment that lies in a folder has its report in one: reports/paper/figure3."""
    if out is None:
        kept = "".join(c if c.isalnum() or c in "-_/" else "_" for c in title)
        parts = [part for part in kept.split("/") if part]
        out = store.parent.joinpath("reports", *parts) if store.name == "raw" else store / "report"
    return out / "report.html"


def written_path(asked: str | None, store: Path, out: Path | None) -> Path:
    """Where a written report lies that was asked for by its path, by its experiment or not at all;
    ValueError where there is none."""
    if asked is not None and Path(asked).exists():
        return Path(asked) / "report.html" if Path(asked).is_dir() else Path(asked)
    title = TITLE
    if asked is not None:
        title = compose.read(overrides_of([asked])).title
    path = report_path(store, out, title)
    if not path.is_file():
        words = command_of("report", [asked] if asked else [], store)
        raise ValueError(f"there is no report in {path.parent}; write it first: {words}")
    return path


def write(
    frame: Any,
    store: Path,
    folder: Path,
    *,
    title: str,
    command: str,
    redraw: str,
    question: str | None,
) -> Path:
    from analysis.report import QUESTION, write_report

    return write_report(
        store,
        folder,
        title=title,
        command=command,
        frame=frame,
        question=question or QUESTION,
        redraw=redraw,
        defaults=defaults(frame),
    )


def draw(frame: Any, folder: Path, redraw: str, names: list[str]) -> list[Path]:
    """These figures alone; ValueError for one that is unknown, or has nothing to draw."""
    from analysis import figures, remember, report

    for name in names:
        choose("figure", name, tuple(figures.FIGURES), "aerie report")
    with remember.remembering():
        drawn = [drawing.name for drawing in report.draw(frame, folder, redraw, names)]
    if missing := [name for name in names if name not in drawn]:
        raise ValueError(f"no completed run has data for the figure {', '.join(missing)}.")
    return [folder / "figures" / f"{name}.{kind}" for name in drawn for kind in ("svg", "png")]


def overrides_of(asked: list[str]) -> list[str]:
    """`quickstart` stands for experiment=quickstart."""
    first, *rest = asked
    if "=" in first:
        return asked
    choose("experiment", first, tuple(compose.choices("experiment")), "aerie report")
    return [f"experiment={first}", *rest]


def of_runs(frame: Any, runs: Iterable[Run]) -> Any:
    """The rows of these cells and seeds, of every round that was measured, and of the parity runs
    that verify them."""
    from analysis import checks

    wanted = {(run.cell_id, run.seed) for run in runs}
    attempts = frame[~frame["attempt"].duplicated()]
    places = zip(attempts["cell_id"], attempts["seed"], strict=True)
    is_wanted = np.array([place in wanted for place in places], dtype=bool)
    texts = attempts[checks.PARITY_KEY].astype(object)
    keys = list(texts.where(texts.notna(), None).itertuples(index=False, name=None))
    verified = set(itertools.compress(keys, is_wanted))
    speaks = np.array([key in verified for key in keys], dtype=bool)
    speaks &= (attempts["suite"] == "parity").to_numpy()
    kept = attempts.loc[is_wanted | speaks, "attempt"]
    return frame[frame["attempt"].isin(kept)].reset_index(drop=True)


def command_of(name: str, overrides: list[str], store: Path) -> str:
    """The command line that was typed, as far as it chooses runs and their place."""
    place = [] if store == DEFAULT_STORE else ["--results", str(store)]
    return shlex.join(["aerie", name, *overrides, *place])


def frame_of(store: Path) -> Any:
    """The tidy frame with is_current filled in (our build is the one that ran), and is_counted as
    the planner counts: the last finished attempt of our build, else of any, else the last. Without
    what was compiled and never ran, which aerie compile shows: nothing of it is a speed."""
    from analysis import load

    records, samples = load.read(store)
    records = records[records["suite"] != "compile"]
    columns = ["suite", "backend", "device_kind", "job", "build_device", "versions"]
    asked = records[columns].astype(object).where(records[columns].notna(), None)
    ours = {row: _our_build(*row) for row in set(asked.itertuples(index=False, name=None))}
    is_current = records["build"] == [ours[row] for row in asked.itertuples(index=False, name=None)]
    is_finished = records["outcome"].isin(FINISHED)
    worth = is_finished.astype(int) + (is_finished & is_current)
    records = records.assign(
        is_current=is_current.astype("boolean"), is_counted=load.counted(records, worth)
    )
    return load.tidy(records, samples)


def _our_build(
    suite: str, backend: str, kind: str, job: str | None, device: str | None, versions: str | None
) -> str:
    """The build of our code; libraries and device are those of the cluster where a job ran."""
    if job is None or device is None:
        return provenance.build_key(suite, backend, provenance.device_name(kind))
    found = dict(word.split("=", 1) for word in (versions or "").split(", ") if word)
    return provenance.build_key(suite, backend, device, found)


def defaults(frame: Any) -> dict[str, list[str]]:
    """The values that configs/ give each setting of a model, its kernels, data and optimizer, at
    the sizes and families that were measured: what ablations are held against."""
    from analysis import settings

    chosen = compose.defaults()
    groups = {group: [choice] for group, choice in chosen.items()} | {"suite": ["training_speed"]}
    for group in ("size", "family"):
        measured = frame[group].dropna().unique()
        groups[group] += [name for name in measured if name in compose.choices(group)]
    files = compose.Files({group: list(dict.fromkeys(names)) for group, names in groups.items()})
    made: dict[str, list[str]] = {}
    for size, family in itertools.product(groups["size"], groups["family"]):
        here = chosen | {"size": size, "family": family, "suite": "training_speed"}
        for name, value in settings.flat(json.dumps(files.settings(here))).items():
            made.setdefault(name, []).append(value)
    return made


def print_side_by_side(store: Path, run_ids: set[str]) -> None:
    from analysis.remember import remembering
    from analysis.report import comparison_tables, pairs

    frame = frame_of(store)
    # parity of any earlier command verifies these runs too
    frame = frame[frame["run_id"].isin(run_ids) | (frame["suite"] == "parity")]
    with remembering():
        beside = pairs(frame, defaults(frame))
        made = comparison_tables(frame, beside, is_brief=True)  # the report has every metric
    for table in made:
        if table.rows:
            print()
            display.print_beside(table.header, table.rows, title=table.title)
