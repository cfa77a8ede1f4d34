"""From the data settings of a run to its rows of training and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunesmith.data.corpus import Corpus, corpus_of, hold_out
from tunesmith.data.render import Renderer
from tunesmith.data.render_pairs import renderer_for
from tunesmith.data.rows import Prompt, RawRow, TokenRow
from tunesmith.data.settings import DataSettings, Source
from tunesmith.data.sources import locate, read
from tunesmith.data.statistics import DataReport, RunningReport
from tunesmith.data.stream import EpochStream
from tunesmith.data.streaming import Cursor, StreamingRows, sample_readers
from tunesmith.data.tokenise import Job, Progress, job_of, tokenised
from tunesmith.errors import DataError

logger = logging.getLogger(__name__)


class CorpusRows(Sequence[TokenRow]):
    """The samples of a corpus as a plain sequence."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def __len__(self) -> int:
        return len(self._corpus)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        """Return one sample, or a list of them."""
        numbers = range(len(self))[index]
        if isinstance(numbers, int):
            return self._corpus.row(numbers)
        return [self._corpus.row(number) for number in numbers]


@dataclass(frozen=True)
class Evaluation:
    """What a model is judged on."""

    rows: Sequence[TokenRow]
    """Samples, for the loss."""
    examples: tuple[Prompt | None, ...]
    """Of each of `rows` what is asked and the one known reply; None where nothing is asked."""
    report: DataReport


@dataclass(frozen=True)
class PreparedData:
    """The rows of a run."""

    train: EpochStream | StreamingRows
    held_back: Evaluation | None
    """None where the settings name neither evaluation sources nor a holdout."""

    @property
    def evaluation(self) -> Sequence[TokenRow]:
        """Evaluation samples, for the loss; empty where there are none."""
        return self.held_back.rows if self.held_back else []

    @property
    def examples(self) -> tuple[Prompt | None, ...]:
        """Of each evaluation sample what is asked and the one known reply."""
        return self.held_back.examples if self.held_back else ()

    @property
    def prompts(self) -> list[Prompt]:
        """Each different prompt of the evaluation once, with all its known replies."""
        return grouped(self.examples)

    @property
    def train_report(self) -> DataReport:
        """What the training samples are like; while streaming, those read so far."""
        return self.train.report()

    @property
    def evaluation_report(self) -> DataReport | None:
        """What the evaluation samples are like."""
        return self.held_back.report if self.held_back else None

    def learned_from(self) -> list[str]:
        """Return what is trained on in words, a fact a line."""
        return self.train_report.lines()

    def describe(self) -> list[str]:
        """Return what is trained and evaluated on in words, a fact a line."""
        lines = [f"train: {line}" for line in self.train_report.lines()]
        if self.held_back:
            lines += [f"evaluation: {line}" for line in self.held_back.report.lines()]
        return lines


def prepare(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    cache: Path,
    encoder_decoder: bool = False,
    progress: Progress | None = None,
) -> PreparedData:
    """Return the rows of a run: read, rendered, tokenised (or found in the cache), cut and mixed.

    Args:
        settings: the `data` part of a run file.
        tokenizer: with a chat template where there are conversations.
        seed: of the run: decides the order.
        cache: folder that keeps tables of tokens by content hash.
        encoder_decoder: whether the model reads prompts apart from the replies that it writes.
        progress: called now and then while tokenising.

    Raises:
        DataError: a source cannot be found, read or understood, a row is bad, or too many rows
            would be lost; the message names file, row or setting.
    """
    warn_of_no_effect(settings)
    if encoder_decoder and settings.packing:
        raise DataError(
            "data.packing: true: an encoder-decoder's samples are pairs of sequences, and packing "
            "fills one sequence; use false"
        )
    work = _Work(settings, tokenizer, cache, progress, encoder_decoder)
    if settings.streaming:
        return _streamed(work, seed)
    jobs, corpus = work.corpus(settings.train)
    held_back = None
    if settings.evaluation:
        held_back = work.evaluation(*work.corpus(settings.evaluation), training=corpus)
    elif settings.holdout:
        flags = hold_out(
            corpus.column("prompt"), holdout=settings.holdout, seed=settings.holdout_seed
        )
        corpus, kept_out = corpus.split(flags)
        held_back = work.evaluation(jobs, kept_out, training=corpus)
    train = EpochStream.of(corpus, settings, seed=seed)
    return PreparedData(train, held_back)


