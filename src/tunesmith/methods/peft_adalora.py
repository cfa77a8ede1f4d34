"""AdaLoRA in PEFT's own layout: P is its lora_B, the singular values lora_E, Q lora_A."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from tunesmith.errors import AdapterError
from tunesmith.methods.child import base_modules
from tunesmith.methods.contract import PeftFiles
from tunesmith.methods.peft_format import (
    PREFIX,
    PeftTargets,
    adapted_modules,
    common_config,
    reached_rows,
    read_peft_config,
    spread_rows,
    stored_transposed,
    without_base,
)
from tunesmith.methods.peft_lora import WITHOUT_EFFECT
from tunesmith.methods.peft_targets import short_names
from tunesmith.methods.places import Place, linear_features
from tunesmith.methods.tensors import check_against

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.family import Columns


class PeftAdaLora(PeftTargets):
    """What is read of PEFT's AdaLoraConfig."""

    init_r: int = Field(default=12, ge=1)
    target_r: int = Field(default=8, ge=1)
    lora_alpha: float = 8
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    deltaT: int = Field(default=1, ge=1)  # noqa: N815  # PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    rank_pattern: dict[str, list[bool]] | None = None
    bias: str = "none"


class Triplet(NamedTuple):
    """The values at one place."""

    P: Tensor
    """(reached, rank)."""
    L: Tensor
    """(rank,)."""
    Q: Tensor
    """(rank, in)."""


def write_adalora(
    model: PreTrainedModel,
    places: Mapping[str, Place],
    values: Mapping[str, Triplet],
    *,
    acting: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> PeftFiles:
    """Return the triplets that act as PEFT writes them.

    Args:
        model: the base model.
        places: where they are, by the path of their module.
        values: P, L and Q, whole and on the CPU.
        acting: which singular values act (rank,) bool.
        settings: of PEFT's configuration.
    """
    tensors, pattern = {}, {}
    for path, place in places.items():
        P, L, Q = values[path]
        chosen = acting[path]
        owner = f"{PREFIX}{path}"
        tensors[f"{owner}.lora_A"] = Q[chosen]
        tensors[f"{owner}.lora_B"] = spread_rows(place, P[:, chosen])
        tensors[f"{owner}.lora_E"] = L[chosen, None]
        # A list as long as the rank at the start, of which this may be a part already.
        dropped = settings["init_r"] - int(chosen.sum())
        pattern[f"{path}.lora_E"] = (
            chosen.tolist()
            if len(chosen) == settings["init_r"]
            else [True] * int(chosen.sum()) + [False] * dropped
        )
    config = common_config(model, "ADALORA") | {
        **settings,
        # PEFT wants a schedule that could be run; the finished adapter does not use it.
        "total_step": 1,
        "bias": "none",
        "fan_in_fan_out": stored_transposed(model, places),
        "init_lora_weights": True,
        "target_modules": short_names(places, [path for path, _ in base_modules(model)]),
        "rank_pattern": pattern,
    }
    return PeftFiles(config, tensors)


def read_adalora_config(files: PeftFiles) -> PeftAdaLora:
    """Return what the configuration says.

    Raises:
        AdapterError: it means more than AdaLoRA does.
    """
    unused = WITHOUT_EFFECT | {
        "init_lora_weights", "r", "tfinal", "tinit", "total_step", "alpha_pattern", "use_rslora",
    }  # fmt: skip
    config = read_peft_config(files, PeftAdaLora, without_effect=unused, plain="AdaLoRA")
    if config.bias != "none":
        raise AdapterError(f"{files.file}: bias {config.bias!r} cannot be read, only none can")
    return config


def adalora_places(
    model: PreTrainedModel,
    config: PeftAdaLora,
    tensors: Mapping[str, Tensor],
    columns: Mapping[str, Columns | None],
) -> list[Place]:
    """Return where the files put triplets, of the ranks that are left.

    Raises:
        AdapterError: they target nothing of this model.
    """
    pattern = config.rank_pattern or {}
    return [
        Place(
            path,
            *linear_features(path, module),
            sum(pattern.get(f"{path}.lora_E", [True] * config.init_r)),
            config.lora_alpha,
            columns.get(path),
        )
        for path, module in adapted_modules(config, tensors, "lora_E", model).items()
    ]


def read_adalora(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], places: Sequence[Place]
) -> dict[str, Triplet]:
    """Return the values at `places` by the path of their module, found to fit.

    Raises:
        AdapterError: names or shapes do not fit; the first that does not is named.
    """
    expected = {}
    for place in places:
        owner = f"{PREFIX}{place.module}"
        expected[f"{owner}.lora_A"] = torch.Size((place.rank, place.in_features))
        expected[f"{owner}.lora_B"] = torch.Size((place.out_features, place.rank))
        expected[f"{owner}.lora_E"] = torch.Size((place.rank, 1))
    check_against(expected, without_base(tensors, model))
    values = {}
    for place in places:
        owner = f"{PREFIX}{place.module}"
        P = reached_rows(place, tensors[f"{owner}.lora_B"], "lora_B")
        values[place.module] = Triplet(
            P, tensors[f"{owner}.lora_E"][:, 0], tensors[f"{owner}.lora_A"]
        )
    return values
