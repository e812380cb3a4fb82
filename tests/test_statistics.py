"""Intervals and verdicts: coverage, the two sides of every threshold, and who may be compared."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic_records import record, sample

from analysis import comparisons, derive, statistics, tables, wording
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


@pytest.mark.parametrize("n", [6, 7, 8, 9, 12, 19, 20, 37])
def test_median_interval_from_six_processes_is_exact_order_statistics(n):
    values = np.random.default_rng(n).lognormal(size=n)
    want = scipy.stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    assert statistics.median_interval(values) == pytest.approx((want.low, want.high))


def trimmed(logs):
    """The mean of the middle three fifths, and its interval: the least and the largest fifth count
    in the spread, at the values that stand next to them."""
    n, cut = len(logs), len(logs) // 5
    held = scipy.stats.mstats.winsorize(logs, (cut / n, cut / n)).std(ddof=1)
    middle = scipy.stats.trim_mean(logs, cut / n)
    half = scipy.stats.t.ppf(0.975, n - 2 * cut - 1) * held / ((1 - 2 * cut / n) * n**0.5)
    return middle, (middle - half, middle + half)


@pytest.mark.parametrize("n", [10, 12, 19])
def test_interval_from_ten_rounds_is_that_of_a_trimmed_mean(n):
    logs = np.random.default_rng(n).standard_t(2, n)
    found = statistics.compare(np.ones(n), np.exp(logs))
    middle, interval = trimmed(logs)
    assert np.log(found.speedup) == pytest.approx(middle)
    assert np.log(found.interval) == pytest.approx(interval)


def test_below_ten_rounds_it_is_the_mean():
    logs = np.random.default_rng(0).standard_t(2, 9)
    found = statistics.compare(np.ones(9), np.exp(logs))
    assert np.log(found.interval) == pytest.approx(statistics.student_interval(logs))
    assert np.log(found.speedup) == pytest.approx(logs.mean())


def test_rounds_that_a_machine_disturbs_hide_no_difference():
    """Every fifth round is off, by half or more; the mean would see 3% in 18% of these trials."""
    rng = np.random.default_rng(6)
    seen, held = 0, 0
    for _ in range(300):
        off = 0.5 * rng.normal(size=16) * (rng.random(16) < 0.2)
        logs = rng.normal(0, 0.01, 16) + off
        slower = statistics.compare(np.exp(logs + 0.03), np.ones(16), margin=0.02)
        equal = statistics.compare(np.exp(logs), np.ones(16), margin=0.02)
        seen += slower.verdict == "slower"
        held += equal.interval[0] <= 1 <= equal.interval[1]
    assert seen / 300 >= 0.75
    assert held / 300 >= 0.93


def test_bootstrap_takes_over_at_twenty_rounds():
    logs = np.random.default_rng(1).normal(size=20)
    centre, error, freedom = statistics.typical(logs)
    found = np.log(statistics.compare(np.ones(20), np.exp(logs)).interval)
    assert found.mean() == pytest.approx(centre)
    students = scipy.stats.t.ppf(0.975, freedom) * error
    assert 0.8 * students < found[1] - centre < 1.3 * students
    assert found[1] - centre != pytest.approx(students)


def trials_held(num_trials: int, num_repeats: int, process: float, repeat: float) -> float:
    """In what share of trials of 20 rounds the bootstrap's interval holds the truth."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(num_trials):
        logs = rng.normal(0, process, (2, 20, 1)) + rng.normal(0, repeat, (2, 20, num_repeats))
        low, high = statistics.bootstrap_interval(*np.exp(logs))
        held += low <= 0 <= high
    return held / num_trials


@pytest.mark.parametrize(
    ("num_repeats", "process", "repeat"),
    [(1, 0.01, 0.0), (5, 0.01, 0.01), (6, 0.01, 0.01), (5, 0.0, 0.01)],
)
def test_hierarchical_bootstrap_counts_no_spread_twice(num_repeats, process, repeat):
    """A plain one holds the truth in 92.6%; one that resamples rounds and repeats alike in 100%
    where processes differ by their repeats alone."""
    assert 0.935 <= trials_held(800, num_repeats, process, repeat) <= 0.985


