"""What the loop trains, without how its method or objective works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic

from tunesmith.types import IGNORE, R

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tunesmith.types import JSON, Batch, Collate, RowStream


def num_tokens(batch: Batch) -> int:
    """Return the real (not padding) tokens of a batch, read and written."""
    mask = batch.get("attention_mask")
    read = int(batch["input_ids"].numel() if mask is None else mask.sum())
    if "texts" in batch:  # beside replies
        read += num_tokens(batch["texts"])
    return read + (int((batch["labels"] != IGNORE).sum()) if "decoder_input_ids" in batch else 0)


def _no_penalty() -> None:
    return None


def nothing_to_do(step: int, total: int) -> None:
    """Stand for an `on_step` of nobody: steps may then run ahead of what is read of them."""
    del step, total


def _no_state() -> dict[str, JSON]:
    return {}


def _ignore_state(state: Mapping[str, JSON]) -> None:
    del state


@dataclass
class Task(Generic[R]):
    """A model, its loss and its rows, as the loop sees them.

    Under FSDP the loop replaces the parameters of `module` by sharded ones, so whoever keeps a
    `Parameter` instead of looking it up in its module holds a stale one.
    """

    module: nn.Module
    """Maps a batch to LossTerms; everything that trains is inside it."""
    model: nn.Module
    """The model inside `module`; the names in `trainable` are its `named_parameters` names."""
    trainable: dict[str, nn.Parameter]
    """What the optimiser updates, by name."""
    rows: RowStream[R]
    """The global order of rows, the same in every process."""
    collate: Collate[R]
    """Makes a batch (on the CPU) of rows."""
    count: Callable[[Batch], float]
    """What the summed loss of a batch is divided by, known before the forward."""
    default_learning_rate: float
    """Peak learning rate where train.learning_rate is not given."""
    learning_rate_scales: Mapping[str, float] = field(default_factory=dict)
    """By which the learning rate of a trainable is multiplied; 1 for those not named."""
    undecayed: frozenset[str] = frozenset()
    """Trainables that weight decay leaves alone though they are matrices: gates and factors."""
    block_modules: list[nn.Module] = field(default_factory=list)
    """The model's blocks: what FSDP gathers one after the other."""
    common: Callable[[Mapping[str, float]], Batch] | None = None
    """What tells every micro-batch of the whole effective batch: out of the means of its metrics in
    a forward without gradients it makes keys of a batch. None where no loss needs that."""
    tokens: Callable[[Batch], int] = num_tokens
    """Tokens of a batch, for the throughput."""
    penalty: Callable[[], Tensor | None] = _no_penalty
    """A term () that is added to the mean loss once a step, or None."""
    on_step: Callable[[int, int], None] = nothing_to_do
    """Called as (step, total) after each update, while the gradients are still there."""
    extra_state: Callable[[], dict[str, JSON]] = _no_state
    """What else decides the steps to come."""
    load_extra_state: Callable[[Mapping[str, JSON]], None] = _ignore_state
    """Takes over a saved `extra_state`."""
    evaluate: Callable[[], dict[str, float]] | None = None
    """Measures the model as it is, on every process alike; None where there is nothing to measure.

    Runs in eval mode, without gradients, and cannot disturb the random state of training.
    """
    autocast_dtype: torch.dtype | None = None
    """Computes the forward under autocast in this dtype; None leaves the model's own."""
