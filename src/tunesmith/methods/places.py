"""Where a method acts on a linear map: which module, which of its output columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import MethodError
from tunesmith.models.family import Columns
from tunesmith.models.quantize import dequantised, is_quantised

if TYPE_CHECKING:
    from tunesmith.models.sites import Site, Sites


@dataclass(frozen=True)
class Place:
    """One linear map that gets a pair B A."""

    module: str
    """Path of the nn.Linear or Conv1D in the model."""
    in_features: int
    out_features: int
    rank: int
    alpha: float
    columns: Columns | None = None
    """Output columns the pair acts on; None is all of them."""

    @property
    def reached(self) -> int:
        """How many output columns the pair acts on: the rows of B."""
        if self.columns is None:
            return self.out_features
        return sum(stop - start for start, stop in self.columns)

    def column_index(self) -> Tensor | None:
        """Return the columns as indices (reached,) int64, or None for all."""
        return column_index(self.columns)


def column_index(columns: Columns | None) -> Tensor | None:
    """Return output columns as indices (reached,) int64, or None for all."""
    if columns is None:
        return None
    return torch.cat([torch.arange(start, stop) for start, stop in columns])


def places_of(
    model: nn.Module,
    sites: Sites,
    targets: list[str] | Literal["all"],
    *,
    rank: int,
    alpha: float,
    leave_experts: bool = False,
) -> list[Place]:
    """Return one place a targeted linear map, over the columns of the targeted sites.

    Raises:
        MethodError: a target is no site, or is no linear map.
    """
    targeted = targeted_columns(model, sites, targets, leave_experts=leave_experts)
    return [
        Place(path, *linear_features(path, model.get_submodule(path)), rank, alpha, columns)
        for path, columns in targeted.items()
    ]


def targeted_columns(
    model: nn.Module,
    sites: Sites,
    targets: list[str] | Literal["all"],
    *,
    leave_experts: bool = False,
) -> dict[str, Columns | None]:
    """Return the targeted linear maps by path, with the output columns that `targets` mean in each.

    Args:
        model: the base model.
        sites: its map.
        targets: names of sites; all leaves fused experts out, which are no linear maps.
        leave_experts: leave them out where they are named too, for methods that see to them.

    Raises:
        MethodError: a target is no site, or is one of fused experts.
    """
    by_module: defaultdict[str, list[Site]] = defaultdict(list)
    for site in sites.select(targets):
        if site.kind != "experts":
            by_module[site.module].append(site)
        elif targets != "all" and not leave_experts:
            raise MethodError(
                f"method.targets: {site.name} of this {sites.model_type} is a weight of "
                f"{site.num_experts} fused experts ({site.module}.{site.parameter}) and no linear "
                "map: lora acts there, and ia3 on the input of mlp.down; leave it out or use lora"
            )
    return {
        path: union_of_columns(together, linear_features(path, model.get_submodule(path))[1])
        for path, together in by_module.items()
    }


def union_of_columns(sites: Iterable[Site], out_features: int) -> Columns | None:
    """Return the columns of all `sites` of one module in order, or None where that is every one."""
    ranges: list[tuple[int, int]] = []
    for site in sites:
        if site.columns is None:
            return None
        ranges.extend(site.columns)
    if sum(stop - start for start, stop in ranges) == out_features:
        return None
    return tuple(sorted(ranges))


def touched_sites(sites: Sites, modules: Iterable[str]) -> list[str]:
    """Return the names of the sites that the modules at these paths hold, sorted."""
    paths = set(modules)
    return sorted({s.name for block in sites.blocks for s in block.sites if s.module in paths})


def linear_features(path: str, module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of the linear map `module`, found at `path`.

    Raises:
        MethodError: it is not a linear map.
    """
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    raise MethodError(
        f"{path} is a {type(module).__name__} and not a linear map: no place for LoRA"
    )


def linear_weight(module: nn.Module) -> Tensor:
    """Return the weight (out, in) of a linear map, however it stores it.

    It is a view, but for a quantised weight, whose values are worked out anew, in float32.
    """
    if is_quantised(module):
        return dequantised(module)
    weight: Tensor = module.weight  # type: ignore[assignment]  # a linear map has one
    return stored_as(module, weight)


def stored_as(module: nn.Module, weight: Tensor) -> Tensor:
    """Return `weight` turned between (out, in) and how the linear map `module` stores it."""
    return weight.t() if isinstance(module, Conv1D) else weight


def spread(rows: Tensor, columns: Tensor | None, out_features: int) -> Tensor:
    """Return `rows` (reached, ...) over all output columns (out, ...), zero in the others.

    Args:
        rows: one row an output column that is reached.
        columns: which those are, (reached,) int64; None is all.
        out_features: how many there are in all.
    """
    if columns is None:
        return rows
    return rows.new_zeros(out_features, *rows.shape[1:]).index_copy(0, columns, rows)


def require_rank(place: Place, *, key: str = "rank") -> None:
    """Check that the rank does not exceed what the layer could need.

    Raises:
        MethodError: it does.
    """
    most = min(place.in_features, place.reached)
    if place.rank > most:
        raise MethodError(
            f"method.{key}: {place.rank} is larger than the smaller side of {place.module} "
            f"({place.reached} x {place.in_features}); use at most {most}"
        )