def test_bootstrap_holds_the_truth_where_every_tenth_process_is_slow():
    """Between the percentiles of either side of the mean it lies in 89.5% of these trials."""
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(400):
        slow = 0.05 * (rng.random((2, 20, 1)) < 0.1)
        low, high = statistics.bootstrap_interval(*np.exp(rng.normal(slow, 0.002)))
        held += low <= 0 <= high
    assert 0.94 <= held / 400 <= 0.98


def test_hierarchical_bootstrap_takes_processes_of_unequal_repeats():
    rng = np.random.default_rng(0)
    ours = [list(rng.normal(10, 0.1, count)) for count in [1, 2, 3, 5, 8] * 4]
    baseline = [list(rng.normal(11, 0.1, count)) for count in [4, 1, 7, 2, 3] * 4]
    low, high = statistics.bootstrap_interval(ours, baseline)
    assert low < np.log(10 / 11) < high
    assert high - low < 0.03


@pytest.mark.parametrize("m", [5, 6])
def test_ranks_that_are_drawn_are_those_of_resampled_medians(m):
    """How often each value, and each sum of two, is the median of m draws from m repeats."""
    rounds, ((low, high), _) = statistics._resamples(((m,) * 20, (m,) * 20))
    low, high = low - m * rounds, (low if high is None else high) - m * rounds
    drawn = np.sort(np.random.default_rng(1).integers(m, size=(40_000, m)), axis=1)
    theirs_low, theirs_high = drawn[:, (m - 1) // 2], drawn[:, m // 2]
    for ours, theirs in (
        (low, theirs_low),
        (high, theirs_high),
        (low + high, theirs_low + theirs_high),
    ):
        shares = [np.bincount(ranks.ravel(), minlength=11) / ranks.size for ranks in (ours, theirs)]
        assert shares[0] == pytest.approx(shares[1], abs=0.008)


def test_speedup_lies_within_its_interval_with_and_without_repeats():
    ours, baseline = rounds(1.02, 24)
    repeats = [side[:, None] * (1 + 0.001 * np.arange(-2, 3)) for side in (ours, baseline)]
    for resampled in (None, repeats):
        for better in ("lower", "higher"):
            found = statistics.compare(ours, baseline, better=better, repeats=resampled)
            assert found.interval[0] < found.speedup < found.interval[1]
            assert (found.speedup > 1) == (better == "lower")


def test_outliers_are_flagged_and_kept():
    values = [10.0, 10.1, 9.9, 10.05, 30.0, 9.95]
    samples = tuple(sample("step_time_ms", v, repeat=i) for i, v in enumerate(values))
    cell = derive.summary(frame_of([record(samples=samples)])).iloc[0]
    assert cell["num_outliers"] == 1
    assert cell["value"] == pytest.approx(10.025)


@pytest.mark.parametrize("shift", [0.0, -2.0])
@pytest.mark.parametrize("n", [1, 2, 5, 6, 8, 19, 20, 31])
def test_summaries_of_all_cells_at_once_have_the_interval_of_each(n, shift):
    values = np.random.default_rng(n).lognormal(size=n) + shift  # -2: some are negative
    records = [record(round=r, samples=(sample("mfu", v),)) for r, v in enumerate(values)]
    cell = derive.summary(frame_of(records)).iloc[0]
    assert cell["value"] == pytest.approx(np.median(values))
    want = statistics.median_interval(values) or (np.nan, np.nan)
    assert (cell["low"], cell["high"]) == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize("values", [(0.41, 1.0, 1.0), (0.02, 0.06), (0.0, 0.0, 0.03)])
def test_the_interval_of_an_accuracy_is_no_less_than_none_right_and_no_more_than_all(values):
    records = [record(round=r, samples=(sample("accuracy", v),)) for r, v in enumerate(values)]
    cell = derive.summary(frame_of(records)).iloc[0]
    low, high = statistics.student_interval(values)
    assert low < 0 or high > 1
    want = (max(0.0, low), min(1.0, high))
    assert (cell["low"], cell["high"]) == pytest.approx(want)
    assert statistics.median_interval(values, is_share=True) == pytest.approx(want)


def test_median_interval_of_six_processes_is_their_range():
    assert statistics.median_interval([3.0, 1.0, 2.0, 9.0, 4.0, 5.0]) == (1.0, 9.0)


def test_median_of_two_modes_lies_within_its_interval():
    """Seven processes near 100 ms and five at 150: their geometric mean is at neither."""
    values = [100.0, 100.1, 99.9, 100.2, 99.8, 100.0, 100.1] + [150.0] * 5
    records = [record(round=r, samples=(sample("mfu", v),)) for r, v in enumerate(values)]
    cell = derive.summary(frame_of(records)).iloc[0]
    assert (cell["low"], cell["value"], cell["high"]) == (100.0, pytest.approx(100.15), 150.0)
    assert statistics.median_interval(values) == (100.0, 150.0)


@settings(derandomize=True, database=None, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.floats(1e-3, 1e6), min_size=2, max_size=40))
@example([1.1] * 3)
@example([1.0, 1.0, 1.0, 1.0, 1000.0])
@example([1.0, 4.92e-160])
def test_a_median_always_lies_within_its_interval(values):
    low, high = statistics.median_interval(values)
    assert low <= np.median(values) <= high


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


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("n", [1, 5, 6, 19])
def test_many_pairs_at_once_are_compared_as_each_alone(n, better):
    ours, baseline = np.random.default_rng(n).lognormal(sigma=0.02, size=(2, 5, n))
    ours *= np.array([1.0, 1.2, 0.8, 1.01, 1.0])[:, None]
    baseline[4, 0] = 0.0  # no ratio
    margins = [0.005, 0.005, 0.005, 0.02, 0.02]
    found = statistics.compare_few(ours, baseline, margins, better=better)
    for row, one in enumerate(found):
        want = statistics.compare(ours[row], baseline[row], margin=margins[row], better=better)
        assert (one.verdict, one.reason, one.margin) == (want.verdict, want.reason, want.margin)
        if row < 4:
            log_ratio = np.log(baseline[row] / ours[row]) * (1 if better == "lower" else -1)
            middle, by_student = log_ratio.mean(), statistics.student_interval(log_ratio)
            if n >= 10:
                middle, by_student = trimmed(log_ratio)
            assert np.log(one.speedup) == pytest.approx(middle)
            if n > 1:
                assert np.log(one.interval) == pytest.approx(by_student)
    together = statistics.differences(ours - baseline, better=better)
    assert together == [
        statistics.difference(*pair, better=better) for pair in zip(ours, baseline, strict=True)
    ]


