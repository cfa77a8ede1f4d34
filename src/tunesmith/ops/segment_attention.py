"""Attention over segments that lie side by side in one row and cannot see each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tunesmith.ops.capped_attention import capped_attention

# PyTorch 2.11 has no enable_gqa yet; there the key and value heads are repeated.
_VARLEN_GQA: Final = "enable_gqa" in inspect.signature(varlen_attn).parameters
_VARLEN_HEAD_DIM: Final = 256
# Typed as it is called here: without its auxiliary output.
_VARLEN: Final = cast("Callable[..., Tensor]", varlen_attn)


def segment_attention(  # noqa: PLR0913 - all that attention depends on
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
    prefix: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return each segment's own softmax(scaling q k^T) v, as if it were alone in the batch.

    CUDA in half precision takes one variable-length kernel; elsewhere the segments go one by one
    through `scaled_dot_product_attention`, which costs no more than its own memory.

    Args:
        q: (1, heads, tokens, head_dim).
        k: (1, kv_heads, tokens, head_dim); kv_heads divides heads.
        v: (1, kv_heads, tokens, head_dim).
        cu_seq_lens: (segments + 1,) int32, from 0 to tokens, each segment at least one token. On
            the GPU where `uses_varlen`, on the CPU otherwise (else each call waits).
        scaling: factor of the scores; None is head_dim ** -0.5.
        dropout: probability of dropping an attention weight.
        causal: whether a token sees only itself and what is before it.
        window: how many tokens a token sees at most, itself among them; without `causal`, as many
            in each direction.
        max_length: tokens of the longest segment, or any bound; helps the kernel to share out work.
        prefix: keys and values (1, kv_heads, extra, head_dim) that every token of every segment
            sees besides, through any window.
        softcap: c of c tanh(scores / c), which the kernel does not compute.

    Returns:
        (1, heads, tokens, head_dim), dtype of `q`.
    """
    slides = window is not None and prefix is not None
    if uses_varlen(q, v, dropout=dropout, slides=slides, capped=softcap is not None):
        return _in_one_kernel(
            q,
            k,
            v,
            cu_seq_lens,
            # Any bound is right: the true longest would make the CPU wait for the GPU.
            max_length=max_length or q.shape[2],
            scaling=scaling,
            window=_reach(window, causal=causal),
            prefix=prefix,
        )
    if _in_graph(q, capped=softcap is not None):
        seen = _own_segment(cu_seq_lens.to(q.device), q.shape[2], window, causal=causal)
        if prefix is not None:
            seen = F.pad(seen, (prefix[0].shape[2], 0), value=True)
            k, v = (torch.cat(x, 2) for x in zip(prefix, (k, v), strict=True))
        if softcap is not None:
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            return capped_attention(q, k, v, seen, scaling=scale, softcap=softcap, dropout=dropout)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    lengths = cu_seq_lens.diff().tolist()
    # One split and not a slice a segment: its backward is one concatenation.
    segments = zip(*(torch.split(x, lengths, dim=2) for x in (q, k, v)), strict=True)
    extra = 0 if prefix is None else prefix[0].shape[2]
    outs = []
    for query, own_key, own_value in segments:
        key, value = own_key, own_value
        if prefix is not None:
            key, value = (torch.cat(x, 2) for x in zip(prefix, (key, value), strict=True))
        mask = _band(query, window, extra, causal=causal)
        if softcap is not None:
            lower = _lower(query) if mask is None and causal else mask
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            options = {"scaling": scale, "softcap": softcap, "dropout": dropout}
            outs.append(capped_attention(query, key, value, lower, **options))
            continue
        outs.append(
            F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None and query.shape[2] > 1,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outs, dim=2)


def _in_graph(q: Tensor, *, capped: bool) -> bool:
    """Return whether this is traced, where segments cannot go one by one.

    Capped scores are written out, and all of them at once fit into no GPU's memory, so there the
    compiler is left to say that it cannot.
    """
    return torch.compiler.is_compiling() and not (capped and q.is_cuda)


def _own_segment(bounds: Tensor, tokens: int, window: int | None, *, causal: bool) -> Tensor:
    """Return (tokens, tokens) bool: what each token sees of all segments, side by side."""
    place = torch.arange(tokens, device=bounds.device)
    segment = torch.searchsorted(bounds[1:], place, right=True)
    seen = segment[:, None] == segment
    behind = place[:, None] - place
    if causal:
        seen = seen & (behind >= 0)
    if window is not None:
        seen = seen & (behind.abs() < window)
    return seen


