"""Preference optimisation: replies that people prefer become likelier, the others less so."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple, Self

import torch
from pydantic import ConfigDict, Field, model_validator

from tunesmith.objectives import preference_losses as losses
from tunesmith.objectives.contract import Objective
from tunesmith.objectives.log_probs import ReplyLogProbs, reply_log_probs
from tunesmith.types import LossTerms

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.types import Batch

Loss = Literal["sigmoid", "robust", "ipo", "hinge", "kto", "orpo", "simpo", "cpo"]

_BETAS: Final[dict[str, float]] = {"simpo": 2.0}
_BETA: Final = 0.1
_WITHOUT_REFERENCE: Final = {"orpo", "simpo", "cpo"}
_A_TOKEN: Final = {"ipo", "orpo", "simpo"}
"""Losses that look at log-probabilities a token unless told otherwise."""
MISMATCHED: Final = "mismatched_log_ratio"
"""kto: the mean of r over prompts with another row's reply, from which z0 comes."""
KL: Final = "kl"
"""kto: z0 itself, one number for all rows that share it and no mean over them."""
_SMOOTHED: Final = {"sigmoid", "robust", "simpo", "cpo"}


class PreferenceTerms(NamedTuple):
    """What each pair, or each labelled reply, comes to."""

    losses: Tensor
    """(pairs,) float, unweighted."""
    weights: Tensor
    """(pairs,) float, 1 over the pairs of the same prompt; of a labelled reply 1."""
    metrics: dict[str, Tensor]
    """(pairs,) float each, detached, unweighted."""


