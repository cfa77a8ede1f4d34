"""A reward for Python code: the share of its tests that pass, run in a process of its own.

What the child process is kept from: running longer than `timeout`, taking more than `memory`,
writing files, starting processes, and reaching the network (by a network namespace where the kernel
allows one, else by an audit hook). It can read every file that the user can read, and code that
means harm can break out of a Python process; for replies of a model that nobody trusts, run the
whole of Tunesmith in a container or a virtual machine.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from tunesmith.errors import RewardError
from tunesmith.rewards.checks import last_fenced
from tunesmith.rewards.contract import Attempt, OpenRun, RewardKind, Scored, column

_SANDBOX: Final = str(Path(__file__).with_name("sandbox.py"))
_NAMESPACES: Final = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")


class Code(RewardKind):
    """The share of a row's tests that the reply's Python code passes."""

    kind: Literal["code"] = "code"
    """Runs the reply's last ``` block (the whole reply where it has none), then each test."""
    column: str = "tests"
    """The column with the tests: one text or a list of texts of Python (`assert f(2) == 4`),
    each of which passes where it raises nothing. A text may be such a list written out, as JSON or
    as Python does."""
    all_or_nothing: bool = False
    """Give 1 only where every test passes, else 0."""
    timeout: float = Field(default=5.0, gt=0)
    """Seconds that a row's code and tests may take together; later the row has passed nothing."""
    memory: int = Field(default=512, ge=64)
    """MiB of address space that they may take."""
    workers: int = Field(default=0, ge=0)
    """Rows that run side by side; 0 takes the number of cores, at most 8."""

    def attempts(self, open_run: OpenRun | None) -> Attempt:
        """Return the check; it needs no reward model."""
        return self._score

    def _score(self, rows: Sequence[Scored]) -> list[float | RewardError]:
        workers = self.workers or min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(self._score_one, range(len(rows)), rows))

    def _score_one(self, number: int, row: Scored) -> float | RewardError:
        try:
            tests = column(row, self.column)
        except ValueError as error:
            return RewardError(number, str(error))
        tests = _several(tests) if isinstance(tests, str) else tests
        if not isinstance(tests, list) or not tests or not all(map(_says_something, tests)):
            return RewardError(number, f"the column {self.column!r} holds no text or list of texts")
        passed = count_passed(
            last_fenced(row.reply), tests, timeout=self.timeout, memory=self.memory
        )
        return float(passed == len(tests)) if self.all_or_nothing else passed / len(tests)


def _says_something(test: object) -> bool:
    """Return whether it is a text that is not blank, which every code would pass."""
    return isinstance(test, str) and bool(test.strip())


def _several(text: str) -> list[str]:
    """Return the tests of a text: itself, or those of a list written out, as CSV files have it.

    Run as it stands such a list is a test that every code passes.
    """
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            if isinstance(found := read(text.strip()), list):
                return found
    return [text]


def count_passed(code: str, tests: Sequence[str], *, timeout: float, memory: int) -> int:
    """Return how many of `tests` raise nothing after `code` has run, in a process of their own.

    Args:
        code: Python source; code that raises passes nothing.
        tests: Python sources that see what the code defined.
        timeout: seconds for all of it; beyond it nothing has passed.
        memory: MiB of address space.
    """
    task = {"code": code, "tests": list(tests), "memory": memory, "seconds": math.ceil(timeout)}
    reading, writing = os.pipe()
    try:
        with tempfile.TemporaryDirectory() as folder:
            try:
                child = _start(writing, folder)
            finally:
                os.close(writing)
            try:
                child.communicate(json.dumps(task).encode(), timeout=timeout)
            except subprocess.TimeoutExpired:
                return 0
            finally:
                _end(child)
        answer = os.read(reading, 100)
    finally:
        os.close(reading)
    # Without an answer the code ended the process: sys.exit, too much memory, a crash.
    return int(json.loads(answer)) if answer else 0


def _start(answer: int, folder: str) -> subprocess.Popen[bytes]:
    # -I: no PYTHON* variables, no user packages, no current folder on the path.
    return subprocess.Popen(
        [*_without_network(), sys.executable, "-I", _SANDBOX, str(answer)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"PATH": os.defpath},
        pass_fds=(answer,),
        start_new_session=True,
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and all that it may have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@functools.cache
def _without_network() -> tuple[str, ...]:
    """Return the command that takes a process off the network; empty where that is not allowed."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, *_NAMESPACES)
    tried = subprocess.run([*command, sys.executable, "-c", ""], capture_output=True, check=False)
    return command if tried.returncode == 0 else ()
