"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2022)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.methods.bottleneck import (
    Activation,
    Bottleneck,
    BottleneckAttachment,
    Init,
    LayerNorm,
    Placement,
    Reads,
    attach_bottlenecks,
    bottleneck_size,
    bottlenecks,
)
from tunesmith.methods.contract import Method

if TYPE_CHECKING:
    from tunesmith.models.sites import Sites

REDUCTION_FACTOR: Final = 16
NEAR_IDENTITY_STD: Final = 1e-2
"""Houlsby et al. 2019, section 3.6: of a Gaussian truncated at two standard deviations."""
PAPERS_ACTIVATION: Final[dict[Placement, Activation]] = {
    "houlsby": "gelu",
    "pfeiffer": "relu",
    "parallel": "relu",
}
PAPERS_SCALE: Final[dict[Placement, float]] = {"houlsby": 1.0, "pfeiffer": 1.0, "parallel": 4.0}


class Adapter(Method):
    """Train small networks on the branches of each block: h + s W_up f(W_down x)."""

    default_learning_rate: ClassVar[float] = 5e-3

    name: Literal["adapter"] = "adapter"
    """Bottleneck adapters."""
    placement: Placement = "pfeiffer"
    """houlsby: on the outputs of attention and feed-forward (Houlsby et al. 2019); pfeiffer: on the
    feed-forward's output (Pfeiffer et al. 2020); parallel: from the feed-forward's input to its
    output (He et al. 2022)."""
    reads: Reads = "branch"
    """What x is, where placement is pfeiffer: branch, the feed-forward's output, to which the
    change is added; block, what the block puts out with the residual and its norm, as in the
    authors' code (AdapterHub)."""
    bottleneck: int | None = Field(default=None, ge=1)
    """Size of the inner layer; None takes the model's width / reduction_factor."""
    reduction_factor: int | None = Field(default=None, ge=1)
    """Width of the model over size of the inner layer; None takes 16. Set this or bottleneck."""
    activation: Activation | None = None
    """f; None takes the paper's: gelu for houlsby, else relu."""
    init: Init = "identity"
    """identity: W_up starts at zero, and so the model as the base; near_identity: both maps start
    random with a standard deviation of 0.01, as in Houlsby et al. 2019. Biases start at zero."""
    layer_norm: bool = False
    """Normalise x first."""
    scale: float | Literal["learned"] | None = None
    """s; learned is one parameter an adapter, 1 at the start. None takes the paper's: 4 for
    parallel, else 1."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        """Refuse two answers to one question."""
        if self.bottleneck is not None and self.reduction_factor is not None:
            raise ValueError("bottleneck and reduction_factor both give the size; set one of them")
        if self.reads == "block" and self.placement != "pfeiffer":
            raise ValueError("reads: block is pfeiffer's; set placement: pfeiffer, or leave it out")
        return self

    def attach(
        self, model: nn.Module, sites: Sites, *, name: str = "default"
    ) -> BottleneckAttachment:
        """Hang an adapter on the branches of every block.

        Raises:
            MethodError: the reduction factor exceeds the width, the name is taken, or placement is
                parallel and the feed-forward has no mlp.up.
        """
        children = bottlenecks(
            model,
            sites,
            self.placement,
            self.module,
            reads=self.reads,
            attribute=f"adapter_{name}",
            name=name,
        )
        return attach_bottlenecks(model, children, self.init)

    def module(self, width: int) -> Bottleneck:
        """Return a fresh adapter for a model of this width."""
        size = bottleneck_size(
            width,
            size=self.bottleneck,
            reduction_factor=self.reduction_factor or REDUCTION_FACTOR,
        )
        scale = PAPERS_SCALE[self.placement] if self.scale is None else self.scale
        down, up = Dense(width, size), Dense(size, width)
        if self.init == "identity":
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        else:
            _init_near_zero(down.weight)
            _init_near_zero(up.weight)
        return Bottleneck(
            down,
            up,
            activation=self.activation or PAPERS_ACTIVATION[self.placement],
            norm=LayerNorm(width) if self.layer_norm else None,
            # One element and not none: FSDP cannot shard a scalar.
            scale=nn.Parameter(torch.ones(1)) if scale == "learned" else scale,
        )


class Dense(nn.Module):
    """W x + b with W (out, in) and b (out,) float32, zero at the start, for x of any dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b (..., out) for x (..., in), in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def _init_near_zero(weight: Tensor) -> None:
    """Fill `weight` with a truncated Gaussian near zero."""
    std = NEAR_IDENTITY_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
