"""Children that are linear in the weight: they merge into it, and come out bit for bit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.errors import MethodError
from tunesmith.methods.child import Child, ChildAttachment, base_modules
from tunesmith.methods.places import stored_as


class Mergeable(Child):
    """A child whose effect is another weight of the linear map it hangs under."""

    turn: ClassVar[int] = 1
    adds_to: ClassVar[tuple[str, ...]] = ("weight",)

    @abstractmethod
    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight (out, in) that does alone what `weight`, float32, does with this."""


class MergeableAttachment(ChildAttachment):
    """An attachment whose effect is other values of base parameters."""

    title: ClassVar[str]
    """The method's name in messages."""

    def __init__(self, model: nn.Module, children: Mapping[str, Child]) -> None:
        super().__init__(model, children)
        self._originals: dict[str, Tensor] | None = None
        self._on_before_merge = True

    @property
    def turn(self) -> int:
        """When it merges among the attachments of one model: in the turn of its children."""
        return min((child.turn for child in self.children.values()), default=Child.turn)

    @abstractmethod
    def merged_values(self) -> Iterable[tuple[str, Tensor]]:
        """Yield each base parameter's name, and its value with this adapter in it."""

    def merged_weights(self, children: Mapping[str, Mergeable]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and merged value of the weights of the modules that `children` hang under."""
        for path, child in children.items():
            module = self.model.get_submodule(path)
            weight = stored_as(module, module.get_parameter("weight").float())
            yield f"{path}.weight", stored_as(module, child.merged(weight))

    def enable(self, on: bool, /) -> None:
        """Switch the children on or off.

        Raises:
            MethodError: they are merged, so neither state can be had.
        """
        if self._originals is not None:
            raise MethodError(f"{self.title} is merged into the base weights; unmerge() first")
        super().enable(on)

    @property
    def merges(self) -> bool:
        """Yes."""
        return True

    def merge(self) -> None:
        """Fold the method into the weights in float32, rounded once to the weight's dtype.

        The originals stay on the CPU until `unmerge`, because subtracting again would not give the
        same bits: the cost is host memory as large as the adapted weights.

        Raises:
            MethodError: merged already, or a weight is quantised, sharded, or another module's too.
        """
        for path in self.children:
            parent = path.rpartition(".")[0]
            module = self.model.get_submodule(parent)
            so = f"{self.title} cannot merge into it"
            for leaf, parameter in module.named_parameters(recurse=False):
                require_dense(f"{leaf} of {parent}", parameter, so)
                _require_untied(self.model, f"{parent}.{leaf}", so)
        self._on_before_merge = self.enabled
        self.enable(False)
        originals = {}
        with torch.no_grad():
            for name, value in self.merged_values():
                parameter = self.model.get_parameter(name)
                originals[name] = parameter.to("cpu", copy=True)
                parameter.copy_(value)
        self._originals = originals

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit, and switch on again what was on.

        Raises:
            MethodError: nothing is merged.
        """
        if self._originals is None:
            raise MethodError(f"{self.title} is not merged, so there is nothing to unmerge")
        with torch.no_grad():
            for name, original in self._originals.items():
                self.model.get_parameter(name).copy_(original)
        self._originals = None
        self.enable(self._on_before_merge)

    def detach(self) -> None:
        """Remove every child, and what they merged; the model is the plain base again."""
        if self._originals is not None:
            self.unmerge()
        super().detach()


def _require_untied(model: nn.Module, name: str, so: str) -> None:
    """Raise MethodError where another module computes with the parameter `name` too.

    An adapter that PEFT put on a head may stand on the input embedding.
    """
    parameter = model.get_parameter(name)
    for path, module in base_modules(model):
        for leaf, other in module.named_parameters(recurse=False):
            if other is parameter and f"{path}.{leaf}" != name:
                raise MethodError(
                    f"the {leaf} of {name.rpartition('.')[0]} is tied to {path}.{leaf}, which "
                    f"would change too, so {so}; keep the adapter beside the base"
                )


def require_dense(what: str, weight: Tensor, so: str) -> None:
    """Check that `weight` can be read and written as numbers.

    Args:
        what: the weight in words, such as `weight of model.layers.0.mlp.up_proj`.
        weight: a base parameter.
        so: what cannot be done otherwise.

    Raises:
        MethodError: it is sharded or quantised.
    """
    if isinstance(weight, DTensor):
        raise MethodError(
            f"the {what} is sharded, so {so}; use the saved adapter on an unsharded model"
        )
    if not weight.is_floating_point():
        raise MethodError(
            f"the {what} is quantised ({weight.dtype}), so {so}; merge the tuned model, which "
            "dequantises its base first, or use model.quantize: none"
        )
