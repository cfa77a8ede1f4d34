"""The float8 linear map against its formulas in float64, with the rounding that they state."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.ops.fp8_linear import fp8_linear, quantise_rows
from tunesmith.ops.turned_codes import E4M3

SHAPES = [(5, 64, 48), (1, 16, 16), (7, 30, 9), (33, 48, 17), (2, 1, 1)]
shapes = pytest.mark.parametrize(("rows", "width", "out"), SHAPES)


def steps(x: Tensor) -> Tensor:
    """The nearest e4m3 to each number, ties to even, worked out from its definition in float64.

    Three bits after the leading one, exponents from -6, and below 2^-6 steps of 2^-9.
    """
    exponent = torch.floor(torch.log2(x.abs().clamp_min(2.0**-20))).clamp_min(-6)
    step = 2.0 ** (exponent - 3)
    return torch.round(x / step) * step


def rounded(x: Tensor) -> Tensor:
    """Each row with its codes' values, float64; the scale is float32's, as kept."""
    scales = (x.float().abs().amax(-1, keepdim=True) / 448).double()
    return steps((x.float() / scales.float()).double()) * scales


def case(rows: int, width: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows + width + out)
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    return x, torch.randn(out, width), torch.randn(rows, out).to(dtype)


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = quantise_rows(weight)
    return codes.view(torch.int8), scales


@shapes
def test_the_product_is_that_of_rounded_rows(rows: int, width: int, out: int) -> None:
    x, weight, _ = case(rows, width, out, torch.float32)
    y = fp8_linear(x, *codes_of(weight))
    expected = rounded(x.detach()) @ rounded(weight).T
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@shapes
def test_the_gradient_is_that_of_the_rounded_scaled_gradient(
    rows: int, width: int, out: int
) -> None:
    x, weight, grad = case(rows, width, out, torch.float32)
    codes, scales = codes_of(weight)
    fp8_linear(x, codes, scales).backward(grad)
    expected = rounded(grad * scales.T) @ codes.view(E4M3).double()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_goes_in_and_comes_out() -> None:
    x, weight, grad = case(5, 64, 48, torch.bfloat16)
    y = fp8_linear(x, *codes_of(weight))
    y.backward(grad)
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    exact = rounded(x.detach()) @ rounded(weight).T
    torch.testing.assert_close(y, exact.bfloat16())


def test_leading_dimensions_stay() -> None:
    x, weight, _ = case(6, 32, 48, torch.float32)
    flat = fp8_linear(x, *codes_of(weight))
    assert torch.equal(fp8_linear(x.view(2, 3, 32), *codes_of(weight)), flat.view(2, 3, 48))


def test_a_row_of_other_length_beside_it_changes_nothing() -> None:
    x, weight, _ = case(6, 32, 48, torch.float32)
    larger = torch.cat([x.detach(), 1e6 * torch.ones(1, 32)])
    codes = codes_of(weight)
    torch.testing.assert_close(fp8_linear(larger, *codes)[:6], fp8_linear(x, *codes).detach())


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-40, 2.0**40])
def test_gradients_of_any_size_keep_their_digits(scale: float) -> None:
    x, weight, grad = case(5, 64, 48, torch.float32)
    codes = codes_of(weight)
    (one,) = torch.autograd.grad(fp8_linear(x, *codes), x, grad)
    (other,) = torch.autograd.grad(fp8_linear(x, *codes), x, grad * scale)
    assert torch.equal(other, one * scale)


def test_a_row_of_zeros_stays_zero() -> None:
    codes, scales = quantise_rows(torch.zeros(2, 16))
    assert torch.equal(codes.float() * scales, torch.zeros(2, 16))
    assert (scales > 0).all()


def test_the_largest_of_a_row_is_exact() -> None:
    x, _, _ = case(5, 64, 48, torch.float32)
    codes, _ = quantise_rows(x.detach())
    assert torch.equal(codes.float().abs().amax(-1), torch.full((5,), 448.0))


def test_what_is_not_finite_is_not_hidden() -> None:
    x = torch.ones(1, 16)
    x[0, 3] = torch.inf
    assert fp8_linear(x, *codes_of(torch.ones(16, 16))).isnan().all()


def test_nothing_but_the_codes_is_saved() -> None:
    x, weight, _ = case(5, 64, 48, torch.float32)
    codes, scales = codes_of(weight)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fp8_linear(x, codes, scales)
    assert {t.data_ptr() for t in saved} == {codes.data_ptr(), scales.data_ptr()}


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_are_known_without_numbers(device: str) -> None:
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        x = torch.empty(2, 3, 30, dtype=torch.bfloat16, requires_grad=True)
        y = fp8_linear(x, torch.empty(9, 30, dtype=torch.int8), torch.empty(9, 1))
        y.sum().backward()
    assert y.shape == (2, 3, 9)
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.shape == x.shape
