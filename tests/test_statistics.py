"""Intervals and verdicts: coverage, the two sides of every threshold, and who may be compared."""

import numpy as np
import pytest
import scipy.stats
from synthetic_records import record, sample

from analysis import comparisons, derive, statistics
from analysis.load import frame_of


def rounds(ratio: float, n: int, noise: float = 0.01, seed: int = 0):
    """Per-process medians of ours and of a baseline that takes `ratio` times as long."""
    rng = np.random.default_rng(seed)
    drift = rng.uniform(50, 150, n)  # what both sides of a round share, and pairing removes
    return drift * rng.normal(1, noise, n), ratio * drift * rng.normal(1, noise, n)


def test_a_known_ratio_is_found_in_spite_of_drift_between_rounds():
    ours, baseline = rounds(1.5, 10)
    found = statistics.compare(ours, baseline)
    assert found.speedup == pytest.approx(1.5, rel=0.02)
    assert found.interval[0] < 1.5 < found.interval[1]
    assert found.interval[1] - found.interval[0] < 0.05  # unpaired, the drift would make it 1
    assert found.verdict == "faster"


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [(1.2, 0.01, "faster"), (0.8, 0.01, "slower"), (1.001, 0.002, "equivalent"),
     (1.0, 0.1, "inconclusive")],
)  # fmt: skip
@pytest.mark.parametrize("n", [6, 19, 20, 40])
def test_verdict_says_which_way_from_six_rounds(ratio, noise, verdict, n):
    assert statistics.compare(*rounds(ratio, n, noise)).verdict == verdict


@pytest.mark.parametrize("n", [1, 2, 5])
def test_five_rounds_are_too_few_however_clear_the_ratio(n):
    found = statistics.compare(*rounds(3.0, n, 1e-4))
    assert found.verdict == "inconclusive"
    assert found.reason == f"{n} of 6 rounds"
    assert found.speedup == pytest.approx(3.0, rel=0.01)
    assert (found.interval is None) == (n == 1)


def test_more_is_better_turns_the_ratio_around():
    ours, baseline = rounds(1.5, 8)
    rates = statistics.compare(1 / ours, 1 / baseline, better="higher")
    times = statistics.compare(ours, baseline, better="lower")
    assert rates.speedup == pytest.approx(times.speedup)
    assert rates.verdict == times.verdict == "faster"


@pytest.mark.parametrize(("n", "trials"), [(3, 1500), (8, 1500), (25, 150)])
def test_interval_holds_the_truth_in_95_of_100_trials(n, trials):
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(trials):
        log_ratio = rng.normal(0.3, 0.05, n)
        low, high = statistics.compare(np.ones(n), np.exp(log_ratio)).interval
        held += low <= np.exp(0.3) <= high
    assert 0.90 <= held / trials <= 0.985


@pytest.mark.parametrize("n", [2, 7, 19])
def test_student_interval_is_that_of_scipy(n):
    values = np.random.default_rng(n).normal(10, 2, n)
    want = scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values))
    assert statistics.student_interval(values) == pytest.approx(want)


@pytest.mark.parametrize("n", [20, 37])
def test_median_interval_of_many_rounds_is_exact_order_statistics(n):
    values = np.random.default_rng(n).lognormal(size=n)
    want = scipy.stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    assert statistics.median_interval(values) == pytest.approx((want.low, want.high))


def test_bootstrap_takes_over_at_twenty_rounds():
    skewed = np.random.default_rng(1).lognormal(sigma=1.0, size=20)
    found = [statistics.compare(np.ones(n), np.exp(skewed[:n])) for n in (19, 20)]
    middle = [np.log(f.speedup) for f in found]
    reach = [np.log(f.interval) for f in found]
    assert reach[0].mean() == pytest.approx(middle[0])  # Student's t is symmetric
    assert abs(reach[1].mean() - middle[1]) > 0.01  # the bootstrap follows the skew


def test_outliers_are_flagged_and_kept():
    values = [10.0, 10.1, 9.9, 10.05, 30.0, 9.95]
    samples = tuple(sample("step_time_ms", v, repeat=i) for i, v in enumerate(values))
    cell = derive.summary(frame_of([record(samples=samples)])).iloc[0]
    assert cell["num_outliers"] == 1
    assert cell["value"] == pytest.approx(10.025)


