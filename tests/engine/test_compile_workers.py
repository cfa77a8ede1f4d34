"""A signal to all processes of a run, as `timeout` and SLURM send it, while the compiler works.

In the place of a compiler, PyTorch's workers call one that sends the signals itself, so that they
come while it is waited for, and none need be installed.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from torch._inductor.async_compile import AsyncCompile

from plain_task import events_of, in_process, plain_task, train
from tunesmith.engine import compiled
from tunesmith.engine.checkpoint import checkpoints, step_of
from tunesmith.engine.listeners import JsonlWriter
from tunesmith.ops import compile_workers

pytestmark = pytest.mark.slow
SECONDS = 15
COMPILER = """
import os, signal, sys, time
for receiver, number, seconds in zip(*[map(int, sys.argv[1:])] * 3):
    os.kill(receiver, number)
    time.sleep(seconds)
"""
ALL = 0
"""Who hears a signal: every process of the compiler's group, which is the run's."""


def compiling_run(run_dir: Path, *signals: tuple[int | None, int, int]) -> None:
    """Train in a session of its own, and wait in step 1 for a compiler that sends signals.

    Args:
        run_dir: the run's; `group` tells the number of the group of processes.
        signals: each to whom, None for the run alone; which; and the seconds that follow.
    """
    os.setsid()
    (run_dir / "group").write_text(f"{os.getpid()}")
    arguments = [str(os.getpid() if part is None else int(part)) for s in signals for part in s]
    torch._inductor.config.compile_threads = 2
    task = plain_task()

    def compile_once(step: int, total: int) -> None:
        if step == 1:
            pool = AsyncCompile.process_pool()
            pool.submit(os.getpid).result()  # starting takes how long it takes
            signal.alarm(SECONDS)  # SIGALRM ends a run that hangs
            compiler = [sys.executable, "-c", COMPILER, *arguments]
            pool.submit(subprocess.check_call, compiler).result()

    task.on_step = compile_once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_workers, "has_triton_package", lambda: True)  # as beside a GPU
        compiled.CompiledCall(nn.Identity())
    train(task, run_dir, listen=JsonlWriter(run_dir / "metrics.jsonl"))


def alive(group: int) -> list[psutil.Process]:
    """The processes of a group that have not ended, whether or not somebody waited for them."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != "zombie":
                found.append(process)
        except ProcessLookupError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_to_all_while_compiling_finishes_the_step_and_saves(
    tmp_path: Path, number: int
) -> None:
    assert in_process(compiling_run, tmp_path, (ALL, number, 1)) == 0
    finished = events_of(tmp_path, "run_finished")
    assert [event["stopped_because"] for event in finished] == ["interrupted"]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [1]


@pytest.mark.parametrize(
    "signals",
    [
        [(ALL, signal.SIGTERM, 1), (ALL, signal.SIGTERM, 3)],
        [(None, signal.SIGKILL, 3)],
    ],
    ids=["second signal", "kill -9"],
)
def test_a_run_ends_at_once_while_compiling_and_its_workers_after_it(
    tmp_path: Path, signals: list[tuple[int | None, int, int]]
) -> None:
    assert in_process(compiling_run, tmp_path, *signals) == -signals[-1][1]
    group = int((tmp_path / "group").read_text())
    assert alive(group)  # the compiler at least, so the run did not wait for it
    until = time.monotonic() + SECONDS
    while alive(group) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(group)
