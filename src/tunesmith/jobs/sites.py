"""The map of a model's sites, as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tunesmith.models.settings import ModelSettings
from tunesmith.models.sites import find_sites
from tunesmith.models.skeleton import skeleton

if TYPE_CHECKING:
    from tunesmith.models.family import Columns
    from tunesmith.models.sites import Block, Site


@dataclass(frozen=True)
class MappedSite:
    """One site of every block of a group."""

    name: str
    module: str
    """Path of its projection inside the block."""
    kind: str
    in_features: int
    out_features: int
    columns: Columns | None
    """Output columns of the projection that are this site; None is all."""
    num_experts: int | None


@dataclass(frozen=True)
class BlockGroup:
    """Blocks that follow each other and are alike."""

    stack: str
    path: str
    """Path of the blocks, as in model.layers.0-29."""
    count: int
    sites: tuple[MappedSite, ...]
    norms: tuple[str, ...]
    attention_out: str
    cross_out: str | None
    mlp_out: str


@dataclass(frozen=True)
class SiteMap:
    """Where methods attach to a model."""

    model: str
    model_type: str
    names: tuple[str, ...]
    """What a method's `targets` may say."""
    groups: tuple[BlockGroup, ...]
    backbone: str
    embedding: str
    head: str | None
    classifier: tuple[str, ...]
    final_norm: str | None
    encoder_norm: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the map as JSON has it."""
        return asdict(self)


def map_sites(model: str) -> SiteMap:
    """Return the map of a model, from its config alone.

    Args:
        model: a path, zoo name or Hub id.

    Raises:
        ModelError: nothing of this name, or an architecture that is not understood; the module
            that is not is named.
        SetupError: a zoo model that is not cached and cannot be fetched.
    """
    sites = find_sites(skeleton(ModelSettings(name=model), as_saved=True))
    return SiteMap(
        model=model,
        model_type=sites.model_type,
        names=sites.names,
        groups=tuple(
            _group(list(blocks)) for _, blocks in groupby(sites.blocks, key=_without_place)
        ),
        backbone=sites.backbone,
        embedding=sites.embedding,
        head=sites.head,
        classifier=sites.classifier,
        final_norm=sites.final_norm,
        encoder_norm=sites.encoder_norm,
    )


def _without_place(block: Block) -> tuple[object, ...]:
    """Return all of a block but where it is: equal for blocks that are alike."""
    return (
        block.path.rpartition(".")[0],
        block.stack,
        tuple(_mapped(site, block) for site in block.sites),
        tuple(_inside(norm, block) for norm in block.norms),
        tuple(_inside(branch, block) for branch in block.branches),
    )


def _group(blocks: Sequence[Block]) -> BlockGroup:
    first, last = blocks[0], blocks[-1]
    more = f"-{last.index}" if len(blocks) > 1 else ""
    return BlockGroup(
        stack=first.stack,
        path=first.path + more,
        count=len(blocks),
        sites=tuple(_mapped(site, first) for site in first.sites),
        norms=tuple(_inside(norm, first) for norm in first.norms),
        attention_out=_inside(first.attention_out, first),
        cross_out=None if first.cross_out is None else _inside(first.cross_out, first),
        mlp_out=_inside(first.mlp_out, first),
    )


def _mapped(site: Site, block: Block) -> MappedSite:
    leaf = "" if site.parameter == "weight" else f".{site.parameter}"
    return MappedSite(
        site.name,
        _inside(site.module, block) + leaf,
        site.kind,
        site.in_features,
        site.out_features,
        site.columns,
        site.num_experts,
    )


def _inside(path: str, block: Block) -> str:
    """Return a path as seen from the block."""
    return path.removeprefix(f"{block.path}.")
