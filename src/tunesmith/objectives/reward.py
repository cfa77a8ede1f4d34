"""Reward models: a number for a reply, learned from which of several people prefer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple, Self

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


class RewardTerms(NamedTuple):
    """What each pair, scored reply or step comes to."""

    losses: Tensor
    """(terms,) float, unweighted."""
    weights: Tensor
    """(terms,) float, 1 over the pairs of the same prompt; of a reply or a step 1."""
    metrics: dict[str, Tensor]
    """(terms,) float each, detached, unweighted."""


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

    def outputs(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return what the loss is of, float32: the reward of each sequence, or of each step."""
        if self.kind != "steps":
            return self.rewards(model, batch)
        places = (batch["step_sequences"], batch["step_positions"])
        return head_logits_at(model, model_inputs(batch), places)[:, 0]

    def loss(self, model: PreTrainedModel, batch: Batch) -> LossTerms:
        """Return the summed loss, what divides it, and how rewards lie."""
        return self.loss_of(self.outputs(model, batch), batch)

    def loss_of(self, outputs: Tensor, batch: Batch) -> LossTerms:
        """Return the summed loss of `outputs`; see `terms`."""
        terms = self.terms(outputs, batch)
        return LossTerms(
            (terms.weights * terms.losses).sum(),
            self.count(batch),
            {name: (terms.weights * value).sum() for name, value in terms.metrics.items()},
        )

    def terms(self, outputs: Tensor, batch: Batch) -> RewardTerms:
        """Return the loss and metrics of each pair, reply or step, before they are summed.

        Args:
            outputs: as `outputs` has them.
            batch: what is known of the replies. No tokens are needed, so a batch may be of any
                number of rows.
        """
        if self.kind == "pairs":
            return self._of_pairs(outputs, batch)
        if self.kind == "scores":
            return self._of_scores(outputs, batch)
        return self._of_steps(outputs, batch)

    def _of_pairs(self, rewards: Tensor, batch: Batch) -> RewardTerms:
        """Return Bradley and Terry's loss -log s(r_w - r_l - m) + c (r_w + r_l)^2 of each pair.

        All pairs of one prompt share a weight of 1 (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).
        """
        better, worse = rewards[batch["winners"]], rewards[batch["losers"]]
        gap = better - worse
        losses = -F.logsigmoid(gap - self.margin * batch["margins"])
        if self.centering:
            losses = losses + self.centering * (better + worse) ** 2
        lead = gap.detach()
        metrics = {
            "accuracy": (lead > 0).to(lead.dtype) + 0.5 * (lead == 0).to(lead.dtype),
            "reward_margin": lead,
            "mean_reward": (better + worse).detach() / 2,
        }
        return RewardTerms(losses, batch["pair_weights"], metrics)

    def _of_scores(self, rewards: Tensor, batch: Batch) -> RewardTerms:
        """Return the squared error (r - score)^2 (Cobbe et al. 2021, arXiv:2110.14168)."""
        error, seen = rewards - batch["scores"], rewards.detach()
        metrics = {"absolute_error": error.detach().abs(), "mean_reward": seen}
        return RewardTerms(error**2, torch.ones_like(seen), metrics)

    def _of_steps(self, steps: Tensor, batch: Batch) -> RewardTerms:
        """Return the cross-entropy of each step's label (Lightman et al. 2023).

        arXiv:2305.20050, sec. 2.4; s(r) is the probability that the step is right.
        """
        labels = batch["step_labels"].to(steps.dtype)
        losses = F.binary_cross_entropy_with_logits(steps, labels, reduction="none")
        right = ((steps > 0) == (labels > 0.5)).to(steps.dtype)
        return RewardTerms(losses, torch.ones_like(labels), {"accuracy": right})

    def count(self, batch: Batch) -> float:
        """Return the number of prompts with pairs, of scored replies, or of steps."""
        if self.kind == "pairs":
            return float(batch["pair_weights"].sum(dtype=torch.float64).round())
        return len(batch["scores" if self.kind == "scores" else "step_labels"])
