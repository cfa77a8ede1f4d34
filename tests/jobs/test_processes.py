"""Processes for runs: forked behind the heavy imports, or new where CUDA fails in forks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tunesmith.jobs import processes
from tunesmith.jobs.processes import started


def note(path: Path) -> None:
    """Say whether the heavy imports were there when this process began."""
    path.write_text(str("tunesmith.jobs.train" in sys.modules))


@pytest.mark.parametrize(
    ("cuda", "forks", "imported"),
    [(None, False, True), ("13.0", True, True), ("13.0", False, False)],
)
def test_processes_are_forked_unless_cuda_refuses_to_work_in_forks(
    cuda: str | None, forks: bool, imported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(processes, "_forks_can_use_cuda", lambda: forks)
    process = started(note, tmp_path / "note")
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "note").read_text() == str(imported)


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks may well be unable to use CUDA")
def test_a_fork_of_the_server_is_asked() -> None:
    assert processes._forks_can_use_cuda()


def test_training_imports_no_more_of_the_compiler_than_pytorch_does() -> None:
    """What is left out asks CUDA for its devices, and costs every start a moment."""
    code = "import sys, tunesmith.jobs.train; print([m for m in sys.modules if m in sys.argv])"
    late = ["torch._inductor.lowering", "torch._inductor.pattern_matcher"]
    told = subprocess.run(
        [sys.executable, "-c", code, *late], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "[]"
