"""One optimiser step over the whole effective batch, whatever it takes to fit it into memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tunesmith.engine.optimizer import set_learning_rate
from tunesmith.errors import TrainingError
from tunesmith.types import R

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.engine.blocks import Blocks
    from tunesmith.engine.distribution import Alone
    from tunesmith.engine.snapshot import Training
    from tunesmith.types import Batch, LossTerms


@dataclass(frozen=True)
class StepResult:
    """What a step came to, the same in every process."""

    loss: float
    grad_norm: float
    supervised_tokens: int
    tokens: int
    metrics: dict[str, float]

    @property
    def finite(self) -> bool:
        """Whether the step could be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class _Sums:
    """The sums of one process, on its device."""

    total: list[Tensor] = field(default_factory=list)
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, terms: LossTerms) -> None:
        self.total.append(terms.total.detach())
        for name, value in terms.metrics.items():
            self.metrics.setdefault(name, []).append(value.detach())

    def read(self, norm: Tensor) -> list[float]:
        """Return [norm, total, *metrics by name]: the one place where the host waits in a step."""
        columns = [self.total, *(self.metrics[name] for name in sorted(self.metrics))]
        sums = [torch.stack(column).float().sum() for column in columns]
        return torch.stack([norm.float(), *sums]).tolist()


class Stepper(Generic[R]):
    """Takes optimiser steps; where memory runs out less is kept, and then fewer rows are taken."""

    def __init__(
        self,
        training: Training[R],
        model: Alone,
        blocks: Blocks,
        *,
        max_grad_norm: float | None,
        on_halved: Callable[[], None],
    ) -> None:
        self.task = training.task
        self.optimizer = training.optimizer
        self.peers = training.peers
        self.progress = training.progress
        self.parameters = list(training.trainable.values())
        self.model = model
        self.blocks = blocks
        self.max_grad_norm = max_grad_norm
        self.on_halved = on_halved

    def step(self, rows: list[R], *, learning_rate: float) -> StepResult:
        """Learn from `rows`, the global rows of one effective batch; a non-finite step is left out.

        The gradients stay until `clear`, for whoever acts after a step.

        Raises:
            TrainingError: memory does not suffice for a single row.
        """
        mine = rows[self.peers.rank :: self.peers.size]
        while (result := self._gradients(mine)) is None:
            self._need_less()
        if result.finite:
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
        return result

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, rows: list[R]) -> StepResult | None:
        """Accumulate and clip the gradients of `rows`, or return None where memory ran out."""
        size = self.progress.micro_batch
        batches = [
            self.task.collate(rows[start : start + size]) for start in range(0, len(rows), size)
        ]
        counted, tokens = self.peers.sum(
            [sum(map(self.task.count, batches)), sum(map(self.task.tokens, batches))]
        )
        divisor = counted or 1.0
        sums = _Sums()
        if not self._accumulate(batches, divisor, sums):
            return None
        norm, *local = sums.read(self._clip())
        loss, *metrics = (value / divisor for value in self.peers.sum(local))
        named = dict(zip(sorted(sums.metrics), metrics, strict=True))
        return StepResult(loss, norm, int(counted), int(tokens), named)

    def _accumulate(self, batches: list[Batch], divisor: float, sums: _Sums) -> bool:
        """Backpropagate the loss of all batches, and return whether memory sufficed everywhere.

        Only the last backward speaks to the other processes, so up to there a process that ran out
        of memory can still tell the others.
        """
        loss = None
        try:
            for batch in batches[:-1]:
                with self.model.unsynced():
                    torch.autograd.backward(self._loss(batch, divisor, sums))
            loss = self._with_penalty(self._loss(batches[-1], divisor, sums))
        except torch.OutOfMemoryError as error:
            self._stop_unless(self.model.can_retry, error)
        if self.peers.any(loss is None) or loss is None:
            return False
        try:
            torch.autograd.backward(loss)
        except torch.OutOfMemoryError as error:
            self._stop_unless(self.peers.size == 1, error)
            return False
        return True

    def _loss(self, batch: Batch, divisor: float, sums: _Sums) -> Tensor:
        """Return this batch's share of the mean loss over the whole effective batch.

        Gradients are averaged over processes, so the share is scaled up by their number.
        """
        device, dtype = self.peers.device, self.task.autocast_dtype
        self.blocks.see(batch)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            terms = self.model(self.peers.to_device(batch))
        sums.add(terms)
        return terms.total * (self.peers.size / divisor)

    def _with_penalty(self, loss: Tensor) -> Tensor:
        penalty = self.task.penalty()
        if penalty is None:
            return loss
        return loss + (penalty.full_tensor() if isinstance(penalty, DTensor) else penalty)

    def _clip(self) -> Tensor:
        """Scale the gradients down to the largest norm allowed, and return what it was, ()."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.max_grad_norm is not None:
            clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        return norm

    def _stop_unless(self, can_retry: bool, error: torch.OutOfMemoryError, /) -> None:
        """Raise TrainingError where the other processes are already waiting for this one."""
        if not can_retry:
            raise TrainingError(
                f"out of memory in process {self.peers.rank} with {self.progress.micro_batch} rows "
                "at once, while other processes wait for it; halve train.batch_size and double "
                "train.accumulation_steps"
            ) from error

    def _need_less(self) -> None:
        """Make the same step fit into less memory.

        Raises:
            TrainingError: nothing is left to save.
        """
        self.clear()
        self.model.give_up()
        if self.peers.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.blocks.keep_less("memory ran out"):
            return
        if self.progress.micro_batch == 1:
            raise TrainingError(
                "out of memory with a single row in the micro-batch; set engine.checkpointing: "
                "auto, lower data.max_length, or use a smaller model or dtype"
            )
        self.progress.micro_batch //= 2
        self.on_halved()
