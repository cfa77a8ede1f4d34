"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import MethodError
from tunesmith.methods.bias import Bias, modules_with_bias
from tunesmith.methods.child import ChildAttachment, require_free
from tunesmith.methods.contract import Method, PeftFiles
from tunesmith.methods.low_rank import Init, LowRank, Place, linear_features
from tunesmith.methods.peft_format import write_lora
from tunesmith.methods.tensors import copy_into

if TYPE_CHECKING:
    from tunesmith.models.families import Columns
    from tunesmith.models.sites import Site, Sites


class LoRA(Method):
    """Train a low-rank update B A beside frozen linear maps: h = W x + (alpha / r) B A x."""

    default_learning_rate: ClassVar[float] = 2e-4

    name: Literal["lora"] = "lora"
    """Low-rank adaptation."""
    rank: int = Field(default=16, ge=1)
    """r, the inner size of the update: r x (in + out) parameters a layer."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength of the update, which is scaled by alpha / rank. None takes 2 x rank (Biderman et al.
    2024, arXiv:2405.09673), so that changing the rank keeps the scale; with rslora it takes 8, the
    same scale at the default rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an element of the update's input while training."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all"] = "all"
    """Sites to adapt, such as [attention.q, attention.v]; all is every linear map in the blocks,
    without head and embedding."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks learning (Kalajdzievski 2023)."""
    init: Init = "kaiming"
    """Distribution of A: kaiming (uniform, bound 1 / sqrt(in), as in the authors' code and PEFT) or
    gaussian (standard deviation 1 / rank, as in PEFT). B starts at zero."""
    bias: Literal["none", "all"] = "none"
    """Train biases besides: none, or all of the model's."""

    @property
    def strength(self) -> float:
        """Alpha, or its default where none is given."""
        if self.alpha is not None:
            return self.alpha
        return 8.0 if self.rslora else 2.0 * self.rank

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> LoraAttachment:
        """Hang a pair beside every targeted linear map of `model`.

        Raises:
            MethodError: the rank exceeds a layer, a target is no site, the name is taken, or
                bias is all on a model without biases.
        """
        return attach_places(model, self.places(model, sites), self, name=name)

    def places(self, model: nn.Module, sites: Sites) -> list[Place]:
        """Return where the pairs go: one a module, over the columns of the targeted sites."""
        places = []
        for path, columns in targeted_columns(model, sites, self.targets).items():
            features = linear_features(path, model.get_submodule(path))
            place = Place(path, *features, self.rank, self.strength, columns)
            _check_rank(place)
            places.append(place)
        return places


def targeted_columns(
    model: nn.Module, sites: Sites, targets: list[str] | Literal["all"]
) -> dict[str, Columns | None]:
    """Return the targeted modules by path, with the output columns that `targets` mean in each."""
    by_module: defaultdict[str, list[Site]] = defaultdict(list)
    for site in sites.select(targets):
        by_module[site.module].append(site)
    return {
        path: _union(together, linear_features(path, model.get_submodule(path))[1])
        for path, together in by_module.items()
    }


def _union(sites: Iterable[Site], out_features: int) -> Columns | None:
    """Return the columns of all `sites` of one module in order, or None where that is every one."""
    ranges: list[tuple[int, int]] = []
    for site in sites:
        if site.columns is None:
            return None
        ranges.extend(site.columns)
    if sum(stop - start for start, stop in ranges) == out_features:
        return None
    return tuple(sorted(ranges))


def _check_rank(place: Place) -> None:
    """Raise MethodError where the rank exceeds what the layer could need."""
    most = min(place.in_features, place.reached)
    if place.rank > most:
        raise MethodError(
            f"method.rank: {place.rank} is larger than the smaller side of {place.module} "
            f"({place.reached} x {place.in_features}); use at most {most}"
        )


