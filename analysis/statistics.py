"""Intervals and verdicts: the median of each process, paired log-ratios over rounds.

The unit of evidence is the process (one run): repeats within it are summed up by their median
and never counted as independent. Intervals have level 95%. Of a ratio: Student's t below 20 rounds,
a hierarchical bootstrap from 20; from 10 on both are of the trimmed mean, as rounds of a shared
machine have heavy tails. Of a single variant's median: order statistics from 6 processes.

How often all this is right is measured by benchmarks/statistics.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

# scipy.stats takes a second to import: who needs it does so
from scipy.special import bdtrik, nctdtrinc, stdtr, stdtrit

LEVEL = 0.95
POWER = 0.8  # with which an effect as large as the minimum detectable one is found
MIN_ROUNDS = 6  # below: no verdict
MIN_SEEDS = 3  # below: no verdict
TRIM_ROUNDS = 10  # from here the fifth of rounds on either side has no say in the ratio
BOOTSTRAP_ROUNDS = 20  # from here the bootstrap takes over from Student's t
# Adaptive rounds look at their interval after 12, 16, 20, ... rounds. Each look is a chance to stop
# while the spread is underestimated, the more so the fewer rounds there are. At worst, by noise,
# the interval at the end then holds the truth 93.7 times in 100 within 20 rounds, 93.0 within 40
# (3,000 trials each); looking at 8, 12, ... it is 92.4 and 92.8, at 6, 8, 10, ... 92.9 and 92.9.
FIRST_LOOK = 12
LOOK_EVERY = 4
MEDIAN_PROCESSES = 6  # from here the least and the largest hold the median in 95 of 100
MODE_ROUNDS = 8  # below: two modes are not told from chance
NUM_RESAMPLES = 1999
MARGINS = (0.005, 0.02)  # what noise_floor may be, and of how quiet or noisy a machine
MIN_DIFFERENCES = 10  # below: the noise of the machine is not known
MIN_REPEATS = 5  # below: no repeat is called an outlier
OUTLIER_SCORE = 5.0  # |value - median| beyond 5 scaled median absolute deviations ...
OUTLIER_SHARE = 0.05  # ... and beyond 5% of the median: five repeats alone have tiny deviations
SIZE = 0.01  # a drift, or a distance of two modes, of less than 1% is not worth a word
DRIFT_P = 0.01
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
    margin: float | None = None  # speedups from 1 / (1 + margin) to 1 + margin are equivalent


@dataclass(frozen=True)
class Difference:
    """How much more ours is than the baseline, in the unit of the metric, over paired seeds."""

    value: float | None
    interval: Interval | None
    num_seeds: int
    p: float | None  # of a difference at least as large by chance
    detectable: float | None  # the least that as many seeds would have found, at POWER
    verdict: str  # better, worse, or not resolved
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


def typical(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The ratio that log-ratios of rounds stand for, over the last axis, its standard error, and
    its degrees of freedom: the mean below 10 rounds; from 10 that of the middle three fifths. What
    is set aside counts in the error, at the values that stand next to it (Tukey and McLaughlin,
    1963; Yuen, "The two-sample trimmed t for unequal population variances", 1974).

    In turn A B and B A, log-ratios are as often too high as too low, whatever a machine does to
    single processes: the trimmed mean is the same ratio as the mean, and known far better where it
    does much. Of 20 rounds of processes of this kind recorded on a virtual machine of two cores, at
    four times, 3% was seen in 15, 29, 66 and 95% of trials by the mean, in 91, 78, 99 and 100% by
    the trimmed mean, and the truth was held in 95 to 98% and 95 to 99%. Where noise is normal the
    interval is 7 to 11% wider; of 6 rounds it would be 15%.
    """
    n = logs.shape[-1]
    cut = n // 5 if n >= TRIM_ROUNDS else 0
    ordered = np.sort(logs, axis=-1)
    kept = ordered[..., cut : n - cut]
    held = np.clip(ordered, kept[..., :1], kept[..., -1:])
    error = held.std(axis=-1, ddof=1) / ((1 - 2 * cut / n) * math.sqrt(n))
    return kept.mean(axis=-1), error, n - 2 * cut - 1


