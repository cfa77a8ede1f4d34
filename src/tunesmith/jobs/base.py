"""The base of a run: a model as its files hold it, or with an earlier run's adapter merged in."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.errors import MethodError, SpecError
from tunesmith.jobs.run_directory import RunDirectory, open_finished
from tunesmith.methods.adapter_files import base_name as made_on
from tunesmith.methods.child import base_parameters
from tunesmith.methods.storage import load_adapter
from tunesmith.models.embeddings import fingerprint
from tunesmith.models.loading import load_model
from tunesmith.models.quantize import quantise
from tunesmith.models.skeleton import empty_on_cpu, skeleton

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from tunesmith.methods.adapter_files import SavedAdapter
    from tunesmith.models.heads import Head
    from tunesmith.models.settings import ModelSettings

_FILES = ("*.safetensors", "*.json", "*/*.safetensors", "*/*.json")
"""What of an adapter's directory decides what it does."""
_DIGITS = 12


def load_base(
    settings: ModelSettings,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head: Head | None = None,
) -> PreTrainedModel:
    """Return the model that `settings` name, `model.adapter` merged in, on `device`.

    A quantised base is merged in full precision first and quantised afterwards.

    Raises:
        ModelError: see `load_model`.
        SpecError: there is no adapter in the directory, or it cannot be merged.
        AdapterError: it is damaged, or belongs to another base.
    """
    if settings.adapter is None:
        return load_model(settings, device=device, dtype=dtype, head=head).model
    directory = adapter_directory(settings.adapter)
    plain = settings.model_copy(update={"quantize": "none", "adapter": None})
    quantised = settings.quantize != "none"
    model = load_model(
        plain, device=torch.device("cpu") if quantised else device, dtype=dtype, head=head
    ).model
    merge_for_good(model, directory)
    # Adapters record their base by name, and this base is not the plain one.
    model.config._name_or_path = model.name_or_path = base_name(settings)
    if quantised:
        quantise(model, settings, device=device)
    return model


def merge_for_good(model: PreTrainedModel, directory: Path) -> None:
    """Put the adapter in `directory` into the weights of `model`; nothing of it is left beside.

    Raises:
        SpecError: its method cannot be merged.
        AdapterError: it is damaged, or belongs to another base.
    """
    tuned = load_adapter(model, directory, trainable=False)
    required = {name: p.requires_grad for name, p in base_parameters(model).items()}
    try:
        with tuned.merged():
            merged = {n: p.to("cpu", copy=True) for n, p in base_parameters(model).items()}
    except MethodError as error:
        raise SpecError(
            f"model.adapter: {directory} cannot be merged into the base ({error}); start from a "
            "run of a method that can, such as lora, or from an exported model (`model.name`)"
        ) from error
    tuned.detach()
    with torch.no_grad():
        for name, parameter in base_parameters(model).items():
            parameter.copy_(merged[name])
            parameter.requires_grad_(required[name])


def empty_base(settings: ModelSettings) -> PreTrainedModel:
    """Return the base without its weights, under the name that adapters record it by.

    Raises:
        ModelError: nothing of this name.
        SpecError: there is no adapter in `model.adapter`.
    """
    model = empty_on_cpu(skeleton(settings).eval())
    model.config._name_or_path = model.name_or_path = base_name(settings)
    return model


def base_of_run(run: RunDirectory) -> ModelSettings | None:
    """Return what a run's file says of its base, not quantised; None where there is no run.

    Raises:
        SpecError: the run's file means nothing.
    """
    if not run.spec.is_file():
        return None
    own = open_finished(run.path)[1].model
    return own.model_copy(update={"quantize": "none", "products": "dtype"})


def require_same_start(settings: ModelSettings, saved: Iterable[SavedAdapter]) -> None:
    """Check that what a run started from is still what it was when `saved` were trained.

    Raises:
        SpecError: there is no adapter in `model.adapter`, or another one.
    """
    if settings.adapter is None:
        return
    now = base_name(settings)
    for before in filter(None, map(made_on, saved)):
        if Path(before).name != Path(now).name:
            raise SpecError(
                f"model.adapter: {settings.adapter} is not what the run started from, which was "
                f"{before!r} and is {now!r} now"
            )


def adapter_directory(path: str) -> Path:
    """Return the folder of the adapter that `path`, a run's directory or itself one, holds.

    Raises:
        SpecError: there is none.
    """
    given = Path(path).expanduser()
    for place in (given / "adapter", given):
        if any(place.glob("adapter_*.json")) or any(place.glob("*/adapter_model.safetensors")):
            return place
        if (place / "adapter_model.safetensors").is_file():
            return place
    if (given / "model" / "config.json").is_file():
        raise SpecError(
            f"model.adapter: the run {path} tuned whole weights; use model.name: {given / 'model'}"
        )
    raise SpecError(f"model.adapter: {path} holds no adapter; expected a run or a saved adapter")


def adapter_digest(directory: Path) -> str:
    """Return a hash of the files that decide what an adapter does."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in _FILES for path in directory.glob(pattern)}):
        if "adapter" not in path.name:  # a tokenizer beside it
            continue
        with path.open("rb") as file:
            name = str(path.relative_to(directory))
            found.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def base_name(settings: ModelSettings) -> str:
    """Return what the base is called: the model's name, and the adapter's by its contents."""
    if settings.adapter is None:
        return settings.name
    directory = adapter_directory(settings.adapter)
    called = directory.parent.name if directory.name == "adapter" else directory.name
    return f"{settings.name}+{called}-{adapter_digest(directory)[:_DIGITS]}"


def base_fingerprint(settings: ModelSettings) -> str:
    """Return a hash of all that decides what the base computes, but for its dtype.

    Raises:
        ModelError: nothing of this name.
        SpecError: there is no adapter in `model.adapter`.
    """
    own = fingerprint(settings)
    if settings.adapter is None:
        return own
    return hashlib.sha256(
        f"{own} {adapter_digest(adapter_directory(settings.adapter))}".encode()
    ).hexdigest()
