"""The methods on one model, by the name of their adapter: which act, and which train."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.errors import MethodError
from tunesmith.methods.contract import Attachment
from tunesmith.methods.fights import require_one_value, require_peace
from tunesmith.methods.row_adapters import RowNames, acting_by_row, names_of
from tunesmith.methods.tensors import check_against, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.contract import Method
    from tunesmith.models.sites import Sites
    from tunesmith.types import JSON


class Part(NamedTuple):
    """One method on the model."""

    name: str
    """Name of the adapter; parts attached together share it."""
    method: Method
    attachment: Attachment


class Parts:
    """Adapters on one model, each of one or more methods, that act and train by name."""

    def __init__(self, model: PreTrainedModel, sites: Sites) -> None:
        self.model = model
        self.sites = sites
        self.parts: list[Part] = []
        self._frozen: list[Attachment] = []

    @property
    def attachments(self) -> list[Attachment]:
        """What the methods put on the model, in the order of attaching."""
        return [part.attachment for part in self.parts]

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters, in the order in which they came."""
        return list(dict.fromkeys(part.name for part in self.parts))

    @property
    def training(self) -> list[Attachment]:
        """The attachments that are not frozen."""
        return [attachment for attachment in self.attachments if attachment not in self._frozen]

    def freeze(self, *names: str) -> None:
        """Let the adapters called `names` act without training, all where none is named.

        What is frozen is no part of `trainable` and `state_dict`; `save` still writes it.

        Raises:
            MethodError: there is no adapter of that name.
        """
        for part in self._named(names):
            if part.attachment not in self._frozen:
                self._frozen.append(part.attachment)
            for parameter in part.attachment.trainable().values():
                parameter.requires_grad_(False)
                parameter.grad = None

    def unfreeze(self, *names: str) -> None:
        """Let the adapters called `names` train again, all where none is named.

        Raises:
            MethodError: there is no adapter of that name.
        """
        for part in self._named(names):
            if part.attachment in self._frozen:
                self._frozen.remove(part.attachment)
            for parameter in part.attachment.trainable().values():
                parameter.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return all that trains, by its full name in the model."""
        return {n: p for a in self.training for n, p in a.trainable().items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that trains by name, whole and on the CPU.

        As with PyTorch's own, parameters on the CPU share their memory with it. Where parameters
        are sharded this gathers them, so every process calls it.
        """
        return {n: whole(t) for a in self.training for n, t in a.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved `state_dict`.

        Raises:
            AdapterError: names or shapes differ from what trains here; nothing is changed.
        """
        check_against({name: p.shape for name, p in self.trainable().items()}, state)
        for attachment in self.training:
            attachment.load_state_dict({name: state[name] for name in attachment.trainable()})

    def learning_rate_scales(self) -> dict[str, float]:
        """Return what the learning rate of each trainable is multiplied by, by its full name."""
        return {n: a.learning_rate_scale(n) for a in self.training for n in a.trainable()}

    def undecayed(self) -> frozenset[str]:
        """Return the trainables that weight decay leaves alone though they are matrices."""
        return frozenset(n for a in self.training for n in a.trainable() if not a.decays(n))

    def enable(self, on: bool, /, *names: str) -> None:
        """Switch the adapters called `names` on or off, all of them where none is named.

        Raises:
            MethodError: there is no adapter of that name, it cannot be switched, or it has weights
                of its own where one that acts has some too.
        """
        chosen = self._named(names)
        if on:
            require_one_value(p for p in self.parts if p in chosen or p.attachment.enabled)
        for part in chosen:
            part.attachment.enable(on)

    def use(self, names: str | Sequence[str] | None) -> None:
        """Let exactly these adapters act; None is the base model, bit for bit.

        Raises:
            MethodError: there is no adapter of that name, one cannot be switched, or two fight
                over a base parameter; then nothing is changed.
        """
        wanted = names_of(names)
        self._require_known(wanted)
        self._require_peace_among(wanted)
        self.switch({part.attachment: part.name in wanted for part in self.parts})

    def switch(self, wanted: Mapping[Attachment, bool]) -> None:
        """Switch attachments on or off, first off: two may have values for one parameter."""
        for attachment, on in sorted(wanted.items(), key=lambda item: item[1]):
            attachment.enable(on)

    @contextmanager
    def rows(self, names: Sequence[RowNames]) -> Iterator[None]:
        """Let every row of the batch use its own adapter inside a `with` block.

        Forward, backward and generation give each row what it would get alone under `use`. Packed
        samples and beam search are not rows of a batch, so they are refused.

        Args:
            names: for each row the name of its adapter, several names, or None for the base.

        Raises:
            MethodError: there is no adapter of that name, one acts on whole batches only, or two
                of one row fight over a base parameter.
        """
        self._require_known([name for row in names for name in names_of(row)])
        for together in {frozenset(names_of(row)) for row in names}:
            self._require_peace_among(together)
        parts = [(part.name, part.attachment) for part in self.parts]
        with acting_by_row(parts, names, self.model, self.sites):
            yield

    @contextmanager
    def disabled(self, *names: str) -> Iterator[None]:
        """Switch adapters off inside a `with` block; with all off, the model is the base model.

        Raises:
            MethodError: there is no adapter of that name, or it cannot be switched.
        """
        with ExitStack() as stack:
            for part in self._named(names):
                stack.enter_context(part.attachment.disabled())
            yield

    def penalty(self) -> Tensor | None:
        """Return the sum () of the methods' penalties, or None where none has one."""
        terms = [t for a in self.training if (t := a.penalty()) is not None]
        return torch.stack(terms).sum() if terms else None

    def on_step(self, step: int, total: int) -> None:
        """Let every method act after optimiser step `step` of `total`."""
        for attachment in self.training:
            attachment.on_step(step, total)

    @property
    def acts_on_step(self) -> bool:
        """Whether any method does something in `on_step`."""
        return any(type(a).on_step is not Attachment.on_step for a in self.training)

    def extra_state(self) -> dict[str, JSON]:
        """Return what besides the trainables decides the steps to come."""
        return {str(i): a.extra_state() for i, a in enumerate(self.attachments)}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over a saved `extra_state`."""
        for index, attachment in enumerate(self.attachments):
            attachment.load_extra_state(state[str(index)])

    def _named(self, names: tuple[str, ...]) -> list[Part]:
        """Return the parts called `names`, or all."""
        self._require_known(names)
        return [part for part in self.parts if not names or part.name in names]

    def _require_peace_among(self, names: Collection[str]) -> None:
        """Raise MethodError where adapters that act at once fight over a base parameter."""
        require_peace([part for part in self.parts if part.name in names], self.sites)

    def _require_known(self, names: Sequence[str]) -> None:
        """Raise MethodError where no adapter has one of `names`."""
        known = self.adapters
        for name in names:
            if name not in known:
                raise MethodError(f"no adapter is named {name!r}; there are {sorted(known)}")
