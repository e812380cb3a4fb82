"""From a store to what is read: the frame with its builds judged, the page, the printed tables."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from suites import display
from suites.harness import provenance
from suites.harness.plan import FINISHED, Planned
from suites.harness.run import Run

DEFAULT_STORE = Path("results/raw")
TWINS = ("jax", "torch")  # they compute all that parity asks for


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
    return write_report(store, folder, title=title, command=command, frame=frame_of(store))


def command_of(name: str, overrides: list[str], store: Path) -> str:
    """The command line that was typed, as far as it chooses runs and their place."""
    place = [] if store == DEFAULT_STORE else ["--results", str(store)]
    return shlex.join(["aerie", name, *overrides, *place])


def frame_of(store: Path) -> Any:
    """The tidy frame with is_current filled in (our build is the one that ran), and is_counted as
    the planner counts: the last finished attempt of our build, else of any, else the last."""
    import analysis

    frame = analysis.load(store)
    ours = [  # build_key and device_name remember what they were asked
        provenance.build_key(suite, backend, provenance.device_name(kind))
        for suite, backend, kind in zip(
            frame["suite"], frame["backend"], frame["device_kind"], strict=True
        )
    ]
    is_current = frame["build"] == ours
    is_finished = frame["outcome"].isin(FINISHED)
    worth = is_finished.astype(int) + (is_finished & is_current)
    place = worth.astype(str) + frame["attempt"]  # attempts sort by time
    is_counted = place == place.groupby(frame["run_id"]).transform("max")
    return frame.assign(
        is_current=is_current.astype("boolean"), is_counted=is_counted.astype("boolean")
    )


def print_side_by_side(store: Path, run_ids: set[str]) -> None:
    from analysis.report import comparison_tables

    frame = frame_of(store)
    # parity of any earlier command verifies these runs too
    frame = frame[frame["run_id"].isin(run_ids) | (frame["suite"] == "parity")]
    for table in comparison_tables(frame, is_brief=True):  # the report has every metric
        if table.rows:
            print()
            display.print_table(table.header, table.rows, title=table.title)


def between_backends(store: Path, planned: list[Planned]) -> Iterator[dict[str, Any]]:
    """The worst difference of the twins' tensors, for each parity run that both have."""
    import numpy as np

    from suites import parity as suite

    runs: dict[str, dict[str, Run]] = {}
    for item in planned:
        values = item.run.to_json()
        key = str({k: v for k, v in values.items() if k != "backend"})
        runs.setdefault(key, {})[item.run.backend] = item.run
    for pair in runs.values():
        files = {name: _newest_tensors(store, pair[name]) for name in TWINS if name in pair}
        if len(files) < len(TWINS) or None in files.values():
            continue
        with np.load(files["jax"]) as ours, np.load(files["torch"]) as other:
            found = suite.compare_tensors(dict(ours), dict(other))
            # the truth is not at hand: of the limits by either side's steps, the stricter
            sides = [suite.tolerances(pair["jax"], dict(side)) for side in (ours, other)]
            limits = {field: min(s[field] for s in sides if field in s) for field in found}
        run = pair["jax"]
        # Tokens are no numbers: near a tie two are right. Each side's are judged by true logits.
        del found["decode"]
        field = max(found, key=lambda name: _share(found[name], limits[name]))
        yield {
            "family": run.model.family,
            "dtype": run.dtype,
            "field": field,
            "relative_error": found[field] if np.isfinite(found[field]) else None,
            "tolerance": limits[field],
            "is_within": found[field] <= limits[field],
        }


def _share(error: float, limit: float) -> float:
    return error / limit if error == error else float("inf")


def _newest_tensors(store: Path, run: Run) -> Path | None:
    return max((store / "runs" / run.run_id).glob("*.npz"), default=None)
