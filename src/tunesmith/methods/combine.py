"""Weighted combination of LoRA adapters into a new one.

Everything is about the deltas D_i = s_i B_i A_i, what each adapter adds to a weight, and never
about A_i and B_i by themselves: sum_i w_i B_i A_i is what the weights mean, while (sum_i w_i B_i)
(sum_i w_i A_i), which PEFT calls linear, has products of one adapter's B with another's A in it.
Negative weights take an adapter away (Ilharco et al. 2023, arXiv:2212.04089).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tunesmith.errors import MethodError
from tunesmith.methods.lora import LoRA, LoraAttachment, attach_places
from tunesmith.methods.peft_lora import Pair
from tunesmith.methods.places import Place, targeted_columns

if TYPE_CHECKING:
    from torch import nn

    from tunesmith.methods.low_rank import LowRank
    from tunesmith.methods.parts import Part
    from tunesmith.models.sites import Sites

Combination = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"]
COMBINATIONS: Final[tuple[Combination, ...]] = get_args(Combination)
SPARSE: Final = ("ties", "dare_linear", "dare_ties")
"""The ways that keep a share of each delta's elements."""
DENSITY: Final = 0.2
"""Share that is kept where none is given: TIES keeps the top 20 % (Yadav et al. 2023)."""


class Recipe(NamedTuple):
    """How deltas become one."""

    method: Combination
    density: float
    rank: int | None
    """Of the result, where it is cut; None is the largest among the adapters."""
    seed: int


class Combined(NamedTuple):
    """A combination, attached."""

    method: LoRA
    attachment: LoraAttachment
    kept: float
    """Share of the combined deltas' squared norm that the rank keeps; 1 where nothing is cut."""


def recipe(
    method: str, *, density: float | None = None, rank: int | None = None, seed: int = 0
) -> Recipe:
    """Return the recipe that these settings mean.

    Args:
        method: one of COMBINATIONS.
        density: share of each delta's elements that ties and dare keep.
        rank: of the result, for all but linear, whose rank is the sum of the adapters'.
        seed: of dare's choice.

    Raises:
        MethodError: there is no such method, or a setting has no effect on it or is out of range.
    """
    known = next((name for name in COMBINATIONS if name == method), None)
    if known is None:
        raise MethodError(f"combine: {method!r} is no method; use {', '.join(COMBINATIONS)}")
    if density is not None and method not in SPARSE:
        raise MethodError(f"combine: density has no effect on {method}; leave it out")
    if density is not None and not 0 < density <= 1:
        raise MethodError(f"combine: density {density} is no share; use one above 0 and up to 1")
    if rank is not None and method in {"linear", "cat"}:
        raise MethodError(
            f"combine: {method} keeps the sum of all ranks, so rank has no effect; svd cuts it"
        )
    if rank is not None and rank < 1:
        raise MethodError(f"combine: rank {rank} is none; use 1 or more")
    return Recipe(known, DENSITY if density is None else density, rank, seed)


def combine(
    weighted: Sequence[tuple[Part, float]],
    model: nn.Module,
    sites: Sites,
    recipe: Recipe,
    *,
    name: str,
) -> Combined:
    """Attach the combination of LoRA adapters to `model` as a LoRA called `name`.

    Raises:
        MethodError: an adapter is no plain LoRA, or there is none.
    """
    if not weighted:
        raise MethodError("combine: there are no adapters; give names and weights")
    pairs = [(dict(_pairs(part)), weight) for part, weight in weighted]
    targets = _targets([part for part, _ in weighted], sites)
    generator = torch.Generator().manual_seed(recipe.seed)
    places, values, norms = [], {}, torch.zeros(2, dtype=torch.float64)
    for path, columns in targeted_columns(model, sites, targets).items():
        found = [(pair[path], weight) for pair, weight in pairs if path in pair]
        if not found:
            continue
        first = found[0][0].place
        whole = Place(path, first.in_features, first.out_features, 1, 1.0, columns)
        A, B, kept = _combined([(_factors(p, whole), w) for p, w in found], recipe, generator)
        rank = len(A)
        places.append(Place(path, first.in_features, first.out_features, rank, rank, columns))
        values[path] = Pair(A, B)
        norms += kept
    largest = max(place.rank for place in places)
    method = LoRA(rank=largest, alpha=largest, targets=targets)
    attachment = attach_places(model, places, method, name=name, values=values)
    return Combined(method, attachment, float(norms[0] / norms[1]) if norms[1] > 0 else 1.0)


