"""Added keys and values of which each token makes as much as its own gate says."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, cat


class Sections(NamedTuple):
    """Attention over [gated keys | other keys], each group in head dimensions of its own.

    A token t with the gate g_t is to see an added key P and value V as g_t P and g_t V. Its score
    is then q_t (g_t P) = (g_t q_t) P, so with queries [q_t, g_t q_t], added keys [0, P] and the
    others [k, 0] one plain softmax gives the right weights; with values [0, V] and [v, 0] the
    output is [o, o'], and what was asked for is o + g_t o'.
    """

    gates: list[Tensor]
    """(batch, 1, length, 1) each."""

    def query(self, query: Tensor) -> Tensor:
        """Return [q, g q, ...] (batch, heads, length, sections x head_dim)."""
        return cat([query, *(g.to(query.dtype) * query for g in self.gates)], dim=-1)

    def place(self, x: Tensor, section: int = 0) -> Tensor:
        """Return keys or values (..., head_dim) in their section, 0 for those without a gate."""
        width = x.shape[-1]
        return F.pad(x, (section * width, (len(self.gates) - section) * width))

    def output(self, out: Tensor) -> Tensor:
        """Return o + g o' + ... for attention's output (batch, length, heads, ...)."""
        own, *gated = out.chunk(1 + len(self.gates), dim=-1)
        for gate, part in zip(self.gates, gated, strict=True):
            own = own + gate.transpose(1, 2).to(part.dtype) * part
        return own
