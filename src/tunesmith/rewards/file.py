"""A reward that is a function in the user's Python file, run in a process of its own.

A process, because a function that hangs cannot be stopped in any other way; it is started once and
lives as long as the reward.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from tunesmith.errors import RewardError, SpecError
from tunesmith.rewards.contract import Attempt, OpenRun, RewardKind, Scored

_CHILD: Final = str(Path(__file__).with_name("file_process.py"))
_START_SECONDS: Final = 120.0


class FileReward(RewardKind):
    """A function of yours: `def reward(prompts, replies, **columns)` -> a list of floats."""

    kind: Literal["file"] = "file"
    """Calls a function of a Python file with the texts of many rows."""
    path: str
    """The Python file."""
    function: str = "reward"
    """The function in it: takes lists `prompts` and `replies`, and the rows' other columns as lists
    by name; returns one float a row."""
    timeout: float = Field(default=10.0, gt=0)
    """Seconds that a call may take; a batch that is not done by then is scored row by row, each
    with this limit."""

    @property
    def label(self) -> str:
        """The function's name."""
        return self.function

    def attempts(self, open_run: OpenRun | None) -> Attempt:
        """Start the process and return what scores; a file that cannot be used fails here.

        Raises:
            SpecError: the file, or the function in it, is missing or takes other arguments.
        """
        if not Path(self.path).is_file():
            raise SpecError(f"rewards.path: there is no file {self.path!r}")
        caller = _Caller(self)
        return caller.attempt


class _Caller:
    """Speaks with the process: one line of JSON there, one back."""

    def __init__(self, settings: FileReward) -> None:
        self.settings = settings
        self.start()

    def start(self) -> None:
        """Start the process and wait until it has loaded the function."""
        command = [sys.executable, _CHILD, os.path.abspath(self.settings.path)]
        self.process = subprocess.Popen(
            [*command, self.settings.function], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.finalizer = weakref.finalize(self, _stop, self.process)
        answer = self._answer(time.monotonic() + _START_SECONDS)
        if answer is None or "error" in answer:
            self.finalizer()
            why = f"took over {_START_SECONDS:.0f} s" if answer is None else answer["error"]
            raise SpecError(f"{self.settings.path}: {why}")

    def attempt(self, rows: Sequence[Scored]) -> list[float | RewardError]:
        """Score rows in one call, or one by one where that call fails, to know which row it is."""
        if not rows:
            return []
        scores = self._call(rows)
        if isinstance(scores, list):
            return [
                score if isinstance(score, float) else RewardError(number, str(score))
                for number, score in enumerate(scores)
            ]
        if len(rows) == 1:
            return [RewardError(0, scores)]
        found: list[float | RewardError] = []
        for number, row in enumerate(rows):
            (one,) = self.attempt([row])
            found.append(RewardError(number, one.why) if isinstance(one, RewardError) else one)
        return found

    def _call(self, rows: Sequence[Scored]) -> list[float | str] | str:
        """Return a score or what is wrong a row; a text where the call as a whole failed."""
        names = dict.fromkeys(name for row in rows for name in row.columns)
        task = {
            "prompts": [row.prompt for row in rows],
            "replies": [row.reply for row in rows],
            "columns": {name: [row.columns.get(name) for row in rows] for name in names},
        }
        # Dates and the like, as Parquet has them, go as text.
        line = json.dumps(task, default=str).encode() + b"\n"
        deadline = time.monotonic() + self.settings.timeout
        answer = self._answer(deadline) if self._send(line, deadline) else None
        if answer is None:
            self.finalizer()
            self.start()
            return f"{self._name} took longer than {self.settings.timeout:g} s"
        if "ended" in answer:
            self.finalizer()
            self.start()
            return f"{self._name} ended its process"
        return f"{self._name} {answer['error']}" if "error" in answer else answer["scores"]

    @property
    def _name(self) -> str:
        return f"{self.settings.function} of {self.settings.path}"

    def _send(self, line: bytes, deadline: float) -> bool:
        """Write a line; False where the process does not read it in time."""
        stdin = self.process.stdin
        assert stdin is not None  # noqa: S101 - a pipe, see start()
        rest = memoryview(line)
        while rest:
            wait = deadline - time.monotonic()
            if wait <= 0 or not select.select([], [stdin], [], wait)[1]:
                return False
            try:
                # A pipe takes this much without blocking once it is writable.
                written = os.write(stdin.fileno(), rest[: select.PIPE_BUF])
            except BrokenPipeError:
                return True
            rest = rest[written:]
        return True

    def _answer(self, deadline: float) -> dict[str, Any] | None:
        """Return the next line; None where it takes too long, `ended` where none will come."""
        stdout = self.process.stdout
        assert stdout is not None  # noqa: S101 - a pipe, see start()
        line = b""
        while not line.endswith(b"\n"):
            wait = deadline - time.monotonic()
            if wait <= 0 or not select.select([stdout], [], [], wait)[0]:
                return None
            part = os.read(stdout.fileno(), 1 << 16)
            if not part:
                return {"ended": True, "error": "ended before its function could be called"}
            line += part
        answer: dict[str, Any] = json.loads(line)
        return answer


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