def _pairs(part: Part) -> Iterator[tuple[str, LowRank]]:
    """Yield path and pair of every module that an adapter reaches.

    Raises:
        MethodError: it does more than add B A to weights.
    """
    attachment, instead = part.attachment, "combine adapters of method lora"
    if not isinstance(attachment, LoraAttachment) or not isinstance(part.method, LoRA):
        raise MethodError(
            f"combine: {part.name!r} is {part.method.name}, whose effect is no sum of low-rank "  # type: ignore[attr-defined]  # each method has its name
            f"deltas; {instead}"
        )
    if part.method.dora:
        raise MethodError(
            f"combine: {part.name!r} is DoRA, which rescales the weight too; {instead} without dora"
        )
    if len(attachment.children) != len(attachment.pairs):
        raise MethodError(
            f"combine: {part.name!r} has biases, or pairs in a mixture's experts, besides; "
            f"{instead} without them"
        )
    yield from attachment.pairs.items()


def _targets(parts: Sequence[Part], sites: Sites) -> list[str] | Literal["all"]:
    """Return the sites that any of the adapters targets."""
    asked = [part.method.targets for part in parts if isinstance(part.method, LoRA)]
    if "all" in asked:
        return "all"
    return [name for name in sites.names if any(name in targets for targets in asked)]


class _Factors(NamedTuple):
    """A delta as the product B A."""

    A: Tensor
    """(rank, in)."""
    B: Tensor
    """(reached, rank), with the scale in it."""

    @property
    def delta(self) -> Tensor:
        """The product (reached, in)."""
        return self.B @ self.A


@torch.no_grad()
def _factors(pair: LowRank, place: Place) -> _Factors:
    """Return s B and A over the output columns of `place`, the start of pissa and olora in them."""
    A, B = pair.A.float(), pair.spread(pair.B).float()
    if pair.A0 is not None and pair.B0 is not None:
        A, B = torch.cat([A, pair.A0]), torch.cat([B, -pair.spread(pair.B0)], dim=1)
    index = place.column_index()
    return _Factors(A, pair.scale * (B if index is None else B[index.to(B.device)]))


@torch.no_grad()
def _combined(
    found: Sequence[tuple[_Factors, float]], recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and B of one module's combination, and its squared norm, kept and before the cut."""
    if recipe.method in {"linear", "cat"}:
        A = torch.cat([factors.A for factors, _ in found])
        B = torch.cat([weight * factors.B for factors, weight in found], dim=1)
        return A, B, torch.ones(2, dtype=torch.float64)
    deltas = [factors.delta for factors, _ in found]
    weights = [weight for _, weight in found]
    if recipe.method in {"dare_linear", "dare_ties"}:
        deltas = [drop(delta, recipe.density, generator) for delta in deltas]
    if recipe.method == "ties":
        deltas = [trim(delta, recipe.density) for delta in deltas]
    if recipe.method in {"ties", "dare_ties"}:
        combined = disjoint_mean(deltas, weights)
    else:
        combined = torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)]).sum(0)
    return _cut(combined, recipe.rank or max(len(factors.A) for factors, _ in found))


def _cut(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) whose product is nearest to `delta` (out, in)."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    squares = S.double().square().cpu()
    root = S[:rank].sqrt()
    kept = torch.stack([squares[:rank].sum(), squares.sum()])
    return root[:, None] * Vh[:rank], U[:, :rank] * root, kept


def trim(delta: Tensor, density: float) -> Tensor:
    """Return `delta` with its largest elements by magnitude, the rest zero.

    TIES, step 1 (Yadav et al. 2023, arXiv:2306.01708, algorithm 1), for each weight by itself.
    """
    count = max(1, int(density * delta.numel()))
    largest = delta.abs().flatten().topk(count).indices
    return (
        torch.zeros_like(delta)
        .flatten()
        .index_copy(0, largest, delta.flatten()[largest])
        .reshape(delta.shape)
    )


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return `delta` with elements dropped at random, the others over `density` in their place.

    DARE (Yu et al. 2024, arXiv:2311.03099, eq. 3 to 5), with drop rate p = 1 - density.
    """
    kept = torch.rand(delta.shape, generator=generator) < density
    return delta * kept.to(delta.device) / density


def disjoint_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return each element's mean over the deltas that have the elected sign, times their weights.

    TIES, steps 2 and 3: the sign with the larger total magnitude is elected. A negative weight
    counts as its positive one on the negated delta.
    """
    signed = torch.stack([-d if w < 0 else d for d, w in zip(deltas, weights, strict=True)])
    strength = signed.new_tensor([abs(w) for w in weights])[:, None, None]
    elected = torch.where(signed.sum(0) >= 0, 1.0, -1.0)
    agree = signed.sign() == elected
    return (strength * signed * agree).sum(0) / agree.sum(0).clamp(min=1)
