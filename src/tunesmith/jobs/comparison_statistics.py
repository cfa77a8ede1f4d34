"""From what a run kept of each evaluation row to what computes its metric on any of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from tunesmith.measure import classification as measure
from tunesmith.measure.text import bleu_counts, bleu_of_counts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tunesmith.measure.paired import Statistic

OfRows = Callable[[Any, Any], float]
"""From what is true of rows and what was said of them to a metric."""

WHOLE: Final[dict[str, dict[str, OfRows]]] = {
    "classes": {"macro_f1": measure.macro_f1, "mcc": measure.matthews},
    "words": {"macro_f1": measure.macro_f1},
    "sets": {"macro_f1": measure.macro_f1_of_sets},
    "numbers": {"pearson": measure.pearson, "spearman": measure.spearman},
}
"""Metrics that are no mean over rows, by the kind of what is predicted."""


class Measured(NamedTuple):
    """A metric that can be computed on chosen rows."""

    on: Statistic
    rows: int
    """How many there are."""


def statistic_of(outcomes: Mapping[str, Any], metric: str) -> Measured | None:
    """Return what computes `metric` on chosen rows; None where too little was kept of them.

    Args:
        outcomes: what outcomes.json holds: the metric's score of each row; or `totals` and `counts`
            of each row, whose sums it is the ratio of; or replies, or predictions, of all rows.
        metric: its name.
    """
    scores = outcomes.get(metric)
    if isinstance(scores, dict):
        return _ratio(np.asarray(scores["totals"], float), np.asarray(scores["counts"], float))
    if scores is not None:
        values = np.asarray(scores, dtype=np.float64)
        return Measured(lambda chosen: float(values[chosen].mean()), len(values))
    if metric == "bleu" and outcomes.get("replies"):
        counts = bleu_counts(outcomes["replies"], outcomes["references"])
        return Measured(lambda chosen: bleu_of_counts(counts[chosen]), len(counts))
    found = outcomes.get("predictions")
    if not found or metric not in WHOLE[found["kind"]]:
        return None
    return _whole(WHOLE[found["kind"]][metric], found)


def _ratio(totals: NDArray[np.float64], counts: NDArray[np.float64]) -> Measured:
    """Return the ratio of sums: rows weigh by what they count, as in the metric itself."""

    def on(chosen: NDArray[np.int64]) -> float:
        counted = counts[chosen].sum()
        return float(totals[chosen].sum() / counted) if counted else 0.0

    return Measured(on, len(totals))


def _whole(of_rows: OfRows, found: Mapping[str, Any]) -> Measured:
    if found["kind"] == "words":
        true = [np.asarray(row, dtype=np.int64) for row in found["true"]]
        said = [np.asarray(row, dtype=np.int64) for row in found["predicted"]]
        # Words of one text hang together, so whole texts are drawn.
        return Measured(
            lambda chosen: of_rows(
                np.concatenate([true[i] for i in chosen]),
                np.concatenate([said[i] for i in chosen]),
            ),
            len(true),
        )
    # Numbers that were not finite are null in the file, and nan as floats.
    dtype = np.float64 if found["kind"] == "numbers" else None
    true_, said_ = np.asarray(found["true"], dtype), np.asarray(found["predicted"], dtype)
    return Measured(lambda chosen: of_rows(true_[chosen], said_[chosen]), len(true_))
