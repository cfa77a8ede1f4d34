"""A frozen linear map in float8: the products forward and backward are of 8-bit codes.

A row r of a matrix is kept as codes of e4m3 (Micikevicius et al. 2022, arXiv:2209.05433) and one
scale: r = s c, with s = max|r| / 448, 448 being the largest e4m3. For a weight W = diag(s) C:

    y  = x W^T      = diag(s_x) (C_x C^T) diag(s)
    dx = dy W       = (dy diag(s)) C = diag(s_g) (C_g C),   where dy diag(s) = diag(s_g) C_g

so the weight's scales go into the gradient before that is rounded, and one set of codes serves both
products: a scale for each row of W would be one for each term of the second sum, which no product
of codes can apply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.ops.turned_codes import E4M3, turned_codes

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

LARGEST: Final = torch.finfo(E4M3).max
"""448."""
CAPABILITY: Final = (8, 9)
"""CUDA's compute capability from which float8 is multiplied: Ada and Hopper."""
SMALLEST: Final = torch.finfo(torch.float32).tiny
"""A scale is at least this."""
_MULTIPLE: Final = 16
"""What cuBLAS and CUTLASS want the two widths of a float8 product to be multiples of."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of `x` and a scale for each row; x is nearly scales * codes.

    Plain tensor code, so that a compiler joins it with what computed `x`, and does it once where
    several maps read the same `x`.

    Args:
        x: (rows, width), any floating dtype.

    Returns:
        e4m3 (rows, width), and float32 (rows, 1), never 0: a row of zeros stays one. Scales are as
        small as float32 allows, since gradients of long batches are.
    """
    # No names of the module: the compiler makes sizes of its floats where lengths vary, and cannot
    # hand these into an operator of our own.
    largest, smallest = torch.finfo(E4M3).max, torch.finfo(torch.float32).tiny
    x = x.float()
    scales = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(smallest)
    return (x / scales).to(E4M3), scales


def fp8_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return x W^T for W = scales * codes; inputs are rounded row by row as well.

    Sums are float32; on CUDA the result is rounded to bfloat16, whatever the dtype of `x`, and
    elsewhere products are computed from the values of the codes: the same rounding, but slow.
    The weight gets no gradient, and nothing but its codes is saved for the backward pass.

    Args:
        x: (..., in), any floating dtype, which is the result's as well.
        codes: (out, in), int8: the bits of e4m3.
        scales: (out, 1), float32.

    Returns:
        (..., out).
    """
    y: Tensor = _Fp8Linear.apply(x.reshape(-1, x.shape[-1]), codes, scales)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], codes.shape[0])


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return scaled_product(*quantise_rows(x), codes.view(E4M3), scales, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return input_gradient(grad, turned_codes(codes, grad), scales), None, None


def input_gradient(grad: Tensor, turned: Tensor, scales: Tensor) -> Tensor:
    """Return dy W for W = scales * codes; see the equation above.

    Args:
        grad: (rows, out), any floating dtype, which is the result's as well.
        turned: (in, out), e4m3: the codes transposed, contiguous.
        scales: (out, 1), float32.

    Returns:
        (rows, in).
    """
    ones = torch.ones(turned.shape[0], 1, dtype=torch.float32, device=grad.device)
    return scaled_product(*quantise_rows(grad * scales.t()), turned, ones, dtype=grad.dtype)


def scaled_product(
    a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """Return diag(scales_a) a b^T diag(scales_b) in `dtype`.

    Args:
        a: (m, k), e4m3.
        scales_a: (m, 1), float32.
        b: (n, k), e4m3.
        scales_b: (n, 1), float32.
        dtype: of the result, which on CUDA was bfloat16 before.

    Returns:
        (m, n).
    """
    return _product(a, scales_a, b, scales_b, dtype)


# An operator and not plain code. Where an autograd.Function returns PyTorch's own float8 product
# through a cast that changes nothing, PyTorch 2.11 traces zeros for its gradient; and a compiler
# must not keep the float32 values of other devices for later.
@torch.library.custom_op("tunesmith::scaled_product", mutates_args=())
def _product(  # noqa: PLR0917 - operators have no keyword-only tensors
    a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor, dtype: torch.dtype
) -> Tensor:
    if a.is_cuda:
        return _on_cuda(a, scales_a, b, scales_b).to(dtype)
    with torch.autocast(a.device.type, enabled=False):
        product = a.float() @ b.float().t()
    return (product * scales_a * scales_b.t()).to(dtype)


@_product.register_fake
def _(  # noqa: PLR0917 - as above
    a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor, dtype: torch.dtype
) -> Tensor:
    del scales_a, scales_b
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _on_cuda(a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor) -> Tensor:
    """Return the product (m, n), bfloat16."""
    n = b.shape[0]
    a, b = _padded(a, rows=False), _padded(b, rows=True)
    scales_b = functional.pad(scales_b, (0, 0, 0, b.shape[0] - n))
    product = torch._scaled_mm(
        a,
        b.t(),
        scale_a=scales_a,
        scale_b=scales_b.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product if n == b.shape[0] else product[:, :n].contiguous()


def _padded(codes: Tensor, *, rows: bool) -> Tensor:
    """Return `codes` with zeros up to the next multiple of 16 columns, and rows where asked."""
    below = -codes.shape[0] % _MULTIPLE if rows else 0
    right = -codes.shape[1] % _MULTIPLE
    if not below and not right:
        return codes
    return functional.pad(codes.view(torch.int8), (0, right, 0, below)).view(E4M3)
