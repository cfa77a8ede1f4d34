"""Tuning only the end of the model: the last blocks, the final norm, the head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from tunesmith.errors import MethodError
from tunesmith.methods.child import base_parameters
from tunesmith.methods.contract import Method
from tunesmith.methods.selected import SelectedParameters

if TYPE_CHECKING:
    from tunesmith.models.sites import Sites


class LastLayer(Method):
    """Train the last blocks, the final norm and the head, each where asked for."""

    default_learning_rate: ClassVar[float] = 1e-3

    name: Literal["last_layer"] = "last_layer"
    """The last blocks, the final norm, the head."""
    blocks: int = Field(default=1, ge=0)
    """How many blocks, counted from the last: in an encoder-decoder, of the decoder."""
    norm: bool | None = None
    """Train the final norm, the one before the head. None trains it where the model has one: the
    blocks of BERT and its like end with their own."""
    head: bool = False
    """Train the head (the output embedding; the head of a classifier trains with every method)."""
    allow_tied: bool = False
    """Train the head even where it is the input embedding as well, which then changes too."""
    keep_base: bool = True
    """Keep the base's values of what trains on the CPU (memory: as large as they are), so that the
    untuned model can be switched to. Without it that is refused, and detaching keeps the trained
    values."""

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        """Refuse settings under which nothing would train."""
        if not (self.blocks or self.norm is not False or self.head):
            raise ValueError("last_layer trains nothing: set blocks >= 1, norm or head")
        return self

    def attach(
        self,
        model: nn.Module,
        sites: Sites,
        *,
        name: str = "default",
    ) -> SelectedParameters:
        """Select the parameters of the chosen modules.

        Raises:
            MethodError: the model has fewer blocks, no such module, a head tied to the input
                embedding (without allow_tied), or a parameter that cannot train.
        """
        parents = tuple(f"{path}." for path in self._modules(model, sites))
        wanted = {
            id(parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if name.startswith(parents)
        }
        names = [name for name, p in base_parameters(model).items() if id(p) in wanted]
        return SelectedParameters(model, names, keep_base=self.keep_base)

    def _modules(self, model: nn.Module, sites: Sites) -> Iterator[str]:
        """Yield the paths of what trains."""
        blocks = [block for block in sites.blocks if block.stack == sites.blocks[-1].stack]
        if self.blocks > len(blocks):
            raise MethodError(
                f"method.blocks: {self.blocks} is more than the {len(blocks)} blocks of this "
                f"model's {blocks[-1].stack}; use at most {len(blocks)}, or full to train "
                "everything"
            )
        yield from (block.path for block in blocks[len(blocks) - self.blocks :])
        if sites.final_norm is not None and self.norm is not False:
            yield sites.final_norm
        elif self.norm or not (self.blocks or self.head):
            raise MethodError(
                f"method.norm: a {sites.model_type} has no norm after its last block to train; use "
                "false and blocks >= 1"
            )
        if self.head and sites.classifier:
            yield from sites.classifier
        elif self.head:
            yield self._head(model, sites)

    def _head(self, model: nn.Module, sites: Sites) -> str:
        """Return the path of the head."""
        if sites.head is None:
            raise MethodError(f"method.head: this {sites.model_type} has no head; use false")
        embedding = {id(p) for p in model.get_submodule(sites.embedding).parameters()}
        tied = any(id(p) in embedding for p in model.get_submodule(sites.head).parameters())
        if tied and not self.allow_tied:
            raise MethodError(
                f"method.head: {sites.head} is tied to the input embedding {sites.embedding}, so "
                "training it changes the model's input as well; set allow_tied: true to do so, or "
                "train blocks and norm instead"
            )
        return sites.head
