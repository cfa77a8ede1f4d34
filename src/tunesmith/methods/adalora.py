"""AdaLoRA: low-rank updates whose ranks go where they matter (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.methods.child import require_free
from tunesmith.methods.contract import Method, PeftFiles
from tunesmith.methods.mergeable import Mergeable, MergeableAttachment
from tunesmith.methods.peft_adalora import (
    Triplet,
    adalora_places,
    read_adalora,
    read_adalora_config,
    write_adalora,
)
from tunesmith.methods.places import (
    Place,
    places_of,
    require_rank,
    spread,
    targeted_columns,
    touched_sites,
)
from tunesmith.methods.rank_allocation import Importance, Schedule, full, keep_best
from tunesmith.methods.tensors import copy_into, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.contract import Attachment
    from tunesmith.models.sites import Sites
    from tunesmith.types import JSON


class AdaLoRA(Method):
    """Train P L Q beside frozen linear maps, and drop the singular values that matter least."""

    default_learning_rate: ClassVar[float] = 8e-3
    peft_type: ClassVar[str | None] = "ADALORA"

    name: Literal["adalora"] = "adalora"
    """Low-rank adaptation that spends a budget of ranks where it helps most."""
    rank: int = Field(default=12, ge=1)
    """Rank of every update at the start; 1.5 times target_rank in the paper."""
    target_rank: int = Field(default=8, ge=1)
    """Mean rank at the end."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength of the update, which is scaled by alpha / rank. None takes 2 x rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an element of the update's input while training."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all"] = "all"
    """Sites to adapt; all is every linear map in the blocks, without head and embedding."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """t_i as a share of all steps: before it nothing is dropped."""
    final_share: float = Field(default=0.5, ge=0, lt=1)
    """t_f as a share of all steps: at the end the choice is frozen and what is left is tuned."""
    interval: int = Field(default=10, ge=1)
    """Delta_T, the steps between two choices."""
    beta1: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing of the sensitivity."""
    beta2: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing of the uncertainty."""
    orthogonality: float = Field(default=0.5, ge=0)
    """gamma, the weight of the penalty that keeps P and Q orthogonal."""

    @model_validator(mode="after")
    def _leaves_steps_to_choose(self) -> Self:
        """Refuse settings under which nothing could be dropped."""
        if self.target_rank > self.rank:
            raise ValueError(
                f"target_rank: {self.target_rank} is above rank {self.rank}, and ranks only shrink"
            )
        if self.warmup_share + self.final_share >= 1:
            raise ValueError("warmup_share and final_share leave no step to choose; lower one")
        return self

    @property
    def scale(self) -> float:
        """What P L Q is multiplied by: alpha over the rank at the start, whatever is left of it."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> AdaLoraAttachment:
        """Hang a triplet at every targeted linear map of `model`.

        Raises:
            MethodError: the rank exceeds a layer, a target is no site, or the name is taken.
        """
        alpha = self.scale * self.rank
        places = places_of(model, sites, self.targets, rank=self.rank, alpha=alpha)
        for place in places:
            require_rank(place)
        return attach_triplets(model, places, self, name=name)

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
        """Attach an AdaLoRA that PEFT's files describe; see `Method.attach_peft`."""
        config = read_adalora_config(files)
        targets = recorded.targets if isinstance(recorded, AdaLoRA) else None
        columns = targeted_columns(model, sites, targets) if targets is not None else {}
        places = adalora_places(model, config, files.tensors, columns)
        values = read_adalora(model, files.tensors, places)
        method = recorded
        if not isinstance(method, AdaLoRA):
            method = cls(
                rank=config.init_r,
                target_rank=min(config.target_r, config.init_r),
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                targets=touched_sites(sites, (place.module for place in places)) or "all",
                orthogonality=config.orth_reg_weight,
                beta1=config.beta1,
                beta2=config.beta2,
                interval=config.deltaT,
            )
        attachment = attach_triplets(model, places, method, name=name)
        attachment.load_values(values)
        return method, attachment


def attach_triplets(
    model: nn.Module, places: Sequence[Place], method: AdaLoRA, *, name: str
) -> AdaLoraAttachment:
    """Hang a fresh triplet at each of `places`.

    Raises:
        MethodError: the name is taken.
    """
    triplets = {}
    for place in places:
        require_free(model, place.module, f"adalora_{name}", name)
        device = model.get_parameter(f"{place.module}.weight").device
        triplet = SingularTriplets(place, scale=method.scale, dropout=method.dropout)
        triplets[f"{place.module}.adalora_{name}"] = triplet.to(device)
    return AdaLoraAttachment(model, triplets, method)


