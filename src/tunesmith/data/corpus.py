"""The samples of several sources as one sequence, cut to length, some of them held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.rows import TokenRow
from tunesmith.data.statistics import DataReport, Losses, SourceReport, counted, histogram
from tunesmith.data.table import TokenTable
from tunesmith.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """Samples that have something to learn within `max_length` tokens, source after source."""

    tables: tuple[TokenTable, ...]
    chosen: tuple[NDArray[np.int64], ...]
    """Of each table the rows that are used, (rows,) int64, ascending."""
    max_length: int

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each source."""
        return tuple(len(rows) for rows in self.chosen)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Number of each source's first sample, and of all samples, (sources + 1,) int64."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @cached_property
    def uncut_lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample before cutting, (samples,) int64."""
        return self.column("length")

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, (samples,) int64."""
        return np.minimum(self.uncut_lengths, self.max_length)

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of the tables for the samples, (samples,)."""
        pairs = zip(self.tables, self.chosen, strict=True)
        return np.concatenate([table.column(name)[rows] for table, rows in pairs])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def row(self, index: int) -> TokenRow:
        """Return sample `index`."""
        source = int(np.searchsorted(self.starts, index, side="right")) - 1
        inside = int(self.chosen[source][index - int(self.starts[source])])
        return self.tables[source].row(inside, self.max_length)

    def split(self, held_out: NDArray[np.bool_]) -> tuple[Corpus, Corpus]:
        """Return the samples that are not, and those that are held out.

        Args:
            held_out: (samples,) bool.
        """
        flags = np.split(held_out, self.starts[1:-1])
        stay = tuple(rows[~flag] for rows, flag in zip(self.chosen, flags, strict=True))
        leave = tuple(rows[flag] for rows, flag in zip(self.chosen, flags, strict=True))
        return Corpus(self.tables, stay, self.max_length), Corpus(
            self.tables, leave, self.max_length
        )

    @cached_property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss, after cutting; the first of a sample never does."""
        total = 0
        for table, rows in zip(self.tables, self.chosen, strict=True):
            starts = table.offsets[:-1][rows]
            stops = starts + np.minimum(table.column("length")[rows], self.max_length)
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                total += int(np.count_nonzero(table.supervised[start + 1 : stop]))
        return total

    def report(self) -> DataReport:
        """Return what the samples are like; reading and dropping is counted by source."""
        return DataReport(
            sources=tuple(_source_report(table, self.max_length) for table in self.tables),
            kept=len(self),
            truncated=int((self.uncut_lengths > self.max_length).sum()),
            tokens=int(self.lengths.sum()),
            supervised_tokens=self.supervised_tokens,
            lengths=histogram(counted(self.uncut_lengths)),
        )


def _source_report(table: TokenTable, max_length: int) -> SourceReport:
    reading, first = table.reading, table.column("first")
    dropped = int(((first < 0) | (first >= max_length)).sum())
    return SourceReport(
        reading.name, reading.format, reading.rows, reading.bad, dropped, tuple(reading.messages)
    )


def corpus_of(tables: Sequence[TokenTable], *, max_length: int, max_dropped: float) -> Corpus:
    """Return the samples of the tables that keep a supervised token within `max_length`.

    Raises:
        DataError: more than `max_dropped` of the rows would be lost, or nothing is left.
    """
    firsts = [table.column("first") for table in tables]
    every = np.concatenate(firsts)
    losses = Losses(
        rows=sum(table.reading.rows for table in tables),
        bad=sum(table.reading.bad for table in tables),
        silent=int((every < 0).sum()),
        cut=int((every >= max_length).sum()),
    )
    losses.check(counted(every[every >= 0]), max_length=max_length, max_dropped=max_dropped)
    chosen = tuple(np.flatnonzero((first >= 0) & (first < max_length)) for first in firsts)
    for table, rows in zip(tables, chosen, strict=True):
        if len(rows) == 0:
            raise DataError(
                f"{table.reading.name}: none of {table.reading.rows} rows is left to learn from"
            )
    return Corpus(tuple(tables), chosen, max_length)


def hold_out(prompts: NDArray[np.uint64], *, holdout: float, seed: int) -> NDArray[np.bool_]:
    """Return which samples are held out for evaluation, (samples,) bool.

    Samples of equal prompt stay on one side. Groups of equal prompt are taken in the order of a
    hash of seed and prompt, as long as they fit, so the choice depends on neither the order of the
    samples nor on what else is in the data beside them.

    Args:
        prompts: (samples,) uint64, equal for samples that ask the same.
        holdout: samples, or below 1 a share of them.
        seed: of the run.

    Raises:
        DataError: nothing would be left to train on, or nothing to evaluate on.
    """
    wanted = round(holdout * len(prompts)) if holdout < 1 else int(holdout)
    if wanted >= len(prompts):
        raise DataError(
            f"data.holdout {holdout:g} takes all {len(prompts)} samples; expected fewer"
        )
    groups, inverse, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    order = np.argsort(mix(groups, seed), kind="stable")
    taken, room = np.zeros(len(groups), bool), wanted
    for group in order.tolist():
        if counts[group] <= room:
            taken[group] = True
            room -= int(counts[group])
        if room == 0:
            break
    if not taken.any():
        raise DataError(
            f"data.holdout {holdout:g} is {wanted} samples, fewer than the smallest group of "
            f"samples with one prompt ({counts.min()}); expected more"
        )
    result: NDArray[np.bool_] = taken[inverse]
    return result


def mix(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return a hash of each value and the seed (the finaliser of SplitMix64), (n,) uint64."""
    mixed = values + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
