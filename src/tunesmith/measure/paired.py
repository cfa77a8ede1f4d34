"""Is one way better than another, or was it luck? Answers from scores on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.measure.intervals import Interval

Statistic = Callable[[NDArray[np.int64]], float]
"""From the indices of resampled rows to what is measured on them."""


def resampled(
    statistics: Sequence[Statistic], rows: int, *, resamples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """Return each statistic on resamples of the rows, (statistics, resamples) float64.

    All see the same resampled rows, so differences between them are paired (Koehn 2004). Several
    statistics, such as one a seed, may stand for one thing: then their mean over a random choice of
    them is that thing's, which lets the seeds' spread in as well.

    Raises:
        DataError: no rows or no statistics.
    """
    if rows < 1 or not statistics:
        raise DataError("resampling needs rows, and something to measure on them")
    random = np.random.default_rng(seed)
    columns = []
    for _ in range(resamples):
        chosen = random.integers(rows, size=rows)
        columns.append([statistic(chosen) for statistic in statistics])
    return np.asarray(columns, dtype=np.float64).T


def over_seeds(values: NDArray[np.float64], *, seed: int = 0) -> NDArray[np.float64]:
    """Return the mean over resampled seeds, (resamples,), of values (seeds, resamples).

    With the rows resampled too this is the two-level bootstrap: it covers both the choice of the
    test rows and the luck of the initial weights.
    """
    seeds, resamples = values.shape
    random = np.random.default_rng(seed)
    chosen = random.integers(seeds, size=(seeds, resamples))
    mean: NDArray[np.float64] = np.take_along_axis(values, chosen, axis=0).mean(axis=0)
    return mean


def interval_of(values: NDArray[np.float64], *, confidence: float = 0.95) -> Interval:
    """Return the percentile interval of resampled values (resamples,)."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def two_sided_p(differences: NDArray[np.float64]) -> float:
    """Return the two-sided bootstrap p-value of resampled differences (resamples,) being 0.

    Twice the smaller share of resamples on one side of 0 (Efron & Tibshirani 1993, section 15.4),
    with one resample added to either so that it is never 0.
    """
    below = (np.count_nonzero(differences <= 0) + 1) / (differences.size + 1)
    above = (np.count_nonzero(differences >= 0) + 1) / (differences.size + 1)
    return float(min(1.0, 2 * min(below, above)))
