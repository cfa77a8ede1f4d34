"""LoRA replicated and sharded over processes trains as in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("sharded_lora.py")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that two processes trained: alone, replicated, sharded; on a base of each dtype."""
    directory = tmp_path_factory.mktemp("adapters")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(PROGRAM), str(directory)]
    # On the CPU, where every machine has room for two processes.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    # bfloat16 activations round differently where the rows are split between processes
    ("dtype", "tolerance"),
    [("float32", 1e-6), ("bfloat16", 5e-3)],
)
def test_two_processes_save_the_adapter_that_one_saves(
    way: str, dtype: str, tolerance: float, adapters: Path
) -> None:
    one = load_file(adapters / "alone" / dtype / "adapter_model.safetensors")
    two = load_file(adapters / way / dtype / "adapter_model.safetensors")
    assert two.keys() == one.keys()
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], atol=tolerance, rtol=tolerance)
