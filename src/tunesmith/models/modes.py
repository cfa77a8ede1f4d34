"""Modes that a model is in for a while: measuring instead of training, another precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Prepares:
    """A module that can have ready what it otherwise works out in every call."""

    def prepare(self, dtype: torch.dtype) -> None:
        """Have it ready for inputs of `dtype`, until `forget`; its weights stay as they are."""
        raise NotImplementedError

    def forget(self) -> None:
        """Work it out in every call again."""
        raise NotImplementedError


@contextmanager
def prepared(model: PreTrainedModel) -> Iterator[None]:
    """Let the parts of `model` have ready what they can, inside a `with` block without training.

    Under autocast nothing is: PyTorch keeps its own casts of the weights then.
    """
    ready = not torch.is_autocast_enabled(model.device.type)
    parts = [part for part in model.modules() if isinstance(part, Prepares)] if ready else []
    for part in parts:
        part.prepare(model.dtype)
    try:
        yield
    finally:
        for part in parts:
            part.forget()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and every part back into the mode it had."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def autocasting(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return a context in which products on `device` run in `dtype`; None leaves them as they are.

    Without a dtype autocast is off, whatever is around it.
    """
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
