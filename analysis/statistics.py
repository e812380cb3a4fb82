"""Intervals and verdicts: the median of each process, paired log-ratios over rounds.

The unit of evidence is the process (one run): repeats within it are summed up by their median
and never counted as independent. Intervals have level 95%: Student's t below 20 rounds, the
bootstrap from 20 (of a single variant's median: order statistics).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# scipy.stats takes a second to import: only the bootstrap does
from scipy.special import bdtrik, stdtrit

LEVEL = 0.95
MIN_ROUNDS = 6  # below: no verdict
BOOTSTRAP_ROUNDS = 20  # from here the bootstrap takes over from Student's t
# Adaptive rounds look at their interval after 8, 12, 16, ... rounds. Each look is a chance to stop
# while the spread is underestimated: with these, at worst (noise for which the decision falls
# between 12 and 20 rounds) the interval at the end holds the truth 93.5 times in 100; looking at 6
# and each second round after it, 92.9 times.
FIRST_LOOK = 8
LOOK_EVERY = 4
EQUIVALENCE_MARGIN = 0.02  # ratios within 2% of 1 are equivalent
NUM_RESAMPLES = 1999
MIN_REPEATS = 5  # below: no repeat is called an outlier
OUTLIER_SCORE = 5.0  # |value - median| beyond 5 scaled median absolute deviations ...
OUTLIER_SHARE = 0.05  # ... and beyond 5% of the median: five repeats alone have tiny deviations
UNPAIRED = "unpaired"

Interval = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """How many times faster ours is than the baseline (> 1 is faster), with its interval."""

    speedup: float | None
    interval: Interval | None
    num_rounds: int
    verdict: str  # faster, slower, equivalent, inconclusive, or unpaired
    reason: str | None = None  # why there is no verdict


def is_far(distance: Any, median: Any, median_distance: Any, count: Any) -> Any:
    """Which repeats stand far from the median of their process, elementwise; they are flagged,
    never dropped. 1.4826 makes the median distance a normal's standard deviation."""
    far = np.maximum(OUTLIER_SCORE * 1.4826 * median_distance, OUTLIER_SHARE * np.abs(median))
    return (distance > far) & (count >= MIN_REPEATS)


def student_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Interval of the mean, by Student's t; None below two values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    half = student_half_width(len(values), float(values.std(ddof=1)), level)
    return float(values.mean() - half), float(values.mean() + half)


def student_half_width(
    n: np.ndarray | int, deviation: np.ndarray | float, level: float = LEVEL
) -> np.ndarray | float:
    """Half the interval of a mean of n values, elementwise."""
    return stdtrit(np.asarray(n) - 1, (1 + level) / 2) * deviation / np.sqrt(n)


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Interval of the mean: bootstrap, bias-corrected and accelerated, of a fixed seed."""
    values = np.asarray(values, dtype=float)
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    from scipy.stats import bootstrap  # here: importing it takes a second

    found = bootstrap(
        (values,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=NUM_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def median_interval(values: Sequence[float]) -> Interval | None:
    """Interval of one variant's typical value over its processes; None below two. Below 20 it is
    Student's, of the logarithms where values are positive, so that no time is negative; from 20
    that of the median by order statistics: exact, whatever the distribution."""
    values = np.sort(np.asarray(values, dtype=float))
    if len(values) < BOOTSTRAP_ROUNDS:
        if len(values) > 1 and values[0] > 0:
            low, high = student_interval(np.log(values))
            return math.exp(low), math.exp(high)
        return student_interval(values)
    # the largest number of values that may be left out below and above: P(X < skipped) <= 2.5%
    skipped = max(0, math.floor(bdtrik((1 - LEVEL) / 2, len(values), 0.5)))
    return float(values[skipped]), float(values[-1 - skipped])


def compare(
    ours: Sequence[float], baseline: Sequence[float], *, better: str = "lower"
) -> Comparison:
    """Paired comparison of per-process medians: ours[i] and baseline[i] are of one round.

    The speedup is the geometric mean over rounds of baseline / ours, or of ours / baseline where
    more is better.
    """
    ours, baseline = np.asarray(ours, dtype=float), np.asarray(baseline, dtype=float)
    if ours.shape != baseline.shape or ours.ndim != 1:
        raise ValueError(
            f"a paired comparison needs as many rounds of both, got {ours.shape} and "
            f"{baseline.shape}."
        )
    if better not in ("lower", "higher"):
        raise ValueError(f"better={better!r}; must be 'lower' or 'higher'.")
    n = len(ours)
    if n == 0:
        return Comparison(None, None, 0, UNPAIRED, "no round was measured on the same node")
    if not ((ours > 0) & (baseline > 0)).all():
        return Comparison(None, None, n, "inconclusive", "a ratio needs positive values")
    log_ratio = np.log(baseline) - np.log(ours)
    if better == "higher":
        log_ratio = -log_ratio
    bounds = student_interval(log_ratio) if n < BOOTSTRAP_ROUNDS else bootstrap_interval(log_ratio)
    interval = None if bounds is None else (math.exp(bounds[0]), math.exp(bounds[1]))
    verdict, reason = _verdict(interval, n)
    return Comparison(math.exp(log_ratio.mean()), interval, n, verdict, reason)


def unpaired(ours: float, baseline: float, *, better: str, reason: str) -> Comparison:
    """The bare ratio of two medians that were not measured side by side: no verdict."""
    if not (ours > 0 and baseline > 0):
        return Comparison(None, None, 0, UNPAIRED, reason)
    ratio = baseline / ours if better == "lower" else ours / baseline
    return Comparison(ratio, None, 0, UNPAIRED, reason)


def is_look(num_rounds: int) -> bool:
    """Whether adaptive rounds may stop after so many."""
    return num_rounds >= FIRST_LOOK and (num_rounds - FIRST_LOOK) % LOOK_EVERY == 0


def is_settled(ours: Sequence[float], baseline: Sequence[float], until: float) -> bool:
    """Whether one pair needs no further round: its interval is known to within `until` (0.02: the
    upper end is at most 2% above the lower) at a round count where it may be looked at.

    ours[i] and baseline[i] are per-process medians of one round. How narrow the interval is says
    nothing of which side is faster, and that is never looked at: to stop at a wished-for sign
    would make verdicts false.
    """
    if not until > 0:
        raise ValueError(f"until={until!r}; must be above 0, as 0.02 for 2%.")
    found = compare(ours, baseline)
    if found.interval is None or not is_look(found.num_rounds):
        return False
    low, high = found.interval
    return high / low - 1 <= until


def _verdict(interval: Interval | None, n: int) -> tuple[str, str | None]:
    if n < MIN_ROUNDS or interval is None:
        return "inconclusive", f"{n} of {MIN_ROUNDS} rounds"
    low, high = interval
    if low >= 1 / (1 + EQUIVALENCE_MARGIN) and high <= 1 + EQUIVALENCE_MARGIN:
        return "equivalent", None
    if low > 1:
        return "faster", None
    if high < 1:
        return "slower", None
    return "inconclusive", "the interval holds both faster and slower"
