"""IA3: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022)."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods.child import base_modules, require_free
from tunesmith.methods.contract import Method, PeftFiles
from tunesmith.methods.experts import (
    ExpertInputScale,
    ExpertPart,
    InExperts,
    ScalesInExperts,
    expert_places,
    in_experts,
    merged_experts,
)
from tunesmith.methods.mergeable import Mergeable, MergeableAttachment
from tunesmith.methods.peft_format import (
    PREFIX,
    PeftTargets,
    adapted_modules,
    common_config,
    read_peft_config,
    stored_transposed,
    without_base,
)
from tunesmith.methods.peft_targets import short_names
from tunesmith.methods.places import column_index, linear_features, targeted_columns
from tunesmith.methods.tensors import check_against, copy_into, whole
from tunesmith.models.experts import route_experts, unroute_experts
from tunesmith.models.family import Columns

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from tunesmith.methods.contract import Attachment
    from tunesmith.models.sites import Sites


_PAPER = ("attention.k", "attention.v", "cross.k", "cross.v", "mlp.down", "shared.down")
"""What the paper rescales, in an encoder-decoder, and in the feed-forward of shared experts."""
_INNER = ("mlp.down", "shared.down")
"""Where the paper rescales the input."""


class IA3(Method):
    """Learn one factor for each key, value and inner feed-forward activation: l * x.

    In an encoder-decoder, the paper's T0, keys and values of the cross attention too (section 3.3).
    """

    default_learning_rate: ClassVar[float] = 2e-2
    peft_type: ClassVar[str | None] = "IA3"

    name: Literal["ia3"] = "ia3"
    """Rescaled keys, values and feed-forward activations."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Sites whose output is rescaled; those in `inputs` have their input rescaled. None is the
    paper's: attention.k and attention.v, cross.k and cross.v where there are any, and mlp.down (of
    every expert by itself, in a mixture, and shared.down)."""
    inputs: list[str] | None = None
    """Which of the targets have their input rescaled: for mlp.down that is the activation between
    the two feed-forward maps. None is the paper's: mlp.down and shared.down."""

    @model_validator(mode="after")
    def _inputs_are_targets(self) -> Self:
        """Refuse an input site that is no target."""
        if other := sorted(set(self.inputs or ()) - set(self.targets or _PAPER)):
            raise ValueError(f"inputs: {other[0]!r} is not among the targets; add it there too")
        return self

    def sites_of(self, sites: Sites) -> list[str]:
        """Return the names of what is rescaled in a model with these sites."""
        if self.targets is not None:
            return self.targets
        optional = ("cross.", "shared.")
        return [name for name in _PAPER if name in sites.names or not name.startswith(optional)]

    def inputs_of(self, sites: Sites) -> list[str]:
        """Return the names of those whose input is rescaled."""
        inner = _INNER if self.inputs is None else self.inputs
        return [name for name in self.sites_of(sites) if name in inner]

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> IA3Attachment:
        """Hang a vector of ones at every target.

        Raises:
            MethodError: a target is no site, shares its input with a site that is no target, or
                the name is taken.
        """
        inputs = self.inputs_of(sites)
        outputs = [site for site in self.sites_of(sites) if site not in inputs]
        scales: dict[str, Rescale] = {}
        for path, columns in targeted_columns(model, sites, outputs).items():
            scales[path] = OutputScale(model.get_submodule(path), path, columns)
        for path, columns in targeted_columns(model, sites, inputs, leave_experts=True).items():
            _require_own_input(path, columns)
            scales[path] = InputScale(model.get_submodule(path), path)
        in_each: dict[tuple[str, str], ExpertPart] = {}
        for place in expert_places(model, sites, inputs, rank=1, alpha=1.0):
            _require_own_input(place.path, place.columns)
            part = ExpertInputScale(place.num_experts, place.in_features)
            in_each[place.module, place.parameter] = part
        return attach_scales(model, scales, name=name, in_each=in_each)

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
        """Put an IA3 in PEFT's layout on `model`, with its values.

        Raises:
            AdapterError: the configuration means more than plain IA3, or names or shapes do not
                fit this model.
            MethodError: the name is taken.
        """
        config = read_peft_config(
            files, PeftIA3, without_effect={"init_ia3_weights"}, plain=cls.__name__
        )
        columns: dict[str, Columns | None] = {}
        if isinstance(recorded, IA3):
            columns = targeted_columns(model, sites, recorded.sites_of(sites))
        scales: dict[str, Rescale] = {}
        for path, module in adapted_modules(config, files.tensors, "ia3_l", model).items():
            if config.rescales_input(path):
                scales[path] = InputScale(module, path)
            else:
                scales[path] = OutputScale(module, path, columns.get(path))
        expected = {f"{PREFIX}{p}.ia3_l": s.peft_shape() for p, s in scales.items()}
        check_against(expected, without_base(files.tensors, model))
        for path, scale in scales.items():
            scale.take(path, files.tensors[f"{PREFIX}{path}.ia3_l"])
        method = recorded if isinstance(recorded, IA3) else _described(scales, sites)
        return method, attach_scales(model, scales, name=name)


