"""The preference losses, each as its paper writes it.

Letters: y_w is the better and y_l the worse of two replies to x; pi is the model that trains and
pi_ref the frozen one;

    h = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]

beta > 0 is how dear it is to leave the reference, eps the share of pairs that are labelled the
wrong way round. Every function takes a number a pair, (pairs,) float, and returns the loss of each,
(pairs,), unreduced.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Desirable(NamedTuple):
    """Weights of KTO's two kinds of replies."""

    desirable: float = 1.0
    """lambda_D."""
    undesirable: float = 1.0
    """lambda_U."""


def sigmoid(h: Tensor, *, beta: float, eps: float = 0.0) -> Tensor:
    """Return DPO's loss -log s(beta h) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    With eps > 0 it is cDPO's (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3):
    -(1 - eps) log s(beta h) - eps log s(-beta h).
    """
    return -(1 - eps) * F.logsigmoid(beta * h) - eps * F.logsigmoid(-beta * h)


def robust(h: Tensor, *, beta: float, eps: float) -> Tensor:
    """Return rDPO's loss, whose mean over flipped labels is DPO's on clean ones.

    [-(1 - eps) log s(beta h) + eps log s(-beta h)] / (1 - 2 eps), with eps < 1/2 (Chowdhury et al.
    2024, arXiv:2403.00409, eq. 8). It has no lower bound.
    """
    kept = -(1 - eps) * F.logsigmoid(beta * h)
    flipped = -eps * F.logsigmoid(-beta * h)
    return (kept - flipped) / (1 - 2 * eps)


def ipo(h: Tensor, *, beta: float) -> Tensor:
    """Return IPO's loss (h - 1 / (2 tau))^2 with tau = beta (Azar et al. 2023, arXiv:2310.12036).

    Its eq. 17. The gap that it asks for does not grow with the replies' length, so `h` is usually
    of log-probabilities a token.
    """
    return (h - 1 / (2 * beta)) ** 2


def hinge(h: Tensor, *, beta: float) -> Tensor:
    """Return SLiC's loss max(0, 1 - beta h), on log-ratios (Zhao et al. 2023, arXiv:2305.10425).

    As normalised by Liu et al. 2023, arXiv:2309.06657 (RSO), sec. 4.
    """
    return torch.relu(1 - beta * h)


def simpo(gap: Tensor, *, beta: float, gamma: float, eps: float = 0.0) -> Tensor:
    """Return SimPO's loss -log s(beta gap - gamma) (Meng et al. 2024, arXiv:2405.14734, eq. 6).

    Args:
        gap: (pairs,) log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|.
        beta: of the reward.
        gamma: the target margin.
        eps: label smoothing, as for cDPO.
    """
    z = beta * gap - gamma
    return -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)


def cpo(gap: Tensor, *, beta: float, eps: float = 0.0) -> Tensor:
    """Return CPO's preference term (Xu et al. 2024, arXiv:2401.08417, eq. 4): DPO without pi_ref.

    -log s(beta gap), gap = log pi(y_w|x) - log pi(y_l|x); the likelihood of y_w is added to it.
    """
    return sigmoid(gap, beta=beta, eps=eps)


def orpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return ORPO's odds-ratio term -log s(log odds(y_w) / odds(y_l)).

    odds(y) = p / (1 - p), where p is the geometric mean of the reply's token probabilities (Hong et
    al. 2024, arXiv:2403.07691, eq. 4 and 7).

    Args:
        chosen: (pairs,) log pi(y_w|x) / |y_w|.
        rejected: (pairs,) log pi(y_l|x) / |y_l|.
    """
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(log_p: Tensor) -> Tensor:
    """Return log p - log(1 - p), finite as long as p < 1 in the dtype."""
    return log_p - log1mexp(log_p)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - e^x) for x < 0, exact near both ends (Maechler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931471805599453
    # Each branch is fed what it can take, or the other's infinite gradient would come through.
    small = torch.where(near, x, x.new_full((), -1.0))
    large = torch.where(near, x.new_full((), -1.0), x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def kto(ratio: Tensor, good: Tensor, z0: Tensor, *, beta: float, weights: Desirable) -> Tensor:
    """Return KTO's loss lambda - v of each reply (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).

    v = lambda_D s(beta (r - z0)) for a desirable y and lambda_U s(beta (z0 - r)) for another.

    Args:
        ratio: (replies,) r = log pi(y|x) - log pi_ref(y|x).
        good: (replies,) bool: which are desirable.
        z0: () the reference point, without gradient: see `reference_point`.
        beta: as above.
        weights: lambda_D and lambda_U.
    """
    signed = torch.where(good, ratio - z0, z0 - ratio)
    lambdas = torch.where(good, weights.desirable, weights.undesirable).to(ratio.dtype)
    return lambdas * (1 - torch.sigmoid(beta * signed))


def reference_point(mismatched: Tensor) -> Tensor:
    """Return KTO's z0 = max(0, mean r(x, y')) over pairs that do not belong together, ()."""
    return mismatched.detach().mean().clamp(min=0)
