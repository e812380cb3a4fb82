"""Losses at the same positions, of models that were trained at sequences of several lengths.

`loss_beyond` is of what follows a run's own training length: of other positions for each length.
Here all are held against each other where none of them was trained.
"""

from dataclasses import asdict, fields

import pandas as pd

from analysis import load, settings, statistics
from analysis.derive import outcomes, processes
from analysis.remember import remembered

SUITE, BEYOND = "length_extrapolation", "loss_beyond"
MODEL = ["family", "variant", "size", "backend", "start"]
# of runs held together: all were asked at the same positions
SHARED = ["size", "backend", "dtype", "device_kind", "data", "eval_seq_len"]


def are_other(by: str, metric: str) -> bool:
    """Whether this metric is of other positions in cells that differ in this setting."""
    return metric == BEYOND and by in ("seq_len", "eval_seq_len")


@remembered
def unseen(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a run of length_extrapolation, as processes() has it: `value` is its mean loss over the
    buckets of positions from `start` on, the longest length that any run beside it was trained at;
    buckets weigh alike, which are a quarter of an octave each."""
    rows = processes(frame)
    rows = load.words(rows[(rows["suite"] == SUITE) & (rows["metric"] == "loss_by_position")])
    rows = rows[rows["seq_len"].notna()]
    reach = rows["cell_id"].map(settings.asked(frame)["eval_seq_len"]) if len(rows) else None
    rows = rows.assign(eval_seq_len=reach)
    rows = rows.assign(start=rows.groupby(SHARED, dropna=False)["seq_len"].transform("max"))
    rows = rows[rows["at"] >= rows["start"]]
    made = rows.drop_duplicates("run_id").set_index("run_id")
    made["value"] = rows.groupby("run_id")["value"].mean()
    made["variant"] = made["cell_id"].map(outcomes(frame).set_index("cell_id")["variant"])
    return made.reset_index().assign(metric=BEYOND, at=float("nan"))


@remembered
def longer(frame: pd.DataFrame) -> pd.DataFrame:
    """What the longest training sequences gain beside the shortest, at equal tokens: a row a model,
    the difference of unseen() losses of the same seeds, as statistics.difference has it."""
    rows = unseen(frame)
    alike = rows["cell_id"].map(settings.shared(settings.asked(frame), "seq_len"))
    made = []
    for _, part in rows.groupby(alike, sort=False):
        losses = part.pivot_table(index="seed", columns="seq_len", values="value")
        short, long = losses.columns.min(), losses.columns.max()
        both = losses[[short, long]].dropna()
        if short < long and len(both):
            found = statistics.difference(both[long], both[short])
            made.append([*part.iloc[0][MODEL], int(short), int(long), *asdict(found).values()])
    names = [field.name for field in fields(statistics.Difference)]
    return pd.DataFrame(made, columns=[*MODEL, "short", "long", *names])
