"""What a trained adapter is: its files, and what training made of its method."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from tunesmith.errors import AdapterError, ModelError, SetupError, SpecError
from tunesmith.jobs.base import base_of_run, empty_base, load_base, require_same_start
from tunesmith.jobs.run_directory import RunDirectory, run_of_adapter
from tunesmith.methods.adapter_files import base_name as made_on
from tunesmith.methods.adapter_files import read_adapters
from tunesmith.methods.inspection import (
    changed_share,
    delta_norms,
    kept_ranks,
    nearest_tokens,
    prefix_norms,
)
from tunesmith.methods.tuned import TunedModel
from tunesmith.models.heads import Head
from tunesmith.models.loading import load_tokenizer
from tunesmith.models.precision import DTYPES, best_dtype
from tunesmith.models.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tunesmith.methods.adapter_files import SavedAdapter
    from tunesmith.methods.contract import Attachment
    from tunesmith.types import JSON

_CPU: Final = torch.device("cpu")
NEAR_TOKENS: Final = {"prompt_tuning", "p_tuning"}
"""Methods whose inspection looks into the base's embeddings, so that its weights are loaded."""


FINDINGS: Final = ("gates",)
"""What methods leave in a run's summary about themselves."""


@dataclass(frozen=True)
class TensorGroup:
    """Saved tensors that differ in numbers in their names only."""

    pattern: str
    """Their name, with * for the numbers."""
    shape: tuple[int, ...]
    dtype: str
    count: int


@dataclass(frozen=True)
class NearToken:
    """A token of the vocabulary near a row of a prompt."""

    id: int
    text: str
    cosine: float


@dataclass(frozen=True)
class Inside:
    """What only an adapter on its base shows; empty where its method has no such thing."""

    delta_norms: dict[str, float] = field(default_factory=dict)
    """Frobenius norm of what is added to each weight, by the path of its module."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Singular values that AdaLoRA kept, by the path of the module."""
    changed_share: float | None = None
    """Share of the elements that diff pruning changed."""
    prefix_norms: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Mean length of keys and values, by the path of the layer."""
    nearest_tokens: list[list[NearToken]] = field(default_factory=list)
    """Of each row of a prompt, the nearest first."""


@dataclass(frozen=True)
class InspectedAdapter:
    """One adapter."""

    directory: str
    name: str
    method: dict[str, Any]
    """Its settings, or PEFT's configuration where PEFT wrote it."""
    base: str
    parameters: int
    """Numbers in the file."""
    bytes_on_disk: int
    tensors: list[TensorGroup]
    inside: Inside | None
    """None where the base cannot be had."""


