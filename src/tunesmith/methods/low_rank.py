"""The pair of matrices beside one linear map, and where it sits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import MethodError
from tunesmith.methods.child import Child
from tunesmith.models.families import Columns

Init = Literal["kaiming", "gaussian"]


@dataclass(frozen=True)
class Place:
    """One linear map that gets a pair B A."""

    module: str
    """Path of the nn.Linear or Conv1D in the model."""
    in_features: int
    out_features: int
    rank: int
    alpha: float
    columns: Columns | None = None
    """Output columns the pair acts on; None is all of them."""

    @property
    def reached(self) -> int:
        """How many output columns the pair acts on: the rows of B."""
        if self.columns is None:
            return self.out_features
        return sum(stop - start for start, stop in self.columns)

    def column_index(self) -> Tensor | None:
        """Return the columns as indices (reached,) int64, or None for all."""
        if self.columns is None:
            return None
        return torch.cat([torch.arange(start, stop) for start, stop in self.columns])


def linear_features(path: str, module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of the linear map `module`, found at `path`.

    Raises:
        MethodError: it is not a linear map.
    """
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    raise MethodError(
        f"{path} is a {type(module).__name__} and not a linear map: no place for LoRA"
    )


class LowRank(Child):
    """h = W x + s B A x, with s = alpha / r (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    A is (rank, in) and B is (reached columns, rank), both float32; B starts at zero.

    Args:
        place: the linear map and the pair's size.
        rslora: s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of x on its way into A.
        init: distribution of A.
    """

    columns: Tensor | None

    def __init__(self, place: Place, *, rslora: bool, dropout: float, init: Init) -> None:
        super().__init__()
        self.place = place
        self.scale = place.alpha / (math.sqrt(place.rank) if rslora else place.rank)
        self.dropout = dropout
        self.A = nn.Parameter(torch.empty(place.rank, place.in_features, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(place.reached, place.rank, dtype=torch.float32))
        self.register_buffer("columns", place.column_index(), persistent=False)
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.A, std=1 / place.rank)

    def spread(self) -> Tensor:
        """Return B over all output columns (out, rank), zero where the pair does not reach."""
        if self.columns is None:
            return self.B
        whole = self.B.new_zeros(self.place.out_features, self.place.rank)
        return whole.index_copy(0, self.columns, self.B)

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output` (..., out) + s B A x for x (..., in), in x's dtype."""
        x = args[0]
        # A and B come down to x's dtype, not x up: the backward pass then keeps no second copy of
        # x, which the projections beside this one share.
        h = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype)) * self.scale
        return output + F.linear(h, self.spread().to(x.dtype)).to(output.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return s B A (out, in) in float32: what merging adds to the weight."""
        return self.scale * (self.spread() @ self.A)
