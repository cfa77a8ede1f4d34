"""From a running training to a checkpoint and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch.distributed.tensor import DTensor

from tunesmith.engine import random_state
from tunesmith.engine.checkpoint import (
    Snapshot,
    checkpoint_of,
    checkpoints,
    damage,
    load_snapshot,
    load_state,
    save_snapshot,
    stepped_over,
)
from tunesmith.engine.distribution import full, like
from tunesmith.engine.events import Listener, Warned
from tunesmith.engine.optimizer import load_state_by_name, state_by_name
from tunesmith.engine.progress import Best, Progress
from tunesmith.errors import CheckpointError
from tunesmith.types import LOWER_IS_BETTER, R

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.engine.distribution import Peers
    from tunesmith.engine.task import Task

_VERSION = 1


@dataclass
class Training(Generic[R]):
    """A training on its way."""

    task: Task[R]
    trainable: dict[str, nn.Parameter]
    """What the optimiser updates, by name; sharded under FSDP."""
    optimizer: torch.optim.Optimizer
    peers: Peers
    progress: Progress
    effective_batch: int
    """Rows of an optimiser step, over all processes and micro-batches."""
    total: int
    """Optimiser steps of the whole run."""
    learning_rate: float
    """Its peak."""


def save(training: Training[R], run_dir: Path) -> Path:
    """Save a checkpoint of `training` and return where; every process has to call.

    Raises:
        CheckpointError: it could not be written; every process raises.
    """
    peers = training.peers
    snapshot = _gather(training)
    path, failure = None, None
    if snapshot is not None:
        try:
            path = save_snapshot(run_dir, training.progress.step, snapshot)
        except CheckpointError as error:
            if peers.size == 1:
                raise
            failure = str(error)
    path, failure = peers.gather((path, failure))[0]
    if path is None:
        raise CheckpointError(failure)
    return path


def _gather(training: Training[R]) -> Snapshot | None:
    """Return all state, whole, in the main process; None in the others, which only contribute."""
    task, peers = training.task, training.peers
    trainable = _whole(training.trainable, peers)
    described = state_by_name(training.optimizer, training.trainable)
    tensors = {key: value for key, value in described.items() if isinstance(value, torch.Tensor)}
    optimizer = _whole(tensors, peers)
    generators = peers.gather(random_state.capture(peers.device))
    of_task = task.extra_state()  # may gather what is sharded, so every process asks
    if not peers.is_main:
        return None
    random = {
        f"{rank}/{name}": value
        for rank, state in enumerate(generators)
        for name, value in state.items()
    }
    numbers = {key: value for key, value in described.items() if key not in tensors}
    state = {
        "version": _VERSION,
        "progress": training.progress.as_json(),
        "effective_batch": training.effective_batch,
        "total": training.total,
        "optimizer": numbers,
        "rows": task.rows.state_dict(),
        "task": of_task,
    }
    return Snapshot(trainable, optimizer, random, state)


def _whole(tensors: Mapping[str, Tensor], peers: Peers) -> dict[str, Tensor]:
    """Return whole copies in the main process, tensor by tensor so that no other holds them all."""
    whole: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        value = full(tensor)
        if peers.is_main:
            # safetensors wants each tensor apart; bitsandbytes shares its quantisation maps.
            address = value.untyped_storage().data_ptr()
            whole[name] = value.clone() if address in memory else value
            memory.add(address)
    return whole


def restore(checkpoint: Path, training: Training[R]) -> list[str]:
    """Put `training` where it was when `checkpoint` was saved, also on more or fewer processes.

    Returns:
        Warnings, each about something that makes the rest of the run another than it would have
        been.

    Raises:
        CheckpointError: the checkpoint is damaged, or of a run that trains something else.
    """
    snapshot = load_snapshot(checkpoint)
    state = snapshot.state
    if state["version"] != _VERSION:
        raise CheckpointError(
            f"{checkpoint} has version {state['version']}, this program reads {_VERSION}; resume "
            "with the version of tunesmith that saved it"
        )
    _load_trainable(snapshot.trainable, training.trainable, checkpoint)
    _load_optimizer(snapshot, training)
    training.task.rows.load_state_dict(state["rows"])
    training.task.load_extra_state(state["task"])
    limit = training.progress.micro_batch
    training.progress = Progress.from_json(state["progress"])
    training.progress.micro_batch = min(limit, training.progress.micro_batch)
    prefix = f"{training.peers.rank}/"
    generators = {
        name.removeprefix(prefix): value
        for name, value in snapshot.random.items()
        if name.startswith(prefix)
    }
    if generators:
        random_state.restore(generators, training.peers.device)
    return _changes(state, training)


def _changes(state: Mapping[str, Any], training: Training[R]) -> list[str]:
    changes = []
    for name, what, now in (
        ("effective_batch", "rows an optimiser step takes", training.effective_batch),
        ("total", "steps of the run", training.total),
    ):
        if (before := state[name]) != now:
            changes.append(f"{what}: {before} when the checkpoint was saved, {now} now")
    return changes


@torch.no_grad()
def _load_trainable(
    saved: Mapping[str, Tensor], trainable: Mapping[str, nn.Parameter], checkpoint: Path
) -> None:
    shapes = {name: tuple(value.shape) for name, value in saved.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in trainable.items()}
    if shapes != expected:
        different = sorted(dict(shapes.items() ^ expected.items()))[0]
        raise CheckpointError(
            f"{checkpoint} holds '{different}' with shape {shapes.get(different)}, this run trains "
            f"it with shape {expected.get(different)}; resume with the model and method that it "
            "was saved with, or start anew"
        )
    for name, parameter in trainable.items():
        value = like(saved[name], parameter)
        parameter.copy_(value)


def _load_optimizer(snapshot: Snapshot, training: Training[R]) -> None:
    tensors: dict[str, Tensor | int | float] = {}
    for key, value in snapshot.optimizer.items():
        parameter = training.trainable[key.split("/", maxsplit=1)[1]]
        sharded = isinstance(parameter, DTensor) and value.shape == parameter.shape
        tensors[key] = like(value, parameter) if sharded else value.clone()
    load_state_by_name(
        training.optimizer, training.trainable, tensors | dict(snapshot.state["optimizer"])
    )


def find_best(run_dir: Path, best: Best, *, listeners: Sequence[Listener] = ()) -> Path | None:
    """Return the checkpoint of the best evaluation among those that are whole.

    Damaged ones are stepped over, as in resuming; where the best of all is among them, listeners
    are warned what is taken in its place.

    Args:
        run_dir: where `checkpoints/` is.
        best: the best evaluation of the run.
        listeners: told of each damaged checkpoint that could have been taken.

    Returns:
        None where no whole checkpoint was evaluated; the best there is is then the model after the
        last step, and listeners are told so.
    """
    wanted = checkpoint_of(run_dir, best.step)
    if damage(wanted) is None:
        return wanted
    damaged = {path: wrong for path in {wanted, *checkpoints(run_dir)} if (wrong := damage(path))}
    whole = [path for path in checkpoints(run_dir) if path not in damaged]
    values = {path: value for path in whole if (value := _value_at(path, best.metric)) is not None}
    choose = min if best.metric in LOWER_IS_BETTER else max
    found = choose(values, key=values.__getitem__, default=None)
    told = "the model after the last step"
    if found is not None:
        told = f"{found}, whose {best.metric} is {values[found]:.4g}"
    for path, wrong in sorted(damaged.items()):
        message = stepped_over(path, wrong)
        if path == wanted:
            message += f"; its {best.metric} {best.value:.4g} was the best, the result is {told}"
        for listener in listeners:
            listener(Warned(step=best.step, message=message))
    return found


def _value_at(checkpoint: Path, metric: str) -> float | None:
    """Return what `metric` came to at a checkpoint's step; None where it gave no number there."""
    progress = Progress.from_json(load_state(checkpoint)["progress"])
    value = progress.latest.get(metric, math.nan)
    return None if progress.evaluated_at != progress.step or math.isnan(value) else value
