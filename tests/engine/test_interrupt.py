"""What counts as one wish to stop. tests/engine/test_resume.py stops runs with one and with two."""

import os
import signal
import threading
import time

import pytest

from plain_task import in_process
from tunesmith.engine.interrupt import Interrupt


def signalled(pause: float) -> None:
    """Get SIGTERM, and once more after so many seconds."""
    again = threading.Timer(pause, os.kill, (os.getpid(), signal.SIGTERM))
    with Interrupt() as interrupt:
        again.start()
        os.kill(os.getpid(), signal.SIGTERM)
        again.join()
        time.sleep(0.1)
        assert interrupt.requested


@pytest.mark.parametrize(
    ("pause", "code"), [(0.01, 0), (1.0, -signal.SIGTERM)], ids=["at once", "later"]
)
def test_signals_of_one_moment_are_one_wish(pause: float, code: int) -> None:
    assert in_process(signalled, pause) == code
