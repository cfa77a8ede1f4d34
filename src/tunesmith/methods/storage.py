"""Loading a saved adapter onto its base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tunesmith.errors import AdapterError
from tunesmith.methods import MethodUnion
from tunesmith.methods.adapter_files import Base, SavedAdapter, base_of, read_adapters
from tunesmith.methods.tuned import Part, TunedModel, require_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.contract import Method, PeftFiles


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
    named = (config or {}).get("base_model_name_or_path")
    made_on = record.base.name if record else str(named or "")
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
    recorded = adapter.record.method if adapter.record else None
    if adapter.peft is not None:
        reader = _reader(adapter.peft)
        method, attachment = reader.attach_peft(
            adapter.peft, tuned.model, tuned.sites, recorded=recorded, name=name
        )
        tuned.put(Part(name, method, attachment))
    elif recorded is not None:
        attachment = recorded.attach(tuned.model, tuned.sites, name=name)
        tuned.put(Part(name, recorded, attachment))
        attachment.load_saved_tensors(adapter.tensors)


def _reader(files: PeftFiles) -> type[Method]:
    """Return the method that reads files of this peft_type."""
    methods: tuple[type[Method], ...] = get_args(get_args(MethodUnion)[0])
    readers = {method.peft_type: method for method in methods if method.peft_type is not None}
    kind = files.config.get("peft_type")
    if kind not in readers:
        raise AdapterError(
            f"{files.file}: peft_type {kind!r} cannot be read, only "
            f"{', '.join(map(repr, sorted(readers)))} can"
        )
    return readers[kind]