@dataclass(frozen=True)
class Inspection:
    """What was found in a directory."""

    path: str
    starts_from: str | None
    """The run or adapter that was merged into the base before this one was trained."""
    adapters: list[InspectedAdapter]
    missing_base: str | None
    """Why the base cannot be had, where it cannot."""
    findings: dict[str, JSON]
    """What the run noted about its method: the gates of UniPELT."""

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as JSON has it."""
        return asdict(self)


def inspect_result(path: str | Path, *, tokens: int = 3, base: str | None = None) -> Inspection:
    """Return what the adapter of a run, or in an adapter directory, is.

    Shapes of the base come from its config; its weights are loaded for prompts and classifiers
    only.

    Args:
        path: a run directory or an adapter directory.
        tokens: how many near tokens to show of each row of a prompt.
        base: name of the base model, where the adapter does not say it or means another place.

    Raises:
        AdapterError: there is no adapter, or it is damaged or does not fit its base.
    """
    directory = Path(path)
    if RunDirectory(directory).spec.is_file():
        directory = RunDirectory(directory).adapter
        if not directory.exists():
            raise AdapterError(
                f"{path} holds no adapter: it is not finished, or all of the model was trained"
            )
    run = run_of_adapter(directory)
    saved = read_adapters(directory)
    settings = tuned = tokenizer = missing = None
    try:
        settings = _base_settings(run, saved) if base is None else ModelSettings(name=base)
        model, tokenizer = _base(settings, saved)
    except (ModelError, SetupError, SpecError) as error:
        missing = str(error)
    else:
        tuned = TunedModel(model)
        tuned.load_adapter(None, directory, check_base=base is None)
    inspected = []
    for adapter in saved:
        attachment = None if tuned is None else _attachment(tuned, adapter)
        inside = None if attachment is None else _look(attachment, tokenizer, tokens)
        inspected.append(_inspected(adapter, inside))
    starts_from = None if settings is None else settings.adapter
    return Inspection(str(path), starts_from, inspected, missing, _findings(run))


def _base_settings(run: RunDirectory, saved: list[SavedAdapter]) -> ModelSettings:
    """Return what names the base, not quantised: the run's file, or what an adapter alone says.

    Raises:
        ModelError: nothing says it.
        SpecError: the run's file means nothing.
    """
    if (own := base_of_run(run)) is not None:
        return own
    name = next(filter(None, map(made_on, saved)), "")
    if not name:
        raise ModelError("the adapter does not say on which base model it was made; give --base")
    return ModelSettings(name=name)


def _base(
    settings: ModelSettings, saved: list[SavedAdapter]
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast | None]:
    """Return the base, and its tokenizer where its weights are needed.

    Raises:
        ModelError: there is no such model.
        SpecError: there is no adapter in `model.adapter`, or another one than there was.
    """
    require_same_start(settings, saved)
    heads = [x.record.head for x in saved if x.record and x.record.head]
    head = Head(heads[0].kind, heads[0].labels) if heads else None
    if head is not None or any(_method(adapter) in NEAR_TOKENS for adapter in saved):
        dtype = DTYPES.get(settings.dtype) or best_dtype(_CPU)
        model = load_base(settings, device=_CPU, dtype=dtype, head=head)
        return model, load_tokenizer(settings, chats=head is None)
    return empty_base(settings), None


def _attachment(tuned: TunedModel, adapter: SavedAdapter) -> Attachment:
    """Return what `adapter` put on the model."""
    record = adapter.record
    return next(
        part.attachment
        for part in tuned.parts
        if part.name == _name(adapter) and (record is None or part.method == record.method)
    )


def _look(attachment: Attachment, tokenizer: PreTrainedTokenizerFast | None, tokens: int) -> Inside:
    near = [] if tokenizer is None else nearest_tokens(attachment, tokens)
    return Inside(
        delta_norms=delta_norms(attachment),
        ranks=kept_ranks(attachment),
        changed_share=changed_share(attachment),
        prefix_norms=prefix_norms(attachment),
        nearest_tokens=[
            [NearToken(i, tokenizer.decode([i]) if tokenizer else "", c) for i, c in row]
            for row in near
        ],
    )


def _inspected(adapter: SavedAdapter, inside: Inside | None) -> InspectedAdapter:
    record, config = adapter.record, adapter.config
    files = [path for path in adapter.directory.iterdir() if path.is_file()]
    return InspectedAdapter(
        directory=str(adapter.directory),
        name=_name(adapter),
        method=record.method.model_dump(mode="json") if record else dict(config or {}),
        base=made_on(adapter),
        parameters=sum(tensor.numel() for tensor in adapter.tensors.values()),
        bytes_on_disk=sum(path.stat().st_size for path in files),
        tensors=_groups(adapter),
        inside=inside,
    )


def _name(adapter: SavedAdapter) -> str:
    return adapter.record.name if adapter.record else "default"


def _method(adapter: SavedAdapter) -> str:
    """Return the name of an adapter's method: ours, or PEFT's in our spelling."""
    if adapter.record is not None:
        return adapter.record.method.name
    return str((adapter.config or {}).get("peft_type", "")).lower()


def _groups(adapter: SavedAdapter) -> list[TensorGroup]:
    """Return the saved tensors, those of all layers together."""
    found = Counter(
        (_NUMBER.sub("*", name), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in adapter.tensors.items()
    )
    return [TensorGroup(*key, count) for key, count in found.items()]


_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")


def _findings(run: RunDirectory) -> dict[str, JSON]:
    """Return what a run's summary says about its method."""
    if not (run.spec.is_file() and run.summary.is_file()):
        return {}
    summary: dict[str, JSON] = run.read_json(run.summary)
    return {name: summary[name] for name in FINDINGS if name in summary}
