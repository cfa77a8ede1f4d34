"""Divergence of a student's distribution from a teacher's, straight from hidden states and heads.

Neither model's logits, (tokens, vocab), ever exist whole: chunk by chunk both heads run, the
divergence is summed, and backward computes the chunk anew (torch's checkpoint).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.ops.chunked_head import chunks

Divergence = Literal["forward_kl", "reverse_kl", "js"]


class LinearHead(NamedTuple):
    """Logits z = c tanh((h W^T + b) / c), without c where `softcap` is None."""

    weight: Tensor
    """(vocab, width)."""
    bias: Tensor | None
    """(vocab,)."""
    softcap: float | None = None

    def logits(self, hidden: Tensor, vocab: int) -> Tensor:
        """Return the first `vocab` logits, (tokens, vocab), float32 or float64."""
        bias = None if self.bias is None else self.bias[:vocab]
        z = F.linear(hidden.to(self.weight.dtype), self.weight[:vocab], bias)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def divergence(student: Tensor, teacher: Tensor, kind: Divergence, beta: float) -> Tensor:
    """Return the divergence of each position, (tokens,), in nats.

    With p the teacher's and q the student's distribution: forward_kl is KL(p || q) (Hinton et al.
    2015, arXiv:1503.02531), reverse_kl is KL(q || p) (Gu et al. 2023, arXiv:2306.08543), js is
    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al. 2023,
    arXiv:2306.13649, eq. 1).

    Args:
        student: (tokens, vocab) log q.
        teacher: (tokens, vocab) log p.
        kind: which.
        beta: of js, between 0 and 1.
    """
    if kind == "forward_kl":
        return _kl(teacher, student)
    if kind == "reverse_kl":
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # 0 log 0 is 0: where p underflows the difference may be infinite.
    return torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def linear_divergence(
    hidden: Tensor,
    head: LinearHead,
    teacher_hidden: Tensor,
    teacher_head: LinearHead,
    *,
    kind: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the summed divergence over all positions, () float32 (float64 for float64 inputs).

    Vocabularies that are padded to different sizes are compared over the shorter one. Gradients go
    to `hidden` and the student's head; none to the teacher.

    Args:
        hidden: (tokens, width) of the student.
        head: of the student.
        teacher_hidden: (tokens, teacher's width).
        teacher_head: of the teacher.
        kind: which divergence.
        beta: of js.
        temperature: both logits are divided by it.
        chunk_size: positions a chunk; by default as for `linear_cross_entropy`.
    """
    vocab = min(len(head.weight), len(teacher_head.weight))

    def summed(own: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = (teacher_head.logits(other, vocab) / temperature).log_softmax(-1)
        log_q = (head.logits(own, vocab) / temperature).log_softmax(-1)
        return divergence(log_q, log_p.to(log_q.dtype), kind, beta).sum()

    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for chunk in chunks(len(hidden), head.weight, chunk_size):
        part: Tensor = checkpoint(summed, hidden[chunk], teacher_hidden[chunk], use_reentrant=False)
        total = total + part
    return total
