"""From what was saved to an attachment on its base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, get_args

from tunesmith.errors import AdapterError
from tunesmith.methods import MethodUnion
from tunesmith.methods.adapter_files import base_name

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.methods.adapter_files import Base, SavedAdapter
    from tunesmith.methods.contract import Attachment, Method, PeftFiles
    from tunesmith.models.sites import Sites


def require_base(adapter: SavedAdapter, base: Base, *, check_name: bool) -> None:
    """Check that `adapter` was made on `base`.

    Raises:
        AdapterError: it was made on a base of another name (where `check_name`) or of other sizes.
    """
    record, made_on = adapter.record, base_name(adapter)
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


def attach_saved(
    adapter: SavedAdapter, model: PreTrainedModel, sites: Sites, *, name: str
) -> tuple[Method, Attachment]:
    """Put `adapter` on `model` under `name`, with its values.

    Raises:
        AdapterError: it cannot be read, or does not fit; nothing is then left on the model.
        MethodError: the name is taken.
    """
    record = adapter.record
    recorded = record.method if record else None
    if adapter.peft is not None:
        return _reader(adapter.peft).attach_peft(
            adapter.peft, model, sites, recorded=recorded, name=name
        )
    if record is None or recorded is None:
        raise AdapterError(f"{adapter.directory} does not say which method it is of")
    attachment = recorded.attach(model, sites, name=name)
    try:
        attachment.load_saved_tensors(
            renamed(adapter.tensors, attachment.trainable(), old=record.name, new=name)
        )
    except BaseException:
        attachment.detach()
        raise
    return recorded, attachment


def renamed(
    tensors: Mapping[str, Tensor], wanted: Iterable[str], *, old: str, new: str
) -> dict[str, Tensor]:
    """Return `tensors`, saved by an adapter called `old`, by the names of one called `new`.

    An adapter's name is the end of the names of its modules, as in `layers.0.lora_old.A`.

    Args:
        tensors: what was saved.
        wanted: names of parameters of the new adapter.
        old: its name when it was saved.
        new: its name now.
    """
    modules = {}
    for name in wanted:
        parts = name.split(".")
        for index, part in enumerate(parts, start=1):
            if part.endswith(f"_{new}"):
                before = [*parts[: index - 1], f"{part.removesuffix(new)}{old}"]
                modules[".".join(before)] = ".".join(parts[:index])
    return {_under(name, modules): tensor for name, tensor in tensors.items()}


def _under(name: str, modules: Mapping[str, str]) -> str:
    """Return `name` with the module that it lies in renamed."""
    for before, after in modules.items():
        if name.startswith(f"{before}."):
            return after + name.removeprefix(before)
    return name


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