def attach_scales(
    model: nn.Module,
    scales: Mapping[str, Rescale],
    *,
    name: str,
    in_each: Mapping[tuple[str, str], ExpertPart] = MappingProxyType({}),
) -> IA3Attachment:
    """Hang each of `scales` under the linear map at its path, and `in_each` in the experts.

    Raises:
        MethodError: the name is taken.
    """
    for path, scale in scales.items():
        require_free(model, path, f"ia3_{name}", name)
        scale.to(model.get_parameter(f"{path}.weight").device)
    experts = in_experts(ScalesInExperts, model, in_each, attribute=f"ia3_{name}", name=name)
    children = {f"{path}.ia3_{name}": scale for path, scale in scales.items()}
    return IA3Attachment(model, children, experts=experts)


def _require_own_input(path: str, columns: Columns | None) -> None:
    """Raise MethodError where rescaling the input of `path` would reach more than was asked for."""
    if columns is not None:
        raise MethodError(
            f"method.inputs: {path} computes several sites from one input, which cannot be "
            "rescaled for one of them alone; rescale its output, or name all of its sites"
        )


def rescale(x: Tensor, factors: Tensor) -> Tensor:
    """Return l * x for x (..., features) and `factors` l (features,) float32, in x's dtype.

    As x + (l - 1) * x: l itself rounded to bfloat16 would lose any change below 0.4 %, and x
    brought to float32 would be kept a second time for the backward pass.
    """
    return x + x * (factors - 1).to(x.dtype)


class Rescale(Mergeable):
    """Factors l, float32, all one at the start (Liu et al. 2022, arXiv:2205.05638, sec. 3.3).

    They rescale the linear map with all that other methods add to it.
    """

    turn: ClassVar[int] = 2

    l: nn.Parameter  # noqa: E741 - the paper's letter

    def over_all(self, factors: Tensor) -> Tensor:
        """Return `factors`, l, over all features of the module."""
        return factors

    @abstractmethod
    def peft_shape(self) -> torch.Size:
        """Return the shape in which PEFT stores l over all features."""

    @abstractmethod
    def take(self, path: str, stored: Tensor) -> None:
        """Take over l as PEFT stored it for the module at `path`.

        Raises:
            AdapterError: it rescales columns that this does not reach.
        """


class OutputScale(Rescale):
    """y = l * (W x + b), over the output columns it reaches."""

    columns: Tensor | None

    def __init__(self, module: nn.Module, path: str, columns: Columns | None = None) -> None:
        super().__init__()
        self.out_features = linear_features(path, module)[1]
        self.register_buffer("columns", column_index(columns), persistent=False)
        reached = self.out_features if self.columns is None else len(self.columns)
        self.l = nn.Parameter(torch.ones(reached, dtype=torch.float32))

    def over_all(self, factors: Tensor) -> Tensor:
        """Return `factors` (reached,) over all outputs (out,), one where it does not reach."""
        if self.columns is None:
            return factors
        index = self.columns.to(factors.device)
        return factors.new_ones(self.out_features).index_copy(0, index, factors)

    def peft_shape(self) -> torch.Size:
        """Return (out, 1)."""
        return torch.Size((self.out_features, 1))

    def take(self, path: str, stored: Tensor) -> None:
        """Take over l (out, 1) of the module at `path`.

        Raises:
            AdapterError: it is not one where this does not reach.
        """
        factors = stored.flatten().float()
        copy_into(self.l, factors if self.columns is None else factors[self.columns])
        if not torch.equal(self.over_all(self.l.detach()), factors):
            raise AdapterError(
                f"{path}.ia3_l rescales output columns that tunesmith.json says it does not; "
                "delete tunesmith.json to load it over all columns"
            )

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return l * `output` (..., out)."""
        return rescale(output, self.over_all(self.l))

    def merged(self, weight: Tensor) -> Tensor:
        """Return diag(l) W for W (out, in)."""
        return self.over_all(self.l)[:, None] * weight


class InputScale(Rescale):
    """y = W (l * x) + b."""

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(linear_features(path, module)[0], dtype=torch.float32))

    def peft_shape(self) -> torch.Size:
        """Return (1, in)."""
        return torch.Size((1, len(self.l)))

    def take(self, path: str, stored: Tensor) -> None:
        """Take over l (1, in) of the module at `path`."""
        copy_into(self.l, stored.flatten())

    def register_on(self, parent: nn.Module) -> RemovableHandle:
        """Register the hook that changes what goes into `parent`."""
        return parent.register_forward_pre_hook(self.before)

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Return the positional `args` with l * x in place of x (..., in), or None while off."""
        return (rescale(args[0], self.l), *args[1:]) if self.enabled else None

    def merged(self, weight: Tensor) -> Tensor:
        """Return W diag(l) for W (out, in)."""
        return weight * self.l