def _lower(q: Tensor) -> Tensor:
    """Return (length, length) bool: what each token of a segment sees of it and what is before."""
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()


def uses_varlen(
    q: Tensor, v: Tensor, *, dropout: float = 0.0, slides: bool = False, capped: bool = False
) -> bool:
    """Return whether the variable-length kernel can take queries and values like these.

    Args:
        q: (batch, heads, tokens, head_dim).
        v: (batch, kv_heads, tokens, head_dim).
        dropout: probability of dropping an attention weight.
        slides: whether there is a prefix and a window, which the kernel would slide past it.
        capped: whether the scores are capped.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    width = q.shape[-1] if q.shape[-1] == v.shape[-1] else None
    fits = width is not None and width <= _VARLEN_HEAD_DIM
    return q.is_cuda and half and dropout == 0 and fits and not (slides or capped)


def _reach(window: int | None, *, causal: bool) -> tuple[int, int]:
    """Return how many tokens (before, after) itself a token sees, -1 for all."""
    side = -1 if window is None else window - 1
    return side, 0 if causal else side


def _band(q: Tensor, window: int | None, extra: int, *, causal: bool) -> Tensor | None:
    """Return (length, extra + length) bool of what each token of a segment sees.

    That is the `extra` keys in front and the tokens within the window; None where a plain causal
    mask or none at all says the same.
    """
    length = q.shape[2]
    slides = window is not None and length > window
    if not slides and (extra == 0 or length == 1 or not causal):
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
    before, after = _reach(window if slides else None, causal=causal)
    if after >= 0:
        seen = seen.tril(after)
    if before >= 0:
        seen = seen.triu(-before)
    return F.pad(seen, (extra, 0), value=True)


def _in_one_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: Tensor,
    *,
    max_length: int,
    scaling: float | None,
    window: tuple[int, int],
    prefix: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return what `segment_attention` does, from the variable-length kernel."""
    query, key, value = (x[0].transpose(0, 1) for x in (q, k, v))
    cu_keys, longest = cu_seq_lens, max_length
    if prefix is not None:
        extra = prefix[0].shape[2]
        order, cu_keys = _before_each(cu_seq_lens, extra, key.shape[0])
        key, value = (
            torch.cat([x[0].transpose(0, 1), own])[order]
            for x, own in zip(prefix, (key, value), strict=True)
        )
        longest += extra
    # Where keys outnumber queries the kernel aligns their ends: a prefix is seen by all.
    out = _varlen(
        query,
        key,
        value,
        (cu_seq_lens, cu_keys),
        longest=(max_length, longest),
        scaling=scaling,
        window=window,
    )
    return out.transpose(0, 1)[None]


def _before_each(cu_seq_lens: Tensor, extra: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return where [prefix | tokens] go so that every segment begins with the prefix.

    Args:
        cu_seq_lens: (segments + 1,) int32.
        extra: length of the prefix.
        tokens: of all segments.

    Returns:
        The index (segments * extra + tokens,) int64 into [prefix | tokens], and the new bounds.
    """
    device = cu_seq_lens.device
    bounds = cu_seq_lens + extra * torch.arange(len(cu_seq_lens), device=device, dtype=torch.int32)
    token = torch.arange(tokens, device=device)
    segment = torch.searchsorted(cu_seq_lens[1:], token, right=True)
    slot = torch.arange(extra, device=device)
    order = torch.empty((len(cu_seq_lens) - 1) * extra + tokens, dtype=torch.int64, device=device)
    order[token + extra * (segment + 1)] = token + extra
    order[(bounds[:-1, None] + slot).flatten()] = slot.repeat(len(cu_seq_lens) - 1)
    return order, bounds


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: tuple[Tensor, Tensor],
    *,
    longest: tuple[int, int],
    scaling: float | None,
    window: tuple[int, int],
) -> Tensor:
    """Call the kernel; q, k, v are (tokens, heads, head_dim), the pairs are of (q, k)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not _VARLEN_GQA:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return _VARLEN(
        q,
        k,
        v,
        *cu_seq_lens,
        *longest,
        scale=scaling,
        window_size=window,
        **({"enable_gqa": groups > 1} if _VARLEN_GQA else {}),
    )
