"""Started by torchrun: a few trainings, one after another, each leaving its weights by rank."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from plain_task import count, plain_task, train, weighed_task, weights
from tunesmith.engine.distribution import Peers, connect
from tunesmith.engine.evaluation import mean_loss
from tunesmith.engine.events import Event, StepDone
from tunesmith.engine.listeners import JsonlWriter
from tunesmith.engine.settings import EngineSettings
from tunesmith.engine.task import Task
from tunesmith.errors import CheckpointError, SpecError, TrainingError
from tunesmith.types import LossTerms


def main(root: Path, device: Any) -> None:
    for distribution in ("ddp", "fsdp"):
        engine = EngineSettings(device=device, distribution=distribution)
        peers = connect(engine)
        whole_run(root / distribution, engine, peers)
        resumed_run(root / distribution, engine, peers)
        told_run(root / f"told-{distribution}", engine, peers)
        idle_run(root / f"idle-{distribution}", engine, peers)
    engine = EngineSettings(device=device)
    peers = connect(engine)
    small_memory_on_one(root / "memory", engine, peers)
    not_finite_on_one(root / "finite", engine, peers)
    signalled_on_one(root / "signal", engine, peers)
    full_disk(root / "disk", engine, peers)
    sharded_8bit(root / "8bit", device, peers)
    small_memory_in_a_shard(root / "shard", device, peers)


def keep(task: Task[Any], root: Path, peers: Peers) -> None:
    save_file(weights(task), root / f"weights-{peers.rank}.safetensors")


def measured(task: Task[Any], peers: Peers) -> Task[Any]:
    rows = task.rows.rows[:5]
    task.penalty = lambda: 0.1 * (task.model.get_parameter("norm.weight") ** 2).sum()
    task.evaluate = lambda: mean_loss(task.module, rows, task.collate, batch_size=2, peers=peers)
    return task


def whole_run(root: Path, engine: EngineSettings, peers: Peers) -> None:
    # Each process starts from its own weights: the first one's have to win.
    task = measured(plain_task(seed=1 + peers.rank), peers)
    listen = JsonlWriter(root / "metrics.jsonl")
    settings = {"accumulation_steps": 2, "save_every": 3, "keep": 9, "evaluate_every": 2}
    train(task, root, listen=listen, engine=engine, peers=peers, **settings)
    keep(task, root, peers)


def resumed_run(root: Path, engine: EngineSettings, peers: Peers) -> None:
    task = measured(plain_task(seed=7), peers)
    resumed = root / "resumed"
    start = root / "checkpoints" / "step-00000003"
    settings = {"accumulation_steps": 2, "evaluate_every": 2}
    train(task, resumed, resume_from=start, engine=engine, peers=peers, **settings)
    keep(task, resumed, peers)


def told_run(root: Path, engine: EngineSettings, peers: Peers) -> None:
    # A process that lacks memory finds it out in the forward that comes before the others.
    lacks = peers.rank == 1 and engine.distribution == "ddp"
    task = weighed_task(most=2 if lacks else None)
    listen = JsonlWriter(root / "metrics.jsonl")
    train(task, root, listen=listen, engine=engine, peers=peers, batch_size=4)
    keep(task, root, peers)


def idle_run(root: Path, engine: EngineSettings, peers: Peers) -> None:
    # Fewer rows to measure than processes: the second one has nothing to do meanwhile.
    task = plain_task()
    rows = task.rows.rows[:1]
    task.evaluate = lambda: mean_loss(task.module, rows, task.collate, batch_size=2, peers=peers)
    train(task, root, engine=engine, peers=peers, accumulation_steps=2, evaluate_every=2)
    keep(task, root, peers)


def small_memory_on_one(root: Path, engine: EngineSettings, peers: Peers) -> None:
    task = plain_task(most=2 if peers.rank == 1 else None)
    listen = JsonlWriter(root / "metrics.jsonl")
    train(task, root, listen=listen, engine=engine, peers=peers, batch_size=4)
    keep(task, root, peers)


class Spoiled(torch.nn.Module):
    """Gives a loss that is not finite in its second call."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        terms: LossTerms = self.module(batch)
        self.calls += 1
        factor = float("nan") if self.calls == 2 else 1.0
        return LossTerms(terms.total * factor, count(batch), terms.metrics)


def not_finite_on_one(root: Path, engine: EngineSettings, peers: Peers) -> None:
    task = plain_task()
    if peers.rank == 1:
        task.module = Spoiled(task.module)
    listen = JsonlWriter(root / "metrics.jsonl")
    train(task, root, listen=listen, engine=engine, peers=peers)
    keep(task, root, peers)


def signalled_on_one(root: Path, engine: EngineSettings, peers: Peers) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    task = plain_task()
    outcome = train(task, root, listen=stop, engine=engine, peers=peers)
    (root / f"outcome-{peers.rank}").write_text(f"{outcome.stopped_because} {outcome.steps}")


def full_disk(root: Path, engine: EngineSettings, peers: Peers) -> None:
    root.mkdir(exist_ok=True)
    (root / "file").write_text("not a directory")
    try:
        train(plain_task(), root / "file", engine=engine, peers=peers)
    except CheckpointError as error:
        (root / f"error-{peers.rank}").write_text(str(error))


def sharded_8bit(root: Path, device: Any, peers: Peers) -> None:
    root.mkdir(exist_ok=True)
    engine = EngineSettings(device=device, distribution="fsdp")
    try:
        train(plain_task(), root, engine=engine, peers=peers, optimizer="adamw_8bit")
    except SpecError as error:
        (root / f"error-{peers.rank}").write_text(str(error))


def small_memory_in_a_shard(root: Path, device: Any, peers: Peers) -> None:
    """Comes last: the process that ran out of memory leaves the other one waiting."""
    root.mkdir(exist_ok=True)
    engine = EngineSettings(device=device, distribution="fsdp")
    task = plain_task(most=2 if peers.rank == 1 else None)
    try:
        train(task, root, engine=engine, peers=peers, batch_size=4)
    except (TrainingError, RuntimeError) as error:
        (root / f"error-{peers.rank}").write_text(str(error))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
