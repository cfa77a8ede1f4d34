"""What the rows of a run are like: counts, lengths, losses."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.rows import TokenRow
from tunesmith.errors import DataError
from tunesmith.types import JSON

MESSAGES_KEPT: Final = 5
"""Bad rows that a report names."""
LABELS_TOLD: Final = 12
"""Labels that a report names."""


class Bar(NamedTuple):
    """One bar of a histogram."""

    start: int
    """Shortest length of the bar, in tokens."""
    stop: int
    """The length that is just too long for it."""
    rows: int


@dataclass(frozen=True)
class SourceReport:
    """What one source gave."""

    name: str
    format: str
    rows: int
    """Rows read, good and bad."""
    bad: int
    """Rows that could not be used and were skipped."""
    dropped: int
    """Rows left out because no supervised token would be left in them."""
    messages: tuple[str, ...] = ()
    """The first few bad rows."""
    reasons: tuple[tuple[str, int], ...] = ()
    """Of the dropped rows why, and how many for each reason, where there are several."""


@dataclass(frozen=True)
class DataReport:
    """What the rows of one side (training, evaluation) are like."""

    sources: tuple[SourceReport, ...]
    kept: int
    """Samples that are used."""
    truncated: int
    """Of them, those cut to max_length."""
    tokens: int
    """Tokens of the kept samples, after cutting."""
    supervised_tokens: int
    """Of them, those that carry loss."""
    lengths: tuple[Bar, ...]
    """Histogram of the samples' lengths before cutting."""
    also_in_training: int = 0
    """Evaluation only: samples whose prompt is also asked in training."""
    unfinished: int = 0
    """Judged replies only: rows with a reply that was cut off before its turn ended."""
    classes: tuple[tuple[str, int], ...] = ()
    """Classification only: how often each label occurs."""

    @property
    def rows(self) -> int:
        """Rows read, good and bad."""
        return sum(source.rows for source in self.sources)

    @property
    def bad(self) -> int:
        """Rows that could not be used and were skipped."""
        return sum(source.bad for source in self.sources)

    @property
    def dropped(self) -> int:
        """Rows left out because no supervised token would be left in them."""
        return sum(source.dropped for source in self.sources)

    def to_json(self) -> dict[str, JSON]:
        """Return the report as plain values, totals included."""
        return asdict(self) | {"rows": self.rows, "bad": self.bad, "dropped": self.dropped}

    def lines(self) -> list[str]:
        """Return the report in words, a fact a line."""
        share = self.supervised_tokens / max(1, self.tokens)
        lines = [
            f"{source.name}: {source.rows:,} rows as {source.format}"
            + (f", {source.bad:,} bad and skipped" if source.bad else "")
            + (f", {source.dropped:,} dropped{_why(source.reasons)}" if source.dropped else "")
            for source in self.sources
        ]
        # A label of a whole text, or a number, supervises no token.
        of_tokens = self.supervised_tokens and not self.classes
        supervised = f", {share:.0%} of them supervised" if of_tokens else ""
        lines.append(
            f"{self.kept:,} samples with {self.tokens:,} tokens{supervised}; "
            f"{self.truncated:,} samples cut"
        )
        if self.classes:
            lines.append(_told(self.classes))
        if self.also_in_training:
            lines.append(f"{self.also_in_training:,} samples ask what training asks too")
        return lines


def _why(reasons: Sequence[tuple[str, int]]) -> str:
    """Return why rows were dropped, in brackets."""
    told = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
    return f" ({told})" if told else ""


def _told(classes: Sequence[tuple[str, int]]) -> str:
    """Return labels and how often they occur, the first few of many."""
    told = ", ".join(f"{label} {count:,}" for label, count in classes[:LABELS_TOLD])
    return f"{len(classes):,} labels: {told}" + (", ..." if len(classes) > LABELS_TOLD else "")


