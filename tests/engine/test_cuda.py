"""What only a CUDA device shows: its memory running out, and its own random generator."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plain_task import plain_task, train, weights
from tunesmith.engine.events import Event, MicroBatchHalved
from tunesmith.engine.settings import EngineSettings
from tunesmith.types import Batch, LossTerms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = EngineSettings(device="cuda")


class Greedy(nn.Module):
    """Takes a third of the device's memory for each row."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> LossTerms:
        rows = batch["input_ids"]
        third = torch.cuda.get_device_properties(rows.device).total_memory // 3
        block = torch.empty(len(rows), third, dtype=torch.uint8, device=rows.device)
        terms: LossTerms = self.module(batch)
        del block
        return terms


def test_running_out_of_memory_halves_the_micro_batch_and_learns_the_same(tmp_path: Path) -> None:
    plain, greedy = plain_task(), plain_task()
    greedy.module = Greedy(greedy.module)
    events: list[Event] = []
    train(plain, tmp_path / "plain", batch_size=4, engine=CUDA)
    train(greedy, tmp_path / "greedy", batch_size=4, engine=CUDA, listen=events.append)
    # Sums over two rows instead of four are rounded in another order.
    torch.testing.assert_close(weights(greedy), weights(plain), rtol=1e-4, atol=1e-5)
    halved = [event.micro_batch for event in events if isinstance(event, MicroBatchHalved)]
    assert halved == [2]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_resuming_ends_with_the_same_bits(dtype: torch.dtype | None, tmp_path: Path) -> None:
    tasks: list[Any] = [plain_task(dropout=0.4, seed=seed) for seed in (1, 2)]
    for task in tasks:
        task.autocast_dtype = dtype
    settings = {"save_every": 2, "keep": 9, "engine": CUDA}
    train(tasks[0], tmp_path / "whole", **settings)
    start = tmp_path / "whole" / "checkpoints" / "step-00000002"
    train(tasks[1], tmp_path / "resumed", resume_from=start, **settings)
    torch.testing.assert_close(weights(tasks[1]), weights(tasks[0]), rtol=0, atol=0)


def test_the_device_learns_what_the_cpu_learns(tmp_path: Path) -> None:
    there, here = plain_task(), plain_task()
    train(here, tmp_path / "cpu")
    train(there, tmp_path / "cuda", engine=CUDA)
    assert there.model.get_parameter("head.weight").is_cuda
    on_cpu = {name: value.cpu() for name, value in weights(there).items()}
    # Matrix products round differently on the two, and Adam divides by small gradients.
    torch.testing.assert_close(on_cpu, weights(here), rtol=1e-3, atol=1e-4)
