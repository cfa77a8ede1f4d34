"""Putting a run together: tokenizer, data, model, method and objective, before anything trains."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from tunesmith.data.collate import Collator
from tunesmith.data.collate_pairs import PairCollator
from tunesmith.data.collate_replies import ReplyCollator
from tunesmith.data.collate_taught import TaughtCollator
from tunesmith.data.pairs_collate import JudgedCollator
from tunesmith.engine.random_state import seeded
from tunesmith.errors import ModelError, SpecError
from tunesmith.jobs.base import load_base
from tunesmith.jobs.known_tokens import check_tokens
from tunesmith.jobs.labelled import (
    check_lengths,
    classifies,
    compares,
    head_of_run,
    labelled_collator,
    read_data,
    reads_rows,
    require_padding,
)
from tunesmith.jobs.reference import completion_of
from tunesmith.jobs.roles import with_roles
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.attention import enable_segments
from tunesmith.models.chat import prepare_tokenizer
from tunesmith.models.encoder_decoder import start_token
from tunesmith.models.loading import load_tokenizer
from tunesmith.models.precision import DTYPES, best_dtype
from tunesmith.models.quantize import require_quantiser
from tunesmith.objectives.sampling import FromReplies

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tunesmith.data.classification_collate import LabelledCollator
    from tunesmith.data.prepare import PreparedData
    from tunesmith.data.tokenise import TokenisingProgress
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.result import LoadedRun
    from tunesmith.models.chat import TokenizerFacts
    from tunesmith.objectives import ObjectiveUnion
    from tunesmith.spec import Run
    from tunesmith.types import Batch, LossTerms


SECONDS_BETWEEN_LINES = 3.0


class Program(nn.Module):
    """Model and objective as one module, so that wrappers see the whole forward, loss included."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: ObjectiveUnion,
        complete: Callable[[Batch], Batch] | None = None,
    ) -> None:
        """Take model and objective, and what puts a frozen model's word into a batch, if any."""
        super().__init__()
        self.model = model
        self.objective = objective
        self._complete = complete

    def forward(self, batch: Batch) -> LossTerms:
        """Return the summed loss of `batch`."""
        return self.objective.loss(self.model, self.completed(batch))

    def completed(self, batch: Batch) -> Batch:
        """Return `batch` with the frozen model's word, if there is one."""
        return batch if self._complete is None else self._complete(batch)


@dataclass(frozen=True)
class Dtypes:
    """What the weights are loaded in, and what matrix products compute in."""

    weights: torch.dtype
    compute: torch.dtype

    def autocast(self, *, mixed: bool) -> torch.dtype | None:
        """Return the dtype of autocast, or None where the weights' own dtype serves.

        Args:
            mixed: whether base weights train, in float32 beside frozen ones in another dtype.
        """
        needed = self.weights != self.compute or (mixed and self.compute != torch.float32)
        return self.compute if needed else None


@dataclass(frozen=True)
class Assembled:
    """A run that is ready to train."""

    run: Run
    tuned: TunedModel
    program: Program
    tokenizer: PreTrainedTokenizerFast
    facts: TokenizerFacts
    data: PreparedData
    collate: (
        Collator | PairCollator | LabelledCollator | JudgedCollator | ReplyCollator | TaughtCollator
    )
    autocast_dtype: torch.dtype | None
    """What the forward computes in under autocast; None leaves the model's own dtype."""

    @property
    def padding_free(self) -> bool:
        """Whether batches are segments side by side instead of padded rows."""
        return self.collate.padding == "free"


def assemble(run: Run, peers: Peers, progress: Callable[[str], None]) -> Assembled:
    """Return everything `run` needs, loaded and attached; nothing is written but the cache.

    Args:
        run: the resolved run.
        peers: the processes; the model goes to their device.
        progress: told in a few words what is being done.

    Raises:
        TunesmithError: the kind says which part of the run cannot work.
    """
    _check_quantised(run, peers)
    _check_early_stopping(run)
    progress("reading data")
    chats = not classifies(run)
    tokenizer = load_tokenizer(run.model, chats=chats)
    facts = prepare_tokenizer(tokenizer, run.model, chats=chats)
    run, data = read_data(run, tokenizer, _every_few_seconds(progress))
    progress("loading the model")
    dtypes = choose_dtypes(run, peers.device)
    model = load_base(run.model, device=peers.device, dtype=dtypes.weights, head=head_of_run(run))
    padding = choose_padding(run, model)
    progress("attaching the method")
    tuned = with_roles(attach_seeded(model, run), run)
    check_lengths(run, model, data)
    check_tokens(run, model, tokenizer, data)
    mixed = any(part.attachment.trains_base for part in tuned.parts)
    return Assembled(
        run=run,
        tuned=tuned,
        program=Program(model, run.objective, completion_of(run, tuned)),
        tokenizer=tokenizer,
        facts=facts,
        data=data,
        collate=choose_collator(run, model, data, facts, padding),
        autocast_dtype=dtypes.autocast(mixed=mixed),
    )


def _check_quantised(run: Run, peers: Peers) -> None:
    """Refuse what a quantised base cannot do before anything is read.

    Raises:
        SpecError: every weight is to train, or the weights are to be sharded.
        SetupError: bitsandbytes is missing.
    """
    kind = run.model.quantize
    if kind == "none":
        return
    for method in run.methods:
        if method.base_dtype == "float32":
            raise SpecError(
                f"method: {method.name} trains the weights themselves, and the codes of "
                f"model.quantize: {kind} have no gradient; use model.quantize: none, or a method "
                "beside the weights such as lora"
            )
    if peers.size > 1 and run.engine.distribution == "fsdp":
        raise SpecError(
            f"engine.distribution: fsdp would cut the codes of model.quantize: {kind} without "
            "their scales; use ddp"
        )
    require_quantiser(run.model, peers.device)


