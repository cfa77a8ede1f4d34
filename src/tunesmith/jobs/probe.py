"""What a plan predicts, measured: three small steps of the real run, and what follows from them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from tunesmith.engine.blocks import training_blocks
from tunesmith.engine.distribution import Peers
from tunesmith.engine.memory import memory_now, peak_memory, reset_peak
from tunesmith.engine.optimizer import build_optimizer
from tunesmith.errors import SpecError
from tunesmith.jobs.assemble import Program, attach_seeded, choose_dtypes, choose_padding
from tunesmith.jobs.base import load_base
from tunesmith.jobs.full_batch import full_batch, side_by_side
from tunesmith.jobs.plan import Plan, plan
from tunesmith.jobs.planned_models import head_of
from tunesmith.jobs.roles import with_roles
from tunesmith.jobs.teacher import Teacher, load_teacher, teacher_dtype
from tunesmith.measure.growth import Growth, growth_of
from tunesmith.measure.process_heap import give_back
from tunesmith.measure.simulated_memory import bytes_left
from tunesmith.models.attention import enable_segments
from tunesmith.models.loading import locate
from tunesmith.models.quantize import quantise
from tunesmith.models.skeleton import skeleton
from tunesmith.objectives import Distillation

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.engine.blocks import Blocks
    from tunesmith.methods.tuned import TunedModel
    from tunesmith.models.heads import Head
    from tunesmith.models.settings import ModelSettings
    from tunesmith.spec import Run
    from tunesmith.types import Batch

SHARES: Final = (8, 4, 2)
"""Of the planned length, by which the three steps are shorter."""
_SHORTEST: Final = 8


@dataclass(frozen=True)
class ProbedStep:
    """Bytes of one step with rows of this length."""

    length: int
    activations: int
    """What forward left for backward."""
    peak: int
    """The most at any moment, weights, optimiser and, on the CPU, the process included."""
    planned: Plan
    """The same step as a plan has it."""


@dataclass(frozen=True)
class Probe:
    """Three steps, and what they say of the whole one."""

    steps: tuple[ProbedStep, ...]
    real_weights: bool
    """Whether the model's own were there; they are random otherwise."""
    planned: Plan
    """The whole step."""

    @property
    def activations(self) -> Growth:
        """Return how the activations grow with the length of the rows."""
        return growth_of([(step.length, step.activations) for step in self.steps])

    @property
    def peak(self) -> int:
        """Return the peak of the whole step as these three have it.

        What was held besides the activations is the plan's, times what it was over the plan in the
        longest of the steps.
        """
        last, whole = self.steps[-1], self.planned.alone
        rest = (last.peak - last.activations) / (last.planned.alone.peak - _activations(last))
        planned_rest = whole.peak - whole.activations
        return round(self.activations.at(self.planned.tokens[1]) + rest * planned_rest)


def _activations(step: ProbedStep) -> int:
    return step.planned.alone.activations


