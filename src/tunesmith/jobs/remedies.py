"""The smallest changes that bring a run under a limit of memory, each with its price in speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import TYPE_CHECKING, Final, NamedTuple

from tunesmith.jobs.plan import Plan, plan
from tunesmith.jobs.planned_writing import sampling_of
from tunesmith.objectives import PPO
from tunesmith.objectives.sampling import FromReplies

if TYPE_CHECKING:
    from tunesmith.measure.memory_plan import MemoryPlan
    from tunesmith.spec import Run

_WORTHWHILE: Final = 0.97
"""A change that leaves more of a peak than this is not worth its price."""


@dataclass(frozen=True)
class Remedy:
    """A change that saves memory, and what it costs."""

    change: str
    """As an override: `engine.checkpointing=full`."""
    price: str
    planned: Plan
    """The run with it, and with those before it."""

    @property
    def peak(self) -> int:
        """Return the most bytes at any moment, with it and those before it."""
        return self.planned.alone.peak


def _least_weights(planned: Plan) -> float:
    """Return the bytes below which no change brings the weights: half a byte each."""
    codes = planned.counts.base / 2
    return codes if _changes_to_nf4(planned.run) else planned.alone.frozen


def _changes_to_nf4(run: Run) -> bool:
    quantisable = all(method.base_dtype != "float32" for method in run.methods)
    return run.model.quantize == "none" and quantisable


class _Change(NamedTuple):
    text: str
    price: str
    apply: Callable[[Run], Run]


def _changes(planned: Plan) -> Iterator[_Change]:
    """Yield what saves memory, the cheapest first."""
    run = planned.run
    checkpointing = run.engine.checkpointing
    if run.train.optimizer == "adamw":
        yield _set("train.optimizer", "adamw_8bit", "hardly any time; the state is rounded")
    recomputes = _may_recompute(run)
    if planned.writing is not None:
        part = "rollout" if isinstance(run.objective, FromReplies) else "sampling"
        for _ in range(int(math.log2(planned.writing.rows()))):
            yield _Change(
                f"objective.{part}.batch_size halved",
                "replies are written in more turns, each as long as its longest reply",
                partial(_fewer_at_once, planned.writing.replies),
            )
    if recomputes and checkpointing in {"none", "auto"}:
        yield _set(
            "engine.checkpointing", "selective", "all but matrix products and attention twice"
        )
    if recomputes and checkpointing in {"none", "auto", "selective"}:
        yield _set("engine.checkpointing", "attention", "all but attention twice")
    if recomputes and checkpointing not in {"full", "offload"}:
        yield _set("engine.checkpointing", "full", "one more forward pass a step, about a third")
    for factor in _prime_factors(run.train.batch_size):
        yield _Change(
            f"train.batch_size divided by {factor}, train.accumulation_steps times {factor}"
            if factor > 2
            else "train.batch_size halved, train.accumulation_steps doubled",
            "smaller products, which fill a GPU less",
            partial(_divided, factor),
        )
    if _changes_to_nf4(run):
        yield _set("model.quantize", "nf4", "weights are dequantised for every product")
    if recomputes and checkpointing != "offload" and planned.device == "cuda":
        yield _set(
            "engine.checkpointing",
            "offload",
            "one more forward pass a step, and copies to the host, which may be the slower part",
        )


def _set(key: str, value: str, price: str) -> _Change:
    section, name = key.split(".")

    def changed(run: Run) -> Run:
        settings = getattr(run, section).model_copy(update={name: value})
        return run.model_copy(update={section: settings})

    return _Change(f"{key}={value}", price, changed)


def _prime_factors(number: int) -> Iterator[int]:
    """Yield the prime factors of `number`, the smallest first."""
    factor = 2
    while number > 1:
        if number % factor:
            factor += 1
            continue
        yield factor
        number //= factor


def _divided(factor: int, run: Run) -> Run:
    """Return `run` with smaller micro-batches and the same effective batch."""
    size, steps = run.train.batch_size, run.train.accumulation_steps
    parts = {"batch_size": size // factor, "accumulation_steps": steps * factor}
    return run.model_copy(update={"train": run.train.model_copy(update=parts)})


def _may_recompute(run: Run) -> bool:
    """Return whether blocks may be computed again: not where a second adapter acts on them."""
    return not (isinstance(run.objective, PPO) and run.objective.value == "adapter")


def _fewer_at_once(replies: int, run: Run) -> Run:
    """Return `run` with half as many of its `replies` written at once."""
    objective, settings = run.objective, sampling_of(run.objective)
    assert settings is not None  # noqa: S101 - asked of these alone
    size = max(1, min(settings.batch_size, replies) // 2)
    part = "rollout" if isinstance(objective, FromReplies) else "sampling"
    halved = settings.model_copy(update={"batch_size": size})
    return run.model_copy(update={"objective": objective.model_copy(update={part: halved})})


def remedies(planned: Plan, limit: int) -> list[Remedy]:
    """Return the smallest changes that bring a run under `limit` bytes, the cheapest first.

    Changes are added one after the other in the order of their price in speed until the run fits;
    then those are left out again, the dearest first, that it fits without. Empty where it fits, or
    where all of them do not suffice.
    """
    if planned.alone.peak <= limit or _least_weights(planned) > limit:
        return []

    @cache  # a plan takes seconds, and leaving out and telling come back to the same ones
    def after(changes: tuple[_Change, ...]) -> Plan:
        run = reduce(lambda changed, change: change.apply(changed), changes, planned.run)
        return plan(run, device=planned.device, length=planned.tokens[1])

    chosen: tuple[_Change, ...] = ()
    smallest = planned.alone
    for change in _changes(planned):
        memory = after((*chosen, change)).alone
        if not _helps(memory, smallest, limit):
            continue
        chosen, smallest = (*chosen, change), memory
        if memory.peak <= limit:
            return _told(_least(chosen, after, limit), after)
    return []


def _helps(changed: MemoryPlan, before: MemoryPlan, limit: int) -> bool:
    """Return whether a phase that did not fit needs enough less."""
    return any(
        peak > limit and changed.phases[phase] <= _WORTHWHILE * peak
        for phase, peak in before.phases.items()
    )


def _least(
    changes: tuple[_Change, ...], after: Callable[[tuple[_Change, ...]], Plan], limit: int
) -> tuple[_Change, ...]:
    """Return `changes` without those that the run fits without; the last is needed."""
    for change in changes[-2::-1]:
        fewer = tuple(other for other in changes if other is not change)
        if after(fewer).alone.peak <= limit:
            changes = fewer
    return changes


def _told(
    changes: tuple[_Change, ...], after: Callable[[tuple[_Change, ...]], Plan]
) -> list[Remedy]:
    return [
        Remedy(change.text, change.price, after(changes[: index + 1]))
        for index, change in enumerate(changes)
    ]
