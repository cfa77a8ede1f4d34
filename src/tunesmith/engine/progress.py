"""Where a run stands: what its checkpoints remember beside tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.errors import SpecError
from tunesmith.types import LOWER_IS_BETTER

if TYPE_CHECKING:
    from tunesmith.engine.step import StepResult
    from tunesmith.types import JSON


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    metric: str
    value: float


@dataclass
class Progress:
    """Counters of a run over all its resumptions."""

    micro_batch: int
    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    """Spent in steps."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    evaluated_at: int | None = None
    """The step of the last evaluation."""
    before: dict[str, float] = field(default_factory=dict)
    """Metrics of the evaluation before training."""
    latest: dict[str, float] = field(default_factory=dict)
    """Metrics of the last evaluation."""
    best: Best | None = None
    stale_evaluations: int = 0
    """Evaluations since the best one."""
    loss_scale: float = 2.0**16
    """What the loss is multiplied by, where float16 is computed in; see `LossScale`."""
    steady_steps: int = 0
    """Steps in a row for which that suited."""

    def record(self, metrics: dict[str, float], metric: str) -> bool:
        """Take note of an evaluation at this step, and return whether it is the best so far.

        Args:
            metrics: what was measured.
            metric: the one that decides (evaluation.best); lower is better for losses,
                perplexities, divergences and errors, higher for all else.

        Raises:
            SpecError: `metric` was not measured.
        """
        if metric not in metrics:
            raise SpecError(
                f"evaluation.best: '{metric}' is not measured; use one of {', '.join(metrics)}"
            )
        self.evaluated_at, self.latest = self.step, metrics
        if self.step == 0:
            self.before = metrics
            return False
        value = metrics[metric]
        # Nothing is better than a value that is no number, so it would stay the best for good.
        is_number = not math.isnan(value)
        if is_number and (self.best is None or _better(value, self.best.value, metric)):
            self.best, self.stale_evaluations = Best(self.step, metric, value), 0
            return True
        self.stale_evaluations += 1
        return False

    def count(self, result: StepResult, seconds: float) -> None:
        """Take note of a step that was taken, or skipped since it was not finite."""
        self.seconds += seconds
        self.tokens += result.tokens
        self.supervised_tokens += result.supervised_tokens
        self.skipped_in_a_row = 0 if result.finite else self.skipped_in_a_row + 1
        self.skipped_steps += not result.finite

    def as_json(self) -> dict[str, JSON]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Progress:
        """Return the progress that was saved."""
        best = state["best"]
        return cls(**{**state, "best": Best(**best) if best else None})


@dataclass
class Pace:
    """How fast this process goes, since it started and since it was last asked."""

    steps: int = 0
    seconds: float = 0.0
    recent_tokens: int = 0
    recent_seconds: float = 0.0

    def count(self, tokens: int, seconds: float) -> None:
        """Take note of a step."""
        self.steps += 1
        self.seconds += seconds
        self.recent_tokens += tokens
        self.recent_seconds += seconds

    def tokens_per_second(self) -> float:
        """Return the rate since the last call."""
        rate = self.recent_tokens / max(self.recent_seconds, 1e-9)
        self.recent_tokens, self.recent_seconds = 0, 0.0
        return rate

    def seconds_for(self, steps: int) -> float:
        """Return the seconds that so many steps take at the mean rate so far."""
        return steps * self.seconds / max(self.steps, 1)


def _better(value: float, than: float, metric: str) -> bool:
    if metric in LOWER_IS_BETTER:
        return value < than
    return value > than
