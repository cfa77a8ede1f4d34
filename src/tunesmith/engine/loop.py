"""The training loop: the same for every objective, on one process or many."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic

from tunesmith.engine import random_state
from tunesmith.engine.blocks import TRIED, Blocks, Level, Start, training_blocks
from tunesmith.engine.checkpoint import checkpoints, prune, remove_unfinished, size_of
from tunesmith.engine.distribution import Alone, Peers, connect, spread
from tunesmith.engine.evaluation import measuring
from tunesmith.engine.events import (
    CheckpointingChosen,
    CheckpointSaved,
    Evaluated,
    Event,
    Listener,
    MicroBatchHalved,
    RunFinished,
    RunStarted,
    StepDone,
    StopReason,
    Warned,
)
from tunesmith.engine.interrupt import Interrupt
from tunesmith.engine.memory import peak_memory
from tunesmith.engine.optimizer import build_optimizer
from tunesmith.engine.progress import Best, Pace, Progress
from tunesmith.engine.schedule import factor
from tunesmith.engine.snapshot import Training, restore, save
from tunesmith.engine.step import Stepper, StepResult, Taken
from tunesmith.errors import CheckpointError, SpecError, TrainingError
from tunesmith.types import R

if TYPE_CHECKING:
    from tunesmith.engine.settings import (
        CheckpointSettings,
        EngineSettings,
        EvaluationSettings,
        TrackingSettings,
        TrainSettings,
    )
    from tunesmith.engine.task import Task

MAX_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True)
class Outcome:
    """What training came to, over all resumptions."""

    steps: int
    tokens: int
    supervised_tokens: int
    seconds: float
    """Spent in steps, without evaluation and saving."""
    tokens_per_second: float
    stopped_because: StopReason
    skipped_steps: int
    before: dict[str, float]
    """Metrics before step 1; empty without `Task.evaluate`."""
    metrics: dict[str, float]
    """Metrics of the last evaluation: after the last step, unless interrupted."""
    best: Best | None
    memory_bytes: int
    """Peak of the device, or of this process where the device is the CPU."""
    checkpoint: Path
    """The newest checkpoint."""


def fit(  # noqa: PLR0913 - the sections of a run file, which belong to the caller
    task: Task[R],
    *,
    train: TrainSettings,
    checkpoint: CheckpointSettings,
    evaluation: EvaluationSettings,
    engine: EngineSettings,
    tracking: TrackingSettings,
    run_dir: Path,
    seed: int,
    listeners: Sequence[Listener] = (),
    resume_from: Path | None = None,
    peers: Peers | None = None,
    start: Start | None = None,
) -> Outcome:
    """Train `task` and return what came of it; its model is left trained, whole and in eval mode.

    Evaluates before the first step, every `evaluation.every_steps` and after the last step. Saves
    every `checkpoint.every_steps`, at each new best evaluation, at SIGINT or SIGTERM, and at the
    end. Every process calls this alike; only the main one writes and calls the listeners.

    Args:
        task: what to train.
        train: how long, how fast, with which optimiser.
        checkpoint: what to keep on disk.
        evaluation: `every_steps` and `best`.
        engine: how a step is computed.
        tracking: `log_every`.
        run_dir: where `checkpoints/` goes.
        seed: of the random generators (dropout), each process with its own.
        listeners: called with each event.
        resume_from: a checkpoint to go on from, see `find_resumable`.
        peers: the processes, where the caller has already connected them.
        start: what `engine.checkpointing: auto` begins with; nothing recomputed without.

    Raises:
        SpecError: the length of the run is not known, or evaluation.best is not measured.
        ModelError: there are no blocks that `engine.checkpointing` could recompute.
        SetupError: a device or package is missing.
        TrainingError: loss or gradient stay non-finite, or memory does not suffice.
        CheckpointError: a checkpoint cannot be written or read, or is of another run.
    """
    peers = peers or connect(engine)
    task.module.to(peers.device)
    sharded = peers.size > 1 and engine.distribution == "fsdp"
    with training_blocks(
        task.model, task.block_modules, engine, device=peers.device, sharded=sharded
    ) as blocks:
        if start is not None:
            blocks.begin(start.level)
        model = spread(task.module, task.block_modules, engine, peers)
        try:
            loop = _Loop(
                training=_begin(task, train, peers),
                model=model,
                blocks=blocks,
                train=train,
                checkpoint=checkpoint,
                evaluation=evaluation,
                log_every=tracking.log_every,
                run_dir=run_dir,
                listeners=listeners,
                begins_because=start.reason if start else TRIED,
            )
            random_state.seed_all(seed + peers.rank, peers.device)
            return loop.run(resume_from)
        finally:
            model.finish()
            task.module.eval()


def _begin(task: Task[R], train: TrainSettings, peers: Peers) -> Training[R]:
    """Return the training before its first step."""
    # FSDP put new parameters in the place of the old.
    named = dict(task.model.named_parameters(remove_duplicate=False))
    trainable = {name: named[name] for name in task.trainable}
    rate = train.learning_rate or task.default_learning_rate
    effective_batch = train.batch_size * train.accumulation_steps * peers.size
    return Training(
        task=task,
        trainable=trainable,
        optimizer=build_optimizer(
            trainable,
            train,
            learning_rate=rate,
            scales=task.learning_rate_scales,
            undecayed=task.undecayed,
        ),
        peers=peers,
        progress=Progress(train.batch_size),
        effective_batch=effective_batch,
        learning_rate=rate,
        total=_total_steps(train, task.rows.rows_per_epoch, effective_batch),
    )


def _total_steps(train: TrainSettings, rows_per_epoch: int | None, effective_batch: int) -> int:
    if train.max_steps is not None:
        return train.max_steps
    if rows_per_epoch is None:
        raise SpecError(
            "train.max_steps: must be given where the data streams, since nobody knows how many "
            "rows an epoch has"
        )
    return math.ceil(train.epochs * rows_per_epoch / effective_batch)


@dataclass(frozen=True)
class _Unsettled:
    """A step that was taken, and what is to be said of it once it is read."""

    taken: Taken
    step: int
    started: float
    learning_rate: float
    epoch: float


@dataclass(kw_only=True)
class _Loop(Generic[R]):
    training: Training[R]
    model: Alone
    blocks: Blocks
    train: TrainSettings
    checkpoint: CheckpointSettings
    evaluation: EvaluationSettings
    log_every: int
    run_dir: Path
    listeners: Sequence[Listener]
    begins_because: str
    saved_at: int | None = field(default=None, init=False)
    last_checkpoint: Path | None = field(default=None, init=False)
    pace: Pace = field(default_factory=Pace, init=False)
    unsettled: _Unsettled | None = field(default=None, init=False)
    settled_at: float = field(default=0.0, init=False)

    @property
    def progress(self) -> Progress:
        return self.training.progress

    def emit(self, event: Event) -> None:
        """Tell the listeners, in the main process."""
        if self.training.peers.is_main:
            for listener in self.listeners:
                listener(event)

    def run(self, resume_from: Path | None) -> Outcome:
        """Go from the first step, or from a checkpoint, to the end."""
        self._open(resume_from)
        stepper = Stepper(
            self.training,
            self.model,
            self.blocks,
            max_grad_norm=self.train.max_grad_norm,
            on_halved=self._tell_halved,
        )
        with Interrupt() as interrupt:
            while not (reason := self._between_steps(interrupt)):
                self._step(stepper)
        return self._close(reason)

    def _open(self, resume_from: Path | None) -> None:
        training, peers = self.training, self.training.peers
        changes: list[str] = []
        if resume_from is not None:
            changes = restore(resume_from, training)
            self.saved_at, self.last_checkpoint = self.progress.step, resume_from
        elif peers.any(bool(checkpoints(self.run_dir))):
            raise CheckpointError(
                f"{self.run_dir} already holds checkpoints; resume from them, or choose or empty "
                "another run directory"
            )
        if peers.is_main:
            remove_unfinished(self.run_dir)
        training.task.module.train()
        self.emit(
            RunStarted(
                step=self.progress.step,
                total=training.total,
                processes=peers.size,
                device=str(peers.device),
                micro_batch=self.progress.micro_batch,
                effective_batch=training.effective_batch,
                trainable_parameters=sum(p.numel() for p in training.trainable.values()),
                resumed_from=None if resume_from is None else str(resume_from),
            )
        )
        for message in changes:
            self._warn(message)
        self.blocks.warn, self.blocks.choose = self._warn, self._tell_checkpointing
        if self.blocks.has_choice:
            self._tell_checkpointing(self.blocks.level, self.begins_because)

    def _warn(self, message: str) -> None:
        self.emit(Warned(step=self.progress.step, message=message))

    def _between_steps(self, interrupt: Interrupt) -> StopReason | None:
        """Evaluate and save where it is due, and return why to stop, if so."""
        progress = self.progress
        reason = self._reason(interrupt)
        every = self.checkpoint.every_steps
        due = every is not None and progress.step % every == 0 and progress.step > 0
        evaluates = reason != "interrupted" and self._evaluation_is_due(reason)
        if reason or due or evaluates:
            self._settle()
        if evaluates:
            self._evaluate()
            reason = self._reason(interrupt)
        best = progress.best
        is_best = best is not None and best.step == progress.step
        if (due or is_best or reason) and self.saved_at != progress.step:
            self._save()
        return reason

    def _reason(self, interrupt: Interrupt) -> StopReason | None:
        """Return why to stop now, the same in every process."""
        if self.training.peers.any(interrupt.requested):
            return "interrupted"
        if self.progress.step >= self.training.total:
            return "finished"
        patience = self.train.early_stopping
        if patience is not None and self.progress.stale_evaluations >= patience:
            return "early_stopping"
        return None

    def _evaluation_is_due(self, reason: StopReason | None) -> bool:
        step, every = self.progress.step, self.evaluation.every_steps
        if self.training.task.evaluate is None or self.progress.evaluated_at == step:
            return False
        return step == 0 or reason == "finished" or (every is not None and step % every == 0)

    def _evaluate(self) -> None:
        task, peers, progress = self.training.task, self.training.peers, self.progress
        if task.evaluate is None:
            return
        # Uncompiled: every prompt has its own length, and generation a cache that grows.
        with (
            self.model.whole(),
            self.blocks.plain(),
            measuring(task.module),
            random_state.preserved(peers.device),
        ):
            # What the main process measured counts, so that all decide alike.
            metrics = peers.gather(task.evaluate())[0]
        best = progress.record(metrics, self.evaluation.best)
        # A checkpoint of this step, if there is one, does not know of the evaluation yet.
        self.saved_at = None
        self.emit(Evaluated(step=progress.step, metrics=metrics, best=best))

    def _save(self) -> None:
        started = time.perf_counter()
        progress = self.progress
        path = save(self.training, self.run_dir)
        self.saved_at, self.last_checkpoint = progress.step, path
        if not self.training.peers.is_main:
            return
        best = progress.best.step if progress.best else None
        prune(self.run_dir, newest=progress.step, keep=self.checkpoint.keep, best=best)
        seconds = time.perf_counter() - started
        self.emit(
            CheckpointSaved(
                step=progress.step, path=str(path), seconds=seconds, size_bytes=size_of(path)
            )
        )

    def _step(self, stepper: Stepper[R]) -> None:
        """Take a step; where steps run ahead, hear of the one before it."""
        training, progress = self.training, self.progress
        started = time.perf_counter()
        share = factor(self.train, progress.step, training.total)
        rows = training.task.rows.take(training.effective_batch)
        learning_rate = training.learning_rate * share
        taken = stepper.step(rows, learning_rate=learning_rate)
        progress.step += 1
        if not stepper.runs_ahead and taken.read().finite:
            training.task.on_step(progress.step, training.total)
        stepper.clear()
        self._settle()
        self.unsettled = _Unsettled(
            taken, progress.step, started, learning_rate, training.task.rows.epoch
        )
        if not stepper.runs_ahead:
            self._settle()

    def _settle(self) -> None:
        """Take note of the step that was taken and not read yet, if there is one."""
        if self.unsettled is None:
            return
        done, self.unsettled = self.unsettled, None
        result = done.taken.read()
        now = time.perf_counter()
        # It began when it was sent, or when the device had done with the one before.
        seconds = now - max(done.started, self.settled_at)
        self.settled_at = now
        self.progress.count(result, seconds)
        self.pace.count(result.tokens, seconds)
        last = done.step == self.training.total
        if last or not result.finite or done.step % self.log_every == 0:
            self._log(result, done)
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(self._not_finite(result, done.step))

    def _log(self, result: StepResult, done: _Unsettled) -> None:
        training = self.training
        self.emit(
            StepDone(
                step=done.step,
                total=training.total,
                loss=result.loss,
                learning_rate=done.learning_rate,
                grad_norm=result.grad_norm,
                tokens=result.tokens,
                supervised_tokens=result.supervised_tokens,
                tokens_per_second=self.pace.tokens_per_second(),
                memory_bytes=peak_memory(training.peers.device),
                eta_seconds=self.pace.seconds_for(training.total - done.step),
                epoch=done.epoch,
                skipped=not result.finite,
                metrics=result.metrics,
            )
        )

    def _not_finite(self, result: StepResult, step: int) -> str:
        place = "there is no checkpoint yet"
        if self.last_checkpoint is not None:
            place = f"the last good checkpoint is {self.last_checkpoint}"
        return (
            f"loss {result.loss} and gradient norm {result.grad_norm} at step "
            f"{step}, the {MAX_SKIPPED_IN_A_ROW}rd step in a row that is not finite; "
            f"{place}; lower train.learning_rate or look at the data around that step"
        )

    def _tell_checkpointing(self, level: Level, reason: str) -> None:
        self.emit(
            CheckpointingChosen(
                step=self.progress.step,
                mode=level.mode or "none",
                share=level.share,
                message=f"engine.checkpointing: auto takes {level}: {reason}",
            )
        )

    def _tell_halved(self) -> None:
        micro_batch, peers = self.progress.micro_batch, self.training.peers
        accumulation = math.ceil(self.training.effective_batch / peers.size / micro_batch)
        self.emit(
            MicroBatchHalved(
                step=self.progress.step + 1,
                micro_batch=micro_batch,
                accumulation_steps=accumulation,
                message=f"out of memory: going on with train.batch_size {micro_batch} and "
                f"accumulation_steps {accumulation}, which is the same effective batch and order",
            )
        )

    def _close(self, reason: StopReason) -> Outcome:
        progress, device = self.progress, self.training.peers.device
        if self.last_checkpoint is None:
            raise AssertionError("training never ends without a checkpoint")
        outcome = Outcome(
            steps=progress.step,
            tokens=progress.tokens,
            supervised_tokens=progress.supervised_tokens,
            seconds=progress.seconds,
            tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
            stopped_because=reason,
            skipped_steps=progress.skipped_steps,
            before=progress.before,
            metrics=progress.latest,
            best=progress.best,
            memory_bytes=peak_memory(device),
            checkpoint=self.last_checkpoint,
        )
        self.emit(
            RunFinished(
                step=outcome.steps,
                total=self.training.total,
                stopped_because=reason,
                seconds=outcome.seconds,
                tokens=outcome.tokens,
                tokens_per_second=outcome.tokens_per_second,
                skipped_steps=outcome.skipped_steps,
                memory_bytes=outcome.memory_bytes,
            )
        )
        return outcome
