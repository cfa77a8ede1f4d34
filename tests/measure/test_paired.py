"""The paired two-level bootstrap against scipy's, and against answers known by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from tunesmith.errors import DataError
from tunesmith.measure.paired import Statistic, interval_of, over_seeds, resampled, two_sided_p


def _mean_of(values: NDArray[np.float64]) -> Statistic:
    return lambda chosen: float(values[chosen].mean())


def test_the_interval_of_a_mean_is_scipys() -> None:
    scores = np.random.default_rng(3).normal(size=200)
    drawn = resampled([_mean_of(scores)], 200, resamples=4000)
    low, high = interval_of(drawn[0])
    reference = stats.bootstrap(
        (scores,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    width = reference.high - reference.low
    assert low == pytest.approx(reference.low, abs=0.05 * width)
    assert high == pytest.approx(reference.high, abs=0.05 * width)


def test_all_statistics_see_the_same_rows() -> None:
    scores = np.random.default_rng(1).random(50)
    drawn = resampled([_mean_of(scores), _mean_of(scores + 0.25)], 50, resamples=20)
    np.testing.assert_allclose(drawn[1] - drawn[0], 0.25)


def test_a_constant_gain_is_certain_and_no_gain_is_none() -> None:
    scores = np.random.default_rng(1).random(50)
    drawn = resampled([_mean_of(scores), _mean_of(scores + 0.25)], 50, resamples=999)
    assert two_sided_p(drawn[1] - drawn[0]) == pytest.approx(2 / 1000)
    assert two_sided_p(drawn[0] - drawn[0]) == 1.0


def test_the_p_value_is_that_of_the_paired_t_test_for_a_normal_difference() -> None:
    random = np.random.default_rng(7)
    one = random.normal(size=400)
    other = one + random.normal(loc=0.1, scale=1.0, size=400)
    drawn = resampled([_mean_of(one), _mean_of(other)], 400, resamples=8000)
    expected = stats.ttest_rel(other, one).pvalue
    assert two_sided_p(drawn[1] - drawn[0]) == pytest.approx(expected, abs=0.02)


def test_seeds_that_differ_widen_the_interval() -> None:
    values = np.stack([np.full(2000, level) for level in (0.7, 0.8, 0.9)])
    low, high = interval_of(over_seeds(values))
    # The mean of three draws out of three: at its ends all draws are the least or the greatest,
    # each with a chance of 1 in 27, which is more than the 2.5 % outside the interval.
    assert (low, high) == pytest.approx((0.7, 0.9))


def test_nothing_to_resample_is_refused() -> None:
    with pytest.raises(DataError, match="needs rows"):
        resampled([], 5)
    with pytest.raises(DataError, match="needs rows"):
        resampled([_mean_of(np.zeros(1))], 0)
