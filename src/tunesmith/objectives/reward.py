"""Reward models: a number for a reply, learned from which of several people prefer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from tunesmith.models.heads import head_logits, head_logits_at
from tunesmith.objectives.contract import Objective
from tunesmith.objectives.log_probs import model_inputs
from tunesmith.types import LossTerms

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.models.heads import Problem
    from tunesmith.types import Batch

OUTPUT: Final = ("reward",)
"""What the one output of the head is called."""


class Reward(Objective):
    """Learn a scalar reward, read at the last token of a reply."""

    name: Literal["reward"] = "reward"
    """A reward model."""
    kind: Literal["pairs", "scores", "steps"] = "pairs"
    """What the rows tell: which reply is better (or how k replies score, of which all pairs are
    taken), one number a reply (outcome reward, by squared error), or whether each step of a reply
    is right (process reward, by cross-entropy at the steps' last tokens)."""
    margin: float = Field(default=0.0, ge=0)
    """pairs: the lead in reward that a lead of 1 in score asks for (Touvron et al. 2023,
    arXiv:2307.09288, eq. 2); 0 leaves scores out."""
    centering: float = Field(default=0.0, ge=0)
    """pairs: weight of (r_w + r_l)^2, which keeps rewards around 0 (Eisenstein et al. 2023,
    arXiv:2312.09244); 0.01 is usual."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the head where the method does not train it anyway; none takes that of
    the method."""

    head: ClassVar[Literal["sequence_classification"]] = "sequence_classification"

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.kind != "pairs" and (self.margin or self.centering):
            raise ValueError(f"margin and centering compare replies, and kind {self.kind} has none")
        return self

    @property
    def judgement(self) -> Literal["pairs", "scores", "steps"]:
        """What the rows have to tell of replies."""
        return self.kind

    @property
    def problem(self) -> Problem:
        """What transformers calls this kind."""
        return "regression"

    def rewards(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the reward of each sequence, (sequences,) float32."""
        return head_logits(model, model_inputs(batch))[:, 0]

    def loss(self, model: PreTrainedModel, batch: Batch) -> LossTerms:
        """Return the summed loss, what divides it, and how rewards lie."""
        if self.kind == "pairs":
            return self.loss_of_pairs(self.rewards(model, batch), batch)
        if self.kind == "scores":
            return self.loss_of_scores(self.rewards(model, batch), batch)
        places = (batch["step_sequences"], batch["step_positions"])
        steps = head_logits_at(model, model_inputs(batch), places)[:, 0]
        return self.loss_of_steps(steps, batch)

    def loss_of_pairs(self, rewards: Tensor, batch: Batch) -> LossTerms:
        """Return Bradley and Terry's loss -log s(r_w - r_l - m) + c (r_w + r_l)^2, summed.

        All pairs of one prompt share a weight of 1 (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).
        """
        weights: Tensor = batch["pair_weights"]
        better, worse = rewards[batch["winners"]], rewards[batch["losers"]]
        gap = better - worse
        terms = -F.logsigmoid(gap - self.margin * batch["margins"])
        if self.centering:
            terms = terms + self.centering * (better + worse) ** 2
        lead = gap.detach()
        metrics = {
            "accuracy": (lead > 0).to(lead.dtype) + 0.5 * (lead == 0).to(lead.dtype),
            "reward_margin": lead,
            "mean_reward": (better + worse).detach() / 2,
        }
        return LossTerms(
            (weights * terms).sum(),
            self.count(batch),
            {name: (weights * value).sum() for name, value in metrics.items()},
        )

    def loss_of_scores(self, rewards: Tensor, batch: Batch) -> LossTerms:
        """Return the summed squared error (r - score)^2 (Cobbe et al. 2021, arXiv:2110.14168)."""
        error = rewards - batch["scores"]
        seen = error.detach()
        return LossTerms(
            (error**2).sum(),
            self.count(batch),
            {"absolute_error": seen.abs().sum(), "mean_reward": rewards.detach().sum()},
        )

    def loss_of_steps(self, steps: Tensor, batch: Batch) -> LossTerms:
        """Return the summed cross-entropy of each step's label (Lightman et al. 2023).

        arXiv:2305.20050, sec. 2.4; s(r) is the probability that the step is right.
        """
        labels: Tensor = batch["step_labels"]
        total = F.binary_cross_entropy_with_logits(steps, labels, reduction="sum")
        right = ((steps > 0) == (labels > 0.5)).sum()
        return LossTerms(total, self.count(batch), {"accuracy": right.to(total.dtype)})

    def count(self, batch: Batch) -> float:
        """Return the number of prompts with pairs, of scored replies, or of steps."""
        if self.kind == "pairs":
            return float(batch["pair_weights"].sum(dtype=torch.float64).round())
        return len(batch["scores" if self.kind == "scores" else "step_labels"])
