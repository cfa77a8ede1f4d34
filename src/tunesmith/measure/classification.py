"""What predictions of classes and numbers are worth (the definitions of scikit-learn)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.measure.intervals import Interval

Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]


def accuracy(true: Integers, predicted: Integers) -> float:
    """Return the share of right predictions."""
    return float((true == predicted).mean())


def confusion_matrix(true: Integers, predicted: Integers, classes: int) -> Integers:
    """Return how many of each true class (row) are predicted as each class (column)."""
    cells = np.bincount(true * classes + predicted, minlength=classes * classes)
    return cells.reshape(classes, classes).astype(np.int64)


def macro_f1(true: Integers, predicted: Integers) -> float:
    """Return the mean F1 of the classes that occur in `true` or `predicted`."""
    classes = int(max(true.max(), predicted.max())) + 1
    right = np.bincount(true[true == predicted], minlength=classes)
    sums = np.bincount(true, minlength=classes) + np.bincount(predicted, minlength=classes)
    return float((2 * right[sums > 0] / sums[sums > 0]).mean())


def matthews(true: Integers, predicted: Integers) -> float:
    """Return Matthews' correlation coefficient for several classes (Gorodkin 2004).

    It is 0 where all are predicted, or all are, of one class.
    """
    classes = int(max(true.max(), predicted.max())) + 1
    n, right = len(true), float((true == predicted).sum())
    t = np.bincount(true, minlength=classes).astype(np.float64)
    p = np.bincount(predicted, minlength=classes).astype(np.float64)
    spread = (n**2 - (p**2).sum()) * (n**2 - (t**2).sum())
    return float((n * right - (t * p).sum()) / np.sqrt(spread)) if spread > 0 else 0.0


def micro_f1_of_sets(true: Flags, predicted: Flags) -> float:
    """Return F1 over all decisions (rows, classes); 0 where nothing is true nor predicted."""
    right, sums = int((true & predicted).sum()), int(true.sum() + predicted.sum())
    return 2 * right / sums if sums else 0.0


def macro_f1_of_sets(true: Flags, predicted: Flags) -> float:
    """Return the mean over classes of F1, (rows, classes); 0 for a class that never occurs."""
    right, sums = (true & predicted).sum(axis=0), true.sum(axis=0) + predicted.sum(axis=0)
    return float((2 * right / np.maximum(sums, 1)).mean())


class Threshold(NamedTuple):
    """From which probability on a label is given, and the micro-F1 that this gave."""

    value: float
    micro_f1: float


def best_threshold(true: Flags, probability: Floats) -> Threshold:
    """Return the threshold, one for all classes, with the highest micro-F1 on these rows.

    It lies in the middle between two probabilities, so that it depends on neither one's rounding.

    Args:
        true: (rows, classes) bool.
        probability: (rows, classes), of each label by itself.
    """
    order = np.argsort(-probability, axis=None, kind="stable")
    p, hits = probability.ravel()[order], np.cumsum(true.ravel()[order])
    given = np.arange(1, len(p) + 1)
    f1 = 2 * hits / (given + true.sum())
    # Equal probabilities are given together or not at all.
    f1[:-1][p[:-1] == p[1:]] = -1.0
    best = int(f1.argmax())
    below = p[best + 1] if best + 1 < len(p) else 0.0
    return Threshold(float((p[best] + below) / 2), float(f1[best]))


def pearson(true: Floats, predicted: Floats) -> float:
    """Return the linear correlation; 0 where one side does not vary, nan where one is no number."""
    # Not by the spread: the rounding of a mean leaves equal values a little of it.
    if np.ptp(true) == 0 or np.ptp(predicted) == 0:
        return 0.0
    x, y = true - true.mean(), predicted - predicted.mean()
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale != 0 else 0.0


def spearman(true: Floats, predicted: Floats) -> float:
    """Return the correlation of the ranks; equal values share their mean rank."""
    return pearson(_ranks(true), _ranks(predicted))


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean: Floats = (2 * ends - counts + 1) / 2
    return mean[inverse]


def mean_squared_error(true: Floats, predicted: Floats) -> float:
    """Return the mean squared difference."""
    return float(((true - predicted) ** 2).mean())


def resampled_interval(
    metric: Callable[[Any, Any], float],
    true: NDArray[Any],
    predicted: NDArray[Any],
    *,
    resamples: int = 500,
    seed: int = 0,
) -> Interval:
    """Return the 95 % percentile bootstrap interval of a metric over rows (Efron 1979).

    Args:
        metric: of (true, predicted), which may be resampled rows of both.
        true: one entry a row.
        predicted: the same.
        resamples: how often rows are drawn, as many as there are, with repetition.
        seed: of the drawing.

    Raises:
        DataError: no rows.
    """
    if len(true) == 0:
        raise DataError("a bootstrap interval needs at least one row, got none")
    random = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        rows = random.integers(len(true), size=len(true))
        values.append(metric(true[rows], predicted[rows]))
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high))


def sigmoid(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return probabilities, each label by itself."""
    wide = logits.astype(np.float64)
    return 1.0 / (1.0 + np.exp(-wide))


def softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return probabilities, (..., classes)."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
