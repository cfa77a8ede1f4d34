"""What hangs in a mixture's experts: a child of the experts module, with a part for each weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.methods.child import Child, require_free
from tunesmith.methods.places import Place, column_index, union_of_columns
from tunesmith.models.experts import MAPS, ExtraExperts, Rows, require_routed

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from tunesmith.models.sites import Site, Sites

ALIGNED: Final = 8
"""Products of groups want rows of whole 16 bytes, so ranks are filled up with zeros to this."""


@dataclass(frozen=True)
class ExpertPlace(Place):
    """One weight of all experts of a block that gets a pair B A for each of them."""

    parameter: str = "weight"
    """Name of the weight (experts, out, in) in its module."""
    num_experts: int = 1

    @property
    def path(self) -> str:
        """The weight's full name in the model."""
        return f"{self.module}.{self.parameter}"


def expert_places(
    model: nn.Module, sites: Sites, targets: list[str] | Literal["all"], *, rank: int, alpha: float
) -> list[ExpertPlace]:
    """Return one place a targeted weight of experts, over the columns of the targeted sites."""
    by_weight: defaultdict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in sites.select(targets):
        if site.kind == "experts":
            by_weight[site.module, site.parameter].append(site)
    places = []
    for (module, parameter), together in by_weight.items():
        count, width, in_features = model.get_parameter(f"{module}.{parameter}").shape
        columns = union_of_columns(together, width)
        places.append(
            ExpertPlace(module, in_features, width, rank, alpha, columns, parameter, count)
        )
    return places


