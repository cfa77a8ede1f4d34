"""A frozen linear map in 4 bits, nf4 (Dettmers et al. 2023, arXiv:2305.14314, section 3).

A weight is flattened row by row and cut into blocks of 64; w = absmax_block * level[code], with 16
levels from -1 to 1, two codes in a byte, the first in the upper half. With double quantisation, the
absmax are 8-bit codes themselves: absmax = level'[code'] * scale' + offset, a scale' for each 256.
Codes and layout are bitsandbytes'.

The values are worked out for every product and live no longer than it; see `nf4_values`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.ops.fp8_linear import input_gradient, quantise_rows, scaled_product
from tunesmith.ops.nf4_values import Nf4, nf4_as_float8, nf4_weight


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
        turned, scales = nf4_as_float8(_nf4(ctx.shape, tensors), before=grad, turned=True)
        return input_gradient(grad, turned, scales), *[None] * (1 + len(tensors))


def _nf4(shape: tuple[int, int], tensors: Sequence[Tensor]) -> Nf4:
    codes, levels, absmax, *nested = tensors
    return Nf4(shape, codes, levels, absmax, tuple(nested))
