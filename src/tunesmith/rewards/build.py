"""Rewards of a run file made into one function that scores rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tunesmith.errors import RewardError
from tunesmith.rewards.contract import Attempt, OpenRun, RewardKind, Scored, finite

_SHOWN: Final = 60


class WeightedSum:
    """A `Reward`: the sum of several, each times its weight; `parts` gives each by itself."""

    def __init__(self, kinds: Sequence[RewardKind], open_run: OpenRun | None = None) -> None:
        """Get all rewards ready, which is where a file that cannot be used fails.

        Raises:
            SpecError: a reward's file, function or run cannot be used.
            SetupError: a reward's package is not installed.
        """
        self._kinds = tuple(kinds)
        self._attempts = tuple(kind.attempts(open_run) for kind in kinds)
        self.labels = _unlike([kind.label for kind in kinds])
        """Name of each reward; those of the same name are numbered."""

    def __call__(self, rows: Sequence[Scored]) -> list[float]:
        """Return one float a row.

        Raises:
            RewardError: a row cannot be scored, and the reward's `on_error` is `stop`.
        """
        return self.total(self.parts(rows))

    def parts(self, rows: Sequence[Scored]) -> dict[str, list[float]]:
        """Return the score of each reward for each row, without its weight, by label.

        Raises:
            RewardError: as above.
        """
        return {
            label: _settled(attempt, rows, kind, label)
            for label, attempt, kind in zip(self.labels, self._attempts, self._kinds, strict=True)
        }

    def attempt(self, rows: Sequence[Scored]) -> dict[str, list[float | RewardError]]:
        """Return the same without stopping: errors in the places of their rows."""
        return {
            label: finite(attempt(rows))
            for label, attempt in zip(self.labels, self._attempts, strict=True)
        }

    def total(self, parts: dict[str, list[float]]) -> list[float]:
        """Return the weighted sum a row of what `parts` returned."""
        weights = [kind.weight for kind in self._kinds]
        return [
            sum(weight * score for weight, score in zip(weights, scores, strict=True))
            for scores in zip(*parts.values(), strict=True)
        ]


def build_reward(
    settings: RewardKind | Sequence[RewardKind], open_run: OpenRun | None = None
) -> WeightedSum:
    """Return what scores rows as the settings say.

    Args:
        settings: one reward, or several that are added by weight.
        open_run: gives the reward model of a reward run's directory; needed by `kind: run`.

    Raises:
        SpecError: a reward's file, function or run cannot be used.
        SetupError: a reward's package is not installed.
    """
    return WeightedSum([settings] if isinstance(settings, RewardKind) else settings, open_run)


def _settled(attempt: Attempt, rows: Sequence[Scored], kind: RewardKind, label: str) -> list[float]:
    """Return the scores, what `on_error` says in the place of each error."""
    scores: list[float] = []
    for score, row in zip(finite(attempt(rows)), rows, strict=True):
        if not isinstance(score, RewardError):
            scores.append(score)
        elif kind.on_error == "stop":
            prompt = " ".join(row.prompt.split())[-_SHOWN:]
            raise RewardError(
                score.row,
                f"the reward {label} failed on the prompt ending {prompt!r}: {score.why}; "
                "`on_error: 0` gives such rows 0 and goes on",
            )
        else:
            scores.append(float(kind.on_error))
    return scores


def _unlike(labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        label if labels.count(label) == 1 else f"{label}_{labels[: number + 1].count(label)}"
        for number, label in enumerate(labels)
    )
