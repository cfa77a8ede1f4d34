"""A program for two processes: two steps of LoRA alone, replicated and sharded; saves the adapters.

torchrun --nproc-per-node 2 sharded_lora.py DIRECTORY
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from tunesmith.methods import LoRA
from tunesmith.methods.adapter_files import write_adapters
from tunesmith.methods.tuned import attach


def train(way: str, dtype: torch.dtype, directory: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    model = GPT2LMHeadModel(config).eval().to(dtype)
    tuned = attach(model, LoRA(rank=4, targets=["attention.q", "mlp.down"], bias="all"))
    for parameter in tuned.trainable().values():
        nn.init.normal_(parameter, std=0.1)
    start = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    module: nn.Module = model
    if way == "fsdp":
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
        tuned.load_state_dict(start)
    elif way == "ddp":
        module = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(tuned.trainable().values(), lr=1.0)
    rows = torch.arange(24).reshape(4, 6)
    mine = rows if way == "alone" else rows[dist.get_rank() :: dist.get_world_size()]
    for _ in range(2):
        optimizer.zero_grad()
        module(mine, labels=mine).loss.backward()
        optimizer.step()
    files = tuned.files()
    if dist.get_rank() == 0:
        write_adapters(directory, files)


def main(directory: str) -> None:
    dist.init_process_group("gloo")
    for way in ("alone", "ddp", "fsdp"):
        train(way, torch.float32, Path(directory) / way / "float32")
        train(way, torch.bfloat16, Path(directory) / way / "bfloat16")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
