"""The 4-bit linear map against bitsandbytes' own, and against its formula."""

import pytest
import torch
from torch import Tensor

from tunesmith.models.quantize_linear import Nf4Linear
from tunesmith.ops.fp8_linear import fp8_linear
from tunesmith.ops.nf4_linear import nf4_linear
from tunesmith.ops.nf4_values import absmax_values, nf4_as_float8, nf4_weight, scaled_levels

bnb = pytest.importorskip("bitsandbytes")
double = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
ROUNDED = 2.0**-4
"""Largest step of e4m3 relative to a number that is not below its normal range: half of 2^-3."""


def made(out: int, width: int, *, double: bool, dtype: torch.dtype = torch.float32) -> Nf4Linear:
    torch.manual_seed(out + width)
    return Nf4Linear(torch.randn(out, width).to(dtype), bnb, double=double, float8=False)


def by_loop(module: Nf4Linear) -> Tensor:
    """The weight, code by code: a byte's upper half first, 64 to a scale, in float32."""
    weight = module.stored()
    absmax = absmax_values(weight)
    levels = bnb.functional.get_4bit_type("nf4", device="cpu").tolist()
    places = [half for byte in weight.codes.flatten().tolist() for half in divmod(byte, 16)]
    count = module.out_features * module.in_features
    values = [
        torch.tensor(levels[place], dtype=torch.float32) * absmax[i // 64]
        for i, place in enumerate(places[:count])
    ]
    return torch.stack(values).view(module.out_features, module.in_features)


@double
@pytest.mark.parametrize(("out", "width"), [(6, 64), (10, 30), (7, 9), (3, 100)])
def test_the_weight_is_level_times_absmax(out: int, width: int, double: bool) -> None:
    module = made(out, width, double=double)
    found = nf4_weight(module.stored(), torch.float32, before=module.absmax)
    assert torch.equal(found, by_loop(module))


@double
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_code_and_the_librarys_operator_agree(double: bool, dtype: torch.dtype) -> None:
    weight = made(48, 192, double=double).stored()
    plain = scaled_levels(weight, absmax_values(weight)).to(dtype)
    assert torch.equal(plain, nf4_weight(weight, dtype, before=weight.absmax))


@double
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_librarys_module(
    double: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 192).to(dtype)
    theirs = bnb.nn.Linear4bit(192, 48, False, compute_dtype=dtype)
    theirs.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type="nf4", module=theirs
    ).to("cpu")
    ours = Nf4Linear(weight, bnb, double=double, float8=False)
    x, grad = torch.randn(5, 192).to(dtype), torch.randn(5, 48).to(dtype)
    found, expected = (outcome(module, x, grad) for module in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def outcome(module: torch.nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, grad)
    return y.detach(), dx


@double
def test_a_bias_and_leading_dimensions(double: bool) -> None:
    module = made(10, 64, double=double)
    module.bias = torch.nn.Parameter(torch.randn(10))
    x = torch.randn(2, 3, 64)
    expected = torch.nn.functional.linear(x, by_loop(module), module.bias)
    torch.testing.assert_close(module(x), expected)


@double
@pytest.mark.parametrize("width", [128, 48])
def test_float8_codes_are_the_nearest_to_the_weight(width: int, double: bool) -> None:
    module = made(24, width, double=double)
    codes, scales = nf4_as_float8(module.stored(), before=module.absmax)
    assert torch.equal(codes.float().abs().amax(-1), torch.full((24,), 448.0))
    # One step below the normal range is 2^-9, so at most half of it is lost there.
    off = (codes.float() * scales - by_loop(module)).abs()
    assert (off <= (ROUNDED * by_loop(module).abs()).maximum(2.0**-10 * scales)).all()


@double
@pytest.mark.parametrize("width", [128, 48])
def test_float8_products_are_those_of_the_float8_codes(width: int, double: bool) -> None:
    weight = made(24, width, double=double).stored()
    codes, scales = nf4_as_float8(weight, before=weight.absmax)
    x = torch.randn(5, width, requires_grad=True)
    grad = torch.randn(5, 24)
    y, expected = nf4_linear(x, weight, float8=True), fp8_linear(x, codes.view(torch.int8), scales)
    assert torch.equal(y, expected)
    (dx,), (own,) = (torch.autograd.grad(out, x, grad) for out in (y, expected))
    assert torch.equal(dx, own)


@pytest.mark.parametrize("float8", [False, True])
def test_nothing_but_codes_is_saved(float8: bool) -> None:
    module = made(64, 128, double=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nf4_linear(torch.randn(5, 128, requires_grad=True), module.stored(), float8=float8)
    assert sum(t.nbytes for t in saved) < 64 * 128 * 0.75
