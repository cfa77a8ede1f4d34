"""Loss scaling: a larger loss, so that gradients on their way through float16 are not lost.

float16 ends at 6e-8 below and at 65,504 above. The loss times s gives gradients times s all the way
back, which are divided by s where they arrive in float32 (Micikevicius et al. 2018,
arXiv:1710.03740). s is as large as it can be: halved where a gradient is not finite, whose step is
then computed once more, and doubled again after many steps that were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from tunesmith.engine.progress import Progress
    from tunesmith.engine.task import Task
    from tunesmith.types import R

STEADY: Final = 2000
"""Steps in a row after which a larger scale is tried: as in torch.amp.GradScaler."""
_LARGEST: Final = 2.0**24


class LossScale:
    """The factor and when it changes; `progress` remembers both in checkpoints."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @property
    def value(self) -> float:
        """The factor, a power of two: rounding does not see it."""
        return self._progress.loss_scale

    def undo(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients that are there by the factor."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1 / self.value)

    def hold(self) -> None:
        """Take note of gradients that were finite."""
        progress = self._progress
        progress.steady_steps += 1
        if progress.steady_steps >= STEADY:
            progress.loss_scale = min(2 * progress.loss_scale, _LARGEST)
            progress.steady_steps = 0

    def lower(self) -> bool:
        """Halve the factor, and return whether there was something to halve."""
        self._progress.steady_steps = 0
        if self.value <= 1:
            return False
        self._progress.loss_scale /= 2
        return True


def loss_scale_of(task: Task[R], progress: Progress) -> LossScale | None:
    """Return the scale of a task that computes in float16 anywhere, else None."""
    dtypes = {task.autocast_dtype, *(p.dtype for p in task.module.parameters())}
    return LossScale(progress) if torch.float16 in dtypes else None