def probe(planned: Plan) -> Probe:
    """Take three steps of `planned.run` at parts of its length, on the device it is planned for.

    Raises:
        SpecError: the plan is for a device that is not here, its rows are too short to have parts,
            or the run samples its rows.
        SetupError: the peak of a step cannot be measured here.
    """
    rows, length = planned.tokens
    if planned.writing is not None:
        raise SpecError(
            f"--probe: a step of objective.name: {planned.run.objective.name} learns from replies "
            "that were sampled and scored before, which three steps are not; plan without --probe"
        )
    if planned.device == "cuda" and not torch.cuda.is_available():
        raise SpecError(
            "--probe: there is no GPU here to take steps on; plan with --device cpu, or without "
            "--probe"
        )
    if length < _SHORTEST * SHARES[0]:
        raise SpecError(
            f"--probe: rows of {length} tokens are too short to take steps at an eighth of them; "
            f"set data.max_length to {_SHORTEST * SHARES[0]} or more"
        )
    lengths = [length // share for share in SHARES]
    plans = [plan(planned.run, device=planned.device, length=part) for part in lengths]
    device = torch.device(planned.device)
    real = has_weights(planned.run)
    with ready(planned.run, device, real_weights=real) as stage:
        stage.step(rows, lengths[0])  # the optimiser's state, and what libraries set up
        measured = [stage.measured(rows, part) for part in lengths]
    steps = tuple(
        ProbedStep(part, activations, peak, smaller)
        for part, (activations, peak), smaller in zip(lengths, measured, plans, strict=True)
    )
    return Probe(steps, real, planned)


def has_weights(run: Run) -> bool:
    """Return whether all weights are on this machine; nothing is fetched for a probe."""
    teaching = _teaching(run)
    return all(map(_are_here, [run.model, *([teaching.teacher] if teaching else [])]))


def _are_here(settings: ModelSettings) -> bool:
    place = locate(settings.name, settings, only=["config.json"])
    return place.is_file() or any(place.glob("*.safetensors"))


def _teaching(run: Run) -> Distillation | None:
    """Return the run's objective where a teacher stands beside the model in every step."""
    objective = run.objective
    if isinstance(objective, Distillation) and objective.logits == "live":
        return objective
    return None


@contextmanager
def ready(run: Run, device: torch.device, *, real_weights: bool) -> Iterator[Stage]:
    """Give a run that can take steps, inside a `with` block.

    Args:
        run: what to take steps of.
        device: where.
        real_weights: load the model; else its shape is filled with random numbers on the device.
    """
    model = _model(run, device, real_weights=real_weights)
    teacher = _teacher(run, device, real_weights=real_weights)
    padding_free = choose_padding(run, model) == "free"
    tuned = with_roles(attach_seeded(model, run), run)
    model.train()
    blocks = [model.get_submodule(block.path) for block in tuned.sites.blocks]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    give_back()
    with training_blocks(model, blocks, run.engine, device=device) as running:
        yield Stage(run, device, tuned, running, padding_free=padding_free, teacher=teacher)


def _model(run: Run, device: torch.device, *, real_weights: bool) -> PreTrainedModel:
    dtype, head = choose_dtypes(run, device).weights, head_of(run)
    if real_weights:
        return load_base(run.model, device=device, dtype=dtype, head=head)
    return _random(run.model, dtype, device, head)


def _random(
    settings: ModelSettings, dtype: torch.dtype, device: torch.device, head: Head | None = None
) -> PreTrainedModel:
    model = skeleton(settings, dtype=dtype, head=head, device=device)
    if settings.quantize == "int8":
        model = model.to("cpu")  # from where alone bitsandbytes rounds to these codes
    if settings.quantize != "none":
        quantise(model, settings, device=device)
    return model


def _teacher(run: Run, device: torch.device, *, real_weights: bool) -> Teacher | None:
    objective = _teaching(run)
    if objective is None:
        return None
    if real_weights:
        return load_teacher(objective, device)
    model = _random(objective.teacher, teacher_dtype(objective, device), device)
    segments = objective.teacher.attention == "auto" and enable_segments(model)
    return Teacher(model.requires_grad_(False).eval(), segments)


class Stage:
    """A run that takes steps on rows of zeros."""

    def __init__(
        self,
        run: Run,
        device: torch.device,
        tuned: TunedModel,
        blocks: Blocks,
        *,
        padding_free: bool,
        teacher: Teacher | None = None,
    ) -> None:
        self.run, self.device, self.tuned, self.blocks = run, device, tuned, blocks
        self.padding_free = padding_free
        self.teacher = teacher
        self.program = Program(tuned.model, run.objective)
        mixed = any(part.attachment.trains_base for part in tuned.parts)
        self.dtype = choose_dtypes(run, device).autocast(mixed=mixed)
        self.optimizer = build_optimizer(tuned.trainable(), run.train, learning_rate=1e-6)

    def measured(self, rows: int, length: int) -> tuple[int, int]:
        """Return the bytes that the forward pass of a step leaves, and the step's peak."""
        batch = self._batch(rows, length)
        counted = None
        if self.device.type != "cuda":
            models = [self.tuned.model, *([self.teacher.model] if self.teacher else [])]
            held = [x for model in models for x in (*model.parameters(), *model.buffers())]
            counted = bytes_left(lambda: self._loss(batch), held)
        gc.collect()
        reset_peak(self.device)
        before = memory_now(self.device)
        between = self.step(rows, length)
        return between - before if counted is None else counted, peak_memory(self.device)

    def step(self, rows: int, length: int) -> int:
        """Take a step and return the bytes that were there between forward and backward."""
        total = self._loss(self._batch(rows, length))
        between = memory_now(self.device)
        torch.autograd.backward(total / (rows * length))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return between

    def _loss(self, batch: Batch) -> Tensor:
        batch = Peers(self.device).to_device(batch)
        self.blocks.see(batch)
        autocast = torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()
        with autocast:
            if self.teacher is not None:
                batch["teacher"] = self.teacher.states(batch)
            total: Tensor = self.program(batch).total
        return total

    def _batch(self, rows: int, length: int) -> Batch:
        batch = full_batch(self.run, self.tuned.model, (rows, length))
        return side_by_side(batch) if self.padding_free else batch