def test_unequal_rounds_are_refused():
    with pytest.raises(ValueError, match="as many rounds"):
        statistics.compare([1.0, 2.0], [1.0])


def test_rounds_settled_early_hold_the_truth_and_are_seldom_falsely_decided():
    """Noise for which the end falls anywhere between 12 and 20 rounds."""
    rng = np.random.default_rng(5)
    held, false, used = 0, 0, []
    noises = np.repeat([0.012, 0.014, 0.016, 0.018, 0.02], 300)
    for noise in noises:
        log_ratio = rng.normal(0, noise, 20)
        for n in range(6, 21):
            if n == 20 or statistics.is_settled(np.ones(n), np.exp(log_ratio[:n]), 0.02):
                break
        found = statistics.compare(np.ones(n), np.exp(log_ratio[:n]), margin=0.02)
        held += found.interval[0] <= 1 <= found.interval[1]
        false += found.verdict in ("faster", "slower")
        used.append(n)
    assert set(used) == {12, 16, 20}
    assert held / len(noises) >= 0.93
    assert false / len(noises) <= 0.03


@pytest.mark.parametrize("n", range(1, 26))
def test_rounds_settle_only_where_they_are_looked_at(n):
    found = statistics.is_settled(*rounds(1.0, n, 1e-5), until=0.02)
    assert found == (n in (12, 16, 20, 24))


