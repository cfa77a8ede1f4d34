"""From the data settings of a run to labelled rows of tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunesmith.data.classification_rows import Example, Kind, read_examples
from tunesmith.data.corpus import hold_out
from tunesmith.data.in_memory import InMemory
from tunesmith.data.prepare import Evaluation, PreparedData
from tunesmith.data.rows import Prompt, TokenRow
from tunesmith.data.settings import DataSettings, Source
from tunesmith.data.sources import locate
from tunesmith.data.statistics import DataReport
from tunesmith.data.stream import EpochStream
from tunesmith.data.table import Reading
from tunesmith.errors import DataError
from tunesmith.types import IGNORE

MOST_CLASSES: Final = 100_000
"""Classes above which a head would hold more weights than most models."""
FEW_ROWS: Final = 20
"""Rows below which every one may have a label of its own."""
_AT_ONCE: Final = 1000
"""Texts that are tokenised together."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledRow(TokenRow):
    """One text as tokens, with what it is labelled as."""

    target: NDArray[Any]
    """() int64 class, (classes,) float32 ones and zeros, () float32 number, or of tokens
    (length,) int64, IGNORE where none."""
    types: NDArray[np.int64] | None
    """(length,): 0 for the first text and 1 for the second, where the tokenizer tells them
    apart."""


@dataclass(frozen=True)
class LabelledCorpus(InMemory[LabelledRow, Example]):
    """Labelled samples in memory."""

    classes: tuple[str, ...]

    def hashes(self) -> NDArray[np.uint64]:
        """Return 64 bits a sample, equal for equal texts, (samples,) uint64."""
        found = [example.text_hash for examples in self.origins for example in examples]
        return np.array(found, dtype=np.uint64)

    def label_counts(self) -> list[int]:
        """Return how often each class occurs, in their order."""
        found = Counter(
            label for examples in self.origins for example in examples for label in example.labels
        )
        return [found[label] for label in self.classes]

    def report(self) -> DataReport:
        """Return what the samples and their labels are like."""
        pairs = zip(self.classes, self.label_counts(), strict=True)
        return replace(super().report(), classes=tuple(pairs))


@dataclass(frozen=True)
class LabelledData(PreparedData):
    """The rows of a run that classifies."""

    classes: tuple[str, ...]
    """Names of the classes, in the order of the outputs; empty for a regression."""
    counts: tuple[int, ...]
    """How often each occurs in training."""


def prepare_labelled(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    *,
    labels: Sequence[str] | None,
    seed: int,
) -> LabelledData:
    """Return the labelled rows of a run: read, tokenised, cut, and some held out.

    Args:
        settings: the `data` part of a run file.
        tokenizer: with a pad token.
        kind: what a row is labelled with.
        labels: the classes; None finds them in the training rows and sorts them.
        seed: of the run: decides the order.

    Raises:
        DataError: a source cannot be found, a row is bad, there is one class only or far too many,
            or an evaluation row has a label that training has not; file and row are named.
    """
    _require_plain(settings)
    work = _Work(settings, tokenizer, kind)
    read = work.read(settings.train)
    classes = tuple(labels) if labels is not None else found_classes(read, kind)
    for examples, _ in read:
        require_known(examples, classes, "objective.labels names")
    corpus = work.corpus(read, classes)
    held_back = None
    if settings.evaluation:
        others = work.read(settings.evaluation)
        for examples, _ in others:
            require_known(examples, classes, "training knows")
        held_back = _evaluation(work.corpus(others, classes), corpus)
    elif settings.holdout:
        flags = hold_out(corpus.hashes(), holdout=settings.holdout, seed=settings.holdout_seed)
        corpus, kept_out = corpus.split(flags)
        held_back = _evaluation(kept_out, corpus)
    train = EpochStream.of(corpus, settings, seed=seed)
    return LabelledData(train, held_back, classes, tuple(corpus.label_counts()))


