"""A frozen linear map in 4 bits, nf4 (Dettmers et al. 2023, arXiv:2305.14314, section 3).

A weight is flattened row by row and cut into blocks of 64; w = absmax_block * level[code], with 16
levels from -1 to 1, two codes in a byte, the first in the upper half. With double quantisation, the
absmax are 8-bit codes themselves: absmax = level'[code'] * scale' + offset, a scale' for each 256.
Codes and layout are bitsandbytes'.

The values are worked out for every product and live no longer than it. Inside a compiled graph they
are plain tensor code; outside, bitsandbytes' operator works them out where it does so rightly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.ops.fp8_linear import (
    E4M3,
    LARGEST,
    input_gradient,
    quantise_rows,
    scaled_product,
)

if TYPE_CHECKING:
    pass

BLOCK: Final = 64
"""Weights that share an absmax."""
BLOCK_OF_SCALES: Final = 256
"""Absmax that share a scale, with double quantisation."""
_SMALLEST: Final = torch.finfo(torch.float32).tiny


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


def nf4_linear(x: Tensor, weight: Nf4, *, float8: bool = False) -> Tensor:
    """Return x W^T in the dtype of `x`; the weight gets no gradient, and only codes are saved.

    Args:
        x: (..., in).
        weight: what W stands as.
        float8: round W and `x` to float8, and the gradient too, and multiply these: see
            `fp8_linear`. Else W is rounded to the dtype of `x`.

    Returns:
        (..., out).
    """
    function = _Float8Product if float8 else _Product
    shape, *tensors, nested = weight
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = function.apply(flat, shape, *tensors, *nested)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], shape[0])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.shape = shape
        return x @ nf4_weight(_nf4(shape, tensors), x.dtype, before=x).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: checkpointing hands them out a single time
        dx = grad @ nf4_weight(_nf4(ctx.shape, tensors), grad.dtype, before=grad)
        return dx, *[None] * (1 + len(tensors))


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.shape = shape
        codes, scales = nf4_as_float8(_nf4(shape, tensors), before=x)
        return scaled_product(*quantise_rows(x), codes, scales, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        codes, scales = nf4_as_float8(_nf4(ctx.shape, tensors), before=grad)
        dx = input_gradient(grad, codes.view(torch.int8), scales)
        return dx, *[None] * (1 + len(tensors))


def _nf4(shape: tuple[int, int], tensors: Sequence[Tensor]) -> Nf4:
    codes, levels, absmax, *nested = tensors
    return Nf4(shape, codes, levels, absmax, tuple(nested))


def nf4_weight(weight: Nf4, dtype: torch.dtype, *, before: Tensor) -> Tensor:
    """Return the weight (out, in) in `dtype`: what its codes stand for.

    Args:
        weight: in 4 bits; bitsandbytes is loaded, since it made the codes.
        dtype: what float32 values are rounded to.
        before: the other factor of the product that the weight is for; see `unpacking`.
    """
    absmax, shifts = unpacking(weight.absmax, list(weight.nested), before)
    # bitsandbytes' CPU kernel begins a block with every row, whatever the codes were made with.
    if torch.compiler.is_compiling() or weight.shape[1] % BLOCK:
        return scaled_levels(weight, absmax, shifts).to(dtype)
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight.codes, absmax, BLOCK, "nf4", weight.shape, dtype
    )


def nf4_as_float8(weight: Nf4, *, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight as float8 codes (out, in) and a scale for each row (out, 1), float32.

    Every block has a weight of its absmax or, after double quantisation, of what that became, so
    the largest absmax of a row's blocks is the largest weight of the row: no pass over the weights
    is needed to find it.

    Args:
        weight: in 4 bits.
        before: the other factor of the product that the weight is for; see `unpacking`.
    """
    absmax, shifts = unpacking(weight.absmax, list(weight.nested), before)
    out_features, in_features = weight.shape
    if in_features % BLOCK:  # some block reaches over two rows
        return quantise_rows(scaled_levels(weight, absmax, shifts))
    blocks = absmax.view(out_features, -1)
    scales = (blocks.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(_SMALLEST)
    return scaled_levels(weight, (blocks / scales).flatten(), shifts).to(E4M3), scales


def scaled_levels(weight: Nf4, factors: Tensor, shifts: Tensor) -> Tensor:
    """Return level * factor of its block for each weight, (out, in), float32.

    Args:
        weight: its codes and levels; the absmax are not read.
        factors: (blocks,), float32.
        shifts: (2,), uint8: the bits below the first and the second code in a byte.
    """
    out_features, in_features = weight.shape
    count = out_features * in_features
    places = (weight.codes.view(-1, 1) >> shifts) & 15
    levels = weight.levels[places.flatten().int()]
    missing = factors.numel() * BLOCK - levels.numel()
    if missing:
        levels = functional.pad(levels, (0, missing))
    return (levels.view(-1, BLOCK) * factors[:, None]).flatten()[:count].view(weight.shape)


@torch.library.custom_op("tunesmith::nf4_unpacking", mutates_args=())
def unpacking(absmax: Tensor, nested: Sequence[Tensor], before: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the codes of a weight are unpacked with.

    Args:
        absmax: see `Nf4`.
        nested: see `Nf4`.
        before: not read. A compiler sees that what is worked out from the results waits for this
            tensor. Otherwise it would find that the passes forward and backward work out the same
            weight, and keep that from one to the other.

    Returns:
        The absmax (blocks,), float32, and the shifts of `scaled_levels`.
    """
    del before
    shifts = torch.tensor([4, 0], dtype=torch.uint8, device=absmax.device)
    if not nested:
        return absmax.clone(), shifts
    levels, scales, offset = nested
    factors = scales.repeat_interleave(BLOCK_OF_SCALES)[: absmax.numel()]
    return levels[absmax.int()] * factors + offset, shifts


@unpacking.register_fake
def _(absmax: Tensor, nested: Sequence[Tensor], before: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(absmax, dtype=torch.float32), absmax.new_empty(2, dtype=torch.uint8)
