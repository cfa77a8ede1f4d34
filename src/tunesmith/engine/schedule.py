"""The course of the learning rate: a pure function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.engine.settings import TrainSettings


def warmup_steps(settings: TrainSettings, total: int) -> int:
    """Return the steps of the warm-up: given as such, or a fraction of `total`, rounded up.

    A fraction leaves a step after it: a run of a single step would learn nothing, at rate 0.
    """
    if settings.warmup < 1:
        return min(math.ceil(settings.warmup * total), total - 1)
    return int(settings.warmup)


def factor(settings: TrainSettings, step: int, total: int) -> float:
    """Return the share (0 to 1) of the peak learning rate for the step after `step` steps.

    It rises linearly from 0 over the warm-up and then follows `settings.schedule` down to
    `min_learning_rate_ratio`, which the step after the last would have; the same convention, and
    the same values, as transformers' schedules.

    Args:
        settings: the schedule and its numbers.
        step: steps already taken, 0 for the first.
        total: optimiser steps of the whole run.
    """
    warmup = warmup_steps(settings, total)
    if step < warmup:
        return step / warmup
    shape = {"linear": linear, "cosine": cosine, "constant": constant, "wsd": wsd}
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if settings.schedule == "wsd":
        decay = max(1, round(settings.decay * total))
        progress = min(1.0, max(0, step - (total - decay)) / decay)
    lowest = settings.min_learning_rate_ratio
    return lowest + (1 - lowest) * shape[settings.schedule](progress)


def linear(progress: float) -> float:
    """Fall in a straight line from 1 at progress 0 to 0 at progress 1."""
    return 1 - progress


def cosine(progress: float) -> float:
    """Fall along half a cosine from 1 to 0 (Loshchilov, Hutter 2017, arXiv:1608.03983, eq. 5)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """Stay at 1."""
    del progress
    return 1.0


def wsd(progress: float) -> float:
    """Fall as 1 - sqrt over the decay, the best one of Haegele et al. 2024 (arXiv:2405.18392)."""
    return 1 - math.sqrt(progress)
