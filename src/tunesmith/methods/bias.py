"""Biases that train in float32 without changing the base's own."""

from __future__ import annotations

from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import MethodError
from tunesmith.methods.child import Child, base_modules
from tunesmith.methods.places import column_index
from tunesmith.models.family import Columns
from tunesmith.models.heads import head_paths

ADD_THEIR_BIAS_LAST: Final = (nn.Linear, Conv1D, nn.LayerNorm)
"""Modules whose output is something + bias, so that another bias can be put in afterwards."""


class Bias(Child):
    """Another bias b in place of the module's own b0: h + (b - b0).

    b is float32 and starts as b0. The base keeps its dtype, so bfloat16 models need no autocast.

    Args:
        own: b0 (out,).
        columns: the outputs whose bias trains; None is all of them.
    """

    turn: ClassVar[int] = 1
    by_row: ClassVar[bool] = True
    replaces: ClassVar[tuple[str, ...]] = ("bias",)
    columns: Tensor | None

    def __init__(self, own: Tensor, columns: Columns | None = None) -> None:
        super().__init__()
        self.register_buffer("columns", column_index(columns), persistent=False)
        start = own.detach().to(torch.float32, copy=True)
        if self.columns is not None:
            self.columns = self.columns.to(own.device)
            start = start[self.columns]
        self.value = nn.Parameter(start)

    def whole(self, own: Tensor) -> Tensor:
        """Return b over all outputs (out,), as in b0 `own` where it does not reach."""
        if self.columns is None:
            return self.value
        return own.float().index_copy(0, self.columns, self.value)

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output` (..., out) with this bias in place of the module's own."""
        own: Tensor = module.bias  # type: ignore[assignment]  # only modules with a bias come here
        return output + (self.whole(own) - own).to(output.dtype)


class AddedBias(Bias):
    """A bias b, zero at the start, for a linear map that has none: W x + b."""

    replaces: ClassVar[tuple[str, ...]] = ()

    def __init__(self, out_features: int, columns: Columns | None, device: torch.device) -> None:
        super().__init__(torch.zeros(out_features, device=device), columns)
        self.out_features = out_features

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output` (..., out) + b."""
        none = self.value.new_zeros(self.out_features)
        return output + self.whole(none).to(output.dtype)


def modules_with_bias(model: nn.Module, *, advice: str = "method.bias: use none") -> list[str]:
    """Return the paths of all base modules that have a bias.

    Args:
        model: the base model, perhaps with adapters on it.
        advice: the setting that leaves such a module alone, for the error message.

    Raises:
        MethodError: a module's bias is used in a way that is not known.
    """
    found = []
    head = head_paths(model)
    for path, module in base_modules(model):
        if path in head or path.startswith(tuple(f"{part}." for part in head)):
            continue  # a classification head trains whole, with every method
        bias = dict(module.named_parameters(recurse=False)).get("bias")
        # BERT's head names the bias of the linear map inside it as its own.
        if bias is None or _is_of_a_child(bias, module):
            continue
        if not isinstance(module, ADD_THEIR_BIAS_LAST):
            key, _, use = advice.partition(": ")
            raise MethodError(
                f"{key}: {path} is a {type(module).__name__}, and how it uses its bias is not "
                f"known; {use}"
            )
        found.append(path)
    return found


def _is_of_a_child(bias: Tensor, module: nn.Module) -> bool:
    """Return whether `bias` belongs to a module inside `module`."""
    return any(bias is p for child in module.children() for p in child.parameters())
