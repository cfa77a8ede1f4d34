"""Mixtures of experts: transformers' own ways to compute them, and what methods add in between.

For each implementation ("eager", "grouped_mm", "batched_mm") another is registered with
transformers that takes the same products in the same order, and lets children of an experts module
that are `ExtraExperts` act on the input and output of its two maps. Without one that is switched on
the model's own implementation runs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertsInterface,
    _batched_linear,
    _grouped_linear,
)

from tunesmith.errors import MethodError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX: Final = "tunesmith_"
"""Of the names of implementations that `ExtraExperts` act in."""
MAPS: Final = ("gate_up_proj", "down_proj")
"""The two maps of every expert, by the name of the parameter (experts, out, in)."""


class Rows(Protocol):
    """Which expert computes which of the rows that come together."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return for each row of x (rows, in) W x with its own expert's W: (rows, out).

        Args:
            x: one row a token and expert.
            weight: (experts, out, in), in x's dtype.
        """

    def own(self, values: Tensor) -> Tensor:
        """Return the expert's own of `values` (experts, ...) for each row, or once for all."""


class Grouped:
    """Rows sorted by expert, in one product of groups.

    Args:
        owner: expert of each row (rows,), sorted.
        num_experts: how many there are.
    """

    def __init__(self, owner: Tensor, num_experts: int) -> None:
        self.owner = owner
        experts = torch.arange(num_experts, device=owner.device)
        self.ends = torch.searchsorted(owner, experts, right=True).to(torch.int32)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return each row times its expert's matrix; see `Rows`."""
        return _grouped_linear(x, weight, self.ends)

    def own(self, values: Tensor) -> Tensor:
        """Return the values of each row's expert (rows, ...)."""
        return values[self.owner]


class Batched:
    """Rows in any order, each with a copy of its expert's matrix.

    Args:
        owner: expert of each row (rows,).
    """

    def __init__(self, owner: Tensor) -> None:
        self.owner = owner

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return each row times its expert's matrix; see `Rows`."""
        return _batched_linear(x, weight[self.owner])

    def own(self, values: Tensor) -> Tensor:
        """Return the values of each row's expert (rows, ...)."""
        return values[self.owner]


class OfOne:
    """Rows of one expert.

    Args:
        expert: which.
    """

    def __init__(self, expert: int) -> None:
        self.expert = expert

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return every row times the expert's matrix; see `Rows`."""
        return F.linear(x, weight[self.expert])

    def own(self, values: Tensor) -> Tensor:
        """Return the expert's values (...), the same for every row."""
        return values[self.expert]


class ExtraExperts:
    """What a method adds to the experts of one module, as a child of it."""

    enabled: bool

    @abstractmethod
    def before(self, name: str, x: Tensor, rows: Rows) -> Tensor:
        """Return what goes into the map `name` in the place of x (rows, in)."""

    @abstractmethod
    def after(self, name: str, x: Tensor, output: Tensor, rows: Rows) -> Tensor:
        """Return what the map `name` gives for x (rows, in) in the place of `output`."""


class Routes(NamedTuple):
    """What the router chose."""

    chosen: Tensor
    """The experts of each token (tokens, k), int64."""
    weights: Tensor
    """Their shares in the sum (tokens, k)."""


Extras = Sequence[ExtraExperts]
Compute = Callable[[nn.Module, Tensor, Routes, Extras], Tensor]


