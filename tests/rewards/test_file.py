"""Reward functions in a Python file: what they get, and every way in which they can go wrong."""

from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from tunesmith.errors import RewardError, SpecError
from tunesmith.rewards.build import build_reward
from tunesmith.rewards.contract import Scored
from tunesmith.rewards.file import FileReward

ROWS = [Scored("a?", "one", {"answer": 1}), Scored("b?", "hang", {"answer": 2})]


def reward_file(tmp_path: Path, body: str, signature: str = "prompts, replies, **columns") -> str:
    path = tmp_path / "rewards.py"
    path.write_text(f"import math, os, sys, time\ndef reward({signature}):\n    {body}\n")
    return str(path)


def test_a_function_gets_prompts_replies_and_columns_and_may_print(tmp_path: Path) -> None:
    body = (
        "print('seen'); return [len(p) + len(r) + a for p, r, a in zip(prompts, replies, answer)]"
    )
    path = reward_file(tmp_path, body, "prompts, replies, answer")
    assert build_reward(FileReward(path=path))(ROWS) == [6.0, 8.0]


def test_columns_that_json_does_not_know_come_as_text(tmp_path: Path) -> None:
    path = reward_file(tmp_path, "return [len(d) for d in day]", "prompts, replies, day, price")
    row = Scored("", "", {"day": date(2024, 5, 1), "price": Decimal("1.50")})
    assert build_reward(FileReward(path=path))([row]) == [len("2024-05-01")]


def test_a_large_batch_goes_through(tmp_path: Path) -> None:
    path = reward_file(tmp_path, "return [len(r) for r in replies]")
    rows = [Scored("", "x" * 1000, {})] * 500
    assert build_reward(FileReward(path=path))(rows) == [1000.0] * 500


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return [1 / (r != 'hang') for r in replies]", r"row 1: .*ZeroDivisionError.*line 3"),
        ("return [math.nan if r == 'hang' else 1 for r in replies]", "row 1: .*is nan"),
        ("return [None if r == 'hang' else 1 for r in replies]", "row 1: .*None, which is no num"),
        (
            "return [1 if r != 'hang' else time.sleep(60) for r in replies]",
            "row 1: .*longer than 1",
        ),
        ("return [1 if r != 'hang' else os._exit(3) for r in replies]", "row 1: .*ended its proc"),
        ("return [1, 2, 3]", "row 0: .*returned 3 scores for 1 replies"),
        ("raise ValueError('no')", "row 0: .*raised ValueError: no"),
    ],
)
def test_what_goes_wrong_names_the_row(tmp_path: Path, body: str, why: str) -> None:
    reward = build_reward(FileReward(path=reward_file(tmp_path, body), timeout=1.0))
    with pytest.raises(RewardError, match=why):
        reward(ROWS)


def test_after_a_row_that_hangs_the_others_are_scored(tmp_path: Path) -> None:
    path = reward_file(tmp_path, "return [7 if r != 'hang' else time.sleep(60) for r in replies]")
    reward = build_reward(FileReward(path=path, timeout=1.0, on_error=-2.0))
    assert reward([ROWS[0], ROWS[1], ROWS[0]]) == [7.0, -2.0, 7.0]
    assert reward([ROWS[0]]) == [7.0]


@pytest.mark.parametrize(
    ("signature", "why"),
    [
        ("completions", r"reward\(completions\) must have the signature \(prompts, replies"),
        ("prompts, replies, tests", "asks for the column 'tests'; .*answer"),
    ],
)
def test_a_wrong_signature_is_refused(tmp_path: Path, signature: str, why: str) -> None:
    path = reward_file(tmp_path, "return [1.0]", signature)
    with pytest.raises((SpecError, RewardError), match=why):
        build_reward(FileReward(path=path))(ROWS)


def test_a_file_that_cannot_be_used_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no file"):
        build_reward(FileReward(path=str(tmp_path / "absent.py")))
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name")
    with pytest.raises(SpecError, match="ModuleNotFoundError"):
        build_reward(FileReward(path=str(path)))
    path.write_text("def other(): pass")
    with pytest.raises(SpecError, match="no function 'reward'; it has other"):
        build_reward(FileReward(path=str(path)))
