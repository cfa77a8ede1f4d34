"""From the data settings of a run to rows of judged replies, tokenised."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunesmith.data.conversation import Conversation
from tunesmith.data.corpus import hold_out
from tunesmith.data.in_memory import InMemory
from tunesmith.data.pairs_rows import Judged, Judgement, read_judged, swapped
from tunesmith.data.prepare import Evaluation, PreparedData
from tunesmith.data.render import Renderer
from tunesmith.data.rows import TokenRow
from tunesmith.data.settings import DataSettings, Source
from tunesmith.data.sources import locate
from tunesmith.data.statistics import DataReport
from tunesmith.data.stream import EpochStream
from tunesmith.data.table import first_target
from tunesmith.errors import DataError

NAMED: Final = 3
"""Dropped rows that an error names."""
EQUAL: Final = "equal replies"
TIE: Final = "ties"
TOO_LONG: Final = "prompt longer than data.max_length"
SILENT: Final = "empty reply"


@dataclass(frozen=True, slots=True, eq=False)
class PairRow(TokenRow):
    """The replies to one prompt side by side, a segment each with its prompt before it.

    Of a labelled reply the second segment is its prompt with another row's reply, from which KTO
    estimates its KL divergence.
    """

    winners: tuple[int, ...]
    """Of each pair the segment that is better."""
    losers: tuple[int, ...]
    """Of each pair the segment that is worse."""
    margins: tuple[float, ...]
    """Of each pair the difference of the scores; 0 where there are none."""
    good: bool | None
    """Of a labelled reply."""
    score: float | None
    """Of a single reply."""
    steps: tuple[tuple[int, float], ...] | None
    """Of a single reply: position of the last token of each step, and 1.0 where it is right."""
    key: str
    """Equal for rows with equal tokens."""


class PairCorpus(InMemory[PairRow, Judged]):
    """Judged samples in memory."""

    def hashes(self) -> NDArray[np.uint64]:
        """Return 64 bits a sample, equal for equal prompts, (samples,) uint64."""
        found = [judged.prompt_hash for rows in self.origins for judged in rows]
        return np.array(found, dtype=np.uint64)

    def report(self) -> DataReport:
        """Return what the samples and their replies are like."""
        unfinished = sum(judged.unfinished for rows in self.origins for judged in rows)
        return replace(super().report(), unfinished=unfinished)


def prepare_pairs(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    judgement: Judgement,
    *,
    seed: int,
) -> PreparedData:
    """Return the judged rows of a run: read, rendered, tokenised, cut, and some held out.

    Args:
        settings: the `data` part of a run file.
        tokenizer: with a chat template.
        judgement: what is known of the replies.
        seed: of the run: decides the order.

    Raises:
        DataError: a source cannot be found, a row is bad, or too many rows would be lost; the
            message names file, row or setting.
    """
    _require_plain(settings)
    work = _Work(settings, Renderer(tokenizer), judgement)
    corpus = work.corpus(settings.train)
    held_back = None
    if settings.evaluation:
        held_back = work.evaluation(work.corpus(settings.evaluation), corpus)
    elif settings.holdout:
        flags = hold_out(corpus.hashes(), holdout=settings.holdout, seed=settings.holdout_seed)
        corpus, kept_out = corpus.split(flags)
        held_back = work.evaluation(kept_out, corpus)
    train = EpochStream.of(corpus, settings, seed=seed)
    return PreparedData(train, held_back)


def _require_plain(settings: DataSettings) -> None:
    if settings.streaming or settings.packing or settings.supervise == "all":
        name = next(n for n in ("streaming", "packing", "supervise") if getattr(settings, n))
        name = "supervise: all" if name == "supervise" else f"{name}: true"
        raise DataError(
            f"data.{name} is not for judged replies, which are read whole, stand side by side in "
            "batches anyway and are compared by what was replied; leave it out"
        )


@dataclass(frozen=True)
class _Work:
    """What all sources of a run are prepared with."""

    settings: DataSettings
    renderer: Renderer
    judgement: Judgement
    named: list[str] = field(default_factory=list)
    """The first dropped rows and why."""

    def corpus(self, sources: Sequence[Source]) -> PairCorpus:
        located = [locate(source) for source in sources]
        skip = self.settings.on_bad_row
        read = [read_judged(place, self.judgement, on_bad_row=skip) for place in located]
        made: list[list[tuple[PairRow, Judged, int]]] = []
        dropped: list[Counter[str]] = []
        for rows, _ in read:
            reasons: Counter[str] = Counter()
            made.append(list(self._rows(rows, reasons)))
            dropped.append(reasons)
        corpus = PairCorpus(
            sources=tuple([row for row, _, _ in rows] for rows in made),
            origins=tuple([judged for _, judged, _ in rows] for rows in made),
            uncut=tuple([size for _, _, size in rows] for rows in made),
            readings=tuple(reading for _, reading in read),
            dropped=tuple(dropped),
            max_length=self.settings.max_length,
        )
        self._check(corpus)
        return corpus

    def _check(self, corpus: PairCorpus) -> None:
        """Raise where too many rows are lost."""
        reasons = sum(corpus.dropped, Counter[str]())
        bad, rows = sum(r.bad for r in corpus.readings), sum(r.rows for r in corpus.readings)
        reasons += Counter({"bad": bad})
        share = self.settings.max_dropped
        if reasons.total() <= share * rows and len(corpus):
            return
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise DataError(
            f"data: {reasons.total():,} of {rows:,} rows would be lost ({why}), which is more than "
            f"data.max_dropped {share:g}; such as {'; '.join(self.named[:NAMED])}"
        )

    def _rows(
        self, rows: Sequence[Judged], reasons: Counter[str]
    ) -> Iterator[tuple[PairRow, Judged, int]]:
        for number, judged in enumerate(rows):
            reason = _useless(judged, self.judgement)
            replies = list(judged.replies)
            if self.judgement == "labels":
                replies.append(swapped(judged, _asking_another(rows, number)))
            made = [] if reason else [self._reply(reply, judged.place) for reply in replies]
            firsts = [first_target(row.supervised) for row in made]
            if made and min(firsts) < 0:
                reason = SILENT
            elif made and max(firsts) >= self.settings.max_length:
                reason = TOO_LONG
            elif made and self.judgement == "pairs" and self._cut_alike(made):
                reason = f"{EQUAL} once cut"
            if reason:
                reasons[reason] += 1
                self.named.append(f"{judged.place} ({reason})")
                continue
            cut = [self._cut(row) for row in made]
            longest = max(len(row.input_ids) for row in made)
            yield self._joined(judged, cut), judged, longest

    def _reply(self, reply: Conversation, place: str) -> TokenRow:
        """Return prompt and reply up to the reply's last token; a template's line break is off."""
        try:
            row = self.renderer.row(reply)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        said = np.flatnonzero(row.supervised)
        stop = int(said[-1]) + 1 if len(said) else len(row.input_ids)
        return TokenRow(row.input_ids[:stop], row.supervised[:stop], (stop,))

    def _cut(self, row: TokenRow) -> TokenRow:
        ids = row.input_ids[: self.settings.max_length]
        return TokenRow(ids, row.supervised[: self.settings.max_length], (len(ids),))

    def _cut_alike(self, rows: Sequence[TokenRow]) -> bool:
        return len({self._cut(row).input_ids.tobytes() for row in rows}) < 2

    def _joined(self, judged: Judged, rows: Sequence[TokenRow]) -> PairRow:
        ids = np.concatenate([row.input_ids for row in rows])
        sizes = tuple(len(row.input_ids) for row in rows)
        pairs = judged.pairs if self.judgement == "pairs" else []
        digest = hashlib.blake2b(ids.tobytes() + repr(sizes).encode(), digest_size=16)
        supervised = np.concatenate([row.supervised for row in rows])
        digest.update(supervised.tobytes())
        return PairRow(
            ids,
            supervised,
            sizes,
            tuple(better for better, _, _ in pairs),
            tuple(worse for _, worse, _ in pairs),
            tuple(margin for _, _, margin in pairs),
            judged.good,
            judged.scores[0] if self.judgement == "scores" else None,
            self._steps(judged, rows[0]) if judged.steps else None,
            digest.hexdigest(),
        )

    def _steps(self, judged: Judged, row: TokenRow) -> tuple[tuple[int, float], ...]:
        """Return the last token of each step, as far as the row reaches."""
        start = int(np.flatnonzero(row.supervised)[0])
        tokenizer = self.renderer.tokenizer
        reply = row.input_ids[start:].tolist()
        ends = np.cumsum([len(text) + 1 for text, _ in judged.steps]) - 1
        reached = [
            len(tokenizer.decode(reply[: n + 1]).rstrip("\ufffd")) for n in range(len(reply))
        ]
        found = []
        for end, (_, right) in zip(ends.tolist(), judged.steps, strict=True):
            place = next((n for n, length in enumerate(reached) if length >= end), None)
            if place is not None:
                found.append((start + place, right))
        return tuple(found)

    def evaluation(self, corpus: PairCorpus, training: PairCorpus) -> Evaluation:
        shared = int(np.isin(corpus.hashes(), training.hashes()).sum())
        prompts = tuple(
            self.renderer.prompt(_best(judged)) for rows in corpus.origins for judged in rows
        )
        report = replace(corpus.report(), also_in_training=shared)
        return Evaluation(corpus.rows, prompts, report)


def _best(judged: Judged) -> Conversation:
    """Return the reply that a model is shown beside its own."""
    scores = judged.scores or (1.0,)
    return judged.replies[max(range(len(scores)), key=lambda index: scores[index])]


def _asking_another(rows: Sequence[Judged], number: int) -> Judged:
    """Return the nearest row before `number` (round the start) with another prompt."""
    own = rows[number].prompt_hash
    before = (rows[(number - back) % len(rows)] for back in range(1, len(rows)))
    return next((row for row in before if row.prompt_hash != own), rows[number])


def _useless(judged: Judged, judgement: Judgement) -> str | None:
    """Return why nothing can be learnt from a row, or None."""
    if judgement != "pairs" and len(judged.replies) == 1:
        return None
    if judged.equal:
        return EQUAL
    return None if judged.pairs else TIE
