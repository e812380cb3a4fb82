"""What processes of one cell, measured again and again in a block, say of the machine: how far they
lie apart, and which cells drift or have two modes."""

import numpy as np
import pandas as pd

from analysis import statistics
from analysis.derive import processes
from analysis.remember import remembered
from analysis.vocabulary import TIMES

DRIFTING, TWO_MODES = "drifting", "two modes"
_PLACE = ["node", "device_name", "metric"]
_SERIES = ["block", "cell_id", "at", *_PLACE]


@remembered
def floors(frame: pd.DataFrame) -> dict[tuple[str, str, str], float]:
    """Of each (node, device_name, metric) the margin of equivalence: statistics.noise_floor of all
    pairs of a process and the next one of its cell, in the order of their block."""
    rows = _series(frame)
    rows["apart"] = rows.groupby("series")["log"].diff()
    rows = rows[rows["apart"].notna()]
    return {
        place: statistics.noise_floor(apart.to_numpy())
        for place, apart in rows.groupby(_PLACE, observed=True)["apart"]
    }


@remembered
def flags(frame: pd.DataFrame) -> pd.Series:
    """What is odd of a cell, by (cell_id, metric, at): "drifting", "two modes", both or "". A cell
    that was measured in several places is flagged where it is odd in one; `at` is -1 for none."""
    rows = _series(frame)
    key = ["cell_id", "metric", "at"]
    first = rows.groupby("series").first()
    counts = rows.groupby("series").size()
    logs = rows["log"].to_numpy()
    starts = np.cumsum(counts.to_numpy()) - counts.to_numpy()
    is_odd = pd.DataFrame(False, index=first.index, columns=[DRIFTING, TWO_MODES])
    for count, series in counts.groupby(counts).groups.items():
        block = logs[starts[series][:, None] + np.arange(count)]
        is_odd.loc[series, DRIFTING] = statistics.is_drifting(block)
        is_odd.loc[series, TWO_MODES] = statistics.has_two_modes(block)
    found = is_odd.groupby([first[name] for name in key], observed=True).any()
    names = {(False, False): "", (True, False): DRIFTING, (False, True): TWO_MODES,
             (True, True): f"{DRIFTING}, {TWO_MODES}"}  # fmt: skip
    words = [names[odd] for odd in found.itertuples(index=False, name=None)]
    return pd.Series(words, index=found.index, dtype=object)


def _series(frame: pd.DataFrame) -> pd.DataFrame:
    """Processes of timing runs in blocks, in the order of each series: one cell, one place."""
    rows = processes(frame)
    keep = rows["metric"].isin(TIMES) & rows["block"].notna() & (rows["value"] > 0)
    keep &= rows["node"].notna() & rows["device_name"].notna()
    rows = rows.loc[keep, [*_SERIES, "order", "round", "value"]]
    rows["at"] = rows["at"].astype("float64").fillna(-1)
    rows["log"] = np.log(rows["value"].to_numpy(dtype=float))
    rows["series"] = rows.groupby(_SERIES, observed=True).ngroup()
    return rows.sort_values(["series", "order", "round"], kind="stable").reset_index(drop=True)
