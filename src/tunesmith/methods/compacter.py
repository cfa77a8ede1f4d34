"""Compacter: adapters whose maps are sums of Kronecker products (Mahabadi et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.errors import MethodError
from tunesmith.methods.bottleneck import (
    Activation,
    Bottleneck,
    BottleneckAttachment,
    Init,
    Reads,
    attach_bottlenecks,
    bottleneck_size,
    bottlenecks,
)
from tunesmith.methods.child import Child, require_free
from tunesmith.methods.contract import Method

if TYPE_CHECKING:
    from tunesmith.models.sites import Sites

REDUCTION_FACTOR: Final = 32
A_STD: Final = 1e-2
"""Of A's Gaussian start, as in the authors' code."""


class Compacter(Method):
    """Train adapters h + up(f(down(h))) whose maps are W = sum_i A_i (x) B_i, with A shared."""

    default_learning_rate: ClassVar[float] = 6e-3

    name: Literal["compacter"] = "compacter"
    """Adapters made of Kronecker products."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """houlsby: on the outputs of attention and feed-forward, which is Compacter; pfeiffer: on the
    feed-forward's output, which is Compacter++."""
    reads: Reads = "branch"
    """What goes into them, where placement is pfeiffer: branch, the feed-forward's output; block,
    what the block puts out with the residual and its norm, as in AdapterHub."""
    products: int = Field(default=4, ge=1)
    """n: how many Kronecker products are summed; each A_i is n x n. It divides the model's width
    and the bottleneck."""
    rank: int = Field(default=1, ge=1)
    """Rank of each B_i = s_i t_i."""
    bottleneck: int | None = Field(default=None, ge=1)
    """Size of the inner layer, which n divides; None takes the model's width / reduction_factor,
    rounded up to a multiple of n."""
    reduction_factor: int | None = Field(default=None, ge=1)
    """Width of the model over size of the inner layer; None takes 32. Set this or bottleneck."""
    activation: Activation = "gelu"
    """f."""
    init: Init = "identity"
    """identity: the t of the upward map start at zero, and so the model as the base; near_identity:
    all start random and A small, as in the authors' code."""

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
        """Hang a Compacter on the branches of every block, and the A they share on the backbone.

        Raises:
            MethodError: n does not divide the width or the bottleneck, the reduction factor
                exceeds the width, or the name is taken.
        """
        attribute = f"compacter_{name}"
        require_free(model, sites.backbone, attribute, name)
        shared = SharedA(self.products)
        shared.to(model.get_parameter(f"{sites.embedding}.weight").device)
        children = bottlenecks(
            model,
            sites,
            self.placement,
            lambda width: self.module(width, shared),
            reads=self.reads,
            attribute=attribute,
            name=name,
        )
        owner = f"{sites.backbone}.{attribute}" if sites.backbone else attribute
        return attach_bottlenecks(model, {owner: shared, **children}, self.init)

    def module(self, width: int, shared: SharedA) -> Bottleneck:
        """Return a fresh Compacter for a model of this width.

        Raises:
            MethodError: n does not divide the width or the bottleneck that is set.
        """
        size = bottleneck_size(
            width,
            size=self.bottleneck,
            reduction_factor=self.reduction_factor or REDUCTION_FACTOR,
        )
        if self.bottleneck is None:
            size += -size % self.products
        for what, features in (("model's width", width), ("bottleneck", size)):
            if features % self.products:
                raise MethodError(
                    f"method.products: {self.products} does not divide the {what} {features}; "
                    "choose one that does, or set method.bottleneck to a multiple of it"
                )
        down = KroneckerSum(width, size, shared, rank=self.rank)
        up = KroneckerSum(size, width, shared, rank=self.rank)
        if self.init == "identity":
            nn.init.zeros_(up.t)
        return Bottleneck(down, up, activation=self.activation)


class SharedA(Child):
    """A (n, n, n): the n matrices A_i that all maps of a Compacter have in common."""

    def __init__(self, products: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(products, products, products, dtype=torch.float32))
        nn.init.normal_(self.A, std=A_STD)

    def register_on(self, parent: nn.Module) -> None:
        """Register nothing: the maps come and read A."""


class KroneckerSum(nn.Module):
    """W^T x + b with W = sum_i A_i (x) (s_i t_i) (arXiv:2106.04647, eq. 4 and 6).

    (x) is the Kronecker product. s is (n, in / n, rank), t is (n, rank, out / n), b is (out,); all
    float32. W is (in, out), as in the paper.

    Args:
        in_features: n divides it.
        out_features: n divides it.
        shared: holds A.
        rank: of B_i = s_i t_i.
    """

    def __init__(self, in_features: int, out_features: int, shared: SharedA, *, rank: int) -> None:
        super().__init__()
        n = len(shared.A)
        # In a tuple, or A would be a parameter of every map.
        self._shared = (shared,)
        self.s = nn.Parameter(torch.empty(n, in_features // n, rank, dtype=torch.float32))
        self.t = nn.Parameter(torch.empty(n, rank, out_features // n, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=torch.float32))
        for factor in (*self.s.unbind(), *self.t.unbind()):
            nn.init.xavier_uniform_(factor.detach(), gain=2**0.5)

    def weight(self) -> Tensor:
        """Return W (in, out)."""
        A = self._shared[0].A
        W = torch.einsum("nab,ncr,nrd->acbd", A, self.s, self.t)
        return W.reshape(A.shape[1] * self.s.shape[1], A.shape[2] * self.t.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        """Return W^T x + b (..., out) for x (..., in), in x's dtype."""
        return F.linear(x, self.weight().T.to(x.dtype), self.bias.to(x.dtype))
