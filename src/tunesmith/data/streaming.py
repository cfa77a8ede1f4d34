"""Rows of training read while training: constant memory, resumable bit for bit.

Samples pass from the sources (one after another, or by weight) into a shuffle buffer, out of it at
random, and, with packing, through a window in which they are packed. A state names every sample
that is held in buffer and window by its place in its file, and not by its content; loading it reads
the sources again from the oldest of these places and tokenises only those. So states are small,
whatever the rows are, and loading takes about as long as filling buffer and window did.

An epoch is one pass over all sources. With sources one after another the buffer is emptied at its
end, so that every sample comes once an epoch; with weights every source begins again on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunesmith.data.conversation import Sample
from tunesmith.data.formats import Layout, bad, layout_of, stop_at
from tunesmith.data.packing import WINDOW, pack
from tunesmith.data.render import Renderer
from tunesmith.data.render_pairs import renderer_for
from tunesmith.data.rows import START, BadRow, Position, RawRow, TokenRow, join
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources import Located, locate, read
from tunesmith.data.statistics import DataReport, RunningReport
from tunesmith.data.table import first_target
from tunesmith.errors import DataError
from tunesmith.types import JSON

CHECK_EVERY: Final = 1000
"""Rows between two looks at how many were lost; the first is after this many, or at the end."""


class Place(NamedTuple):
    """Where a sample lies: all that a state has to know of it."""

    source: int
    turn: int
    """How often the source had been read through before."""
    start: Position
    """The position from which its row is the next."""


class Held(NamedTuple):
    """A sample in memory."""

    place: Place
    row: TokenRow


@dataclass(frozen=True)
class SampleReader:
    """Reads one source's rows from any position and makes them into samples and tokens."""

    located: Located
    layout: Layout
    renderer: Renderer
    settings: DataSettings

    def sample(self, place: Place) -> Sample:
        """Return the sample at a place."""
        raw = next(read(self.located, place.start, streaming=True))
        assert isinstance(raw, RawRow)  # noqa: S101 - places are made of rows that were good
        return self.layout.convert(raw.values)

    def cut(self, row: TokenRow) -> TokenRow:
        """Return a sample cut to max_length."""
        size = min(len(row.input_ids), self.settings.max_length)
        return TokenRow(row.input_ids[:size], row.supervised[:size], (size,))

    def at(self, places: Sequence[Place]) -> dict[Place, Held]:
        """Return the samples at some places of one turn, reading forward from the first."""
        # From the very start the next row is the first that the source does not skip.
        skip = self.located.source.skip
        wanted = {max(place.start.total, skip): place for place in places}
        found: dict[Place, Held] = {}
        first = min(places, key=lambda place: place.start.total)
        for raw in read(self.located, first.start, streaming=True):
            place = wanted.get(raw.end.total - 1)
            if place is not None and isinstance(raw, RawRow):
                found[place] = Held(
                    place, self.cut(self.renderer.row(self.layout.convert(raw.values)))
                )
            if len(found) == len(wanted):
                return found
        raise DataError(
            f"{self.located.name}: a row that the checkpoint holds is not there any more; resume "
            "with the same data"
        )


