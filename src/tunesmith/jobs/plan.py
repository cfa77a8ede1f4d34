"""What a run will need, before anything is loaded: parameters, and memory by what it is for."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import psutil

from tunesmith.errors import SetupError, SpecError
from tunesmith.jobs.full_batch import sequences_a_row
from tunesmith.jobs.labelled import require_causal
from tunesmith.jobs.planned_models import hold_codes_of, models_of
from tunesmith.jobs.planned_phases import Work, phases_of
from tunesmith.jobs.planned_writing import sampling_of, writing_of
from tunesmith.measure.memory_plan import MemoryPlan, Strategy, shared_out
from tunesmith.measure.process_heap import give_back
from tunesmith.models.context import context_length
from tunesmith.models.quantize import require_quantiser
from tunesmith.objectives.sampling import FromReplies
from tunesmith.rollout.served import cache_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tunesmith.jobs.planned_models import Models
    from tunesmith.jobs.planned_phases import Phases
    from tunesmith.jobs.planned_writing import Writing
    from tunesmith.methods.counts import ParameterCounts
    from tunesmith.methods.tuned import TunedModel
    from tunesmith.spec import Run

_8BIT: Final = 2.0 + 8 / 256
"""Bytes of both of Adam's moments, a parameter, as 8-bit codes with two float32 scales a block of
256 (Dettmers et al. 2022, arXiv:2110.02861)."""
_SMALL: Final = 4096
"""Tensors below so many parameters keep their moments uncoded, also with 8-bit codes."""
_NUMBERS: Final = 5
"""Of a reply's token at most: log-probabilities, old and reference, advantage, value, return."""


@dataclass(frozen=True)
class Plan:
    """What a run needs."""

    run: Run
    counts: ParameterCounts
    device: str
    """`cuda` or `cpu`."""
    tokens: tuple[int, int]
    """Rows of the micro-batch that was simulated, and tokens of each of a row's sequences."""
    alone: MemoryPlan
    """On one device."""
    block_bytes: int
    """Weights of the largest block."""
    teacher_bytes: int
    """Weights of a teacher, which are among those beside the model."""
    writing: Writing | None
    """Of a run that samples."""
    remarks: tuple[str, ...]
    """What was assumed, a sentence each."""
    _with_share: dict[int, MemoryPlan] = field(default_factory=dict, init=False, compare=False)
    """See `_of`: a simulation takes seconds, and there are several strategies."""

    def on(self, devices: int, strategy: Strategy) -> MemoryPlan:
        """Return the memory of each of several devices.

        They share the replies of a roll-out and the texts of a step.
        """
        memory = shared_out(self._of(devices), devices, strategy, block=self.block_bytes)
        if self.writing is None:
            return memory
        share = self.writing.rows(devices) / self.writing.rows()
        rollout, cache = round(share * memory.rollout), round(share * memory.cache)
        return replace(memory, rollout=rollout, cache=cache)

    def _of(self, devices: int) -> MemoryPlan:
        """Return the memory of one of several devices that share the texts of a step alone."""
        if devices == 1 or not self.run.data.pretraining:
            return self.alone
        if devices not in self._with_share:
            length = self.tokens[1]
            own = plan(self.run, device=self.device, length=length, processes=devices).alone
            self._with_share[devices] = replace(own, process=self.alone.process)
        return self._with_share[devices]


