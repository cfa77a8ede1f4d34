"""What a run will need, before anything is loaded: parameters, and memory by what it is for."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.engine.blocks import training_blocks
from tunesmith.errors import SpecError
from tunesmith.jobs.assemble import Program, attach_seeded, choose_dtypes
from tunesmith.jobs.labelled import classifies
from tunesmith.measure.memory_plan import MemoryPlan, Strategy, shared_out
from tunesmith.measure.simulated_codes import Held, hold_codes
from tunesmith.measure.simulated_memory import StepMemory, simulate_step
from tunesmith.models.context import context_length
from tunesmith.models.heads import Head
from tunesmith.models.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.jobs.assemble import Dtypes
    from tunesmith.methods.counts import ParameterCounts
    from tunesmith.methods.tuned import TunedModel
    from tunesmith.spec import Run
    from tunesmith.types import Batch

_ADAM_BYTES: Final = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256}
"""Of both moments, a parameter: float32, or 8-bit codes with two float32 scales a block of 256
(Dettmers et al. 2022, arXiv:2110.02861)."""
_SMALL: Final = 4096
"""Tensors below so many parameters keep their moments in float32, also with 8-bit codes."""


@dataclass(frozen=True)
class Plan:
    """What a run needs."""

    run: Run
    counts: ParameterCounts
    device: str
    """`cuda` or `cpu`."""
    tokens: tuple[int, int]
    """Rows and tokens a row of the micro-batch that was simulated."""
    alone: MemoryPlan
    """On one device."""
    block_bytes: int
    """Weights of the largest block."""

    def on(self, devices: int, strategy: Strategy) -> MemoryPlan:
        """Return the memory of each of several devices."""
        return shared_out(self.alone, devices, strategy, block=self.block_bytes)


def plan(run: Run, *, device: str = "cuda", length: int | None = None) -> Plan:
    """Return what `run` needs, from its model's config alone; a step is simulated, none is run.

    Every row is taken to be as long as the longest allowed and all of it supervised, so this is
    the most that the run will need.

    Args:
        run: what to plan.
        device: `cuda` or `cpu`; plans for either can be made on any machine.
        length: tokens a row; `data.max_length` where none is given, at most the model's context.

    Raises:
        TunesmithError: the kind says which part of the run cannot work.
    """
    if device not in {"cuda", "cpu"}:
        raise SpecError(f"--device: {device!r} is none to plan for; use cuda or cpu")
    dtypes = choose_dtypes(_decided(run, device), torch.device(device))
    tuned = _attached(run, dtypes)
    tuned.model.train()
    rows = run.train.batch_size
    length = min(length or run.data.max_length, context_length(tuned.model) or sys.maxsize)
    counts = tuned.parameter_counts()
    trained = sum(p.numel() * 4 for p in tuned.trainable().values())
    gradients = trained
    optimizer = round(sum(_state_bytes(p, run) for p in tuned.trainable().values()))
    block = _largest_block(tuned)
    _hold_codes(tuned, run, device)
    step = _simulated(run, tuned, dtypes, shape=(rows, length), device=device)
    frozen = step.parameters - trained
    activations = step.activations
    if run.engine.checkpointing == "offload":
        activations -= _inputs_away(tuned, dtypes, rows * length)
    transient = step.transient
    if run.train.accumulation_steps > 1:
        transient += gradients  # those of the micro-batches before stay while the next one runs
    alone = MemoryPlan(
        frozen=frozen,
        trained=trained,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        transient=transient,
        process=psutil.Process().memory_info().rss if device == "cpu" else 0,
    )
    return Plan(run, counts, device, (rows, length), alone, block)


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


def head_of(run: Run) -> Head | None:
    """Return the head of a classifier, with two classes where they are not known yet."""
    if not classifies(run):
        return None
    labels = getattr(run.objective, "labels", None) or ["0", "1"]
    return Head(run.objective.head, tuple(labels))  # type: ignore[arg-type]  # not causal_lm


def _attached(run: Run, dtypes: Dtypes) -> TunedModel:
    plain = run.model.model_copy(update={"quantize": "none"})
    return attach_seeded(skeleton(plain, dtype=dtypes.weights, head=head_of(run)), run)


def _simulated(
    run: Run, tuned: TunedModel, dtypes: Dtypes, *, shape: tuple[int, int], device: str
) -> StepMemory:
    model, program = tuned.model, Program(tuned.model, run.objective)
    mixed = any(part.attachment.trains_base for part in tuned.parts)
    blocks = [model.get_submodule(block.path) for block in tuned.sites.blocks]
    # No data, so nothing to compile; `auto` keeps everything, as it does at first. What offloading
    # sends away is taken off afterwards: here all memory is one.
    settings: dict[str, str] = {"speed": "safe"}
    if run.engine.checkpointing == "offload":
        settings["checkpointing"] = "full"
    engine = run.engine.model_copy(update=settings)
    with training_blocks(model, blocks, engine, device=torch.device("cpu")):
        return simulate_step(
            model,
            lambda: full_batch(run, model, shape),
            lambda batch: program(batch).total,
            autocast=dtypes.autocast(mixed=mixed),
            device=device,
        )


def full_batch(run: Run, model: PreTrainedModel, shape: tuple[int, int]) -> Batch:
    """Return a full batch of this shape, with what the objective reads."""
    ids = torch.zeros(shape, dtype=torch.int64)
    if classifies(run):
        labels = ids if run.objective.head == "token_classification" else ids[:, 0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if model.config.is_encoder_decoder:
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "labels": ids}
    positions = torch.arange(shape[1])[None].expand(shape)
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def _state_bytes(parameter: nn.Parameter, run: Run) -> float:
    small = parameter.numel() < _SMALL
    return parameter.numel() * _ADAM_BYTES["adamw" if small else run.train.optimizer]


def _hold_codes(tuned: TunedModel, run: Run, device: str) -> None:
    """Give the maps that `model.quantize` rounds their codes; biases and all else stay."""
    settings = run.model
    if settings.quantize == "none":
        return
    kept = {
        *(tuned.model._keep_in_fp32_modules or ()),
        *(tuned.model._keep_in_fp32_modules_strict or ()),
    }
    paths = dict.fromkeys(s.module for block in tuned.sites.blocks for s in block.sites)
    maps = (tuned.model.get_submodule(path) for path in paths if kept.isdisjoint(path.split(".")))
    held = Held(settings.quantize, settings.double_quantize, settings.multiplies_float8, device)
    hold_codes((module for module in maps if isinstance(module, nn.Linear | Conv1D)), held)


def _inputs_away(tuned: TunedModel, dtypes: Dtypes, tokens: int) -> int:
    """Return the bytes of the blocks' inputs that wait in the host's memory.

    All but two: that of the block that computes, and that of the one that comes next.
    """
    width: int = tuned.model.config.get_text_config().hidden_size
    return max(0, len(tuned.sites.blocks) - 2) * tokens * width * dtypes.weights.itemsize


def _largest_block(tuned: TunedModel) -> int:
    return max(
        sum(p.nbytes for p in tuned.model.get_submodule(block.path).parameters())
        for block in tuned.sites.blocks
    )
