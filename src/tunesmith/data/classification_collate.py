"""Labelled rows to batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.types import IGNORE, Batch

if TYPE_CHECKING:
    from tunesmith.data.classification import LabelledRow
    from tunesmith.data.rows import TokenRow


class LabelledCollator:
    """Makes a batch of labelled texts: segments side by side ("free"), or padded on one side.

    Args:
        pad_token_id: what fills a padded row; it is masked, whatever it means elsewhere.
        padding: how.
        positions: whether to say each token's position. Encoders count by themselves, some of them
            (RoBERTa) from another number.
        class_weights: (classes,) float32 to put into every batch, or None.
    """

    def __init__(
        self,
        pad_token_id: int,
        padding: Literal["free", "right", "left"],
        *,
        positions: bool,
        class_weights: Tensor | None = None,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.padding = padding
        self.positions = positions
        self.class_weights = class_weights

    def __call__(self, rows: Sequence[TokenRow]) -> Batch:
        """Return the batch of labelled `rows`; see `tunesmith.types.Batch` for keys and shapes."""
        labelled = cast("list[LabelledRow]", rows)
        free = self.padding == "free"
        batch = self._side_by_side(labelled) if free else self._padded(labelled)
        if self.class_weights is not None:
            batch["class_weights"] = self.class_weights
        return batch

    def _side_by_side(self, rows: list[LabelledRow]) -> Batch:
        sizes = [len(row.input_ids) for row in rows]
        bounds = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
        ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(np.stack([row.target for row in rows])),
            "position_ids": torch.cat([torch.arange(size) for size in sizes])[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds.clone(),
            "max_length_q": max(sizes),
            "max_length_k": max(sizes),
        }

    def _padded(self, rows: list[LabelledRow]) -> Batch:
        real = self._filled([np.ones(len(row.input_ids), np.int64) for row in rows], 0)
        batch: Batch = {
            "input_ids": self._filled([row.input_ids for row in rows], self.pad_token_id),
            "attention_mask": real,
            "labels": self._labels(rows),
        }
        types = [row.types for row in rows if row.types is not None]
        if types:
            batch["token_type_ids"] = self._filled(types, 0)
        if self.positions:
            batch["position_ids"] = (real.cumsum(dim=1) - 1).clamp(min=0)
        return batch

    def _labels(self, rows: list[LabelledRow]) -> Tensor:
        of_tokens = rows[0].target.ndim == 1 and rows[0].target.dtype == np.int64
        if of_tokens:
            return self._filled([row.target for row in rows], IGNORE)
        return torch.from_numpy(np.stack([row.target for row in rows]))

    def _filled(self, values: list[NDArray[Any]], fill: int) -> Tensor:
        """Return (batch, length) int64 of rows that are shorter, with `fill` beside them."""
        length = max(map(len, values))
        whole = torch.full((len(values), length), fill, dtype=torch.int64)
        for row, value in enumerate(values):
            place = slice(0, len(value)) if self.padding != "left" else slice(-len(value), None)
            whole[row, place] = torch.from_numpy(value.astype(np.int64))
        return whole