@pytest.mark.parametrize("n", [12, 16, 20])
def test_rounds_settle_by_width_whichever_side_is_faster(n):
    ours, baseline = rounds(1.0, n, 0.005)
    low, high = statistics.compare(ours, baseline).interval
    width = high / low - 1
    for ratio in (0.5, 0.97, 1.0, 1.03, 2.0):
        assert statistics.is_settled(ours, ratio * baseline, width * 1.001)
        assert not statistics.is_settled(ours, ratio * baseline, width * 0.999)
        assert not statistics.is_settled(ratio * baseline, ours, width * 0.999)


def test_rounds_that_give_no_ratio_never_settle():
    assert not statistics.is_settled([0.0] * 12, [1.0] * 12, 0.02)
    with pytest.raises(ValueError, match="until=0"):
        statistics.is_settled([1.0] * 12, [1.0] * 12, 0)


@pytest.mark.parametrize(
    ("apart", "margin"), [(0.001, 0.005), (0.01, 0.01), (0.05, 0.02), (-0.012, 0.012)]
)
def test_noise_floor_is_what_processes_of_one_cell_differ_by_within_limits(apart, margin):
    pairs = np.log1p([apart] * 20)
    assert statistics.noise_floor(pairs) == pytest.approx(margin, rel=0.02)
    assert statistics.noise_floor(pairs[:9]) == 0.02  # too few to know


def test_equivalence_is_held_to_the_noise_of_the_machine():
    ours, baseline = rounds(1.008, 12, 0.002)
    assert statistics.compare(ours, baseline, margin=0.02).verdict == "equivalent"
    quiet = statistics.compare(ours, baseline, margin=0.005)
    assert (quiet.verdict, quiet.margin) == ("faster", 0.005)


def test_difference_of_losses_by_hand():
    found = statistics.difference([1.0, 1.2, 1.1, 1.3], [1.1, 1.4, 1.2, 1.5])
    # apart by -0.1, -0.2, -0.1, -0.2: mean -0.15, deviation sqrt(0.01 / 3), t = -0.15 / 0.02887
    assert found.value == pytest.approx(-0.15)
    assert found.interval == pytest.approx((-0.15 - 3.182446 * 0.0288675, -0.15 + 0.0918693))
    assert found.p == pytest.approx(scipy.stats.ttest_1samp([-0.1, -0.2, -0.1, -0.2], 0).pvalue)
    assert found.verdict == "better"
    assert statistics.difference([1.0, 1.2, 1.1], [0.5, 0.7, 0.61]).verdict == "worse"
    assert statistics.difference([1.0, 1.2, 1.1], [1.1, 1.1, 1.1]).verdict == "not resolved"
    assert (
        statistics.difference([2.0, 2.2, 2.1], [1.0, 1.1, 1.2], better="higher").verdict == "better"
    )


@pytest.mark.parametrize(
    ("num_seeds", "reason"), [(0, "no seed in common"), (1, "1 of 3 seeds"), (2, "2 of 3 seeds")]
)
def test_few_seeds_resolve_nothing(num_seeds, reason):
    found = statistics.difference([1.0, 1.001][:num_seeds], [5.0, 5.0][:num_seeds])
    assert (found.verdict, found.reason) == ("not resolved", reason)
    assert (found.interval is None) == (num_seeds < 2)