class SingularTriplets(Mergeable):
    """h = W x + s P L Q x (Zhang et al. 2023, arXiv:2303.10512, eq. 3).

    P (reached, rank) and Q (rank, in) are kept nearly orthogonal by a penalty, L (rank,) holds the
    singular values, which start at zero. All are float32; P and Q start normal with deviation 0.02,
    as in the authors' code.
    """

    by_row: ClassVar[bool] = True

    columns: Tensor | None

    def __init__(self, place: Place, *, scale: float, dropout: float) -> None:
        super().__init__()
        self.place = place
        self.scale = scale
        self.dropout = dropout
        self.P = nn.Parameter(0.02 * torch.randn(place.reached, place.rank))
        self.L = nn.Parameter(torch.zeros(place.rank))
        self.Q = nn.Parameter(0.02 * torch.randn(place.rank, place.in_features))
        self.register_buffer("columns", place.column_index(), persistent=False)

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output` (..., out) + s P L Q x for x (..., in), in x's dtype."""
        x = F.dropout(args[0], self.dropout, self.training)
        P = spread(self.P, self.columns, self.place.out_features)
        h = F.linear(x, self.Q.to(x.dtype)) * (self.scale * self.L).to(x.dtype)
        return output + F.linear(h, P.to(x.dtype)).to(output.dtype)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return W + s P L Q for W (out, in)."""
        P = spread(self.P, self.columns, self.place.out_features)
        return weight + (P * (self.scale * self.L)) @ self.Q

    def orthogonality(self) -> Tensor:
        """Return |P^T P - I| + |Q Q^T - I|, Frobenius norms (eq. 4, unsquared as in the code)."""
        P, Q = full(self.P), full(self.Q)
        one = torch.eye(self.place.rank, device=P.device)
        return torch.linalg.norm(P.T @ P - one) + torch.linalg.norm(Q @ Q.T - one)


class AdaLoraAttachment(MergeableAttachment):
    """Triplets on one model, and the choice which of their singular values stay."""

    title: ClassVar[str] = "AdaLoRA"

    def __init__(
        self, model: nn.Module, triplets: dict[str, SingularTriplets], method: AdaLoRA
    ) -> None:
        super().__init__(model, triplets)
        self.triplets = {path.rpartition(".")[0]: child for path, child in triplets.items()}
        self._method = method
        self._importance = Importance(method.beta1, method.beta2)
        self._kept: dict[str, Tensor] = {}
        """Which singular values the last choice kept, (rank,) bool by the path of the module."""

    def merged_values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights with the update in them."""
        return self.merged_weights(self.triplets)

    def penalty(self) -> Tensor | None:
        """Return gamma times the mean distance of all P and Q from orthogonal ones."""
        if not self.enabled or self._method.orthogonality == 0:
            return None
        distances = [triplets.orthogonality() for triplets in self.triplets.values()]
        return self._method.orthogonality * torch.stack(distances).sum() / (2 * len(distances))

    def schedule(self, total: int) -> Schedule:
        """Return the budget over `total` steps."""
        method = self._method
        return Schedule(
            warmup=round(method.warmup_share * total),
            final=round(method.final_share * total),
            interval=method.interval,
            start=sum(triplets.place.rank for triplets in self.triplets.values()),
            target=method.target_rank * len(self.triplets),
        )

    def on_step(self, step: int, total: int) -> None:
        """Weigh the singular values by the gradients of this step, and drop what must go."""
        schedule = self.schedule(total)
        end = total - schedule.final
        if step < end or (step == end and not self._importance.sensitivity):
            for name, parameter in self.trainable().items():
                self._importance.update(name, parameter)
        budget = schedule.budget(step, total)
        if budget is not None:
            self._kept = keep_best(self._scores(), budget)
        if step >= end:
            self._importance.clear()
        if budget is not None or step > end:
            self._drop()

    def _scores(self) -> dict[str, Tensor]:
        """Return S = s(L) + mean s(P) + mean s(Q) of each triplet (eq. 7), (rank,) by path."""
        score = self._importance.score
        leaves = {path.rpartition(".")[0]: path for path in self.children}
        return {
            path: score(f"{leaf}.L") + (score(f"{leaf}.P").mean(0) + score(f"{leaf}.Q").mean(1))
            for path, leaf in leaves.items()
        }

    def _drop(self) -> None:
        """Set the singular values to zero that were not kept."""
        for path, kept in self._kept.items():
            L = self.triplets[path].L
            copy_into(L, full(L.detach()) * kept)

    def ranks(self) -> dict[str, int]:
        """Return how many singular values act in each module, by its path."""
        return {path: int(self._acting(path).sum()) for path in self.triplets}

    def _acting(self, path: str) -> Tensor:
        """Return which singular values act (rank,): those kept, and those not dropped since."""
        L = whole(self.triplets[path].L)
        kept = self._kept.get(path)
        return torch.ones_like(L, dtype=torch.bool) if kept is None else kept.cpu() | (L != 0)

    def extra_state(self) -> dict[str, JSON]:
        """Return what the choices to come depend on."""
        kept: dict[str, JSON] = {path: kept.tolist() for path, kept in self._kept.items()}
        return {"kept": kept, **self._importance.state()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over a saved `extra_state`."""
        self._importance.load(state, self.trainable())
        self._kept = {
            path: torch.tensor(kept, dtype=torch.bool, device=self.triplets[path].L.device)
            for path, kept in state["kept"].items()
        }

    def load_values(self, values: Mapping[str, Triplet]) -> None:
        """Take over P, L and Q by the path of their module; shapes are checked before."""
        for path, (P, L, Q) in values.items():
            copy_into(self.triplets[path].P, P)
            copy_into(self.triplets[path].L, L)
            copy_into(self.triplets[path].Q, Q)

    def export_peft(self) -> PeftFiles:
        """Return the adapter as PEFT writes AdaLoRA, at its real ranks."""
        acting = {path: self._acting(path) for path in self.triplets}
        values = {
            path: Triplet(whole(child.P), whole(child.L), whole(child.Q))
            for path, child in self.triplets.items()
        }
        places = {path: child.place for path, child in self.triplets.items()}
        method = self._method
        settings = {
            "init_r": method.rank,
            "target_r": method.target_rank,
            "lora_alpha": method.scale * method.rank,
            "lora_dropout": method.dropout,
            "deltaT": method.interval,
            "beta1": method.beta1,
            "beta2": method.beta2,
            "orth_reg_weight": method.orthogonality,
        }
        return write_adalora(self.model, places, values, acting=acting, settings=settings)
