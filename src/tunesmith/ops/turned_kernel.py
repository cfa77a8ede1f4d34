# Kernels are read by Triton's compiler, which wants neither types nor keywords.
# ruff: noqa: ANN001, ANN202, PLR0917
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""A matrix of bytes turned on a GPU, tile by tile; imported where there is Triton.

PyTorch's copy of a turned matrix of bytes reads or writes single bytes far apart. A tile is read
and written in whole rows, and turned in between within the multiprocessor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What one program works on."""

    rows: int
    columns: int
    warps: int


TILE = Tile(128, 128, 8)


def turned(matrix: Tensor, *, tile: Tile = TILE) -> Tensor:
    """Return the transposed `matrix`, (columns, rows), contiguous.

    Args:
        matrix: (rows, columns), int8, contiguous.
        tile: powers of two.
    """
    rows, columns = matrix.shape
    out = matrix.new_empty(columns, rows)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))
    with torch.cuda.device_of(matrix):
        _turn[grid](
            matrix,
            out,
            rows,
            columns,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return out


@triton.jit
def _turn(
    matrix,
    out,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(matrix + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside)
    places = out + column[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(places, tl.trans(tile), mask=tl.trans(inside))
