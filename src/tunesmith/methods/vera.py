"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2024, arXiv:2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tunesmith.errors import AdapterError
from tunesmith.methods.child import Child, base_modules, require_free
from tunesmith.methods.contract import Method, PeftFiles
from tunesmith.methods.mergeable import Mergeable, MergeableAttachment
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
from tunesmith.methods.peft_targets import short_names
from tunesmith.methods.places import (
    Place,
    linear_features,
    places_of,
    spread,
    targeted_columns,
    touched_sites,
)
from tunesmith.methods.tensors import check_against, copy_into, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.contract import Attachment
    from tunesmith.models.sites import Sites


class VeRA(Method):
    """Train two vectors a layer that scale shared random matrices: h = W x + b * B (d * A x)."""

    default_learning_rate: ClassVar[float] = 2e-2
    peft_type: ClassVar[str | None] = "VERA"

    name: Literal["vera"] = "vera"
    """Shared random low-rank matrices, scaled by two trained vectors a layer."""
    rank: int = Field(default=256, ge=1)
    """r, the rows of A: r + out parameters a layer, so that it can be large."""
    d_initial: float = 0.1
    """Start of every element of d; 0.1 or 1e-7 were best in the paper's table 6. b starts at 0."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an element of the update's input while training."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all"] = "all"
    """Sites to adapt; all is every linear map in the blocks, without head and embedding."""
    seed: int = Field(default=0, ge=0)
    """Decides A and B, which are not stored."""

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> VeraAttachment:
        """Hang vectors at every targeted linear map, and A and B at the model itself.

        Raises:
            MethodError: a target is no site, or the name is taken.
        """
        places = places_of(model, sites, self.targets, rank=self.rank, alpha=1.0)
        return attach_vectors(model, places, self, name=name)

    @classmethod
    def attach_peft(
        cls,
        files: PeftFiles,
        model: PreTrainedModel,
        sites: Sites,
        *,
        recorded: Method | None,
        name: str,
    ) -> tuple[Method, Attachment]:
        """Attach a VeRA that PEFT's files describe; see `Method.attach_peft`."""
        config = read_peft_config(
            files, PeftVera, without_effect={"init_weights", "d_initial"}, plain="VeRA"
        )
        if config.bias != "none":
            raise AdapterError(f"{files.file}: bias {config.bias!r} cannot be read, only none can")
        targets = recorded.targets if isinstance(recorded, VeRA) else None
        columns = targeted_columns(model, sites, targets) if targets is not None else {}
        adapted = adapted_modules(config, files.tensors, "vera_lambda_d", model)
        places = [
            Place(path, *linear_features(path, module), config.r, 1.0, columns.get(path))
            for path, module in adapted.items()
        ]
        values = _read(files.tensors, places, model, with_projections=config.save_projection)
        method = recorded
        if not isinstance(method, VeRA):
            method = cls(
                rank=config.r,
                dropout=config.vera_dropout,
                targets=touched_sites(sites, adapted) or "all",
                seed=config.projection_prng_key,
            )
        attachment = attach_vectors(model, places, method, name=name)
        attachment.load_values(values)
        return method, attachment


class PeftVera(PeftTargets):
    """What is read of PEFT's VeraConfig."""

    r: int = Field(default=256, ge=1)
    vera_dropout: float = Field(default=0.0, ge=0, lt=1)
    projection_prng_key: int = 0
    save_projection: bool = True
    bias: str = "none"


@dataclass(frozen=True)
class VeraValues:
    """What PEFT's tensors hold."""

    vectors: dict[str, tuple[Tensor, Tensor]]
    """d (rank,) and b (reached,) by the path of their module."""
    projections: tuple[Tensor, Tensor] | None
    """A (rank, widest in) and B (widest out, rank) where they were stored."""


def _read(
    tensors: Mapping[str, Tensor],
    places: list[Place],
    model: PreTrainedModel,
    *,
    with_projections: bool,
) -> VeraValues:
    """Return the values at `places`, found to fit; raise AdapterError where they do not."""
    rank, widest_in, widest_out = _widest(places)
    expected = {}
    for place in places:
        expected[f"{PREFIX}{place.module}.vera_lambda_d"] = torch.Size((rank,))
        expected[f"{PREFIX}{place.module}.vera_lambda_b"] = torch.Size((place.out_features,))
    if with_projections:
        expected["base_model.vera_A"] = torch.Size((rank, widest_in))
        expected["base_model.vera_B"] = torch.Size((widest_out, rank))
    check_against(expected, without_base(tensors, model))
    vectors = {}
    for place in places:
        owner = f"{PREFIX}{place.module}"
        b = reached_rows(place, tensors[f"{owner}.vera_lambda_b"], "vera_lambda_b")
        vectors[place.module] = (tensors[f"{owner}.vera_lambda_d"], b)
    if not with_projections:
        return VeraValues(vectors, None)
    return VeraValues(vectors, (tensors["base_model.vera_A"], tensors["base_model.vera_B"]))


def _widest(places: Iterable[Place]) -> tuple[int, int, int]:
    """Return the rank, and the largest input and output width of all places."""
    places = list(places)
    widest_in = max(place.in_features for place in places)
    return places[0].rank, widest_in, max(place.out_features for place in places)


