"""What travels through this room: raw rows of files, rows of tokens, prompts of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tunesmith.types import JSON

Values: TypeAlias = "dict[str, JSON]"


class Position(NamedTuple):
    """A place between two rows of a source, from which reading goes on."""

    file: int = 0
    """Which file of the source."""
    offset: int = 0
    """Where in it, in the reader's own unit: bytes (JSONL, CSV, text) or rows (the others)."""
    row: int = 0
    """Number of the row before this place, in its file; 0 at the start."""
    total: int = 0
    """Rows before this place in the whole source."""


START: Final = Position()


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as its file holds it."""

    values: Values
    place: str
    """File and row for messages: `train.jsonl, row 12`, counted from 1."""
    end: Position


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used, and why."""

    reason: str
    place: str
    end: Position

    @property
    def message(self) -> str:
        """The whole sentence for an error."""
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """One row of training: a sample, or several side by side that cannot see each other."""

    input_ids: NDArray[np.int32]
    """(length,) int32."""
    supervised: NDArray[np.bool_]
    """(length,) bool: which tokens carry loss."""
    segments: tuple[int, ...]
    """Length of each sample, in order; they sum to `length`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked in evaluation, and what good replies are."""

    input_ids: list[int]
    """Tokens of the turns before the reply, with the header of the assistant's turn."""
    reference: list[str]
    """Texts of the known replies."""
    messages: list[Values]
    """The turns before the reply."""


def samples_of(row: TokenRow) -> list[TokenRow]:
    """Return the samples of a row, each as a row of its own."""
    ends = np.cumsum(row.segments)
    return [
        TokenRow(row.input_ids[end - size : end], row.supervised[end - size : end], (size,))
        for end, size in zip(ends.tolist(), row.segments, strict=True)
    ]


def join(rows: list[TokenRow]) -> TokenRow:
    """Return samples side by side as one row."""
    if len(rows) == 1:
        return rows[0]
    return TokenRow(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([row.supervised for row in rows]),
        tuple(size for row in rows for size in row.segments),
    )
