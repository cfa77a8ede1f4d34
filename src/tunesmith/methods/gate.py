"""Gates of UniPELT: how much of a method's change acts at each token (Mao et al. 2022).

arXiv:2110.07577, section 3.2: G = sigmoid(FN(h)) in [0, 1] for each method and layer, from the
method's own input h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gate(nn.Module):
    """G = sigmoid(w h + c), one number a token, from that token's own h.

    The paper takes the mean of G over the whole text. A decoder's text is not there as a whole
    while it is written, and a token would see later ones through the mean, so here each token has
    its own. w and c start at zero: every gate is half open.

    Args:
        width: of h.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, width, dtype=torch.float32))
        self.c = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self.watched: tuple[Tensor, int] | None = None
        """Sum of G and number of tokens, where somebody looks on."""

    def forward(self, h: Tensor) -> Tensor:
        """Return G (..., 1) for h (..., width), in h's dtype."""
        G = torch.sigmoid(F.linear(h, self.w.to(h.dtype), self.c.to(h.dtype)))
        if self.watched is not None:
            total, count = self.watched
            self.watched = (total + G.detach().float().sum(), count + G.numel())
        return G

    def watch(self, on: bool, /) -> None:
        """Begin to look on, or stop."""
        self.watched = (self.w.new_zeros((), requires_grad=False), 0) if on else None

    def mean(self) -> float | None:
        """Return the mean of G over the tokens since `watch`, None where it saw none."""
        if self.watched is None or self.watched[1] == 0:
            return None
        return float(self.watched[0]) / self.watched[1]
