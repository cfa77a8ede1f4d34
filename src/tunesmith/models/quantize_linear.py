"""Frozen linear maps whose weight is codes: plain modules around the products of tunesmith.ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from tunesmith.ops.fp8_linear import fp8_linear, quantise_rows
from tunesmith.ops.nf4_linear import nf4_linear
from tunesmith.ops.nf4_values import BLOCK, BLOCK_OF_SCALES, Nf4, nf4_weight
from tunesmith.ops.turned_codes import E4M3


class Fp8Linear(nn.Linear):
    """A linear map in float8, with a scale for each output feature; see `fp8_linear`.

    `weight` holds the bits of e4m3 as int8, (out, in), so that nothing takes the codes for numbers
    that could be cast or trained. The scales are no part of the state dict: a model is loaded from
    its plain weights.
    """

    scales: Tensor
    """(out, 1), float32."""

    def __init__(self, weight: Tensor) -> None:
        """Round `weight`, (out, in), on the device on which it lies; there is no bias yet."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        codes, scales = quantise_rows(weight)
        self.weight = nn.Parameter(codes.view(torch.int8), requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product (..., out) in the input's dtype."""
        y = fp8_linear(input, self.weight, self.scales)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def values(self) -> Tensor:
        """Return what the codes stand for, (out, in), float32."""
        return self.weight.view(E4M3).float() * self.scales

    def scale_tensors(self) -> list[Tensor]:
        """Return what is kept beside the codes."""
        return [self.scales]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return _without_casts(self, super()._apply, fn, recurse)


class Nf4Linear(nn.Linear):
    """A linear map in 4 bits, as bitsandbytes rounds it; see `nf4_linear`.

    `weight` holds two codes a byte, uint8, (ceil(out * in / 2), 1). The scales are no part of the
    state dict, as in `Fp8Linear`.
    """

    absmax: Tensor
    levels: Tensor
    absmax_levels: Tensor | None
    absmax_scales: Tensor | None
    absmax_offset: Tensor | None

    def __init__(self, weight: Tensor, library: Any, *, double: bool, float8: bool) -> None:
        """Round `weight`, (out, in), on the device on which it lies; there is no bias yet.

        Args:
            weight: any floating dtype.
            library: bitsandbytes.
            double: keep the scales in 8 bits as well.
            float8: products are float8's.
        """
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        codes, state = library.functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
        )
        self.float8 = float8
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("levels", state.code.float(), persistent=False)
        self.register_buffer("absmax", state.absmax, persistent=False)
        nested: tuple[Tensor | None, ...] = (None, None, None)
        if double:
            assert state.state2.blocksize == BLOCK_OF_SCALES  # noqa: S101 - the library's layout
            nested = (state.state2.code, state.state2.absmax, state.offset)
        for name, tensor in zip(_NESTED, nested, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product (..., out) in the input's dtype."""
        y = nf4_linear(input, self.stored(), float8=self.float8)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def values(self) -> Tensor:
        """Return what the codes stand for, (out, in), float32."""
        return nf4_weight(self.stored(), torch.float32, before=self.absmax)

    def scale_tensors(self) -> list[Tensor]:
        """Return what is kept beside the codes, but for the tables, which are the same for all."""
        nested = (self.absmax_scales, self.absmax_offset)
        return [self.absmax, *(tensor for tensor in nested if tensor is not None)]

    def stored(self) -> Nf4:
        """Return the codes and all that they are read with."""
        nested = (self.absmax_levels, self.absmax_scales, self.absmax_offset)
        return Nf4(
            (self.out_features, self.in_features),
            self.weight,
            self.levels,
            self.absmax,
            tuple(tensor for tensor in nested if tensor is not None),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return _without_casts(self, super()._apply, fn, recurse)


def multiplies_in_float8(module: nn.Module) -> bool:
    """Return whether a linear map in `module` multiplies codes of float8."""
    return any(
        isinstance(part, Fp8Linear) or (isinstance(part, Nf4Linear) and part.float8)
        for part in module.modules()
    )


_NESTED = ("absmax_levels", "absmax_scales", "absmax_offset")


def _without_casts(module: Any, apply: Any, fn: Any, recurse: bool) -> Any:
    """Move the module as `apply` does, but leave its scales float32 where others are cast."""
    before = {name: buffer.dtype for name, buffer in module.named_buffers(recurse=False)}
    kept = dict(module.named_buffers(recurse=False))
    apply(fn, recurse)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.dtype != before[name]:
            setattr(module, name, kept[name].to(buffer.device))
    return module
