"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods.bias import Bias, modules_with_bias
from tunesmith.methods.child import require_free
from tunesmith.methods.contract import Method, PeftFiles
from tunesmith.methods.experts import (
    AddedInExperts,
    ExpertPair,
    ExpertPlace,
    InExperts,
    expert_places,
    in_experts,
    merged_experts,
)
from tunesmith.methods.low_rank import DoRA, Init, LowRank, orthonormal_pair, principal_pair
from tunesmith.methods.mergeable import MergeableAttachment, require_dense
from tunesmith.methods.peft_experts import peft_expert_places
from tunesmith.methods.peft_lora import (
    LoraFiles,
    Pair,
    PeftLora,
    lora_places,
    read_lora,
    read_lora_config,
    write_lora,
)
from tunesmith.methods.places import (
    Place,
    linear_weight,
    places_of,
    require_rank,
    targeted_columns,
    touched_sites,
)
from tunesmith.methods.tensors import copy_into
from tunesmith.models.experts import route_experts, unroute_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.contract import Attachment
    from tunesmith.models.family import Columns
    from tunesmith.models.sites import Sites

__all__ = ["LoRA", "LoraAttachment", "targeted_columns"]


class LoRA(Method):
    """Train a low-rank update B A beside frozen linear maps: h = W x + (alpha / r) B A x."""

    default_learning_rate: ClassVar[float] = 5e-4
    peft_type: ClassVar[str | None] = "LORA"

    name: Literal["lora"] = "lora"
    """Low-rank adaptation."""
    rank: int = Field(default=16, ge=1)
    """r, the inner size of the update: r x (in + out) parameters a layer."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength of the update, which is scaled by alpha / rank. None takes 2 x rank (Biderman et al.
    2024, arXiv:2405.09673), so that changing the rank keeps the scale; with rslora it takes 8, the
    same scale at the default rank. The inits pissa and olora take rank (sqrt(rank) with rslora),
    which is scale 1, as their papers do."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an element of the update's input while training."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all"] = "all"
    """Sites to adapt, such as [attention.q, attention.v]; all is every linear map in the blocks,
    without head and embedding. In a mixture of experts that is each expert by itself; the router
    stays as it is."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks learning (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn the length of each output's weight apart from its direction (DoRA, Liu et al. 2024)."""
    init: Init = "kaiming"
    """Start of A: kaiming (uniform, bound 1 / sqrt(in), as in the authors' code and PEFT) or
    gaussian (standard deviation 1 / rank, as in PEFT), with B at zero. pissa starts B A as the
    principal part of W (Meng et al. 2024), olora as the first part of its QR decomposition
    (Buyukakyuz 2024); the base keeps its weights, and the start is subtracted."""
    plus_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, who advise 16 and a smaller
    learning rate); A learns at the run's."""
    freeze_a: bool = False
    """Keep A as it starts and train B only, which needs no input of the layers in the backward pass
    (LoRA-FA, Zhang et al. 2023)."""
    bias: Literal["none", "all"] = "none"
    """Train biases besides: none, or all of the model's."""

    @property
    def strength(self) -> float:
        """Alpha, or its default where none is given."""
        if self.alpha is not None:
            return self.alpha
        if self.keeps_start:
            return math.sqrt(self.rank) if self.rslora else float(self.rank)
        return 8.0 if self.rslora else 2.0 * self.rank

    @property
    def keeps_start(self) -> bool:
        """Whether the pairs start as a part of the weight, which is then subtracted."""
        return self.init in {"pissa", "olora"}

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> LoraAttachment:
        """Hang a pair beside every targeted linear map of `model`.

        Raises:
            MethodError: the rank exceeds a layer, a target is no site, the name is taken, a weight
                that dora or init reads is quantised, or bias is all on a model without biases or
                with one on its head.
        """
        if self.bias == "all" and sites.head is not None:
            _require_no_bias(model.get_submodule(sites.head), sites.head)
        return attach_places(model, self.places(model, sites), self, name=name)

    def places(self, model: nn.Module, sites: Sites) -> list[Place]:
        """Return where the pairs go: one a weight, over the columns of the targeted sites."""
        rank, alpha = self.rank, self.strength
        experts = expert_places(model, sites, self.targets, rank=rank, alpha=alpha)
        if experts:
            self._require_factors(experts[0])
        linear = places_of(model, sites, self.targets, rank=rank, alpha=alpha, leave_experts=True)
        places = [*linear, *experts]
        for place in places:
            require_rank(place)
        return places

    def _require_factors(self, place: ExpertPlace) -> None:
        """Raise MethodError where a setting would form the whole weight of every expert."""
        if not (self.dora or self.keeps_start):
            return
        setting = "method.dora" if self.dora else f"method.init: {self.init}"
        raise MethodError(
            f"{setting} works on whole weights, and those of the {place.num_experts} experts in "
            f"{place.path} are never formed in a step; leave the mlp sites out of method.targets, "
            "or use plain lora"
        )

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
        """Attach a LoRA that PEFT's files describe; see `Method.attach_peft`."""
        config = read_lora_config(files)
        if isinstance(recorded, LoRA) and recorded.keeps_start:
            method, places = recorded, recorded.places(model, sites)
        elif isinstance(recorded, LoRA):
            method, targets = recorded, recorded.targets
            columns = targeted_columns(model, sites, targets, leave_experts=True)
            in_each = expert_places(model, sites, targets, rank=1, alpha=1.0)
            columns |= {place.path: place.columns for place in in_each}
            places = peft_places(model, sites, config, files.tensors, columns=columns)
        else:
            places = peft_places(model, sites, config, files.tensors, columns={})
            method = None
        read = read_lora(
            model,
            config,
            files.tensors,
            places,
            with_start=method is not None and method.keeps_start,
        )
        method = method or _described(read, sites)
        if method.dora != config.use_dora:
            raise AdapterError(
                f"{files.file}: use_dora is {config.use_dora} but tunesmith.json says dora: "
                f"{method.dora}; one of the two files belongs to another adapter"
            )
        attachment = attach_places(model, places, method, name=name, values=read.pairs)
        attachment.load_biases(read.biases)
        return method, attachment