def plan(run: Run, *, device: str = "cuda", length: int | None = None, processes: int = 1) -> Plan:
    """Return what `run` needs, from its models' configs alone; a step is simulated, none is run.

    Every row is taken to be as long as the longest allowed and all of it supervised, and every
    reply that a run samples to be as long as it may be, so this is the most that the run will need.

    Args:
        run: what to plan.
        device: `cuda` or `cpu`; plans for either can be made on any machine.
        length: tokens a row; `data.max_length` where none is given, at most the model's context.
        processes: that share the texts of `data.pretraining`, of which one is planned.

    Raises:
        TunesmithError: the kind says which part of the run cannot work.
    """
    if device not in {"cuda", "cpu"}:
        raise SpecError(f"--device: {device!r} is none to plan for; use cuda or cpu")
    if sampling_of(run.objective) is not None:
        require_causal(run)
    process = _process(run) if device == "cpu" else 0
    models = models_of(run, device)
    tuned = models.tuned
    tuned.model.train()
    rows = run.train.batch_size
    context = context_length(tuned.model) or sys.maxsize
    length = min(length or run.data.max_length, context)
    writing = writing_of(run, length, context)
    if writing is not None and isinstance(run.objective, FromReplies):
        length = writing.prompt + writing.reply
    counts = tuned.parameter_counts()
    trained = sum(p.nbytes for p in tuned.trainable().values())
    optimizer = round(sum(_state_bytes(p, run) for p in tuned.trainable().values()))
    beside = sum(p.nbytes for model in models.beside for p in _held(model))
    teacher = sum(p.nbytes for p in _held(models.teacher.model)) if models.teacher else 0
    block = _largest_block(tuned)
    hold_codes_of(tuned.model, tuned.sites, run.model, device)
    away = _inputs_away(tuned, models.dtypes.weights, rows * sequences_a_row(run) * length)
    phases = phases_of(Work(run, models, (rows, length), device, writing, processes))
    frozen = phases.step.parameters - trained - beside
    if writing is not None and sampling_of(run.objective).decoding == "vllm":  # type: ignore[union-attr]  # it writes
        beside += _served(models, writing, frozen)
    memory = MemoryPlan(
        frozen=frozen,
        trained=trained,
        gradients=trained,
        optimizer=optimizer,
        process=process,
        beside=beside + (_at_hand(writing) if writing and device == "cpu" else 0),
        **_needed(run, phases, gradients=trained, away=away),
    )
    return Plan(
        run, counts, device, (rows, length), memory, block, teacher, writing, tuple(models.remarks)
    )


def _served(models: Models, writing: Writing, frozen: int) -> int:
    """Return the bytes that vLLM holds: the base once more, and keys and values of its rows."""
    models.remarks.append(
        "decoding: vllm: its copy of the base and its cache are beside the model here; its buffers "
        "and graphs are not foreseen"
    )
    model = models.tuned.model
    dtype = models.autocast or model.dtype
    tokens = writing.prompt + writing.reply
    return frozen + cache_bytes(model.config, dtype, writing.at_once, tokens)


def _needed(run: Run, phases: Phases, *, gradients: int, away: int) -> dict[str, int]:
    """Return what the phases need beside what is held throughout.

    Args:
        run: what is planned.
        phases: as they were simulated.
        gradients: bytes of those of all that trains.
        away: bytes of the blocks' inputs that offloading sends to the host.
    """
    step, rollout, scoring = phases.step, phases.rollout, phases.scoring
    found = {
        "activations": step.activations - (away if run.engine.checkpointing == "offload" else 0),
        "transient": step.transient,
        "holes": step.holes,
    }
    if run.train.accumulation_steps > 1:
        # Those of the micro-batches before stay while the next one runs.
        found["transient"] += gradients
    if rollout is not None:
        found |= {"cache": rollout.kept, "rollout": rollout.peak - rollout.kept}
        found["rollout_holes"] = rollout.holes
    if scoring is not None:
        found |= {"scoring": scoring.peak, "scoring_holes": scoring.holes}
    return found


def _held(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _at_hand(writing: Writing) -> int:
    """Return the bytes of the replies of a roll-out, which wait on the host with their numbers."""
    tokens = writing.prompt + writing.reply + _NUMBERS * writing.reply
    return 4 * writing.replies * tokens


def _process(run: Run) -> int:
    """Return the bytes of this process with the libraries that the run loads."""
    with suppress(SetupError):  # where the run cannot be, it can still be planned
        require_quantiser(run.model, "cpu")
    give_back()
    return int(psutil.Process().memory_info().rss)


def _state_bytes(parameter: nn.Parameter, run: Run) -> float:
    if run.train.optimizer == "adamw_8bit" and parameter.numel() >= _SMALL:
        return parameter.numel() * _8BIT
    return 2 * parameter.nbytes  # in the parameter's own dtype


def _inputs_away(tuned: TunedModel, dtype: torch.dtype, tokens: int) -> int:
    """Return the bytes of the blocks' inputs that wait in the host's memory.

    All but two: that of the block that computes, and that of the one that comes next.
    """
    width: int = tuned.model.config.get_text_config().hidden_size
    return max(0, len(tuned.sites.blocks) - 2) * tokens * width * dtype.itemsize


def _largest_block(tuned: TunedModel) -> int:
    return max(
        sum(p.nbytes for p in tuned.model.get_submodule(block.path).parameters())
        for block in tuned.sites.blocks
    )
