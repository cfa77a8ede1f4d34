"""The new head of a classifier: it trains with every method, and is saved with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from torch import Tensor, nn

from tunesmith.errors import AdapterError
from tunesmith.methods.adapter_files import AdapterFiles, SavedAdapter, SavedHead
from tunesmith.methods.child import base_parameters
from tunesmith.methods.contract import Attachment, Method
from tunesmith.methods.peft_format import PREFIX
from tunesmith.methods.saved import attach_saved
from tunesmith.methods.selected import SelectedParameters
from tunesmith.methods.tensors import check_against, copy_into, whole
from tunesmith.models.heads import head_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.parts import Part
    from tunesmith.models.sites import Sites

logger = logging.getLogger(__name__)

TASK_TYPES: Final = {"sequence_classification": "SEQ_CLS", "token_classification": "TOKEN_CLS"}
"""What PEFT calls the heads."""


class TaskHead(Method):
    """Train a classifier's head; `attach` adds it to every method that leaves the head alone."""

    default_learning_rate: ClassVar[float] = 1e-3

    name: Literal["task_head"] = "task_head"
    """The head of a classifier."""

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> HeadAttachment:
        """Select the head's parameters that do not train yet.

        Raises:
            MethodError: a parameter is quantised.
        """
        return HeadAttachment(model, untrained(model, sites))


class HeadAttachment(SelectedParameters):
    """A head in float32, whatever the dtype of the model under it.

    Switched off, the head is the one it started as, in float32 too: a new head has no other base.
    """

    trains_base: ClassVar[bool] = False  # its inputs are brought to float32, so no autocast
    puts_out_float32: ClassVar[bool] = True

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__(model, names, keep_base=True)
        self._base = {name: value.float() for name, value in self._base.items()}

    def start_from(self, values: Mapping[str, Tensor]) -> None:
        """Begin with `values`, those of the head that acted before, where it trains them."""
        for name, parameter in self.trainable().items():
            if name in values:
                copy_into(parameter, values[name])

    def detach(self) -> None:
        """Put the head back that was there, in the model's dtype."""
        dtypes = dict(self._dtypes)
        super().detach()
        for name, dtype in dtypes.items():
            parameter = self._model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)


def acting_head(attachments: Sequence[Attachment]) -> dict[str, Tensor]:
    """Return the values of the head that acts, by parameter; empty where none was attached."""
    heads = [a for a in attachments if isinstance(a, HeadAttachment) and a.enabled]
    return {name: value for head in heads for name, value in head.state_dict().items()}


def untrained(model: nn.Module, sites: Sites) -> list[str]:
    """Return the parameters of the model's classification head that do not train yet."""
    inside = tuple(f"{path}." for path in sites.classifier)
    return [
        name
        for name, parameter in base_parameters(model).items()
        if name.startswith(inside) and not parameter.requires_grad
    ]


def head_of(model: nn.Module, sites: Sites) -> Iterator[Method]:
    """Yield the method that trains what is still frozen of the head, if anything is."""
    if sites.classifier and untrained(model, sites):
        yield TaskHead()


def with_heads(
    files: Sequence[AdapterFiles], parts: Sequence[Part], model: PreTrainedModel
) -> list[AdapterFiles]:
    """Return `files` with each head among `parts` in the first file of its adapter.

    PEFT's layout names it as PEFT does, under `modules_to_save`.
    """
    found = list(files)
    for part in parts:
        if not isinstance(part.attachment, HeadAttachment):
            continue
        index = next(i for i, f in enumerate(found) if f.record and f.record.name == part.name)
        found[index] = _with_head(found[index], part.attachment.state_dict(), model)
    return found


def _with_head(
    files: AdapterFiles, state: Mapping[str, Tensor], model: PreTrainedModel
) -> AdapterFiles:
    kind = head_kind(model)
    assert kind is not None  # noqa: S101 - a model without a head has no HeadAttachment
    labels = tuple(model.config.id2label[index] for index in range(model.config.num_labels))
    head = SavedHead(kind=kind, labels=labels, parameters=tuple(state))
    prefix = PREFIX if files.config is not None else ""
    tensors = files.tensors | {f"{prefix}{name}": whole(value) for name, value in state.items()}
    config = files.config and files.config | {
        "task_type": TASK_TYPES[kind],
        "modules_to_save": _modules(state),
    }
    record = files.record and files.record.model_copy(update={"head": head})
    return AdapterFiles(tensors, config, record)


