"""One optimiser step over the whole effective batch, whatever it takes to fit it into memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tunesmith.engine.loss_scale import loss_scale_of
from tunesmith.engine.optimizer import set_learning_rate, step_unless, takes_scale
from tunesmith.engine.task import nothing_to_do
from tunesmith.errors import TrainingError
from tunesmith.ops.torch_errors import is_out_of_memory
from tunesmith.types import R

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.engine.blocks import Blocks
    from tunesmith.engine.distribution import Alone, Peers
    from tunesmith.engine.snapshot import Training
    from tunesmith.types import Batch, LossTerms

AHEAD: Final = frozenset({"cuda"})
"""Devices that compute by themselves while the host prepares the next step."""


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

    def beside(self, norm: Tensor) -> Tensor:
        """Return (norm, total, *metrics by name), (2 + metrics,) float32."""
        columns = [self.total, *(self.metrics[name] for name in sorted(self.metrics))]
        sums = [torch.stack(column).float().sum() for column in columns]
        return torch.stack([norm.float(), *sums])


class _Gradients(NamedTuple):
    """What stands in the gradients, and what the loss came to."""

    values: Tensor
    """(norm, total, *metrics by name) of this process, on its device."""
    metrics: list[str]
    counted: float
    tokens: float


class Taken:
    """A step that was sent on its way; where the device computes by itself it may go on."""

    def __init__(self, gradients: _Gradients, peers: Peers) -> None:
        self._gradients, self._peers = gradients, peers
        self._host = gradients.values
        self._arrived: torch.cuda.Event | None = None
        self._result: StepResult | None = None
        if peers.device.type == "cuda":
            # The copy waits in line behind the step, and the host for nothing until it reads.
            self._host = torch.empty(gradients.values.shape, pin_memory=True)
            self._host.copy_(gradients.values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(peers.device))

    def read(self) -> StepResult:
        """Wait for the step to end and return what it came to; every process has to ask."""
        if self._result is None:
            self._result = self._read()
        return self._result

    def _read(self) -> StepResult:
        if self._arrived is not None:
            self._arrived.synchronize()
        gradients, divisor = self._gradients, self._gradients.counted or 1.0
        norm, *local = self._host.tolist()
        loss, *metrics = (value / divisor for value in self._peers.sum(local))
        named = dict(zip(gradients.metrics, metrics, strict=True))
        return StepResult(loss, norm, int(gradients.counted), int(gradients.tokens), named)


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
        self.scale = loss_scale_of(training.task, training.progress)
        self.model = model
        self.blocks = blocks
        self.max_grad_norm = max_grad_norm
        self.on_halved = on_halved

    @property
    def runs_ahead(self) -> bool:
        """Whether a step need not be read before the next one is taken.

        The device itself then leaves out a step that is not finite. Nobody may have to act between
        the two, and one process must not go on while another stays.
        """
        alone = self.peers.size == 1 and self.task.on_step is nothing_to_do
        by_device = self.peers.device.type in AHEAD and takes_scale(self.optimizer)
        return alone and by_device and self.scale is None

    def step(self, rows: list[R], *, learning_rate: float) -> Taken:
        """Learn from `rows`, the global rows of one effective batch; a non-finite step is left out.

        The gradients stay until `clear`, for whoever acts after a step.

        Raises:
            TrainingError: memory does not suffice for a single row.
        """
        mine = rows[self.peers.rank :: self.peers.size]
        while (gradients := self._accumulated(mine)) is None or self._too_large(gradients):
            if gradients is None:
                self._need_less()
            else:
                self.clear()
        set_learning_rate(self.optimizer, learning_rate)
        if self.runs_ahead:
            self._update_by_device(gradients.values)
            return Taken(gradients, self.peers)
        taken = Taken(gradients, self.peers)
        if taken.read().finite:
            self._clip(gradients.values[0])
            self.optimizer.step()
        return taken

    def _too_large(self, gradients: _Gradients) -> bool:
        """Return whether gradients ran over in float16 and a smaller scale is there to help.

        Nothing helps where the loss itself is not finite.
        """
        if self.scale is None:
            return False
        norm, loss = gradients.values[:2].isfinite().tolist()  # the norm is the same everywhere
        if norm:
            self.scale.hold()
            return False
        return not self.peers.any(not loss) and self.scale.lower()

    def _update_by_device(self, values: Tensor) -> None:
        """Clip and update in one pass, unless the norm or the loss is not finite."""
        norm, scale = values[0], None
        if self.max_grad_norm is not None:
            # As clip_grads_with_norm_ has it: gradients are divided by this.
            scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)
        step_unless(self.optimizer, left_out=~values[:2].isfinite().all(), scale=scale)

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _accumulated(self, rows: list[R]) -> _Gradients | None:
        """Accumulate the gradients of `rows`, or return None where memory ran out."""
        size = self.progress.micro_batch
        batches = [
            self.task.collate(rows[start : start + size]) for start in range(0, len(rows), size)
        ]
        counted, tokens = self.peers.sum(
            [sum(map(self.task.count, batches)), sum(map(self.task.tokens, batches))]
        )
        told, sums = self._told(batches, counted or 1.0), _Sums()
        if told is None or not self._accumulate(told, counted or 1.0, sums):
            return None
        if self.scale is not None:
            self.scale.undo(self.parameters)
        return _Gradients(sums.beside(self._norm()), sorted(sums.metrics), counted, tokens)

    def _told(self, batches: list[Batch], divisor: float) -> list[Batch] | None:
        """Return `batches`, each told what it has to know of all, or None where memory ran out."""
        if self.task.common is None or (len(batches) == 1 and self.peers.size == 1):
            return batches
        sums, enough = _Sums(), True
        try:
            with torch.no_grad():
                for batch in batches:
                    self._loss(batch, divisor, sums)
        except RuntimeError as error:
            self._stop_unless(self.model.can_retry, error)
            enough = False
        if self.peers.any(not enough):
            return None
        _, _, *totals = self.peers.sum(sums.beside(sums.total[0]).tolist())
        means = [total / divisor for total in totals]
        common = self.task.common(dict(zip(sorted(sums.metrics), means, strict=True)))
        return [batch | common for batch in batches]

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
        except RuntimeError as error:
            self._stop_unless(self.model.can_retry, error)
        if self.peers.any(loss is None) or loss is None:
            return False
        try:
            torch.autograd.backward(loss)
        except RuntimeError as error:
            self._stop_unless(self.peers.size == 1, error)
            return False
        return True

    def _loss(self, batch: Batch, divisor: float, sums: _Sums) -> Tensor:
        """Return this batch's share of the mean loss over the whole effective batch.

        Gradients are averaged over processes, so the share is scaled up by their number; and in
        float16 by what `LossScale` says.
        """
        device, dtype = self.peers.device, self.task.autocast_dtype
        self.blocks.see(batch)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            terms = self.model(self.peers.to_device(batch))
        sums.add(terms)
        total = terms.total if self.scale is None else terms.total.float()
        return total * (self.peers.size / divisor * self._factor)

    def _with_penalty(self, loss: Tensor) -> Tensor:
        penalty = self.task.penalty()
        if penalty is None:
            return loss
        whole = penalty.full_tensor() if isinstance(penalty, DTensor) else penalty
        return loss + whole * self._factor

    @property
    def _factor(self) -> float:
        return self.scale.value if self.scale is not None else 1.0

    def _norm(self) -> Tensor:
        """Return the norm of all gradients, ()."""
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _clip(self, norm: Tensor) -> None:
        """Scale the gradients, whose norm is given, down to the largest one allowed."""
        if self.max_grad_norm is not None:
            clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)

    def _stop_unless(self, can_retry: bool, error: RuntimeError, /) -> None:
        """Raise `error` where it is not about memory.

        Raises:
            TrainingError: it is, and the other processes are already waiting for this one.
        """
        if not is_out_of_memory(error):
            raise error
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
