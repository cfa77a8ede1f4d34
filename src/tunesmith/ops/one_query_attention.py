"""Attention of one query a row over grouped keys, without repeating the keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDTHS: Final = frozenset({16, 32, 64, 128, 256})
"""Of a head, that the kernel takes: a power of two."""
_LONGEST: Final = 8192
"""Columns of a mask that the kernel looks at as a whole."""
_DTYPES: Final = frozenset({torch.float16, torch.bfloat16, torch.float32})


def one_query_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None = None
) -> Tensor:
    """Return softmax(s q K^T) V for the newest token of each row, (batch, heads, 1, head_dim).

    Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) shares each key among several
    heads. With one query a row those heads are to their keys what several queries would be, so they
    take the place of the length: nothing is copied, and each key is read once for all of them. On
    CUDA, where no gradient is asked for, one kernel skips what a bool mask leaves out.

    Args:
        query: (batch, heads, 1, head_dim).
        key: (batch, kv_heads, length, head_dim), kv_heads a divisor of heads.
        value: as `key`.
        mask: (batch or 1, 1, 1, length), bool (True is kept) or additive; None keeps all. A row
            that keeps nothing has no meaning.
        scaling: of the scores; 1 / sqrt(head_dim) by default.
    """
    batch, heads, _, width = query.shape
    if _kernel_takes(query, key, value, mask):
        scale = width**-0.5 if scaling is None else scaling
        found: Tensor = _on_cuda(query, key, value, mask, scale)
        return found
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
    if mask is not None:
        mask = mask.expand(-1, -1, heads // kv_heads, -1)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, 1, value.shape[-1])


def is_newest_token(
    query: Tensor, key: Tensor, mask: Tensor | None, options: Mapping[str, Any]
) -> bool:
    """Return whether `one_query_attention` computes what an attention layer asks for, and better.

    Args:
        query: (batch, heads, length, head_dim).
        key: (batch, kv_heads, kv_length, head_dim).
        mask: as the layer has it.
        options: what the attention function was called with besides.
    """
    grouped = query.shape[2] == 1 and (key.shape[1] < query.shape[1] or query.is_cuda)
    plain = options.get("softcap") is None and options.get("position_bias") is None
    same = mask is None or mask.shape[1] == 1
    return grouped and plain and same and not options.get("dropout")


def _kernel_takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    on_cuda = query.is_cuda and torch.version.hip is None
    known = query.dtype in _DTYPES and query.shape[-1] in _WIDTHS
    same = query.dtype == key.dtype == value.dtype and value.shape[-1] == query.shape[-1]
    dense = all(x.stride(-1) == 1 for x in (query, key, value))
    plain = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    short = mask is None or key.shape[2] <= _LONGEST
    needs = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return on_cuda and known and same and dense and plain and short and not needs


# One operator to the compiler, which has no need to look into the kernel.
@torch.library.custom_op("tunesmith::one_query_attention", mutates_args=())
def _on_cuda(  # noqa: PLR0917 - operators have no keywords here
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    from tunesmith.ops.one_query_kernel import launch  # Triton comes with CUDA

    return launch(query, key, value, mask, scaling)


@_on_cuda.register_fake
def _(  # noqa: PLR0917
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    del key, value, mask, scaling
    batch, heads, _, width = query.shape
    return query.new_empty(batch, heads, 1, width)
