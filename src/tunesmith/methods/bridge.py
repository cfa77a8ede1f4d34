"""Float32 modules inside a model of another dtype: their inputs go up, their outputs come down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


def bridges(
    model: nn.Module, dtypes: Mapping[str, torch.dtype], *, down: bool = True
) -> list[RemovableHandle]:
    """Hook every module that directly owns a parameter in `dtypes` so that it fits its neighbours.

    Without them a float32 layer in a bfloat16 model fails outside autocast, in `generate` say.
    While the parameters have the neighbours' dtype (switched off, merged) the hooks do nothing.

    Args:
        model: whose parameters are meant.
        dtypes: dtype of the neighbours by parameter name; float32 needs no bridge.
        down: bring outputs down too; not where only such modules follow, as in a head.

    Returns:
        Handles that remove the hooks.
    """
    outside = {
        name.rpartition(".")[0]: dtype for name, dtype in dtypes.items() if dtype != torch.float32
    }
    handles: list[RemovableHandle] = []
    for path, dtype in outside.items():
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(_up))
        if down:
            handles.append(module.register_forward_hook(_Down(dtype)))
    return handles


def _up(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Bring the first input to the dtype of the module's parameters; autocast does so by itself."""
    own = next(module.parameters(recurse=False)).dtype
    x = args[0]
    if torch.is_autocast_enabled(x.device.type) or not x.is_floating_point() or x.dtype == own:
        return None
    return (x.to(own), *args[1:])


class _Down:
    """Brings a module's output back to its neighbours' dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # A router gives a tuple: the shares of the experts are float32 in the base as well, and
        # who multiplies by them brings the product back.
        return output.to(self.dtype) if isinstance(output, Tensor) else output