def histogram(counts: Mapping[int, int]) -> tuple[Bar, ...]:
    """Return up to 16 bars of equal, round width.

    Args:
        counts: how many rows have each length, in tokens.
    """
    if not counts:
        return ()
    longest = max(counts)
    width = max(1, 2 ** math.ceil(math.log2((longest + 1) / 16)))
    bars = [0] * (longest // width + 1)
    for length, rows in counts.items():
        bars[length // width] += rows
    return tuple(Bar(i * width, (i + 1) * width, rows) for i, rows in enumerate(bars))


def counted(values: NDArray[np.int64]) -> dict[int, int]:
    """Return how often each value occurs in (n,) int64."""
    different, counts = np.unique(values, return_counts=True)
    return dict(zip(different.tolist(), counts.tolist(), strict=True))


@dataclass(frozen=True)
class Losses:
    """Rows that cannot be learnt from, and whether they are too many."""

    rows: int
    """Rows read, good and bad."""
    bad: int
    """Rows that could not be used."""
    silent: int
    """Samples without any supervised token."""
    cut: int
    """Samples with supervised tokens, but none within max_length."""

    def check(self, first: Mapping[int, int], *, max_length: int, max_dropped: float) -> None:
        """Raise if more than `max_dropped` of the rows are lost.

        Args:
            first: how many samples have their first supervised token at each position.
            max_length: tokens a row may have.
            max_dropped: share of rows that may be lost.

        Raises:
            DataError: it says how many, why, and which max_length would keep 95 % of the samples.
        """
        lost = self.bad + self.silent + self.cut
        if lost <= max_dropped * self.rows:
            return
        reasons = {
            "bad": self.bad,
            "without any supervised token": self.silent,
            f"with no supervised token within data.max_length {max_length}": self.cut,
        }
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
        enough = keeping(first, 0.95, samples=self.rows - self.bad) if self.cut else None
        advice = "look at the rows with `tunesmith data show`"
        if enough is not None:
            advice = f"data.max_length {enough} would keep 95 % of the samples"
        raise DataError(
            f"data: {lost:,} of {self.rows:,} rows would be lost ({why}), which is more than "
            f"data.max_dropped {max_dropped:g}; {advice}"
        )


def keeping(first: Mapping[int, int], share: float, *, samples: int) -> int | None:
    """Return the shortest max_length that keeps `share` of the samples; None where none does.

    Args:
        first: how many samples have their first supervised token at each position.
        share: of all samples, 0 to 1.
        samples: all of them, those without supervised tokens too.
    """
    kept = 0
    for position in sorted(first):
        kept += first[position]
        if kept >= share * samples:
            return position + 1
    return None


class RunningReport:
    """Counts over samples as they pass, in memory that does not grow with their number."""

    def __init__(
        self, sources: Sequence[tuple[str, str]], *, max_length: int, max_dropped: float
    ) -> None:
        self._sources = sources
        self._max_length = max_length
        self._max_dropped = max_dropped
        self._rows = [0] * len(sources)
        self._bad = [0] * len(sources)
        self._dropped = [0] * len(sources)
        self._messages: list[list[str]] = [[] for _ in sources]
        self._totals = Counter[str]()
        self._lengths = Counter[int]()
        self._first = Counter[int]()

    def skip(self, source: int, message: str) -> None:
        """Count a bad row."""
        self._rows[source] += 1
        self._bad[source] += 1
        if len(self._messages[source]) < MESSAGES_KEPT:
            self._messages[source].append(message)

    def add(self, source: int, cut: TokenRow, *, length: int, first: int, out: bool) -> None:
        """Count a sample.

        Args:
            source: its number.
            cut: its tokens within max_length.
            length: its tokens before cutting.
            first: its first supervised position before cutting, -1 where none is.
            out: whether it is kept out of training for evaluation.
        """
        self._rows[source] += 1
        self._first[_rounded(first)] += 1
        if not 0 <= first < self._max_length:
            self._dropped[source] += 1
            self._totals["silent" if first < 0 else "cut"] += 1
        elif not out:
            self._totals["kept"] += 1
            self._totals["truncated"] += length > self._max_length
            self._totals["tokens"] += len(cut.input_ids)
            self._totals["supervised"] += int(np.count_nonzero(cut.supervised[1:]))
            self._lengths[_rounded(length)] += 1

    def check(self) -> None:
        """Raise if too many of the rows so far were lost.

        Raises:
            DataError: as `Losses.check`.
        """
        first = {position: n for position, n in self._first.items() if position >= 0}
        losses = Losses(
            sum(self._rows), sum(self._bad), self._totals["silent"], self._totals["cut"]
        )
        losses.check(first, max_length=self._max_length, max_dropped=self._max_dropped)

    def report(self) -> DataReport:
        """Return the counts so far; lengths above 1024 are rounded up to multiples of 64."""
        counts = zip(self._rows, self._bad, self._dropped, self._messages, strict=True)
        return DataReport(
            sources=tuple(
                SourceReport(name, form, rows, bad, dropped, tuple(messages))
                for (name, form), (rows, bad, dropped, messages) in zip(
                    self._sources, counts, strict=True
                )
            ),
            kept=self._totals["kept"],
            truncated=self._totals["truncated"],
            tokens=self._totals["tokens"],
            supervised_tokens=self._totals["supervised"],
            lengths=histogram(self._lengths),
        )

    def state(self) -> JSON:
        """Return the counts as plain values."""
        lengths, first = ([list(n) for n in c.items()] for c in (self._lengths, self._first))
        counts = [self._rows, self._bad, self._dropped, self._messages]
        return cast("JSON", json.loads(json.dumps([*counts, self._totals, lengths, first])))

    def load(self, state: Any) -> None:
        """Take over what `state` returned."""
        self._rows, self._bad, self._dropped, self._messages = (list(part) for part in state[:4])
        self._totals = Counter(state[4])
        self._lengths, self._first = (Counter(dict(pairs)) for pairs in state[5:])


def _rounded(length: int) -> int:
    """Return a length from which so few different ones are left that they can all be counted."""
    return length if length < 1024 else -(-length // 64) * 64
