"""Rows to batches."""

import numpy as np
import pytest
import torch

from tunesmith.data.collate import Collator
from tunesmith.data.rows import TokenRow, join, samples_of
from tunesmith.errors import DataError
from tunesmith.types import IGNORE

PAD = 2


def sample(ids: list[int], supervised: list[int]) -> TokenRow:
    return TokenRow(np.array(ids, np.int32), np.array(supervised, bool), (len(ids),))


# The first token of the second sample is supervised, and padding equals a token that is learnt.
ONE = sample([5, 6, 2], [0, 1, 1])
TWO = sample([7, 8], [1, 1])
SHORT = sample([9], [1])


def test_side_by_side_positions_start_anew_and_bounds_are_told() -> None:
    batch = Collator(PAD, "free")([ONE, TWO, SHORT])
    assert batch["input_ids"].tolist() == [[5, 6, 2, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 2, IGNORE, 8, IGNORE]]
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[key].tolist() == [0, 3, 5, 6]
        assert batch[key].dtype == torch.int32
        assert batch[key].device.type == "cpu"
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert "attention_mask" not in batch


def test_packed_rows_are_the_batch_of_their_samples() -> None:
    packed = Collator(PAD, "free")([join([ONE, TWO]), SHORT])
    separate = Collator(PAD, "free")([ONE, TWO, SHORT])
    assert packed.keys() == separate.keys()
    for key, value in packed.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(separate[key])), key


def test_joined_samples_come_apart_again() -> None:
    parts = samples_of(join([ONE, TWO, SHORT]))
    for part, whole in zip(parts, (ONE, TWO, SHORT), strict=True):
        assert np.array_equal(part.input_ids, whole.input_ids)
        assert np.array_equal(part.supervised, whole.supervised)
        assert part.segments == whole.segments


@pytest.mark.parametrize(
    ("padding", "ids", "labels", "mask", "positions"),
    [
        (
            "right",
            [[5, 6, 2], [7, 8, PAD]],
            [[IGNORE, 6, 2], [IGNORE, 8, IGNORE]],
            [[1, 1, 1], [1, 1, 0]],
            [[0, 1, 2], [0, 1, 0]],
        ),
        (
            "left",
            [[5, 6, 2], [PAD, 7, 8]],
            [[IGNORE, 6, 2], [IGNORE, IGNORE, 8]],
            [[1, 1, 1], [0, 1, 1]],
            [[0, 1, 2], [0, 0, 1]],
        ),
    ],
)
def test_padding_fills_one_side_and_is_never_learnt(
    padding: str,
    ids: list[list[int]],
    labels: list[list[int]],
    mask: list[list[int]],
    positions: list[list[int]],
) -> None:
    batch = Collator(PAD, padding)([ONE, TWO])
    assert batch["input_ids"].tolist() == ids
    assert batch["labels"].tolist() == labels
    assert batch["attention_mask"].tolist() == mask
    assert batch["position_ids"].tolist() == positions
    assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize("padding", ["right", "left"])
def test_packed_rows_are_not_padded(padding: str) -> None:
    with pytest.raises(DataError, match="packed rows cannot be padded"):
        Collator(PAD, padding)([join([ONE, TWO])])
