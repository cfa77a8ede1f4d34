"""Code that runs apart: what passes, and what it is kept from."""

import json
import time
from collections.abc import Callable

import pytest

from tunesmith.errors import RewardError
from tunesmith.rewards import code as code_reward
from tunesmith.rewards.build import build_reward
from tunesmith.rewards.code import Code, count_passed
from tunesmith.rewards.contract import Scored

ROOM = {"timeout": 20.0, "memory": 512}


def test_the_share_of_tests_that_pass() -> None:
    reply = "Here:\n```python\ndef double(n):\n    return n + 2\n```"
    tests = ["assert double(2) == 4", "assert double(3) == 6"]
    rows = [Scored("", reply, {"tests": tests}), Scored("", reply, {"tests": tests[0]})]
    assert build_reward(Code(timeout=20))(rows) == [0.5, 1.0]
    assert build_reward(Code(timeout=20, all_or_nothing=True))(rows) == [0.0, 1.0]


@pytest.mark.parametrize(
    "code",
    [
        "def f(:",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "x = bytearray(2 ** 31)",
        "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.fork()",
        "open('left-behind', 'w')",
    ],
)
def test_what_fails_or_is_forbidden_passes_nothing(code: str) -> None:
    assert count_passed(code, ["pass"], **ROOM) == 0


def test_a_test_that_ends_the_process_is_a_failed_one() -> None:
    assert count_passed("", ["raise SystemExit", "assert True"], **ROOM) == 1


def test_what_code_prints_is_no_answer() -> None:
    assert count_passed("print(5)\nimport sys\nsys.stderr.write('5')", ["1/0"], **ROOM) == 0


def test_code_that_does_not_end_is_ended() -> None:
    begun = time.monotonic()
    assert count_passed("while True: pass", ["pass"], timeout=1.0, memory=512) == 0
    assert time.monotonic() - begun < 60


def test_the_audit_hook_alone_keeps_code_off_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_reward, "_without_network", tuple)
    code = "import socket\ns = socket.socket()"
    assert count_passed(code, ["pass"], **ROOM) == 0
    assert count_passed("x = 1", ["assert x == 1"], **ROOM) == 1


@pytest.mark.parametrize("written", [json.dumps, repr])
def test_a_list_of_tests_in_a_cell_of_text_is_run_and_not_looked_at(
    written: Callable[[list[str]], str],
) -> None:
    tests = written(["assert 'a\\n' != f(2) == 4", "assert f(3) == 6"])
    rows = [Scored("", "def f(n): return n + 2", {"tests": tests})]
    assert build_reward(Code(timeout=20))(rows) == [0.5]


@pytest.mark.parametrize("tests", [[], "", "[]", ["assert True", " "], [1]])
def test_a_row_without_tests_is_an_error(tests: object) -> None:
    with pytest.raises(RewardError, match=r"row 0: .*'tests'"):
        build_reward(Code())([Scored("", "x", {"tests": tests})])
