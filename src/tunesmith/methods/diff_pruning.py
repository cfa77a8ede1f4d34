"""Diff pruning: a sparse change of the weights (Guo, Rush & Kim 2021, arXiv:2012.07463)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.errors import AdapterError
from tunesmith.methods.child import require_free
from tunesmith.methods.contract import Method
from tunesmith.methods.hard_concrete import SURE, gates, probability_nonzero
from tunesmith.methods.mergeable import Mergeable, MergeableAttachment
from tunesmith.methods.places import column_index, linear_features, targeted_columns
from tunesmith.methods.tensors import check_against, copy_into, whole

if TYPE_CHECKING:
    from tunesmith.models.family import Columns
    from tunesmith.models.sites import Sites
    from tunesmith.types import JSON

ALPHA_START: Final = 5.0
"""Gates start open, as in the authors' code: z is 1 with probability 0.97."""


class DiffPruning(Method):
    """Train a change delta = z * w of the weights whose gates z leave few elements of it."""

    default_learning_rate: ClassVar[float] = 5e-4
    needs_every_step: ClassVar[bool] = True  # before the fixed phase nothing is cut

    name: Literal["diff_pruning"] = "diff_pruning"
    """A sparse change of the weights."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all"] = "all"
    """Sites whose weights and biases change; all is every linear map in the blocks, without head
    and embedding."""
    sparsity: float = Field(default=0.005, gt=0, le=1)
    """Share of the elements that differ from the base in the end; the rest is cut by magnitude."""
    structured: bool = True
    """Give each weight and bias a gate of its own besides, so that whole tensors can close."""
    l0_penalty: float = Field(default=1.25e-7, ge=0)
    """lambda: weight of the expected number of non-zero elements in the loss."""
    fixed_phase: float = Field(default=0.5, ge=0, lt=1)
    """Share of the steps, at the end, that train the elements left with the others fixed at
    zero."""
    gate_learning_rate_scale: float = Field(default=2000.0, gt=0)
    """Learning rate of the gates over that of w: 0.1 over 5e-5 in the authors' code."""

    def attach(
        self, model: nn.Module, sites: Sites, *, name: str = "default"
    ) -> DiffPruningAttachment:
        """Hang a change beside every targeted linear map.

        Raises:
            MethodError: a target is no site, or the name is taken.
        """
        attribute = f"diff_{name}"
        diffs = {}
        for path, columns in targeted_columns(model, sites, self.targets).items():
            require_free(model, path, attribute, name)
            module = model.get_submodule(path)
            # Made where it belongs: it is as large as the weight, in float32.
            with torch.device(model.get_parameter(f"{path}.weight").device):
                diffs[path] = Diff(module, path, columns, structured=self.structured)
        return DiffPruningAttachment(model, diffs, self, attribute=attribute)