@pytest.mark.parametrize("shift", [0.0, -2.0])
@pytest.mark.parametrize("n", [1, 2, 5, 19, 20, 31])
def test_summaries_of_all_cells_at_once_have_the_interval_of_each(n, shift):
    values = np.random.default_rng(n).lognormal(size=n) + shift  # -2: some are negative
    records = [record(round=r, samples=(sample("mfu", v),)) for r, v in enumerate(values)]
    cell = derive.summary(frame_of(records)).iloc[0]
    assert cell["value"] == pytest.approx(np.median(values))
    want = statistics.median_interval(values) or (np.nan, np.nan)
    assert (cell["low"], cell["high"]) == pytest.approx(want, nan_ok=True)


def test_no_interval_of_positive_values_reaches_zero():
    assert statistics.median_interval([1.0, 9.0])[0] > 0


def timed(backend: str, value: float, round: int, **rest):
    repeats = (value, value, value * 4)  # the median is value, the mean is twice it
    samples = tuple(sample("step_time_ms", v, repeat=i) for i, v in enumerate(repeats))
    return record(backend=backend, samples=samples, round=round, seq_len=512, **rest)


def compare_backends(records) -> dict:
    return comparisons.comparisons(frame_of(records)).iloc[0].to_dict()


def test_the_process_is_the_unit_of_evidence():
    records = [timed(b, v, r) for b, v in (("jax", 10), ("torch", 20)) for r in range(8)]
    found = compare_backends(records)
    assert found["num_paired_rounds"] == 8  # not 24 repeats
    assert (found["value_ours"], found["value_baseline"]) == (10, 20)
    assert (found["speedup"], found["verdict"]) == (pytest.approx(2.0), "faster")


@pytest.mark.parametrize(
    ("different", "reason"),
    [
        ({"host": "node2"}, "nodes"),
        ({"provenance": {"device_name": "another CPU"}}, "devices"),
        ({"block": "block1"}, "block"),
        ({"block": None}, "block"),
    ],
)
def test_what_was_not_measured_side_by_side_gets_no_verdict(different, reason):
    records = [timed("jax", 10, r) for r in range(8)]
    records += [timed("torch", 20, r, **different) for r in range(8)]
    found = compare_backends(records)
    assert found["verdict"] == "unpaired"
    assert reason in found["reason"]
    assert found["speedup"] == pytest.approx(2.0)
    assert np.isnan(found["speedup_low"])


def test_cpu_is_never_beside_an_accelerator():
    records = [timed("jax", 10, r) for r in range(8)]
    records += [timed("torch", 20, r, device_kind="h200") for r in range(8)]
    found = comparisons.comparisons(frame_of(records))
    assert len(found) == 2  # each alone
    assert found["speedup"].isna().all()


def test_only_rounds_that_share_a_node_are_paired():
    records = [timed("jax", 10, r) for r in range(8)]
    records += [timed("torch", 20, r, host="node1" if r < 6 else "node2") for r in range(8)]
    assert compare_backends(records)["num_paired_rounds"] == 6


def test_baseline_of_zero_gives_no_ratio():
    found = statistics.compare([1.0, 2.0], [0.0, 1.0])
    assert found.speedup is None
    assert found.verdict == "inconclusive"


def test_unequal_rounds_are_refused():
    with pytest.raises(ValueError, match="as many rounds"):
        statistics.compare([1.0, 2.0], [1.0])


@pytest.mark.parametrize("n", range(1, 26))
def test_rounds_settle_only_where_they_are_looked_at(n):
    found = statistics.is_settled(*rounds(1.0, n, 1e-5), until=0.02)
    assert found == (n in (8, 12, 16, 20, 24))


@pytest.mark.parametrize("n", [8, 12, 16, 20])
def test_rounds_settle_by_width_whichever_side_is_faster(n):
    ours, baseline = rounds(1.0, n, 0.005)
    low, high = statistics.compare(ours, baseline).interval
    width = high / low - 1
    for ratio in (0.5, 0.97, 1.0, 1.03, 2.0):
        assert statistics.is_settled(ours, ratio * baseline, width * 1.001)
        assert not statistics.is_settled(ours, ratio * baseline, width * 0.999)
        assert not statistics.is_settled(ratio * baseline, ours, width * 0.999)


def test_rounds_that_give_no_ratio_never_settle():
    assert not statistics.is_settled([0.0] * 8, [1.0] * 8, 0.02)
    with pytest.raises(ValueError, match="until=0"):
        statistics.is_settled([1.0] * 8, [1.0] * 8, 0)
