"""L6: do trainings of the two backends end at the same loss, seed by seed, on real text?

Two one-sided tests (TOST) at 5% each: the 90% interval of the mean difference must lie within a
margin. The margin is half of what another seed would change, by standard deviation: a difference
that no experiment over these seeds could tell from chance.
"""

from typing import Any

import numpy as np

from suites.harness.run import Run
from suites.ladder.tables import TWINS, Shown, kernels_of, number, settings_of

SHARE_OF_SEED_NOISE = 0.5
MIN_SEEDS = 5


def equivalence(shown: Shown) -> list[dict[str, Any]]:
    """One row a model: both mean losses, their difference with its interval, and the margin."""
    from analysis.statistics import student_interval

    losses: dict[str, dict[str, dict[int, float]]] = {}
    for run, record in shown:
        found = [s["value"] for s in record["samples"] if s["metric"] == "loss"]
        if run.workload.levels == ("L6",) and found:
            by_backend = losses.setdefault(_cell(run), {})
            by_backend.setdefault(run.backend, {})[run.seed] = found[0]
    made = []
    for cell, by_backend in losses.items():
        jax, torch = (by_backend.get(backend, {}) for backend in TWINS)
        seeds = sorted(jax.keys() & torch.keys())
        pairs = np.array([(jax[seed], torch[seed]) for seed in seeds]).reshape(-1, 2)
        difference = pairs[:, 0] - pairs[:, 1]
        noise = float(pairs.std(axis=0, ddof=1).mean()) if len(seeds) > 1 else float("nan")
        margin = SHARE_OF_SEED_NOISE * noise
        interval = student_interval(difference, level=0.9)
        low, high = interval or (None, None)
        is_within = interval is not None and -margin < low and high < margin
        made.append(
            {
                "cell": cell,
                "num_seeds": len(seeds),
                "loss_jax": float(pairs[:, 0].mean()) if len(seeds) else None,
                "loss_torch": float(pairs[:, 1].mean()) if len(seeds) else None,
                "seed_noise": None if np.isnan(noise) else noise,
                "difference": float(difference.mean()) if len(seeds) else None,
                "low": low,
                "high": high,
                "margin": None if np.isnan(margin) else margin,
                "is_equivalent": bool(is_within) and len(seeds) >= MIN_SEEDS,
            }
        )
    return made


def _cell(run: Run) -> str:
    parts = (run.model.family, settings_of(run.model), run.dtype, kernels_of(run))
    return " ".join(filter(None, parts))


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["model", "seeds", "loss jax", "loss torch", "seed noise", "jax - torch",
              "90% interval", "margin", "verdict"]  # fmt: skip
    return header, [
        [
            row["cell"],
            str(row["num_seeds"]),
            *("-" if row[key] is None else f"{row[key]:.6f}" for key in ("loss_jax", "loss_torch")),
            number(row["seed_noise"]),
            number(row["difference"]),
            f"{number(row['low'])} to {number(row['high'])}",
            number(row["margin"]),
            "equivalent" if row["is_equivalent"] else f"RED (needs {MIN_SEEDS} seeds within)",
        ]
        for row in rows
    ]
