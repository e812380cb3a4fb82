"""Length as a domain: the matrix of buckets, trained in one and evaluated in another."""

from typing import Any

import numpy as np
import pandas as pd

from analysis import derive, load, statistics, style, tables, vocabulary, wording
from analysis.remember import remembered
from analysis.tables import Table

SUITE = "length_domains"
SHARED = ["size", "dtype", "device_kind", "data", "num_steps"]  # of one matrix, beside the model
MODEL = ["family", "backend", "variant"]


@remembered
def domains(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each place of each matrix: the mean loss over seeds, and the penalty, by which it
    is above that of models that were trained in the bucket that is evaluated, seed by seed."""
    rows = derive.processes(frame)
    is_wanted = (rows["suite"] == SUITE) & rows["at"].notna() & rows["num_steps"].notna()
    rows = load.words(rows[is_wanted])  # what started from a checkpoint did not train in a bucket
    variant = derive.outcomes(frame).set_index("cell_id")["variant"]
    rows = rows.assign(variant=rows["cell_id"].map(variant))
    made = []
    for key, part in rows.groupby([*SHARED, *MODEL], sort=True, dropna=False):
        by_metric = {name: found for name, found in part.groupby("metric")}
        if "loss_by_length" not in by_metric:
            continue
        found = by_metric["loss_by_length"]
        losses = found.pivot_table(index="seed", columns=["seq_len", "at"], values="value")
        ids = found.groupby(["seq_len", "at"])["run_id"].agg(
            lambda ids: " ".join(dict.fromkeys(ids))
        )
        parity = found.groupby(["seq_len", "at"])["parity"].first()
        counts, errors = (
            by_metric[name].groupby(["seq_len", "at"])["value"].median()
            if name in by_metric
            else pd.Series(dtype=float)
            for name in ("num_documents", "loss_error")
        )
        for place in losses:
            trained, evaluated = place
            made.append(
                dict(zip([*SHARED, *MODEL], key, strict=True))
                | {"trained": int(trained), "evaluated": int(evaluated)}
                | _penalty(losses, place)
                | {
                    "num_documents": counts.get(place, np.nan),
                    "loss_error": errors.get(place, np.nan),
                    "parity": parity[place],
                    "run_ids": ids[place],
                }
            )
    columns = [*SHARED, *MODEL, "trained", "evaluated", "loss", "num_seeds", "penalty",
               "penalty_low", "penalty_high", "detectable", "verdict", "num_documents",
               "loss_error", "parity", "run_ids"]  # fmt: skip
    found = pd.DataFrame(made, columns=columns)
    order = [vocabulary.family_order(name) for name in found["family"]]
    found = found.assign(order=order).sort_values(
        [*SHARED, "order", "backend", "variant", "trained", "evaluated"], kind="stable"
    )
    return found.drop(columns="order").reset_index(drop=True)


def _penalty(losses: pd.DataFrame, place: tuple[float, float]) -> dict[str, Any]:
    """Of one place of a matrix; `losses` has a row a seed, a column a place."""
    values = losses[place].dropna()
    made = {"loss": values.mean(), "num_seeds": len(values), "penalty": np.nan, "verdict": None}
    own = (place[1], place[1])
    if own == place or own not in losses:
        return made
    differences = (losses[place] - losses[own]).dropna()
    if (n := len(differences)) < 2:
        return made | {"penalty": differences.mean(), "verdict": f"{n} of 2 seeds"}
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(n)
    _, half, detectable = statistics.student_test(mean, error, n - 1)
    resolved = "worse" if mean > 0 else "better"
    return made | {
        "penalty": mean,
        "penalty_low": mean - half,
        "penalty_high": mean + half,
        "detectable": float(detectable),
        "verdict": resolved if abs(mean) > half else "not resolved",
    }


def table(frame: pd.DataFrame) -> Table:
    found = domains(frame)
    shown = [name for name in (*SHARED, "variant") if found[name].nunique() > 1]
    header = ["family", "backend", *shown, "trained up to", "evaluated up to", "loss",
              "over documents", "penalty", "seeds", "verdict"]  # fmt: skip
    rows = [
        [
            style.family_label(row["family"]),
            style.backend_label(row["backend"]),
            *(wording.text(row[name]) for name in shown),
            f"{row['trained']:,}",
            f"{row['evaluated']:,}",
            wording.number(row["loss"], "loss"),
            _of_documents(row),
            _of_penalty(row),
            f"{row['num_seeds']}",
            _verdict(row),
        ]
        for row in found[: tables.MAX_ROWS].to_dict("records")
    ]
    note = (
        "Buckets of document lengths (tokens), by their ends. The penalty is the loss less that of "
        "the same family trained in the bucket that is evaluated, seed by seed on the same "
        "documents, with its 95% interval over seeds. Losses of two evaluated buckets differ in "
        "their text too. Over documents: the standard error of the loss, of how many."
    )
    numbers = {"trained up to": "trained", "evaluated up to": "evaluated", "loss": "loss",
               "penalty": "penalty"}  # fmt: skip
    return Table(SUITE, "Length as a domain", header, rows, found, note, numbers, tables.RUNS)


def _of_documents(row: dict[str, Any]) -> str:
    if pd.isna(row["loss_error"]):
        return wording.NONE
    return f"± {row['loss_error']:.3f} ({row['num_documents']:,.0f})"


def _of_penalty(row: dict[str, Any]) -> str:
    if pd.isna(row["penalty"]):
        return wording.NONE
    if pd.isna(row["penalty_low"]):
        return f"{row['penalty']:+.3f}"
    return f"{row['penalty']:+.3f} [{row['penalty_low']:+.3f}, {row['penalty_high']:+.3f}]"


def _verdict(row: dict[str, Any]) -> str:
    if row["verdict"] == "not resolved":
        return f"not resolved ({row['detectable']:.2g} nats/token would be)"
    return wording.text(row["verdict"])
