"""What each evaluation row adds to the metrics that are means."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from tunesmith.types import JSON


class RowSums(NamedTuple):
    """Weighted sums over what each row holds: pairs, replies or steps."""

    totals: dict[str, NDArray[np.float64]]
    """(rows,) by metric."""
    weights: NDArray[np.float64]
    """(rows,): a metric is the sum of its totals over the sum of these."""


def summed_by_row(values: Mapping[str, Tensor], weights: Tensor, sizes: Sequence[int]) -> RowSums:
    """Return the sums of weights x values over each row's own.

    Args:
        values: (items,) each, of all rows, by metric.
        weights: (items,) of the items.
        sizes: how many items each row has, in their order.
    """
    row_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))

    def of_rows(items: Tensor) -> NDArray[np.float64]:
        summed = torch.zeros(len(sizes), dtype=torch.float64)
        return summed.index_add(0, row_of, items.double()).numpy()

    totals = {name: of_rows(weights * value) for name, value in values.items()}
    return RowSums(totals, of_rows(weights))


def ratios(totals: Iterable[float], counts: Iterable[float]) -> JSON:
    """Return what is kept for a metric that is a ratio of sums over rows."""
    return {"totals": list(map(float, totals)), "counts": list(map(float, counts))}
