"""LoRA replicated and sharded over processes trains as in one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("sharded_lora.py")


def train(way: str, processes: int, directory: Path) -> Path:
    """Run the program, which saves an adapter trained on a base of each dtype."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, f"--nproc-per-node={processes}", str(PROGRAM), way, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters that one process trains."""
    return train("one", 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_save_the_adapter_that_one_saves(
    way: str, alone: Path, tmp_path: Path
) -> None:
    train(way, 2, tmp_path)
    # bfloat16 activations round differently where the rows are split between processes
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 5e-3)):
        one = load_file(alone / dtype / "adapter_model.safetensors")
        two = load_file(tmp_path / dtype / "adapter_model.safetensors")
        assert two.keys() == one.keys()
        for name, tensor in two.items():
            torch.testing.assert_close(tensor, one[name], atol=tolerance, rtol=tolerance)
