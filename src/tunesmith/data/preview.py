"""What `tunesmith data show` shows, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunesmith.data.classification import LabelledRow
from tunesmith.data.prepare import PreparedData
from tunesmith.data.rows import TokenRow, samples_of
from tunesmith.data.statistics import DataReport
from tunesmith.types import IGNORE


class Piece(NamedTuple):
    """A run of tokens that all are, or all are not, supervised."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class ShownSample:
    """One sample as the model will see it."""

    pieces: tuple[Piece, ...]
    tokens: int
    supervised_tokens: int
    label: str = ""
    """What the text is labelled as, where texts are classified."""


@dataclass(frozen=True)
class Preview:
    """Some rows of a run, and what all of them are like."""

    rows: tuple[tuple[ShownSample, ...], ...]
    """Of each row its samples: several where rows are packed."""
    train: DataReport
    """Formats recognised, rows bad and dropped, lengths."""
    evaluation: DataReport | None

    @property
    def truncated_share(self) -> float:
        """Share of the training samples that are cut to max_length, 0 to 1."""
        return self.train.truncated / max(1, self.train.kept)


def preview(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, *, rows: int) -> Preview:
    """Return the first `rows` rows that training will see; nothing is taken from the stream."""
    shown = tuple(
        (_labelled(row, prepared, tokenizer),)
        if isinstance(row, LabelledRow)
        else tuple(_shown(sample, tokenizer) for sample in samples_of(row))
        for row in prepared.train.peek(rows)
    )
    return Preview(shown, prepared.train_report, prepared.evaluation_report)


def _labelled(
    row: LabelledRow, prepared: PreparedData, tokenizer: PreTrainedTokenizerBase
) -> ShownSample:
    """Return a labelled text with its label, or with those of its words."""
    classes = [label for label, _ in prepared.train_report.classes]
    target = row.target
    if target.ndim == 1 and target.dtype == np.int64:
        numbers = target[target != IGNORE].tolist()
    elif target.ndim == 1:
        numbers = np.flatnonzero(target).tolist()
    else:
        numbers = [int(target)] if classes else []
    label = " ".join(classes[number] for number in numbers) if classes else f"{float(target):g}"
    return replace(_shown(row, tokenizer), label=label)


def _shown(sample: TokenRow, tokenizer: PreTrainedTokenizerBase) -> ShownSample:
    # Whole runs are decoded, since a character may be several tokens.
    turns = np.flatnonzero(np.diff(sample.supervised)) + 1
    runs = zip(np.split(sample.input_ids, turns), np.split(sample.supervised, turns), strict=True)
    pieces = tuple(
        Piece(
            tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False), bool(supervised[0])
        )
        for ids, supervised in runs
    )
    return ShownSample(pieces, len(sample.input_ids), int(np.count_nonzero(sample.supervised)))
