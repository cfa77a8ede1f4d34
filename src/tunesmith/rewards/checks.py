"""Rewards that look at the reply's text: an exact answer, a number, a pattern, its length."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from tunesmith.rewards.contract import RewardKind, Scored, column

_NO_SPACES: Final = (
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han
    "\u0e00-\u0e4f\u0e5a-\u0ecf\u1000-\u103f\u1780-\u17df"  # Thai, Lao, Burmese, Khmer
    "\uac00-\ud7af"  # Hangul
)
"""Letters that a number follows without a space; behind those of others (x2) it is a name's."""
# 1,234.5, 1234.5 and .5 are one number each; in "1, 2" and "10,20" the comma parts two.
_NUMBER: Final = re.compile(
    rf"(?<![^\W{_NO_SPACES}])(?<!\.)"
    r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)
_MINUS: Final = "\N{MINUS SIGN}"
_FENCE: Final = re.compile(r"```[^\n`]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)


class Exact(RewardKind):
    """1 where the reply is the answer, else 0."""

    kind: Literal["exact"] = "exact"
    """Compares the whole reply with a column."""
    column: str = "answer"
    """The column that holds the answer, or a list of answers of which one suffices."""
    after: str | None = None
    """Compare only what follows the last of this marker, as in `####`; without it the reply is
    wrong."""
    ignore_case: bool = False
    """Let Paris and paris be the same."""

    def score(self, row: Scored) -> float:
        """Return 1.0 or 0.0; white space around and within is compared as single blanks."""
        answers = column(row, self.column)
        answers = answers if isinstance(answers, list) else [answers]
        text = part_after(row.reply, self.after)
        return float(text is not None and self._plain(text) in map(self._plain, map(str, answers)))

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


class Number(RewardKind):
    """1 where the number in the reply is the answer, else 0."""

    kind: Literal["number"] = "number"
    """Compares one number of the reply with a column."""
    column: str = "answer"
    """The column that holds the answer: a number, or a text whose last number counts."""
    take: Literal["last", "first"] = "last"
    """Which number of the reply counts."""
    after: str | None = None
    """Look only behind the last of this marker, as in `####`; without it the reply is wrong."""
    tolerance: float = Field(default=0.0, ge=0)
    """How far the number may be from the answer."""
    relative: bool = False
    """Take `tolerance` as a share of the answer."""

    def score(self, row: Scored) -> float:
        """Return 1.0 or 0.0; a reply without a number is wrong.

        Raises:
            ValueError: the row has no answer, or one without a number.
        """
        known = numbers(str(column(row, self.column)))
        if not known:
            value = row.columns[self.column]
            raise ValueError(f"the column {self.column!r} is {value!r}, which holds no number")
        text = part_after(row.reply, self.after)
        found = numbers(text) if text is not None else []
        if not found:
            return 0.0
        distance = abs((found[-1] if self.take == "last" else found[0]) - known[-1])
        limit = Decimal(str(self.tolerance)) * (abs(known[-1]) if self.relative else 1)
        return float(distance <= limit)


class Regex(RewardKind):
    """1 where a pattern is found in the reply, else 0."""

    kind: Literal["regex"] = "regex"
    """Searches the reply for a regular expression."""
    pattern: str
    """A regular expression of Python's `re`; `.` also matches the end of a line."""
    whole: bool = False
    """The pattern has to match the whole reply and not a part of it."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is no regular expression: {error}") from None
        return self

    def score(self, row: Scored) -> float:
        """Return 1.0 or 0.0."""
        match = re.fullmatch if self.whole else re.search  # which keep what they compiled
        return float(match(self.pattern, row.reply, re.DOTALL) is not None)


class Length(RewardKind):
    """A penalty that falls linearly from 0 at `free` to -1 at `limit` and stays there.

    This is the soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 13), with
    lengths counted in words or characters of the reply.
    """

    kind: Literal["length"] = "length"
    """Punishes long replies."""
    free: int = Field(ge=0)
    """Up to this length nothing is taken off."""
    limit: int = Field(ge=1)
    """From this length on the score is -1."""
    unit: Literal["words", "characters"] = "words"
    """What is counted."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.limit <= self.free:
            raise ValueError(f"`limit` {self.limit} must be above `free` {self.free}")
        return self

    def score(self, row: Scored) -> float:
        """Return a number from -1 to 0."""
        length = len(row.reply.split()) if self.unit == "words" else len(row.reply)
        return -min(1.0, max(0.0, (length - self.free) / (self.limit - self.free)))


def part_after(text: str, marker: str | None) -> str | None:
    """Return what follows the last `marker`; None where it does not occur."""
    if marker is None:
        return text
    _, found, rest = text.rpartition(marker)
    return rest if found else None


def last_fenced(text: str) -> str:
    """Return what the last ``` block of a text holds; the whole text where there is none."""
    blocks = _FENCE.findall(text)
    return str(blocks[-1]) if blocks else text


def numbers(text: str) -> list[Decimal]:
    """Return the numbers of a text in order, exactly; `1,234` is one number."""
    found = []
    for match in _NUMBER.finditer(text.replace(_MINUS, "-")):
        try:
            number = Decimal(match.group().replace(",", ""))
        except InvalidOperation:  # an exponent beyond what a Decimal holds
            continue
        if math.isfinite(number):
            found.append(number)
    return found
