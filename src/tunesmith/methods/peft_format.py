"""LoRA in PEFT's own layout: what its adapter_config.json and tensor names mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import AdapterError
from tunesmith.methods.bias import modules_with_bias
from tunesmith.methods.child import base_modules, base_parameters
from tunesmith.methods.contract import PeftFiles
from tunesmith.methods.low_rank import Place, linear_features
from tunesmith.methods.peft_targets import by_pattern, short_names, targeted
from tunesmith.methods.tensors import check_against, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.bias import Bias
    from tunesmith.methods.low_rank import LowRank
    from tunesmith.models.families import Columns

T = TypeVar("T")

PREFIX: Final = "base_model.model."
"""PEFT writes names as its wrapped model has them."""

WITHOUT_EFFECT: Final = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Keys that change nothing about what a finished plain LoRA computes."""

LEAVE_THE_BASE: Final = {"true", "false", "gaussian", "orthogonal", "eva"}
"""Initialisations after which the base weights are still the base's."""


class PeftLora(BaseModel):
    """What is read of PEFT's LoraConfig; every other key must be unset."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    peft_type: str
    base_model_name_or_path: str | None = None
    r: int = Field(default=8, ge=1)
    lora_alpha: float = 8
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True


@dataclass(frozen=True)
class LoraFiles:
    """A LoRA read from PEFT's files and found to fit the model."""

    config: PeftLora
    places: list[Place]
    pairs: dict[str, tuple[Tensor, Tensor]]
    """A (rank, in) and B (out, rank) by the path of their module."""
    biases: dict[str, Tensor]
    """Bias (out,) by the path of its module."""


def write_lora(
    model: PreTrainedModel,
    pairs: Mapping[str, LowRank],
    biases: Mapping[str, Bias],
    *,
    dropout: float,
    rslora: bool,
) -> PeftFiles:
    """Return `pairs` and `biases`, by the path of their module, as PEFT writes them.

    Tensors are whole and on the CPU; where they are sharded, every process calls this.
    """
    tensors = {}
    for path, pair in pairs.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = whole(pair.A)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = _spread(pair.place, whole(pair.B))
    for path, bias in biases.items():
        tensors[_bias_name(path, pairs)] = whole(bias.value)
    places = [pair.place for pair in pairs.values()]
    rank = _most_common(place.rank for place in places)
    alpha = _most_common(place.alpha for place in places)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.get_output_embeddings() is not None else None,
        "base_model_name_or_path": model.name_or_path or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": all(isinstance(model.get_submodule(p), Conv1D) for p in pairs),
        "init_lora_weights": True,
        "target_modules": short_names(pairs, [path for path, _ in base_modules(model)]),
        "rank_pattern": {p.module: p.rank for p in places if p.rank != rank},
        "alpha_pattern": {p.module: p.alpha for p in places if p.alpha != alpha},
    }
    return PeftFiles(config, tensors)


def _most_common(values: Iterable[T]) -> T:
    """Return the value that occurs most often, the first of several."""
    return Counter(values).most_common(1)[0][0]


def _spread(place: Place, B: Tensor) -> Tensor:
    """Return B over all output columns (out, rank), zero where the pair does not reach."""
    index = place.column_index()
    if index is None:
        return B
    return B.new_zeros(place.out_features, place.rank).index_copy(0, index, B)