def _require_plain(settings: DataSettings) -> None:
    if settings.streaming:
        raise DataError(
            "data.streaming: classification reads all rows before it trains, to know the labels; "
            "use streaming: false"
        )
    if settings.packing:
        raise DataError(
            "data.packing: texts of a classification are not packed into rows; use packing: false "
            "(batches are without padding anyway where the model allows it)"
        )


def _evaluation(corpus: LabelledCorpus, training: LabelledCorpus) -> Evaluation:
    shared = int(np.isin(corpus.hashes(), training.hashes()).sum())
    prompts = tuple(
        Prompt(row.input_ids.tolist(), [told(example)], [{"role": "user", "content": example.text}])
        for rows, examples in zip(corpus.sources, corpus.origins, strict=True)
        for row, example in zip(rows, examples, strict=True)
    )
    report = replace(corpus.report(), also_in_training=shared)
    return Evaluation(corpus.rows, prompts, report)


def told(example: Example) -> str:
    """Return an example's target for people to read."""
    target = example.target
    return " ".join(target) if isinstance(target, tuple) else str(target)


def found_classes(read: Sequence[tuple[Sequence[Example], Reading]], kind: Kind) -> tuple[str, ...]:
    """Return the labels of the training rows, sorted: as numbers where all are.

    Raises:
        DataError: fewer than two, more than a head can have, or one of its own in every row.
    """
    if kind == "regression":
        return ()
    names = ", ".join(reading.name for _, reading in read)
    rows = sum(len(examples) for examples, _ in read)
    labels = {label for examples, _ in read for example in examples for label in example.labels}
    if len(labels) < 2:
        which = f"the label '{min(labels)}'" if labels else "no label"
        raise DataError(
            f"{names}: all {rows:,} rows have {which}; classification needs two classes or more"
        )
    if len(labels) > MOST_CLASSES or (kind == "single" and len(labels) == rows > FEW_ROWS):
        raise DataError(
            f"{names}: there are {len(labels):,} different labels in {rows:,} rows (such as "
            f"'{min(labels)[:40]}'), which are no classes; name the right column with `columns`: "
            "{label: ...}, or set objective.kind: regression where they are numbers"
        )
    return tuple(sorted(labels, key=_number_or_name))


def _number_or_name(label: str) -> tuple[float, str]:
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    # The word "nan" is a name: as a number it is neither before nor behind any other.
    return (math.inf if math.isnan(number) else number), label


def require_known(examples: Sequence[Example], classes: Sequence[str], source: str) -> None:
    """Check that every label is one of `classes`.

    Raises:
        DataError: one is not; its row is named.
    """
    known = set(classes)
    for example in examples:
        for label in example.labels:
            if label not in known:
                shown = ", ".join(list(classes)[:10]) + (", ..." if len(classes) > 10 else "")
                raise DataError(
                    f"{example.place}: the label '{label}' is none of the {len(classes)} that "
                    f"{source} ({shown}); mend the row, or add rows with this label to the training"
                )


@dataclass(frozen=True)
class _Work:
    """What all sources of a run are prepared with."""

    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    kind: Kind

    @property
    def max_length(self) -> int:
        """Tokens a row may have: no more than the tokenizer's model takes."""
        return min(self.settings.max_length, self.tokenizer.model_max_length)

    def read(self, sources: Sequence[Source]) -> list[tuple[list[Example], Reading]]:
        # Every source is found before the first is read.
        located = [locate(source) for source in sources]
        skip = self.settings.on_bad_row
        return [read_examples(place, self.kind, on_bad_row=skip) for place in located]

    def corpus(
        self, read: Sequence[tuple[list[Example], Reading]], classes: tuple[str, ...]
    ) -> LabelledCorpus:
        made = [
            tokenised_examples(
                examples,
                self.tokenizer,
                self.kind,
                classes=classes,
                max_length=self.max_length,
            )
            for examples, _ in read
        ]
        return LabelledCorpus(
            sources=tuple([row for row, _ in rows] for rows in made),
            origins=tuple(examples for examples, _ in read),
            uncut=tuple([size for _, size in rows] for rows in made),
            readings=tuple(reading for _, reading in read),
            dropped=tuple(Counter[str]() for _ in read),
            max_length=self.max_length,
            classes=classes,
        )


