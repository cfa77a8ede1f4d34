"""Comparing, copying and gathering named tensors, whole or sharded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from tunesmith.errors import AdapterError


def check_against(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """Check that `state` holds exactly the tensors expected, by name and shape.

    Raises:
        AdapterError: a tensor is missing, is not expected, or has another shape; the first is
            named.
    """
    if missing := sorted(expected.keys() - state.keys()):
        raise AdapterError(
            f"{_some(missing)} missing: the adapter does not hold all that this model needs; "
            "it is damaged or made for another model"
        )
    if unexpected := sorted(state.keys() - expected.keys()):
        raise AdapterError(
            f"{_some(unexpected)} not expected: the adapter holds more than this model has a "
            "place for; it is damaged or made for another model"
        )
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise AdapterError(
                f"{name} has shape {tuple(state[name].shape)} in the adapter but needs "
                f"{tuple(shape)}; the adapter belongs to a model of another size"
            )


def _some(names: list[str]) -> str:
    """Return the first name, and how many more there are, with the verb."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy `value`, a whole tensor, into `target`, which may be sharded."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            value = distribute_tensor(
                value.to(target.device), target.device_mesh, list(target.placements)
            )
        target.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    """Return `tensor` whole, detached and on the CPU; every process calls it where sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
