"""How AdaLoRA decides which singular values stay (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tunesmith.methods.tensors import copy_into

if TYPE_CHECKING:
    from tunesmith.types import JSON


@dataclass(frozen=True)
class Schedule:
    """The cubic budget (eq. 12): how many singular values are kept after each step."""

    warmup: int
    """t_i, steps before anything is dropped."""
    final: int
    """t_f, steps at the end in which the choice is frozen."""
    interval: int
    """Delta_T, steps between two choices."""
    start: int
    """b(0), singular values at the start."""
    target: int
    """b(T), singular values at the end."""

    def budget(self, step: int, total: int) -> int | None:
        """Return b(t) where step t of `total` chooses anew, or None where it does not."""
        end = total - self.final
        if step == end:
            return self.target
        if step <= self.warmup or step > end or step % self.interval:
            return None
        left = 1 - (step - self.warmup) / (end - self.warmup)
        return int(self.target + (self.start - self.target) * left**3)


@dataclass
class Importance:
    """Smoothed sensitivity times uncertainty of every element (eq. 8 to 11)."""

    beta1: float
    beta2: float
    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    """Moving average of I = |w dL/dw| by the parameter's name."""
    uncertainty: dict[str, Tensor] = field(default_factory=dict)
    """Moving average of |I - its moving average|."""

    @torch.no_grad()
    def update(self, name: str, parameter: Tensor) -> None:
        """Take in the gradient that `parameter` has."""
        gradient = parameter.grad
        now = torch.zeros_like(parameter) if gradient is None else (parameter * gradient).abs()
        before = self.sensitivity.get(name, torch.zeros_like(now))
        smooth = self.beta1 * before + (1 - self.beta1) * now
        before = self.uncertainty.get(name, torch.zeros_like(now))
        self.sensitivity[name] = smooth
        self.uncertainty[name] = self.beta2 * before + (1 - self.beta2) * (now - smooth).abs()

    def score(self, name: str) -> Tensor:
        """Return s = I U of every element of the parameter `name`, whole."""
        return full(self.sensitivity[name] * self.uncertainty[name])

    def clear(self) -> None:
        """Forget everything: the choice is made."""
        self.sensitivity.clear()
        self.uncertainty.clear()

    def state(self) -> dict[str, JSON]:
        """Return both averages, exactly."""
        return {
            "sensitivity": {name: _text(t) for name, t in self.sensitivity.items()},
            "uncertainty": {name: _text(t) for name, t in self.uncertainty.items()},
        }

    def load(self, state: Mapping[str, Mapping[str, str]], like: Mapping[str, Tensor]) -> None:
        """Take over a saved `state`.

        Args:
            state: both averages.
            like: the parameters by name.
        """
        for kept, saved in (
            (self.sensitivity, state["sensitivity"]),
            (self.uncertainty, state["uncertainty"]),
        ):
            kept.clear()
            kept.update({name: _tensor(text, like[name]) for name, text in saved.items()})


def full(tensor: Tensor) -> Tensor:
    """Return `tensor` whole; every process calls it where sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def keep_best(scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Return which of all `scores` are among the `budget` highest, by name.

    Ties with the highest that goes are dropped too, as in the authors' code.
    """
    together = torch.cat([score.flatten() for score in scores.values()])
    drop = together.numel() - budget
    if drop <= 0:
        return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    threshold = together.kthvalue(drop).values
    return {name: score > threshold for name, score in scores.items()}


def _text(tensor: Tensor) -> str:
    """Return the bytes of a float32 tensor as base64: JSON numbers would be five times as long."""
    return base64.b64encode(full(tensor).cpu().numpy().tobytes()).decode("ascii")


def _tensor(text: str, like: Tensor) -> Tensor:
    """Return what `_text` wrote, in the shape and place of `like`."""
    values = np.frombuffer(base64.b64decode(text), dtype=np.float32).copy()
    from_text = torch.from_numpy(values).reshape(like.shape)
    result = torch.empty_like(like, requires_grad=False)
    copy_into(result, from_text)
    return result
