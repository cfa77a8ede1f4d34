"""The map from any supported model to sites: places named the same for every architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import MethodError, ModelError
from tunesmith.models.families import FAMILIES, Columns, Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["linear", "conv1d"]


@dataclass(frozen=True)
class Site:
    """One place in one block: a projection, or some output columns of a shared one."""

    name: str
    """`attention.q`, `mlp.down`, ...: the same for every architecture."""
    module: str
    """Path of the projection in the model."""
    kind: Kind
    """How the projection stores its weight: (out, in), or (in, out) for GPT-2's Conv1D."""
    in_features: int
    out_features: int
    """Output columns of this site, which may be fewer than the projection's."""
    columns: Columns | None
    """Ranges [start, stop) of the projection's outputs that are this site; None is all of them."""
    block: int


@dataclass(frozen=True)
class Block:
    """One layer of the stack."""

    path: str
    index: int
    attention_out: str
    """Module that puts out the attention branch as it joins the residual (`attention.out`)."""
    mlp_out: str
    """Module that puts out the feed-forward branch as it joins the residual (`mlp.out`)."""
    norms: tuple[str, ...]
    """Normalisations, per-head ones last."""
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Sites:
    """The map of one model; all paths are from the model that was asked about."""

    model_type: str
    backbone: str
    """The model without its head; empty where the model is one."""
    blocks: tuple[Block, ...]
    embedding: str
    head: str | None
    final_norm: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `select` takes, in the order of a block's computation."""
        found = {site.name for block in self.blocks for site in block.sites}
        return tuple(name for name in _ORDER if name in found)

    def select(self, names: Sequence[str] | Literal["all"]) -> list[Site]:
        """Return the sites of these names in every block, block by block.

        Raises:
            MethodError: a name that is no site of this model.
        """
        known = self.names
        wanted = known if names == "all" else names
        for name in wanted:
            if name not in known:
                raise MethodError(
                    f"method.targets: '{name}' is not a site of model type '{self.model_type}'; "
                    f"use one of {', '.join(known)}"
                )
        return [site for block in self.blocks for site in block.sites if site.name in wanted]


_ORDER = (
    *("attention.q", "attention.k", "attention.v", "attention.o"),
    *("mlp.gate", "mlp.up", "mlp.down"),
)


def find_sites(model: PreTrainedModel) -> Sites:
    """Return the map of `model`.

    Raises:
        ModelError: the architecture is not in the table, or this model has a module that the
            table does not explain; it is named.
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ModelError(
            f"model.name: {type(model).__name__} (model type '{model_type}') is not in the "
            f"architecture table; use one of {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    names = {id(module): name for name, module in model.named_modules()}
    backbone = names[id(model.base_model)]
    layers = _join(backbone, family.blocks)
    final_norm = _join(backbone, family.final_norm)
    head = model.get_output_embeddings()
    return Sites(
        model_type=model_type,
        backbone=backbone,
        blocks=tuple(
            _block(model, family, f"{layers}.{index}", index)
            for index in range(len(_stack(model, layers)))
        ),
        embedding=names[id(model.get_input_embeddings())],
        head=None if head is None else names[id(head)],
        final_norm=final_norm if final_norm in names.values() else None,
    )


def weight_of(module: nn.Module, kind: Kind) -> Tensor:
    """Return a view (out, in) of a projection's weight, however it stores it."""
    weight = module.get_parameter("weight")
    return weight.t() if kind == "conv1d" else weight


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _stack(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        stack = model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f"model.name: {type(model).__name__} has no blocks at {path}") from error
    if not isinstance(stack, nn.ModuleList):
        raise ModelError(f"model.name: {path} of {type(model).__name__} is no list of blocks")
    return stack


def _block(model: PreTrainedModel, family: Family, path: str, index: int) -> Block:
    inside = dict(model.get_submodule(path).named_modules())
    norms = tuple(norm for norm in family.norms if norm in inside)
    sites = sorted(
        (*_plain_sites(family, inside, path, index), *_fused_sites(model, family, path, index)),
        key=lambda site: _ORDER.index(site.name),
    )
    _refuse_unknown(inside, path, known=(*norms, *(s.module[len(path) + 1 :] for s in sites)))
    for branch in (family.attention_out, family.mlp_out):
        if branch not in inside:
            raise ModelError(f"model.name: {path} has no {branch}, where a branch should end")
    return Block(
        path=path,
        index=index,
        attention_out=_join(path, family.attention_out),
        mlp_out=_join(path, family.mlp_out),
        norms=tuple(_join(path, norm) for norm in norms),
        sites=tuple(sites),
    )


def _plain_sites(
    family: Family, inside: dict[str, nn.Module], path: str, index: int
) -> Iterator[Site]:
    for name, leaf in family.linears.items():
        if leaf in inside:
            module = _join(path, leaf)
            kind, in_features, out_features = _shape(inside[leaf], module)
            yield Site(name, module, kind, in_features, out_features, None, index)


def _fused_sites(model: PreTrainedModel, family: Family, path: str, index: int) -> Iterator[Site]:
    for leaf, fused in family.fused.items():
        module = _join(path, leaf)
        kind, in_features, width = _shape(model.get_submodule(module), module)
        parts = fused.layout(model.config, width)
        if sorted(c for part in parts for r in part for c in range(*r)) != list(range(width)):
            raise ModelError(f"model.name: the {width} outputs of {module} are not {fused.names}")
        for name, columns in zip(fused.names, parts, strict=True):
            out_features = sum(stop - start for start, stop in columns)
            yield Site(name, module, kind, in_features, out_features, columns, index)


def _shape(module: nn.Module, path: str) -> tuple[Kind, int, int]:
    """Return how a projection stores its weight, and its input and output width."""
    if isinstance(module, nn.Linear):
        return "linear", module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return "conv1d", module.nx, module.nf
    raise ModelError(
        f"model.name: {path} is a {type(module).__name__}, which is neither a linear layer nor a "
        "Conv1D, so nothing can attach there"
    )


def _refuse_unknown(inside: dict[str, nn.Module], path: str, known: Sequence[str]) -> None:
    """Raise for a module with parameters of its own that no site and no norm explains."""
    for name, module in inside.items():
        explained = any(name == leaf or name.startswith(f"{leaf}.") for leaf in known)
        if not explained and any(True for _ in module.parameters(recurse=False)):
            raise ModelError(
                f"model.name: {_join(path, name)} ({type(module).__name__}) is not understood: the "
                "architecture table has no place for it"
            )