def tokenised_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    *,
    classes: Sequence[str],
    max_length: int,
) -> list[tuple[LabelledRow, int]]:
    """Return each example as tokens, cut to `max_length`, and its length before.

    The tokenizer puts in the special tokens it puts in by itself ([CLS] and [SEP] of BERT); of two
    texts the longer is cut first.

    Raises:
        DataError: a text has no tokens.
    """
    index = {label: number for number, label in enumerate(classes)}
    found: list[tuple[LabelledRow, int]] = []
    for start in range(0, len(examples), _AT_ONCE):
        some = examples[start : start + _AT_ONCE]
        whole = _encoded(some, tokenizer, None)
        cut = _encoded(some, tokenizer, max_length)
        for number, example in enumerate(some):
            encoding = cut.encodings[number]
            if not encoding.ids:
                raise DataError(f"{example.place}: the text has no tokens for this tokenizer")
            target = _target(example, index, kind, offsets=encoding.offsets)
            found.append(
                (_row(cut, number, target, kind), len(whole.encodings[number].ids)),
            )
    return found


def _encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Any:
    pairs = [example.pair for example in examples]
    if any(pair is not None for pair in pairs) and None in pairs:
        place = examples[pairs.index(None)].place
        raise DataError(f"{place}: has no 'text_pair', which other rows have")
    return tokenizer(
        [example.text for example in examples],
        pairs if pairs[0] is not None else None,
        truncation=max_length is not None,
        max_length=max_length,
        verbose=False,
    )


def _row(encoded: Any, number: int, target: NDArray[Any], kind: Kind) -> LabelledRow:
    ids = np.array(encoded.encodings[number].ids, dtype=np.int32)
    types = encoded["token_type_ids"][number] if "token_type_ids" in encoded else None
    supervised = target != IGNORE if kind == "tokens" else np.zeros(len(ids), dtype=bool)
    return LabelledRow(
        ids,
        supervised,
        (len(ids),),
        target,
        None if types is None else np.array(types, dtype=np.int64),
    )


def _target(
    example: Example, index: dict[str, int], kind: Kind, *, offsets: list[tuple[int, int]]
) -> NDArray[Any]:
    if kind == "regression":
        return np.array(example.target, dtype=np.float32)
    if kind == "single":
        return np.array(index[example.labels[0]], dtype=np.int64)
    if kind == "multi":
        flags = np.zeros(len(index), dtype=np.float32)
        flags[[index[label] for label in example.labels]] = 1.0
        return flags
    return word_labels(example, index, offsets)


def word_labels(
    example: Example, index: dict[str, int], offsets: list[tuple[int, int]]
) -> NDArray[np.int64]:
    """Return (length,) int64: each word's label at its first token, IGNORE elsewhere.

    Args:
        example: words and their labels; its text is the words with spaces between them.
        index: number of each label.
        offsets: of each token its first character and the one after its last; empty for special
            tokens.
    """
    starts = np.cumsum([0, *(len(word) + 1 for word in example.words)])
    labels = np.full(len(offsets), IGNORE, dtype=np.int64)
    last = -1
    for token, (begin, end) in enumerate(offsets):
        # A token may begin with the space before its word, and may be nothing but that space.
        inside = next((c for c in range(begin, end) if not example.text[c].isspace()), None)
        if inside is None:
            continue
        word = int(np.searchsorted(starts, inside, side="right")) - 1
        if word > last:
            labels[token], last = index[example.labels[word]], word
    return labels