class Preference(Objective):
    """Learn from pairs of a better and a worse reply, or from replies labelled good or bad."""

    # In a run file the key is `loss`, which every objective has as a method.
    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    name: Literal["dpo"] = "dpo"
    """Direct preference optimisation and its relatives."""
    loss_type: Loss = Field(default="sigmoid", alias="loss")
    """sigmoid (DPO; with label_smoothing cDPO), robust (rDPO, unbiased under label_smoothing),
    ipo, hinge (SLiC), kto (labelled replies instead of pairs), or without a reference model orpo,
    simpo, cpo."""
    beta: float | None = Field(default=None, gt=0)
    """How dear it is to leave the reference (for ipo tau, for orpo lambda); none is 0.1, for simpo
    2."""
    gamma: float = Field(default=1.0, ge=0)
    """simpo: the margin in reward that the better reply is to have."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs taken to be labelled the wrong way round (sigmoid, robust, simpo, cpo)."""
    length_normalised: bool | None = None
    """Compare log-probabilities a token instead of whole replies'; none is yes for ipo, orpo and
    simpo, no for the others."""
    weighting: Literal["none", "wpo"] = "none"
    """wpo weighs each pair by how likely the policy itself is to write both replies (Zhou et al.
    2024, arXiv:2406.11827, eq. 2, without its alignment): exp of their mean log-probabilities."""
    chosen_weight: float | None = Field(default=None, ge=0)
    """Weight of -log pi(y_w|x) / |y_w| beside the loss; none is 1 for orpo and cpo, 0 for the
    others. With sigmoid it is RPO's alpha (Pang et al. 2024, arXiv:2404.19733)."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """kto: lambda_D, the weight of good replies."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """kto: lambda_U, the weight of bad replies."""
    reference: Literal["cached", "live"] = "cached"
    """Log-probabilities under the frozen model: computed once before training and kept by a hash of
    rows and model, or in every step, which costs a third more time and no disk."""

    head: ClassVar[Literal["causal_lm"]] = "causal_lm"

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.label_smoothing and self.loss_type not in _SMOOTHED:
            raise ValueError(
                f"label_smoothing has no place in loss {self.loss_type}; it is for "
                f"{', '.join(sorted(_SMOOTHED))}"
            )
        if self.length_normalised is False and self.loss_type in {"orpo", "simpo"}:
            raise ValueError(
                f"length_normalised: false: loss {self.loss_type} is defined by log-probabilities "
                "a token"
            )
        if self.loss_type == "kto" and (self.weighting != "none" or self.chosen_weight):
            raise ValueError("weighting and chosen_weight need pairs, and loss kto has none")
        return self

    @property
    def judgement(self) -> Literal["pairs", "labels"]:
        """What the rows have to tell of replies."""
        return "labels" if self.loss_type == "kto" else "pairs"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the frozen model."""
        return self.loss_type not in _WITHOUT_REFERENCE

    @property
    def strength(self) -> float:
        """The beta that counts."""
        return self.beta if self.beta is not None else _BETAS.get(self.loss_type, _BETA)

    @property
    def per_token(self) -> bool:
        """Whether log-probabilities are divided by the reply's length."""
        if self.length_normalised is not None:
            return self.length_normalised
        return self.loss_type in _A_TOKEN

    @property
    def loss_at_reference(self) -> float | None:
        """The mean loss where policy and reference are one; None where replies decide it too."""
        if self.chosen_weight or self.weighting != "none" or not self.needs_reference:
            return None
        if self.loss_type == "kto":
            same = self.desirable_weight == self.undesirable_weight
            return self.desirable_weight / 2 if same else None
        zero = torch.zeros(1)
        return float(self._of_gap(zero, zero))

    def log_probs(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return log p(y|x) of each sequence, (sequences,) float32, in nats."""
        return reply_log_probs(model, batch).sums

    def loss(self, model: PreTrainedModel, batch: Batch) -> LossTerms:
        """Return the summed loss, the number of prompts, and what the rewards are.

        Raises:
            ModelError: the model has no linear language-model head.
        """
        terms = self.terms(reply_log_probs(model, batch), batch, batch.get("reference"))
        return LossTerms(
            (terms.weights * terms.losses).sum(),
            self.count(batch),
            {name: (terms.weights * value).sum() for name, value in terms.metrics.items()},
        )

    def terms(
        self, policy: ReplyLogProbs, batch: Batch, reference: Tensor | None
    ) -> PreferenceTerms:
        """Return the loss and metrics of each pair or labelled reply, before they are summed.

        Args:
            policy: of the model that trains.
            batch: winners, losers, pair_weights; for kto matched, mismatched, good, and z0 where
                the batch is part of a larger one. No tokens are needed, so a batch may be of any
                number of rows.
            reference: (sequences,) log p of the frozen model; None for losses without one.
        """
        if self.loss_type == "kto":
            return self._of_labels(policy, batch, reference)
        return self._of_pairs(policy, batch, reference)

    def _of_pairs(
        self, policy: ReplyLogProbs, batch: Batch, reference: Tensor | None
    ) -> PreferenceTerms:
        beta = self.strength
        w, l = batch["winners"], batch["losers"]  # noqa: E741 - the papers' letters
        ratio = policy.sums if reference is None else policy.sums - reference
        scored = ratio / policy.lengths if self.per_token else ratio
        terms = self._of_gap(scored[w], scored[l])
        if self.weighting == "wpo":
            means = policy.means.detach()
            terms = terms * torch.exp(means[w] + means[l])
        chosen = policy.means[w]
        total = terms - self._chosen_weight * chosen if self._chosen_weight else terms
        rewards = (beta * scored).detach()
        gap = rewards[w] - rewards[l]
        metrics = {
            "reward_accuracy": (gap > 0).to(gap.dtype) + 0.5 * (gap == 0).to(gap.dtype),
            "reward_margin": gap,
            "chosen_reward": rewards[w],
            "rejected_reward": rewards[l],
            "chosen_log_prob": policy.sums.detach()[w],
            "rejected_log_prob": policy.sums.detach()[l],
        }
        return PreferenceTerms(total, batch["pair_weights"], metrics)

    def _of_gap(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the loss of each pair, (pairs,), of what its two replies score."""
        beta, eps, gap = self.strength, self.label_smoothing, chosen - rejected
        if self.loss_type == "sigmoid":
            return losses.sigmoid(gap, beta=beta, eps=eps)
        if self.loss_type == "robust":
            return losses.robust(gap, beta=beta, eps=eps)
        if self.loss_type == "ipo":
            return losses.ipo(gap, beta=beta)
        if self.loss_type == "hinge":
            return losses.hinge(gap, beta=beta)
        if self.loss_type == "simpo":
            return losses.simpo(gap, beta=beta, gamma=self.gamma, eps=eps)
        if self.loss_type == "cpo":
            return losses.cpo(gap, beta=beta, eps=eps)
        return beta * losses.orpo(chosen, rejected)

    @property
    def _chosen_weight(self) -> float:
        if self.chosen_weight is not None:
            return self.chosen_weight
        return 1.0 if self.loss_type in {"orpo", "cpo"} else 0.0

    def _of_labels(
        self, policy: ReplyLogProbs, batch: Batch, reference: Tensor | None
    ) -> PreferenceTerms:
        assert reference is not None  # noqa: S101 - kto needs one, so the program gives one
        ratio = policy.sums - reference
        scored = ratio / policy.lengths if self.per_token else ratio
        good: Tensor = batch["good"]
        mismatched = scored[batch["mismatched"]].detach()
        z0: Tensor = batch["z0"] if "z0" in batch else losses.reference_point(mismatched)
        matched = scored[batch["matched"]]
        weights = losses.Desirable(self.desirable_weight, self.undesirable_weight)
        terms = losses.kto(matched, good, z0, beta=self.strength, weights=weights)
        rewards = (self.strength * matched).detach()
        right = (rewards > self.strength * z0) == good
        metrics = {
            "reward_accuracy": right.to(rewards.dtype),
            # Good replies' rewards less bad ones': its growth is what the loss asks for.
            "signed_reward": torch.where(good, rewards, -rewards),
            KL: z0.expand_as(matched),
            MISMATCHED: mismatched,
        }
        return PreferenceTerms(terms, torch.ones_like(rewards), metrics)

    def common(self) -> Callable[[Mapping[str, float]], Batch] | None:
        """Return what gives all micro-batches one z0; None for the losses of pairs.

        So their number, and that of processes, does not matter (the paper takes the mean over a
        micro-batch).
        """
        return _reference_point if self.loss_type == "kto" else None

    def count(self, batch: Batch) -> float:
        """Return the number of prompts with pairs, or of labelled replies."""
        if self.loss_type == "kto":
            return len(batch["good"])
        return float(batch["pair_weights"].sum(dtype=torch.float64).round())


def _reference_point(means: Mapping[str, float]) -> Batch:
    return {"z0": losses.reference_point(torch.tensor(means[MISMATCHED]))}
