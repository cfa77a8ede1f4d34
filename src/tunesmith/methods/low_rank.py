"""The pair of matrices beside one linear map."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.methods.gate import Gate
from tunesmith.methods.mergeable import Mergeable
from tunesmith.methods.places import Place, linear_features, linear_weight, spread
from tunesmith.methods.tensors import whole
from tunesmith.models.modes import Prepares

__all__ = ["DoRA", "Init", "LowRank", "Place", "linear_features"]

Init = Literal["kaiming", "gaussian", "pissa", "olora"]


class LowRank(Mergeable, Prepares):
    """h = W x + s B A x, with s = alpha / r (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    A is (rank, in) and B is (reached columns, rank), both float32; B starts at zero.

    A pair that starts as a part of W (`start_from`) would have that part subtracted from W in its
    paper. Here the base stays as it is: the start is kept, frozen, and subtracted from the pair,
    h = W x + s (B A - B0 A0) x, which is the same map and exactly W x at the start.

    Args:
        place: the linear map and the pair's size.
        rslora: s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an element of x on its way into A.
        init: distribution of A; pissa and olora leave it to `start_from`.
        freeze_a: A does not train (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).
    """

    by_row: ClassVar[bool] = True

    A: Tensor
    A0: Tensor | None
    B0: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        place: Place,
        *,
        rslora: bool,
        dropout: float,
        init: Init,
        freeze_a: bool = False,
    ) -> None:
        super().__init__()
        self.place = place
        self.scale = place.alpha / (math.sqrt(place.rank) if rslora else place.rank)
        self.dropout = dropout
        self._ready: tuple[Tensor, Tensor] | None = None
        """A and s B as they are multiplied, while nothing trains."""
        self.token_gate: Gate | None = None
        """How much of the update acts at each token; None is all of it."""
        A = torch.empty(place.rank, place.in_features, dtype=torch.float32)
        if init == "gaussian":
            nn.init.normal_(A, std=1 / place.rank)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if freeze_a:
            self.register_buffer("A", A, persistent=False)
        else:
            self.A = nn.Parameter(A)
        self.B = nn.Parameter(torch.zeros(place.reached, place.rank, dtype=torch.float32))
        self.register_buffer("A0", None, persistent=False)
        self.register_buffer("B0", None, persistent=False)
        self.register_buffer("columns", place.column_index(), persistent=False)

    @torch.no_grad()
    def start_from(self, A: Tensor, B: Tensor) -> None:
        """Start at A (rank, in) and B (reached, rank), which count as a part of W."""
        self.A.copy_(A)
        self.B.copy_(B)
        self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()

    def spread(self, rows: Tensor) -> Tensor:
        """Return `rows` (reached, ...) over all output columns (out, ...), zero elsewhere."""
        return spread(rows, self.columns, self.place.out_features)

    @torch.no_grad()
    def prepare(self, dtype: torch.dtype) -> None:
        """Cast and scale once for many calls, see `Prepares`; not where a start is subtracted."""
        if self.A0 is None:
            sB = (self.scale * self.spread(self.B)).to(dtype)
            self._ready = (self.A.detach().to(dtype), sB)

    def forget(self) -> None:
        """Cast and scale in every call again."""
        self._ready = None

    def update(self, x: Tensor) -> Tensor:
        """Return s (B A - B0 A0) x (..., out) for x (..., in), in x's dtype."""
        if self._ready is not None and self._ready[0].dtype == x.dtype:
            A, sB = self._ready
            return F.linear(F.linear(x, A), sB)
        # A and B come down to x's dtype, not x up: the backward pass then keeps no second copy of
        # x, which the projections beside this one share.
        kept = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = F.linear(kept, self.A.to(x.dtype)) * self.scale
        update = F.linear(h, self.spread(self.B).to(x.dtype))
        if self.A0 is None or self.B0 is None:
            return update
        # A part of W in its paper, so nothing is dropped. The same products in the same order as
        # above: at the start the two cancel bit for bit.
        h0 = F.linear(x, self.A0.to(x.dtype)) * self.scale
        return update - F.linear(h0, self.spread(self.B0).to(x.dtype))

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output` (..., out) + s B A x for x (..., in), in x's dtype."""
        update = self.update(args[0])
        if self.token_gate is not None:
            update = self.token_gate(args[0]) * update
        return output + update.to(output.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return s (B A - B0 A0) (out, in) in float32: what merging adds to the weight."""
        delta = self.scale * (self.spread(self.B) @ self.A)
        if self.A0 is None or self.B0 is None:
            return delta
        return delta - self.scale * (self.spread(self.B0) @ self.A0)

    def merged(self, weight: Tensor) -> Tensor:
        """Return W + s B A for W (out, in), float32."""
        return weight + self.delta()


class DoRA(LowRank):
    """h = m V / |V| x, with V = W + s B A and |V| its norm row by row (Liu et al. 2024).

    arXiv:2402.09353, eq. 5. m (reached,) starts as |W|, so that the map starts as W. |V| counts as
    a constant in the backward pass (section 4.3). W is (out, in) here, so the paper's columns are
    rows. The norm needs W + s B A in float32 once a forward pass.
    """

    turn: ClassVar[int] = 0
    replaces: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self,
        place: Place,
        *,
        rslora: bool,
        dropout: float,
        init: Init,
        freeze_a: bool = False,
    ) -> None:
        super().__init__(place, rslora=rslora, dropout=dropout, init=init, freeze_a=freeze_a)
        self.m = nn.Parameter(torch.ones(place.reached, dtype=torch.float32))

    @torch.no_grad()
    def measure(self, weight: Tensor) -> None:
        """Start m as |W|, the norms of `weight` (out, in)."""
        self.m.copy_(self._norm(weight))

    @torch.no_grad()
    def all_magnitudes(self, module: nn.Module) -> Tensor:
        """Return m (out,), with the weight's own norms where the pair does not reach."""
        if self.columns is None:
            return self.m
        norms = torch.linalg.vector_norm(linear_weight(module).float(), dim=1)
        return norms.index_copy(0, self.columns, whole(self.m).to(norms.device))

    def _norm(self, weight: Tensor) -> Tensor:
        """Return |V| (reached,) float32 for W (out, in)."""
        norm = torch.linalg.vector_norm(weight.detach().float() + self.delta(), dim=1)
        return norm if self.columns is None else norm[self.columns]

    def _stretch(self, weight: Tensor) -> Tensor:
        """Return m / |V| (out,) less 1, which is 0 where the pair does not reach."""
        return self.spread(self.m / self._norm(weight) - 1)

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return m V / |V| x + b for `output` (..., out) = W x + b."""
        bias: Tensor | None = module.bias  # type: ignore[assignment]  # a linear map has the name
        stretch = self._stretch(linear_weight(module)).to(output.dtype)
        # The backward pass needs V x and nothing else, so only the sum is kept for it.
        total = output + self.update(args[0]).to(output.dtype)
        return total + stretch * (total if bias is None else total - bias)

    def merged(self, weight: Tensor) -> Tensor:
        """Return m V / |V| for W (out, in), float32."""
        return (1 + self._stretch(weight))[:, None] * (weight + self.delta())


def principal_pair(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A (rank, in), B (out, rank): s B A is the best rank-r part of W.

    PiSSA (Meng et al. 2024, arXiv:2404.02948, eq. 2 and 3): U_r S_r^1/2 and S_r^1/2 V_r^T of the
    singular value decomposition, each divided by sqrt(s).

    Args:
        weight: (out, in).
        rank: r.
        scale: s.
    """
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = torch.sqrt(S[:rank] / scale)
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def orthonormal_pair(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in), B (out, rank): the first r of W = Q R.

    OLoRA (Buyukakyuz 2024, arXiv:2406.01775, algorithm 1): B = Q_r, whose columns are orthonormal,
    and A = R_r.

    Args:
        weight: (out, in).
        rank: r.
    """
    Q, R = torch.linalg.qr(weight.float())
    return R[:rank], Q[:, :rank]
