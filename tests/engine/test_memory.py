"""The peak is a peak."""

import resource
from pathlib import Path

import pytest
import torch

from tunesmith.engine import memory

CPU = torch.device("cpu")


def test_the_peak_rises_with_what_is_held_and_stays_when_it_is_freed() -> None:
    before = memory.peak_memory(CPU)
    held = torch.ones(before // 4 + 2**24)
    during = memory.peak_memory(held.device)
    del held
    assert during > before
    assert memory.peak_memory(CPU) > before


def test_without_proc_the_peak_comes_from_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", Path("/nonexistent"))
    monkeypatch.setattr(memory.sys, "platform", "linux")
    known = memory.resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert memory.peak_memory(CPU) >= known * 1024
