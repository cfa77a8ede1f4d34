"""A method made of others: attached, switched and saved as one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from tunesmith.errors import MethodError
from tunesmith.methods.contract import Attachment, Method
from tunesmith.methods.tensors import check_against

if TYPE_CHECKING:
    from tunesmith.models.sites import Sites


def attach_parts(
    model: nn.Module, sites: Sites, methods: Mapping[str, Method], *, name: str
) -> dict[str, Attachment]:
    """Attach `methods` under one adapter name; return what each put on the model.

    Raises:
        MethodError: one cannot; the model is then as it was before.
    """
    with ExitStack() as undo:
        parts = {}
        for key, method in methods.items():
            parts[key] = method.attach(model, sites, name=name)
            undo.callback(parts[key].detach)
        undo.pop_all()
    return parts


class ComposedAttachment(Attachment):
    """Several attachments as one.

    Args:
        methods: what is composed.
        parts: what each of them put on the model.
        default_learning_rate: of the composed method, over which each part keeps its own.
    """

    identity_at_start: ClassVar[bool] = False
    title: ClassVar[str]
    """The method's name in messages."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        parts: Mapping[str, Attachment],
        *,
        default_learning_rate: float,
    ) -> None:
        self.methods = dict(methods)
        self.parts = dict(parts)
        self._default = default_learning_rate

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return what trains, of all parts."""
        return {n: p for part in self.parts.values() for n, p in part.trainable().items()}

    def learning_rate_scale(self, name: str) -> float:
        """Return what the learning rate of `name` is multiplied by: to its own method's default."""
        for key, part in self.parts.items():
            if name in part.trainable():
                own = self.methods[key].default_learning_rate / self._default
                return own * part.learning_rate_scale(name)
        raise KeyError(name)

    @property
    def enabled(self) -> bool:
        """Whether the parts act."""
        return all(part.enabled for part in self.parts.values())

    def enable(self, on: bool, /) -> None:
        """Switch all parts on or off."""
        for part in self.parts.values():
            part.enable(on)

    def choose_rows(self, mask: Tensor | None) -> None:
        """Act in the rows (batch,) bool of the batches to come only; None is all rows again."""
        for part in self.parts.values():
            part.choose_rows(mask)

    def trains_itself(self) -> frozenset[str]:
        """Return the base parameters that the parts train themselves."""
        return frozenset().union(*(part.trains_itself() for part in self.parts.values()))

    def changes(self) -> frozenset[str]:
        """Return the base parameters that the parts act on."""
        return frozenset().union(*(part.changes() for part in self.parts.values()))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved values; names and shapes must agree.

        Raises:
            AdapterError: names or shapes differ from this attachment's.
        """
        check_against({name: p.shape for name, p in self.trainable().items()}, state)
        for part in self.parts.values():
            part.load_state_dict({name: state[name] for name in part.trainable()})

    def merge(self) -> None:
        """Refuse.

        Raises:
            MethodError: always.
        """
        raise MethodError(
            f"{self.title} adds keys and values and an activation beside the weights, which no "
            "weight of the base can take in; keep it beside the base, or use lora, which merges"
        )

    def detach(self) -> None:
        """Remove all parts, the last first."""
        for part in reversed(self.parts.values()):
            part.detach()
