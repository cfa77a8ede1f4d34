"""Attention over segments of one length: a dense batch, for which there are faster kernels."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Dense: TypeAlias = Literal["cudnn", "flash", "efficient", "math"]
DENSE: Final[dict[Dense, SDPBackend]] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""PyTorch's kernels of `scaled_dot_product_attention`, by name."""


def equal_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int,
    *,
    backend: Dense,
    scaling: float | None = None,
    dropout: float = 0.0,
    causal: bool = True,
    prefix: tuple[Tensor, Tensor] | None = None,
    or_another: bool = True,
) -> Tensor:
    """Return each segment's own softmax(scaling q k^T) v, the segments being `length` tokens each.

    Nothing is copied but a prefix; the segments become the batch.

    Args:
        q: (1, heads, segments * length, head_dim).
        k: (1, kv_heads, segments * length, head_dim); kv_heads divides heads.
        v: as `k`.
        length: tokens of every segment.
        backend: the kernel to take.
        scaling: factor of the scores; None is head_dim ** -0.5.
        dropout: probability of dropping an attention weight.
        causal: whether a token sees only itself and what is before it.
        prefix: keys and values (1, kv_heads, extra, head_dim) that every token sees besides.
        or_another: whether another kernel may be taken where this one cannot.

    Returns:
        (1, heads, segments * length, head_dim), dtype of `q`.

    Raises:
        RuntimeError: the kernel cannot, and no other may.
    """
    q, k, v = (_as_batch(x, length) for x in (q, k, v))
    extra = 0
    if prefix is not None:
        k, v = (
            torch.cat([x.expand(own.shape[0], -1, -1, -1), own], dim=2)
            for x, own in zip(prefix, (k, v), strict=True)
        )
        if causal:
            # With as many queries before the text as keys, each token's square mask ends at itself
            # and the prefix is before all: the kernels that know only that mask can be taken.
            extra = prefix[0].shape[2]
            q = F.pad(q, (0, 0, extra, 0))
    kernels = [DENSE[backend]]
    if or_another:
        kernels += [kernel for kernel in DENSE.values() if kernel != DENSE[backend]]
    with sdpa_kernel(kernels, set_priority=True):
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            # Written as a choice, since in a graph of any size the comparison is a symbol.
            enable_gqa=True if q.shape[1] != k.shape[1] else False,  # noqa: SIM210
        )
    return out[:, :, extra:].transpose(0, 1).flatten(1, 2)[None]


def _as_batch(x: Tensor, length: int) -> Tensor:
    """Return (segments, heads, length, head_dim) of x (1, heads, segments * length, head_dim)."""
    return x[0].reshape(x.shape[1], -1, length, x.shape[3]).transpose(0, 1)
