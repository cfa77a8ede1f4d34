"""Classification of texts: one label, several labels, or a number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from tunesmith.models.heads import head_logits
from tunesmith.objectives.contract import Objective
from tunesmith.types import LossTerms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.heads import Problem
    from tunesmith.types import Batch

Kind = Literal["single", "multi", "regression"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Classification(Objective):
    """Learn a label, several labels or a number for each text, with a new head on the model."""

    name: Literal["classification"] = "classification"
    """Learn labels of texts."""
    kind: Kind = "single"
    """One label a text, any number of them (`label` is then a list), or a number (regression)."""
    labels: list[str] | None = Field(default=None, min_length=2)
    """Names of the classes, in the order of the model's outputs; none takes those of the training
    rows, sorted, and records them."""
    class_weights: Literal["none", "balanced"] | dict[str, Weight] = "none"
    """Weight of a row by its label (kind single): balanced is rows / (classes x rows of the label);
    a mapping says it for each label, 1 for those not named."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes (kind single)."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the head where the method does not train it anyway; none takes that of
    the method."""

    head: ClassVar[Literal["sequence_classification"]] = "sequence_classification"

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels: {self.labels} names a class twice")
        if self.kind != "single" and (self.class_weights != "none" or self.label_smoothing):
            raise ValueError(
                "class_weights and label_smoothing are for kind single, where a row has one label"
            )
        if self.kind == "regression" and self.labels is not None:
            raise ValueError("labels: a regression has none; leave them out, or use kind single")
        return self

    @property
    def problem(self) -> Problem:
        """What transformers calls this kind."""
        if self.kind == "regression":
            return "regression"
        return (
            "multi_label_classification" if self.kind == "multi" else "single_label_classification"
        )

    def logits(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the head's outputs, (texts, classes) float32, one column for a regression."""
        return head_logits(model, batch)

    def loss(self, model: PreTrainedModel, batch: Batch) -> LossTerms:
        """Return the summed loss, what divides it, and right guesses; see `loss_of`."""
        return self.loss_of(self.logits(model, batch), batch)

    def loss_of(self, logits: Tensor, batch: Batch) -> LossTerms:
        """Return the summed loss of `logits` (texts, classes) float32.

        single: cross-entropy, divided by the sum of the rows' weights, as PyTorch's weighted mean
        is. multi: binary cross-entropy of every class, divided by texts x classes. regression:
        squared error, divided by texts. These are the means of transformers' own heads.
        """
        labels: Tensor = batch["labels"]
        if self.kind == "regression":
            return LossTerms(
                F.mse_loss(logits[:, 0], labels, reduction="sum"), self.count(batch), {}
            )
        if self.kind == "multi":
            total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
            right = ((logits > 0) == (labels > 0.5)).sum()
            return LossTerms(total, self.count(batch), {"accuracy": right.to(total.dtype)})
        weights: Tensor | None = batch.get("class_weights")
        total = F.cross_entropy(
            logits, labels, weights, reduction="sum", label_smoothing=self.label_smoothing
        )
        right = (logits.argmax(dim=1) == labels).to(total.dtype)
        if weights is not None:
            right = right * weights[labels]
        return LossTerms(total, self.count(batch), {"accuracy": right.sum()})

    def count(self, batch: Batch) -> float:
        """Return what the summed loss is divided by: texts, their weights, or texts x classes."""
        labels: Tensor = batch["labels"]
        weights: Tensor | None = batch.get("class_weights")
        if weights is not None:
            return float(weights[labels].sum(dtype=torch.float64))
        return labels.numel()
