"""How loss falls with FLOPs or parameters: loss = E + A x^-b, with what seeds leave open.

Fits of few sizes are lines through few points: each says how many decades it spans, and below four
sizes it has no band.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.special import ndtr, stdtrit

from analysis import statistics
from analysis.derive import outcomes, processes

MIN_SIZES = 4  # below: no band
MIN_FREEDOM = 4  # of the noise: seeds beyond the first of each size; below: no band
NUM_RESAMPLES = 1999
AGAINST = {"train_flops": "training FLOPs", "num_params_non_embedding": "parameters"}
_EXPONENTS = (1e-3, 3.0)  # among which one is sought beside an irreducible loss
_KEY = ["family", "backend", "dtype", "device_kind", "data", "variant"]


@dataclass(frozen=True)
class PowerLaw:
    """`loss(x)` is the fit, `band(x)` where it lies in 95% of resamples."""

    against: str  # of AGAINST
    coefficient: float  # A
    exponent: float  # b
    irreducible: float  # E; 0 where it was not asked for
    interval: statistics.Interval | None  # of the exponent
    num_sizes: int
    num_seeds: int  # of the size that has the fewest
    most_seeds: int
    least: float  # the smallest x, and
    most: float  # the largest
    draws: np.ndarray | None  # [resample, (log A, b, E)]
    tail: float  # the share of resamples below the band, and above it

    def loss(self, x: np.ndarray) -> np.ndarray:
        return self.irreducible + self.coefficient * np.asarray(x, dtype=float) ** -self.exponent

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        if self.draws is None:
            return None
        log_coefficient, exponent, irreducible = self.draws.T[:, :, None]
        losses = irreducible + np.exp(log_coefficient - exponent * np.log(x))
        low, high = np.quantile(losses, (self.tail, 1 - self.tail), axis=0)
        return low, high

    @property
    def span_decades(self) -> float:
        return float(np.log10(self.most / self.least))

    @cached_property
    def sentence(self) -> str:
        what = AGAINST[self.against]
        exponent = f"{self.exponent:.3f}"
        if self.interval:
            exponent += f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"
        beside = f" towards {self.irreducible:.2f}" if self.irreducible else ""
        seeds = f"{self.num_seeds} seed{'s' if self.num_seeds > 1 else ''} each"
        if self.most_seeds > self.num_seeds:
            seeds = f"{self.num_seeds} to {self.most_seeds} seeds"
        text = (
            f"Loss falls{beside} as {what} to the power of -{exponent}, fitted to {self.num_sizes} "
            f"sizes of {seeds} that span {self.span_decades:.1f} decades, {self.least:.2g} to "
            f"{self.most:.2g}: it says nothing of what lies beyond."
        )
        if self.num_sizes < MIN_SIZES:
            text += f" With fewer than {MIN_SIZES} sizes there is no band."
        elif self.most_seeds < 2:
            text += " One seed shows no noise: there is no band."
        elif self.draws is None:
            text += " So few seeds do not show the noise: there is no band."
        return text


def fits(frame: pd.DataFrame, against: str = "train_flops", *, irreducible: bool = False) -> list:
    """(what the runs share, its PowerLaw) for every family, backend, ... of two or more sizes."""
    made = []
    for key, rows in points(frame).groupby(_KEY, sort=False, dropna=False, observed=True):
        if rows[against].nunique() > 1:
            law = fit(rows[against], rows["loss"], against=against, irreducible=irreducible)
            made.append((dict(zip(_KEY, key, strict=True)), law))
    return made


def points(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a trained model: what it cost and the held-out loss that it reached. Of one size that
    was trained for several budgets the largest counts."""
    rows = processes(frame)
    rows = rows[(rows["suite"] == "language_modeling") & (rows["metric"] == "loss")]
    variant = outcomes(frame).set_index("cell_id")["variant"]
    rows = rows.assign(variant=rows["cell_id"].map(variant))
    counts = ["num_steps", "batch_size", "seq_len"]
    tokens = rows[counts].astype("float64").prod(axis=1)
    rows["train_flops"] = rows["train_flops_per_token"] * tokens
    largest = rows.groupby([*_KEY, "size"], dropna=False, observed=True)["train_flops"]
    rows = rows[rows["train_flops"] == largest.transform("max")]
    rows = rows.assign(loss=rows["value"]).astype({"num_params_non_embedding": "float64"})
    shown = [*_KEY, "size", "seed", *AGAINST, "loss"]
    return rows[shown].sort_values([*_KEY, "train_flops", "seed"]).reset_index(drop=True)


