"""Power laws: known exponents come back, intervals hold them, and little data is said to be so."""

import numpy as np
import pytest
from synthetic_records import record, sample

from analysis import power_law
from analysis.load import frame_of

SIZES = np.array([1e15, 4e15, 2e16, 1e17, 3e17])


def runs(exponent=0.12, irreducible=0.0, noise=0.0, seeds=3, sizes=SIZES, number=0):
    """Every size and seed, with a loss of 3 above what stays at the first size."""
    x = np.repeat(sizes, seeds)
    noise = np.exp(noise * np.random.default_rng(number).standard_normal(len(x)))
    return x, (irreducible + 3 * (x / sizes[0]) ** -exponent) * noise


@pytest.mark.parametrize("exponent", [0.03, 0.12, 0.5])
def test_a_known_exponent_is_found(exponent):
    found = power_law.fit(*runs(exponent))
    assert found.exponent == pytest.approx(exponent)
    assert found.coefficient == pytest.approx(3 * SIZES[0] ** exponent)
    assert found.interval == pytest.approx((exponent, exponent))
    assert found.loss(1e16) == pytest.approx(3 * 10**-exponent)


@pytest.mark.parametrize(("exponent", "irreducible"), [(0.3, 1.7), (0.15, 1.0), (0.8, 0.5)])
def test_a_loss_that_stays_is_found_beside_it(exponent, irreducible):
    found = power_law.fit(*runs(exponent, irreducible), irreducible=True)
    assert found.exponent == pytest.approx(exponent, rel=0.01)
    assert found.irreducible == pytest.approx(irreducible, rel=0.01)
    assert power_law.fit(*runs(exponent, irreducible)).exponent < 0.9 * exponent


def test_no_loss_is_made_up_that_stays():
    found = power_law.fit(*runs(0.12), irreducible=True)
    assert found.irreducible == pytest.approx(0, abs=0.02)
    assert found.exponent == pytest.approx(0.12, rel=0.01)


@pytest.mark.parametrize("seeds", [2, 3])
def test_interval_and_band_hold_the_truth_in_95_of_100_trials(seeds):
    held, within = 0, 0
    for number in range(400):
        found = power_law.fit(*runs(noise=0.01, seeds=seeds, number=number))
        held += found.interval[0] <= 0.12 <= found.interval[1]
        low, high = found.band(np.array([2e16]))
        within += low[0] <= 3 * 20**-0.12 <= high[0]
    assert 0.92 <= held / 400 <= 0.98
    assert 0.92 <= within / 400 <= 0.98


def test_three_sizes_have_no_band_and_say_so():
    found = power_law.fit(*runs(noise=0.01, sizes=SIZES[:3]))
    assert found.interval is None
    assert found.band(SIZES) is None
    assert "fewer than 4 sizes there is no band" in found.sentence


def test_one_seed_has_no_band_and_says_so():
    found = power_law.fit(*runs(noise=0.01, seeds=1))
    assert found.band(SIZES) is None
    assert "One seed shows no noise" in found.sentence


def test_the_noise_of_sizes_with_seeds_holds_for_those_of_one():
    held = 0
    for number in range(400):
        x, loss = runs(noise=0.01, number=number)
        kept = np.r_[0:13]  # of the largest size one seed
        found = power_law.fit(x[kept], loss[kept])
        held += found.interval[0] <= 0.12 <= found.interval[1]
    assert 0.92 <= held / 400 <= 0.98
    assert "5 sizes of 1 to 3 seeds that span" in found.sentence
    few = power_law.fit(x[[0, 1, 2, 3, 6, 9, 12]], loss[[0, 1, 2, 3, 6, 9, 12]])
    assert few.interval is None
    assert "So few seeds do not show the noise" in few.sentence


def test_it_says_how_little_it_spans():
    found = power_law.fit(*runs(noise=0.001))
    assert found.span_decades == pytest.approx(np.log10(300))
    assert "5 sizes of 3 seeds each that span 2.5 decades, 1e+15 to 3e+17" in found.sentence
    low, high = found.interval
    assert f"to the power of -{found.exponent:.3f} [{low:.3f}, {high:.3f}]" in found.sentence


@pytest.mark.parametrize(
    ("x", "loss", "message"),
    [([1.0, 2.0], [1.0, -1.0], "positive"), ([3.0, 3.0], [1.0, 1.1], "two sizes or more, got 1")],
)
def test_what_is_no_law_is_refused(x, loss, message):
    with pytest.raises(ValueError, match=message):
        power_law.fit(x, loss)


def trained(size: str, flops: float, seed: int, num_steps: int = 100, family: str = "hawk"):
    loss = 3 * (flops * num_steps * 4 * 8 / 1e6) ** -0.2
    return record("language_modeling", family, samples=(sample("loss", loss),), seed=seed,
                  block=None, model={"size": size}, num_steps=num_steps, seq_len=8,
                  costs={"train_flops_per_token": flops,
                         "num_params_non_embedding": int(flops / 5)})  # fmt: skip


def test_records_are_fitted_by_family_against_flops_and_parameters():
    sizes = {"tiny": 1e6, "small": 3e6, "middle": 1e7, "large": 4e7}
    records = [trained(name, f, seed) for name, f in sizes.items() for seed in range(3)]
    records += [trained("large", 4e7, 0, num_steps=10)]  # a smaller budget, which does not count
    records += [trained("tiny", 1e6, 0, family="mqa")]  # one size: no law
    frame = frame_of(records)
    for against in power_law.AGAINST:
        ((shared, law),) = power_law.fits(frame, against)
        assert (shared["family"], shared["backend"]) == ("hawk", "jax")
        assert law.exponent == pytest.approx(0.2)
        assert (law.num_sizes, law.num_seeds) == (4, 3)
        assert law.span_decades == pytest.approx(np.log10(40))
    assert law.most == 8e6
