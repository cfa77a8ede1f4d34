"""Peak memory of this process and of a device."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_process_bytes() -> int:
    """Return the most bytes that this process has had resident since it started."""
    if _STATUS.exists():
        # Not getrusage, which begins with what the parent process held when it forked.
        lines = _STATUS.read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int:
    """Return the most bytes that tensors took on `device` (this process's peak for the CPU)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        # Metal keeps no peak; what the driver holds never shrinks by itself.
        return torch.mps.driver_allocated_memory()
    return peak_process_bytes()
