"""Processes that work for a command: they end with it, and one at a time works on a directory."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from tunesmith.errors import TrainingError

_LOCK_SECONDS: Final = 60.0


def end_with_parent() -> None:
    """Have this process end at once when the one that started it is gone, however it went.

    The one that multiprocessing names, which is told by a pipe that closes. The system's parent is
    the fork server, and that lives for as long as any of its processes does.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - called in a process that multiprocessing started

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep other processes from `directory` that ask for the same; one may take a moment to leave.

    Raises:
        TrainingError: another one is still at work there after a minute.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.with_name(f".{directory.name}.lock"), timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(
            f"{directory}: another process works on it; wait until it is done, or end it"
        ) from None
    try:
        yield
    finally:
        lock.release()
