"""Generated problems: right answers, the same everywhere, no test problem in training."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.problems import generated_file
from tunesmith.data.rows import RawRow
from tunesmith.data.settings import Source
from tunesmith.data.sources import locate, read
from tunesmith.errors import DataError
from tunesmith.rewards.checks import Number
from tunesmith.rewards.contract import Scored
from tunesmith.rewards.countdown import Countdown


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))


def rows(path: str, split: str | None = None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in generated_file(path, split).read_text().splitlines()]


def test_arithmetic_has_right_answers_and_the_digits_asked_for() -> None:
    made = rows("generated/arithmetic:digits=1,rows=60")
    assert len(made) == 60
    for row in made:
        asked = row["prompt"].removeprefix("What is ").partition("?")[0]
        assert eval(asked) == row["answer"] == int(row["completion"])
        assert max(int(word) for word in asked.split() if word.isdigit()) < 10
        assert Number().score(Scored("", row["completion"], row)) == 1.0


def test_arithmetic_keeps_to_the_largest_number_asked_for() -> None:
    made = rows("generated/arithmetic:largest=12,operations=add,rows=40")
    numbers = [int(n) for row in made for n in row["prompt"].split("?")[0].split() if n.isdigit()]
    assert max(numbers) == 12


def test_operations_are_chosen() -> None:
    made = rows("generated/arithmetic:operations=add+subtract,rows=50")
    assert {row["prompt"].split()[3] for row in made} == {"+", "-"}


def test_countdown_problems_are_solved_by_their_completion() -> None:
    for row in rows("generated/countdown:numbers=3,rows=60"):
        assert Countdown(use_all=True).score(Scored("", row["completion"], row)) == 1.0


@pytest.mark.parametrize("path", ["generated/arithmetic", "generated/countdown:rows=300"])
def test_no_problem_of_the_test_is_in_training_whatever_the_seed(path: str) -> None:
    def known(row: dict[str, Any]) -> tuple[Any, ...]:
        if "numbers" in row:
            return (*row["numbers"], row["target"])
        a, sign, b = row["prompt"].split()[2:5]
        pair = [a, b.rstrip("?")]
        return (sign, *(pair if sign == "-" else sorted(pair)))

    other = f"{path}{',' if ':' in path else ':'}seed=1"
    trained = [known(row) for row in rows(path)]
    assert len(set(trained)) == len(trained)
    assert not {known(row) for row in rows(other, "test")} & set(trained)


def test_the_same_problems_come_of_the_same_seed(tmp_path: Path) -> None:
    first = rows("generated/arithmetic:rows=20")
    generated_file("generated/arithmetic:rows=20", None).unlink()
    assert rows("generated/arithmetic:rows=20") == first
    assert rows("generated/arithmetic:rows=20,seed=1") != first


def test_where_no_number_is_asked_for_all_problems_there_are_suffice() -> None:
    """Sums of one digit: 55 without regard to order, of which a fifth is the test's."""
    path = "generated/arithmetic:digits=1,operations=add"
    assert len(rows(path)) + len(rows(path, "test")) == 55


def test_problems_are_a_source_of_a_run_file() -> None:
    located = locate(Source(path="generated/arithmetic:rows=5", split="test"))
    assert located.files[0].is_file()


@pytest.mark.parametrize(
    ("path", "split", "why"),
    [
        ("generated/algebra", None, "no generator 'algebra'; use arithmetic, countdown"),
        ("generated/arithmetic:digit=2", None, "digit: is no setting; use rows"),
        ("generated/arithmetic:digits=x", None, "digits: input should be a valid integer"),
        ("generated/arithmetic:digits=1,rows=999", None, "has only .* different problems"),
        ("generated/arithmetic", "dev", "no split 'dev'"),
    ],
)
def test_what_cannot_be_made_is_said(path: str, split: str | None, why: str) -> None:
    with pytest.raises(DataError, match=why):
        generated_file(path, split)


def test_skip_and_limit_cut_a_file_into_parts_without_a_common_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(7)))

    def texts(**settings: int) -> list[str]:
        located = locate(Source(path=str(path), **settings))
        return [str(row.values["text"]) for row in read(located) if isinstance(row, RawRow)]

    assert texts(limit=3) == ["0", "1", "2"]
    assert texts(skip=3, limit=2) == ["3", "4"]
    assert texts(skip=5) == ["5", "6"]
    located = locate(Source(path=str(path), skip=2, limit=3))
    first = next(iter(read(located)))
    assert [row.place[-1] for row in read(located, first.end)] == ["4", "5"]
