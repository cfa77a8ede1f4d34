"""The processes in which PyTorch's compiler makes kernels, out of reach of a wish to stop."""

from __future__ import annotations

import signal

from torch.utils._triton import has_triton_package


def start_compile_workers() -> None:
    """Start the compiler's processes, deaf to SIGINT and SIGTERM; nothing without Triton.

    `timeout`, a terminal, SLURM and systemd signal all processes of a run at once. The run finishes
    its step after the first signal, and may have to compile for it. PyTorch would wait for ever
    for a worker that the signal ended: 2.11 to 2.13 hold the worker's end of their pipe open
    themselves and never see it closed. That pipe also ends the workers once this process is gone,
    however it went, after the kernels that they are at.

    They are started once in a process: those that a graph has started before stay as they are.
    """
    if not has_triton_package():  # no other kernels are made in processes
        return
    # PyTorch's compiler takes seconds to import, and not every run compiles.
    from torch._inductor.async_compile import AsyncCompile

    # Processes inherit what is blocked, here through two generations and the compilers that these
    # call. To ignore the signals instead would lose one that comes now: blocked, it waits.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        AsyncCompile.warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
