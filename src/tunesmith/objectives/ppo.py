"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) on replies.

With r_t = p(token_t) / p_old(token_t), advantages A_t and returns R_t of roll-outs:

    policy:  max(-A_t r_t, -A_t clip(r_t, 1 - eps, 1 + eps))                          (eq. 7)
    value:   1/2 max((V_t - R_t)^2, (V_old + clip(V_t - V_old, -eps_v, eps_v) - R_t)^2)
    loss:    mean over tokens of  policy + c_v value - c_e entropy + beta KL_t        (eq. 9)

where the KL is in the reward instead (Ziegler et al. 2019, arXiv:1909.08593, eq. 2) beta is 0 here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from tunesmith.objectives.advantages import kl_estimate
from tunesmith.objectives.replies import approximate_kl, policy_of, states_of
from tunesmith.objectives.sampling import FromReplies
from tunesmith.types import LossTerms

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.types import Batch

VALUE_HEAD = "value_head"
"""Where the value head hangs in the model."""


class PPO(FromReplies):
    """Learn from rewarded replies, token by token, with a value function as baseline."""

    name: Literal["ppo"] = "ppo"
    """Proximal policy optimisation."""
    epochs: int = Field(default=4, ge=1)
    """Passes over the replies before new ones are sampled."""
    clip: float = Field(default=0.2, gt=0)
    """Ratios beyond 1 +- this are no longer rewarded (eps)."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """How far a value may go from the one of the roll-out (eps_v); none leaves it free."""
    value_weight: float = Field(default=0.1, ge=0)
    """Weight of the value loss (c_v)."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of the entropy, which keeps the policy from settling early (c_e)."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount a token; a reply's score comes once, so 1 does not favour short replies."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Of GAE: 0 trusts the values, 1 the rewards."""
    kl: float = Field(default=0.05, ge=0)
    """What a nat of KL to the reference costs (beta)."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Take the KL off each token's reward, or add it to the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How a token's KL is estimated: k1 for the reward; k2 or k3 for the loss."""
    kl_target: float | None = Field(default=None, gt=0)
    """Let the KL coefficient go after this KL, in nats a reply; none keeps it."""
    kl_horizon: float = Field(default=10_000.0, gt=0)
    """With kl_target: replies over which the coefficient would double at most."""
    whiten: bool = True
    """Advantages with mean 0 and standard deviation 1 over the real tokens of a roll-out."""
    reward_scale: Literal["none", "batch", "running"] = "none"
    """Divide scores by their standard deviation: in the roll-out, or in all so far."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Largest score in absolute value, after scaling; none leaves it."""
    value: Literal["shared", "adapter"] = "shared"
    """The value function: a head on the policy's own states, or on those of an adapter of its own,
    which costs another forward and backward."""
    value_gradient: bool = True
    """With value: shared, whether the value loss trains the policy's adapter too."""

    head: ClassVar[Literal["causal_lm"]] = "causal_lm"

    @model_validator(mode="after")
    def _kl_has_a_gradient(self) -> Self:
        if self.kl_in == "loss" and self.kl > 0 and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator: k1 in the loss has no gradient in the mean; use k2 or k3, or "
                "kl_in: reward"
            )
        if self.kl_target is not None and (self.kl_in == "loss" or self.kl == 0):
            raise ValueError("kl_target: the coefficient adapts in the reward; set kl_in and kl")
        return self

    def values(self, model: PreTrainedModel, batch: Batch, hidden: Tensor) -> Tensor:
        """Return V of each token of the replies, (tokens,) float32.

        Args:
            model: has a value head.
            batch: of replies.
            hidden: (tokens, width): the policy's states.
        """
        head = model.get_submodule(VALUE_HEAD)
        if self.value == "adapter":
            with head.role():
                hidden, _ = states_of(model, batch)
        elif not self.value_gradient:
            hidden = hidden.detach()
        values: Tensor = head(hidden)
        return values

    def loss(self, model: PreTrainedModel, batch: Batch) -> LossTerms:
        """Return the loss summed over the replies' tokens, their number, and what is watched."""
        policy = policy_of(model, batch, entropy=True)
        assert policy.entropy is not None  # noqa: S101 - asked for
        log_ratio = policy.log_probs - batch["old_log_probs"]
        ratio = log_ratio.exp()
        advantages = batch["advantages"]
        free = -advantages * ratio
        bounded = -advantages * ratio.clamp(1 - self.clip, 1 + self.clip)
        value = self.value_loss(self.values(model, batch, policy.hidden), batch)
        total = torch.maximum(free, bounded).sum() + self.value_weight * value.sum()
        if self.entropy_weight:
            total = total - self.entropy_weight * policy.entropy.sum()
        watched = {
            "ratio": ratio,
            "clipped": (bounded > free).to(ratio.dtype),
            "policy_kl": approximate_kl(log_ratio),
            "entropy": policy.entropy,
            "value_loss": value,
        }
        if self.kl_in == "loss" and self.kl:
            reference = batch["reference_log_probs"]
            kl = kl_estimate(policy.log_probs, reference, kind=self.kl_estimator)
            total, watched["kl"] = total + self.kl * kl.sum(), kl
        metrics = {name: tensor.detach().sum() for name, tensor in watched.items()}
        return self.with_texts(model, batch, LossTerms(total, self.count(batch), metrics))

    def value_loss(self, values: Tensor, batch: Batch) -> Tensor:
        """Return half the squared error of `values` at each token, (tokens,), the worse of two."""
        returns, old = batch["returns"], batch["old_values"]
        error = (values - returns).square()
        if self.value_clip is not None:
            near = old + (values - old).clamp(-self.value_clip, self.value_clip)
            error = torch.maximum(error, (near - returns).square())
        return error / 2

    def count(self, batch: Batch) -> int:
        """Return the number of tokens that `loss` sums over."""
        return len(batch["reply"])
