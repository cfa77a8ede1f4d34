"""Classification of tokens: a label for every word, such as the kind of a name."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from tunesmith.models.heads import head_logits
from tunesmith.objectives.contract import Objective
from tunesmith.types import IGNORE, LossTerms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.heads import Problem
    from tunesmith.types import Batch


class TokenClassification(Objective):
    """Learn a label for each word of a text; a word's first token carries it."""

    name: Literal["token_classification"] = "token_classification"
    """Learn labels of words."""
    labels: list[str] | None = Field(default=None, min_length=2)
    """Names of the classes, in the order of the model's outputs; none takes those of the training
    rows, sorted, and records them."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the head where the method does not train it anyway; none takes that of
    the method."""

    head: ClassVar[Literal["token_classification"]] = "token_classification"

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels: {self.labels} names a class twice")
        return self

    @property
    def problem(self) -> Problem:
        """What transformers calls one label a token."""
        return "single_label_classification"

    def logits(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the head's outputs, (batch, length, classes) float32."""
        return head_logits(model, batch)

    def loss(self, model: PreTrainedModel, batch: Batch) -> LossTerms:
        """Return the summed loss, the number of labelled tokens, and right guesses."""
        return self.loss_of(self.logits(model, batch), batch)

    def loss_of(self, logits: Tensor, batch: Batch) -> LossTerms:
        """Return the summed cross-entropy of `logits` (batch, length, classes) float32."""
        labels: Tensor = batch["labels"]
        total = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        right = (logits.argmax(dim=-1) == labels).sum()
        return LossTerms(total, self.count(batch), {"accuracy": right.to(total.dtype)})

    def count(self, batch: Batch) -> float:
        """Return the number of labelled tokens."""
        return int((batch["labels"] != IGNORE).sum())
