"""How much better than expected: advantages, and how far the policy has gone from the reference.

Tensors over replies are (replies, length), padded on the right; `mask` is bool, True at
real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import torch

from tunesmith.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
EPS: Final = 1e-4
"""Keeps a group or batch of equal numbers finite; what is centred is then 0."""


class Generalised(NamedTuple):
    """What PPO learns from."""

    advantages: Tensor
    """(replies, length) float32, 0 in padding."""
    returns: Tensor
    """(replies, length) float32: what the values should have been, 0 in padding."""


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> Generalised:
    """Return GAE (Schulman et al. 2016, arXiv:1506.02438, eq. 11 and 16), and values to learn.

    delta_t = r_t + gamma V_(t+1) - V_t;  A_t = delta_t + gamma lam A_(t+1);  R_t = A_t + V_t.
    After a reply's last token there is nothing: V and A are 0 there, also where it was cut, since
    the score of the reply is given at that token in either case.

    Args:
        rewards: (replies, length) float, of each token.
        values: (replies, length) float: V_t, expected before the token is written.
        mask: (replies, length) bool.
        gamma: discount a token.
        lam: 0 trusts the values, 1 the rewards.
    """
    rewards, values = rewards.float() * mask, values.float() * mask
    advantages = torch.zeros_like(values)
    later_value = later_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * later_value - values[:, t]
        later_advantage = (delta + gamma * lam * later_advantage) * mask[:, t]
        later_value = values[:, t]
        advantages[:, t] = later_advantage
    return Generalised(advantages, (advantages + values) * mask)


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` with mean 0 and standard deviation 1 over the real tokens, 0 in padding.

    Args:
        x: (replies, length) float.
        mask: (replies, length) bool; with fewer than two real tokens `x` is only centred.
    """
    chosen = x[mask].float()
    spread = chosen.std() if len(chosen) > 1 else chosen.new_zeros(())
    return (x - chosen.mean()) / (spread + EPS) * mask


def group_advantages(scores: Tensor, *, scale: Literal["group", "batch", "none"]) -> Tensor:
    """Return how much better each reply is than its group (arXiv:2402.03300, sec. 4.1.2).

    A_i = (r_i - mean r) / (std r + eps). Without the division this is Dr. GRPO's (Liu et al. 2025,
    arXiv:2503.20783, sec. 3.2), since it weighs up prompts whose replies are nearly alike; the
    batch's own deviation is a scale without that (arXiv:2508.08221, sec. 3). A group of equal
    scores has advantages of exactly 0.

    Args:
        scores: (prompts, samples) float.
        scale: what is divided by.

    Raises:
        SpecError: a single sample a prompt, which leaves nothing to compare with.
    """
    _require_several(scores)
    # The mean of equal floats may differ from them in the last bit, and the division makes it much.
    equal = (scores == scores[:, :1]).all(dim=1, keepdim=True)
    centred = (scores - scores.mean(dim=1, keepdim=True)).masked_fill(equal, 0.0)
    if scale == "none":
        return centred
    spread = scores.std(dim=1, keepdim=True) if scale == "group" else scores.std()
    return centred / (spread + EPS)


def leave_one_out_advantages(scores: Tensor) -> Tensor:
    """Return RLOO's: each score less the mean of the others of its group.

    A_i = r_i - 1/(k-1) sum_(j != i) r_j (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8).

    Args:
        scores: (prompts, samples) float.

    Raises:
        SpecError: a single sample a prompt.
    """
    _require_several(scores)
    samples = scores.shape[1]
    return group_advantages(scores, scale="none") * samples / (samples - 1)


def _require_several(scores: Tensor) -> None:
    if scores.shape[1] < 2:
        raise SpecError(
            f"objective.samples: {scores.shape[1]} reply a prompt has no group to be compared "
            "with; use 2 or more"
        )


def kl_estimate(log_probs: Tensor, reference: Tensor, *, kind: Estimator) -> Tensor:
    """Return an estimate of KL(policy || reference) at each token that the policy drew, in nats.

    With log r = log p_ref - log p (Schulman 2020, joschu.net/blog/kl-approx.html):
    k1 = -log r, unbiased, may be negative; k2 = (log r)^2 / 2, biased, its gradient is that of the
    KL; k3 = r - 1 - log r, unbiased and never negative.

    Args:
        log_probs: (...) float: of the drawn tokens under the policy.
        reference: (...) float: under the reference.
        kind: which.
    """
    log_ratio = reference - log_probs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return torch.expm1(log_ratio) - log_ratio


@dataclass
class AdaptiveKL:
    """A KL coefficient that goes after a target (Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2).

    e = clip(KL / target - 1, -0.2, 0.2);  beta <- beta (1 + e n / horizon).
    """

    coefficient: float
    target: float | None = None
    """KL of a reply, in nats, that is aimed at; None leaves the coefficient."""
    horizon: float = 10_000.0
    """Replies over which an error of 1 would double it."""

    def update(self, kl: float, replies: int) -> None:
        """Take note of the mean KL (nats a reply) of so many replies."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * replies / self.horizon