def _check_early_stopping(run: Run) -> None:
    """Refuse to stop early what would not be what it promises, or is not measured on the way.

    Raises:
        SpecError: it would not, or is not.
    """
    if run.train.early_stopping is None:
        return
    for method in run.methods:
        if method.needs_every_step:
            raise SpecError(
                f"train.early_stopping: {method.name} becomes sparse in its last phase only, and "
                "the best of a run that stops early may be from before; leave early_stopping out "
                "and set train.max_steps"
            )
    if run.evaluation.every_steps is None:
        raise SpecError(
            "train.early_stopping: counts evaluations, and without evaluation.every_steps there is "
            "none between the first step and the last; set evaluation.every_steps, or leave "
            "early_stopping out"
        )


def _every_few_seconds(say: Callable[[str], None]) -> Callable[[TokenisingProgress], None]:
    """Return a listener that says how many rows are tokenised, not more often than can be read."""
    last = time.monotonic()

    def listen(progress: TokenisingProgress) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(f"tokenised {progress.rows:,} rows of {progress.source}")

    return listen


def assembled_from(loaded: LoadedRun, data: PreparedData) -> Assembled:
    """Return a finished run, loaded again, as `assemble` would have it.

    Raises:
        SpecError: rows are longer than the model takes.
    """
    chats = not classifies(loaded.run)
    facts = prepare_tokenizer(loaded.tokenizer, loaded.run.model, chats=chats)
    model = loaded.tuned.model
    check_lengths(loaded.run, model, data)
    check_tokens(loaded.run, model, loaded.tokenizer, data)
    return Assembled(
        run=loaded.run,
        tuned=loaded.tuned,
        program=Program(model, loaded.run.objective, completion_of(loaded.run, loaded.tuned)),
        tokenizer=loaded.tokenizer,
        facts=facts,
        data=data,
        collate=choose_collator(loaded.run, model, data, facts, choose_padding(loaded.run, model)),
        autocast_dtype=loaded.autocast_dtype,
    )


def attach_seeded(model: PreTrainedModel, run: Run) -> TunedModel:
    """Attach the run's methods with initial weights that the run's seed decides."""
    if not run.methods:
        return TunedModel(model)  # asked as it is; nothing trains
    with seeded(run.seed):
        return attach(model, *run.methods)


def choose_dtypes(run: Run, device: torch.device) -> Dtypes:
    """Return the dtypes that `model.dtype` and `engine.precision` ask for, or the best here.

    Raises:
        SpecError: products cannot be float32 over weights that are not, or over codes and weights
            in different dtypes.
    """
    asked, precision = DTYPES.get(run.model.dtype), DTYPES.get(run.engine.precision)
    compute = precision or asked or best_dtype(device)
    trains_all = any(method.base_dtype == "float32" for method in run.methods)
    weights = asked or (torch.float32 if trains_all else compute)
    if compute == torch.float32 != weights:
        raise SpecError(
            f"engine.precision: float32 needs model.dtype float32, not {run.model.dtype}"
        )
    if run.model.quantize != "none" and weights != compute:
        raise SpecError(
            f"engine.precision: {run.engine.precision} differs from model.dtype {run.model.dtype}, "
            f"but model.quantize: {run.model.quantize} leaves no weights that this could concern; "
            "leave one of the two at auto"
        )
    return Dtypes(weights, compute)


def choose_collator(  # noqa: PLR0917 - the parts of a run
    run: Run,
    model: PreTrainedModel,
    data: PreparedData,
    facts: TokenizerFacts,
    padding: Literal["free", "right"],
) -> Collator | PairCollator | LabelledCollator | JudgedCollator | ReplyCollator:
    """Return what makes batches of the run's rows."""
    if isinstance(run.objective, FromReplies):
        return ReplyCollator(facts.pad_token_id, padding)
    if compares(run):
        return JudgedCollator(facts.pad_token_id, padding)
    if not classifies(run):
        if model.config.is_encoder_decoder:
            return PairCollator(facts.pad_token_id, start_token(model))
        return Collator(facts.pad_token_id, padding)
    return labelled_collator(run, model, data, pad_token_id=facts.pad_token_id, padding=padding)


def choose_padding(run: Run, model: PreTrainedModel) -> Literal["free", "right"]:
    """Return how batches are laid out, and switch segment-aware attention on for `free`.

    Raises:
        ModelError: packing or `engine.padding: free` on a model whose attention cannot do it.
    """
    if reads_rows(run, model):
        require_padding(run, model)
        return "right"
    wanted = run.engine.padding == "free" or run.data.packing
    if run.model.attention != "auto" or (run.engine.padding == "right" and not run.data.packing):
        if wanted:
            raise SpecError("data.packing and engine.padding free need model.attention auto")
        return "right"
    plain = run.engine.speed == "safe" and run.engine.attention == "auto"
    if enable_segments(model, "varlen" if plain else run.engine.attention):
        return "free"
    if wanted:
        raise ModelError(
            f"data.packing: the attention of {type(model).__name__} cannot keep packed samples "
            "apart; use data.packing: false and engine.padding: auto"
        )
    return "right"
