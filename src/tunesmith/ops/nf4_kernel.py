# Kernels are read by Triton's compiler, which wants neither types nor keywords.
# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""4-bit weights unpacked on a GPU in one pass over the codes; imported where there is Triton.

The plain reference is in `nf4_values`; the layout is that of `nf4_linear`. A program takes a tile
of the weight: it reads half a byte a weight and the absmax of the tile's blocks, and writes the
values, or their float8 codes, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.ops.turned_kernel import Tile

if TYPE_CHECKING:
    from tunesmith.ops.nf4_values import Nf4

BLOCK: tl.constexpr = tl.constexpr(64)
BLOCK_OF_SCALES: tl.constexpr = tl.constexpr(256)
LARGEST: tl.constexpr = tl.constexpr(448.0)
SMALLEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)
PLAIN = Tile(8, 512, 4)
TURNED = Tile(128, 64, 4)
_ROWS_OF_SCALES = 4


def unpacked_values(weight: Nf4, dtype: torch.dtype, *, tile: Tile = PLAIN) -> Tensor:
    """Return the weight (out, in) in `dtype`; `in` is a multiple of 64."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    # Not read: the values are not divided by anything.
    _launch(weight, weight.levels, out, tile, float8=False, turned=False)
    return out


def unpacked_float8(
    weight: Nf4, *, turned: bool, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `nf4_float8` does, as int8 bits; `in` is a multiple of 64."""
    rows, columns = weight.shape
    scales = weight.levels.new_empty(rows, 1)
    blocks = columns // BLOCK.value
    with torch.cuda.device_of(weight.codes):
        _row_scales[(triton.cdiv(rows, _ROWS_OF_SCALES),)](
            *_absmax_of(weight),
            scales,
            rows,
            blocks,
            NESTED=bool(weight.nested),
            ROWS=_ROWS_OF_SCALES,
            BLOCKS=triton.next_power_of_2(blocks),
            enable_fp_fusion=False,
        )
    shape = (columns, rows) if turned else (rows, columns)
    out = torch.empty(shape, dtype=torch.int8, device=weight.codes.device)
    tile = tile or (TURNED if turned else PLAIN)
    _launch(weight, scales, out, tile, float8=True, turned=turned)
    return out, scales


def _absmax_of(weight: Nf4) -> tuple[Tensor, ...]:
    """Return the absmax and what they are decoded with, or any tensors where nothing is."""
    return (weight.absmax, *(weight.nested or (weight.levels,) * 3))


def _launch(
    weight: Nf4, scales: Tensor, out: Tensor, tile: Tile, *, float8: bool, turned: bool
) -> None:
    rows, columns = weight.shape
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))
    with torch.cuda.device_of(weight.codes):
        _unpack[grid](
            weight.codes,
            weight.levels,
            *_absmax_of(weight),
            scales,
            out,
            rows,
            columns,
            NESTED=bool(weight.nested),
            FLOAT8=float8,
            TURNED=turned,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            # Products and sums are rounded one by one, as elsewhere.
            enable_fp_fusion=False,
        )


@triton.jit
def _factors(
    absmax,
    absmax_levels,
    absmax_scales,
    absmax_offset,
    index,
    inside,
    NESTED: tl.constexpr,
):
    """Return the absmax at `index`, float32, 0 outside."""
    found = tl.load(absmax + index, mask=inside, other=0)
    if NESTED:
        level = tl.load(absmax_levels + found.to(tl.int32))
        scale = tl.load(absmax_scales + index // BLOCK_OF_SCALES, mask=inside, other=0.0)
        found = tl.where(inside, level * scale + tl.load(absmax_offset), 0.0)
    return found


@triton.jit
def _row_scales(
    absmax,
    absmax_levels,
    absmax_scales,
    absmax_offset,
    scales,
    rows,
    blocks,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.arange(0, BLOCKS)
    inside = (row < rows)[:, None] & (block < blocks)[None, :]
    index = row[:, None] * blocks + block[None, :]
    factors = _factors(absmax, absmax_levels, absmax_scales, absmax_offset, index, inside, NESTED)
    largest = tl.max(tl.abs(factors), axis=1)
    tl.store(scales + row, tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST), mask=row < rows)


@triton.jit
def _unpack(
    codes,
    levels,
    absmax,
    absmax_levels,
    absmax_scales,
    absmax_offset,
    scales,
    out,
    rows,
    columns,
    NESTED: tl.constexpr,
    FLOAT8: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    there = (row < rows)[:, None]
    pair = first // 2 + tl.arange(0, COLUMNS // 2)
    start = row[:, None].to(tl.int64) * (columns // 2)
    two = tl.load(codes + start + pair[None, :], mask=there & (pair < columns // 2)[None, :])
    places = tl.join(two >> 4, two & 15).to(tl.int32)
    values = tl.load(levels + tl.reshape(places, (ROWS, COLUMNS // BLOCK, BLOCK)))

    block = first // BLOCK + tl.arange(0, COLUMNS // BLOCK)
    blocks = columns // BLOCK
    inside = there & (block < blocks)[None, :]
    index = row[:, None] * blocks + block[None, :]
    factors = _factors(absmax, absmax_levels, absmax_scales, absmax_offset, index, inside, NESTED)
    if FLOAT8:
        scale = tl.load(scales + row, mask=row < rows, other=1.0)
        factors = tl.div_rn(factors, tl.broadcast_to(scale[:, None], factors.shape))
    values = tl.reshape(values * factors[:, :, None], (ROWS, COLUMNS))

    if FLOAT8:
        written = values.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    else:
        written = values.to(out.dtype.element_ty)
    column = first + tl.arange(0, COLUMNS)
    inside = there & (column < columns)[None, :]
    if TURNED:
        places = out + column[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(places, tl.trans(written), mask=tl.trans(inside))
    else:
        places = out + row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(places, written, mask=inside)
