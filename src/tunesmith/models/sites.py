"""The map from any supported model to sites: places named the same for every architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import MethodError, ModelError
from tunesmith.models.families import FAMILIES
from tunesmith.models.family import Columns, Family, Fused, Stack
from tunesmith.models.heads import head_paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["linear", "conv1d", "experts"]


@dataclass(frozen=True)
class Site:
    """One place in one block: a projection, or some output columns of a shared one."""

    name: str
    """`attention.q`, `mlp.down`, ...: the same for every architecture."""
    module: str
    """Path of the projection in the model, or of the module that holds fused experts."""
    kind: Kind
    """How the projection stores its weight: (out, in), or (in, out) for GPT-2's Conv1D, or
    (experts, out, in) for a mixture's experts, all in one parameter."""
    in_features: int
    out_features: int
    """Output columns of this site, which may be fewer than the projection's."""
    columns: Columns | None
    """Ranges [start, stop) of the projection's outputs that are this site; None is all of them."""
    block: int
    parameter: str = "weight"
    """Name of the weight in its module."""
    num_experts: int | None = None
    """How many experts the weight holds, where it is one of experts."""


@dataclass(frozen=True)
class Block:
    """One layer of a stack."""

    path: str
    index: int
    """Place in its stack."""
    attention_out: str
    """Module that puts out the attention branch as it joins the residual (`attention.out`)."""
    mlp_out: str
    """Module that puts out the feed-forward branch as it joins the residual (`mlp.out`)."""
    norms: tuple[str, ...]
    """Normalisations, per-head ones last."""
    sites: tuple[Site, ...]
    stack: Stack
    cross_out: str | None
    """As `attention_out`, of a decoder's attention over its encoder (`cross.out`)."""

    @property
    def branches(self) -> tuple[str, ...]:
        """What joins the residual, in the order in which it does."""
        cross = () if self.cross_out is None else (self.cross_out,)
        return (self.attention_out, *cross, self.mlp_out)


@dataclass(frozen=True)
class Sites:
    """The map of one model; all paths are from the model that was asked about."""

    model_type: str
    backbone: str
    """The model without its head; empty where the model is one."""
    blocks: tuple[Block, ...]
    """Those of the encoder first, where there are two stacks."""
    embedding: str
    head: str | None
    final_norm: str | None
    """After the last block: the decoder's, where there are two stacks."""
    encoder_norm: str | None = None
    """After the encoder's last block, where there are two stacks."""
    classifier: tuple[str, ...] = ()
    """Modules of a classification head, its pooler first; `head` is then None."""

    @property
    def encoder_only(self) -> bool:
        """Whether every token sees every other: the model reads, and does not write."""
        return all(block.stack == "encoder" for block in self.blocks)

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
    *("cross.q", "cross.k", "cross.v", "cross.o"),
    *("mlp.gate", "mlp.up", "mlp.down"),
    *("shared.gate", "shared.up", "shared.down"),
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
    head = model.get_output_embeddings()
    encoder = () if family.encoder is None else _blocks(model, family.encoder, backbone)
    return Sites(
        model_type=model_type,
        backbone=backbone,
        blocks=(*encoder, *_blocks(model, family, backbone)),
        embedding=names[id(model.get_input_embeddings())],
        head=None if head is None else names[id(head)],
        final_norm=_final_norm(model, family, backbone),
        encoder_norm=_final_norm(model, family.encoder, backbone),
        classifier=head_paths(model),
    )


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks that write the text, the first one first; methods may hang on them.

    Raises:
        ModelError: the architecture has none where the table says.
    """
    family = FAMILIES[model.config.model_type]
    backbone = next(name for name, m in model.named_modules() if m is model.base_model)
    return list(_stack(model, _join(backbone, family.blocks)))


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


def _blocks(model: PreTrainedModel, family: Family, backbone: str) -> tuple[Block, ...]:
    """Return the blocks of one stack."""
    layers = _join(backbone, family.blocks)
    return tuple(
        _block(model, family, f"{layers}.{index}", index)
        for index in range(len(_stack(model, layers)))
    )


def _final_norm(model: PreTrainedModel, family: Family | None, backbone: str) -> str | None:
    """Return the norm after the last block of one stack, if there is one."""
    if family is None or family.final_norm is None:
        return None
    path = _join(backbone, family.final_norm)
    return path if path in dict(model.named_modules()) else None


def _block(model: PreTrainedModel, family: Family, path: str, index: int) -> Block:
    inside = dict(model.get_submodule(path).named_modules())
    norms = tuple(norm for norm in family.norms if norm in inside)
    sites = sorted(
        (
            *_plain_sites(family, inside, path, index),
            *_fused_sites(model, family, path, index),
            *_expert_sites(model, family, path, index),
        ),
        key=lambda site: _ORDER.index(site.name),
    )
    own = (s.module[len(path) + 1 :] for s in sites)
    _refuse_unknown(inside, path, known=(*norms, *own, *family.others))
    for branch in (family.attention_out, family.cross_out, family.mlp_out):
        if branch is not None and branch not in inside:
            raise ModelError(f"model.name: {path} has no {branch}, where a branch should end")
    return Block(
        path=path,
        index=index,
        attention_out=_join(path, family.attention_out),
        mlp_out=_join(path, family.mlp_out),
        norms=tuple(_join(path, norm) for norm in norms),
        sites=tuple(sites),
        stack=family.stack,
        cross_out=None if family.cross_out is None else _join(path, family.cross_out),
    )


def _plain_sites(
    family: Family, inside: dict[str, nn.Module], path: str, index: int
) -> Iterator[Site]:
    for name, leaf in (*family.linears.items(), *family.alternatives.items()):
        if leaf in inside:
            module = _join(path, leaf)
            kind, in_features, out_features = _shape(inside[leaf], module)
            yield Site(name, module, kind, in_features, out_features, None, index)


def _fused_sites(model: PreTrainedModel, family: Family, path: str, index: int) -> Iterator[Site]:
    for leaf, fused in family.fused.items():
        module = _join(path, leaf)
        kind, in_features, width = _shape(model.get_submodule(module), module)
        for name, columns, out_features in _parts(model, fused, module, width):
            yield Site(name, module, kind, in_features, out_features, columns, index)


def _expert_sites(model: PreTrainedModel, family: Family, path: str, index: int) -> Iterator[Site]:
    """Yield the sites of fused experts, where this block has any."""
    experts = family.experts
    if experts is None or experts.module not in dict(model.get_submodule(path).named_modules()):
        return
    module = _join(path, experts.module)
    for parameter, fused in experts.parameters.items():
        count, width, in_features = model.get_parameter(f"{module}.{parameter}").shape
        for name, columns, out_features in _parts(model, fused, f"{module}.{parameter}", width):
            yield Site(
                name,
                module,
                "experts",
                in_features,
                out_features,
                None if out_features == width else columns,
                index,
                parameter=parameter,
                num_experts=count,
            )


def _parts(
    model: PreTrainedModel, fused: Fused, path: str, width: int
) -> Iterator[tuple[str, Columns, int]]:
    """Yield name, output columns and their number of each site in a shared weight."""
    parts = fused.layout(model.config, width)
    if sorted(c for part in parts for r in part for c in range(*r)) != list(range(width)):
        raise ModelError(f"model.name: the {width} outputs of {path} are not {fused.names}")
    for name, columns in zip(fused.names, parts, strict=True):
        yield name, columns, sum(stop - start for start, stop in columns)


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
