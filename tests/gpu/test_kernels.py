"""Kernels of our own against plain code. TRITON_INTERPRET=1 runs them without a GPU."""

import os

import pytest
import torch
from torch import Tensor

from tunesmith.models.quantize_linear import Nf4Linear
from tunesmith.ops.nf4_values import Nf4, absmax_values, rounded_levels, scaled_levels

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not INTERPRETED, reason="needs a CUDA device"
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
double = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
# One block and several a row, rows and blocks that do not fill a tile, and tiles that they fill.
SHAPES = [(3, 64), (130, 192), (9, 576), (256, 1024)]
shapes = pytest.mark.parametrize(("out", "width"), SHAPES)


def made(out: int, width: int, *, double: bool) -> Nf4:
    torch.manual_seed(out + width)
    weight = torch.randn(out, width) * torch.logspace(-2, 2, out)[:, None]
    return Nf4Linear(weight.to(DEVICE), bnb, double=double, float8=True).stored()


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (1, 200), (200, 1), (130, 257), (128, 256)])
def test_a_matrix_of_bytes_is_turned(shape: tuple[int, int]) -> None:
    from tunesmith.ops.turned_kernel import turned

    matrix = torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)
    found = turned(matrix)
    assert torch.equal(found, matrix.t())
    assert found.is_contiguous()


@shapes
@double
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_plain_code(
    out: int, width: int, double: bool, dtype: torch.dtype
) -> None:
    from tunesmith.ops.nf4_kernel import unpacked_values

    weight = made(out, width, double=double)
    found = unpacked_values(weight, dtype)
    expected = scaled_levels(weight, absmax_values(weight)).to(dtype)
    if INTERPRETED and dtype == torch.bfloat16:  # which the interpreter cuts off
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, expected)


@shapes
@double
@pytest.mark.parametrize("turned", [False, True])
def test_float8_codes_are_those_of_plain_code(
    out: int, width: int, double: bool, turned: bool
) -> None:
    from tunesmith.ops.nf4_kernel import unpacked_float8

    weight = made(out, width, double=double)
    codes, scales = unpacked_float8(weight, turned=turned)
    expected, own = rounded_levels(weight)
    torch.testing.assert_close(scales, own, rtol=1e-6, atol=0)  # a last bit of the quotient
    if turned:
        codes = codes.t()
    assert wrong(codes, expected.view(torch.int8)) < 1e-3


def wrong(codes: Tensor, expected: Tensor) -> float:
    """The share of codes that differ: quotients between two codes, after a last bit of a scale."""
    differ = codes != expected
    if INTERPRETED:  # it forgets to carry where rounding up reaches a power of two
        differ &= (expected & 7) != 0
    return float(differ.float().mean())
