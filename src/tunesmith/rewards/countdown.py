"""The reward of the countdown game: an expression of given numbers that comes to a target."""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final, Literal

from pydantic import Field

from tunesmith.rewards.checks import part_after
from tunesmith.rewards.contract import RewardKind, Scored, column

_OPERATORS: Final[dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_MOST_CHARACTERS: Final = 200


class Countdown(RewardKind):
    """1 where the reply is an expression of the row's numbers that comes to the target.

    Each number may be used at most as often as it is given. A well-formed expression of the right
    numbers that comes to something else gets `partial`.
    """

    kind: Literal["countdown"] = "countdown"
    """Computes the expression in the reply's last line that is not empty."""
    numbers: str = "numbers"
    """The column with the list of numbers."""
    target: str = "target"
    """The column with the target."""
    after: str | None = None
    """Look only behind the last of this marker."""
    partial: float = Field(default=0.1, ge=0, le=1)
    """Score of an expression that uses the numbers rightly and misses the target."""
    use_all: bool = False
    """Every number has to be used."""

    def score(self, row: Scored) -> float:
        """Return 1.0, `partial` or 0.0.

        Raises:
            ValueError: the row has no list of numbers, or no target.
        """
        given = _whole_numbers(column(row, self.numbers), self.numbers)
        target = Fraction(str(column(row, self.target)))
        lines = (part_after(row.reply, self.after) or "").strip().splitlines()
        text = lines[-1].partition("=")[0].strip() if lines else ""
        try:
            value, used = compute(text)
        except (ValueError, ZeroDivisionError):
            return 0.0
        rightly = used == given if self.use_all else used <= given
        if not rightly:
            return 0.0
        return 1.0 if value == target else self.partial


def _whole_numbers(value: Any, name: str) -> Counter[int]:
    try:
        if isinstance(value, list):
            return Counter(map(int, value))
    except (TypeError, ValueError):
        pass
    raise ValueError(f"the column {name!r} is {value!r}; expected a list of numbers")


def compute(text: str) -> tuple[Fraction, Counter[int]]:
    """Return the exact value of an expression of + - * / and the whole numbers that it uses.

    Raises:
        ValueError: it is anything else, or longer than 200 characters.
        ZeroDivisionError: it divides by nothing.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError("the expression is too long")
    used: Counter[int] = Counter()

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int() as number) if not isinstance(number, bool):
                used[number] += 1
                return Fraction(number)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
        raise ValueError(f"{ast.unparse(node)} is no sum, difference, product or quotient")

    try:
        tree = ast.parse(text.strip(), mode="eval")
        return value(tree.body), used
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{text!r} is no expression") from None
