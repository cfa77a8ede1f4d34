"""LoRA in PEFT's own layout: what its adapter_config.json and tensor names mean."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from pydantic import Field
from torch import Tensor

from tunesmith.errors import AdapterError
from tunesmith.methods.bias import modules_with_bias
from tunesmith.methods.child import base_modules
from tunesmith.methods.contract import PeftFiles
from tunesmith.methods.experts import ExpertPair, ExpertPlace
from tunesmith.methods.low_rank import DoRA, LowRank
from tunesmith.methods.peft_experts import (
    expected_experts,
    expert_settings,
    expert_tensors,
    expert_values,
)
from tunesmith.methods.peft_format import (
    PREFIX,
    PeftTargets,
    adapted_modules,
    common_config,
    most_common,
    reached_rows,
    read_peft_config,
    spread_rows,
    stored_transposed,
    without_base,
)
from tunesmith.methods.peft_targets import by_pattern, short_names
from tunesmith.methods.places import Place, linear_features
from tunesmith.methods.tensors import check_against, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.bias import Bias
    from tunesmith.models.family import Columns

WITHOUT_EFFECT: Final = {
    "corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
"""LoRA's keys that change nothing about what a finished adapter computes."""

LEAVE_THE_BASE: Final = {"true", "false", "gaussian", "orthogonal", "eva"}
"""Initialisations after which the base weights are still the base's."""


class PeftLora(PeftTargets):
    """What is read of PEFT's LoraConfig."""

    r: int = Field(default=8, ge=1)
    lora_alpha: float = 8
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    target_parameters: list[str] | None = None


@dataclass(frozen=True)
class Pair:
    """The values at one place."""

    A: Tensor
    """(rank, in), and for experts (experts, rank, in)."""
    B: Tensor
    """(reached, rank), and for experts (experts, reached, rank)."""
    m: Tensor | None = None
    """DoRA's magnitudes (reached,)."""


@dataclass(frozen=True)
class LoraFiles:
    """A LoRA read from PEFT's files and found to fit the model."""

    config: PeftLora
    places: list[Place]
    pairs: dict[str, Pair]
    """Values by the path of their module, or of their weight where that is one of experts."""
    biases: dict[str, Tensor]
    """Bias (out,) by the path of its module."""