def fit(
    x: np.ndarray, loss: np.ndarray, *, against: str = "train_flops", irreducible: bool = False
) -> PowerLaw:
    """The law through the mean of each size, which is one value of x, of any number of seeds.

    Without an irreducible loss that is a line through logarithms. The band and the interval of the
    exponent are a bootstrap over seeds: deviations from the mean of their size, in logarithms and
    widened by sqrt(n / (n - 1)) for the mean they were taken from, are pooled and drawn again, for
    sizes of a single seed too; percentiles are expanded as Student's t is for as many deviations.
    It holds what seeds leave open, not that sizes may follow no power law.
    """
    x, loss = np.asarray(x, dtype=float), np.asarray(loss, dtype=float)
    if not ((x > 0) & (loss > 0)).all():
        raise ValueError("a power law needs positive sizes and losses.")
    sizes, place = np.unique(x, return_inverse=True)
    if len(sizes) < 2:
        raise ValueError(f"a power law needs two sizes or more, got {len(sizes)}.")
    counts, logs = np.bincount(place), np.log(loss)
    means = np.bincount(place, weights=logs) / counts
    (found,) = _solve(np.log(sizes), means[None], irreducible)
    draws, interval, tail = None, None, 0.0
    freedom = len(x) - len(sizes)
    if len(sizes) >= MIN_SIZES and freedom >= MIN_FREEDOM:
        rng = np.random.default_rng(0)
        widened = np.sqrt(counts / np.maximum(counts - 1, 1))[place]
        apart = ((logs - means[place]) * widened)[counts[place] > 1]
        moved = [
            mean + rng.choice(apart, (NUM_RESAMPLES, count)).mean(axis=1)
            for mean, count in zip(means, counts, strict=True)
        ]
        draws = _solve(np.log(sizes), np.stack(moved, axis=1), irreducible)
        tail = float(ndtr(-stdtrit(freedom, (1 + statistics.LEVEL) / 2)))
        low, high = np.quantile(draws[:, 1], (tail, 1 - tail))
        interval = float(low), float(high)
    return PowerLaw(
        against=against,
        coefficient=float(np.exp(found[0])),
        exponent=float(found[1]),
        irreducible=float(found[2]),
        interval=interval,
        num_sizes=len(sizes),
        num_seeds=int(counts.min()),
        most_seeds=int(counts.max()),
        least=float(sizes[0]),
        most=float(sizes[-1]),
        draws=draws,
        tail=tail,
    )


def _solve(log_x: np.ndarray, log_loss: np.ndarray, irreducible: bool) -> np.ndarray:
    """(log A, b, E) of each row of log_loss."""
    centre = log_x.mean()
    z = log_x - centre
    slope = log_loss @ z / (z @ z)
    plain = np.stack([log_loss.mean(axis=1) - slope * centre, -slope, 0 * slope], axis=1)
    if not irreducible:
        return plain
    # For each exponent E and A are a line's; it is sought by three grids, each within the last.
    loss = np.exp(log_loss)
    low, high = (np.full(len(loss), np.log(end)) for end in _EXPONENTS)
    for _ in range(3):
        exponents = np.exp(np.linspace(low, high, 41, axis=1))
        power = np.exp(-exponents[:, :, None] * z)
        apart = power - power.mean(axis=2, keepdims=True)
        steepness = (apart * loss[:, None, :]).sum(axis=2) / (apart**2).sum(axis=2)
        level = loss.mean(axis=1)[:, None] - steepness * power.mean(axis=2)
        left = loss[:, None, :] - level[:, :, None] - steepness[:, :, None] * power
        best = (left**2).sum(axis=2).argmin(axis=1)
        row = np.arange(len(loss))
        low = np.log(exponents[row, np.maximum(best - 1, 0)])
        high = np.log(exponents[row, np.minimum(best + 1, 40)])
    level, steepness, exponent = (values[row, best] for values in (level, steepness, exponents))
    is_one = (level > 0) & (steepness > 0)  # else nothing speaks for a loss that stays
    coefficient = np.log(np.where(is_one, steepness, 1)) + exponent * centre
    return np.where(is_one[:, None], np.stack([coefficient, exponent, level], axis=1), plain)
