"""Measuring a classifier on the evaluation rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.jobs.batches import over_batches
from tunesmith.jobs.examine import Examiner, Reply, chosen, judged_rows, shown
from tunesmith.jobs.examine_heads import HeadExaminer
from tunesmith.jobs.examine_rewards import RewardExaminer
from tunesmith.jobs.labelled import classifies
from tunesmith.jobs.row_sums import ratios
from tunesmith.measure import classification as measure
from tunesmith.measure.classification import sigmoid, softmax
from tunesmith.measure.entities import count_entities, marks_entities, total
from tunesmith.measure.intervals import wilson_interval
from tunesmith.objectives import Classification, Reward, TokenClassification
from tunesmith.types import IGNORE

if TYPE_CHECKING:
    from tunesmith.data.rows import Prompt, TokenRow
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.measure.intervals import Interval
    from tunesmith.types import JSON, Batch

Losses: TypeAlias = list[tuple[float, float]]
LARGEST_MATRIX = 50
"""Classes up to which a confusion matrix is kept."""


@dataclass(frozen=True)
class Judged:
    """What a model put out for some rows, and what is true of them."""

    losses: Losses
    """Of each row what it adds to the loss, and to what that is divided by."""
    logits: list[NDArray[np.float32]]
    """Of each row (classes,), or of each labelled token, (tokens, classes)."""
    targets: list[NDArray[Any]]
    """In the same order."""

    @property
    def loss(self) -> float:
        """The mean over all that is counted."""
        return sum(total for total, _ in self.losses) / max(sum(c for _, c in self.losses), 1e-12)


@dataclass(frozen=True)
class JudgedClasses:
    """What predictions of one class a row are worth."""

    metrics: dict[str, float]
    outcomes: dict[str, JSON]
    """What each row scored: metric to scores."""
    evidence: dict[str, JSON]
    """95 % intervals of the metrics, the confusion matrix."""


def judge_classes(
    true: NDArray[np.int64], predicted: NDArray[np.int64], labels: Sequence[str]
) -> JudgedClasses:
    """Return what predicted classes are worth against the true ones, (rows,) int64 each."""
    right = true == predicted
    metrics = {
        "accuracy": measure.accuracy(true, predicted),
        "macro_f1": measure.macro_f1(true, predicted),
        "mcc": measure.matthews(true, predicted),
    }
    intervals: dict[str, JSON] = {
        "accuracy": list(wilson_interval(int(right.sum()), len(right))),
        **_intervals({"macro_f1": measure.macro_f1, "mcc": measure.matthews}, true, predicted),
    }
    return JudgedClasses(
        metrics,
        {"accuracy": right.astype(float).tolist(), **_predictions("classes", true, predicted)},
        {"intervals": intervals, **_confusion(true, predicted, labels)},
    )


def _predictions(
    kind: Literal["classes", "sets", "numbers"], true: NDArray[Any], predicted: NDArray[Any]
) -> dict[str, JSON]:
    """Return what is kept for metrics that are no mean over rows."""
    return {
        "predictions": {"kind": kind, "true": true.tolist(), "predicted": predicted.tolist()},
    }


def _intervals(
    metrics: Mapping[str, Callable[[Any, Any], float]],
    true: NDArray[Any],
    predicted: NDArray[Any],
) -> dict[str, JSON]:
    found: dict[str, Interval] = {
        name: measure.resampled_interval(metric, true, predicted)
        for name, metric in metrics.items()
    }
    return {name: list(interval) for name, interval in found.items()}


def _confusion(
    true: NDArray[np.int64], predicted: NDArray[np.int64], labels: Sequence[str]
) -> dict[str, JSON]:
    if len(labels) > LARGEST_MATRIX:
        return {}
    matrix = measure.confusion_matrix(true, predicted, len(labels))
    return {"confusion": {"labels": list(labels), "matrix": matrix.tolist()}}


class LabelExaminer(HeadExaminer):
    """Measures the assembled classifier as it is; call it as often as wanted."""

    model: ClassVar[str] = "classifier"
    may_ask: ClassVar[frozenset[str]] = frozenset({"accuracy"})

    @property
    def objective(self) -> Classification | TokenClassification:
        """What the head learned."""
        objective = self.assembled.run.objective
        assert isinstance(objective, Classification | TokenClassification)  # noqa: S101
        return objective

    def examine(self, step: int | None = None) -> dict[str, float]:
        """Return all metrics of the model as it is now; every process calls this alike."""
        del step  # replies are told by the one who asks
        settings, data = self.assembled.run.evaluation, self.assembled.data
        judged = self.judge(judged_rows(data.evaluation, settings))
        measured = self._measured(judged, chosen(list(data.examples), settings))
        self.outcomes["loss"] = ratios(*zip(*judged.losses, strict=True))
        return {"loss": judged.loss} | measured

    def judge(self, rows: Sequence[TokenRow]) -> Judged:
        """Return loss, outputs and truth of `rows`; each process judges its share."""
        objective, model = self.objective, self.assembled.program.model

        def judged(_: list[TokenRow], batch: Batch) -> Judged:
            logits = objective.logits(model, batch)
            return Judged(self._losses(logits, batch), *_rows_of(logits, batch["labels"]))

        parts = over_batches(self.assembled, self.peers, rows, judged)
        return Judged(
            [row for part in parts for row in part.losses],
            [row for part in parts for row in part.logits],
            [row for part in parts for row in part.targets],
        )

    def _losses(self, logits: torch.Tensor, batch: Batch) -> Losses:
        """Return what each row of a batch adds to the loss, and what that is divided by."""
        # On the CPU, where a row at a time costs little and waits for nothing.
        own = {key: batch[key].cpu() for key in ("labels", "class_weights") if key in batch}
        outputs, labels = logits.float().cpu(), own["labels"]
        terms = [
            self.objective.loss_of(outputs[i : i + 1], own | {"labels": labels[i : i + 1]})
            for i in range(len(labels))
        ]
        return [(float(term.total), term.count) for term in terms]

    def _measured(self, judged: Judged, asked: Sequence[Prompt | None]) -> dict[str, float]:
        objective = self.objective
        if isinstance(objective, TokenClassification):
            metrics = self._of_tokens(judged)
        elif objective.kind == "single":
            metrics = self._of_classes(judged)
        elif objective.kind == "multi":
            metrics = self._of_sets(judged)
        else:
            metrics = self._of_numbers(judged)
        self.replies = [
            Reply(shown(prompt), prompt.reference[0], self._said(logits, metrics))
            for prompt, logits in list(zip(asked, judged.logits, strict=True))[
                : self.assembled.run.evaluation.samples
            ]
            if prompt is not None
        ]
        return metrics

    def _of_classes(self, judged: Judged) -> dict[str, float]:
        true = np.array(judged.targets, dtype=np.int64)
        predicted = np.stack(judged.logits).argmax(axis=1)
        found = judge_classes(true, predicted, self.objective.labels or [])
        self.outcomes, self.evidence = found.outcomes, found.evidence
        return found.metrics

    def _of_tokens(self, judged: Judged) -> dict[str, float]:
        true = np.concatenate(judged.targets)
        predicted = np.concatenate(judged.logits).argmax(axis=1)
        # Words of one text hang together, so the scores, and what is drawn again, are texts.
        said = [logits.argmax(axis=1) for logits in judged.logits]
        right = [int((one == other).sum()) for one, other in zip(said, judged.targets, strict=True)]
        self.outcomes = {
            "accuracy": ratios(right, map(len, said)),
            "predictions": {
                "kind": "words",
                "true": [row.tolist() for row in judged.targets],
                "predicted": [row.tolist() for row in said],
            },
        }
        self.evidence = _confusion(true, predicted, self.objective.labels or [])
        return {
            "accuracy": measure.accuracy(true, predicted),
            "macro_f1": measure.macro_f1(true, predicted),
            **self._of_entities(judged.targets, said),
        }

    def _of_entities(
        self, true: Sequence[NDArray[Any]], predicted: Sequence[NDArray[Any]]
    ) -> dict[str, float]:
        """Return F1, precision and recall of entities, where the labels are IOB2 tags."""
        labels = self.objective.labels or []
        if not marks_entities(labels):
            return {}
        counts = [
            count_entities([labels[i] for i in one], [labels[i] for i in other])
            for one, other in zip(true, predicted, strict=True)
        ]
        self.outcomes["entity_f1"] = ratios(
            (2 * c.right for c in counts), (c.predicted + c.true for c in counts)
        )
        self.outcomes["entity_precision"] = ratios(
            (c.right for c in counts), (c.predicted for c in counts)
        )
        self.outcomes["entity_recall"] = ratios((c.right for c in counts), (c.true for c in counts))
        whole = total(counts)
        return {
            "entity_f1": whole.f1,
            "entity_precision": whole.precision,
            "entity_recall": whole.recall,
        }

    def _of_sets(self, judged: Judged) -> dict[str, float]:
        true = np.stack(judged.targets) > 0.5
        probability = sigmoid(np.stack(judged.logits))
        given = probability > 0.5
        best = measure.best_threshold(true, probability)
        self.outcomes = {
            "exact_match": (true == given).all(axis=1).astype(float).tolist(),
            "micro_f1": ratios(
                2 * (true & given).sum(axis=1), true.sum(axis=1) + given.sum(axis=1)
            ),
            **_predictions("sets", true, given),
        }
        scores = {"micro_f1": measure.micro_f1_of_sets, "macro_f1": measure.macro_f1_of_sets}
        self.evidence = {"intervals": _intervals(scores, true, given)}
        return {
            "micro_f1": measure.micro_f1_of_sets(true, given),
            "macro_f1": measure.macro_f1_of_sets(true, given),
            "exact_match": float((true == given).all(axis=1).mean()),
            "threshold": best.value,
            "best_micro_f1": best.micro_f1,
        }

    def _of_numbers(self, judged: Judged) -> dict[str, float]:
        true = np.array(judged.targets, dtype=np.float64)
        predicted = np.stack(judged.logits)[:, 0].astype(np.float64)
        self.outcomes = {
            "mse": ((true - predicted) ** 2).tolist(),
            **_predictions("numbers", true, predicted),
        }
        scores = {"pearson": measure.pearson, "spearman": measure.spearman}
        self.evidence = {"intervals": _intervals(scores, true, predicted)}
        return {
            "mse": measure.mean_squared_error(true, predicted),
            "pearson": measure.pearson(true, predicted),
            "spearman": measure.spearman(true, predicted),
        }

    def _said(self, logits: NDArray[np.float32], metrics: dict[str, float]) -> str:
        """Return a prediction for people to read."""
        objective, labels = self.objective, self.objective.labels or []
        if isinstance(objective, TokenClassification):
            return " ".join(labels[index] for index in logits.argmax(axis=1))
        if objective.kind == "regression":
            return f"{logits[0]:.3f}"
        if objective.kind == "multi":
            given = sigmoid(logits) > metrics["threshold"]
            return " ".join(label for label, on in zip(labels, given, strict=True) if on)
        probability = softmax(logits)
        return f"{labels[int(logits.argmax())]} ({probability.max():.2f})"


def examiner_of(assembled: Assembled, peers: Peers) -> Examiner | LabelExaminer | RewardExaminer:
    """Return what measures the model of this run."""
    if isinstance(assembled.run.objective, Reward):
        return RewardExaminer(assembled, peers)
    if classifies(assembled.run):
        return LabelExaminer(assembled, peers)
    return Examiner(assembled, peers)


def _rows_of(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[list[NDArray[np.float32]], list[NDArray[Any]]]:
    """Return outputs and truth a row; of tokens those that have a label."""
    outputs, truth = logits.float().cpu().numpy(), labels.cpu().numpy()
    if outputs.ndim == 2:
        return list(outputs), list(truth)
    kept = [row != IGNORE for row in truth]
    return (
        [out[keep] for out, keep in zip(outputs, kept, strict=True)],
        [row[keep] for row, keep in zip(truth, kept, strict=True)],
    )