def peft_places(
    model: PreTrainedModel,
    sites: Sites,
    config: PeftLora,
    tensors: Mapping[str, Tensor],
    *,
    columns: Mapping[str, Columns | None],
) -> list[Place]:
    """Return where PEFT's files put pairs, beside linear maps and in experts.

    Raises:
        AdapterError: they target nothing of this model.
    """
    linear = lora_places(model, config, tensors, columns)
    return [*linear, *peft_expert_places(sites, config, columns, model)]


def _described(files: LoraFiles, sites: Sites) -> LoRA:
    """Return PEFT's configuration as our method: exact but for ranks and blocks that differ."""
    config = files.config
    return LoRA(
        rank=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=_touched(sites, files.places) or "all",
        rslora=config.use_rslora,
        dora=config.use_dora,
        bias="all" if files.biases else "none",
    )


def _touched(sites: Sites, places: Sequence[Place]) -> list[str]:
    """Return the names of the sites at `places`, sorted."""
    linear = [place.module for place in places if not isinstance(place, ExpertPlace)]
    weights = {(p.module, p.parameter) for p in places if isinstance(p, ExpertPlace)}
    in_each = {
        site.name
        for block in sites.blocks
        for site in block.sites
        if (site.module, site.parameter) in weights
    }
    return sorted({*touched_sites(sites, linear), *in_each})


def _require_no_bias(head: nn.Module, path: str) -> None:
    """Raise MethodError where the head has a bias: the loss reads it without running the head.

    A bias beside it would get no gradient, and nobody would notice.
    """
    if "bias" in dict(head.named_parameters(recurse=False)):
        raise MethodError(
            f"method.bias: {path} has a bias, which the loss reads past any adapter, so it cannot "
            "train; use none, or bitfit, which trains all biases but the head's"
        )


def attach_places(
    model: nn.Module,
    places: Iterable[Place],
    method: LoRA,
    *,
    name: str,
    values: Mapping[str, Pair] | None = None,
) -> LoraAttachment:
    """Hang a pair at each of `places`, and biases where `method` asks for them.

    Args:
        model: the base model.
        places: where the pairs go.
        method: what they are.
        name: name of the adapter.
        values: of the pairs, by the path of their module; None starts them afresh.

    Raises:
        MethodError: the name is taken, a weight that is read is quantised, or bias is all on a
            model without biases.
    """
    with_bias = modules_with_bias(model) if method.bias == "all" else []
    if method.bias == "all" and not with_bias:
        raise MethodError("method.bias: all trains nothing, for this model has no biases; use none")
    pairs, biases, in_each = {}, {}, {}
    for place in places:
        if isinstance(place, ExpertPlace):
            pair_of_experts = _expert_pair(place, method)
            if values is not None:
                copy_into(pair_of_experts.A, values[place.path].A)
                copy_into(pair_of_experts.B, values[place.path].B)
            in_each[place.module, place.parameter] = pair_of_experts
            continue
        require_free(model, place.module, f"lora_{name}", name)
        module = model.get_submodule(place.module)
        pair = _pair(place, method).to(module.get_parameter("weight").device)
        if values is None:
            _start(pair, module, method)
        else:
            _load(pair, values[place.module], with_start=method.keeps_start)
        pairs[f"{place.module}.lora_{name}"] = pair
    for path in with_bias:
        require_free(model, path, f"bias_{name}", name)
        biases[f"{path}.bias_{name}"] = Bias(model.get_parameter(f"{path}.bias"))
    experts = in_experts(AddedInExperts, model, in_each, attribute=f"lora_{name}", name=name)
    return LoraAttachment(model, pairs, biases, method, experts=experts)


