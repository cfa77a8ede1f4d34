"""Rows to batches."""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.rows import TokenRow, samples_of
from tunesmith.errors import DataError
from tunesmith.types import IGNORE, Batch


class Collator:
    """Makes a batch of rows: segments side by side ("free"), or padded on one side."""

    def __init__(self, pad_token_id: int, padding: Literal["free", "right", "left"]) -> None:
        self.pad_token_id = pad_token_id
        self.padding = padding

    def __call__(self, rows: list[TokenRow]) -> Batch:
        """Return the batch of `rows`; see `tunesmith.types.Batch` for keys and shapes.

        A sample's first token is never a label: nothing before it predicts it.

        Raises:
            DataError: packed rows cannot be padded, where samples would see each other.
        """
        if self.padding == "free":
            return side_by_side([sample for row in rows for sample in samples_of(row)])
        if any(len(row.segments) > 1 for row in rows):
            raise DataError(
                f"packed rows cannot be padded ({self.padding}), since their samples would attend "
                "to each other; use engine.padding free, or data.packing false where the model's "
                "attention cannot keep segments apart"
            )
        return self._padded(rows)

    def targets(self, sample: TokenRow) -> int:
        """Return how many tokens of a sample its batch has to predict."""
        return int(np.count_nonzero(sample.supervised[1:]))

    def _padded(self, rows: list[TokenRow]) -> Batch:
        length = max(len(row.input_ids) for row in rows)
        shape = (len(rows), length)
        ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE, dtype=torch.int64)
        attention = torch.zeros(shape, dtype=torch.int64)
        positions = torch.zeros(shape, dtype=torch.int64)
        for index, row in enumerate(rows):
            size = len(row.input_ids)
            place = slice(0, size) if self.padding == "right" else slice(length - size, length)
            ids[index, place] = torch.from_numpy(row.input_ids.astype(np.int64))
            labels[index, place] = labels_of(row)
            attention[index, place] = 1
            positions[index, place] = torch.arange(size)
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": attention,
            "position_ids": positions,
        }


def labels_of(sample: TokenRow) -> Tensor:
    """Return (length,) int64: the token where it is supervised and predicted, else IGNORE."""
    labels = np.where(sample.supervised, sample.input_ids, IGNORE).astype(np.int64)
    labels[:1] = IGNORE
    return torch.from_numpy(labels)


def side_by_side(samples: list[TokenRow]) -> Batch:
    """Return samples as one padding-free row, (1, total), with the bounds of the segments."""
    sizes = [len(sample.input_ids) for sample in samples]
    ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    bounds = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.cat([labels_of(sample) for sample in samples])[None],
        "position_ids": torch.cat([torch.arange(size) for size in sizes])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds.clone(),
        "max_length_q": max(sizes),
        "max_length_k": max(sizes),
    }
