"""Rows of judged replies to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.collate import Collator
from tunesmith.data.rows import TokenRow, samples_of
from tunesmith.types import Batch

if TYPE_CHECKING:
    from tunesmith.data.pairs import PairRow


class JudgedCollator:
    """Makes a batch of judged replies: all replies of all rows, one sequence each.

    A pair's two sequences follow each other, the chosen one first, and so do a labelled reply and
    its mismatched one.

    Args:
        pad_token_id: fills up padded rows.
        padding: segments side by side, or rows padded on the right.
        reference: log-probabilities of each row's replies under the frozen model, by the row's key.
    """

    def __init__(
        self,
        pad_token_id: int,
        padding: Literal["free", "right"],
        *,
        reference: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        self.padding: Literal["free", "right"] = padding
        self.reference = reference
        self._collate = Collator(pad_token_id, padding)

    def with_reference(self, reference: Mapping[str, NDArray[np.float32]]) -> JudgedCollator:
        """Return a collator like this one that puts `reference` into its batches."""
        return JudgedCollator(self._collate.pad_token_id, self.padding, reference=reference)

    def plain(self, rows: list[TokenRow]) -> Batch:
        """Return a batch of rows that nothing is known of."""
        return self._collate(rows)

    def __call__(self, rows: Sequence[TokenRow]) -> Batch:
        """Return the batch of `rows`; see `tunesmith.types.Batch` for keys and shapes."""
        judged = cast("list[PairRow]", rows)
        batch = self._collate([reply for row in judged for reply in samples_of(row)])
        batch |= judgements(judged)
        if self.reference is not None:
            found = np.concatenate([self.reference[row.key] for row in judged])
            batch["reference"] = torch.from_numpy(found)
        return batch


def judgements(rows: Sequence[PairRow]) -> Batch:
    """Return what is known of all replies of `rows`: their batch without its tokens."""
    starts = np.cumsum([0, *(len(row.segments) for row in rows)])[:-1].tolist()
    known: Batch = dict(_pairs(rows, starts))
    if rows[0].good is not None:
        known |= _labelled(rows, starts)
    if rows[0].score is not None:
        known["scores"] = torch.tensor([cast("float", row.score) for row in rows])
    if rows[0].steps is not None:
        known |= _steps(rows, starts)
    return known


def _pairs(rows: Sequence[PairRow], starts: Sequence[int]) -> dict[str, Tensor]:
    every = list(zip(rows, starts, strict=True))
    if not any(row.winners for row in rows):
        return {}
    return {
        "winners": torch.tensor([start + i for row, start in every for i in row.winners]),
        "losers": torch.tensor([start + i for row, start in every for i in row.losers]),
        "margins": torch.tensor([margin for row in rows for margin in row.margins]),
        "pair_weights": torch.tensor([1 / len(row.winners) for row in rows for _ in row.winners]),
    }


def _labelled(rows: Sequence[PairRow], starts: Sequence[int]) -> dict[str, Tensor]:
    return {
        "matched": torch.tensor(starts),
        "mismatched": torch.tensor([start + 1 for start in starts]),
        "good": torch.tensor([bool(row.good) for row in rows]),
    }


def _steps(rows: Sequence[PairRow], starts: Sequence[int]) -> dict[str, Tensor]:
    both = zip(rows, starts, strict=True)
    every = [(start, *step) for row, start in both for step in row.steps or ()]
    # A batch may have none: all that its rows have may be cut off.
    return {
        "step_sequences": torch.tensor([sequence for sequence, _, _ in every], dtype=torch.int64),
        "step_positions": torch.tensor([position for _, position, _ in every], dtype=torch.int64),
        "step_labels": torch.tensor([label for _, _, label in every], dtype=torch.float32),
    }
