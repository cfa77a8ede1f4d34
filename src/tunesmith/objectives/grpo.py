"""Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) and its relatives.

Several replies a prompt; a reply's advantage A_i is its score against the others of its group, for
all its tokens alike. With r_t = p(token_t) / p_old(token_t):

    l_t = max(-A_i r_t, -A_i clip(r_t, 1 - eps_low, 1 + eps_high)) + beta KL_t        (eq. 3)

| relative | source | settings |
|---|---|---|
| GRPO | arXiv:2402.03300 | the defaults; with kl: 0.04 |
| RLOO | arXiv:2402.14740 | baseline: leave_one_out, scale: none |
| Dr. GRPO | arXiv:2503.20783 | scale: none, mean_over: constant |
| DAPO | arXiv:2503.14476 | clip_high: 0.28, mean_over: tokens |
| GSPO | arXiv:2507.18071 | importance: reply, clip: 3e-4, clip_high: 4e-4 |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator

from tunesmith.objectives.advantages import (
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
)
from tunesmith.objectives.replies import approximate_kl, by_reply, policy_of, reply_weights
from tunesmith.objectives.sampling import FromReplies
from tunesmith.types import LossTerms

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.types import Batch


class GRPO(FromReplies):
    """Learn from groups of replies to the same prompt, each judged against the others."""

    name: Literal["grpo"] = "grpo"
    """Group-relative policy optimisation, RLOO, Dr. GRPO, DAPO, GSPO."""
    samples: int = Field(default=8, ge=2)
    """Replies a prompt."""
    clip: float = Field(default=0.2, gt=0)
    """Ratios below 1 less this are no longer rewarded (eps_low)."""
    clip_high: float | None = Field(default=None, gt=0)
    """Ratios above 1 plus this are no longer rewarded (eps_high); none is `clip`."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a score is compared with: its group's mean, or that of the others in it."""
    scale: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of all scores, or not at all."""
    mean_over: Literal["replies", "tokens", "constant"] = "replies"
    """Each reply's mean over its tokens and the mean of those; the mean over all tokens; or each
    reply's sum over rollout.max_new_tokens, so that long replies weigh as they are."""
    importance: Literal["token", "reply"] = "token"
    """Ratios of tokens, or the geometric mean of a reply's."""
    kl: float = Field(default=0.0, ge=0)
    """What a nat of KL to the reference costs (beta); above 0 costs a forward of the reference."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """How a token's KL is estimated."""

    head: ClassVar[Literal["causal_lm"]] = "causal_lm"

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        if self.rollout.replies % self.samples:
            raise ValueError(
                f"rollout.replies: {self.rollout.replies} replies are no whole number of groups of "
                f"{self.samples}; use a multiple of samples"
            )
        if self.baseline == "leave_one_out" and self.scale != "none":
            raise ValueError("baseline: leave_one_out is not scaled; set scale: none")
        return self

    def advantages(self, scores: Tensor) -> Tensor:
        """Return the advantage of each reply, (prompts, samples), for scores alike."""
        if self.baseline == "leave_one_out":
            return leave_one_out_advantages(scores)
        return group_advantages(scores, scale=self.scale)

    def loss(self, model: PreTrainedModel, batch: Batch) -> LossTerms:
        """Return the summed loss, what divides it, and what is watched."""
        log_probs = policy_of(model, batch).log_probs
        # Without them the policy that learns is the one that wrote.
        old = batch.get("old_log_probs", log_probs.detach())
        weights = self._weights(batch)
        surrogate = self._surrogate(log_probs - old, batch)
        total = (weights.loss * surrogate.loss).sum()
        watched = {
            "ratio": surrogate.ratio,
            "clipped": surrogate.clipped,
            "policy_kl": approximate_kl(log_probs - old),
        }
        if self.kl:
            kl = kl_estimate(log_probs, batch["reference_log_probs"], kind=self.kl_estimator)
            total, watched["kl"] = total + self.kl * (weights.loss * kl).sum(), kl
        metrics = {n: (weights.watched * tensor.detach()).sum() for n, tensor in watched.items()}
        return self.with_texts(model, batch, LossTerms(total, self.count(batch), metrics))

    def _surrogate(self, log_ratio: Tensor, batch: Batch) -> _Surrogate:
        if self.importance == "reply":
            means = by_reply(log_ratio * reply_weights(batch), batch)
            log_ratio = means[batch["reply"]]
        ratio, advantages = log_ratio.exp(), batch["advantages"]
        high = self.clip if self.clip_high is None else self.clip_high
        free = -advantages * ratio
        bounded = -advantages * ratio.clamp(1 - self.clip, 1 + high)
        clipped = (bounded > free).to(ratio.dtype)
        return _Surrogate(torch.maximum(free, bounded), ratio, clipped)

    def _weights(self, batch: Batch) -> _Weights:
        """Return what tokens weigh in sums that `count` divides."""
        weights = reply_weights(batch)
        if self.mean_over == "tokens":
            weights = torch.ones_like(weights)
        if self.mean_over == "constant":
            constant = torch.full_like(weights, 1.0 / self.rollout.max_new_tokens)
            return _Weights(constant, weights)
        return _Weights(weights, weights)

    def count(self, batch: Batch) -> int:
        """Return what the summed loss is divided by: tokens, or replies."""
        replies: int = batch["replies"]
        return len(batch["reply"]) if self.mean_over == "tokens" else replies


class _Surrogate(NamedTuple):
    loss: Tensor
    ratio: Tensor
    clipped: Tensor


class _Weights(NamedTuple):
    loss: Tensor
    watched: Tensor
