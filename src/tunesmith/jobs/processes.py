"""Processes that work for a command: they end with it, and one at a time works on a directory."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from tunesmith.errors import TrainingError

_LOCK_SECONDS: Final = 60.0


def started(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Run `work` in a fresh process, whose peak memory is its own, and return the process.

    The heavy imports happen once, in a server, and processes are forked from there. CUDA refuses
    to work in these where an import asked how many devices there are, which depends on the versions
    of the libraries; then each process is a new interpreter with imports of its own.
    """
    import torch

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tunesmith.jobs.train"])
    forks = torch.version.cuda is None or _forks_can_use_cuda()
    process = (server if forks else multiprocessing.get_context("spawn")).Process(
        target=work, args=arguments
    )
    process.start()
    return process


@cache
def _forks_can_use_cuda() -> bool:
    process = multiprocessing.get_context("forkserver").Process(target=_ask)
    process.start()
    process.join()
    return process.exitcode == 0


def _ask() -> None:
    import torch

    sys.exit(torch.cuda._is_in_bad_fork())


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
