"""Where rows go that are put before a text: behind the padding that is before it.

[padding | text] becomes [padding | rows | text]. So the rows stand next to the text as in a row
without padding, also for what counts columns: sliding windows, and T5's distances.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leading_padding(mask: Tensor) -> Tensor:
    """Return how much padding is before the text, (batch, 1) int64, for a mask (batch, length)."""
    return (mask.ne(0).cumsum(1) == 0).sum(1, keepdim=True)


def put_in(rows: Tensor, text: Tensor, padding: Tensor) -> Tensor:
    """Return `text` with `rows` behind its leading padding, (batch, count + length, ...).

    Args:
        rows: (batch, count, ...).
        text: (batch, length, ...), alike.
        padding: (batch, 1) int64.
    """
    count = rows.shape[1]
    both = torch.cat([rows, text], dim=1)
    column = torch.arange(both.shape[1], device=both.device)
    behind = column - padding  # of the padding; below zero within it
    source = torch.where(behind < count, behind, column)
    return at(both, torch.where(behind < 0, column + count, source))


def places_of_text(padding: Tensor, count: int, length: int) -> Tensor:
    """Return where `put_in` leaves each column of the text, (batch, length) int64."""
    column = torch.arange(length, device=padding.device)
    return torch.where(column < padding, column, column + count)


def at(x: Tensor, places: Tensor) -> Tensor:
    """Return the columns of `x` (batch, length, ...) at `places`.

    Args:
        x: of the sequence.
        places: (length,) for all rows, or (batch, length) for each.
    """
    if places.ndim == 1:
        return x.index_select(1, places)
    index = places.reshape(*places.shape, *(1,) * (x.ndim - 2))
    return x.gather(1, index.expand(*places.shape, *x.shape[2:]))
