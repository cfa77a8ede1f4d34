"""Rows of tokens on disk: flat arrays that are memory-mapped, so size is no matter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tunesmith.data.rows import TokenRow
from tunesmith.data.statistics import MESSAGES_KEPT

_COLUMNS: Final[dict[str, DTypeLike]] = {
    "length": np.int64,
    "first": np.int64,
    "prompt": np.uint64,
    "ordinal": np.int64,
}


@dataclass
class Reading:
    """What reading a source met with."""

    name: str
    format: str
    rows: int = 0
    """Rows read, good and bad."""
    bad: int = 0
    """Rows that could not be used and were skipped."""
    messages: list[str] = field(default_factory=list)
    """The first few bad rows, with their places."""

    def skip(self, message: str) -> None:
        """Count one more bad row."""
        self.bad += 1
        if len(self.messages) < MESSAGES_KEPT:
            self.messages.append(message)


def first_target(supervised: NDArray[np.bool_]) -> int:
    """Return the first supervised position that a token before it predicts, or -1.

    Args:
        supervised: (length,) bool.
    """
    # Position 0 follows nothing, so nothing can be learnt from it.
    positions = np.flatnonzero(supervised[1:])
    return int(positions[0]) + 1 if len(positions) else -1


class TableWriter:
    """Appends rows to the files of a table in an existing directory; memory stays constant."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        names = ("tokens", "supervised", *_COLUMNS)
        self._files = {name: (directory / f"{name}.bin").open("wb") for name in names}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def append(self, row: TokenRow, *, prompt_hash: int, ordinal: int) -> None:
        """Add one sample.

        Args:
            row: one sample, uncut.
            prompt_hash: 64 bits, equal for rows that ask the same.
            ordinal: number of the row in its source, from 0, bad rows counted.
        """
        self._files["tokens"].write(row.input_ids.astype(np.int32, copy=False).tobytes())
        self._files["supervised"].write(row.supervised.tobytes())
        values = (len(row.input_ids), first_target(row.supervised), prompt_hash, ordinal)
        for (name, dtype), value in zip(_COLUMNS.items(), values, strict=True):
            self._files[name].write(np.array(value, dtype).tobytes())

    def extend(self, table: TokenTable, start: int, stop: int) -> None:
        """Add the rows [start, stop) of another table."""
        tokens = slice(int(table.offsets[start]), int(table.offsets[stop]))
        self._files["tokens"].write(table.tokens[tokens].tobytes())
        self._files["supervised"].write(table.supervised[tokens].tobytes())
        for name in _COLUMNS:
            self._files[name].write(table.column(name)[start:stop].tobytes())

    def flush(self) -> None:
        """Hand the columns to the operating system, so that others see the progress."""
        self._files["length"].flush()

    def finish(self, reading: Reading) -> None:
        """Write the report; with it the directory is a table."""
        text = json.dumps(asdict(reading), ensure_ascii=False)
        (self.directory / "reading.json").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class TokenTable:
    """The rows of one source, uncut, in the order of the source."""

    directory: Path
    name: str | None = None
    """What the source is called now; a table in the cache may have been made under another name."""

    @cached_property
    def reading(self) -> Reading:
        """What reading the source met with."""
        saved = json.loads((self.directory / "reading.json").read_text("utf-8"))
        return Reading(**saved | ({"name": self.name} if self.name else {}))

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """All tokens of all rows, (tokens,) int32."""
        return self._map("tokens", np.int32)

    @cached_property
    def supervised(self) -> NDArray[np.bool_]:
        """Which of them are supervised, (tokens,) bool."""
        return self._map("supervised", np.bool_)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each row begins in `tokens`, and where the last ends, (rows + 1,) int64."""
        return np.concatenate([[0], np.cumsum(self.column("length"))])

    def column(self, name: str) -> NDArray[Any]:
        """Return one value a row, (rows,): length, first (target), prompt (hash) or ordinal."""
        return self._map(name, _COLUMNS[name])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int, max_length: int) -> TokenRow:
        """Return a row, cut at the end to `max_length` tokens."""
        start = int(self.offsets[index])
        stop = min(int(self.offsets[index + 1]), start + max_length)
        # Copies, so that a batch does not keep pages of the file in memory.
        ids, mask = self.tokens[start:stop].copy(), self.supervised[start:stop].copy()
        return TokenRow(ids, mask, (stop - start,))

    def _map(self, name: str, dtype: DTypeLike) -> NDArray[Any]:
        path = self.directory / f"{name}.bin"
        if path.stat().st_size == 0:  # mmap refuses empty files
            return np.empty(0, dtype)
        return np.asarray(np.memmap(path, dtype, mode="r"))


def merge(parts: Sequence[TokenTable], target: Path, *, block: int) -> TokenTable:
    """Write the rows of several tables into `target` in the order of their ordinals.

    Args:
        parts: each in the order of its ordinals; rows of one block lie in one part only.
        target: an empty directory.
        block: rows with equal `ordinal // block` are a block.
    """
    pieces: list[tuple[int, TokenTable, int, int]] = []
    for part in parts:
        blocks = part.column("ordinal") // block
        bounds = np.append(np.flatnonzero(np.diff(blocks, prepend=-1)), len(blocks)).tolist()
        for start, stop in pairwise(bounds):
            pieces.append((int(blocks[start]), part, start, stop))
    first = parts[0].reading
    whole = Reading(first.name, first.format)
    for part in parts:
        whole.rows += part.reading.rows
        whole.bad += part.reading.bad
        whole.messages = (whole.messages + part.reading.messages)[:MESSAGES_KEPT]
    with TableWriter(target) as writer:
        for _, part, start, stop in sorted(pieces, key=lambda piece: piece[0]):
            writer.extend(part, start, stop)
        writer.finish(whole)
    return TokenTable(target)
