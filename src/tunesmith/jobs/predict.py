"""What a finished classifier or reward model says of new texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.classification import tokenised_examples
from tunesmith.data.classification_collate import LabelledCollator
from tunesmith.data.classification_rows import Example, Kind, words_of
from tunesmith.data.conversation import as_text
from tunesmith.data.formats import fill, renamed
from tunesmith.data.rows import RawRow
from tunesmith.data.settings import Source
from tunesmith.data.sources import locate, read
from tunesmith.engine.evaluation import measuring
from tunesmith.errors import DataError, SpecError
from tunesmith.jobs.assemble import Program, choose_padding
from tunesmith.jobs.features_predict import FeatureClassifier
from tunesmith.jobs.features_spec import is_feature_file, load_feature_file
from tunesmith.jobs.labelled import text_tokens
from tunesmith.jobs.result import load_run
from tunesmith.jobs.run_directory import RunDirectory
from tunesmith.jobs.score import conversation_of, conversations_in, score
from tunesmith.measure.classification import sigmoid, softmax
from tunesmith.models.heads import reads_last_token
from tunesmith.models.modes import autocasting
from tunesmith.objectives import Classification, Reward, TokenClassification
from tunesmith.types import IGNORE

if TYPE_CHECKING:
    from tunesmith.jobs.result import LoadedRun

logger = logging.getLogger(__name__)

_TEXTS: Final = ("text", "text_pair")
_UNREAD: Final = "?"
"""Stands for the label of a word of which the model reads nothing."""
HALF = 0.5
"""From which probability a label is given where no held-out rows said a better one."""


class Unlabelled(NamedTuple):
    """What a label is wanted of."""

    text: str
    pair: str | None = None
    """A second text, where two are judged together."""
    words: tuple[str, ...] = ()
    """Of the text, where they are given; else it is parted at white space."""


@dataclass(frozen=True)
class Prediction:
    """What is said of one text."""

    text: str
    said: str
    """The label; labels with spaces between; the number; a label for each word, `?` for one that
    is cut off or nothing to the tokenizer."""
    probabilities: dict[str, float]
    """Of each label of the text; empty for numbers and words."""


def predict(
    path: str | Path, texts: Sequence[str], *, overrides: Sequence[str] = ()
) -> list[Prediction]:
    """Return what a run's result says of `texts`, in their order.

    Args:
        path: the run directory.
        texts: one or more; of a run that labels words, words with spaces between.
        overrides: settings over those of the run, such as `engine.device=cpu`.

    Raises:
        SpecError: the run is no classifier or reward model, or one that is not saved.
        DataError: a text is empty.
    """
    directory = RunDirectory(Path(path))
    if directory.spec.is_file() and is_feature_file(directory.spec):
        return _by_features(directory, [Unlabelled(text) for text in texts], overrides)
    return predictions(load_run(path, overrides), texts)


def predictions(loaded: LoadedRun, texts: Sequence[str]) -> list[Prediction]:
    """Return what a loaded run's result says of `texts`; see `predict`."""
    objective = loaded.run.objective
    if isinstance(objective, Reward):
        rewards = score(loaded, [conversation_of(text) for text in texts])
        return [Prediction(t, f"{r:.4f}", {}) for t, r in zip(texts, rewards, strict=True)]
    return _by_head(loaded, [Unlabelled(text) for text in texts])


def _by_head(loaded: LoadedRun, asked: Sequence[Unlabelled]) -> list[Prediction]:
    objective = loaded.run.objective
    if not isinstance(objective, Classification | TokenClassification):
        raise SpecError(
            f"{loaded.directory.path}: its objective is {objective.name}, which labels nothing; "
            "use `tunesmith chat`"
        )
    _require_texts(asked)
    threshold = _threshold(loaded)
    found: list[Prediction] = []
    size, unread = loaded.run.evaluation.batch_size, 0
    for start in range(0, len(asked), size):
        some = asked[start : start + size]
        outputs = _outputs(loaded, some)
        if isinstance(objective, TokenClassification):
            unread += sum(int(np.isnan(logits).all(axis=1).sum()) for logits in outputs)
        found += [
            _prediction(objective, one.text, logits, threshold)
            for one, logits in zip(some, outputs, strict=True)
        ]
    if unread:
        logger.warning(
            "%d words have no label and are marked %s: they lie beyond the tokens that the model "
            "reads of a text, or are nothing to its tokenizer",
            unread,
            _UNREAD,
        )
    return found


def predict_file(
    path: str | Path, file: str | Path, *, overrides: Sequence[str] = ()
) -> list[Prediction]:
    """Return what a run's result says of the rows of a file, in their order.

    Of a reward run every reply of a row is scored, with its prompt (`prompt` and `completion`,
    `messages`, `chosen` and `rejected`, ...); of a classifier the texts.

    Raises:
        SpecError: the run is neither.
        DataError: the file cannot be read, or a row has no text.
    """
    directory = RunDirectory(Path(path))
    if directory.spec.is_file() and is_feature_file(directory.spec):
        source = load_feature_file(directory.spec).run.data.train[0]
        return _by_features(directory, texts_in(file, source), overrides)
    loaded = load_run(path, overrides)
    if not isinstance(loaded.run.objective, Reward):
        of_words = isinstance(loaded.run.objective, TokenClassification)
        return _by_head(loaded, texts_in(file, loaded.run.data.train[0], of_words=of_words))
    replies = conversations_in(file, loaded.run.data.train[0])
    pairs = zip(replies, score(loaded, replies), strict=True)
    return [Prediction(str(c.messages[-1]["content"]), f"{r:.4f}", {}) for c, r in pairs]


