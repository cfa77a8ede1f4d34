"""The codes of a float8 weight turned, for the product of the backward pass.

Products want both factors row by row along the sum: dx = dy W sums over W's rows, so it wants W^T
laid out row by row. Keeping that beside W would double the memory of a frozen weight, so it is made
for every product and lives no longer.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

E4M3: Final = torch.float8_e4m3fn


# An operator and not plain code: a compiler must not find that the copy depends on the weight alone
# and make it in the forward pass, to be kept. So it also takes what it has to wait for.
@torch.library.custom_op("tunesmith::turned_codes", mutates_args=())
def turned_codes(codes: Tensor, before: Tensor) -> Tensor:
    """Return e4m3 (in, out), contiguous, from the bits of e4m3.

    Args:
        codes: (out, in), int8.
        before: not read; the other factor of the product, without which the copy is not made.
    """
    del before
    if codes.is_cuda:
        from tunesmith.ops.turned_kernel import turned

        return turned(codes).view(E4M3)
    # A clone: a single row or column would be a view of what it came from.
    return codes.t().clone(memory_format=torch.contiguous_format).view(E4M3)


@turned_codes.register_fake
def _(codes: Tensor, before: Tensor) -> Tensor:
    del before
    return codes.new_empty(codes.shape[1], codes.shape[0], dtype=E4M3)
