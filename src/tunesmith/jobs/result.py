"""Loading what a run left: the base model with the tuned result on it, switchable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.engine.distribution import connect
from tunesmith.errors import AdapterError
from tunesmith.jobs.assemble import choose_dtypes
from tunesmith.jobs.base import load_base
from tunesmith.jobs.labelled import classifies, head_of_run
from tunesmith.jobs.run_directory import RunDirectory, open_finished
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tunesmith.engine.distribution import Peers
    from tunesmith.spec import Run


@dataclass(frozen=True)
class LoadedRun:
    """A run's result in memory. `tuned.disabled()` is the untuned model."""

    run: Run
    directory: RunDirectory
    tuned: TunedModel
    tokenizer: PreTrainedTokenizerFast
    peers: Peers
    autocast_dtype: torch.dtype | None


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """Load the result of a finished run.

    Args:
        path: the run directory.
        overrides: settings over those of its run.yaml, such as `engine.device=cpu`.

    Raises:
        CheckpointError: there is no run, or it has no result.
        AdapterError: the result is damaged or belongs to another base model.
    """
    directory, run = open_finished(path, overrides)
    peers = connect(run.engine)
    dtypes = choose_dtypes(run, peers.device)
    head = head_of_run(run)
    model = load_base(run.model, device=peers.device, dtype=dtypes.weights, head=head)
    tokenizer = load_tokenizer(run.model, chats=not classifies(run))
    if directory.model.exists():
        tuned = _load_whole(model, run, directory)
    else:
        tuned = load_adapter(model, directory.adapter)
    mixed = any(part.attachment.trains_base for part in tuned.parts)
    model.eval()
    return LoadedRun(run, directory, tuned, tokenizer, peers, dtypes.autocast(mixed=mixed))


def _load_whole(model: PreTrainedModel, run: Run, directory: RunDirectory) -> TunedModel:
    """Put the weights of a fully tuned model beside its base, so that both can be had."""
    head = head_of_run(run)
    saved = load_model(str(directory.model), dtype=torch.float32, head=head).model.state_dict()
    tuned = attach(model, *run.methods)
    names = tuned.trainable()
    if missing := sorted(set(names) - set(saved)):
        raise AdapterError(f"{directory.model} lacks {missing[0]}; it is of another base model")
    tuned.load_state_dict({name: saved[name] for name in names})
    return tuned
