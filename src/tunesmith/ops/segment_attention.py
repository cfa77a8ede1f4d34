"""Attention over segments that lie side by side in one row and cannot see each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# PyTorch 2.11 has no enable_gqa yet; there the key and value heads are repeated.
_VARLEN_GQA: Final = "enable_gqa" in inspect.signature(varlen_attn).parameters
_VARLEN_HEAD_DIM: Final = 256
# Typed as it is called here: without its auxiliary output.
_VARLEN: Final = cast("Callable[..., Tensor]", varlen_attn)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    causal: bool = True,
    window: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Return each segment's own softmax(scaling q k^T) v, as if it were alone in the batch.

    CUDA in half precision takes one variable-length kernel; elsewhere the segments go one by one
    through `scaled_dot_product_attention`, which costs no more than its own memory.

    Args:
        q: (1, heads, tokens, head_dim).
        k: (1, kv_heads, tokens, head_dim); kv_heads divides heads.
        v: (1, kv_heads, tokens, head_dim).
        cu_seq_lens: (segments + 1,) int32, from 0 to tokens, each segment at least one token. On
            the GPU for the variable-length kernel, on the CPU otherwise (else each call waits).
        scaling: factor of the scores; None is head_dim ** -0.5.
        dropout: probability of dropping an attention weight.
        causal: whether a token sees only itself and what is before it.
        window: with `causal`, how many tokens a token sees at most, itself among them.
        max_length: tokens of the longest segment, or any bound; helps the kernel to share out work.

    Returns:
        (1, heads, tokens, head_dim), dtype of `q`.
    """
    if uses_varlen(q, v, dropout=dropout):
        query, key, value = (x[0].transpose(0, 1) for x in (q, k, v))
        out = _varlen(
            query,
            key,
            value,
            cu_seq_lens,
            # Any bound is right: the true longest would make the CPU wait for the GPU.
            max_length=max_length or q.shape[2],
            scaling=scaling,
            # (before, after), -1 for all.
            window=(-1 if window is None else window - 1, 0) if causal else (-1, -1),
        )
        return out.transpose(0, 1)[None]
    lengths = cu_seq_lens.diff().tolist()
    # One split and not a slice a segment: its backward is one concatenation.
    segments = zip(*(torch.split(x, lengths, dim=2) for x in (q, k, v)), strict=True)
    outs = []
    for query, key, value in segments:
        mask = _band(query, window) if causal else None
        outs.append(
            F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outs, dim=2)


def uses_varlen(q: Tensor, v: Tensor, *, dropout: float = 0.0) -> bool:
    """Return whether the variable-length kernel can take queries and values like these."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    width = q.shape[-1] if q.shape[-1] == v.shape[-1] else None
    return q.is_cuda and half and dropout == 0 and width is not None and width <= _VARLEN_HEAD_DIM


def _band(q: Tensor, window: int | None) -> Tensor | None:
    """Return (length, length) bool of the last `window` tokens each sees, None if that is all."""
    length = q.shape[2]
    if window is None or length <= window:
        return None
    everything = torch.ones(length, length, dtype=torch.bool, device=q.device)
    return everything.tril().triu(1 - window)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: Tensor,
    *,
    max_length: int,
    scaling: float | None,
    window: tuple[int, int],
) -> Tensor:
    """Call the kernel; all tensors but the bounds are (tokens, heads, head_dim)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not _VARLEN_GQA:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return _VARLEN(
        q,
        k,
        v,
        cu_seq_lens,
        cu_seq_lens,
        max_length,
        max_length,
        scale=scaling,
        window_size=window,
        **({"enable_gqa": groups > 1} if _VARLEN_GQA else {}),
    )
