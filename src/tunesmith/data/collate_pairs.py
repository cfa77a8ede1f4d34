"""Rows of what is read and what is written, to batches for an encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tunesmith.data.render_pairs import apart
from tunesmith.data.rows import TokenRow
from tunesmith.errors import DataError
from tunesmith.models.encoder_decoder import after_start
from tunesmith.types import IGNORE, Batch


class PairCollator:
    """Pads what is read and what is written, each on the right.

    Args:
        pad_token_id: fills up; what is read is masked there, and nothing follows what is written.
        start_token_id: what the decoder starts from.
    """

    padding: Literal["right"] = "right"

    def __init__(self, pad_token_id: int, start_token_id: int) -> None:
        self.pad_token_id = pad_token_id
        self.start_token_id = start_token_id

    def __call__(self, rows: list[TokenRow]) -> Batch:
        """Return the batch of `rows`; see `tunesmith.types.Batch` for keys and shapes.

        Raises:
            DataError: rows are packed, whose samples would attend to each other.
        """
        if any(len(row.segments) > 1 for row in rows):
            raise DataError(
                "packed rows cannot be read by an encoder-decoder, whose samples are pairs; use "
                "data.packing: false"
            )
        pairs = [apart(row) for row in rows]
        read, written = ([pair[side] for pair in pairs] for side in (0, 1))
        targets = _padded(written, self.pad_token_id)
        return {
            "input_ids": _padded(read, self.pad_token_id),
            "attention_mask": _padded([np.ones_like(ids) for ids in read], 0),
            "decoder_input_ids": after_start(targets, self.start_token_id),
            "labels": _padded(written, IGNORE),
        }

    def targets(self, sample: TokenRow) -> int:
        """Return how many tokens of a sample its batch has to predict: all that is written."""
        return len(apart(sample)[1])


def _padded(rows: Sequence[NDArray[np.int32]], value: int) -> Tensor:
    """Return (rows, longest) int64."""
    tensors = [torch.from_numpy(row.astype(np.int64)) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)
