"""Small modules hung under base modules: no base module is replaced, no parameter renamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from tunesmith.errors import MethodError
from tunesmith.methods.contract import Attachment
from tunesmith.methods.tensors import check_against, copy_into

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


class Child(nn.Module):
    """What a method hangs under a base module; its forward hook acts on that module's output.

    torch.compile does not notice hooks that come or go, so `enabled` decides inside the hook:
    dynamo guards it like any attribute and keeps one graph for on and one for off.
    """

    turn: ClassVar[int] = 3
    """When it acts among the children of one module, whichever was attached first, so that merging
    in the same order gives the same: 0 needs the base's own output (DoRA), 1 adds to the linear
    map (LoRA, biases), 2 rescales the map with what was added (IA3), 3 goes on from its output."""

    replaces: ClassVar[tuple[str, ...]] = ()
    """Parameters of the module it hangs under that it has in another version of its own."""
    adds_to: ClassVar[tuple[str, ...]] = ()
    """Parameters of that module that it adds to or rescales."""

    by_row: ClassVar[bool] = False
    """Whether it can act in some rows of a batch only, and obeys `row_mask`."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.row_mask: Tensor | None = None
        """The rows of the batch that it acts in, (batch,) bool; None is all."""

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return what `module` gives for the positional `args` in place of `output`."""
        raise NotImplementedError

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `act`'s output where switched on, else the base's own output."""
        if not self.enabled:
            return output
        acted = self.act(module, args, output)
        if self.row_mask is None:
            return acted
        return torch.where(for_rows_of(output, self.row_mask), acted, output)

    def choose_rows(self, mask: Tensor | None) -> None:
        """Act in the rows (batch,) bool of the batches to come; None is all rows again."""
        self.row_mask = mask

    def register_on(self, parent: nn.Module) -> RemovableHandle | None:
        """Register the hook on the module this hangs under; None where a child needs no hook."""
        handle = parent.register_forward_hook(self.hook)
        for key, hook in list(parent._forward_hooks.items()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Child) and owner.turn > self.turn:
                parent._forward_hooks[key] = parent._forward_hooks.pop(key)
        return handle


def for_rows_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return `mask` (batch,) in a shape that is broadcast over `hidden` (batch, length, width).

    Raises:
        MethodError: `hidden` has not one row for each of the mask's.
    """
    if hidden.ndim < 3:
        raise MethodError(
            f"rows: a module of this model computes with all tokens of the batch in a row, "
            f"{tuple(hidden.shape)}, and does not know whose they are; use() one adapter at a time"
        )
    require_rows(mask, hidden.shape[0])
    return mask.to(hidden.device).reshape(-1, *(1,) * (hidden.ndim - 1))


def require_rows(mask: Sized, batch: int) -> None:
    """Check that `mask`, one value a row, is for a batch of this size.

    Raises:
        MethodError: it is not.
    """
    if len(mask) != batch:
        raise MethodError(
            f"rows: {len(mask)} rows were given adapters and this batch has {batch}; give one name "
            "a row, without packed samples and beam search"
        )


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of everything in `model` that no method put there."""
    children = [path for path, module in model.named_modules() if isinstance(module, Child)]
    inside = tuple(f"{path}." for path in children)
    for path, module in model.named_modules():
        if path not in children and not path.startswith(inside):
            yield path, module


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base's own parameters by name, each tied one once, by its first name."""
    names: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in base_modules(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                names[f"{path}.{leaf}" if path else leaf] = parameter
    return names


def computed_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Return the base parameters that no file holds: Marian's positions, sines and cosines.

    What they learned would be gone with the next saving.
    """
    return frozenset(model._keys_to_ignore_on_save or ())


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return `model.state_dict()` as if no method had ever been attached."""
    children = tuple(f"{p}." for p, module in model.named_modules() if isinstance(module, Child))
    return {k: v for k, v in model.state_dict().items() if not k.startswith(children)}


def require_plain(model: nn.Module) -> None:
    """Check that no method has hung anything in `model`.

    Raises:
        MethodError: one has.
    """
    for path, module in model.named_modules():
        if isinstance(module, Child):
            raise MethodError(
                f"the model has an adapter already ({path}); give attach the tuned model to add one"
            )


def require_uncompiled(model: nn.Module) -> None:
    """Check that neither `model` nor a part of it is compiled.

    Raises:
        MethodError: it is.
    """
    for path, module in model.named_modules():
        if module._compiled_call_impl is not None or path == "_orig_mod":
            raise MethodError(
                f"{path or 'the model'} is compiled, and compiled code does not see new hooks; "
                "attach first and compile then"
            )


def require_free(model: nn.Module, path: str, attribute: str, name: str) -> None:
    """Check that no child hangs under the module at `path` as `attribute`.

    Raises:
        MethodError: an adapter of this name hangs there already.
    """
    if attribute in dict(model.get_submodule(path).named_children()):
        raise MethodError(
            f"an adapter named {name!r} is already attached at {path}; "
            "give this one another name or detach that one first"
        )


class ChildAttachment(Attachment):
    """An attachment made of children only, all under one switch.

    Args:
        model: the model the children hang in.
        children: the children by their full path in the model; parents exist, names are free.
    """

    def __init__(self, model: nn.Module, children: Mapping[str, Child]) -> None:
        self.model = model
        self.children = dict(children)
        self._on = True
        self._handles: list[RemovableHandle] = []
        for path, child in self.children.items():
            parent_path, _, attribute = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            # A module starts in train mode: its dropout would act in a model that is in eval mode.
            parent.add_module(attribute, child.train(parent.training))
            if (handle := child.register_on(parent)) is not None:
                self._handles.append(handle)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the children's parameters by full name, as they are now (sharding swaps them)."""
        return {
            f"{path}.{leaf}": parameter
            for path, child in self.children.items()
            for leaf, parameter in child.named_parameters()
        }

    def trains_itself(self) -> frozenset[str]:
        """Return the base parameters that the children have in versions of their own."""
        return frozenset(
            f"{path.rpartition('.')[0]}.{leaf}"
            for path, child in self.children.items()
            for leaf in child.replaces
        )

    def changes(self) -> frozenset[str]:
        """Return the base parameters that the children act on."""
        return self.trains_itself() | {
            f"{path.rpartition('.')[0]}.{leaf}"
            for path, child in self.children.items()
            for leaf in child.adds_to
        }

    @property
    def enabled(self) -> bool:
        """Whether the children act."""
        return self._on

    def enable(self, on: bool, /) -> None:
        """Switch all children on or off; off is the base model, bit for bit."""
        self._on = on
        for child in self.children.values():
            child.enabled = on

    def choose_rows(self, mask: Tensor | None) -> None:
        """Act in the rows (batch,) bool of the batches to come only; None is all rows again.

        Raises:
            MethodError: a child acts on whole batches only.
        """
        for child in self.children.values():
            if mask is not None and not child.by_row:
                super().choose_rows(mask)
            child.choose_rows(mask)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved values; names and shapes must agree.

        Raises:
            AdapterError: names or shapes differ from this attachment's.
        """
        parameters = self.trainable()
        check_against({name: p.shape for name, p in parameters.items()}, state)
        for name, parameter in parameters.items():
            copy_into(parameter, state[name])

    def detach(self) -> None:
        """Remove every child and hook; the model is the plain base again."""
        self.enable(False)  # a graph compiled with the hooks must not run them again
        for handle in self._handles:
            handle.remove()
        for path in self.children:
            parent_path, _, attribute = path.rpartition(".")
            delattr(self.model.get_submodule(parent_path), attribute)
        self._handles.clear()
        self.children.clear()
