"""BitFit: only the biases train (Ben Zaken et al. 2022, arXiv:2106.10199)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from tunesmith.errors import MethodError
from tunesmith.methods.bias import AddedBias, Bias, modules_with_bias
from tunesmith.methods.child import require_free
from tunesmith.methods.contract import Method
from tunesmith.methods.mergeable import MergeableAttachment
from tunesmith.methods.places import linear_features, targeted_columns

if TYPE_CHECKING:
    from tunesmith.models.family import Columns
    from tunesmith.models.sites import Sites


class BitFit(Method):
    """Train the biases b of h = W x + b and of the norms; all weights stay."""

    default_learning_rate: ClassVar[float] = 3e-3

    name: Literal["bitfit"] = "bitfit"
    """Biases only."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all"] = "all"
    """Sites whose bias trains, and norm for the normalisations; [attention.q, mlp.up] is the
    paper's small variant. all is every bias of the model but the head's."""
    add_missing: bool = False
    """Add a bias, zero at the start, to targeted linear maps that have none. Such a model cannot be
    merged: its architecture has no place for them."""

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> BitFitAttachment:
        """Hang a bias at every target.

        Raises:
            MethodError: a target is no site or has no bias (without add_missing), nothing has one,
                a module uses its bias in an unknown way, or the name is taken.
        """
        biases: dict[str, Bias] = {}
        for path, columns in self._places(model, sites).items():
            # LoRA's biases have the same name: two that stand in for one bias would add up.
            require_free(model, path, f"bias_{name}", name)
            module = model.get_submodule(path)
            if isinstance(module.bias, Tensor):
                biases[path] = Bias(module.bias, columns)
            else:
                device = model.get_parameter(f"{path}.weight").device
                biases[path] = AddedBias(linear_features(path, module)[1], columns, device)
        return BitFitAttachment(model, {f"{p}.bias_{name}": b for p, b in biases.items()})

    def _places(self, model: nn.Module, sites: Sites) -> dict[str, Columns | None]:
        """Return the modules whose bias trains, by path, with its outputs; None is all of them."""
        inside = f"{sites.backbone}." if sites.backbone else ""
        advice = "method.targets: name the sites whose bias is to train"
        # The head's bias is left out: the loss is computed from the head's own parameters, without
        # running it, and would not see another.
        owners = [p for p in modules_with_bias(model, advice=advice) if p.startswith(inside)]
        linear = targeted_columns(
            model,
            sites,
            "all" if self.targets == "all" else [t for t in self.targets if t != "norm"],
        )
        missing = [path for path in linear if path not in owners]
        if self.targets == "all":
            places = dict.fromkeys(owners) | (dict.fromkeys(missing) if self.add_missing else {})
        else:
            norms = _norms(sites, owners) if "norm" in self.targets else []
            places = dict.fromkeys(norms) | linear
            if missing and not self.add_missing:
                raise MethodError(
                    f"method.targets: {missing[0]} of this {sites.model_type} has no bias; "
                    "set method.add_missing: true to add one that is zero at the start, or leave "
                    "its site out"
                )
        if not places:
            raise MethodError(
                f"method.add_missing: this {sites.model_type} has no biases for bitfit to train; "
                "set it to true to add biases that are zero at the start to its linear maps, or "
                "use lora"
            )
        return places


def _norms(sites: Sites, owners: list[str]) -> list[str]:
    """Return the normalisations that have a bias.

    Raises:
        MethodError: none has.
    """
    norms = [norm for block in sites.blocks for norm in block.norms]
    found = [norm for norm in (*norms, sites.encoder_norm, sites.final_norm) if norm in owners]
    if not found:
        raise MethodError(
            f"method.targets: no norm of this {sites.model_type} has a bias; leave norm out"
        )
    return found


class BitFitAttachment(MergeableAttachment):
    """Biases on one model under one adapter name."""

    title: ClassVar[str] = "BitFit"

    def __init__(self, model: nn.Module, biases: Mapping[str, Bias]) -> None:
        super().__init__(model, biases)
        self.biases = {path.rpartition(".")[0]: bias for path, bias in biases.items()}

    @property
    def merges(self) -> bool:
        """Whether every bias has a place in the base."""
        return not any(isinstance(bias, AddedBias) for bias in self.biases.values())

    def merge(self) -> None:
        """Put the trained biases in the place of the base's, rounded to its dtype.

        Raises:
            MethodError: merged already, or a bias has no place in the base.
        """
        for path, bias in self.biases.items():
            if isinstance(bias, AddedBias):
                raise MethodError(
                    f"{path} has no bias in a plain model of this architecture, so the one that "
                    "method.add_missing added cannot merge; keep the adapter beside the base"
                )
        super().merge()

    def merged_values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each bias by name, with its trained value."""
        for path, bias in self.biases.items():
            name = f"{path}.bias"
            yield name, bias.whole(self.model.get_parameter(name))
