"""What all of PEFT's adapter files have in common: configurations, names, targeted modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import AdapterError
from tunesmith.methods.child import base_modules
from tunesmith.methods.peft_targets import targeted
from tunesmith.methods.places import spread
from tunesmith.methods.tensors import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.contract import PeftFiles
    from tunesmith.methods.low_rank import Place

T = TypeVar("T")
Config = TypeVar("Config", bound="PeftConfig")

PREFIX: Final = "base_model.model."
"""PEFT writes names as its wrapped model has them."""

WITHOUT_EFFECT: Final = {
    "auto_mapping", "fan_in_fan_out", "inference_mode", "peft_version", "revision", "task_type",
}  # fmt: skip
"""Keys of any configuration that change nothing about what a finished adapter computes."""


class PeftConfig(BaseModel):
    """What is read of one of PEFT's configurations; every other key must be unset."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    peft_type: str
    base_model_name_or_path: str | None = None


class PeftTargets(PeftConfig):
    """A configuration that says which linear maps it adapts."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


def read_peft_config(
    files: PeftFiles, kind: type[Config], *, without_effect: Collection[str], plain: str
) -> Config:
    """Return the configuration of `files` as `kind` has it.

    Args:
        files: PEFT's configuration and tensors.
        kind: what is read of it.
        without_effect: keys besides `WITHOUT_EFFECT` that may be set to anything.
        plain: the method's name in the error message.

    Raises:
        AdapterError: a value is wrong, or a key is set that `kind` does not read.
    """
    try:
        config = kind.model_validate(files.config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise AdapterError(f"{files.file}: {where}: {first['msg']}") from None
    for key, value in (config.model_extra or {}).items():
        if value and key not in WITHOUT_EFFECT and key not in without_effect:
            raise AdapterError(
                f"{files.file}: {key} is set ({value!r}), which makes it more than plain {plain} "
                "and cannot be read; merge the adapter into its base with PEFT and load the merged "
                "model"
            )
    return config


def common_config(model: PreTrainedModel, peft_type: str) -> dict[str, Any]:
    """Return the keys that every one of PEFT's configurations has."""
    return {
        "peft_type": peft_type,
        "task_type": _task_type(model),
        "base_model_name_or_path": model.name_or_path or None,
        "inference_mode": True,
    }


def _task_type(model: PreTrainedModel) -> str | None:
    """Return what PEFT calls the model's kind; None where it has no name for it.

    That is a model without a head, or with BERT's, which fills in masked tokens and writes no text.
    """
    if model.get_output_embeddings() is None or not model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def stored_transposed(model: nn.Module, paths: Iterable[str]) -> bool:
    """Return PEFT's fan_in_fan_out: whether the modules store their weights as (in, out)."""
    return all(isinstance(model.get_submodule(path), Conv1D) for path in paths)


def adapted_modules(
    config: PeftTargets, tensors: Mapping[str, Tensor], mark: str, model: PreTrainedModel
) -> dict[str, nn.Module]:
    """Return the linear maps that are adapted, by path, in the model's order.

    What the configuration targets is taken, so that a lost tensor is noticed; where it does not
    say, what there are tensors for.

    Args:
        config: says which.
        tensors: PEFT's names and values.
        mark: what a module's tensor is called, such as `lora_A.weight`.
        model: the base model.

    Raises:
        AdapterError: no module is meant.
    """
    modules = dict(base_modules(model))
    linear = {p: m for p, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    head_path = next((path for path, module in linear.items() if module is head), None)
    meant = targeted(config, linear, head_path)
    if meant is None:
        meant = {path for path in linear if f"{PREFIX}{path}.{mark}" in tensors}
    if not meant:
        raise AdapterError(
            f"target_modules {config.target_modules!r} of adapter_config.json names no linear map "
            f"of this {type(model).__name__}; the adapter belongs to another model"
        )
    return {path: module for path, module in linear.items() if path in meant}


def without_base(tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return `tensors` without copies of the base's own weights.

    PEFT adds embedding and head where one of them is adapted. Copies that differ from this base
    stay, and are then not expected.
    """
    # By all names: of a head tied to the embedding PEFT writes a copy too.
    base = {
        f"{path}.{leaf}": parameter
        for path, module in base_modules(model)
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    kept = {}
    for key, tensor in tensors.items():
        own = base.get(key.removeprefix(PREFIX).replace(".base_layer.weight", ".weight"))
        if own is None or not key.endswith(".weight") or not torch.equal(whole(own), tensor):
            kept[key] = tensor
    return kept


def most_common(values: Iterable[T]) -> T:
    """Return the value that occurs most often, the first of several."""
    return Counter(values).most_common(1)[0][0]


def spread_rows(place: Place, rows: Tensor) -> Tensor:
    """Return `rows` (reached, ...), on the CPU, over all columns of `place` (out, ...)."""
    return spread(rows, place.column_index(), place.out_features)


def reached_rows(place: Place, rows: Tensor, name: str) -> Tensor:
    """Return the rows of `rows` (out, ...) that `place` reaches, undoing `spread_rows`.

    Raises:
        AdapterError: the others are not zero.
    """
    index = place.column_index()
    if index is None:
        return rows
    reached = rows[index]
    if not torch.equal(spread_rows(place, reached), rows):
        raise AdapterError(
            f"{place.module}.{name} acts on output columns that tunesmith.json says it does not; "
            "delete tunesmith.json to load it over all columns"
        )
    return reached
