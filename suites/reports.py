"""From a store to what is read: the frame with its builds judged, the page, the printed tables."""

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

from suites import compose, display
from suites.harness import provenance
from suites.harness.plan import FINISHED

DEFAULT_STORE = Path("results/raw")


def report_path(store: Path, out: Path | None, title: str) -> Path:
    """results/reports/<title> for results/raw; a folder `report` inside any other store."""
    if out is None:
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in title)
        out = store.parent / "reports" / name if store.name == "raw" else store / "report"
    return out / "report.html"


def write(store: Path, out: Path | None, *, title: str, overrides: list[str] | None) -> Path:
    from analysis.report import write_report

    command = command_of("run" if overrides else "report", overrides or [], store)
    folder = report_path(store, out, title).parent
    frame = frame_of(store)
    return write_report(
        store, folder, title=title, command=command, frame=frame, defaults=defaults(frame)
    )


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
        measured = dict.fromkeys(frame[group].dropna())
        groups[group] += [name for name in measured if name in compose.choices(group)]
    files = compose.Files({group: list(dict.fromkeys(names)) for group, names in groups.items()})
    made: dict[str, list[str]] = {}
    for size, family in itertools.product(groups["size"], groups["family"]):
        here = chosen | {"size": size, "family": family, "suite": "training_speed"}
        for name, value in settings.flat(json.dumps(files.settings(here))).items():
            made.setdefault(name, []).append(value)
    return made


def print_side_by_side(store: Path, run_ids: set[str]) -> None:
    from analysis.report import comparison_tables

    frame = frame_of(store)
    # parity of any earlier command verifies these runs too
    frame = frame[frame["run_id"].isin(run_ids) | (frame["suite"] == "parity")]
    # the report has every metric
    for table in comparison_tables(frame, is_brief=True, defaults=defaults(frame)):
        if table.rows:
            print()
            display.print_beside(table.header, table.rows, title=table.title)
