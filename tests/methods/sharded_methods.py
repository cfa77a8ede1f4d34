"""A program for two processes: steps of several methods alone and sharded; saves what they learn.

torchrun --nproc-per-node 2 sharded_methods.py DIRECTORY
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from tunesmith.methods import IA3, AdaLoRA, Adapter, BitFit, Compacter, DiffPruning
from tunesmith.methods.adapter_files import write_adapters
from tunesmith.methods.contract import Method
from tunesmith.methods.tuned import attach

METHODS: dict[str, Method] = {
    "ia3": IA3(),
    "bitfit": BitFit(targets=["attention.q", "norm"]),
    "adalora": AdaLoRA(rank=4, target_rank=2, interval=1),
    "adapter": Adapter(placement="parallel", bottleneck=4, layer_norm=True, scale="learned"),
    "compacter": Compacter(bottleneck=8),
    "diff_pruning": DiffPruning(targets=["attention.q", "mlp.down"], l0_penalty=1e-3),
}


def train(method: Method, *, sharded: bool, directory: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    # In eval mode, so that no gates are drawn: two processes draw others than one.
    model = GPT2LMHeadModel(config).eval()
    tuned = attach(model, method)
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.trainable().values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    start = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    if sharded:
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
        tuned.load_state_dict(start)
    optimizer = torch.optim.SGD(tuned.trainable().values(), lr=1.0)
    rows = torch.arange(24).reshape(4, 6)
    mine = rows[dist.get_rank() :: dist.get_world_size()] if sharded else rows
    for step in range(1, 5):
        optimizer.zero_grad()
        loss = model(mine, labels=mine).loss
        if (penalty := tuned.penalty()) is not None:
            loss = loss + (penalty.full_tensor() if isinstance(penalty, DTensor) else penalty)
        loss.backward()
        optimizer.step()
        tuned.on_step(step, 4)
    files = tuned.files()
    if dist.get_rank() == 0:
        write_adapters(directory, files)


def main(directory: str) -> None:
    dist.init_process_group("gloo")
    for name, method in METHODS.items():
        for sharded in (False, True):
            place = Path(directory) / name / ("sharded" if sharded else "alone")
            place.parent.mkdir(parents=True, exist_ok=True)
            train(method, sharded=sharded, directory=place)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
