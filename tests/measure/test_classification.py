"""Metrics of classification against scikit-learn's and scipy's."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from tunesmith.errors import DataError
from tunesmith.measure.classification import (
    accuracy,
    best_threshold,
    confusion_matrix,
    macro_f1,
    macro_f1_of_sets,
    matthews,
    mean_squared_error,
    micro_f1_of_sets,
    pearson,
    resampled_interval,
    spearman,
)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_classes_are_scikit_learns(classes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    true = random.integers(classes, size=50)
    predicted = np.where(random.random(50) < 0.6, true, random.integers(classes, size=50))
    assert accuracy(true, predicted) == pytest.approx(sk.accuracy_score(true, predicted))
    assert macro_f1(true, predicted) == pytest.approx(sk.f1_score(true, predicted, average="macro"))
    assert matthews(true, predicted) == pytest.approx(sk.matthews_corrcoef(true, predicted))
    expected = sk.confusion_matrix(true, predicted, labels=range(classes))
    assert (confusion_matrix(true, predicted, classes) == expected).all()


def test_a_class_that_nobody_names_does_not_count_in_macro_f1() -> None:
    true, predicted = np.array([0, 0, 3]), np.array([0, 3, 3])
    assert macro_f1(true, predicted) == pytest.approx(sk.f1_score(true, predicted, average="macro"))


def test_one_class_for_all_has_no_correlation() -> None:
    assert matthews(np.array([0, 1, 1]), np.array([1, 1, 1])) == 0.0
    assert matthews(np.array([0, 0]), np.array([0, 0])) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_sets_are_scikit_learns(seed: int) -> None:
    random = np.random.default_rng(seed)
    true, given = random.random((2, 30, 5)) < 0.3
    given[:, 4] = true[:, 4] = False
    for ours, average in ((micro_f1_of_sets, "micro"), (macro_f1_of_sets, "macro")):
        expected = sk.f1_score(true, given, average=average, zero_division=0)
        assert ours(true, given) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_beats_every_other(seed: int) -> None:
    random = np.random.default_rng(seed)
    true = random.random((20, 4)) < 0.3
    probability = np.round(np.clip(true * 0.3 + random.random((20, 4)) * 0.7, 0, 1), 1)
    best = best_threshold(true, probability)
    given = sk.f1_score(true, probability > best.value, average="micro", zero_division=0)
    assert best.micro_f1 == pytest.approx(given)
    others = [
        sk.f1_score(true, probability > t, average="micro", zero_division=0)
        for t in np.linspace(-0.05, 1.05, 111)
    ]
    assert best.micro_f1 >= max(others) - 1e-12


def test_correlations_are_scipys_with_ties() -> None:
    random = np.random.default_rng(0)
    true = random.integers(6, size=40).astype(float)
    predicted = true + random.normal(size=40).round(1)
    assert pearson(true, predicted) == pytest.approx(stats.pearsonr(true, predicted)[0])
    assert spearman(true, predicted) == pytest.approx(stats.spearmanr(true, predicted)[0])
    expected = sk.mean_squared_error(true, predicted)
    assert mean_squared_error(true, predicted) == pytest.approx(expected)
    assert pearson(true, np.ones(40)) == 0.0


@pytest.mark.parametrize("count", [3, 6, 7])
def test_values_that_do_not_vary_have_no_correlation(count: int) -> None:
    # The mean of equal numbers may differ from them by rounding: that is no spread.
    assert pearson(np.full(count, 0.1), np.full(count, 0.7)) == 0.0


def test_a_prediction_that_is_no_number_has_no_correlation_to_tell() -> None:
    assert np.isnan(pearson(np.array([1.0, 2.0, 3.0]), np.array([1.0, np.nan, 3.0])))


def test_resampled_intervals_are_near_scipys() -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=80)
    predicted = true + random.normal(size=80)
    expected = stats.bootstrap(
        (true, predicted),
        pearson,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=3000,
        rng=1,
    ).confidence_interval
    ours = resampled_interval(pearson, true, predicted, resamples=3000)
    width = expected.high - expected.low
    # Two random draws of 3000: the ends differ by a few per cent of the width.
    assert ours == pytest.approx((expected.low, expected.high), abs=0.08 * width)


def test_no_rows_have_no_interval() -> None:
    with pytest.raises(DataError, match="at least one row"):
        resampled_interval(accuracy, np.array([]), np.array([]))
