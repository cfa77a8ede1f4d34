"""The models that a run holds in memory, without their weights: for its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import CheckpointError, SpecError
from tunesmith.jobs.assemble import attach_seeded, choose_dtypes
from tunesmith.jobs.labelled import has_head, head_of_run, reads_rows
from tunesmith.jobs.reward_roles import REWARD
from tunesmith.jobs.roles import with_roles
from tunesmith.jobs.run_directory import open_finished
from tunesmith.jobs.teacher import Teacher
from tunesmith.measure.simulated_codes import Held, hold_codes
from tunesmith.methods.lora import LoRA
from tunesmith.methods.tuned import attach
from tunesmith.models.attention import has_segments, suppose_segments
from tunesmith.models.precision import DTYPES, best_dtype
from tunesmith.models.segments_proof import may_keep_segments_apart
from tunesmith.models.sites import find_sites
from tunesmith.models.skeleton import skeleton
from tunesmith.objectives import Distillation, Reward
from tunesmith.objectives.sampling import FromReplies
from tunesmith.rewards.run import RunReward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from tunesmith.jobs.assemble import Dtypes
    from tunesmith.methods.contract import Method
    from tunesmith.methods.tuned import TunedModel
    from tunesmith.models.heads import Head
    from tunesmith.models.settings import ModelSettings
    from tunesmith.models.sites import Sites
    from tunesmith.spec import Run

_TWO: Final = ["0", "1"]


@dataclass(frozen=True)
class Judge:
    """A classifier that rewards, with a backbone of its own."""

    model: PreTrainedModel
    rows: int
    """Texts that it reads side by side."""
    length: int
    """Tokens that it reads of each at most."""
    autocast: torch.dtype | None


@dataclass
class Models:
    """All models of a run, on the meta device."""

    tuned: TunedModel
    """What trains, with the other roles that it plays; its codes are not held yet."""
    dtypes: Dtypes
    teacher: Teacher | None
    rewards: list[str]
    """Names of the adapters of reward models on what trains."""
    judges: list[Judge]
    remarks: list[str]
    """What was assumed, a sentence each."""

    @property
    def beside(self) -> list[PreTrainedModel]:
        """Models besides the one that trains."""
        teacher = [self.teacher.model] if self.teacher else []
        return [*teacher, *(judge.model for judge in self.judges)]

    @property
    def side_by_side(self) -> bool:
        """Whether the rows of a step are segments of one, to the plan."""
        teacher = self.teacher
        hears = teacher is None or not teacher.segments or has_segments(teacher.model)
        return hears and has_segments(self.tuned.model)

    @property
    def autocast(self) -> torch.dtype | None:
        """What the forward computes in under autocast, if anything."""
        mixed = any(part.attachment.trains_base for part in self.tuned.parts)
        return self.dtypes.autocast(mixed=mixed)


def models_of(run: Run, device: str) -> Models:
    """Return the models that `run` holds while it trains, from their configs alone.

    Raises:
        TunesmithError: the kind says which part of the run cannot work.
    """
    dtypes = choose_dtypes(_decided(run, device), torch.device(device))
    tuned = with_roles(_attached(run, dtypes), run)
    models = Models(tuned, dtypes, _teacher(run, device), [], [], [])
    if isinstance(run.objective, FromReplies):
        for reward in run.objective.rewards:
            if isinstance(reward, RunReward):
                _put_reward(models, run, reward, device)
    return models


def hold_codes_of(
    model: PreTrainedModel, sites: Sites, settings: ModelSettings, device: str
) -> None:
    """Give the maps that `settings.quantize` rounds their codes; biases and all else stay."""
    if settings.quantize == "none":
        return
    kept = {
        *(model._keep_in_fp32_modules or ()),
        *(model._keep_in_fp32_modules_strict or ()),
    }
    paths = dict.fromkeys(s.module for block in sites.blocks for s in block.sites)
    maps = (model.get_submodule(path) for path in paths if kept.isdisjoint(path.split(".")))
    held = Held(settings.quantize, settings.double_quantize, settings.multiplies_float8, device)
    hold_codes((module for module in maps if isinstance(module, nn.Linear | Conv1D)), held)


def head_of(run: Run) -> Head | None:
    """Return the head of the run's model, with two classes where they are not known yet."""
    if has_head(run) and getattr(run.objective, "labels", ()) is None:
        objective = run.objective.model_copy(update={"labels": _TWO})
        run = run.model_copy(update={"objective": objective})
    return head_of_run(run)