class ExpertPart(nn.Module, ABC):
    """What acts at one weight (experts, out, in)."""

    def before(self, x: Tensor, rows: Rows) -> Tensor:
        """Return what goes into the map in the place of x (rows, in)."""
        del rows
        return x

    def after(self, x: Tensor, output: Tensor, rows: Rows) -> Tensor:
        """Return what the map gives for x (rows, in) in the place of `output` (rows, out)."""
        del x, rows
        return output

    @abstractmethod
    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight (experts, out, in), float32, that does alone what `weight` and this."""


class ExpertPair(ExpertPart):
    """y = W_e x + s B_e A_e x for every expert e: LoRA (Hu et al. 2021) on each.

    A is (experts, rank, in), B is (experts, reached columns, rank), both float32; B starts at zero.
    W_e + s B_e A_e is never formed, so a step costs what its tokens cost, not what all experts do.

    Args:
        place: the weight and the pairs' size.
        rslora: s = alpha / sqrt(r), else alpha / r.
        dropout: probability of dropping an element of x on its way into A.
        gaussian: A starts normal with deviation 1 / rank, else uniform with bound 1 / sqrt(in).
        freeze_a: A does not train.
    """

    A: Tensor
    columns: Tensor | None

    def __init__(
        self,
        place: ExpertPlace,
        *,
        rslora: bool,
        dropout: float,
        gaussian: bool,
        freeze_a: bool,
    ) -> None:
        super().__init__()
        self.place = place
        self.scale = place.alpha / (math.sqrt(place.rank) if rslora else place.rank)
        self.dropout = dropout
        A = torch.empty(place.num_experts, place.rank, place.in_features, dtype=torch.float32)
        if gaussian:
            nn.init.normal_(A, std=1 / place.rank)
        else:
            bound = 1 / math.sqrt(place.in_features)
            nn.init.uniform_(A, -bound, bound)
        if freeze_a:
            self.register_buffer("A", A, persistent=False)
        else:
            self.A = nn.Parameter(A)
        B = torch.zeros(place.num_experts, place.reached, place.rank, dtype=torch.float32)
        self.B = nn.Parameter(B)
        self.register_buffer("columns", column_index(place.columns), persistent=False)

    def spread(self, B: Tensor) -> Tensor:
        """Return `B` (experts, reached, ...) over all output columns, zero in the others."""
        if self.columns is None:
            return B
        shape = (B.shape[0], self.place.out_features, *B.shape[2:])
        return B.new_zeros(shape).index_copy(1, self.columns, B)

    def after(self, x: Tensor, output: Tensor, rows: Rows) -> Tensor:
        """Return `output` (rows, out) + s B_e A_e x for x (rows, in), in output's dtype."""
        missing = -self.place.rank % ALIGNED
        A = F.pad(self.A.to(x.dtype), (0, 0, 0, missing))
        B = F.pad(self.spread(self.B).to(x.dtype), (0, missing))
        h = rows.linear(F.dropout(x, self.dropout, self.training), A) * self.scale
        return output + rows.linear(h, B).to(output.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return s B_e A_e (experts, out, in) in float32."""
        return self.scale * (self.spread(self.B) @ self.A)

    def merged(self, weight: Tensor) -> Tensor:
        """Return W_e + s B_e A_e for W (experts, out, in), float32."""
        return weight + self.delta()


class ExpertInputScale(ExpertPart):
    """y = W_e (l_e * x) for every expert e: IA3 (Liu et al. 2022) on each one's own activation.

    Args:
        num_experts: how many there are.
        in_features: width of x.
    """

    def __init__(self, num_experts: int, in_features: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(num_experts, in_features, dtype=torch.float32))

    def before(self, x: Tensor, rows: Rows) -> Tensor:
        """Return l_e * x for x (rows, in), in its dtype."""
        # As x + (l - 1) * x, for the reason that `ia3.rescale` has.
        return x + x * rows.own(self.l - 1).to(x.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """Return W_e diag(l_e) for W (experts, out, in)."""
        return weight * self.l[:, None]


class InExperts(Child, ExtraExperts):
    """What one adapter adds to the experts of one module.

    Args:
        parts: by the name of the weight that each acts at.
    """

    adds_to: ClassVar[tuple[str, ...]] = MAPS

    def __init__(self, parts: Mapping[str, ExpertPart]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.parts = dict(parts)

    def register_on(self, parent: nn.Module) -> RemovableHandle:
        """Register the hook that sees that the parts act."""
        return parent.register_forward_pre_hook(self.check)

    def check(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise MethodError where the experts would not ask the parts."""
        if self.enabled:
            require_routed(module)

    def before(self, name: str, x: Tensor, rows: Rows) -> Tensor:
        """Return what goes into the map `name` in the place of x (rows, in)."""
        part = self.parts.get(name)
        return x if part is None else part.before(x, rows)

    def after(self, name: str, x: Tensor, output: Tensor, rows: Rows) -> Tensor:
        """Return what the map `name` gives for x (rows, in) in the place of `output`."""
        part = self.parts.get(name)
        return output if part is None else part.after(x, output, rows)


class AddedInExperts(InExperts):
    """Pairs, which add to the experts' maps."""

    turn: ClassVar[int] = 1


class ScalesInExperts(InExperts):
    """Factors, which rescale the experts' maps with what was added."""

    turn: ClassVar[int] = 2


def in_experts(
    kind: type[InExperts],
    model: nn.Module,
    parts: Mapping[tuple[str, str], ExpertPart],
    *,
    attribute: str,
    name: str,
) -> dict[str, InExperts]:
    """Return the children that hold `parts`, by full path.

    Args:
        kind: of the children.
        model: the base model.
        parts: by path of the experts module and name of the weight.
        attribute: what the children are called.
        name: the adapter's name, for errors.

    Raises:
        MethodError: the attribute is taken.
    """
    by_module: defaultdict[str, dict[str, ExpertPart]] = defaultdict(dict)
    for (module, parameter), part in parts.items():
        by_module[module][parameter] = part
    children = {}
    for module, of_module in by_module.items():
        require_free(model, module, attribute, name)
        device = next(model.get_submodule(module).parameters()).device
        children[f"{module}.{attribute}"] = kind(of_module).to(device)
    return children


def merged_experts(
    model: nn.Module, children: Mapping[str, InExperts]
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and merged value of every weight that `children`, by path, act at."""
    for path, child in children.items():
        module = path.rpartition(".")[0]
        for name, part in child.parts.items():
            full = f"{module}.{name}"
            yield full, part.merged(model.get_parameter(full).float())
