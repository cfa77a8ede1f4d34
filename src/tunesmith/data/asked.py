"""Prompts for runs that learn from the model's own replies, with the columns of their rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.conversation import Conversation, as_text, conversation, message
from tunesmith.data.converted import converted
from tunesmith.data.corpus import hold_out
from tunesmith.data.formats import Layout, fill, layout_of, renamed
from tunesmith.data.mixing import epoch_counts, epoch_order
from tunesmith.data.pairs_rows import replies_of
from tunesmith.data.prepare import PreparedData, warn_of_no_effect
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RawRow
from tunesmith.data.sources import Located, locate
from tunesmith.data.statistics import DataReport, SourceReport, histogram
from tunesmith.data.table import Reading
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.rows import Values
    from tunesmith.data.settings import DataSettings, Source
    from tunesmith.data.stream import EpochStream
    from tunesmith.types import JSON


@dataclass(frozen=True, eq=False)
class Asked:
    """One prompt."""

    input_ids: list[int]
    """Tokens of the turns before the reply, with the header of the assistant's turn."""
    messages: list[Values]
    """Those turns."""
    columns: Values
    """The row as its file has it, for rewards."""

    @property
    def text(self) -> str:
        """The last turn's text."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True)
class AskedReport(DataReport):
    """What the prompts of one side are like."""

    def lines(self) -> list[str]:
        """Return the report in words, a fact a line."""
        told = [
            f"{source.name}: {source.rows:,} rows as {source.format}"
            + (f", {source.bad:,} bad and skipped" if source.bad else "")
            + (f", {source.dropped:,} too long for a reply and dropped" if source.dropped else "")
            for source in self.sources
        ]
        return [*told, f"{self.kept:,} prompts with {self.tokens:,} tokens"]


class AskedStream:
    """An endless order of prompts in which each epoch follows from seed and number alone."""

    def __init__(
        self,
        sources: Sequence[Sequence[Asked]],
        report: AskedReport,
        settings: DataSettings,
        *,
        seed: int,
    ) -> None:
        self.rows = list(chain(*sources))
        self._report = report
        self._seed, self._shuffle = seed, settings.shuffle
        self._sizes = [len(rows) for rows in sources]
        weights = [source.weight for source in settings.train]
        self._counts = epoch_counts(self._sizes, weights, settings.mixing)
        self._epoch = self._position = 0
        self._order = self._order_of(0)

    @property
    def rows_per_epoch(self) -> int:
        """Prompts of an epoch, those that `data.mixing: weighted` repeats as often as they come."""
        return len(self._order)

    @property
    def epoch(self) -> float:
        """Epochs taken so far."""
        return self._epoch + self._position / len(self._order)

    def take(self, count: int) -> list[Asked]:
        """Return the next `count` prompts, going on into the next epoch where one ends."""
        taken = []
        for _ in range(count):
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            taken.append(self.rows[int(self._order[self._position])])
            self._position += 1
        return taken

    def peek(self, count: int) -> list[Asked]:
        """Return the next `count` prompts without taking them."""
        state = self.state_dict()
        rows = self.take(count)
        self.load_state_dict(state)
        return rows

    def report(self) -> AskedReport:
        """Return what the prompts are like."""
        return self._report

    def state_dict(self) -> dict[str, JSON]:
        """Return the place, and the prompts of an epoch, by which other data is noticed."""
        return {"epoch": self._epoch, "position": self._position, "prompts": len(self._order)}

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        """Go to the place where `state` was taken.

        Raises:
            DataError: the state was taken over other data.
        """
        if state.get("prompts") != len(self._order):
            raise DataError(
                f"the checkpoint was made with {state.get('prompts')} prompts an epoch, and there "
                f"are {len(self._order)} now; resume with the same data and data settings"
            )
        self._epoch, self._position = int(str(state["epoch"])), int(str(state["position"]))
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        return epoch_order(
            self._sizes, self._counts, seed=self._seed, epoch=epoch, shuffle=self._shuffle
        )


@dataclass(frozen=True)
class AskedData(PreparedData):
    """The prompts of a run. Nothing is held back that has a loss, since no reply is known."""

    train: AskedStream  # type: ignore[assignment]  # rows come of it when answered
    asked: Sequence[Asked]
    """Held back for evaluation."""
    asked_report: AskedReport | None
    texts: EpochStream | None = None
    """What is learned from beside the replies, if anything."""

    @property
    def evaluation_report(self) -> AskedReport | None:
        """What the prompts held back are like."""
        return self.asked_report

    def learned_from(self) -> list[str]:
        """Return what the prompts are like, and the texts beside them, a fact a line."""
        read = [] if self.texts is None else self.texts.report().lines()
        return [*super().learned_from(), *(f"pretraining: {line}" for line in read)]


def prepare_asked(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    reply_length: int,
    prompt_tokens: int | None = None,
) -> AskedData:
    """Return the prompts of a run: read, rendered, tokenised, and those too long left out.

    A row has a column `prompt` or is a conversation, of which a reply at its end is left off, or
    asks what `data.train[].prompt` makes of its columns.

    Args:
        settings: the `data` part of a run file.
        tokenizer: with a chat template.
        seed: of the run: decides the order.
        reply_length: tokens that a reply may have; prompt and reply fit `data.max_length`.
        prompt_tokens: keep the first so many tokens of each prompt only.

    Raises:
        DataError: a source cannot be found, read or understood, a row is bad, or too many prompts
            are too long.
    """
    if settings.streaming or settings.packing:
        which = "streaming" if settings.streaming else "packing"
        raise DataError(f"data.{which}: prompts are all read before and stay apart; use false")
    warn_of_no_effect(settings)
    reader = _Reader(
        settings, Renderer(tokenizer), settings.max_length - reply_length, prompt_tokens
    )
    sources, report = reader.read(settings.train)
    held: list[Asked] = []
    held_report: AskedReport | None = None
    if settings.evaluation:
        found, held_report = reader.read(settings.evaluation)
        held = list(chain(*found))
    elif settings.holdout:
        hashes = np.array([_hash(row) for row in chain(*sources)], dtype=np.uint64)
        flags = iter(hold_out(hashes, holdout=settings.holdout, seed=settings.holdout_seed))
        flagged = [[(row, next(flags)) for row in rows] for rows in sources]
        held = [row for rows in flagged for row, flag in rows if flag]
        sources = [[row for row, flag in rows if not flag] for rows in flagged]
        held_report = _report(report.sources, held)
        report = _report(report.sources, list(chain(*sources)))
    return AskedData(AskedStream(sources, report, settings, seed=seed), None, held, held_report)


@dataclass(frozen=True)
class _Reader:
    settings: DataSettings
    renderer: Renderer
    longest: int
    prompt_tokens: int | None

    def read(self, sources: Sequence[Source]) -> tuple[list[list[Asked]], AskedReport]:
        """Return the prompts of each source, and what they are like."""
        found: list[list[Asked]] = []
        reports = []
        for source in sources:
            rows, report = self._source(locate(source))
            found.append(rows)
            reports.append(report)
        dropped, kept = sum(report.dropped for report in reports), sum(map(len, found))
        if not kept or dropped > self.settings.max_dropped * (dropped + kept):
            raise DataError(
                f"data.max_length: {dropped} of {dropped + kept} prompts have more than "
                f"{self.longest} tokens, which max_length {self.settings.max_length} leaves beside "
                "rollout.max_new_tokens; raise it, shorten replies, or raise data.max_dropped"
            )
        return found, _report(tuple(reports), list(chain(*found)))

    def _source(self, located: Located) -> tuple[list[Asked], SourceReport]:
        reading = Reading(located.name, "prompts")
        on_bad_row = self.settings.on_bad_row
        row = partial(self._row, TurnsAsked(located))
        every = list(converted(located, row, on_bad_row=on_bad_row, reading=reading))
        rows = [asked for asked in every if len(asked.input_ids) <= self.longest]
        report = SourceReport(
            reading.name,
            reading.format,
            reading.rows,
            reading.bad,
            len(every) - len(rows),
            tuple(reading.messages),
        )
        return rows, report

    def _row(self, asking: TurnsAsked, raw: RawRow) -> Asked:
        asked = asking(raw.values)
        messages, ids = list(asked.messages), self.renderer.asked(asked)
        if self.prompt_tokens is not None:
            ids = ids[: self.prompt_tokens]
            said = self.renderer.tokenizer.decode(ids, skip_special_tokens=True)
            messages = [{"role": "user", "content": said}]
        return Asked(ids, messages, dict(raw.values))


class TurnsAsked:
    """Says what the rows of a source ask: the turns before the reply."""

    def __init__(self, located: Located) -> None:
        """Take the source, whose layout is looked up once a row needs it."""
        self._located = located

    @cached_property
    def _layout(self) -> Layout:
        return layout_of(self._located)

    def __call__(self, values: Values) -> Conversation:
        """Return the turns before a row's reply, the system's first where there is one.

        A row may end with what is asked, or with a reply, which is left off.

        Raises:
            DataError: nothing is asked.
        """
        whole = self._whole(values)
        replied = bool(whole.messages) and whole.messages[-1]["role"] == "assistant"
        asked = whole.messages[:-1] if replied else whole.messages
        if not asked:
            raise DataError(
                f"asks nothing: it has neither a `prompt` nor a turn before the assistant's; its "
                f"columns are {', '.join(values)}"
            )
        return replace(whole, messages=asked)

    def _whole(self, values: Values) -> Conversation:
        """Return what is asked, also with a reply behind it."""
        source = self._located.source
        if source.prompt is not None:
            return self._said([{"role": "user", "content": fill(source.prompt, values)}], {})
        row = renamed(values, source.columns)
        if row.get("chosen") is not None and row.get("rejected") is not None:
            return replies_of(row, source)[0]
        if "prompt" in row and not isinstance(row["prompt"], list):
            content = as_text(row["prompt"], "'prompt'")
            return self._said([{"role": "user", "content": content}], row)
        if isinstance(given := row.get("prompt", row.get("messages")), list):
            turns = [
                message(turn, number, role_key="role", content_key="content")
                for number, turn in enumerate(given, start=1)
            ]
            return self._said(turns, row)
        sample = self._layout.convert(values)
        return sample if isinstance(sample, Conversation) else Conversation(())

    def _said(self, turns: list[Values], row: Values) -> Conversation:
        own = row.get("system")
        system = as_text(own, "'system'") if own else self._located.source.system
        return conversation(turns, tools=row.get("tools"), system=system)


def _hash(row: Asked) -> int:
    ids = np.array(row.input_ids, dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest())


def _report(sources: tuple[SourceReport, ...], rows: Sequence[Asked]) -> AskedReport:
    lengths = Counter(len(row.input_ids) for row in rows)
    return AskedReport(
        sources=sources,
        kept=len(rows),
        truncated=0,
        tokens=sum(length * count for length, count in lengths.items()),
        supervised_tokens=0,
        lengths=histogram(lengths),
    )
