"""Which samples an epoch holds, when there are several sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError


def epoch_counts(
    sizes: Sequence[int], weights: Sequence[float], mixing: Literal["concatenate", "weighted"]
) -> list[int]:
    """Return how many samples of each source one epoch holds.

    concatenate: every sample once. weighted: the largest source (the first of equals) gives each
    sample once, and source i gives round(n_largest * w_i / w_largest), at least one, so that the
    shares are those of the weights; smaller sources repeat.

    Raises:
        DataError: a source that is to have a share has no samples.
    """
    if mixing == "concatenate" or len(sizes) == 1:
        return list(sizes)
    if 0 in sizes:
        raise DataError(
            f"data.mixing: weighted: source {sizes.index(0) + 1} of data.train has no samples left "
            "to repeat, since all of them are held out or dropped; use mixing: concatenate, leave "
            "the source out, or hold out fewer"
        )
    largest = max(range(len(sizes)), key=lambda source: sizes[source])
    unit = sizes[largest] / weights[largest]
    return [max(1, round(unit * weight)) for weight in weights]


def epoch_order(
    sizes: Sequence[int], counts: Sequence[int], *, seed: int, epoch: int, shuffle: bool
) -> NDArray[np.int64]:
    """Return the samples of one epoch in their order, (sum of counts,) int64.

    Samples are numbered through all sources. A source goes through all its samples before any comes
    again, over the ends of epochs too. Without `shuffle` the sources follow each other in their own
    order where all are whole, and else are spread evenly among each other.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    drawn = [
        starts[source] + _drawn(size, count, seed=(seed, source), epoch=epoch, shuffle=shuffle)
        for source, (size, count) in enumerate(zip(sizes, counts, strict=True))
    ]
    order = np.concatenate(drawn)
    if shuffle:
        return np.random.default_rng((seed, epoch, len(sizes))).permutation(order)
    if list(sizes) == list(counts):
        return order
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return order[np.argsort(places, kind="stable")]


def _drawn(
    size: int, count: int, *, seed: tuple[int, int], epoch: int, shuffle: bool
) -> NDArray[np.int64]:
    """Return the draws [epoch * count, (epoch + 1) * count) of a source's endless sequence."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    first, stop = epoch * count, (epoch + 1) * count
    rounds = range(first // size, -(-stop // size))
    whole = np.arange(size, dtype=np.int64)
    passes = [
        np.random.default_rng((*seed, number)).permutation(whole) if shuffle else whole
        for number in rounds
    ]
    begin = first - rounds.start * size
    return np.concatenate(passes)[begin : begin + count]
