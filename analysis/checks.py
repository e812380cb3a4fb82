"""Parity as records show it: which check of which engine is green, and what it verifies."""

import numpy as np
import pandas as pd

from analysis.load import words
from analysis.remember import remembered
from analysis.vocabulary import family_order, plain

PARITY_KEY = ["family", "architecture", "backend", "dtype", "linear_scan", "attention",
              "layers", "program", "device_kind", "engine_build"]  # fmt: skip
GREEN, RED, MISSING = "green", "red", "none"
PARTIAL = "partial"  # green, but of some levels alone: verifies nothing
WRONG = ("invalid_measurement", "failed", "diverged")
PARITY_ORDER = (GREEN, MISSING, RED)
UNVERIFIED = "UNVERIFIED"
PARITY_SIZE = "tiny"


@remembered
def parity(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each PARITY_KEY: green when every error of a completed check is within its
    tolerance, and there is at least one; else red. Checks of some levels alone can make a key red,
    never green: without others it is partial. `worst` is the largest error / tolerance."""
    rows = _latest_checks(frame)
    # where nothing can run, nothing needs proof
    rows = rows[(rows["size"] == PARITY_SIZE) & (rows["outcome"] != "unsupported")]
    if rows.empty:
        return pd.DataFrame(columns=[*PARITY_KEY, "status", "num_checks", "worst", "worst_field"])
    errors = parity_errors(rows)
    checks = errors.groupby("attempt", sort=False)
    worst = errors.loc[checks["share"].idxmax()] if len(errors) else errors
    facts = worst.set_index("attempt").assign(
        num_checks=checks.size(), is_within=checks["is_within"].all()
    )
    facts = facts.to_dict("index")
    made = []
    for run in words(rows[~rows["attempt"].duplicated()]).to_dict("records"):
        fact = facts.get(run["attempt"])
        is_partial = plain(run["levels"]) is not None
        # what a part of the ladder could not finish says nothing of the rest
        is_red = run["outcome"] in WRONG if is_partial else run["outcome"] != "completed"
        is_red |= not is_partial if fact is None else not fact["is_within"]
        made.append(
            {name: run[name] for name in PARITY_KEY}
            | {
                "status": RED if is_red else PARTIAL if is_partial else GREEN,
                "outcome": run["outcome"],
                "reason": run["reason"],
                "num_checks": 0 if fact is None else int(fact["num_checks"]),
                "worst": None if fact is None else float(fact["share"]),
                "worst_field": None if fact is None else fact["field"],
                "worst_error": None if fact is None else float(fact["value"]),
                "tolerance": None if fact is None else float(fact["tolerance"]),
                "levels": run["levels"],
                "run_id": run["run_id"],
                "cell_id": run["cell_id"],
            }
        )
    status = pd.DataFrame(made)
    status["family_order"] = [family_order(name) for name in status["family"]]
    # Several checks of one key (seeds, workloads, levels): one red makes it red.
    status["rank"] = status["status"].map((RED, GREEN, PARTIAL).index)
    status = status.sort_values(["rank", "worst"], ascending=[True, False], kind="stable")
    checks = status.groupby(PARITY_KEY, dropna=False, sort=False)["num_checks"].transform("sum")
    status = status.assign(num_checks=checks).drop_duplicates(PARITY_KEY)
    order = ["family_order", "backend", "dtype"]
    status = status.sort_values(order, kind="stable").drop(columns=["family_order", "rank"])
    return status.reset_index(drop=True)


@remembered
def parity_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """Every relative error of the parity runs beside its tolerance. share: of the tolerance, by the
    largest error or by the root mean squares, whichever is more. An error without a tolerance is
    not within it.
    """
    rows = words(_latest_checks(frame))
    rows["at"] = rows["at"].astype("float64").fillna(-1)
    rows["field"] = rows["field"].where(rows["field"].notna(), "")
    key = ["attempt", "field", "at"]
    errors = rows[rows["metric"] == "relative_error"]
    for metric in ("tolerance", "rms_error", "rms_tolerance"):
        values = rows[rows["metric"] == metric].drop_duplicates(key)[[*key, "value"]]
        errors = errors.merge(values.rename(columns={"value": metric}), on=key, how="left")
    share = _share(errors["value"], errors["tolerance"])
    rms = _share(errors["rms_error"], errors["rms_tolerance"]).where(errors["rms_error"].notna(), 0)
    errors["share"] = np.maximum(share, rms).astype("float64")
    errors["is_within"] = errors["share"] <= 1
    return errors.reset_index(drop=True)


def _share(error: pd.Series, limit: pd.Series) -> pd.Series:
    """Of a limit; nothing of one that is 0 and kept, everything where there is none."""
    share = (error / limit.where(limit > 0)).where(limit != 0, np.where(error > 0, np.inf, 0.0))
    return share.where(share.notna(), np.inf)


def _latest_checks(frame: pd.DataFrame) -> pd.DataFrame:
    """Parity rows: of each run and engine the last attempt, whatever was run before or since with
    another engine. Attempts sort by time."""
    rows = frame[frame["suite"] == "parity"]
    place = rows["attempt"].astype("category").cat.codes
    key = [rows["run_id"], rows["engine_build"]]
    return rows[place == place.groupby(key, dropna=False, observed=True).transform("max")]


def mark_parity(rows: pd.DataFrame, status: pd.DataFrame) -> pd.DataFrame:
    """`parity` of each row: green, red, or none where no whole parity record has its key."""
    known = {tuple(plain(row[name]) for name in PARITY_KEY): row["status"]
             for row in status.to_dict("records") if row["status"] != PARTIAL}  # fmt: skip
    numbers = rows.groupby(PARITY_KEY, dropna=False, sort=False, observed=True).ngroup()
    keys = rows.loc[~numbers.duplicated(), PARITY_KEY].itertuples(index=False, name=None)
    marks = [known.get(tuple(map(plain, key)), MISSING) for key in keys]
    return rows.assign(parity=np.array(marks, dtype=object)[numbers])
