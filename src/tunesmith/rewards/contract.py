"""What a reward is: it takes rows of prompt and reply and gives one number a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from tunesmith.errors import RewardError
from tunesmith.settings import Settings

if TYPE_CHECKING:
    from tunesmith.rewards.run import RunReward


class Scored(NamedTuple):
    """One reply that is to be scored."""

    prompt: str
    """What was asked: the text of the turn before the reply."""
    reply: str
    """What the model wrote, without its end-of-turn."""
    columns: Mapping[str, Any]
    """The other columns of the prompt's row: answer, tests, ..."""
    messages: Sequence[Mapping[str, Any]] = ()
    """The turns before the reply, where they are known as such; a reward model reads them."""


Reward: TypeAlias = Callable[[Sequence[Scored]], list[float]]
"""One finite float a row, or a RewardError that names the row."""
Attempt: TypeAlias = Callable[[Sequence[Scored]], list[float | RewardError]]
"""The same without stopping: a row that could not be scored has its error in its place."""
OpenRun: TypeAlias = "Callable[[RunReward], Reward]"
"""Gives the reward model in the directory of a run; jobs know how."""


class RewardKind(Settings):
    """One reward of a run file: the base of all kinds.

    A kind has either `score`, for one row, or `attempts` of its own.
    """

    kind: str
    """What it is, which is also what tells the kinds apart."""
    weight: float = 1.0
    """What its score is multiplied by before all rewards are added."""
    on_error: float | Literal["stop"] = "stop"
    """A row that cannot be scored (an exception, NaN, the time limit) stops the run, or gets this
    score."""

    @property
    def label(self) -> str:
        """What metrics, tables and messages call it."""
        return self.kind

    def attempts(self, open_run: OpenRun | None) -> Attempt:
        """Return what scores rows, errors in their places; by default `score`, row by row.

        Args:
            open_run: gives reward models to the kind that asks one; None where there is none.
        """
        del open_run
        return each_row(self.score)

    def score(self, row: Scored) -> float:
        """Return the score of one row.

        Raises:
            ValueError: the row cannot be scored; the message says why.
        """
        raise NotImplementedError


def each_row(score: Callable[[Scored], float]) -> Attempt:
    """Return an `Attempt` that scores row by row; a ValueError of `score` is the row's error."""

    def attempt(rows: Sequence[Scored]) -> list[float | RewardError]:
        return [one(number, row) for number, row in enumerate(rows)]

    def one(number: int, row: Scored) -> float | RewardError:
        try:
            return score(row)
        except ValueError as error:
            return RewardError(number, str(error))

    return attempt


def finite(scores: Sequence[float | RewardError]) -> list[float | RewardError]:
    """Return `scores` with an error in the place of every NaN and infinity."""
    return [
        RewardError(row, f"the score is {score}, which is no finite number")
        if isinstance(score, float) and not math.isfinite(score)
        else score
        for row, score in enumerate(scores)
    ]


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return what `Scored.prompt` is of the turns before a reply: the text of the last one."""
    return str(messages[-1].get("content") or "")


def column(row: Scored, name: str) -> Any:
    """Return a column of the row.

    Raises:
        ValueError: the row has no such column, and the message names those it has; or it is null.
    """
    if name not in row.columns:
        known = ", ".join(row.columns) or "none"
        raise ValueError(f"there is no column {name!r}; the row's further columns are: {known}")
    if row.columns[name] is None:
        raise ValueError(f"the column {name!r} is null")
    return row.columns[name]