def _modules(names: Mapping[str, Tensor]) -> list[str]:
    """Return the head's modules as PEFT names them: by the last part of their path.

    A backbone's pooler is named as a whole, and so is a head of several layers.
    """
    return sorted({"pooler" if ".pooler." in f".{n}" else n.partition(".")[0] for n in names})


def saved_parts(
    adapter: SavedAdapter, model: PreTrainedModel, sites: Sites, *, name: str
) -> Iterator[tuple[Method, Attachment]]:
    """Put `adapter` on `model`, and then the head that it holds, if it does.

    Raises:
        AdapterError: either cannot be read or does not fit.
        MethodError: the name is taken.
    """
    plain, head = split_head(adapter)
    if head is None and sites.classifier:
        logger.warning(
            "%s holds no classification head; the model keeps the one it has", adapter.directory
        )
    if head is not None:
        _require_head(adapter, head, model)
    yield attach_saved(plain, model, sites, name=name)
    if head is not None:
        attachment = HeadAttachment(model, list(head))
        attachment.load_state_dict(head)
        yield TaskHead(), attachment


def split_head(adapter: SavedAdapter) -> tuple[SavedAdapter, dict[str, Tensor] | None]:
    """Return the adapter without its head, and the head's values by parameter, or None."""
    prefix = PREFIX if adapter.config is not None else ""
    if adapter.record is not None and adapter.record.head is not None:
        names = [f"{prefix}{name}" for name in adapter.record.head.parameters]
    elif adapter.record is None and adapter.config is not None:
        saved = adapter.config.get("modules_to_save") or []
        names = [name for name in adapter.tensors if _is_inside(name, saved)]
    else:
        names = []
    config = adapter.config and {k: v for k, v in adapter.config.items() if k != "modules_to_save"}
    if not names:
        return adapter, None
    if missing := [name for name in names if name not in adapter.tensors]:
        raise AdapterError(f"{adapter.directory}: {missing[0]} of the head is missing")
    rest = {name: value for name, value in adapter.tensors.items() if name not in names}
    head = {name.removeprefix(prefix): adapter.tensors[name] for name in names}
    return replace(adapter, tensors=rest, config=config), head


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    """Return whether PEFT's tensor `name` is a weight of one of `modules` and of no adapter.

    PEFT takes every module whose path ends so: DistilBERT's pre_classifier for classifier as well.
    """
    parents = list(accumulate(name.removeprefix(PREFIX).split(".")[:-1], "{}.{}".format))
    inside = any(parent.endswith(module) for parent in parents for module in modules)
    return inside and ".lora_" not in name


def _require_head(
    adapter: SavedAdapter, head: Mapping[str, Tensor], model: PreTrainedModel
) -> None:
    """Raise AdapterError where the model has not the head that was saved."""
    saved = adapter.record.head if adapter.record else None
    own = base_parameters(model)
    absent = [name for name in head if name not in own]
    if saved is None and head_kind(model) is None:
        raise AdapterError(
            f"{adapter.directory}: modules_to_save holds {next(iter(head))}, which of a model that "
            "is no classifier cannot be read; merge the adapter into its base with PEFT and load "
            "the merged model"
        )
    if absent or head_kind(model) is None:
        labels = f" for the labels {', '.join(saved.labels)}" if saved else ""
        raise AdapterError(
            f"{adapter.directory} holds a classification head{labels}, and this "
            f"{type(model).__name__} has no place for {(absent or list(head))[0]}; load the base "
            "with load_model(..., head=Head(...))"
        )
    check_against({name: own[name].shape for name in head}, head)
    if saved is not None and model.config.num_labels == len(saved.labels):
        names = tuple(model.config.id2label[index] for index in range(len(saved.labels)))
        if names != saved.labels:
            raise AdapterError(
                f"{adapter.directory} was made for the labels {', '.join(saved.labels)}, and this "
                f"model has {', '.join(names)}; load the base with a head for the same labels in "
                "the same order"
            )