class IA3Attachment(MergeableAttachment):
    """Vectors of factors on one model under one adapter name."""

    title: ClassVar[str] = "IA3"

    def __init__(
        self,
        model: nn.Module,
        scales: Mapping[str, Rescale],
        *,
        experts: Mapping[str, InExperts],
    ) -> None:
        if experts:
            route_experts(model)
        super().__init__(model, {**scales, **experts})
        self.experts = dict(experts)
        self.scales = {path.rpartition(".")[0]: scale for path, scale in scales.items()}

    def decays(self, name: str) -> bool:
        """Return False: those of experts are matrices too, and a factor of 0 shuts its feature."""
        del name
        return False

    def merged_values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight and bias by name, with the factors in it."""
        yield from self.merged_weights(self.scales)
        yield from merged_experts(self.model, self.experts)
        for path, scale in self.scales.items():
            bias = self.model.get_submodule(path).bias
            if isinstance(scale, OutputScale) and isinstance(bias, Tensor):
                yield f"{path}.bias", scale.over_all(scale.l) * bias.float()

    def detach(self) -> None:
        """Remove every child and hook; the model is the plain base again."""
        super().detach()
        if self.experts:
            unroute_experts(self.model)
            self.experts = {}

    def export_peft(self) -> PeftFiles:
        """Return the adapter as PEFT writes IA3; a fused projection's other columns are one.

        Raises:
            MethodError: it rescales experts.
        """
        if self.experts:
            raise MethodError(
                "PEFT's IA3 reaches linear maps only, and this one rescales fused experts; use "
                "save() instead, or leave mlp.down out of method.targets"
            )
        inputs = [path for path, scale in self.scales.items() if isinstance(scale, InputScale)]
        outputs = [path for path in self.scales if path not in inputs]
        modules = [path for path, _ in base_modules(self.model)]
        feedforward = short_names(inputs, modules)
        config = common_config(self.model, "IA3") | {
            "fan_in_fan_out": stored_transposed(self.model, self.scales),
            "feedforward_modules": feedforward,
            "init_ia3_weights": True,
            "target_modules": sorted({*feedforward, *short_names(outputs, modules)}),
        }
        tensors = {
            f"{PREFIX}{path}.ia3_l": scale.over_all(whole(scale.l)).reshape(scale.peft_shape())
            for path, scale in self.scales.items()
        }
        return PeftFiles(config, tensors)


class PeftIA3(PeftTargets):
    """What is read of PEFT's IA3Config; every other key must be unset."""

    feedforward_modules: list[str] | str | None = None

    def rescales_input(self, path: str) -> bool:
        """Return whether PEFT would rescale the input of the module at `path`."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, path) is not None
        return path.endswith(tuple(self.feedforward_modules or ()))


def _described(scales: Mapping[str, Rescale], sites: Sites) -> IA3:
    """Return PEFT's configuration as our method: exact but for blocks that differ."""
    touched = {
        site.name: isinstance(scales[site.module], InputScale)
        for block in sites.blocks
        for site in block.sites
        if site.module in scales
    }
    inputs = sorted(name for name, of_input in touched.items() if of_input)
    return IA3(targets=sorted(touched), inputs=inputs) if touched else IA3()
