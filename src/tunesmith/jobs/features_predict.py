"""What a classifier of features says of new texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.data.classification import tokenised_examples
from tunesmith.engine.distribution import connect
from tunesmith.errors import SpecError
from tunesmith.jobs.features_classify import read_linear
from tunesmith.jobs.features_embed import Embedder
from tunesmith.jobs.features_spec import FeatureRun, FeatureSettings, load_feature_file
from tunesmith.jobs.labelled import text_tokens
from tunesmith.measure.classification import softmax
from tunesmith.models.chat import prepare_tokenizer
from tunesmith.models.loading import load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tunesmith.data.classification_rows import Example
    from tunesmith.jobs.run_directory import RunDirectory
    from tunesmith.spec import Run


class FeatureClassifier:
    """A frozen model and the linear map that was fitted to its features.

    Raises:
        SpecError: the classifier was not saved.
        CheckpointError: its file is damaged.
    """

    def __init__(self, directory: RunDirectory, overrides: Sequence[str]) -> None:
        job = load_feature_file(directory.spec, overrides)
        if not directory.classifier.is_file():
            raise SpecError(
                f"{directory.path}: features.classifier: {job.features.classifier} is not saved, "
                "so it cannot predict; run it again with logistic_regression or linear_svm"
            )
        self._linear, self.labels, pooling = read_linear(directory.classifier)
        self._settings = FeatureSettings.model_validate(
            job.features.model_dump() | {"pooling": pooling}
        )
        self.run: Run = job.run.resolved()
        self._tokenizer = load_tokenizer(self.run.model, chats=False)
        facts = prepare_tokenizer(self._tokenizer, self.run.model, chats=False)
        objective = self.run.objective.model_copy(update={"labels": list(self.labels)})
        run = self.run.model_copy(update={"objective": objective})
        self._embedder = Embedder(
            FeatureRun(run, self._settings),
            None,
            connect(run.engine),
            facts.pad_token_id,
            lambda line: None,
        )

    def scores(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        """Return one score a class, (texts, classes); the largest is the label's."""
        rows = [
            row
            for row, _ in tokenised_examples(
                examples,
                self._tokenizer,
                "single",
                classes=self.labels,
                max_length=text_tokens(self.run, self._embedder.model, self._tokenizer),
            )
        ]
        return self._linear.scores(self._embedder.compute(rows))

    def probabilities(self, scores: NDArray[np.float32]) -> dict[str, float]:
        """Return that of each label; empty where scores are none of probabilities (a margin)."""
        if self._settings.classifier != "logistic_regression":
            return {}
        return dict(zip(self.labels, softmax(scores).tolist(), strict=True))