def texts_in(path: str | Path, run_source: Source, *, of_words: bool = False) -> list[Unlabelled]:
    """Return the texts of a file, read as the run's own rows are: its columns, or its template.

    Args:
        path: the file.
        run_source: what the run learned from.
        of_words: whether the run's rows are words, which may stand here too.

    Raises:
        DataError: the file cannot be read, or a row has no text.
    """
    found, asked_of = [], _words_of if of_words else _text_of
    for row in read(locate(Source(path=str(path)))):
        if not isinstance(row, RawRow):
            raise DataError(row.message)
        try:
            found.append(asked_of(row, run_source))
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error
    return found


def _words_of(row: RawRow, source: Source) -> Unlabelled:
    """Return the words of a row, or its text where it has no words."""
    column = source.columns.get("tokens", "tokens")
    if column not in row.values:
        return _text_of(row, source)
    words = words_of(row.values[column])
    return Unlabelled(" ".join(words), None, words)


def _text_of(row: RawRow, source: Source) -> Unlabelled:
    if source.prompt is not None:
        return Unlabelled(fill(source.prompt, row.values))
    own = {o: named for o, named in source.columns.items() if o in _TEXTS and named in row.values}
    values = renamed(row.values, own)
    needed = [name for name in _TEXTS if name == "text" or name in source.columns]
    for name in needed:
        if name not in values:
            raise DataError(f"has no column '{name}'; its columns are {', '.join(row.values)}")
    given = [name for name in _TEXTS if name in needed or values.get(name) is not None]
    texts = {name: as_text(values[name], f"'{name}'") for name in given}
    return Unlabelled(texts["text"], texts.get("text_pair"))


def _by_features(
    directory: RunDirectory, asked: Sequence[Unlabelled], overrides: Sequence[str]
) -> list[Prediction]:
    _require_texts(asked)
    classifier = FeatureClassifier(directory, overrides)
    scores = classifier.scores([_example(one, "single", classifier.labels) for one in asked])
    return [
        Prediction(one.text, classifier.labels[int(row.argmax())], classifier.probabilities(row))
        for one, row in zip(asked, scores, strict=True)
    ]


def _require_texts(asked: Sequence[Unlabelled]) -> None:
    for number, one in enumerate(asked, start=1):
        if not one.text.strip():
            raise DataError(f"text {number} is empty; expected text")


def _threshold(loaded: LoadedRun) -> float:
    """Return from which probability on a label is given: the best on the run's held-out rows."""
    directory = loaded.directory
    after = directory.read_json(directory.summary)["after"] if directory.summary.exists() else {}
    best: float | None = after.get("threshold")
    return HALF if best is None else best


def _outputs(loaded: LoadedRun, asked: Sequence[Unlabelled]) -> list[NDArray[np.float32]]:
    """Return the logits of each text, (classes,), or of each of its words, (words, classes).

    Those of a word of which no token is read are nan.
    """
    run, model = loaded.run, loaded.tuned.model
    objective: Any = run.objective
    kind: Kind = objective.kind if isinstance(objective, Classification) else "tokens"
    examples = [_example(one, kind, tuple(objective.labels or ())) for one in asked]
    rows = [
        row
        for row, _ in tokenised_examples(
            examples,
            loaded.tokenizer,
            kind,
            classes=_words(examples) if kind == "tokens" else tuple(objective.labels or ()),
            max_length=text_tokens(run, model, loaded.tokenizer),
        )
    ]
    collate = LabelledCollator(
        loaded.tokenizer.pad_token_id,
        choose_padding(run, model),
        positions=reads_last_token(model),
    )
    batch = loaded.peers.to_device(collate(rows))
    program = Program(model, objective)
    with measuring(program), autocasting(loaded.peers.device, loaded.autocast_dtype):
        logits = objective.logits(model, batch).float().cpu().numpy()
    if kind != "tokens":
        return list(logits)
    numbers = batch["labels"].cpu().numpy()
    found = []
    for example, out, number in zip(examples, logits, numbers, strict=True):
        of_words = np.full((len(example.words), out.shape[1]), np.nan, np.float32)
        of_words[number[number != IGNORE]] = out[number != IGNORE]
        found.append(of_words)
    return found


def _words(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the numbers of the words of the longest example, which stand for their labels."""
    return tuple(map(str, range(max(len(example.words) for example in examples))))


def _example(asked: Unlabelled, kind: Kind, labels: tuple[str, ...]) -> Example:
    """Return a text as an example, each of its words labelled as its number.

    What a whole text is labelled as plays no part.
    """
    if kind == "tokens":
        words = asked.words or tuple(asked.text.split())
        numbers = tuple(map(str, range(len(words))))
        return Example(" ".join(words), numbers, "text", words=words)
    nothing: dict[str, Any] = {"single": labels[:1] and labels[0], "multi": (), "regression": 0.0}
    return Example(asked.text, nothing[kind], "text", asked.pair)


def _prediction(
    objective: Classification | TokenClassification,
    text: str,
    logits: NDArray[np.float32],
    threshold: float,
) -> Prediction:
    labels = objective.labels or []
    if isinstance(objective, TokenClassification):
        said = [_UNREAD if np.isnan(word).all() else labels[word.argmax()] for word in logits]
        return Prediction(text, " ".join(said), {})
    if objective.kind == "regression":
        return Prediction(text, f"{logits[0]:.4f}", {})
    single = objective.kind == "single"
    shares = dict(zip(labels, (softmax if single else sigmoid)(logits).tolist(), strict=True))
    if single:
        return Prediction(text, labels[int(logits.argmax())], shares)
    return Prediction(text, " ".join(n for n, p in shares.items() if p > threshold), shares)
