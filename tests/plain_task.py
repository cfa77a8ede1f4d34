"""The engine's task at its plainest: a small network that predicts the next number of a row."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.engine.checkpoint import find_resumable
from tunesmith.engine.distribution import Peers
from tunesmith.engine.evaluation import mean_loss
from tunesmith.engine.events import Event, StepDone
from tunesmith.engine.listeners import JsonlWriter
from tunesmith.engine.loop import Outcome, fit
from tunesmith.engine.settings import (
    CheckpointSettings,
    EngineSettings,
    EvaluationSettings,
    TrackingSettings,
    TrainSettings,
)
from tunesmith.engine.task import Task
from tunesmith.types import IGNORE, JSON, Batch, LossTerms

VOCAB, WIDTH = 17, 16


class Network(nn.Module):
    """Embedding, two blocks with dropout, head; a stand-in for a language model."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout)) for _ in "ab"
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return cast("Tensor", self.head(self.norm(hidden)))


class NextNumber(nn.Module):
    """Summed cross-entropy of each next number; `most` rows fit into its memory."""

    def __init__(self, model: nn.Module, most: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.most = most

    def forward(self, batch: Batch) -> LossTerms:
        if self.most is not None and len(batch["input_ids"]) > self.most:
            raise torch.OutOfMemoryError("pretended")
        logits = self.model(batch["input_ids"])[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        right = (logits.argmax(dim=-1) == labels).sum()
        return LossTerms(total, count(batch), {"accuracy": right})


def count(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def collate(rows: list[list[int]]) -> Batch:
    length = max(map(len, rows))
    padded = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {
        "input_ids": padded,
        "attention_mask": mask,
        "labels": padded.masked_fill(mask == 0, IGNORE),
    }


class Rows:
    """Rows of unequal lengths in a new order each epoch."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows
        self.taken = 0

    @property
    def rows_per_epoch(self) -> int | None:
        return len(self.rows)

    @property
    def epoch(self) -> float:
        return self.taken / len(self.rows)

    def take(self, count: int) -> list[list[int]]:
        chosen = [self._row(index) for index in range(self.taken, self.taken + count)]
        self.taken += count
        return chosen

    def _row(self, index: int) -> list[int]:
        epoch, place = divmod(index, len(self.rows))
        order = torch.randperm(
            len(self.rows), generator=torch.Generator().manual_seed(epoch)
        ).tolist()
        return self.rows[order[place]]

    def state_dict(self) -> dict[str, JSON]:
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]


def number_rows(count: int = 11) -> list[list[int]]:
    """Counting upwards from different starts, in lengths from 2 to 8."""
    return [[(3 * n + i) % VOCAB for i in range(2 + n % 7)] for n in range(count)]


def plain_task(*, dropout: float = 0.0, most: int | None = None, seed: int = 1) -> Task[list[int]]:
    torch.manual_seed(seed)
    network = Network(dropout)
    return Task(
        module=NextNumber(network, most),
        model=network,
        trainable=dict(network.named_parameters()),
        rows=Rows(number_rows()),
        collate=collate,
        count=count,
        default_learning_rate=1e-2,
        block_modules=list(network.blocks),
    )


class Weighed(NextNumber):
    """Weighs the loss by what it is told of the whole effective batch, or sees in its own."""

    def forward(self, batch: Batch) -> LossTerms:
        terms = super().forward(batch)
        nats = terms.total.detach()
        share = batch.get("share", nats / terms.count)
        return LossTerms(terms.total * (1 + share), terms.count, {"nats": nats})


def weighed_task(*, most: int | None = None, seed: int = 1) -> Task[list[int]]:
    task = plain_task(seed=seed)
    task.module = Weighed(task.model, most)
    task.common = lambda means: {"share": torch.tensor(means["nats"])}
    return task


def weights(task: Task[Any]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in task.model.named_parameters()}


def train(
    task: Task[Any],
    run_dir: Path,
    *,
    resume_from: Path | None = None,
    listen: Callable[[Event], None] | None = None,
    peers: Peers | None = None,
    save_every: int | None = None,
    keep: int = 2,
    evaluate_every: int | None = None,
    best: str = "loss",
    engine: EngineSettings | None = None,
    **settings: Any,
) -> Outcome:
    """`fit` with settings as keyword arguments of TrainSettings."""
    return fit(
        task,
        train=TrainSettings(**({"batch_size": 2, "max_steps": 6} | settings)),
        checkpoint=CheckpointSettings(every_steps=save_every, keep=keep),
        evaluation=EvaluationSettings(every_steps=evaluate_every, best=best),
        engine=engine or EngineSettings(device="cpu"),
        tracking=TrackingSettings(),
        run_dir=run_dir,
        seed=5,
        listeners=[listen] if listen else [],
        resume_from=resume_from,
        peers=peers,
    )


def gradients_seen(task: Task[Any]) -> list[dict[str, Tensor]]:
    """Collects the gradients of each step, as methods see them after it."""
    seen: list[dict[str, Tensor]] = []

    def keep(step: int, total: int) -> None:
        del step, total
        named = task.model.named_parameters()
        seen.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    task.on_step = keep
    return seen


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's record."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def long_run(run_dir: Path, *, killed_at: int | None = None, signals: int = 0) -> None:
    """Train 40 steps with dropout, evaluations and checkpoints from wherever `run_dir` stands.

    Started as a process of its own. `killed_at` is the step at which it is killed with SIGKILL,
    or at which it gets so many SIGTERMs; the weights are left in weights.safetensors.
    """
    torch.set_num_threads(1)
    task = plain_task(dropout=0.3)
    rows = number_rows(5)
    task.evaluate = lambda: mean_loss(
        task.module, rows, collate, batch_size=2, peers=Peers(torch.device("cpu"))
    )
    record = JsonlWriter(run_dir / "metrics.jsonl")

    def listen(event: Event) -> None:
        record(event)
        if isinstance(event, StepDone) and event.step == killed_at:
            for number in [signal.SIGTERM] * signals or [signal.SIGKILL]:
                os.kill(os.getpid(), number)

    start = find_resumable(run_dir, listeners=[record])
    settings = {"max_steps": 40, "save_every": 3, "evaluate_every": 4, "warmup": 2}
    train(task, run_dir, resume_from=start, listen=listen, **settings)
    save_file(weights(task), run_dir / "weights.safetensors")


def in_process(target: Callable[..., None], *arguments: Any, **options: Any) -> int | None:
    """Run `target` in a fresh process and return its exit code; -9 is killed by SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["plain_task"])
    process = context.Process(target=target, args=arguments, kwargs=options)
    with pytest.MonkeyPatch.context() as patch:
        # The server that all these processes are forked of imports PyTorch once, if it finds us.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        process.start()
    process.join()
    return process.exitcode
