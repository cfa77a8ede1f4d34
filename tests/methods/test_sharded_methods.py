"""Methods sharded over two processes learn, fix and save what one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("sharded_methods.py")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of every method, trained alone and sharded."""
    directory = tmp_path_factory.mktemp("adapters")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # On the CPU, where every machine has room for two processes.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(PROGRAM), str(directory)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "method", ["ia3", "bitfit", "adalora", "adapter", "compacter", "diff_pruning"]
)
def test_two_processes_save_what_one_saves(method: str, adapters: Path) -> None:
    one = load_file(adapters / method / "alone" / "adapter_model.safetensors")
    two = load_file(adapters / method / "sharded" / "adapter_model.safetensors")
    assert two.keys() == one.keys()
    for name, tensor in two.items():
        # the mean over rows is summed in another order
        torch.testing.assert_close(tensor, one[name], atol=1e-6, rtol=1e-5)
