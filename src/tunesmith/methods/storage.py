"""Loading a saved adapter onto its base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import AdapterError
from tunesmith.methods.adapter_files import Base, SavedAdapter, base_of, read_adapters
from tunesmith.methods.lora import LoRA, attach_places, targeted_columns
from tunesmith.methods.peft_format import LoraFiles, PeftLora, read_lora
from tunesmith.methods.tuned import Part, TunedModel, require_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.families import Columns
    from tunesmith.models.sites import Sites


def load_adapter(
    model: PreTrainedModel | TunedModel,
    directory: str | Path,
    *,
    name: str | None = None,
    check_base: bool = True,
) -> TunedModel:
    """Load an adapter that Tunesmith or PEFT saved onto `model`.

    Args:
        model: its base model, or a tuned one, which then has this adapter besides.
        directory: where it was saved.
        name: name to give it; None keeps the name it was saved under ("default" for PEFT's).
        check_base: refuse an adapter that was made on a base of another name. Sizes are checked in
            any case.

    Raises:
        AdapterError: a file is damaged, or the adapter does not fit this base model; the model is
            then as it was before.
        MethodError: an adapter of this name is attached already, or the name cannot name one.
    """
    saved = read_adapters(Path(directory))
    tuned = model if isinstance(model, TunedModel) else TunedModel(model)
    base = base_of(tuned.model, tuned.sites)
    for adapter in saved:
        _check_base(adapter, base, check_name=check_base)
    with tuned.attaching():
        for adapter in saved:
            own = adapter.record.name if adapter.record else "default"
            require_name(name or own)
            _load(tuned, adapter, name or own)
    return tuned


def _check_base(adapter: SavedAdapter, base: Base, *, check_name: bool) -> None:
    """Raise AdapterError where an adapter was made on another base."""
    record, config = adapter.record, adapter.config
    made_on = record.base.name if record else (config and config.base_model_name_or_path) or ""
    if check_name and made_on and base.name and _last(made_on) != _last(base.name):
        raise AdapterError(
            f"{adapter.directory} was made on the base model {made_on!r} and this is "
            f"{base.name!r}; load that one, or pass check_base=False if they are the same"
        )
    if record and (record.base.model_type, record.base.shape) != (base.model_type, base.shape):
        raise AdapterError(
            f"{adapter.directory} was made on a {record.base.model_type} model of other sizes than "
            f"this {base.model_type}; load its own base model"
        )


def _last(name: str) -> str:
    """Return what a path and a Hub id of the same model have in common."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _load(tuned: TunedModel, adapter: SavedAdapter, name: str) -> None:
    """Attach one adapter under `name` and give it its values."""
    record, config = adapter.record, adapter.config
    if config is not None:
        _load_lora(tuned, adapter, config, name)
    elif record is not None:
        attachment = record.method.attach(tuned.model, tuned.sites, name=name)
        tuned.put(Part(name, record.method, attachment))
        attachment.load_state_dict(adapter.tensors)


def _load_lora(tuned: TunedModel, adapter: SavedAdapter, config: PeftLora, name: str) -> None:
    """Attach one LoRA under `name`, at the places that PEFT's files name, with their values."""
    recorded = adapter.record.method if adapter.record else None
    columns: dict[str, Columns | None] = {}
    if isinstance(recorded, LoRA):
        columns = targeted_columns(tuned.model, tuned.sites, recorded.targets)
    files = read_lora(tuned.model, config, adapter.tensors, columns)
    method = recorded if isinstance(recorded, LoRA) else _described(files, tuned.sites)
    attachment = attach_places(tuned.model, files.places, method, name=name)
    tuned.put(Part(name, method, attachment))
    attachment.load_values(files.pairs, files.biases)


def _described(files: LoraFiles, sites: Sites) -> LoRA:
    """Return PEFT's configuration as our method: exact but for ranks and blocks that differ."""
    modules = {place.module for place in files.places}
    touched = {s.name for block in sites.blocks for s in block.sites if s.module in modules}
    config = files.config
    return LoRA(
        rank=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=sorted(touched) or "all",
        rslora=config.use_rslora,
        bias="all" if files.biases else "none",
    )
