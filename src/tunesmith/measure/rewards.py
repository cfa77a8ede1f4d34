"""What a reward model is worth on held-out pairs, and what its rewards are made of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tunesmith.measure.classification import spearman

Numbers = NDArray[np.float64]


class Bin(NamedTuple):
    """Pairs whose x lies in [start, stop]."""

    start: float
    stop: float
    pairs: int
    mean: float
    """Mean x of the pairs."""
    accuracy: float
    """Share of them in which the better reply has the larger reward; ties count half."""


def pair_accuracy(lead: Numbers) -> float:
    """Return the share of pairs, (pairs,) r_w - r_l, in which the better reply leads."""
    return float(((lead > 0) + 0.5 * (lead == 0)).mean())


def accuracy_by(x: Numbers, lead: Numbers, *, bins: int = 5) -> list[Bin]:
    """Return the accuracy of pairs in bins of equally many, by `x` (pairs,), ascending.

    Pairs of equal x stay together, so there may be fewer bins than asked for.
    """
    edges = np.unique(np.quantile(x, np.linspace(0, 1, bins + 1)))
    places = np.searchsorted(edges[1:-1], x, side="left")
    found = [(places == place) for place in range(len(edges))]
    return [
        Bin(
            float(x[inside].min()),
            float(x[inside].max()),
            int(inside.sum()),
            float(x[inside].mean()),
            pair_accuracy(lead[inside]),
        )
        for inside in found
        if inside.any()
    ]


class Calibration(NamedTuple):
    """How far the probability that Bradley and Terry's model gives is what happens."""

    bins: list[Bin]
    """By the probability of the reply that the model prefers, 0.5 to 1."""
    error: float
    """Expected calibration error: mean |probability - accuracy|, weighted by pairs."""


def calibration(lead: Numbers, *, bins: int = 10) -> Calibration:
    """Return how often the preferred reply is the better one where its probability is s(|lead|).

    Guo et al. 2017, arXiv:1706.04599, sec. 2, with bins of equally many pairs.
    """
    sure = 1 / (1 + np.exp(-np.abs(lead)))
    found = accuracy_by(sure, lead, bins=bins)
    error = sum(b.pairs * abs(b.mean - b.accuracy) for b in found) / max(len(lead), 1)
    return Calibration(found, float(error))


def length_correlation(rewards: Numbers, lengths: Numbers) -> float:
    """Return Spearman's correlation of rewards with lengths, (replies,) each; 0 of constants."""
    if len(rewards) < 2 or np.ptp(rewards) == 0 or np.ptp(lengths) == 0:
        return 0.0
    return spearman(rewards, lengths)


def reward_histogram(rewards: Numbers, *, bars: int = 20) -> tuple[list[float], list[int]]:
    """Return edges (bars + 1) and counts (bars) of rewards."""
    counts, edges = np.histogram(rewards, bins=bars)
    return edges.tolist(), counts.tolist()