class Cursor:
    """One source, read from a position to its end, again and again."""

    def __init__(
        self, reader: SampleReader, number: int, *, held_out: set[int], report: RunningReport
    ) -> None:
        self.reader = reader
        self.number = number
        self.held_out = held_out
        self.report = report
        self.turn = 0
        self.position = START
        self._given = 0
        self._rows = read(reader.located, streaming=True)

    def go_to(self, turn: int, position: Position, given: int) -> None:
        """Continue from another place."""
        self.turn, self.position, self._given = turn, position, given
        self._rows = read(self.reader.located, position, streaming=True)

    def state(self) -> list[JSON]:
        """Return what `go_to` takes."""
        return [self.turn, list(self.position), self._given]

    def pull(self) -> Held | None:
        """Return the next sample to train on; None at the end of the source, which begins again.

        Raises:
            DataError: a bad row where rows must not be bad, too many rows lost, or none left.
        """
        for raw in self._rows:
            place = Place(self.number, self.turn, self.position)
            self.position = raw.end
            row = self._usable(raw)
            if self.turn == 0 and raw.end.total % CHECK_EVERY == 0:
                self.report.check()
            if row is not None:
                self._given += 1
                return Held(place, row)
        if self.turn == 0:
            self.report.check()
        if self._given == 0:
            raise DataError(f"{self.reader.located.name}: no row is left to learn from")
        self.go_to(self.turn + 1, START, 0)
        return None

    def _usable(self, raw: RawRow | BadRow) -> TokenRow | None:
        """Return a row's tokens, or None where it is bad, held out or has nothing to learn."""
        if isinstance(raw, RawRow):
            try:
                sample = self.reader.layout.convert(raw.values)
                row = self.reader.renderer.row(sample)
            except DataError as error:
                raw = bad(raw, error)
            else:
                return self._kept(sample, row)
        if self.reader.settings.on_bad_row == "stop":
            raise stop_at(raw)
        if self.turn == 0:
            self.report.skip(self.number, raw.message)
        return None

    def _kept(self, sample: Sample, row: TokenRow) -> TokenRow | None:
        first = first_target(row.supervised)
        cut = self.reader.cut(row)
        out = sample.prompt_hash in self.held_out
        if self.turn == 0:
            self.report.add(self.number, cut, length=len(row.input_ids), first=first, out=out)
        return None if out or not 0 <= first < len(cut.input_ids) else cut


