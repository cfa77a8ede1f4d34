"""Divergence from a teacher of whom only the k likeliest tokens of each position are known.

With S the teacher's k likeliest tokens, all others count as one more outcome on both sides:

    p~ = (p_i for i in S, 1 - sum_S p_i),    q~ = (q_i for i in S, 1 - sum_S q_i)

and the divergence is that of q~ from p~ over these k + 1 outcomes. Merging outcomes never raises a
divergence (the data-processing inequality; Cover & Thomas 2006, sec. 2.8), so it is at least 0 and
at most the one over the whole vocabulary, and equal to that where k is the vocabulary.
Renormalising p over S instead would pull the student's mass into S, whatever the teacher leaves
outside.

The rest's logarithm is that of the other tokens' exponentials, never of 1 - sum_S, of which
rounding would leave nothing, or less.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.ops.chunked_head import chunks
from tunesmith.ops.linear_divergence import Divergence, LinearHead, divergence


class TopK(NamedTuple):
    """What is known of a teacher's distributions over the next token."""

    tokens: Tensor
    """(positions, k) int32: the likeliest, the likeliest first."""
    log_probs: Tensor
    """(positions, k + 1) float32: log p of each, and of all others together, in nats; (positions,
    k) where there are no others."""


def linear_top_k(
    hidden: Tensor,
    head: LinearHead,
    k: int,
    *,
    vocab: int,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> TopK:
    """Return the k likeliest tokens of each position, without gradients.

    Args:
        hidden: (positions, width).
        head: what makes logits of it.
        k: at most `vocab`.
        vocab: the distributions are over the first so many tokens.
        temperature: logits are divided by it.
        chunk_size: positions a chunk; by default as for `linear_cross_entropy`.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    found = TopK(
        hidden.new_empty(len(hidden), k, dtype=torch.int32),
        hidden.new_empty(len(hidden), outcomes(k, vocab), dtype=exact),
    )
    with torch.no_grad():
        for chunk in chunks(len(hidden), head.weight, chunk_size):
            z = head.logits(hidden[chunk], vocab) / temperature
            tokens = z.topk(k).indices
            found.tokens[chunk] = tokens.int()
            found.log_probs[chunk] = _log_probs(z, tokens).to(exact)
    return found


def outcomes(k: int, vocab: int) -> int:
    """Return how many outcomes k tokens of `vocab` and all others make."""
    return min(k + 1, vocab)


def linear_divergence_top_k(
    hidden: Tensor,
    head: LinearHead,
    teacher: TopK,
    *,
    vocab: int,
    kind: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the summed divergence over all positions, () float32 (float64 for float64 inputs).

    The student's logits, (positions, vocab), never exist whole; see `linear_divergence`. Gradients
    go to `hidden` and the head.

    Args:
        hidden: (positions, width) of the student.
        head: of the student.
        teacher: of the same positions, at the same temperature.
        vocab: what the teacher's distributions are over: the first so many tokens.
        kind: which divergence.
        beta: of js.
        temperature: the student's logits are divided by it.
        chunk_size: positions a chunk; by default as for `linear_cross_entropy`.
    """

    def summed(own: Tensor, tokens: Tensor, log_p: Tensor) -> Tensor:
        log_q = _log_probs(head.logits(own, vocab) / temperature, tokens.long())
        return divergence(log_q, log_p.to(log_q.dtype), kind, beta).sum()

    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for chunk in chunks(len(hidden), head.weight, chunk_size):
        known = teacher.tokens[chunk], teacher.log_probs[chunk]
        part: Tensor = checkpoint(summed, hidden[chunk], *known, use_reentrant=False)
        total = total + part
    return total


def _log_probs(z: Tensor, tokens: Tensor) -> Tensor:
    """Return log softmax(z) of `tokens`, and of all others together, (positions, outcomes)."""
    known, log_sum = z.gather(-1, tokens), z.logsumexp(-1, keepdim=True)
    if tokens.shape[-1] == z.shape[-1]:
        return known - log_sum
    others = z.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([known, others], dim=-1) - log_sum