def attach_vectors(
    model: nn.Module, places: list[Place], method: VeRA, *, name: str
) -> VeraAttachment:
    """Hang d and b at each of `places`, and what they share at the model itself.

    Raises:
        MethodError: the name is taken.
    """
    require_free(model, "", f"vera_{name}", name)
    shared = Projections(*_widest(places), seed=method.seed)
    vectors = {}
    for place in places:
        require_free(model, place.module, f"vera_{name}", name)
        device = model.get_parameter(f"{place.module}.weight").device
        # All on one device in most runs, so this moves once.
        shared.to(device)
        vectors[f"{place.module}.vera_{name}"] = ScaledProjection(place, shared, method).to(device)
    return VeraAttachment(model, vectors, method, shared=shared, shared_name=f"vera_{name}")


class Projections(Child):
    """The frozen A (rank, widest in) and B (widest out, rank) that all layers cut theirs from.

    Uniform with bound sqrt(6 / fan in), from a generator of their own: the same on every machine,
    and PEFT's for the same seed. This hangs at the model, which it does not change.
    """

    A: Tensor
    B: Tensor

    def __init__(self, rank: int, widest_in: int, widest_out: int, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        A, B = torch.empty(rank, widest_in), torch.empty(widest_out, rank)
        for matrix in (A, B):
            bound = math.sqrt(6 / matrix.shape[1])
            matrix.uniform_(-bound, bound, generator=generator)
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.from_seed = True
        """Whether A and B need not be stored."""

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output`: this only holds what others use."""
        return output

    def replace(self, A: Tensor, B: Tensor) -> None:
        """Take over stored matrices."""
        self.from_seed = torch.equal(whole(self.A), A) and torch.equal(whole(self.B), B)
        self.A.copy_(A)
        self.B.copy_(B)


class ScaledProjection(Mergeable):
    """h = W x + b * (B (d * (A x))) (Kopiczko et al. 2024, eq. 2).

    d (rank,) and b (reached,) are float32. Where a layer is narrower than the widest, it takes the
    first columns of A and the first rows of B.
    """

    columns: Tensor | None

    def __init__(self, place: Place, shared: Projections, method: VeRA) -> None:
        super().__init__()
        self.place = place
        self.dropout = method.dropout
        # In a tuple, so that the one module that all share is not a child of each.
        self._shared = (shared,)
        self.d = nn.Parameter(torch.full((place.rank,), method.d_initial, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(place.reached, dtype=torch.float32))
        self.register_buffer("columns", place.column_index(), persistent=False)

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return this layer's A (rank, in) and B (out, rank), and b over all columns (out,)."""
        shared = self._shared[0]
        A = shared.A[:, : self.place.in_features].to(self.d.device)
        B = shared.B[: self.place.out_features].to(self.d.device)
        return A, B, spread(self.b, self.columns, self.place.out_features)

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output` (..., out) + b * (B (d * (A x))) for x (..., in), in x's dtype."""
        x = F.dropout(args[0], self.dropout, self.training)
        A, B, b = self._matrices()
        inner = F.linear(x, A.to(x.dtype)) * self.d.to(x.dtype)
        return output + (F.linear(inner, B.to(x.dtype)) * b.to(x.dtype)).to(output.dtype)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return W + diag(b) B diag(d) A for W (out, in)."""
        A, B, b = self._matrices()
        return weight + (b[:, None] * B) @ (self.d[:, None] * A)


class VeraAttachment(MergeableAttachment):
    """Vectors at many layers, and the two matrices they share."""

    title: ClassVar[str] = "VeRA"

    def __init__(
        self,
        model: nn.Module,
        vectors: dict[str, ScaledProjection],
        method: VeRA,
        *,
        shared: Projections,
        shared_name: str,
    ) -> None:
        super().__init__(model, {shared_name: shared, **vectors})
        self.vectors = {path.rpartition(".")[0]: child for path, child in vectors.items()}
        self.shared = shared
        self._method = method

    def merged_values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights with the update in them."""
        return self.merged_weights(self.vectors)

    def load_values(self, values: VeraValues) -> None:
        """Take over d and b, and A and B where they were stored; shapes are checked before."""
        for path, (d, b) in values.vectors.items():
            copy_into(self.vectors[path].d, d)
            copy_into(self.vectors[path].b, b)
        if values.projections is not None:
            self.shared.replace(*values.projections)

    def export_peft(self) -> PeftFiles:
        """Return the adapter as PEFT writes VeRA; A and B only where no seed gives them."""
        tensors = {}
        for path, child in self.vectors.items():
            tensors[f"{PREFIX}{path}.vera_lambda_d"] = whole(child.d)
            tensors[f"{PREFIX}{path}.vera_lambda_b"] = spread_rows(child.place, whole(child.b))
        if not self.shared.from_seed:
            tensors["base_model.vera_A"] = whole(self.shared.A)
            tensors["base_model.vera_B"] = whole(self.shared.B)
        model, method = self.model, self._method
        config = common_config(model, "VERA") | {
            "r": method.rank,
            "d_initial": method.d_initial,
            "vera_dropout": method.dropout,
            "projection_prng_key": method.seed,
            "save_projection": not self.shared.from_seed,
            "bias": "none",
            "fan_in_fan_out": stored_transposed(model, self.vectors),
            "init_weights": True,
            "target_modules": short_names(self.vectors, [path for path, _ in base_modules(model)]),
        }
        return PeftFiles(config, tensors)
