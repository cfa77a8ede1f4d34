"""Hard-concrete gates: variables in [0, 1] that are often exactly 0 or 1 (Louizos et al. 2018)."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

LOW: Final = -1.5
HIGH: Final = 1.5
"""l and r, between which gates are stretched before they are cut to [0, 1]."""
CLAMP: Final = 1e-4
"""Keeps log u finite, as in the authors' code."""
SURE: Final = 1e6
"""|alpha| of a gate that is 0 or 1 whatever the noise, and whose gradient is 0; so large that no
optimiser's momentum brings it back. Weight decay would: gates have none."""


def gates(alpha: Tensor, *, sample: bool) -> Tensor:
    """Return z in [0, 1], as `alpha` (Guo et al. 2021, arXiv:2012.07463, section 2.2).

    s = sigmoid(log u - log(1 - u) + alpha), z = min(1, max(0, s (r - l) + l)), u uniform.

    Args:
        alpha: locations, any shape, float.
        sample: draw u; else log u - log(1 - u) is 0, its median.
    """
    noise = torch.rand_like(alpha).clamp(CLAMP, 1 - CLAMP).logit() if sample else 0.0
    stretched = torch.sigmoid(alpha + noise) * (HIGH - LOW) + LOW
    return stretched.clamp(0.0, 1.0)


def probability_nonzero(alpha: Tensor) -> Tensor:
    """Return P(z > 0) = sigmoid(alpha - log(-l / r)), as `alpha`."""
    return torch.sigmoid(alpha - math.log(-LOW / HIGH))
