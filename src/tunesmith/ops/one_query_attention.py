"""Attention of one query a row over grouped keys, without repeating the keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def one_query_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None = None
) -> Tensor:
    """Return softmax(s q K^T) V for the newest token of each row, (batch, heads, 1, head_dim).

    Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) shares each key among several
    heads. With one query a row those heads are to their keys what several queries would be, so they
    take the place of the length: nothing is copied, and each key is read once for all of them.

    Args:
        query: (batch, heads, 1, head_dim).
        key: (batch, kv_heads, length, head_dim), kv_heads a divisor of heads.
        value: as `key`.
        mask: (batch or 1, 1, 1, length), bool (True is kept) or additive; None keeps all.
        scaling: of the scores; 1 / sqrt(head_dim) by default.
    """
    batch, heads, _, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
    if mask is not None:
        mask = mask.expand(-1, -1, heads // kv_heads, -1)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, 1, value.shape[-1])


def is_newest_token(
    query: Tensor, key: Tensor, mask: Tensor | None, options: Mapping[str, Any]
) -> bool:
    """Return whether `one_query_attention` computes what an attention layer asks for.

    Args:
        query: (batch, heads, length, head_dim).
        key: (batch, kv_heads, kv_length, head_dim).
        mask: as the layer has it.
        options: what the attention function was called with besides.
    """
    grouped = query.shape[2] == 1 and key.shape[1] < query.shape[1]
    plain = options.get("softcap") is None and options.get("position_bias") is None
    same = mask is None or mask.shape[1] == 1
    return grouped and plain and same and not options.get("dropout")
