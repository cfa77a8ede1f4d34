"""Linear maps whose weight is codes, for a simulated step: what their products keep and need.

The modules that compute with codes want a library, a GPU's kernels, or weights to make the codes
of. These stand-ins make the tensors that those make on their way, in the same order, and no values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.ops.fp8_linear import fp8_linear
from tunesmith.ops.nf4_linear import nf4_linear
from tunesmith.ops.nf4_values import BLOCK, BLOCK_OF_SCALES, Nf4

Codes = Literal["fp8", "nf4", "int8"]

_OUTLIER: Final = 6.0


class Held(NamedTuple):
    """How weights are held."""

    codes: Codes
    double: bool
    """nf4: the scales are codes as well."""
    float8: bool
    """nf4: products are float8's."""
    device: str
    """`cuda` or `cpu`, on which int8 is multiplied in other ways."""


def hold_codes(modules: Iterable[Any], held: Held) -> None:
    """Give each of these frozen linear maps codes in the place of its weight, on the meta device.

    Hooks and children stay; what a module computes afterwards has the right shape and memory, and
    no meaning.
    """
    for module in modules:
        shape = tuple(module.weight.shape)
        module.code_shape = shape[::-1] if isinstance(module, Conv1D) else shape
        module.held = held
        module.__class__ = _Coded
        for name, tensor in _stored(module.code_shape, held).items():
            kept = nn.Parameter(tensor, requires_grad=False)
            # Scales are parameters here: whatever a module holds counts as weights.
            module.register_parameter(name, kept)


def _stored(shape: tuple[int, int], held: Held) -> dict[str, Tensor]:
    """Return codes and scales of a weight (out, in)."""
    out_features, in_features = shape
    if held.codes != "nf4":
        scales = {"scales": _empty((out_features, 1), torch.float32)}
        return {"weight": _empty(shape, torch.int8), **scales}
    blocks = -(-out_features * in_features // BLOCK)
    stored = {"weight": _empty((-(-out_features * in_features // 2), 1), torch.uint8)}
    if not held.double:
        return stored | {"scales": _empty((blocks,), torch.float32)}
    nested = _empty((-(-blocks // BLOCK_OF_SCALES),), torch.float32)
    return stored | {"scales": _empty((blocks,), torch.uint8), "nested": nested}


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Coded(nn.Linear):
    """A linear map whose weight is codes."""

    code_shape: tuple[int, int]
    held: Held
    scales: Tensor
    nested: Tensor
    """nf4 with codes for scales."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out) for `input` (..., in)."""
        x = input
        if self.held.codes == "int8" and self.bias is not None:
            x = x.to(self.bias.dtype)
        rows = x.reshape(-1, x.shape[-1])
        y = self._product(rows).view(*x.shape[:-1], self.code_shape[0])
        # bitsandbytes adds the bias inside its product, at no memory of its own.
        return y if self.bias is None or self.held.codes == "int8" else y + self.bias.to(y.dtype)

    def _product(self, rows: Tensor) -> Tensor:
        if self.held.codes == "fp8":
            return fp8_linear(rows, self.weight, self.scales)
        if self.held.codes == "nf4":
            return nf4_linear(rows, _as_nf4(self), float8=self.held.float8)
        function: Any = _Int8 if self.held.device == "cuda" else _Int8OnCpu
        product: Tensor = function.apply(rows, self)
        return product


def _as_nf4(module: _Coded) -> Nf4:
    """Return what the product reads; tables of a few numbers are new ones."""
    scales = module.scales
    levels = scales.new_empty(16, dtype=torch.float32)
    nested: tuple[Tensor, ...] = ()
    if module.held.double:
        table = scales.new_empty(BLOCK_OF_SCALES, dtype=torch.float32)
        nested = (table, module.nested, scales.new_empty((), dtype=torch.float32))
    return Nf4(module.code_shape, module.weight, levels, scales, nested)


class _Int8(torch.autograd.Function):
    """bitsandbytes' product on CUDA: the input is rounded too, and its own dtype is kept.

    No input has outliers here: how many columns have them, weights alone do not say.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: _Coded) -> Tensor:
        ctx.x = x  # kept, although a frozen weight does not need it
        # Tensors and not the module, whose own are others while a block is traced.
        ctx.weight = (module.weight, module.scales)
        codes = _rounded(x)
        sums = codes.new_empty(len(x), module.code_shape[0], dtype=torch.int32)
        return sums.to(torch.float16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ _int8_values(ctx.x.dtype, *ctx.weight), None


def _rounded(x: Tensor) -> Tensor:
    half = x.to(torch.float16)
    codes = torch.empty_like(half, dtype=torch.int8)
    outliers = half.abs() >= _OUTLIER
    del half, outliers
    return codes


def _int8_values(dtype: torch.dtype, weight: Tensor, scales: Tensor) -> Tensor:
    return weight.to(dtype, copy=True).mul_(scales)


class _Int8OnCpu(torch.autograd.Function):
    """bitsandbytes' product on the CPU: the weight is worked out, and the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: _Coded) -> Tensor:
        ctx.x, ctx.weight = x, (module.weight, module.scales)
        return x @ _int8_values(x.dtype, *ctx.weight).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ _int8_values(ctx.x.dtype, *ctx.weight), None
