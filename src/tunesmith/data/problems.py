"""Problems made by a seeded generator, with answers that a computer can check.

Named in a run file as `generated/arithmetic:digits=2,operations=add+subtract` or
`generated/countdown:numbers=3`, with `split: train` (where none is given) or `split: test`. Which
split a problem belongs to follows from the problem alone, so that no seed, size or other setting
puts a problem of the test among those of training.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from itertools import islice, permutations
from pathlib import Path
from typing import Any, Final, Literal

from filelock import FileLock
from pydantic import Field, ValidationError, field_validator

from tunesmith.errors import DataError
from tunesmith.models.zoo import cache_dir
from tunesmith.settings import Settings

PREFIX: Final = "generated/"
_VERSION: Final = 1
"""Part of the file's name in the cache; changes with what the generators make."""
_TEST_SHARE: Final = 5
"""One problem in so many belongs to the test."""
_TRIES: Final = 200
"""Draws a wanted row, after which there are no more different problems."""

Operation = Literal["add", "subtract", "multiply"]
_SIGNS: Final[dict[Operation, str]] = {"add": "+", "subtract": "-", "multiply": "*"}
Problem = tuple[str, dict[str, Any]]
"""What it is known by, the same for problems that differ in nothing that matters; and its row."""


class Generated(Settings):
    """What all generators can be told."""

    rows: int = Field(default=4000, ge=1)
    """Different problems to train on; where none is given, at most so many."""
    test_rows: int = Field(default=500, ge=1)
    """Different problems in the test; where none is given, at most so many."""
    seed: int = 0
    """Decides which problems, and their order."""

    def draw(self, chance: random.Random) -> Problem:
        """Return one problem."""
        raise NotImplementedError


class Arithmetic(Generated):
    """A sum, difference or product of two whole numbers."""

    digits: int = Field(default=2, ge=1, le=9)
    """Digits that each number has at most."""
    largest: int | None = Field(default=None, ge=1)
    """Largest number; none is the largest of so many digits."""
    operations: tuple[Operation, ...] = ("add", "subtract", "multiply")
    """Drawn from with equal chance."""

    @field_validator("operations", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.split("+")) if isinstance(value, str) else value

    def draw(self, chance: random.Random) -> Problem:
        """Return one problem; a + b and b + a are the same."""
        operation = chance.choice(self.operations)
        numbers = 10**self.digits if self.largest is None else self.largest + 1
        a, b = chance.randrange(numbers), chance.randrange(numbers)
        answer = {"add": a + b, "subtract": a - b, "multiply": a * b}[operation]
        known = (a, b) if operation == "subtract" else (min(a, b), max(a, b))
        asked = f"What is {a} {_SIGNS[operation]} {b}? Answer with the number only."
        row = {"prompt": asked, "completion": str(answer), "answer": answer}
        return f"{operation} {known}", row


class Countdown(Generated):
    """Numbers that have to be made into a target with + - * /."""

    numbers: int = Field(default=3, ge=2, le=4)
    """How many numbers are given."""
    largest: int = Field(default=20, ge=2)
    """The largest number that is given."""
    target: int = Field(default=100, ge=1)
    """The largest target."""

    def draw(self, chance: random.Random) -> Problem:
        """Return one problem, which has a solution that uses every number once."""
        while True:
            numbers = sorted(chance.randint(1, self.largest) for _ in range(self.numbers))
            solutions = dict(islice(self._solutions(numbers), 2000))
            if solutions:
                break
        target = chance.choice(sorted(solutions))
        asked = (
            f"Make {target} from the numbers {', '.join(map(str, numbers))} with + - * /. Use each "
            "number at most once. Answer with the expression only."
        )
        row = {
            "prompt": asked,
            "completion": solutions[target],
            "numbers": numbers,
            "target": target,
        }
        return f"countdown {numbers} {target}", row

    def _solutions(self, numbers: list[int]) -> Iterator[tuple[int, str]]:
        """Yield targets and the expressions, read from left to right, that make them."""
        for order in sorted(set(permutations(numbers))):
            partial = [(order[0], str(order[0]))]
            for number in order[1:]:
                partial = [made for value, text in partial for made in _joined(value, text, number)]
            yield from (made for made in partial if 1 <= made[0] <= self.target)


def _joined(value: int, text: str, number: int) -> Iterator[tuple[int, str]]:
    """Yield what comes of a whole number and one more, where it is whole again."""
    yield value + number, f"{text} + {number}"
    yield value - number, f"{text} - {number}"
    inner = f"({text})" if " " in text else text
    yield value * number, f"{inner} * {number}"
    if value % number == 0:
        yield value // number, f"{inner} / {number}"


GENERATORS: Final[dict[str, type[Generated]]] = {"arithmetic": Arithmetic, "countdown": Countdown}


def is_generated(path: str) -> bool:
    """Return whether a source's path names a generator."""
    return path.startswith(PREFIX)


def generated_file(path: str, split: str | None) -> Path:
    """Return the file with the problems of a split, made the first time it is asked for.

    Args:
        path: `generated/NAME`, or `generated/NAME:key=value,key=value`.
        split: train or test; None is train.

    Raises:
        DataError: there is no such generator, setting or split, or too few different problems.
    """
    name, _, options = path.removeprefix(PREFIX).partition(":")
    settings = _settings(path, name, options)
    split = split or "train"
    if split not in {"train", "test"}:
        raise DataError(f"data: '{path}' has no split '{split}'; use train or test")
    said = json.dumps([_VERSION, name, settings.model_dump(mode="json"), split])
    folder = cache_dir() / "generated"
    target = folder / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.jsonl"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            _write(problems(settings, split, path), target)
    return target


def problems(settings: Generated, split: str, path: str = "") -> Iterator[dict[str, Any]]:
    """Yield the different problems of a split, as many as the settings ask for.

    Raises:
        DataError: there are not as many as were asked for.
    """
    # random.Random of a text is the same on every machine and version from Python 3.2 on.
    chance, seen = random.Random(f"{settings.seed} {split}"), set[str]()
    key = "test_rows" if split == "test" else "rows"
    wanted: int = getattr(settings, key)
    for _ in range(wanted * _TRIES):
        known, row = settings.draw(chance)
        if known in seen or _split_of(known) != split:
            continue
        seen.add(known)
        yield row
        if len(seen) == wanted:
            return
    if key not in settings.model_fields_set and seen:
        return  # nobody asked for more than there are
    raise DataError(
        f"data: '{path}' has only {len(seen)} different problems for the split '{split}' and "
        f"{wanted} are asked for; ask for fewer (rows=, test_rows=), or for larger numbers"
    )


def _split_of(known: str) -> str:
    digest = hashlib.sha256(known.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % _TEST_SHARE == 0 else "train"


def _settings(path: str, name: str, options: str) -> Generated:
    if name not in GENERATORS:
        raise DataError(
            f"data: '{path}': there is no generator '{name}'; use {_listed(GENERATORS)}"
        )
    given = dict(option.partition("=")[::2] for option in options.split(",") if option)
    try:
        return GENERATORS[name].model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        known = GENERATORS[name].model_fields
        why = problem["msg"].lower() if key in known else f"is no setting; use {_listed(known)}"
        raise DataError(f"data: '{path}': {key}: {why}") from None


def _listed(names: Any) -> str:
    return ", ".join(names)


def _write(rows: Iterator[dict[str, Any]], target: Path) -> None:
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
        partial = Path(file.name)
        try:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        except BaseException:
            partial.unlink()
            raise
    os.replace(partial, target)
