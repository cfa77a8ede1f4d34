"""What a finished classifier or reward model says of new texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.classification import tokenised_examples
from tunesmith.data.classification_collate import LabelledCollator
from tunesmith.data.classification_rows import Example, Kind
from tunesmith.data.formats import renamed
from tunesmith.data.rows import RawRow
from tunesmith.data.settings import Source
from tunesmith.data.sources import locate, read
from tunesmith.engine.evaluation import measuring
from tunesmith.errors import DataError, SpecError
from tunesmith.jobs.assemble import Program, choose_padding
from tunesmith.jobs.features_predict import FeatureClassifier
from tunesmith.jobs.features_spec import is_feature_file, load_feature_file
from tunesmith.jobs.result import load_run
from tunesmith.jobs.run_directory import RunDirectory, open_finished
from tunesmith.jobs.score import conversation_of, conversations_in, score
from tunesmith.measure.classification import sigmoid, softmax
from tunesmith.models.heads import reads_last_token
from tunesmith.models.modes import autocasting
from tunesmith.objectives import Classification, Reward, TokenClassification
from tunesmith.types import IGNORE

if TYPE_CHECKING:
    from tunesmith.jobs.result import LoadedRun

HALF = 0.5
"""From which probability a label is given where no held-out rows said a better one."""


@dataclass(frozen=True)
class Prediction:
    """What is said of one text."""

    text: str
    said: str
    """The label; labels with spaces between; the number; a label for each word."""
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
        return _by_features(directory, texts, overrides)
    return predictions(load_run(path, overrides), texts)


def predictions(loaded: LoadedRun, texts: Sequence[str]) -> list[Prediction]:
    """Return what a loaded run's result says of `texts`; see `predict`."""
    objective = loaded.run.objective
    if isinstance(objective, Reward):
        rewards = score(loaded, [conversation_of(text) for text in texts])
        return [Prediction(t, f"{r:.4f}", {}) for t, r in zip(texts, rewards, strict=True)]
    if not isinstance(objective, Classification | TokenClassification):
        raise SpecError(
            f"{loaded.directory.path}: its objective is {objective.name}, which labels nothing; "
            "use `tunesmith chat`"
        )
    _require_texts(texts)
    threshold = _threshold(loaded)
    found: list[Prediction] = []
    size = loaded.run.evaluation.batch_size
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        outputs = _outputs(loaded, some)
        found += [
            _prediction(objective, text, logits, threshold)
            for text, logits in zip(some, outputs, strict=True)
        ]
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
        return predict(path, texts_in(file, path), overrides=overrides)
    loaded = load_run(path, overrides)
    if not isinstance(loaded.run.objective, Reward):
        return predictions(loaded, texts_in(file, path))
    replies = conversations_in(file, loaded.run.data.train[0])
    pairs = zip(replies, score(loaded, replies), strict=True)
    return [Prediction(str(c.messages[-1]["content"]), f"{r:.4f}", {}) for c, r in pairs]


def texts_in(path: str | Path, run_directory: str | Path) -> list[str]:
    """Return the texts of a file, whose columns are named as the run's own are.

    Raises:
        DataError: the file cannot be read, or a row has no text.
    """
    spec = RunDirectory(Path(run_directory)).spec
    if spec.is_file() and is_feature_file(spec):
        run = load_feature_file(spec).run
    else:
        _, run = open_finished(run_directory)
    columns = {ours: named for ours, named in run.data.train[0].columns.items() if ours == "text"}
    texts = []
    for row in read(locate(Source(path=str(path)))):
        if not isinstance(row, RawRow):
            raise DataError(row.message)
        own = {ours: named for ours, named in columns.items() if named in row.values}
        text = renamed(row.values, own).get("text")
        if not isinstance(text, str):
            raise DataError(
                f"{row.place}: has no column 'text'; its columns are {', '.join(row.values)}"
            )
        texts.append(text)
    return texts


def _by_features(
    directory: RunDirectory, texts: Sequence[str], overrides: Sequence[str]
) -> list[Prediction]:
    _require_texts(texts)
    classifier = FeatureClassifier(directory, overrides)
    scores = classifier.scores([_asked(text, "single", classifier.labels) for text in texts])
    return [
        Prediction(text, classifier.labels[int(row.argmax())], classifier.probabilities(row))
        for text, row in zip(texts, scores, strict=True)
    ]


def _require_texts(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise DataError(f"text {number} is empty; expected text")


def _threshold(loaded: LoadedRun) -> float:
    """Return from which probability on a label is given: the best on the run's held-out rows."""
    file = loaded.directory.summary
    after = json.loads(file.read_text(encoding="utf-8"))["after"] if file.exists() else {}
    return float(after.get("threshold", HALF))


def _outputs(loaded: LoadedRun, texts: Sequence[str]) -> list[NDArray[np.float32]]:
    """Return the logits of each text, (classes,), or of each of its words, (words, classes)."""
    run, model = loaded.run, loaded.tuned.model
    objective: Any = run.objective
    kind: Kind = objective.kind if isinstance(objective, Classification) else "tokens"
    labels = tuple(objective.labels or ())
    rows = [
        row
        for row, _ in tokenised_examples(
            [_asked(text, kind, labels) for text in texts],
            loaded.tokenizer,
            kind,
            classes=labels,
            max_length=min(run.data.max_length, loaded.tokenizer.model_max_length),
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
    words = batch["labels"].cpu().numpy() != IGNORE
    return [out[word] for out, word in zip(logits, words, strict=True)]


def _asked(text: str, kind: Kind, labels: tuple[str, ...]) -> Example:
    """Return a text as an example; what it is labelled as plays no part."""
    if kind == "tokens":
        words = tuple(text.split())
        return Example(" ".join(words), labels[:1] * len(words), "text", words=words)
    nothing: dict[str, Any] = {"single": labels[:1] and labels[0], "multi": (), "regression": 0.0}
    return Example(text, nothing[kind], "text")


def _prediction(
    objective: Classification | TokenClassification,
    text: str,
    logits: NDArray[np.float32],
    threshold: float,
) -> Prediction:
    labels = objective.labels or []
    if isinstance(objective, TokenClassification):
        return Prediction(text, " ".join(labels[i] for i in logits.argmax(axis=1)), {})
    if objective.kind == "regression":
        return Prediction(text, f"{logits[0]:.4f}", {})
    single = objective.kind == "single"
    shares = dict(zip(labels, (softmax if single else sigmoid)(logits).tolist(), strict=True))
    if single:
        return Prediction(text, labels[int(logits.argmax())], shares)
    return Prediction(text, " ".join(n for n, p in shares.items() if p > threshold), shares)