def _pair(place: Place, method: LoRA) -> LowRank:
    """Return the pair for `place`, with a random A and B = 0."""
    kind = DoRA if method.dora else LowRank
    return kind(
        place,
        rslora=method.rslora,
        dropout=method.dropout,
        init=method.init,
        freeze_a=method.freeze_a,
    )


def _expert_pair(place: ExpertPlace, method: LoRA) -> ExpertPair:
    """Return the pairs for `place`, with random A and B = 0."""
    return ExpertPair(
        place,
        rslora=method.rslora,
        dropout=method.dropout,
        gaussian=method.init == "gaussian",
        freeze_a=method.freeze_a,
    )


def _start(pair: LowRank, module: nn.Module, method: LoRA) -> None:
    """Give `pair` what of its start depends on the weight of `module`.

    Raises:
        MethodError: the weight is quantised or sharded.
    """
    if not (method.keeps_start or method.dora):
        return
    setting = "method.dora" if method.dora else f"method.init: {method.init}"
    weight = linear_weight(module).detach()
    require_dense(f"weight of {pair.place.module}", weight, f"{setting} cannot read it")
    if method.keeps_start:
        reached = weight if pair.columns is None else weight[pair.columns]
        if method.init == "pissa":
            pair.start_from(*principal_pair(reached, pair.place.rank, pair.scale))
        else:
            pair.start_from(*orthonormal_pair(reached, pair.place.rank))
    if isinstance(pair, DoRA):
        pair.measure(weight)


def _load(pair: LowRank, values: Pair, *, with_start: bool) -> None:
    """Give `pair` saved values; shapes are checked before."""
    rank = pair.place.rank
    if with_start:
        pair.start_from(values.A[rank:], -values.B[:, rank:])
    copy_into(pair.A, values.A[:rank])
    copy_into(pair.B, values.B[:, :rank])
    if isinstance(pair, DoRA) and values.m is not None:
        copy_into(pair.m, values.m)


class LoraAttachment(MergeableAttachment):
    """Pairs, and perhaps biases, on one model under one adapter name."""

    title: ClassVar[str] = "LoRA"

    def __init__(
        self,
        model: nn.Module,
        pairs: dict[str, LowRank],
        biases: dict[str, Bias],
        method: LoRA,
        *,
        experts: dict[str, InExperts],
    ) -> None:
        if experts:
            route_experts(model)
        super().__init__(model, {**pairs, **biases, **experts})
        self.experts = experts
        self.pairs = {path.rpartition(".")[0]: pair for path, pair in pairs.items()}
        self.biases = {path.rpartition(".")[0]: bias for path, bias in biases.items()}
        self._method = method

    @property
    def expert_pairs(self) -> dict[str, ExpertPair]:
        """The pairs in experts, by the full name of their weight."""
        parts = [part for child in self.experts.values() for part in child.parts.values()]
        return {part.place.path: part for part in parts if isinstance(part, ExpertPair)}

    def learning_rate_scale(self, name: str) -> float:
        """Return LoRA+'s ratio for a B, 1 for the rest (Hayou et al. 2024, arXiv:2402.12354)."""
        return self._method.plus_ratio if name.endswith(".B") else 1.0

    def merged_values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights with s B A in them, and the biases."""
        yield from self.merged_weights(self.pairs)
        yield from merged_experts(self.model, self.experts)
        for path, bias in self.biases.items():
            yield f"{path}.bias", bias.value

    def detach(self) -> None:
        """Remove every child and hook; the model is the plain base again."""
        super().detach()
        if self.experts:
            unroute_experts(self.model)
            self.experts = {}

    def load_biases(self, biases: Mapping[str, Tensor]) -> None:
        """Take over biases by the path of their module; shapes are checked before."""
        for path, value in biases.items():
            copy_into(self.biases[path].value, value)

    def export_peft(self) -> PeftFiles:
        """Return the adapter as PEFT writes LoRA; a fused projection's other columns are zero."""
        method = self._method
        return write_lora(
            self.model,
            self.pairs,
            self.biases,
            experts=self.expert_pairs,
            dropout=method.dropout,
            rslora=method.rslora,
        )
