"""How much memory training takes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

from tunesmith.errors import SetupError

_STATUS = Path("/proc/self/status")
_FORGET = Path("/proc/self/clear_refs")


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes allocated on `device`, or resident in this process for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if _STATUS.exists():
        # getrusage would count what the parent process held when it started this one.
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak(device: torch.device) -> None:
    """Let `peak_memory` report the peak from now on.

    Raises:
        SetupError: the system cannot forget the peak of a process; Linux can.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if device.type != "cpu" or not _FORGET.exists():
        raise SetupError(
            f"the peak memory of single steps cannot be measured on {device.type} here; it can on "
            "CUDA and on Linux"
        )
    _FORGET.write_text("5")  # see proc(5): the peak becomes what is resident now


def memory_now(device: torch.device) -> int:
    """Return the bytes allocated on `device`, or resident in this process for the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
