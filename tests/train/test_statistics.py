"""Statistics against enumeration, plain loops and published tables."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava.train.statistics import bootstrap_interval, mean_over_seeds, sign_test, steps_to, t_quantile


@pytest.mark.parametrize(
    ("degrees", "wanted"),
    # The table of any textbook: two-sided 95 %.
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_t_quantile_is_the_table(degrees: int, wanted: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(wanted, abs=5e-5)


@pytest.mark.parametrize("degrees", [1, 2, 5, 40])
def test_t_quantile_bounds_the_share_that_it_says(degrees: int) -> None:
    drawn = np.random.default_rng(0).standard_t(degrees, 400_000)
    assert (drawn < t_quantile(0.9, degrees)).mean() == pytest.approx(0.9, abs=0.002)


def test_mean_over_seeds_by_hand() -> None:
    found = mean_over_seeds([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.std == pytest.approx(7**0.5)
    half = 4.302653 * (7 / 3) ** 0.5
    assert found.interval == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_one_seed_has_no_interval() -> None:
    found = mean_over_seeds([2.5])
    assert (found.mean, found.std, found.interval) == (2.5, None, None)


@given(st.lists(st.sampled_from([-2.0, -0.1, 0.0, 0.3, 5.0]), min_size=0, max_size=40))
def test_sign_test_enumerates_coins(differences: list[float]) -> None:
    found = sign_test(np.asarray(differences))
    lower, higher = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    count = lower + higher
    uneven = sum(comb(count, k) for k in range(count + 1) if abs(2 * k - count) >= abs(lower - higher))
    assert (found.lower, found.higher) == (lower, higher)
    assert found.p == pytest.approx(uneven / 2**count, rel=1e-9)


def test_sign_test_of_many_samples_is_a_number() -> None:
    even, uneven = sign_test(np.asarray([1.0, -1.0] * 2000)), sign_test(np.asarray([-1.0] * 3000 + [1.0] * 1000))
    assert even.p == pytest.approx(1.0)
    assert 0 < uneven.p < 1e-200


def test_bootstrap_is_that_of_every_possible_resample() -> None:
    """Of four samples there are 256 resamples: the interval ends at quantiles of those."""
    nats, tokens = np.asarray([3.0, 1.0, 8.0, -2.0]), np.asarray([2.0, 1.0, 3.0, 4.0])
    everything = sorted(
        sum(nats[i] for i in drawn) / sum(tokens[i] for i in drawn) for drawn in itertools.product(range(4), repeat=4)
    )
    found = bootstrap_interval(nats, tokens)
    assert found is not None
    for end, share in zip(found, (0.025, 0.975), strict=True):
        below, upto = sum(x < end - 1e-9 for x in everything) / 256, sum(x <= end + 1e-9 for x in everything) / 256
        assert below - 0.005 <= share <= upto + 0.005


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(3), 0
    for number in range(80):
        tokens = rng.integers(5, 40, 60).astype(np.float64)
        low, high = bootstrap_interval(rng.normal(0.7, 0.5, 60) * tokens, tokens, seed=number) or (0.0, 0.0)
        hits += low <= 0.7 <= high
    assert 0.88 <= hits / 80 <= 1


def test_bootstrap_is_the_same_again_and_none_of_one_sample() -> None:
    nats, tokens = np.asarray([1.0, 2.0, 4.0]), np.ones(3)
    assert bootstrap_interval(nats, tokens) == bootstrap_interval(nats, tokens)
    assert bootstrap_interval(nats[:1], tokens[:1]) is None


@given(st.lists(st.floats(0, 9), max_size=12), st.floats(0, 9))
def test_steps_to_is_the_first_at_or_below(values: list[float], level: float) -> None:
    curve = [(10 * (number + 1), value) for number, value in enumerate(values)]
    found = steps_to(curve, level)
    if found is None:
        assert all(value > level for value in values)
    else:
        assert dict(curve)[found] <= level
        assert all(value > level for step, value in curve if step < found)