def _decided(run: Run, device: str) -> Run:
    """Return `run` with a dtype for a GPU that is not here: bfloat16, as of Ampere and later."""
    if device == "cpu" or torch.cuda.is_available() or run.model.dtype != "auto":
        return run
    trains_all = any(method.base_dtype == "float32" for method in run.methods)
    precision = run.engine.precision if run.engine.precision != "auto" else "bfloat16"
    dtype = "float32" if trains_all else "bfloat16"
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"dtype": dtype}),
            "engine": run.engine.model_copy(update={"precision": precision}),
        }
    )


def _attached(run: Run, dtypes: Dtypes) -> TunedModel:
    model = skeleton(_plain(run.model), dtype=dtypes.weights, head=head_of(run))
    if (
        not reads_rows(run, model)
        and run.engine.padding != "right"
        and run.model.attention == "auto"
    ):
        suppose_segments(model)
    return attach_seeded(model, run)


def _plain(settings: ModelSettings) -> ModelSettings:
    return settings.model_copy(update={"quantize": "none"})


def _teacher(run: Run, device: str) -> Teacher | None:
    """Return the teacher that stands beside the student in every step, if one does."""
    objective = run.objective
    if not isinstance(objective, Distillation) or objective.logits != "live":
        return None
    settings = objective.teacher
    absent = device == "cuda" and not torch.cuda.is_available()
    dtype = DTYPES.get(settings.dtype) or (torch.bfloat16 if absent else best_dtype(device))
    model = skeleton(_plain(settings), dtype=dtype).requires_grad_(False).eval()
    # A sliding window is no segments to a plan, and training has them all the same.
    asked = settings.attention == "auto"
    segments = asked and (suppose_segments(model) or may_keep_segments_apart(model))
    hold_codes_of(model, find_sites(model), settings, device)
    return Teacher(model, segments)


def _put_reward(models: Models, run: Run, reward: RunReward, device: str) -> None:
    """Put the model of a reward run beside the others, or what it is likely to be."""
    try:
        _, judging = open_finished(reward.path)
    except CheckpointError:
        _guess(models, run, reward)
        return
    if isinstance(judging.objective, Reward):
        _put_adapter(models, judging.methods, reward)
    else:
        models.judges.append(_judge(judging, device))


def _judge(run: Run, device: str) -> Judge:
    dtypes = choose_dtypes(_decided(run, device), torch.device(device))
    tuned = _attached(run, dtypes)
    hold_codes_of(tuned.model, tuned.sites, run.model, device)
    mixed = any(part.attachment.trains_base for part in tuned.parts)
    return Judge(
        tuned.model.eval(),
        run.evaluation.batch_size,
        run.data.max_length,
        dtypes.autocast(mixed=mixed),
    )


def _guess(models: Models, run: Run, reward: RunReward) -> None:
    """Stand in for a reward run that is not there yet: it must not stop the plan."""
    if reward.wanted is not None:
        model = skeleton(_plain(run.model), dtype=models.dtypes.weights).eval()
        models.judges.append(Judge(model, run.evaluation.batch_size, run.data.max_length, None))
        taken = f"a classifier as large as {run.model.name}"
    else:
        own = [method for method in run.methods if method.base_dtype != "float32"]
        _put_adapter(models, own or [LoRA()], reward)
        taken = f"a reward model with {'this run' if own else 'a LoRA'}'s adapter"
    models.remarks.append(
        f"{reward.path}: no run is there yet, so it is taken for {taken}; plan again when it is."
    )


def _put_adapter(models: Models, methods: Sequence[Method], reward: RunReward) -> None:
    """Put the adapter of a reward model on what trains, frozen and off.

    Raises:
        SpecError: the reward run tuned whole weights.
    """
    if any(method.base_dtype == "float32" for method in methods):
        raise SpecError(
            f"{reward.path}: this reward run tuned whole weights, and a reward model on the "
            "policy's backbone is an adapter; train it with a method such as lora"
        )
    name = f"{REWARD}_{len(models.rewards)}"
    attach(models.tuned, *methods, name=name)
    models.tuned.enable(False, name)
    models.tuned.freeze(name)
    models.rewards.append(name)
