"""Batches with a teacher's word on what they learn, which was computed before."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from tunesmith.data.rows import samples_of

if TYPE_CHECKING:
    from tunesmith.data.collate import Collator
    from tunesmith.data.collate_pairs import PairCollator
    from tunesmith.data.rows import TokenRow
    from tunesmith.data.teacher_file import Known, TeacherReader
    from tunesmith.types import Batch


def sample_key(sample: TokenRow) -> bytes:
    """Return 16 bytes that are equal for samples of equal tokens that learn the same."""
    data = sample.input_ids.tobytes() + sample.supervised.tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


class TaughtSamples:
    """A teacher's word on samples, by their keys, in a file."""

    def __init__(self, reader: TeacherReader, places: Mapping[bytes, tuple[int, int]]) -> None:
        """Take the file and, by a sample's key, where its positions begin and how many they are."""
        self.vocab = reader.vocab
        self._reader = reader
        self._places = places

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def of(self, key: bytes) -> Known:
        """Return what is known of a sample's positions, in their order."""
        return self._reader.read(*self._places[key])


class TaughtCollator:
    """Makes the batches of another collator, with the teacher's word on their supervised tokens.

    Samples are found by what they hold, so shuffling, packing and padding make no difference.

    Args:
        plain: makes batches of rows that nothing is known of.
        known: the teacher's word, in one file or several; each row's samples are in one of them.
    """

    def __init__(self, plain: Collator | PairCollator, known: Sequence[TaughtSamples]) -> None:
        self.plain = plain
        self.padding: Literal["free", "right", "left"] = plain.padding
        self._known = known

    def __call__(self, rows: list[TokenRow]) -> Batch:
        """Return the batch of `rows`; see `tunesmith.types.Batch` for keys and shapes."""
        keys = [sample_key(sample) for row in rows for sample in samples_of(row)]
        found = [next(part for part in self._known if key in part).of(key) for key in keys]
        return self.plain(rows) | {
            "teacher_tokens": torch.from_numpy(np.concatenate([one.tokens for one in found])),
            "teacher_log_probs": torch.from_numpy(np.concatenate([one.log_probs for one in found])),
            "teacher_vocab": self._known[0].vocab,
        }
