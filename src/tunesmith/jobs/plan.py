"""What a run will need, before anything is loaded: parameters, and memory by what it is for."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.engine.blocks import training_blocks
from tunesmith.errors import SetupError, SpecError
from tunesmith.jobs.assemble import Program, attach_seeded, choose_dtypes
from tunesmith.jobs.full_batch import full_batch, require_batch, sequences_a_row, side_by_side
from tunesmith.jobs.labelled import has_head, head_of_run, reads_rows
from tunesmith.measure.memory_plan import MemoryPlan, Strategy, shared_out
from tunesmith.measure.process_heap import give_back
from tunesmith.measure.simulated_codes import Held, hold_codes
from tunesmith.measure.simulated_graph import Graphs, SimulatedGraph
from tunesmith.measure.simulated_memory import StepMemory, simulate_step
from tunesmith.models.attention import has_segments, suppose_segments
from tunesmith.models.context import context_length
from tunesmith.models.quantize import require_quantiser
from tunesmith.models.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.jobs.assemble import Dtypes
    from tunesmith.methods.counts import ParameterCounts
    from tunesmith.methods.tuned import TunedModel
    from tunesmith.models.heads import Head
    from tunesmith.spec import Run
    from tunesmith.types import Batch

_8BIT: Final = 2.0 + 8 / 256
"""Bytes of both of Adam's moments, a parameter, as 8-bit codes with two float32 scales a block of
256 (Dettmers et al. 2022, arXiv:2110.02861)."""
_SMALL: Final = 4096
"""Tensors below so many parameters keep their moments uncoded, also with 8-bit codes."""


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
    require_batch(run)
    dtypes = choose_dtypes(_decided(run, device), torch.device(device))
    process = _process(run) if device == "cpu" else 0
    tuned = _attached(run, dtypes)
    tuned.model.train()
    rows = run.train.batch_size
    length = min(length or run.data.max_length, context_length(tuned.model) or sys.maxsize)
    counts = tuned.parameter_counts()
    trained = sum(p.nbytes for p in tuned.trainable().values())
    gradients = trained
    optimizer = round(sum(_state_bytes(p, run) for p in tuned.trainable().values()))
    block = _largest_block(tuned)
    _hold_codes(tuned, run, device)
    step = _simulated(run, tuned, dtypes, shape=(rows, length), device=device)
    frozen = step.parameters - trained
    activations = step.activations
    if run.engine.checkpointing == "offload":
        activations -= _inputs_away(tuned, dtypes, rows * sequences_a_row(run) * length)
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
        process=process,
        holes=step.holes,
    )
    return Plan(run, counts, device, (rows, length), alone, block)


def _process(run: Run) -> int:
    """Return the bytes of this process with the libraries that the run loads."""
    with suppress(SetupError):  # where the run cannot be, it can still be planned
        require_quantiser(run.model, "cpu")
    give_back()
    return int(psutil.Process().memory_info().rss)


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
    """Return the head of the run's model, with two classes where they are not known yet."""
    if has_head(run) and getattr(run.objective, "labels", ()) is None:
        objective = run.objective.model_copy(update={"labels": ["0", "1"]})
        run = run.model_copy(update={"objective": objective})
    return head_of_run(run)


def _attached(run: Run, dtypes: Dtypes) -> TunedModel:
    plain = run.model.model_copy(update={"quantize": "none"})
    model = skeleton(plain, dtype=dtypes.weights, head=head_of(run))
    if (
        not reads_rows(run, model)
        and run.engine.padding != "right"
        and run.model.attention == "auto"
    ):
        suppose_segments(model)
    return attach_seeded(model, run)


def _simulated(
    run: Run, tuned: TunedModel, dtypes: Dtypes, *, shape: tuple[int, int], device: str
) -> StepMemory:
    model, program = tuned.model, Program(tuned.model, run.objective)
    mixed = any(part.attachment.trains_base for part in tuned.parts)
    blocks = [model.get_submodule(block.path) for block in tuned.sites.blocks]
    # `auto` keeps everything, as it does at first. What offloading sends away is taken off
    # afterwards: here all memory is one.
    away = run.engine.checkpointing == "offload"
    engine = run.engine.model_copy(update={"checkpointing": "full"} if away else {})
    graphs: Graphs = {}
    with training_blocks(
        model,
        blocks,
        engine,
        device=torch.device(device),
        stand_in=lambda block: SimulatedGraph(block, graphs),
    ):
        return simulate_step(
            model,
            lambda: _batch(run, model, shape),
            lambda batch: program(batch).total,
            autocast=dtypes.autocast(mixed=mixed),
            device=device,
        )


def _batch(run: Run, model: PreTrainedModel, shape: tuple[int, int]) -> Batch:
    batch = full_batch(run, model, shape)
    return side_by_side(batch) if has_segments(model) else batch


def _state_bytes(parameter: nn.Parameter, run: Run) -> float:
    if run.train.optimizer == "adamw_8bit" and parameter.numel() >= _SMALL:
        return parameter.numel() * _8BIT
    return 2 * parameter.nbytes  # in the parameter's own dtype


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