def write_lora(
    model: PreTrainedModel,
    pairs: Mapping[str, LowRank],
    biases: Mapping[str, Bias],
    *,
    experts: Mapping[str, ExpertPair],
    dropout: float,
    rslora: bool,
) -> PeftFiles:
    """Return `pairs` and `biases`, by the path of their module, as PEFT writes them.

    `experts` are by the full name of their weight.

    A pair that started as a part of the weight (pissa, olora) is written as one of twice the rank,
    [A; A0] and [B, -B0], which is the same map over the base as it is.

    Tensors are whole and on the CPU; where they are sharded, every process calls this.
    """
    tensors = {}
    for path, pair in pairs.items():
        A, B = whole(pair.A), whole(pair.B)
        if pair.A0 is not None and pair.B0 is not None:
            A, B = torch.cat([A, whole(pair.A0)]), torch.cat([B, -whole(pair.B0)], dim=1)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = spread_rows(pair.place, B)
        if isinstance(pair, DoRA):
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = whole(
                pair.all_magnitudes(model.get_submodule(path))
            )
    for path, bias in biases.items():
        tensors[_bias_name(path, pairs)] = whole(bias.value)
    tensors |= expert_tensors(experts)
    sizes = {path: _written_size(pair, rslora=rslora) for path, pair in pairs.items()}
    sizes |= {path: (pair.place.rank, pair.place.alpha) for path, pair in experts.items()}
    rank = most_common(r for r, _ in sizes.values())
    alpha = most_common(a for _, a in sizes.values())
    config: dict[str, Any] = common_config(model, "LORA") | {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": any(isinstance(pair, DoRA) for pair in pairs.values()),
        "bias": "all" if biases else "none",
        "fan_in_fan_out": bool(pairs) and stored_transposed(model, pairs),
        "init_lora_weights": True,
        "target_modules": short_names(pairs, [path for path, _ in base_modules(model)]),
        "rank_pattern": {path: r for path, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {path: a for path, (_, a) in sizes.items() if a != alpha},
        **expert_settings(model, experts),
    }
    return PeftFiles(config, tensors)


def _written_size(pair: LowRank, *, rslora: bool) -> tuple[int, float]:
    """Return rank and alpha as written: with twice the rank, an alpha that keeps the scale."""
    if pair.A0 is None:
        return pair.place.rank, pair.place.alpha
    return 2 * pair.place.rank, pair.place.alpha * (math.sqrt(2) if rslora else 2)


def read_lora_config(files: PeftFiles) -> PeftLora:
    """Return what the configuration says.

    Raises:
        AdapterError: it means more than LoRA and DoRA do.
    """
    config = read_peft_config(files, PeftLora, without_effect=WITHOUT_EFFECT, plain="LoRA")
    if config.bias not in {"none", "all"}:
        raise AdapterError(
            f"{files.file}: bias {config.bias!r} cannot be read, only none and all can"
        )
    if str(config.init_lora_weights).lower() not in LEAVE_THE_BASE:
        raise AdapterError(
            f"{files.file}: init_lora_weights {config.init_lora_weights!r} changed the base "
            "weights, so the adapter does not fit the plain base; save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    return config


def lora_places(
    model: PreTrainedModel,
    config: PeftLora,
    tensors: Mapping[str, Tensor],
    columns: Mapping[str, Columns | None],
) -> list[Place]:
    """Return where the files put pairs.

    Args:
        model: the base model.
        config: what its adapter_config.json says.
        tensors: PEFT's names and values.
        columns: for modules of which it adapts certain output columns only, which.

    Raises:
        AdapterError: it targets nothing of this model.
    """
    if config.target_parameters and config.target_modules == []:
        return []
    return [
        Place(
            path,
            *linear_features(path, module),
            by_pattern(config.rank_pattern or {}, path, config.r),
            by_pattern(config.alpha_pattern or {}, path, config.lora_alpha),
            columns.get(path),
        )
        for path, module in adapted_modules(config, tensors, "lora_A.weight", model).items()
    ]


def read_lora(
    model: PreTrainedModel,
    config: PeftLora,
    tensors: Mapping[str, Tensor],
    places: Sequence[Place],
    *,
    with_start: bool = False,
) -> LoraFiles:
    """Fit a LoRA's `tensors` to `model`, which is not touched.

    Args:
        model: the base model, perhaps with other adapters on it.
        config: what its adapter_config.json says.
        tensors: PEFT's names and values.
        places: where the pairs go.
        with_start: the pairs are written with their start, at twice the rank of their place.

    Raises:
        AdapterError: names or shapes do not fit; the first that does not is named.
    """
    experts = [place for place in places if isinstance(place, ExpertPlace)]
    linear = [place for place in places if not isinstance(place, ExpertPlace)]
    adapted = {place.module for place in linear}
    with_bias = modules_with_bias(model) if config.bias == "all" else []
    expected = dict(expected_experts(experts))
    for place in linear:
        owner, rank = f"{PREFIX}{place.module}", place.rank * (2 if with_start else 1)
        expected[f"{owner}.lora_A.weight"] = torch.Size((rank, place.in_features))
        expected[f"{owner}.lora_B.weight"] = torch.Size((place.out_features, rank))
        if config.use_dora:
            expected[f"{owner}.lora_magnitude_vector"] = torch.Size((place.out_features,))
    names = {path: _bias_name(path, adapted) for path in with_bias}
    expected |= {n: model.get_parameter(f"{path}.bias").shape for path, n in names.items()}
    check_against(expected, without_base(tensors, model))
    return LoraFiles(
        config,
        list(places),
        {place.module: _pair(place, tensors) for place in linear}
        | {path: Pair(A, B) for path, A, B in expert_values(experts, tensors)},
        {path: tensors[name] for path, name in names.items()},
    )


def _bias_name(path: str, adapted: Container[str]) -> str:
    """Return PEFT's name of a bias: it wraps adapted modules, so theirs lies one level deeper."""
    return f"{PREFIX}{path}.base_layer.bias" if path in adapted else f"{PREFIX}{path}.bias"


def _pair(place: Place, tensors: Mapping[str, Tensor]) -> Pair:
    """Return the values of `place` out of PEFT's tensors, cut to the columns it reaches.

    Raises:
        AdapterError: B is not zero in the other columns.
    """
    owner = f"{PREFIX}{place.module}"
    m = tensors.get(f"{owner}.lora_magnitude_vector")
    index = place.column_index()
    return Pair(
        tensors[f"{owner}.lora_A.weight"],
        reached_rows(place, tensors[f"{owner}.lora_B.weight"], "lora_B"),
        m if m is None or index is None else m[index],
    )
