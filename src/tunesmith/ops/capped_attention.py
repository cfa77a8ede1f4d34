"""Attention whose scores are capped, which no kernel of PyTorch computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(c tanh(scaling q k^T / c)) v (Gemma 2, arXiv:2408.00118, section 2).

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, kv_length, head_dim); kv_heads divides heads.
        v: as `k`.
        mask: bool, broadcast over (batch, heads, length, kv_length); True is kept, None keeps all.
        scaling: factor of the scores.
        softcap: c.
        dropout: probability of dropping an attention weight.

    Returns:
        (batch, heads, length, head_dim), dtype of `q`.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    # The order of transformers' eager attention, so that the bits are its own.
    scores = q @ k.transpose(2, 3) * scaling
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=dropout) @ v
