"""How far a measured number can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from tunesmith.errors import DataError


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def wilson_interval(successes: int, total: int, *, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of a share (Wilson 1927), for accuracies.

    Raises:
        DataError: nothing was counted, or more successes than trials.
    """
    if not 0 <= successes <= total or total == 0:
        raise DataError(f"a share needs 0 <= successes <= total > 0, got {successes} of {total}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, n = successes / total, total
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the percentile bootstrap interval of the mean (Efron 1979), for mean scores.

    Args:
        values: one score per row.
        confidence: share of resampled means inside.
        resamples: means drawn; 2000 keep the ends within about 1 % of the interval's width.
        seed: of the resampling.

    Raises:
        DataError: no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise DataError("a bootstrap interval needs at least one value, got none")
    random = np.random.default_rng(seed)
    # One resample at a time: all at once would hold resamples x values numbers.
    means = [
        sample[random.integers(sample.size, size=sample.size)].mean() for _ in range(resamples)
    ]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