def _grouped(experts: Any, x: Tensor, routes: Routes, extras: Extras) -> Tensor:
    """Compute the experts as "grouped_mm" does."""
    top_k = routes.chosen.shape[-1]
    owner, order = torch.sort(routes.chosen.reshape(-1))
    y = _through(experts, x[order // top_k], Grouped(owner, experts.num_experts), extras)
    y = y * routes.weights.reshape(-1)[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return y[back].view(len(x), top_k, -1).sum(dim=1).to(x.dtype)


def _batched(experts: Any, x: Tensor, routes: Routes, extras: Extras) -> Tensor:
    """Compute the experts as "batched_mm" does."""
    top_k = routes.chosen.shape[-1]
    rows = Batched(routes.chosen.reshape(-1))
    y = _through(experts, x.repeat_interleave(top_k, 0), rows, extras)
    y = y * routes.weights.reshape(-1)[:, None]
    return y.view(len(x), top_k, -1).sum(dim=1).to(x.dtype)


def _eager(experts: Any, x: Tensor, routes: Routes, extras: Extras) -> Tensor:
    """Compute the experts as "eager" does, one after the other."""
    out = torch.zeros_like(x)
    chosen = routes.chosen.T
    for expert in sorted(set(chosen.flatten().tolist())):
        choice, token = torch.where(chosen == expert)
        y = _through(experts, x[token], OfOne(expert), extras)
        y = y * routes.weights[token, choice, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def _through(experts: Any, x: Tensor, rows: Rows, extras: Extras) -> Tensor:
    """Return down(act(gate(x)) * up(x)) of each row's expert."""
    first, last = MAPS
    inner = experts._apply_gate(_map(experts, first, x, rows=rows, extras=extras))
    return _map(experts, last, inner, rows=rows, extras=extras)


def _map(experts: nn.Module, name: str, x: Tensor, *, rows: Rows, extras: Extras) -> Tensor:
    """Return the map `name` of x (rows, in), with what is added to it: (rows, out)."""
    for extra in extras:
        x = extra.before(name, x, rows)
    # Not get_parameter: while a block is traced, plain tensors stand in for its parameters.
    output = rows.linear(x, getattr(experts, name))
    for extra in extras:
        output = extra.after(name, x, output, rows)
    return output


def _base(experts: nn.Module, name: str, *args: Tensor) -> Tensor:
    """Compute the experts by the model's own implementation called `name`."""
    # The forward that transformers' decorator put in the place of the class's own keeps that one.
    eager: Callable[..., Tensor] = type(experts).forward.__wrapped__  # type: ignore[attr-defined]
    function: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS.get_interface(name, eager)
    return function(experts, *args)


def _compute(  # noqa: PLR0917 - transformers' own signature, after what is filled in here
    name: str,
    ours: Compute,
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Return (tokens, width), what transformers' experts functions return.

    Args:
        name: the implementation without extras.
        ours: the same with extras.
        experts: the module.
        hidden_states: (tokens, width).
        top_k_index: the experts of each token (tokens, k), int64.
        top_k_weights: their share in its sum (tokens, k).
    """
    extras = [x for x in experts.children() if isinstance(x, ExtraExperts) and x.enabled]
    if not extras:
        return _base(experts, name, hidden_states, top_k_index, top_k_weights)
    return ours(experts, hidden_states, Routes(top_k_index, top_k_weights), extras)


_FUNCTIONS: Final[dict[str, Compute]] = {
    "eager": _eager,
    "grouped_mm": _grouped,
    "batched_mm": _batched,
}
for _name, _function in _FUNCTIONS.items():
    ExpertsInterface.register(PREFIX + _name, partial(_compute, _name, _function))


def route_experts(model: PreTrainedModel) -> None:
    """Let `ExtraExperts` act in `model`, in the implementation that it has.

    Raises:
        MethodError: it has another implementation than those.
    """
    before: str = model.config._experts_implementation
    if before.startswith(PREFIX):
        return
    if before not in _FUNCTIONS:
        raise MethodError(
            f"model.name: this model computes its experts by {before!r}, where nothing can be "
            "added; call model.set_experts_implementation('grouped_mm') before attaching"
        )
    model.set_experts_implementation(PREFIX + before)


def unroute_experts(model: PreTrainedModel) -> None:
    """Give `model` its own implementation again, unless something still acts in its experts."""
    if any(isinstance(module, ExtraExperts) for module in model.modules()):
        return
    model.set_experts_implementation(model.config._experts_implementation.removeprefix(PREFIX))


def require_routed(experts: nn.Module) -> None:
    """Check that what is added to `experts` acts.

    Raises:
        MethodError: somebody chose another implementation after the method was attached.
    """
    config: Any = experts.config  # each has it, to ask us by it
    own: str = config._experts_implementation
    if not own.startswith(PREFIX):
        raise MethodError(
            f"the model's experts were changed to {own!r} after a method was attached that acts "
            f"in them; call model.set_experts_implementation({PREFIX + own!r})"
        )
