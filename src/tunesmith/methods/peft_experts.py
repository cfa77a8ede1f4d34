"""LoRA on fused experts in PEFT's own layout, `target_parameters`.

PEFT keeps one A (experts * rank, in) and one B (out, rank * experts) a weight; in B the experts are
the inner index. It wraps the module once for every weight that it adapts, in the order of the
module's parameters, so all but the last lie one `base_layer` deeper.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.errors import AdapterError
from tunesmith.methods.child import base_parameters
from tunesmith.methods.experts import ExpertPair, ExpertPlace
from tunesmith.methods.peft_format import PREFIX, reached_rows, spread_rows
from tunesmith.methods.peft_targets import by_pattern, short_names
from tunesmith.methods.tensors import whole
from tunesmith.models.experts import MAPS

if TYPE_CHECKING:
    from tunesmith.methods.peft_lora import PeftLora
    from tunesmith.models.family import Columns
    from tunesmith.models.sites import Sites


def expert_tensors(pairs: Mapping[str, ExpertPair]) -> dict[str, Tensor]:
    """Return `pairs`, by the full name of their weight, by PEFT's names."""
    places = [pair.place for pair in pairs.values()]
    tensors = {}
    for pair in pairs.values():
        owner = _owner(pair.place, places)
        tensors[f"{owner}.lora_A.weight"] = whole(pair.A).flatten(0, 1)
        by_column = whole(pair.B).permute(1, 2, 0).flatten(1)
        tensors[f"{owner}.lora_B.weight"] = spread_rows(pair.place, by_column)
    return tensors


def expert_settings(model: nn.Module, pairs: Collection[str]) -> dict[str, Any]:
    """Return the keys of PEFT's configuration that are of experts, for weights of these names."""
    if not pairs:
        return {}
    # PEFT refuses a dropout beside experts, because it forms their whole weights; the finished
    # adapter computes the same without.
    return {"target_parameters": short_names(pairs, base_parameters(model)), "lora_dropout": 0.0}


def peft_expert_places(
    sites: Sites,
    config: PeftLora,
    columns: Mapping[str, Columns | None],
    model: nn.Module,
) -> list[ExpertPlace]:
    """Return where the files put pairs in experts.

    Args:
        sites: the model's map.
        config: what adapter_config.json says.
        columns: for weights, by full name, of which it adapts certain output columns only, which.
        model: the base model.

    Raises:
        AdapterError: it targets a parameter that is no weight of experts.
    """
    targets = config.target_parameters or []
    weights = dict.fromkeys(
        (site.module, site.parameter)
        for block in sites.blocks
        for site in block.sites
        if site.kind == "experts"
    )
    paths = {f"{module}.{parameter}": (module, parameter) for module, parameter in weights}
    for target in targets:
        if not any(_names(target, path) for path in paths):
            raise AdapterError(
                f"target_parameters {target!r} of adapter_config.json is no weight of experts in "
                f"this {sites.model_type}; the adapter belongs to another model"
            )
    places = []
    for path, (module, parameter) in paths.items():
        if any(_names(target, path) for target in targets):
            count, out_features, in_features = model.get_parameter(path).shape
            rank = by_pattern(config.rank_pattern or {}, path, config.r)
            alpha = by_pattern(config.alpha_pattern or {}, path, config.lora_alpha)
            places.append(
                ExpertPlace(
                    module,
                    in_features,
                    out_features,
                    rank,
                    alpha,
                    columns.get(path),
                    parameter,
                    count,
                )
            )
    return places


def _names(target: str, path: str) -> bool:
    return path == target or path.endswith(f".{target}")


def expected_experts(places: Sequence[ExpertPlace]) -> Iterator[tuple[str, torch.Size]]:
    """Yield name and shape of each tensor that PEFT writes for `places`."""
    for place in places:
        owner, inner = _owner(place, places), place.num_experts * place.rank
        yield f"{owner}.lora_A.weight", torch.Size((inner, place.in_features))
        yield f"{owner}.lora_B.weight", torch.Size((place.out_features, inner))


def expert_values(
    places: Sequence[ExpertPlace], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield for each of `places` the weight's full name, A (experts, rank, in) and B.

    B is (experts, reached, rank). Shapes are checked before.

    Raises:
        AdapterError: B is not zero in columns that are not reached.
    """
    for place in places:
        owner, count, rank = _owner(place, places), place.num_experts, place.rank
        A = tensors[f"{owner}.lora_A.weight"].reshape(count, rank, place.in_features)
        B = reached_rows(place, tensors[f"{owner}.lora_B.weight"], "lora_B")
        yield place.path, A, B.reshape(place.reached, rank, count).permute(2, 0, 1)


def _owner(place: ExpertPlace, places: Sequence[ExpertPlace]) -> str:
    """Return PEFT's name of what wraps the weight of `place`."""
    after = MAPS[MAPS.index(place.parameter) + 1 :]
    around = [x for x in places if x.module == place.module and x.parameter in after]
    return f"{PREFIX}{place.module}" + ".base_layer" * len(around)
