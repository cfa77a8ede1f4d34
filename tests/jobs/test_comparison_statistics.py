"""Metrics on resampled rows: ratios of sums, and metrics of all rows, against scipy's."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from tunesmith.jobs.comparison_statistics import statistic_of
from tunesmith.measure.paired import interval_of, resampled, two_sided_p

RANDOM = np.random.default_rng(11)
TOKENS = RANDOM.integers(1, 40, size=150)
NATS = TOKENS * RANDOM.gamma(4.0, 0.5, size=150)


def test_a_loss_is_the_ratio_of_sums() -> None:
    found = statistic_of({"loss": {"totals": NATS.tolist(), "counts": TOKENS.tolist()}}, "loss")
    assert found is not None
    assert found.rows == 150
    assert found.on(np.arange(150)) == pytest.approx(NATS.sum() / TOKENS.sum())
    chosen = np.array([3, 3, 70])
    assert found.on(chosen) == pytest.approx(
        (2 * NATS[3] + NATS[70]) / (2 * TOKENS[3] + TOKENS[70])
    )


def test_the_interval_of_a_difference_of_losses_is_that_of_scipys_paired_bootstrap() -> None:
    other = NATS * RANDOM.normal(1.05, 0.2, size=150)
    counts = TOKENS.tolist()
    pair = [
        statistic_of({"loss": {"totals": nats.tolist(), "counts": counts}}, "loss")
        for nats in (NATS, other)
    ]
    drawn = resampled([one.on for one in pair if one], 150, resamples=6000)
    low, high = interval_of(drawn[1] - drawn[0])

    def difference(ours: np.ndarray, theirs: np.ndarray, tokens: np.ndarray) -> float:
        return theirs.sum() / tokens.sum() - ours.sum() / tokens.sum()

    reference = stats.bootstrap(
        (NATS, other, TOKENS.astype(float)),
        difference,
        paired=True,
        vectorized=False,
        n_resamples=6000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    interval = reference.confidence_interval
    width = interval.high - interval.low
    assert low == pytest.approx(interval.low, abs=0.06 * width)
    assert high == pytest.approx(interval.high, abs=0.06 * width)
    below = (reference.bootstrap_distribution <= 0).mean()
    assert two_sided_p(drawn[1] - drawn[0]) == pytest.approx(2 * min(below, 1 - below), abs=0.03)


def test_a_number_that_was_not_finite_leaves_metrics_of_the_other_rows() -> None:
    """Its file holds null for it."""
    predictions = {"kind": "numbers", "true": [1.0, 2.0, 3.0], "predicted": [2.0, None, 4.0]}
    found = statistic_of({"predictions": predictions}, "pearson")
    assert found is not None
    assert np.isnan(found.on(np.arange(3)))
    assert found.on(np.array([0, 2])) == pytest.approx(1.0)


def test_nothing_counted_is_zero_and_no_division() -> None:
    found = statistic_of({"entity_f1": {"totals": [0, 2], "counts": [0, 2]}}, "entity_f1")
    assert found is not None
    assert found.on(np.array([0, 0])) == 0.0


def test_f1_and_mcc_are_computed_anew_on_the_chosen_rows() -> None:
    true, said = RANDOM.integers(3, size=60), RANDOM.integers(3, size=60)
    outcomes = {
        "predictions": {"kind": "classes", "true": true.tolist(), "predicted": said.tolist()}
    }
    chosen = RANDOM.integers(60, size=60)
    for metric, reference in (
        ("macro_f1", lambda a, b: f1_score(a, b, average="macro")),
        ("mcc", matthews_corrcoef),
    ):
        found = statistic_of(outcomes, metric)
        assert found is not None
        assert found.on(chosen) == pytest.approx(reference(true[chosen], said[chosen]))


def test_correlations_are_computed_anew_on_the_chosen_rows() -> None:
    true, said = RANDOM.normal(size=40), RANDOM.normal(size=40)
    outcomes = {
        "predictions": {"kind": "numbers", "true": true.tolist(), "predicted": said.tolist()}
    }
    chosen = RANDOM.integers(40, size=40)
    for metric, reference in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        found = statistic_of(outcomes, metric)
        assert found is not None
        assert found.on(chosen) == pytest.approx(reference(true[chosen], said[chosen]).statistic)


def test_words_are_drawn_by_the_text() -> None:
    outcomes = {
        "predictions": {
            "kind": "words",
            "true": [[0, 1], [2], [0, 2, 1]],
            "predicted": [[0, 0], [2], [1, 2, 1]],
        }
    }
    found = statistic_of(outcomes, "macro_f1")
    assert found is not None
    assert found.rows == 3
    expected = f1_score([0, 1, 0, 2, 1], [0, 0, 1, 2, 1], average="macro")
    assert found.on(np.array([0, 2])) == pytest.approx(expected)


def test_what_was_not_kept_is_not_computed() -> None:
    assert statistic_of({"accuracy": [1.0]}, "threshold") is None
    predictions = {"kind": "sets", "true": [], "predicted": []}
    assert statistic_of({"predictions": predictions}, "mcc") is None
