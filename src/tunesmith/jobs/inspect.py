"""What a trained adapter is: its files, and what training made of its method."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tunesmith.errors import AdapterError, ModelError, SetupError
from tunesmith.jobs.run_directory import RunDirectory
from tunesmith.methods.adapter_files import base_name, read_adapters
from tunesmith.methods.inspection import (
    changed_share,
    delta_norms,
    kept_ranks,
    nearest_tokens,
    prefix_norms,
)
from tunesmith.methods.tuned import TunedModel
from tunesmith.models.heads import Head
from tunesmith.models.loading import load_model
from tunesmith.models.settings import ModelSettings
from tunesmith.models.skeleton import empty_on_cpu, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tunesmith.methods.adapter_files import SavedAdapter
    from tunesmith.methods.contract import Attachment
    from tunesmith.types import JSON

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
    run = RunDirectory(Path(path))
    if run.spec.is_file() and not run.adapter.exists():
        raise AdapterError(
            f"{path} holds no adapter: it is not finished, or all of the model was trained"
        )
    directory = run.adapter if run.spec.is_file() else run.path
    saved = read_adapters(directory)
    name = base or next(filter(None, map(base_name, saved)), "")
    tuned = tokenizer = missing = None
    try:
        model, tokenizer = _base(name, saved)
    except (ModelError, SetupError) as error:
        missing = str(error)
    else:
        tuned = TunedModel(model)
        tuned.load_adapter(None, directory, check_base=base is None)
    inspected = []
    for adapter in saved:
        attachment = None if tuned is None else _attachment(tuned, adapter)
        inside = None if attachment is None else _look(attachment, tokenizer, tokens)
        inspected.append(_inspected(adapter, inside))
    return Inspection(str(path), inspected, missing, _findings(run))


def _base(
    name: str, saved: list[SavedAdapter]
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast | None]:
    """Return the base, and its tokenizer where its weights are needed."""
    if not name:
        raise ModelError("the adapter does not say on which base model it was made; give --base")
    heads = [x.record.head for x in saved if x.record and x.record.head]
    head = Head(heads[0].kind, heads[0].labels) if heads else None
    if head is not None or any(_method(adapter) in NEAR_TOKENS for adapter in saved):
        return load_model(name, head=head)
    return empty_on_cpu(skeleton(ModelSettings(name=name)).eval()), None


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
        base=base_name(adapter),
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
    if not run.summary.is_file():
        return {}
    summary: dict[str, JSON] = run.read_json(run.summary)
    return {name: summary[name] for name in FINDINGS if name in summary}
