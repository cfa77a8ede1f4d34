"""What 4-bit codes stand for: the weight in a floating dtype, or rounded to float8.

Both are operators, worked out for one product each: one pass of a kernel of our own on a GPU, and
elsewhere bitsandbytes' operator or plain code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.ops.fp8_linear import LARGEST, SMALLEST, quantise_rows
from tunesmith.ops.turned_codes import E4M3

BLOCK: Final = 64
"""Weights that share an absmax."""
BLOCK_OF_SCALES: Final = 256
"""Absmax that share a scale, with double quantisation."""


class Nf4(NamedTuple):
    """A weight (out, in) in 4 bits."""

    shape: tuple[int, int]
    """(out, in)."""
    codes: Tensor
    """(ceil(out * in / 2), 1), uint8."""
    levels: Tensor
    """(16,), float32, ascending."""
    absmax: Tensor
    """(blocks,), float32; uint8 with double quantisation."""
    nested: tuple[Tensor, ...]
    """With double quantisation the levels (256,), scales (ceil(blocks / 256),) and offset () of the
    absmax, float32; else empty."""


def nf4_weight(weight: Nf4, dtype: torch.dtype, *, before: Tensor) -> Tensor:
    """Return the weight (out, in) in `dtype`: what its codes stand for.

    Args:
        weight: in 4 bits; bitsandbytes is loaded, since it made the codes.
        dtype: what float32 values are rounded to.
        before: not read; the other factor of the product that the weight is for. A compiler sees
            that the weight waits for it. Otherwise it would find that the passes forward and
            backward work out the same weight, and keep that from one to the other.
    """
    shape, codes, levels, absmax, nested = weight
    return _values(codes, levels, absmax, nested, before, shape, dtype)


def nf4_as_float8(weight: Nf4, *, before: Tensor, turned: bool = False) -> tuple[Tensor, Tensor]:
    """Return the weight as float8 codes and a scale for each row (out, 1), float32.

    Every block has a weight of its absmax or, after double quantisation, of what that became, so
    the largest absmax of a row's blocks is the largest weight of the row: no pass over the weights
    is needed to find it.

    Args:
        weight: in 4 bits.
        before: see `nf4_weight`.
        turned: the codes are (in, out) and not (out, in), contiguous in either case.
    """
    shape, codes, levels, absmax, nested = weight
    return _float8(codes, levels, absmax, nested, before, shape, turned)


# Operators and not plain code, for which a compiler made kernels that wrote intermediate values to
# memory or looked codes up once for each pass.
@torch.library.custom_op("tunesmith::nf4_values", mutates_args=())
def _values(  # noqa: PLR0917 - operators have no keyword-only tensors
    codes: Tensor,
    levels: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    before: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    del before
    out_features, in_features = shape
    weight = Nf4((out_features, in_features), codes, levels, absmax, tuple(nested))
    if in_features % BLOCK:  # some block reaches over two rows
        return scaled_levels(weight, absmax_values(weight)).to(dtype)
    if codes.is_cuda:
        from tunesmith.ops.nf4_kernel import unpacked_values

        return unpacked_values(weight, dtype)
    return torch.ops.bitsandbytes.dequantize_4bit(
        codes, absmax_values(weight), BLOCK, "nf4", weight.shape, dtype
    )


@_values.register_fake
def _(  # noqa: PLR0917 - as above
    codes: Tensor,
    levels: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    before: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    del levels, absmax, nested, before
    return codes.new_empty(shape, dtype=dtype)


@torch.library.custom_op("tunesmith::nf4_float8", mutates_args=())
def _float8(  # noqa: PLR0917 - as above
    codes: Tensor,
    levels: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    before: Tensor,
    shape: Sequence[int],
    turned: bool,
) -> tuple[Tensor, Tensor]:
    del before
    out_features, in_features = shape
    weight = Nf4((out_features, in_features), codes, levels, absmax, tuple(nested))
    if codes.is_cuda and not in_features % BLOCK:
        from tunesmith.ops.nf4_kernel import unpacked_float8

        rounded, scales = unpacked_float8(weight, turned=turned)
        return rounded.view(E4M3), scales
    rounded, scales = rounded_levels(weight)
    if turned:
        bits = rounded.view(torch.int8).t()
        rounded = bits.clone(memory_format=torch.contiguous_format).view(E4M3)
    return rounded, scales


@_float8.register_fake
def _(  # noqa: PLR0917 - as above
    codes: Tensor,
    levels: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    before: Tensor,
    shape: Sequence[int],
    turned: bool,
) -> tuple[Tensor, Tensor]:
    del absmax, nested, before
    out_features, in_features = shape
    size = (in_features, out_features) if turned else (out_features, in_features)
    return codes.new_empty(size, dtype=E4M3), levels.new_empty(out_features, 1)


def rounded_levels(weight: Nf4) -> tuple[Tensor, Tensor]:
    """Return the float8 codes (out, in) and scales (out, 1) of a weight, by plain code."""
    absmax = absmax_values(weight)
    out_features, in_features = weight.shape
    if in_features % BLOCK:  # some block reaches over two rows
        return quantise_rows(scaled_levels(weight, absmax))
    blocks = absmax.view(out_features, -1)
    scales = (blocks.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(SMALLEST)
    return scaled_levels(weight, (blocks / scales).flatten()).to(E4M3), scales


def scaled_levels(weight: Nf4, factors: Tensor) -> Tensor:
    """Return level * factor of its block for each weight, (out, in), float32, by plain code.

    Args:
        weight: its codes and levels; the absmax are not read.
        factors: (blocks,), float32.
    """
    out_features, in_features = weight.shape
    count = out_features * in_features
    places = torch.stack([weight.codes >> 4, weight.codes & 15], dim=-1)
    levels = weight.levels[places.flatten().int()]
    missing = factors.numel() * BLOCK - levels.numel()
    if missing:
        levels = functional.pad(levels, (0, missing))
    return (levels.view(-1, BLOCK) * factors[:, None]).flatten()[:count].view(weight.shape)


def absmax_values(weight: Nf4) -> Tensor:
    """Return the absmax (blocks,), float32, decoded where they are codes."""
    if not weight.nested:
        return weight.absmax
    levels, scales, offset = weight.nested
    factors = scales.repeat_interleave(BLOCK_OF_SCALES)[: weight.absmax.numel()]
    return levels[weight.absmax.int()] * factors + offset
