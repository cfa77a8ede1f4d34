"""A teacher's likeliest tokens on disk: written in pieces, memory-mapped when read.

The file is one of safetensors, so it says itself how long it is, and one that was cut off is known.
Its header is written by hand because safetensors writes whole tensors only, and these may be larger
than memory.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import numpy as np
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_ITEM: Final = 4
"""Bytes of an int32 and of a float32."""
_ALIGNMENT: Final = 8
_LENGTH: Final = 8
"""Bytes in which safetensors says how long the header is."""


class Known(NamedTuple):
    """What is known of the teacher's distributions at some positions."""

    tokens: NDArray[np.int32]
    """(positions, k) int32."""
    log_probs: NDArray[np.float32]
    """(positions, outcomes) float32: of these tokens, and of all others together."""


@dataclass(frozen=True)
class TeacherFile:
    """The file of a teacher's word on so many positions."""

    path: Path
    positions: int
    k: int
    outcomes: int
    vocab: int
    """Tokens that the distributions are over."""

    @property
    def size(self) -> int:
        """Bytes of what it holds."""
        return _ITEM * self.positions * (self.k + self.outcomes)

    def create(self) -> None:
        """Make the file at its full length, with nothing in it yet.

        Raises:
            OSError: there is no room for it, or no permission.
        """
        free = shutil.disk_usage(self.path.parent).free
        if free < self.size:
            raise OSError(f"it takes {self.size:,} bytes, and {free:,} are free")
        header = self._header()
        with self.path.open("wb") as file:
            file.write(len(header).to_bytes(_LENGTH, "little") + header)
            file.truncate(_LENGTH + len(header) + self.size)

    def write(self, start: int, known: Known) -> None:
        """Put what is known of the positions from `start` on into its place.

        Raises:
            OSError: it cannot be written.
        """
        first = _LENGTH + len(self._header())
        behind = first + _ITEM * self.positions * self.k
        with self.path.open("r+b") as file:
            for begin, values, dtype in (
                (first, known.tokens, np.int32),
                (behind, known.log_probs, np.float32),
            ):
                file.seek(begin + _ITEM * start * values.shape[1])
                file.write(np.ascontiguousarray(values, dtype).tobytes())

    def _header(self) -> bytes:
        middle = _ITEM * self.positions * self.k
        text = json.dumps(
            {
                "__metadata__": {"vocab": str(self.vocab)},
                "tokens": {
                    "dtype": "I32",
                    "shape": [self.positions, self.k],
                    "data_offsets": [0, middle],
                },
                "log_probs": {
                    "dtype": "F32",
                    "shape": [self.positions, self.outcomes],
                    "data_offsets": [middle, self.size],
                },
            }
        ).encode()
        return text + b" " * (-len(text) % _ALIGNMENT)


class TeacherReader:
    """Reads a `TeacherFile`, piece by piece.

    Raises:
        ValueError: it is damaged, cut off, or of other positions.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, *, positions: int, k: int) -> None:
        try:
            # Stays open, and with it the map of the file, as long as batches are made.
            self._file = cast("Any", safe_open(path, framework="numpy"))  # its methods are untyped
            self._tokens = self._file.get_slice("tokens")
            self._log_probs = self._file.get_slice("log_probs")
            self.vocab = int((self._file.metadata() or {})["vocab"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(str(error)) from error
        shape = tuple(self._tokens.get_shape())
        if shape != (positions, k):
            raise ValueError(f"it is of {shape}, not of {positions, k}")

    def read(self, start: int, count: int) -> Known:
        """Return what is known of `count` positions from `start` on."""
        place = slice(start, start + count)
        return Known(self._tokens[place], self._log_probs[place])