class Gated(nn.Module):
    """delta = z * w, or z_g z * w with a gate for the whole group (section 2.3).

    All float32; w starts at zero, so delta does.

    Args:
        shape: of delta.
        structured: with a gate for the whole.
    """

    def __init__(self, *shape: int, structured: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.alpha = nn.Parameter(torch.full(shape, ALPHA_START, dtype=torch.float32))
        # One element and not none: FSDP cannot shard a scalar.
        self.alpha_group = nn.Parameter(torch.full((1,), ALPHA_START)) if structured else None

    def delta(self, *, sample: bool = False) -> Tensor:
        """Return delta, with gates drawn or at their medians."""
        return _gated(self.w, self.alpha, self.alpha_group, sample=sample)

    def at_rest(self) -> Tensor:
        """Return delta whole and on the CPU, with gates at their medians."""
        group = None if self.alpha_group is None else whole(self.alpha_group)
        return _gated(whole(self.w), whole(self.alpha), group, sample=False)

    def expected_nonzero(self) -> Tensor:
        """Return the expected number () of elements whose gates are not zero (eq. 4)."""
        total = _unsharded(probability_nonzero(self.alpha).sum())
        if self.alpha_group is None:
            return total
        return (probability_nonzero(_unsharded(self.alpha_group)) * total).sum()

    @torch.no_grad()
    def fix(self, delta: Tensor, kept: Tensor) -> None:
        """Make `delta` the change where `kept`, bool, and zero elsewhere, for good.

        The gates themselves are shut or opened: who saves and restores the parameters then has the
        places too.
        """
        copy_into(self.w, torch.where(kept, delta, 0.0))
        copy_into(self.alpha, torch.where(kept, SURE, -SURE))
        if self.alpha_group is not None:
            copy_into(self.alpha_group, torch.full((1,), SURE))

    def is_fixed(self) -> bool:
        """Return whether every gate is shut or open for good."""
        return bool((whole(self.alpha).abs() > SURE / 2).all())


def _gated(w: Tensor, alpha: Tensor, alpha_group: Tensor | None, *, sample: bool) -> Tensor:
    """Return z * w, or z_g z * w."""
    z = gates(alpha, sample=sample)
    if alpha_group is not None:
        z = gates(alpha_group, sample=sample) * z
    return z * w


def _unsharded(tensor: Tensor) -> Tensor:
    """Return `tensor` whole, with its gradient, where the model is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Diff(Mergeable):
    """(W + delta_W) x + b + delta_b, as W x + b + (delta_W x + delta_b).

    Args:
        module: the linear map, found at `path`.
        path: for errors.
        columns: output columns it reaches; None is all.
        structured: with a gate for each of weight and bias.
    """

    adds_to: ClassVar[tuple[str, ...]] = ("weight", "bias")
    columns: Tensor | None

    def __init__(
        self, module: nn.Module, path: str, columns: Columns | None, *, structured: bool
    ) -> None:
        super().__init__()
        in_features, self.out_features = linear_features(path, module)
        self.register_buffer("columns", column_index(columns), persistent=False)
        reached = self.out_features if self.columns is None else len(self.columns)
        self.weight = Gated(reached, in_features, structured=structured)
        has_bias = isinstance(module.bias, Tensor)
        self.bias = Gated(reached, structured=structured) if has_bias else None

    def spread(self, delta: Tensor) -> Tensor:
        """Return `delta` (reached, ...) over all output columns (out, ...), zero elsewhere."""
        if self.columns is None:
            return delta
        none = delta.new_zeros(self.out_features, *delta.shape[1:])
        return none.index_copy(0, self.columns, delta)

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output` (..., out) + delta_W x + delta_b for x (..., in), in x's dtype."""
        x = args[0]
        weight = self.spread(self.weight.delta(sample=self.training)).to(x.dtype)
        bias = None
        if self.bias is not None:
            bias = self.spread(self.bias.delta(sample=self.training)).to(x.dtype)
        return output + F.linear(x, weight, bias).to(output.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """Return W + delta_W (out, in)."""
        return weight + self.spread(self.weight.delta())

    def parts(self) -> Iterator[tuple[str, Gated]]:
        """Yield what changes, by its name in the linear map."""
        yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias


class DiffPruningAttachment(MergeableAttachment):
    """Changes on one model under one adapter name: first under gates, then at fixed places."""

    title: ClassVar[str] = "DiffPruning"

    def __init__(
        self,
        model: nn.Module,
        diffs: Mapping[str, Diff],
        method: DiffPruning,
        *,
        attribute: str,
    ) -> None:
        super().__init__(model, {f"{path}.{attribute}": diff for path, diff in diffs.items()})
        self.diffs = dict(diffs)
        self.method = method
        self._parts = {
            f"{path}.{attribute}.{leaf}": part
            for path, diff in diffs.items()
            for leaf, part in diff.parts()
        }
        self._fixed = False

    def learning_rate_scale(self, name: str) -> float:
        """Return what the learning rate of the trainable `name` is multiplied by."""
        return self.method.gate_learning_rate_scale if _is_gate(name) else 1.0

    def decays(self, name: str) -> bool:
        """Return whether it is no gate: at 0 a gate is half open, and their rate is high."""
        return not _is_gate(name)

    def penalty(self) -> Tensor | None:
        """Return lambda E ||delta||_0 (), the price of open gates, or None once they are fixed."""
        if self._fixed:
            return None
        counts = [part.expected_nonzero() for part in self._parts.values()]
        return self.method.l0_penalty * torch.stack(counts).sum()

    def on_step(self, step: int, total: int) -> None:
        """Cut delta to the asked sparsity once the phase with gates is over (section 3.3)."""
        last_with_gates = max(1, round(total * (1 - self.method.fixed_phase)))
        if step >= last_with_gates and not self._fixed:
            self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Keep the elements of delta that are largest in magnitude, and fix the others at zero."""
        deltas = {name: part.at_rest() for name, part in self._parts.items()}
        magnitudes = torch.cat([delta.abs().flatten() for delta in deltas.values()])
        count = max(1, round(self.method.sparsity * len(magnitudes)))
        kept = torch.zeros(len(magnitudes), dtype=torch.bool)
        kept[magnitudes.topk(count).indices] = True
        sizes = [delta.numel() for delta in deltas.values()]
        for (name, delta), mask in zip(deltas.items(), torch.split(kept, sizes), strict=True):
            self._parts[name].fix(delta, mask.reshape(delta.shape))
        self._fixed = True

    def extra_state(self) -> dict[str, JSON]:
        """Return whether the places are fixed."""
        return {"fixed": self._fixed}

    def load_extra_state(self, state: Mapping[str, JSON]) -> None:
        """Take over a saved `extra_state`."""
        self._fixed = bool(state["fixed"])

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved values, of either phase; names and shapes must agree.

        Raises:
            AdapterError: names or shapes differ from this attachment's.
        """
        super().load_state_dict(state)
        self._fixed = all(part.is_fixed() for part in self._parts.values())

    @torch.no_grad()
    def saved_tensors(self) -> dict[str, Tensor]:
        """Return of every change the elements that are not zero: their flat indices and values."""
        saved = {}
        for name, part in self._parts.items():
            delta = part.at_rest().flatten()
            indices = delta.nonzero().flatten()
            small = delta.numel() <= torch.iinfo(torch.int32).max
            saved[f"{name}.indices"] = indices.int() if small else indices
            saved[f"{name}.values"] = delta[indices]
        return saved

    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over `saved_tensors`; the elements that are not in them are fixed at zero.

        Raises:
            AdapterError: names or sizes do not fit this attachment.
        """
        expected: dict[str, torch.Size] = {}
        for name in self._parts:
            shape = tensors[f"{name}.indices"].shape if f"{name}.indices" in tensors else None
            expected |= {f"{name}.{leaf}": shape or torch.Size([0]) for leaf in _SAVED}
        check_against(expected, tensors)
        for name, part in self._parts.items():
            _require_inside(f"{name}.indices", tensors[f"{name}.indices"], part.w.numel())
        for name, part in self._parts.items():
            indices = tensors[f"{name}.indices"].long()
            delta = torch.zeros(part.w.numel())
            delta[indices] = tensors[f"{name}.values"].float()
            kept = torch.zeros(part.w.numel(), dtype=torch.bool)
            kept[indices] = True
            part.fix(delta.reshape(part.w.shape), kept.reshape(part.w.shape))
        self._fixed = True

    def merged_values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight and bias by name, with its change in it."""
        yield from self.merged_weights(self.diffs)
        for path, diff in self.diffs.items():
            if diff.bias is not None:
                name = f"{path}.bias"
                yield name, self.model.get_parameter(name) + diff.spread(diff.bias.delta())


def _is_gate(name: str) -> bool:
    return name.endswith((".alpha", ".alpha_group"))


_SAVED: Final = ("indices", "values")


def _require_inside(name: str, indices: Tensor, size: int) -> None:
    """Raise AdapterError where flat indices point outside a tensor of `size` elements."""
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise AdapterError(
            f"{name} points outside the {size} elements of its weight; the adapter is damaged or "
            "made for another model"
        )
