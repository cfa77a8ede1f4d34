"""A value function's head: one number from each hidden state, beside the language model's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.methods.child import Child, ChildAttachment, require_free
from tunesmith.methods.contract import Method
from tunesmith.models.sites import Sites

PATH = "value_head"


class ValueChild(Child):
    """V = w h + b in float32, 0 for every state at the start."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, device=device))
        self.bias = nn.Parameter(torch.zeros((), device=device))
        self.role: Callable[[], AbstractContextManager[object]] = nullcontext
        """Inside it the model's states are those that the values are read from."""

    def register_on(self, parent: nn.Module) -> None:
        """Register nothing: the objective calls it with the states."""
        del parent

    def forward(self, hidden: Tensor) -> Tensor:
        """Return V, (...) float32, of states (..., width)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.to(self.weight.dtype) @ self.weight + self.bias


class ValueHead(Method):
    """Put a value head on a language model; it changes nothing else."""

    default_learning_rate: ClassVar[float] = 1e-3

    name: Literal["value_head"] = "value_head"
    """A value function's head."""

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> ChildAttachment:
        """Hang the head in `model`.

        Raises:
            MethodError: it has one already.
        """
        del sites
        require_free(model, "", PATH, name)
        assert isinstance(model, PreTrainedModel)  # noqa: S101 - what methods are attached to
        width = model.config.get_text_config().hidden_size
        child = ValueChild(width, model.device)
        return ChildAttachment(model, {PATH: child})
