"""What a run will need, before anything is loaded: parameters, and memory by what it is for."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil
import torch
from torch import nn

from tunesmith.engine.recompute import recomputing
from tunesmith.errors import SpecError
from tunesmith.jobs.assemble import Program, attach_seeded, choose_dtypes
from tunesmith.jobs.labelled import classifies
from tunesmith.measure.memory_plan import MemoryPlan, Strategy, shared_out
from tunesmith.measure.simulated_memory import StepMemory, simulate_step
from tunesmith.models.context import context_length
from tunesmith.models.heads import Head
from tunesmith.models.skeleton import skeleton
from tunesmith.ops.chunked_head import logits_workspace

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

_WORTHWHILE: Final = 0.97
"""A change that leaves more of the peak than this is not worth its price."""


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
    saved, weight = _quantised_savings(tuned, run)
    block = _largest_block(tuned)
    vocabulary = tuned.model.get_input_embeddings().num_embeddings
    step = _simulated(run, tuned, dtypes, (rows, length))
    logits = 0
    if not classifies(run):
        logits = logits_workspace(rows * length, vocabulary, device)
    frozen = step.parameters - trained - saved
    transient = max(step.transient, logits) + weight
    if run.train.accumulation_steps > 1:
        transient += gradients  # those of the micro-batches before stay while the next one runs
    alone = MemoryPlan(
        frozen=frozen,
        trained=trained,
        gradients=gradients,
        optimizer=optimizer,
        activations=step.activations,
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


def _attached(run: Run, dtypes: Dtypes) -> TunedModel:
    head = None
    if classifies(run):
        labels = getattr(run.objective, "labels", None) or ["0", "1"]
        head = Head(run.objective.head, tuple(labels))  # type: ignore[arg-type]  # not causal_lm
    plain = run.model.model_copy(update={"quantize": "none"})
    model = skeleton(plain, dtype=dtypes.weights, head=head)
    return attach_seeded(model, run)


def _simulated(run: Run, tuned: TunedModel, dtypes: Dtypes, shape: tuple[int, int]) -> StepMemory:
    model, program = tuned.model, Program(tuned.model, run.objective)
    mixed = any(part.attachment.trains_base for part in tuned.parts)
    with recomputing(model, run.engine):
        return simulate_step(
            model,
            lambda: _batch(run, model, shape),
            lambda batch: program(batch).total,
            autocast=dtypes.autocast(mixed=mixed),
        )


def _batch(run: Run, model: PreTrainedModel, shape: tuple[int, int]) -> Batch:
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


def _quantised_savings(tuned: TunedModel, run: Run) -> tuple[int, int]:
    """Return the bytes that `model.quantize` saves, and of the largest weight, dequantised."""
    kind = run.model.quantize
    if kind == "none":
        return 0, 0
    paths = dict.fromkeys(s.module for block in tuned.sites.blocks for s in block.sites)
    saved, largest = 0.0, 0
    for path in paths:
        weight = tuned.model.get_submodule(path).get_parameter("weight")
        scales = weight.numel() / 64 * 4
        if run.model.double_quantize:
            scales = weight.numel() / 64 * (1 + 4 / 256)
        codes = weight.numel() / 2 + scales if kind == "nf4" else weight.numel() + 4 * len(weight)
        saved += weight.nbytes - codes
        largest = max(largest, weight.nbytes)
    return round(saved), largest


def _largest_block(tuned: TunedModel) -> int:
    return max(
        sum(p.nbytes for p in tuned.model.get_submodule(block.path).parameters())
        for block in tuned.sites.blocks
    )


def _least_weights(planned: Plan) -> float:
    """Return the bytes below which no change brings the weights: half a byte each."""
    codes = planned.counts.base / 2
    return codes if _changes_to_nf4(planned.run) else planned.alone.frozen


def _changes_to_nf4(run: Run) -> bool:
    quantisable = all(method.base_dtype != "float32" for method in run.methods)
    return run.model.quantize == "none" and quantisable


def _changes(run: Run) -> Iterator[tuple[str, str, Callable[[Run], Run]]]:
    """Yield what saves memory: the override, its price, and the change itself."""
    if run.train.optimizer == "adamw":
        yield _change("train.optimizer", "adamw_8bit", "hardly any time; the state is rounded")
    if run.engine.checkpointing == "none":
        yield _change("engine.checkpointing", "full", "one more forward pass a step")
    for _ in range(int(math.log2(run.train.batch_size))):
        yield (
            "train.batch_size halved, train.accumulation_steps doubled",
            "smaller products, which fill a GPU less",
            _halved,
        )
    if _changes_to_nf4(run):
        yield _change("model.quantize", "nf4", "weights are dequantised for every product")


def _change(key: str, value: str, price: str) -> tuple[str, str, Callable[[Run], Run]]:
    section, name = key.split(".")

    def changed(run: Run) -> Run:
        settings = getattr(run, section).model_copy(update={name: value})
        return run.model_copy(update={section: settings})

    return f"{key}={value}", price, changed


def _halved(run: Run) -> Run:
    size, steps = run.train.batch_size, run.train.accumulation_steps
    halves = {"batch_size": size // 2, "accumulation_steps": steps * 2}
    return run.model_copy(update={"train": run.train.model_copy(update=halves)})


def remedies(planned: Plan, limit: int) -> list[Remedy]:
    """Return the smallest changes that bring a run under `limit` bytes, the cheapest first.

    Changes are added one after the other in the order of their price in speed until the run fits;
    empty where it fits, or where none of them suffices.
    """
    run, chosen = planned.run, []
    if planned.alone.peak <= limit or _least_weights(planned) > limit:
        return []
    for change, price, changed in _changes(run):
        smaller = plan(changed(run), device=planned.device, length=planned.tokens[1])
        if smaller.alone.peak > _WORTHWHILE * planned.alone.peak:
            continue
        run, planned = smaller.run, smaller
        chosen.append(Remedy(change, price, planned))
        if planned.alone.peak <= limit:
            return chosen
    return []
