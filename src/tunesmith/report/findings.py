"""What a comparison found: one row a way to fine-tune, every number measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

SIGNIFICANT: Final = 0.05
"""p-value below which a difference to the best is called one."""


@dataclass(frozen=True)
class FoundRow:
    """One row of the table. What was not measured is None."""

    name: str
    baseline: bool = False
    """Whether nothing was trained."""
    failed: str | None = None
    """Why there are no numbers."""
    learning_rate: float | None = None
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rates tried, and the metric each reached."""
    quality: float | None = None
    """The metric after training, mean over the seeds."""
    low: float | None = None
    high: float | None = None
    """95 % bootstrap interval over evaluation rows and seeds."""
    values: list[float] = field(default_factory=list)
    """The metric of each seed."""
    p_value: float | None = None
    """Of being as good as the best row, by the paired bootstrap; None for the best itself."""
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    stored_bytes: int | None = None
    """Weights saved for this task."""
    process_bytes: int | None = None
    """Peak resident memory of the process."""
    device_bytes: int | None = None
    """Peak memory of the accelerator, where there was one."""
    seconds_per_step: float | None = None
    seconds: float | None = None
    """In steps, a run; of a row without steps, all its work."""
    tokens_per_second: float | None = None
    slowdown: float | None = None
    """Time of a forward pass with the method on, over that of the plain base."""
    general_before: float | None = None
    general_after: float | None = None
    """Loss on general text in nats a token; its rise is forgetting."""
    prompt_tokens: float | None = None
    """Tokens that examples add to a prompt, of a row that prompts only; 0 without examples."""
    merges: bool | None = None
    """Whether the method merges into the base, which then is as fast as without it."""
    steps: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Training loss of the first seed."""

    @property
    def share(self) -> float | None:
        """Return the share of parameters that train."""
        if self.trainable_parameters is None or not self.total_parameters:
            return None
        return self.trainable_parameters / self.total_parameters

    @property
    def forgetting(self) -> float | None:
        """Return the rise of the loss on general text."""
        if self.general_before is None or self.general_after is None:
            return None
        return self.general_after - self.general_before

    @property
    def peak_bytes(self) -> int | None:
        """Return the memory that decides what fits: the accelerator's, else the process's."""
        return self.process_bytes if self.device_bytes is None else self.device_bytes

    def flat(self) -> dict[str, Any]:
        """Return the row for a table of values."""
        return {
            "name": self.name,
            "failed": self.failed,
            "quality": self.quality,
            "low": self.low,
            "high": self.high,
            "p_value_against_best": self.p_value,
            "learning_rate": self.learning_rate,
            "trainable_parameters": self.trainable_parameters,
            "trainable_share": self.share,
            "stored_bytes": self.stored_bytes,
            "peak_process_bytes": self.process_bytes,
            "peak_device_bytes": self.device_bytes,
            "seconds_per_step": self.seconds_per_step,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "inference_slowdown": self.slowdown,
            "inference_slowdown_merged": 1.0 if self.merges else None,
            "general_loss_before": self.general_before,
            "general_loss_after": self.general_after,
            "forgetting_nats": self.forgetting,
            "prompt_tokens_added": self.prompt_tokens,
            "steps": self.steps,
        }


@dataclass(frozen=True)
class Findings:
    """A whole comparison."""

    name: str
    metric: str
    higher_is_better: bool
    rows: list[FoundRow]
    """Baselines, then the others from best to worst, then what failed."""
    facts: dict[str, Any]
    """Model, data, hardware and versions."""

    @property
    def trained(self) -> list[FoundRow]:
        """Return the rows that trained, best first."""
        return [row for row in self.rows if row.quality is not None and not row.baseline]

    @property
    def one_seed(self) -> bool:
        """Return whether no row was trained twice; intervals then cover the rows' choice only."""
        return all(len(row.values) < 2 for row in self.trained)

    def learned(self) -> bool:
        """Return whether the best row beats the untuned model; if not, ranks say nothing."""
        base = next((row.quality for row in self.rows if row.baseline), None)
        best = self.trained[0].quality if self.trained else None
        if base is None or best is None:
            return best is not None
        return best > base if self.higher_is_better else best < base

    def as_good_as_best(self) -> list[FoundRow]:
        """Return the trained rows that cannot be told from the best, it included.

        That is the best alone where nothing says how far chance goes.
        """
        if self.trained and self.trained[0].low is None:
            return self.trained[:1]
        return [row for row in self.trained if row.p_value is None or row.p_value >= SIGNIFICANT]


def front(points: Sequence[tuple[float, float]], *, higher_is_better: bool) -> list[int]:
    """Return which points (cost, quality) no other beats in both, by rising cost.

    A point is left out where another costs no more and is at least as good, one of them strictly.
    """
    sign = -1 if higher_is_better else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    chosen: list[int] = []
    best = float("inf")
    for index in order:
        quality = sign * points[index][1]
        if quality < best:
            chosen.append(index)
            best = quality
    return chosen