@pytest.mark.parametrize("num_seeds", [3, 8])
def test_minimum_detectable_effect_is_found_in_four_of_five_trials(num_seeds):
    rng = np.random.default_rng(11)
    _, _, effect = statistics.student_test(0.0, 1 / np.sqrt(num_seeds), num_seeds - 1)
    t, _ = scipy.stats.ttest_1samp(rng.normal(effect, 1, (20_000, num_seeds)), 0, axis=1)
    # of the noise that the effect was computed for, the true one
    assert (np.abs(t) > scipy.stats.t.ppf(0.975, num_seeds - 1)).mean() == pytest.approx(
        0.8, abs=0.02
    )


def test_holm_by_hand():
    # Holm's steps: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.5
    assert statistics.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert statistics.holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert len(statistics.holm([])) == 0


def test_interval_of_an_accuracy_is_wilsons():
    # (8 + 1.96^2 / 2) / (10 + 1.96^2) -+ ...
    assert statistics.accuracy_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    low, high = statistics.accuracy_interval(10, 10)
    assert (high, low) == (1.0, pytest.approx(0.722467, abs=1e-5))


@pytest.mark.parametrize("n", [8, 12, 20])
def test_steady_processes_raise_few_flags(n):
    logs = np.random.default_rng(n).normal(4, 0.02, (4000, n))
    assert statistics.is_drifting(logs).mean() <= 0.015
    assert statistics.has_two_modes(logs).mean() <= 0.01


@pytest.mark.parametrize("n", [8, 12, 20])
def test_a_drift_and_two_modes_are_flagged(n):
    noise = np.random.default_rng(n).normal(0, 0.002, n)
    assert statistics.is_drifting(noise + np.linspace(0, 0.03, n))
    assert not statistics.is_drifting(noise + np.linspace(0, 0.005, n))  # too small to matter
    modes = 0.05 * (np.arange(n) % 3 == 0)
    assert statistics.has_two_modes(noise + modes)
    assert not statistics.has_two_modes(noise + 0.05 * (np.arange(n) == 3))  # an outlier
    assert not statistics.has_two_modes(noise + 0.1 * modes)
    assert not statistics.is_drifting(noise + modes)


def test_values_that_never_change_are_no_drift_and_no_modes():
    assert not statistics.is_drifting(np.zeros(12))
    assert not statistics.has_two_modes(np.zeros(12))
    assert not statistics.is_drifting(np.zeros(3))
    assert not statistics.has_two_modes(np.zeros(3))


def timed_block(num_rounds: int, noise: float, repeats: int = 3, ours: float = 1.0, **rest):
    """Records of both backends, A B B A, whose processes differ by `noise`."""
    rng = np.random.default_rng(num_rounds)
    made = []
    for round in range(num_rounds):
        names = ("torch", "jax") if round % 2 else ("jax", "torch")
        for place, backend in enumerate(names):
            middle = 10 * rng.normal(1, noise) * (ours if backend == "jax" else 1)
            values = middle * (1 + 0.001 * np.arange(repeats))
            samples = tuple(sample("step_time_ms", v, repeat=i) for i, v in enumerate(values))
            order = 2 * round + place
            made.append(record(backend=backend, samples=samples, round=round, order=order, **rest))
    return made


@pytest.mark.parametrize(("noise", "low", "high"), [(1e-4, 0.005, 0.005), (0.05, 0.02, 0.02),
                                                    (0.003, 0.005, 0.015)])  # fmt: skip
def test_margin_is_the_noise_of_the_node_that_the_records_themselves_hold(noise, low, high):
    records = timed_block(12, noise)
    records += timed_block(12, 0.1, host="node2", block="block1", seq_len=64)  # a noisy machine
    found = comparisons.comparisons(frame_of(records)).set_index("seq_len")
    assert low <= found.loc[found.index.isna(), "margin"].item() <= high
    assert found.loc[64, "margin"] == 0.02


def test_margin_is_of_pairs_of_one_cell_however_far_apart_cells_are():
    records = [
        timed(backend, value + 0.001 * round, round, family=family, order=round)
        for family, value in (("mqa", 10), ("hawk", 20), ("griffin", 40))
        for backend in ("jax", "torch")
        for round in range(6)
    ]
    assert set(comparisons.comparisons(frame_of(records))["margin"]) == {0.005}


