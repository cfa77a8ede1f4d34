# The kernel is read by Triton's compiler, which wants neither types nor keywords.
# ruff: noqa: ANN001, ANN202, E741, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""`one_query_attention` as one kernel for CUDA, which reads no key that the mask leaves out.

One program serves one row and one head of keys, with all the heads of queries that share it, and
keeps the running maximum and sum of its softmax (Dao et al. 2022, arXiv:2205.14135, algorithm 1).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """How the kernel goes through the keys."""

    keys: int
    """At a time."""
    warps: int
    stages: int
    """Blocks of keys that are on their way at once."""


TILE: Final = Tile(32, 1, 3)
_LEAST: Final = 16
"""Queries of the smallest product that the tensor cores take."""


@triton.jit
def _attend(
    Q,
    K,
    V,
    M,
    O,
    scaling,
    columns,
    q_row,
    q_head,
    k_row,
    k_head,
    k_column,
    v_row,
    v_head,
    v_column,
    m_row,
    m_column,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend for one row and one head of keys; K, V and the mask M are read by their strides."""
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    queries, width = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    real = queries < GROUP
    q_places = row * q_row + (head * GROUP + queries[:, None]) * q_head + width[None, :]
    q = tl.load(Q + q_places, mask=real[:, None], other=0.0)
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, WIDTH], tl.float32)
    first, end = 0, columns
    if MASKED:
        span = tl.arange(0, SPAN)
        kept = tl.load(M + row * m_row + span * m_column, mask=span < columns, other=0) != 0
        first = tl.min(tl.where(kept, span, columns), axis=0) // BLOCK * BLOCK
        end = tl.max(tl.where(kept, span + 1, 0), axis=0)
    # The first block has a key that is kept, so `largest` is finite from there on.
    for start in range(first, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        seen = place < end
        if MASKED:
            seen = tl.load(M + row * m_row + place * m_column, mask=seen, other=0) != 0
        k_places = row * k_row + head * k_head + place[:, None] * k_column + width[None, :]
        v_places = row * v_row + head * v_head + place[:, None] * v_column + width[None, :]
        k = tl.load(K + k_places, mask=seen[:, None], other=0.0)
        v = tl.load(V + v_places, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - new[:, None])
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None]
        out += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = new
    o_places = (row * KV_HEADS + head) * GROUP * WIDTH + queries[:, None] * WIDTH + width[None, :]
    tl.store(O + o_places, (out / total[:, None]).to(O.dtype.element_ty), mask=real[:, None])


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    tile: Tile = TILE,
) -> Tensor:
    """Return `one_query_attention` of tensors that the kernel takes; shapes as there."""
    batch, heads, _, width = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    group = heads // kv_heads
    out = torch.empty(batch, heads, 1, width, dtype=query.dtype, device=query.device)
    # Bytes: Triton reads no bool where it runs on the CPU.
    seen = query if mask is None else mask.expand(batch, 1, 1, columns).view(torch.uint8)
    _attend[(batch * kv_heads,)](
        query,
        key,
        value,
        seen,
        out,
        scaling,
        columns,
        query.stride(0),
        query.stride(1),
        *key.stride()[:3],
        *value.stride()[:3],
        seen.stride(0),
        seen.stride(3),
        KV_HEADS=kv_heads,
        GROUP=group,
        QUERIES=max(_LEAST, triton.next_power_of_2(group)),
        WIDTH=width,
        BLOCK=tile.keys,
        SPAN=triton.next_power_of_2(columns),
        MASKED=mask is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