def bootstrap_interval(
    ours: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]
) -> Interval:
    """Interval of the typical log(median of ours / median of baseline) over rounds, by a
    hierarchical bootstrap of a fixed seed: rounds are resampled, and in each resampled process
    its repeats. ours[i] and baseline[i] are the repeats of one round.

    The spread of rounds already holds that of the repeats in them. Resampling both would count it
    twice (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8): where
    processes differ by five repeats alone the truth was held in 500 of 500 trials. So the effects
    of rounds are shrunk until the whole spread is that of the rounds.

    The interval is symmetric, and that of t: half of it is the standard error times what 95% of the
    resampled |mean / standard error| stay within (Hall, "On symmetric bootstrap confidence
    intervals", 1988; with trimmed means Wilcox, "Introduction to Robust Estimation and Hypothesis
    Testing"). It held the truth in 94 to 99% of trials, of recorded noise, normal noise, and noise
    of two modes. Percentiles of the mean held it in 87 to 94% where tails are heavy.
    """
    counts = tuple(tuple(len(repeats) for repeats in side) for side in (ours, baseline))
    rounds, places = _resamples(counts)
    medians, drawn = [], []
    for side, count, (low, high) in zip((ours, baseline), counts, places, strict=True):
        flat = np.concatenate([np.sort(repeats) for repeats in side])
        drawn.append(np.log(flat[low] if high is None else (flat[low] + flat[high]) / 2))
        m = np.asarray(count)
        start = np.cumsum(m) - m
        medians.append(np.log((flat[start + (m - 1) // 2] + flat[start + m // 2]) / 2))
    effect = medians[0] - medians[1]
    within = drawn[0] - drawn[1] - effect[rounds]
    total, share = effect.var(ddof=1), (within**2).mean()
    between = math.sqrt(max(0.0, 1 - share / total)) if total > 0 else 0.0
    within *= math.sqrt(min(1.0, total / share)) if share > 0 else 0.0
    centre, error, _ = typical(effect)
    means, errors, _ = typical(between * (effect - centre)[rounds] + within)
    t = np.abs(means) / np.where(errors > 0, errors, np.inf)
    half = np.quantile(t, LEVEL) * error
    return float(centre - half), float(centre + half)


def median_interval(values: Sequence[float], *, is_share: bool = False) -> Interval | None:
    """Interval of one variant's median over its processes, which always lies in it; None below two.

    From 6 on by order statistics: exact, whatever the distribution (of 6 the least and the largest:
    96.9%), where two modes put the median far from any mean. Fewer have no such interval of 95%:
    theirs is Student's, of the logarithms where values are positive, so that no time is negative;
    that of a share is of the values themselves, from 0 to 1 at most.
    It holds the median too: that is a standard deviation from the mean at most, and half of
    Student's interval of fewer than 6 values is at least 1.2 of them."""
    values = np.sort(np.asarray(values, dtype=float))
    n = len(values)
    if n >= MEDIAN_PROCESSES:
        skipped = int(num_skipped(n))
        return float(values[skipped]), float(values[-1 - skipped])
    if n < 2:
        return None
    if is_share:
        low, high = map(float, np.clip(student_interval(values), 0, 1))
    elif values[0] > 0:
        with np.errstate(over="ignore"):  # two values, orders of magnitude apart: up to infinity
            low, high = map(float, np.exp(student_interval(np.log(values))))
    else:
        low, high = student_interval(values)
    median = float(np.median(values))
    return min(low, median), max(high, median)  # of equal values logarithms round


def num_skipped(n: Any) -> Any:
    """How many of n sorted values lie outside the interval of their median, on each side; as many
    as its level allows, elementwise, from MEDIAN_PROCESSES on."""
    return np.floor(bdtrik((1 - LEVEL) / 2, n, 0.5)).astype(int)


def compare(
    ours: Sequence[float],
    baseline: Sequence[float],
    *,
    better: str = "lower",
    margin: float = MARGINS[1],
    repeats: tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]] | None = None,
) -> Comparison:
    """Paired comparison of per-process medians: ours[i] and baseline[i] are of one round.

    The speedup is the geometric mean over rounds of baseline / ours, or of ours / baseline where
    more is better; from 10 rounds on the trimmed one (`typical`). `margin` is what noise_floor says
    of the machine; `repeats`, those of ours and of the baseline by round, are resampled from 20
    rounds on.
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
    if n < BOOTSTRAP_ROUNDS:
        (found,) = compare_few(ours[None], baseline[None], [margin], better=better)
        return found
    if not ((ours > 0) & (baseline > 0)).all():
        return Comparison(None, None, n, "inconclusive", "a ratio needs positive values")
    ours_repeats, baseline_repeats = repeats or (ours[:, None], baseline[:, None])
    bounds = bootstrap_interval(baseline_repeats, ours_repeats)
    centre, _, _ = typical(np.log(baseline) - np.log(ours))
    return _compared(float(centre), bounds, n, margin, better)


def compare_few(
    ours: np.ndarray, baseline: np.ndarray, margins: Sequence[float], *, better: str = "lower"
) -> list[Comparison]:
    """compare() of many pairs at once that have as many rounds, 1 to 19: a row a pair."""
    n = ours.shape[1]
    is_ratio = ((ours > 0) & (baseline > 0)).all(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.log(baseline) - np.log(ours)
        if n > 1:
            centre, error, freedom = typical(log_ratio)
            half = stdtrit(freedom, (1 + LEVEL) / 2) * error
            ends = list(zip((centre - half).tolist(), (centre + half).tolist(), strict=True))
        else:
            centre, ends = log_ratio[:, 0], [None] * len(ours)
    none = Comparison(None, None, n, "inconclusive", "a ratio needs positive values")
    return [
        _compared(value, bounds, n, margin, better) if is_one else none
        for value, bounds, margin, is_one in zip(
            centre.tolist(), ends, margins, is_ratio, strict=True
        )
    ]


def _compared(
    mean: float, bounds: Interval | None, n: int, margin: float, better: str
) -> Comparison:
    """Of the typical log(baseline / ours), and its interval."""
    if better == "higher":
        mean, bounds = -mean, bounds and (-bounds[1], -bounds[0])
    interval = bounds and (math.exp(bounds[0]), math.exp(bounds[1]))
    verdict, reason = _verdict(interval, n, margin)
    return Comparison(math.exp(mean), interval, n, verdict, reason, margin)


def welch(
    one: Sequence[float], other: Sequence[float], level: float = LEVEL
) -> tuple[float, Interval | None]:
    """The difference of two means that are not paired, with Welch's interval: neither their spread
    nor their number need be alike. None where one has a single value."""
    one, other = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    apart = float(one.mean() - other.mean())
    if min(len(one), len(other)) < 2:
        return apart, None
    parts = np.array([values.var(ddof=1) / len(values) for values in (one, other)])
    if parts.sum() == 0:
        return apart, (apart, apart)
    freedom = parts.sum() ** 2 / (parts**2 / (np.array([len(one), len(other)]) - 1)).sum()
    half = float(stdtrit(freedom, (1 + level) / 2) * math.sqrt(parts.sum()))
    return apart, (apart - half, apart + half)


def unpaired(ours: float, baseline: float, *, better: str, reason: str) -> Comparison:
    """The bare ratio of two medians that were not measured side by side: no verdict."""
    if not (ours > 0 and baseline > 0):
        return Comparison(None, None, 0, UNPAIRED, reason)
    ratio = baseline / ours if better == "lower" else ours / baseline
    return Comparison(ratio, None, 0, UNPAIRED, reason)


def _verdict(interval: Interval | None, n: int, margin: float) -> tuple[str, str | None]:
    """Equivalence first: two one-sided tests (TOST) at 2.5% each, by the interval that is shown. A
    difference that is certain, yet within the noise of the machine, is none worth having."""
    if n < MIN_ROUNDS or interval is None:
        return "inconclusive", f"{n} of {MIN_ROUNDS} rounds"
    low, high = interval
    if low >= 1 / (1 + margin) and high <= 1 + margin:
        return "equivalent", None
    if low > 1:
        return "faster", None
    if high < 1:
        return "slower", None
    return "inconclusive", "the interval holds both faster and slower"


def noise_floor(log_ratios: Sequence[float]) -> float:
    """The margin of equivalence of a machine: what 95% of its A/A pairs stay within, by |ratio -
    1|, clipped to MARGINS; their upper end where fewer than 10 pairs are known.

    An A/A pair is a process beside the next one of the same cell, which interleaved blocks hold
    anyway. One pair, and not the mean of as many as were compared: a margin that shrinks with the
    rounds as the interval does is always narrower than it, and nothing would ever be equivalent.

    The clip: on a noisy machine, where A/A pairs differ by 5%, a slow-down of 3% must not become
    equivalent (nor one of 2%, were it known well enough); on a quiet one, where they differ by
    0.3%, a real 1.5% stays a difference, and nobody is told that 0.3% matters.

    Of 4,000 simulated comparisons of 20 rounds, pairs being apart by a standard deviation of 0.3,
    1, 2 and 5%: no difference was equivalent in 100, 100, 98 and 3%, one of 1.5% in 0, 30, 17 and
    1%, one of 3% in 0, 0, 0 and 0.1%.
    """
    sizes = np.abs(np.asarray(log_ratios, dtype=float))
    if len(sizes) < MIN_DIFFERENCES:
        return MARGINS[1]
    return float(np.clip(np.expm1(np.quantile(sizes, LEVEL)), *MARGINS))


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


def difference(
    ours: Sequence[float], baseline: Sequence[float], *, better: str = "lower"
) -> Difference:
    """Paired comparison of a quality: ours[i] and baseline[i] are of one seed, so of the same data
    in the same order and equal initial values.

    There is no "equivalent": what difference of loss matters is not the machine's to say. The
    minimum detectable effect says how small one could have been found.
    """
    apart = np.asarray(ours, dtype=float) - np.asarray(baseline, dtype=float)
    return differences(apart[None], better=better)[0]


def differences(apart: np.ndarray, *, better: str = "lower") -> list[Difference]:
    """difference() of many pairs at once that have as many seeds: a row a pair, ours - baseline."""
    n = apart.shape[1]
    if n == 0:
        none = Difference(None, None, 0, None, None, "not resolved", "no seed in common")
        return [none] * len(apart)
    values = apart.mean(axis=1)
    reason = f"{n} of {MIN_SEEDS} seeds" if n < MIN_SEEDS else None
    if n == 1:
        return [Difference(value, None, 1, None, None, "not resolved", reason)
                for value in values.tolist()]  # fmt: skip
    error = apart.std(axis=1, ddof=1) / math.sqrt(n)
    made = []
    for value, p, half, least in zip(
        *(found.tolist() for found in (values, *student_test(values, error, n - 1))), strict=True
    ):
        verdict = "not resolved"
        if n >= MIN_SEEDS and p < 1 - LEVEL:
            verdict = "better" if (value < 0) == (better == "lower") else "worse"
        ends = (value - half, value + half)
        made.append(Difference(value, ends, n, p, least, verdict, reason))
    return made


def student_test(estimate: Any, error: Any, freedom: Any) -> tuple[Any, Any, Any]:
    """Of estimates with standard errors, elementwise: p (two-sided), half the interval, and the
    minimum detectable effect: how large a true one is found with POWER."""
    estimate, error = np.asarray(estimate, dtype=float), np.asarray(error, dtype=float)
    quantile = stdtrit(freedom, (1 + LEVEL) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(estimate == 0, 0.0, np.abs(estimate) / error)
    p = 2 * stdtr(freedom, -t)
    return p, quantile * error, nctdtrinc(freedom, 1 - POWER, quantile) * error


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for their number (Holm, 1979): of those below 5%, the chance that any is
    false is at most 5%."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)
    steps = (len(p_values) - np.arange(len(p_values))) * p_values[order]
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def accuracy_interval(num_correct: int, num_questions: int) -> Interval:
    """Interval of a share of right answers: Wilson's, which stays within 0 and 1 and holds where
    all are right."""
    from scipy.stats import binomtest

    found = binomtest(num_correct, num_questions).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def is_drifting(logs: np.ndarray) -> np.ndarray:
    """Which rows, logarithms of per-process medians in the order of their rounds, have a trend: a
    line through them is not level (p < 1%), and rises or falls by at least 1% from the first round
    to the last. False alarms: 1.0 to 1.1% of normal series of 6 to 40 rounds, fewer of heavy tails
    or two modes. A drift of 3% in noise of 1% is seen in 30% at 8 rounds, 87% at 20."""
    n = logs.shape[-1]
    if n < MIN_ROUNDS:
        return np.zeros(logs.shape[:-1], dtype=bool)
    place = np.arange(n) - (n - 1) / 2
    centred = logs - logs.mean(axis=-1, keepdims=True)
    slope = centred @ place / (place @ place)
    left = np.maximum((centred**2).sum(axis=-1) - slope**2 * (place @ place), 0)
    p, _, _ = student_test(slope, np.sqrt(left / (n - 2) / (place @ place)), n - 2)
    return (p < DRIFT_P) & (np.abs(slope) * (n - 1) >= math.log1p(SIZE))


def has_two_modes(logs: np.ndarray) -> np.ndarray:
    """Which rows, logarithms of per-process medians, are two groups: cut where the two parts are
    tightest (each of at least two processes: a single one is an outlier), the parts lie at least 1%
    apart, and their distance explains more of the variance than it does in 99% of normal samples
    of this count, 0.71 + 0.66 / sqrt(n) from 8 on. Below 8 rounds nothing is said. False alarms:
    0.2 to 0.7% of normal series. A second mode of every fourth process, ten standard deviations
    away, is seen in 59% at 8 rounds, 97% at 20."""
    n = logs.shape[-1]
    if n < MODE_ROUNDS:
        return np.zeros(logs.shape[:-1], dtype=bool)
    centred = np.sort(logs - logs.mean(axis=-1, keepdims=True), axis=-1)
    count = np.arange(2, n - 1)  # in the lower part
    below = np.cumsum(centred, axis=-1)[..., 1 : n - 2]
    between = below**2 * (1 / count + 1 / (n - count))
    best = between.argmax(axis=-1)[..., None]
    explained = np.take_along_axis(between, best, -1)[..., 0]
    apart = np.take_along_axis(-below * (1 / count + 1 / (n - count)), best, -1)[..., 0]
    total = (centred**2).sum(axis=-1)
    return (explained > (0.71 + 0.66 / math.sqrt(n)) * total) & (apart >= math.log1p(SIZE))


@lru_cache(maxsize=16)
def _resamples(counts: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[np.ndarray, list]:
    """Which rounds are drawn, [resample, round], and for both sides where in all their repeats,
    sorted within each process, the two stand whose mean is the median of as many repeats of that
    process, drawn with replacement; no second one where the numbers of repeats are odd.

    Sorting every draw would take a second a comparison. The middle one of m draws from m sorted
    repeats is that at rank floor(m U), U being the middle one of m uniform numbers: a beta.
    """
    rng = np.random.default_rng(0)
    n = len(counts[0])
    rounds, places = rng.integers(n, size=(NUM_RESAMPLES, n)), []
    for side in counts:
        m, start = np.asarray(side)[rounds], (np.cumsum(side) - side)[rounds]
        middle = (m + 1) // 2
        below = rng.beta(middle, m - middle + 1)
        low, high = start + np.minimum((below * m).astype(np.intp), m - 1), None
        if (m % 2 == 0).any():
            above = below + (1 - below) * rng.beta(1, np.maximum(m - middle, 1))  # the next one
            above = np.minimum((above * m).astype(np.intp), m - 1)
            high = np.where(m % 2, low, start + above)
        places.append((low, high))
    return rounds, places