class StreamingRows:
    """The rows of a run whose data is read while training."""

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        held_out: set[int] | None = None,
        encoder_decoder: bool = False,
    ) -> None:
        self.settings = settings
        readers = sample_readers(settings, tokenizer, encoder_decoder=encoder_decoder)
        self._report = RunningReport(
            [(reader.located.name, reader.layout.name) for reader in readers],
            max_length=settings.max_length,
            max_dropped=settings.max_dropped,
        )
        self._cursors = [
            Cursor(reader, number, held_out=held_out or set(), report=self._report)
            for number, reader in enumerate(readers)
        ]
        self._random = np.random.default_rng(seed)
        self._buffer: list[Held] = []
        self._window: list[Held] = []
        self._bins: list[list[int]] = []
        self._next_bin = 0
        self._current = 0
        self._drawn = [0] * len(readers)
        self._passes = 0
        self._ending = False

    @property
    def rows_per_epoch(self) -> None:
        """Nobody knows before the end."""
        return

    @property
    def epoch(self) -> float:
        """Whole passes over all sources."""
        turns = min(cursor.turn for cursor in self._cursors)
        return float(turns if self._weighted else self._passes)

    def report(self) -> DataReport:
        """Return what the samples read so far, in the first pass, are like."""
        return self._report.report()

    def take(self, count: int) -> list[TokenRow]:
        """Return the next `count` rows."""
        return [self._packed() if self.settings.packing else self._draw().row for _ in range(count)]

    @property
    def _weighted(self) -> bool:
        return self.settings.mixing == "weighted" and len(self._cursors) > 1

    def _packed(self) -> TokenRow:
        if self._next_bin == len(self._bins):
            self._fill([self._draw() for _ in range(WINDOW)], 0)
        members = self._bins[self._next_bin]
        self._next_bin += 1
        return join([self._window[sample].row for sample in members])

    def _fill(self, window: list[Held], next_bin: int) -> None:
        lengths = [len(held.row.input_ids) for held in window]
        self._window, self._next_bin = window, next_bin
        self._bins = pack(lengths, self.settings.max_length)

    def _draw(self) -> Held:
        """Return a random sample of the buffer, filling it before; a pass's last rows empty it."""
        size = self.settings.shuffle_buffer if self.settings.shuffle else 1
        while not self._ending and len(self._buffer) < size:
            held = self._pull()
            if held is None:
                self._ending = True
            else:
                self._buffer.append(held)
        if not self._buffer:
            self._ending = False
            self._passes += 1
            return self._draw()
        index = int(self._random.integers(len(self._buffer)))
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        return self._buffer.pop()

    def _pull(self) -> Held | None:
        """Return the next sample of the mixture, or None at the end of a pass."""
        if self._weighted:
            return self._pull_by_weight()
        while (held := self._cursors[self._current].pull()) is None:
            self._current = (self._current + 1) % len(self._cursors)
            if self._current == 0:
                return None
        return held

    def _pull_by_weight(self) -> Held:
        """Return a sample of the source that is furthest behind its share."""
        weights = np.array([source.weight for source in self.settings.train])
        due = weights / weights.sum() * (sum(self._drawn) + 1) - self._drawn
        source = int(due.argmax())
        self._drawn[source] += 1
        cursor = self._cursors[source]
        return cursor.pull() or cast("Held", cursor.pull())

    def peek(self, count: int) -> list[TokenRow]:
        """Return the next `count` rows without taking them."""
        state = self.state_dict()
        rows = self.take(count)
        self.load_state_dict(state)
        return rows

    def state_dict(self) -> dict[str, JSON]:
        """Return all that decides the rows to come; its size does not depend on the rows'."""
        return {
            "cursors": [cursor.state() for cursor in self._cursors],
            "buffer": [_listed(held.place) for held in self._buffer],
            "window": [_listed(held.place) for held in self._window],
            "next_bin": self._next_bin,
            "current": self._current,
            "drawn": list(self._drawn),
            "passes": self._passes,
            "ending": self._ending,
            "random": cast("JSON", self._random.bit_generator.state),
            "report": self._report.state(),
        }

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        """Go to the place where `state` was taken.

        Raises:
            DataError: the data is not what it was.
        """
        saved: dict[str, Any] = dict(state)
        if len(saved["cursors"]) != len(self._cursors):
            raise DataError(
                f"the checkpoint was made with {len(saved['cursors'])} sources in data.train, and "
                f"there are {len(self._cursors)} now; resume with the same data settings"
            )
        for cursor, (turn, position, given) in zip(self._cursors, saved["cursors"], strict=True):
            cursor.go_to(turn, Position(*position), given)
        places = [_place(entry) for entry in saved["buffer"] + saved["window"]]
        held = self._read_again(places)
        size = len(saved["buffer"])
        self._buffer = [held[place] for place in places[:size]]
        self._fill([held[place] for place in places[size:]], saved["next_bin"])
        self._current, self._drawn = saved["current"], list(saved["drawn"])
        self._passes, self._ending = saved["passes"], saved["ending"]
        self._random.bit_generator.state = saved["random"]
        self._report.load(saved["report"])

    def _read_again(self, places: Sequence[Place]) -> dict[Place, Held]:
        held: dict[Place, Held] = {}
        for source, turn in sorted({(place.source, place.turn) for place in places}):
            of_turn = [place for place in places if (place.source, place.turn) == (source, turn)]
            held |= self._cursors[source].reader.at(of_turn)
        return held


def sample_readers(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, encoder_decoder: bool = False
) -> list[SampleReader]:
    """Return a reader for each training source."""
    renderer = renderer_for(
        tokenizer, supervise=settings.supervise, encoder_decoder=encoder_decoder
    )
    located = [locate(source) for source in settings.train]
    return [SampleReader(place, layout_of(place), renderer, settings) for place in located]


def _listed(place: Place) -> list[JSON]:
    return [place.source, place.turn, list(place.start)]


def _place(entry: list[Any]) -> Place:
    source, turn, start = entry
    return Place(source, turn, Position(*start))
