"""Intervals against scipy's."""

import numpy as np
import pytest
from scipy import stats

from tunesmith.errors import DataError
from tunesmith.measure.intervals import bootstrap_interval, wilson_interval


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "total"), [(0, 1), (0, 20), (7, 9), (200, 400), (400, 400)])
def test_wilson_interval_is_that_of_scipy(successes: int, total: int, confidence: float) -> None:
    expected = stats.binomtest(successes, total).proportion_ci(confidence, method="wilson")
    ours = wilson_interval(successes, total, confidence=confidence)
    assert ours == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_a_share_of_nothing_has_no_interval(successes: int, total: int) -> None:
    with pytest.raises(DataError, match=f"got {successes} of {total}"):
        wilson_interval(successes, total)


def test_bootstrap_interval_is_near_that_of_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=60)
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9999, rng=1
    ).confidence_interval
    width = expected.high - expected.low
    # Two different random draws: the ends of 2000 and 9999 resamples differ by a few per cent.
    assert bootstrap_interval(values) == pytest.approx(
        (expected.low, expected.high), abs=0.07 * width
    )


def test_bootstrap_interval_of_equal_values_is_that_value_and_repeats() -> None:
    assert bootstrap_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert bootstrap_interval([1, 2, 5], seed=1) == bootstrap_interval([1, 2, 5], seed=1)


def test_no_values_have_no_interval() -> None:
    with pytest.raises(DataError, match="at least one value"):
        bootstrap_interval([])