def attach_places(
    model: nn.Module, places: Iterable[Place], method: LoRA, *, name: str
) -> LoraAttachment:
    """Hang a fresh pair at each of `places`, and biases where `method` asks for them.

    Raises:
        MethodError: the name is taken, or bias is all on a model without biases.
    """
    with_bias = modules_with_bias(model) if method.bias == "all" else []
    if method.bias == "all" and not with_bias:
        raise MethodError("method.bias: all trains nothing, for this model has no biases; use none")
    pairs, biases = {}, {}
    for place in places:
        require_free(model, place.module, f"lora_{name}", name)
        pair = LowRank(place, rslora=method.rslora, dropout=method.dropout, init=method.init)
        pairs[f"{place.module}.lora_{name}"] = pair.to(
            model.get_parameter(f"{place.module}.weight").device
        )
    for path in with_bias:
        require_free(model, path, f"bias_{name}", name)
        biases[f"{path}.bias_{name}"] = Bias(model.get_parameter(f"{path}.bias"))
    return LoraAttachment(model, pairs, biases, method)


class LoraAttachment(ChildAttachment):
    """Pairs, and perhaps biases, on one model under one adapter name."""

    def __init__(
        self, model: nn.Module, pairs: dict[str, LowRank], biases: dict[str, Bias], method: LoRA
    ) -> None:
        super().__init__(model, {**pairs, **biases})
        self.pairs = {path.rpartition(".")[0]: pair for path, pair in pairs.items()}
        self.biases = {path.rpartition(".")[0]: bias for path, bias in biases.items()}
        self._method = method
        self._originals: dict[str, Tensor] | None = None
        self._on_before_merge = True

    def enable(self, on: bool, /) -> None:
        """Switch the pairs on or off.

        Raises:
            MethodError: they are merged, so neither state can be had.
        """
        if self._originals is not None:
            raise MethodError("LoRA is merged into the base weights; unmerge() first")
        super().enable(on)

    def merge(self) -> None:
        """Add s B A to the weights in float32, rounded once to the weight's dtype.

        The originals stay on the CPU until `unmerge`, because subtracting s B A again would not
        give the same bits: the cost is host memory as large as the adapted weights.

        Raises:
            MethodError: merged already, or a weight is quantised.
        """
        for path in self.pairs:
            _require_mergeable(path, self.model.get_parameter(f"{path}.weight"))
        self._on_before_merge = self.enabled
        self.enable(False)
        originals = {}
        with torch.no_grad():
            for name, value in self._merged_values():
                parameter = self.model.get_parameter(name)
                originals[name] = parameter.to("cpu", copy=True)
                parameter.copy_(value)
        self._originals = originals

    def _merged_values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each base parameter's name, and its value with this adapter in it."""
        for path, pair in self.pairs.items():
            stored_transposed = isinstance(self.model.get_submodule(path), Conv1D)
            delta = pair.delta().T if stored_transposed else pair.delta()
            yield f"{path}.weight", self.model.get_parameter(f"{path}.weight").float() + delta
        for path, bias in self.biases.items():
            yield f"{path}.bias", bias.value

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit, and switch on again what was on.

        Raises:
            MethodError: nothing is merged.
        """
        if self._originals is None:
            raise MethodError("LoRA is not merged, so there is nothing to unmerge")
        with torch.no_grad():
            for name, original in self._originals.items():
                self.model.get_parameter(name).copy_(original)
        self._originals = None
        self.enable(self._on_before_merge)

    def detach(self) -> None:
        """Remove every pair, and what they merged; the model is the plain base again."""
        if self._originals is not None:
            self.unmerge()
        super().detach()

    def load_values(
        self, pairs: Mapping[str, tuple[Tensor, Tensor]], biases: Mapping[str, Tensor]
    ) -> None:
        """Take over A and B, and biases, by the path of their module; shapes are checked before."""
        for path, (A, B) in pairs.items():
            copy_into(self.pairs[path].A, A)
            copy_into(self.pairs[path].B, B)
        for path, value in biases.items():
            copy_into(self.biases[path].value, value)

    def export_peft(self) -> PeftFiles:
        """Return the adapter as PEFT writes LoRA; a fused projection's other columns are zero."""
        method = self._method
        return write_lora(
            self.model, self.pairs, self.biases, dropout=method.dropout, rslora=method.rslora
        )


def _require_mergeable(path: str, weight: Tensor) -> None:
    """Raise MethodError where nothing can be added to a weight."""
    if isinstance(weight, DTensor):
        raise MethodError(
            f"the weight of {path} is sharded, so LoRA cannot merge into it; load the saved "
            "adapter onto an unsharded model to merge"
        )
    if not weight.is_floating_point():
        raise MethodError(
            f"the weight of {path} is quantised ({weight.dtype}), so LoRA cannot merge into it; "
            "load the base model unquantised to merge"
        )
