"""What happens in a run, as values: the progress bar, the record and the trackers only listen."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from tunesmith.json_text import finite

if TYPE_CHECKING:
    from tunesmith.types import JSON

StopReason = Literal["finished", "early_stopping", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """Training begins or goes on after `step`."""

    kind: ClassVar[str] = "run_started"
    step: int
    total: int
    """Optimiser steps in all."""
    processes: int
    device: str
    micro_batch: int
    """Rows a process takes at once."""
    effective_batch: int
    """Rows an optimiser step takes, over all processes and micro-batches."""
    trainable_parameters: int
    resumed_from: str | None = None
    """The checkpoint, where this is a resumption."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """An optimiser step was taken, or skipped because loss or gradient were not finite."""

    kind: ClassVar[str] = "step_done"
    step: int
    total: int
    loss: float
    """Mean over all supervised tokens of the effective batch."""
    learning_rate: float
    grad_norm: float
    """Global norm before clipping."""
    tokens: int
    """Tokens of this step, over all processes."""
    supervised_tokens: int
    tokens_per_second: float
    """Since the line before."""
    memory_bytes: int
    """Peak memory of the device, or of this process where the device is the CPU."""
    eta_seconds: float
    """Time left, at the rate of this process's steps so far."""
    epoch: float
    skipped: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    """The objective's further means over the effective batch."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The model was measured; step 0 is before training."""

    kind: ClassVar[str] = "evaluated"
    step: int
    metrics: dict[str, float]
    best: bool = False
    """Whether no evaluation of this run was better."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The model answered a prompt."""

    kind: ClassVar[str] = "sampled"
    step: int
    prompt: str
    reply: str
    reference: str | None = None


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Replies were sampled and scored, to learn from in this and further steps."""

    kind: ClassVar[str] = "gathered"
    step: int
    """The first step that learns from them."""
    replies: int
    tokens: int
    """Of all replies."""
    reward: float
    """Mean score: the weighted sum of the rewards."""
    reward_std: float
    rewards: dict[str, float]
    """Mean of each reward, without its weight."""
    length: float
    """Mean tokens a reply."""
    ended: float
    """Share of the replies that ended by themselves."""
    measured: dict[str, float]
    """Where they were computed: `kl` to the reference in nats a reply and its coefficient, the
    largest difference of a token's log-probability between sampling and training, and the share of
    the returns' variance that the value function explains."""
    tokens_per_second: float
    """Of sampling and scoring."""
    seconds: float
    """Of all, with what models were asked about the replies."""
    samples: list[dict[str, Any]]
    """The first few: `prompt`, `reply`, `reward`."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint appeared, whole."""

    kind: ClassVar[str] = "checkpoint_saved"
    step: int
    path: str
    seconds: float
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something the user should know, though the run goes on."""

    kind: ClassVar[str] = "warned"
    step: int
    message: str


@dataclass(frozen=True, kw_only=True)
class MicroBatchHalved:
    """The device ran out of memory: the same rows are now taken in smaller micro-batches."""

    kind: ClassVar[str] = "micro_batch_halved"
    step: int
    micro_batch: int
    accumulation_steps: int
    message: str


@dataclass(frozen=True, kw_only=True)
class CheckpointingChosen:
    """`engine.checkpointing: auto` decided what the backward pass computes again."""

    kind: ClassVar[str] = "checkpointing_chosen"
    step: int
    mode: str
    share: float
    """Of the blocks."""
    message: str
    """The choice and its reason."""


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    """Training ended."""

    kind: ClassVar[str] = "run_finished"
    step: int
    total: int
    stopped_because: StopReason
    seconds: float
    """Spent in steps, without evaluation and saving, over all resumptions."""
    tokens: int
    tokens_per_second: float
    skipped_steps: int
    memory_bytes: int


Event: TypeAlias = (
    RunStarted
    | StepDone
    | Evaluated
    | Sampled
    | Gathered
    | CheckpointSaved
    | Warned
    | MicroBatchHalved
    | CheckpointingChosen
    | RunFinished
)
Listener: TypeAlias = Callable[[Event], None]


def as_json(event: Event) -> dict[str, JSON]:
    """Return the event as a line of metrics.jsonl: `event`, `time` (Unix seconds) and its fields.

    Numbers that are not finite become null, since JSON has no word for them.
    """
    fields: dict[str, JSON] = finite(asdict(event))
    return {"event": event.kind, "time": round(time.time(), 3), **fields}