def read_config(text: str, file: Path) -> PeftLora:
    """Return what `text`, the content of an adapter_config.json, says.

    Raises:
        AdapterError: it is no LoRA configuration, or one that means more than plain LoRA.
    """
    try:
        config = PeftLora.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise AdapterError(f"{file}: {where}: {first['msg']}") from None
    if config.peft_type != "LORA":
        raise AdapterError(
            f"{file}: peft_type {config.peft_type!r} cannot be read, only 'LORA' can"
        )
    for key, value in (config.model_extra or {}).items():
        if value and key not in WITHOUT_EFFECT:
            raise AdapterError(
                f"{file}: {key} is set ({value!r}), which makes it more than plain LoRA and cannot "
                "be read; merge the adapter into its base with PEFT and load the merged model"
            )
    if config.bias not in {"none", "all"}:
        raise AdapterError(f"{file}: bias {config.bias!r} cannot be read, only none and all can")
    if str(config.init_lora_weights).lower() not in LEAVE_THE_BASE:
        raise AdapterError(
            f"{file}: init_lora_weights {config.init_lora_weights!r} changed the base weights, so "
            "the adapter does not fit the plain base; save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    return config


def read_lora(
    model: PreTrainedModel,
    config: PeftLora,
    tensors: Mapping[str, Tensor],
    columns: Mapping[str, Columns | None],
) -> LoraFiles:
    """Fit a LoRA's `tensors` to `model`, which is not touched.

    Args:
        model: the base model, perhaps with other adapters on it.
        config: what its adapter_config.json says.
        tensors: PEFT's names and values.
        columns: for modules of which it adapts certain output columns only, which.

    Raises:
        AdapterError: names or shapes do not fit; the first that does not is named.
    """
    modules = dict(base_modules(model))
    linear = {p: m for p, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    adapted = _adapted(config, tensors, linear, model)
    places = [_place(config, path, linear[path], columns.get(path)) for path in adapted]
    with_bias = modules_with_bias(model) if config.bias == "all" else []
    expected = {}
    for place in places:
        owner = f"{PREFIX}{place.module}"
        expected[f"{owner}.lora_A.weight"] = torch.Size((place.rank, place.in_features))
        expected[f"{owner}.lora_B.weight"] = torch.Size((place.out_features, place.rank))
    names = {path: _bias_name(path, adapted) for path in with_bias}
    expected |= {n: model.get_parameter(f"{path}.bias").shape for path, n in names.items()}
    check_against(expected, _without_base(tensors, model))
    return LoraFiles(
        config,
        places,
        {place.module: _pair(place, tensors) for place in places},
        {path: tensors[name] for path, name in names.items()},
    )


def _adapted(
    config: PeftLora,
    tensors: Mapping[str, Tensor],
    linear: Mapping[str, nn.Module],
    model: PreTrainedModel,
) -> list[str]:
    """Return the linear maps that are adapted, in the model's order.

    What the configuration targets is taken, so that a lost tensor is noticed; where it does not
    say, what there are tensors for.
    """
    head = model.get_output_embeddings()
    head_path = next((path for path, module in linear.items() if module is head), None)
    meant = targeted(config, linear, head_path)
    if meant is None:
        meant = {path for path in linear if f"{PREFIX}{path}.lora_A.weight" in tensors}
    if not meant:
        raise AdapterError(
            f"target_modules {config.target_modules!r} of adapter_config.json names no linear map "
            f"of this {type(model).__name__}; the adapter belongs to another model"
        )
    return [path for path in linear if path in meant]


def _without_base(tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return `tensors` without copies of the base's own weights.

    PEFT adds embedding and head where one of them is adapted. Copies that differ from this base
    stay, and are then not expected.
    """
    base = base_parameters(model)
    kept = {}
    for key, tensor in tensors.items():
        own = base.get(key.removeprefix(PREFIX).replace(".base_layer.weight", ".weight"))
        if own is None or not key.endswith(".weight") or not torch.equal(whole(own), tensor):
            kept[key] = tensor
    return kept


def _place(config: PeftLora, path: str, module: nn.Module, columns: Columns | None) -> Place:
    """Return where the pair of the module at `path` goes."""
    rank = by_pattern(config.rank_pattern or {}, path, config.r)
    alpha = by_pattern(config.alpha_pattern or {}, path, config.lora_alpha)
    return Place(path, *linear_features(path, module), rank, alpha, columns)


def _bias_name(path: str, adapted: Container[str]) -> str:
    """Return PEFT's name of a bias: it wraps adapted modules, so theirs lies one level deeper."""
    return f"{PREFIX}{path}.base_layer.bias" if path in adapted else f"{PREFIX}{path}.bias"


def _pair(place: Place, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A and B of `place` out of PEFT's tensors, B cut to the columns it reaches.

    Raises:
        AdapterError: B is not zero in the other columns.
    """
    A = tensors[f"{PREFIX}{place.module}.lora_A.weight"]
    B = tensors[f"{PREFIX}{place.module}.lora_B.weight"]
    index = place.column_index()
    if index is None:
        return A, B
    reached = B[index]
    if not torch.equal(_spread(place, reached), B):
        raise AdapterError(
            f"{place.module}.lora_B acts on output columns that tunesmith.json says it does not; "
            "delete tunesmith.json to load it over all columns"
        )
    return A, reached
