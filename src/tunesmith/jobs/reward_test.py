"""Trying a reward on rows of a file, before a run depends on it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tunesmith.data.conversation import Conversation
from tunesmith.data.converted import all_converted
from tunesmith.data.formats import layout_of
from tunesmith.data.rows import RawRow
from tunesmith.data.settings import Source
from tunesmith.data.sources import Located, locate
from tunesmith.errors import DataError, RewardError, SpecError
from tunesmith.rewards.build import build_reward
from tunesmith.rewards.contract import RewardKind, Scored, prompt_text
from tunesmith.rewards.settings import RewardSettings
from tunesmith.yaml_text import dotted


@dataclass(frozen=True)
class ScoredRow:
    """One row of the file and what the reward says of it."""

    place: str
    """File and row."""
    row: Scored
    score: float | None
    error: str | None
    """Why there is no score."""


@dataclass(frozen=True)
class RewardTest:
    """What a reward gave the rows of a file."""

    label: str
    rows: list[ScoredRow]

    @property
    def scores(self) -> list[float]:
        """Scores of the rows that have one."""
        return [row.score for row in self.rows if row.score is not None]

    @property
    def errors(self) -> list[ScoredRow]:
        """Rows that could not be scored."""
        return [row for row in self.rows if row.error is not None]

    def numbers(self) -> dict[str, float]:
        """Return what describes the scores; without a score only the counts."""
        scores = self.scores
        counts: dict[str, float] = {"rows": len(self.rows), "errors": len(self.errors)}
        if not scores:
            return counts
        return counts | {
            "mean": statistics.fmean(scores),
            "standard deviation": statistics.pstdev(scores),
            "lowest": min(scores),
            "median": statistics.median(scores),
            "highest": max(scores),
            "share of zeros": sum(score == 0 for score in scores) / len(scores),
        }


def reward_settings(values: dict[str, Any]) -> RewardKind:
    """Return the reward that a mapping describes.

    Raises:
        SpecError: there is no such kind, or it has no such setting.
    """
    adapter: TypeAdapter[RewardKind] = TypeAdapter(RewardSettings)
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = dotted(tuple(part for part in problem["loc"] if part != values.get("kind")))
            message = problem["msg"].removeprefix("Value error, ").lower()
            lines.append(f"reward{'.' if where else ''}{where}: {message}")
        raise SpecError("\n".join(lines)) from None


def reward_test(settings: RewardKind, data: Source, *, limit: int | None = None) -> RewardTest:
    """Return what the reward gives each row of a source; errors stand beside their rows.

    Args:
        settings: a reward that needs no model.
        data: rows with a prompt and a reply, in any layout that training reads; every other column
            goes to the reward by its name.
        limit: score only the first so many rows.

    Raises:
        SpecError: the reward cannot be used.
        DataError: the file cannot be read, or a row has no reply.
    """
    reward = build_reward(settings)
    placed = list(islice(_rows(locate(data)), limit))
    rows = [row for _, row in placed]
    ((label, scores),) = reward.attempt(rows).items()
    return RewardTest(
        label,
        [
            ScoredRow(place, row, None, score.why)
            if isinstance(score, RewardError)
            else ScoredRow(place, row, score, None)
            for (place, row), score in zip(placed, scores, strict=True)
        ],
    )


def _rows(located: Located) -> Iterator[tuple[str, Scored]]:
    layout = layout_of(located)

    def scored(raw: RawRow) -> tuple[str, Scored]:
        sample = layout.convert(raw.values)
        if not isinstance(sample, Conversation) or sample.reply_at is None:
            raise DataError("has no reply that could be scored")
        turns: Sequence[dict[str, Any]] = sample.messages
        reply = str(turns[sample.reply_at]["content"])
        return raw.place, Scored(prompt_text(turns[: sample.reply_at]), reply, raw.values)

    return all_converted(located, scored)