@dataclass(frozen=True)
class _Work:
    """What all sources of a run are prepared with."""

    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    cache: Path
    progress: Progress | None
    encoder_decoder: bool

    def corpus(self, sources: Sequence[Source]) -> tuple[list[Job], Corpus]:
        settings = self.settings
        # Every source is found and its format recognised before the first is tokenised.
        jobs = [
            job_of(
                locate(source),
                self.tokenizer,
                supervise=settings.supervise,
                on_bad_row=settings.on_bad_row,
                encoder_decoder=self.encoder_decoder,
            )
            for source in sources
        ]
        tables = [
            tokenised(job, cache=self.cache, workers=settings.workers, progress=self.progress)
            for job in jobs
        ]
        corpus = corpus_of(tables, max_length=settings.max_length, max_dropped=settings.max_dropped)
        return jobs, corpus

    def evaluation(
        self, jobs: Sequence[Job], corpus: Corpus, *, training: Corpus | None
    ) -> Evaluation:
        report = corpus.report()
        if training is not None:
            asked = np.isin(corpus.column("prompt"), training.column("prompt"))
            report = replace(report, also_in_training=int(asked.sum()))
        renderer = renderer_for(
            self.tokenizer,
            supervise=self.settings.supervise,
            encoder_decoder=self.encoder_decoder,
        )
        examples: list[Prompt | None] = []
        for job, table, rows in zip(jobs, corpus.tables, corpus.chosen, strict=True):
            examples += _examples(job, renderer, table.column("ordinal")[rows])
        return Evaluation(CorpusRows(corpus), tuple(examples), report)


def _examples(job: Job, renderer: Renderer, ordinals: NDArray[np.int64]) -> list[Prompt | None]:
    """Read some rows of a source again, for what they ask and the reply they know."""
    wanted = set(ordinals.tolist())
    examples: list[Prompt | None] = []
    for raw in read(job.located):
        if len(examples) == len(wanted):
            break
        if isinstance(raw, RawRow) and raw.end.total - 1 in wanted:
            examples.append(renderer.prompt(job.layout.convert(raw.values)))
    return examples


def _streamed(work: _Work, seed: int) -> PreparedData:
    settings = work.settings
    held_back, held_out = None, set[int]()
    if settings.evaluation:
        held_back = work.evaluation(*work.corpus(settings.evaluation), training=None)
    elif settings.holdout:
        held_back, held_out = _first_samples(work)
    rows = StreamingRows(
        settings,
        work.tokenizer,
        seed=seed,
        held_out=held_out,
        encoder_decoder=work.encoder_decoder,
    )
    return PreparedData(rows, held_back)


def _first_samples(work: _Work) -> tuple[Evaluation, set[int]]:
    """Return the first samples of a stream for evaluation, and the hashes of what they ask.

    How many samples there are is not known, so the first ones of each source are taken, as many of
    each; training leaves out every sample that asks the same.
    """
    settings = work.settings
    readers = sample_readers(settings, work.tokenizer, encoder_decoder=work.encoder_decoder)
    sources = [(reader.located.name, reader.layout.name) for reader in readers]
    report = RunningReport(
        sources, max_length=settings.max_length, max_dropped=settings.max_dropped
    )
    rows: list[TokenRow] = []
    examples: list[Prompt | None] = []
    hashes: set[int] = set()
    for number, reader in enumerate(readers):
        cursor = Cursor(reader, number, held_out=set(), report=report)
        wanted = -(-int(settings.holdout) * (number + 1) // len(readers)) - len(rows)
        for _ in range(wanted):
            held = cursor.pull()
            if held is None:
                raise DataError(
                    f"data.holdout {settings.holdout} takes all samples of {reader.located.name}; "
                    "expected fewer"
                )
            sample = reader.sample(held.place)
            rows.append(held.row)
            examples.append(reader.renderer.prompt(sample))
            hashes.add(sample.prompt_hash)
    return Evaluation(rows, tuple(examples), report.report()), hashes


def grouped(examples: Sequence[Prompt | None]) -> list[Prompt]:
    """Return each different prompt once, in the order of the first, with all its references."""
    found: dict[tuple[int, ...], Prompt] = {}
    for example in examples:
        if example is None:
            continue
        key = tuple(example.input_ids)
        if key in found:
            found[key].reference.extend(example.reference)
        else:
            found[key] = Prompt(example.input_ids, list(example.reference), example.messages)
    return list(found.values())


def warn_of_no_effect(settings: DataSettings) -> None:
    """Warn of settings of the data that change nothing beside the others."""
    if settings.evaluation and settings.holdout:
        logger.warning("data.holdout has no effect: data.evaluation names the evaluation rows")
    weights = {source.weight for source in settings.train}
    if len(weights) > 1 and settings.mixing == "concatenate":
        logger.warning("data.train weights have no effect with data.mixing concatenate")
