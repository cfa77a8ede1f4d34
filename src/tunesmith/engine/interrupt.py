"""SIGINT and SIGTERM as a wish to stop after the step."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Final, Self

MOMENT: Final = 0.2
"""Seconds in which signals are one wish: `timeout` tells its process, then the whole group."""


class Interrupt:
    """Inside `with Interrupt() as interrupt`, the first SIGINT or SIGTERM only sets `requested`.

    It also puts the old handlers back after a moment, so a second signal does what it always did:
    it ends the process. Outside the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._put_back()

    def _request(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested:
            return  # while the first one waits below
        self.requested = True
        time.sleep(MOMENT)
        self._put_back()

    def _put_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None: a handler that was not set from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
