"""What is common to measuring models that give numbers about a text instead of a reply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from tunesmith.errors import SpecError
from tunesmith.jobs.examine import Reply

if TYPE_CHECKING:
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.types import JSON


@dataclass
class HeadExaminer:
    """Measures the assembled model as it is; call its `examine` as often as wanted."""

    assembled: Assembled
    peers: Peers
    replies: list[Reply] = field(default_factory=list, init=False)
    """What the last examination said of the first `evaluation.samples` rows."""
    outcomes: dict[str, JSON] = field(default_factory=dict, init=False)
    """Of the last examination, what each row scored: metric to scores."""
    evidence: dict[str, JSON] = field(default_factory=dict, init=False)
    """Of the last examination, for the summary: intervals of the metrics, tables, curves."""

    model: ClassVar[str]
    """What messages call the model."""
    may_ask: ClassVar[frozenset[str]]
    """Metrics that a run file may name, though they are measured anyway."""

    def __post_init__(self) -> None:
        """Check that what is to be measured can be.

        Raises:
            SpecError: a metric of generated replies is asked for.
        """
        asked = self.assembled.run.evaluation.metrics
        if generated := [name for name in asked if name not in self.may_ask]:
            raise SpecError(
                f"evaluation.metrics: {generated[0]} compares generated replies, and a "
                f"{self.model} gives none; leave it out (its own metrics are always measured)"
            )

    @property
    def has_rows(self) -> bool:
        """Whether there is anything to measure on."""
        return len(self.assembled.data.evaluation) > 0