def test_a_slow_down_of_one_percent_is_seen_on_a_quiet_machine():
    assert compare_backends(timed_block(12, 0.001, ours=1.01))["verdict"] == "slower"
    assert compare_backends(timed_block(12, 0.006, ours=1.005))["verdict"] == "equivalent"


def test_many_rounds_are_resampled_with_their_repeats():
    frame = frame_of(timed_block(20, 0.01, repeats=4))
    found = comparisons.comparisons(frame).iloc[0]
    values = {
        name: np.reshape(rows["value"].to_numpy(float), (20, 4))
        for name, rows in frame.groupby("backend")
    }
    want = statistics.bootstrap_interval(values["torch"], values["jax"])
    assert np.log([found["speedup_low"], found["speedup_high"]]) == pytest.approx(want)
    alone = statistics.compare(*(np.median(values[name], axis=1) for name in ("jax", "torch")))
    assert found["speedup"] == pytest.approx(alone.speedup)
    assert found["speedup_low"] != pytest.approx(alone.interval[0], rel=1e-9)


def test_what_drifts_or_has_two_modes_is_said_of_its_side():
    records = timed_block(12, 0.001)
    odd = {
        "jax": [10 * 1.005**round for round in range(12)],
        "torch": [10.5 if round % 3 else 10 + 0.001 * round for round in range(12)],
    }
    records = [
        record(backend=backend, samples=(sample("step_time_ms", value),), round=round)
        for backend, values in odd.items()
        for round, value in enumerate(values)
    ]
    table = tables.side_by_side(frame_of(records))
    row = table.frame.iloc[0]
    assert (row["flags_ours"], row["flags_baseline"]) == ("drifting", "two modes")
    places = [table.header.index(name) for name in ("jax", "torch")]
    assert [table.rows[0][place].partition(" (")[2] for place in places] == [
        "drifting)",
        "two modes)",
    ]


def trained(backend: str, losses) -> list:
    return [
        record("language_modeling", backend=backend, samples=(sample("loss", loss),), seed=seed,
               block=None, host=f"node of {backend}")
        for seed, loss in enumerate(losses)
    ]  # fmt: skip


def test_losses_are_compared_over_seeds_by_their_difference():
    records = trained("jax", [1.0, 1.2, 1.1, 1.3]) + trained("torch", [1.1, 1.4, 1.2, 1.5])
    table = tables.side_by_side(frame_of(records))
    row = table.frame.iloc[0]
    want = statistics.difference([1.0, 1.2, 1.1, 1.3], [1.1, 1.4, 1.2, 1.5])
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(want.interval)
    assert (row["verdict"], row["num_paired_seeds"]) == ("better", 4)
    assert np.isnan(row["speedup"])
    text = dict(zip(table.header, table.rows[0], strict=True))
    assert text["jax / torch"] == "-0.1500 [-0.2419, -0.0581] nats/token"
    assert text["verdict"] == "jax better"


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([1.0], "not resolved (1 of 3 seeds)"),
        ([1.0, 1.4, 1.1], "not resolved (0.57 nats/token would be)"),
    ],
)
def test_what_is_not_resolved_says_what_would_have_been(losses, verdict):
    records = trained("jax", losses) + trained("torch", [1.1, 1.2, 1.2][: len(losses)])
    table = tables.side_by_side(frame_of(records))
    assert table.rows[0][table.header.index("verdict")] == verdict


def test_a_share_has_no_unit_to_be_read():
    row = {"verdict": "not resolved", "detectable": 0.5, "num_paired_seeds": 3, "difference": 0.1,
           "low": -0.2, "high": 0.4, "metric": "accuracy", "unit": "1"}  # fmt: skip
    assert wording.verdict(row, "jax") == "not resolved (0.5 would be)"
    assert wording.difference(row, "1") == "+0.1000 [-0.2000, +0.4000]"
