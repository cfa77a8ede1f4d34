"""What the architecture table says about one family: paths inside one block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

Stack = Literal["encoder", "decoder"]
"""Where a block is: where all is seen, or where only what comes before is."""

Columns = tuple[tuple[int, int], ...]
"""Ranges [start, stop) of a projection's output columns."""
Layout = Callable[[Any, int], tuple[Columns, ...]]
"""From a model's config and a projection's output width to each of its sites' columns."""

QKV: Final = ("attention.q", "attention.k", "attention.v")
GATE_UP: Final = ("mlp.gate", "mlp.up")


@dataclass(frozen=True)
class Fused:
    """One projection that several sites share."""

    names: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture, whose weights are fused: (experts, out, in), not linear maps."""

    module: str
    """Path of the module that holds them."""
    parameters: Mapping[str, Fused]
    """Name of a parameter to the sites in its output columns."""


@dataclass(frozen=True)
class Family:
    """One way to build a block, shared by the model types that build it so."""

    blocks: str
    """Path of the list of blocks inside the backbone."""
    linears: Mapping[str, str]
    """Site to path of its own projection."""
    attention_out: str
    """The module that puts out the attention's branch, just before it joins the residual."""
    mlp_out: str
    norms: tuple[str, ...]
    final_norm: str | None
    """Path of the norm after the last block; None where the blocks end with their own."""
    fused: Mapping[str, Fused] = field(default_factory=lambda: MappingProxyType({}))
    """Path of a shared projection to what is in it."""
    others: tuple[str, ...] = ()
    """Modules that are understood and no site: no method attaches there."""
    stack: Stack = "decoder"
    """What the blocks make up."""
    cross_out: str | None = None
    """As `attention_out`, of a decoder's attention over its encoder."""
    alternatives: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Site to path in those models that do not have it where `linears` says."""
    experts: Experts | None = None
    """Experts, in those blocks that have them in the place of a plain feed-forward."""
    encoder: Family | None = None
    """The blocks that run before these and are attended to: an encoder-decoder's encoder."""
    positions_after_padding: bool = False
    """Whether positions count from `pad_token_id` + 1 on, and not from 0."""


def equal_parts(parts: int) -> Layout:
    """Return the layout [a | b | ...] of `parts` equally wide sites."""

    def layout(config: Any, width: int) -> tuple[Columns, ...]:
        part = width // parts
        return tuple(((index * part, (index + 1) * part),) for index in range(parts))

    return layout


def under(path: str, **leaves: str) -> dict[str, str]:
    """Return sites of one submodule: `under("self_attn", q="q_proj")` is attention.q's path."""
    part = "mlp" if {"up", "down", "gate"} & leaves.keys() else "attention"
    dot = f"{path}." if path else ""
    return {f"{part}.{site}": dot + leaf for site, leaf in leaves.items()}
