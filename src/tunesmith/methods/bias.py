"""Biases that train in float32 without changing the base's own."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import MethodError
from tunesmith.methods.child import Child, base_modules

ADD_THEIR_BIAS_LAST: Final = (nn.Linear, Conv1D, nn.LayerNorm)
"""Modules whose output is something + bias, so that another bias can be put in afterwards."""


class Bias(Child):
    """Another bias b in place of the module's own b0: h + (b - b0).

    b is float32 and starts as b0. The base keeps its dtype, so bfloat16 models need no autocast.
    """

    def __init__(self, own: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(own.detach().to(torch.float32, copy=True))

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output` (..., out) with this bias in place of the module's own."""
        own: Tensor = module.bias  # type: ignore[assignment]  # only modules with a bias come here
        return output + (self.value - own).to(output.dtype)


def modules_with_bias(model: nn.Module) -> list[str]:
    """Return the paths of all base modules that have a bias.

    Raises:
        MethodError: a module's bias is used in a way that is not known.
    """
    found = []
    for path, module in base_modules(model):
        if dict(module.named_parameters(recurse=False)).get("bias") is None:
            continue
        if not isinstance(module, ADD_THEIR_BIAS_LAST):
            raise MethodError(
                f"method.bias: {path} is a {type(module).__name__}, and how it uses its bias is "
                "not known; use bias none"
            )
        found.append(path)
    return found
