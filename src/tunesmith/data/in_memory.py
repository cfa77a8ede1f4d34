"""Samples that are held in memory, each beside the row that it was read from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.rows import TokenRow
from tunesmith.data.statistics import DataReport, SourceReport, counted, histogram
from tunesmith.data.table import Reading

Row = TypeVar("Row", bound=TokenRow)
Read = TypeVar("Read")


@dataclass(frozen=True)
class InMemory(Generic[Row, Read]):
    """Samples in memory, source after source."""

    sources: tuple[list[Row], ...]
    origins: tuple[list[Read], ...]
    """Of each sample the row that it was read from."""
    uncut: tuple[list[int], ...]
    """Tokens of each sample before cutting; of several texts side by side, of the longest."""
    readings: tuple[Reading, ...]
    dropped: tuple[Counter[str], ...]
    """Of each source how many rows were left out, by reason."""
    max_length: int

    @cached_property
    def rows(self) -> list[Row]:
        """All samples."""
        return [row for rows in self.sources for row in rows]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each source."""
        return tuple(map(len, self.sources))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, all its texts together, (samples,) int64."""
        return np.array([len(row.input_ids) for row in self.rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        """Return sample `index`."""
        return self.rows[index]

    def split(self, held_out: NDArray[np.bool_]) -> tuple[Self, Self]:
        """Return the samples that are not, and those that are held out, (samples,) bool."""
        bounds = np.cumsum([0, *self.sizes])
        flags = [held_out[a:b] for a, b in pairwise(bounds)]
        return self._where([~flag for flag in flags]), self._where(flags)

    def _where(self, flags: list[NDArray[np.bool_]]) -> Self:
        places = [np.flatnonzero(flag).tolist() for flag in flags]

        def kept(lists: tuple[list[Any], ...]) -> tuple[list[Any], ...]:
            return tuple([xs[i] for i in some] for xs, some in zip(lists, places, strict=True))

        return replace(
            self,
            sources=kept(self.sources),
            origins=kept(self.origins),
            uncut=kept(self.uncut),
        )

    def report(self) -> DataReport:
        """Return what the samples are like."""
        uncut = np.array([size for sizes in self.uncut for size in sizes], dtype=np.int64)
        return DataReport(
            sources=tuple(
                SourceReport(
                    r.name,
                    r.format,
                    r.rows,
                    r.bad,
                    dropped.total(),
                    tuple(r.messages),
                    tuple(sorted(dropped.items())),
                )
                for r, dropped in zip(self.readings, self.dropped, strict=True)
            ),
            kept=len(self),
            truncated=int((uncut > self.max_length).sum()),
            tokens=int(self.lengths.sum()),
            supervised_tokens=sum(int(np.count_nonzero(row.supervised)) for row in self.rows),
            lengths=histogram(counted(uncut)),
        )
