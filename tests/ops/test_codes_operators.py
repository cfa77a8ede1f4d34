"""The operators on codes: what a compiler is told of them is what they do."""

import pytest
import torch
from torch import Tensor

from tunesmith.models.quantize_linear import Nf4Linear
from tunesmith.ops.nf4_values import Nf4, nf4_as_float8, nf4_weight
from tunesmith.ops.turned_codes import turned_codes

bnb = pytest.importorskip("bitsandbytes")
BEFORE = torch.ones(2, 3)
double = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
shapes = pytest.mark.parametrize(("out", "width"), [(6, 64), (10, 30), (1, 9), (7, 128)])


def made(out: int, width: int, *, double: bool) -> Nf4:
    torch.manual_seed(out + width)
    return Nf4Linear(torch.randn(out, width), bnb, double=double, float8=True).stored()


def arguments(weight: Nf4) -> tuple[Tensor | list[Tensor], ...]:
    shape, codes, levels, absmax, nested = weight
    return codes, levels, absmax, list(nested), BEFORE, shape


@pytest.mark.parametrize("shape", [(5, 9), (1, 7), (7, 1), (1, 1), (64, 48)])
def test_codes_are_turned_into_a_tensor_of_their_own(shape: tuple[int, int]) -> None:
    codes = torch.randint(-100, 100, shape, dtype=torch.int8)
    found = turned_codes(codes, BEFORE)
    assert torch.equal(found.view(torch.int8), codes.t())
    assert found.is_contiguous()
    assert found.data_ptr() != codes.data_ptr()
    torch.library.opcheck(turned_codes, (codes, BEFORE), test_utils=FAKE)


# What the operators say of shapes, dtypes and aliases; they have no gradients.
FAKE = ("test_schema", "test_faketensor")


@shapes
@double
def test_4_bit_operators_are_what_a_compiler_is_told(out: int, width: int, double: bool) -> None:
    given = arguments(made(out, width, double=double))
    operators = torch.ops.tunesmith
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(operators.nf4_values.default, (*given, dtype), test_utils=FAKE)
    for turned in (False, True):
        torch.library.opcheck(operators.nf4_float8.default, (*given, turned), test_utils=FAKE)


@shapes
@double
def test_turned_float8_codes_are_the_others_turned(out: int, width: int, double: bool) -> None:
    weight = made(out, width, double=double)
    codes, scales = nf4_as_float8(weight, before=BEFORE)
    turned, own = nf4_as_float8(weight, before=BEFORE, turned=True)
    assert torch.equal(turned.view(torch.int8), codes.view(torch.int8).t())
    assert turned.is_contiguous()
    assert torch.equal(own, scales)


@double
def test_a_16_bit_weight_is_the_32_bit_one_rounded(double: bool) -> None:
    weight = made(7, 128, double=double)
    exact = nf4_weight(weight, torch.float32, before=BEFORE)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(nf4_weight(weight, dtype, before=BEFORE), exact.to(dtype))
