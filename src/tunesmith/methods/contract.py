"""What a method is, and what it leaves on a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tunesmith.errors import MethodError
from tunesmith.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from tunesmith.models.sites import Sites
    from tunesmith.types import JSON


@dataclass(frozen=True)
class PeftFiles:
    """An adapter in PEFT's own layout: adapter_config.json and adapter_model.safetensors."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    file: Path = Path("adapter_config.json")
    """Where `config` was read, for error messages."""


class Attachment(ABC):
    """What one method put on one model: its parameters, and the switch that turns it off."""

    identity_at_start: ClassVar[bool] = True
    """Whether the model computes the base's logits until the first step."""
    observes: ClassVar[bool] = False
    """Whether it has `findings` about the tokens that it sees while `observing`."""
    trains_base: ClassVar[bool] = False
    """Whether base parameters themselves train (then they are float32 and need autocast)."""

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """Return what trains, by its full name in the model."""

    @property
    def keeps_base(self) -> bool:
        """Whether the base is still there, so that the method can be switched off."""
        return True

    def learning_rate_scale(self, name: str) -> float:
        """Return what the learning rate of the trainable `name` is multiplied by."""
        del name
        return 1.0

    def decays(self, name: str) -> bool:
        """Return whether weight decay, that of matrices, pulls the trainable `name` to 0."""
        del name
        return True

    @property
    @abstractmethod
    def enabled(self) -> bool:
        """Whether the method acts."""

    @abstractmethod
    def enable(self, on: bool, /) -> None:
        """Switch the method on or off; off is the base model, bit for bit."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the method off inside a `with` block."""
        before = self.enabled
        self.enable(False)
        try:
            yield
        finally:
            self.enable(before)

    def choose_rows(self, mask: Tensor | None) -> None:
        """Act in the rows (batch,) bool of the batches to come only; None is all rows again.

        Raises:
            MethodError: the method acts on whole batches only.
        """
        if mask is not None:
            raise MethodError(
                f"rows: {type(self).__name__} acts on whole batches and not on some rows of one; "
                "use lora, prompt_tuning, prefix_tuning or another that does, or use()"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return only what was trained, by the same names as `trainable`."""
        return {name: parameter.detach() for name, parameter in self.trainable().items()}

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved `state_dict`; names and shapes must agree.

        Raises:
            AdapterError: names or shapes differ from this attachment's.
        """

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return what a saved file holds: `state_dict`, or less where less computes the same."""
        return self.state_dict()

    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `saved_tensors` gave.

        Raises:
            AdapterError: names or shapes do not fit this attachment.
        """
        self.load_state_dict(tensors)

    @property
    def merges(self) -> bool:
        """Whether `merge` can fold it into the base, which then is as fast as a plain one."""
        return False

    def merge(self) -> None:
        """Fold the method into the base weights; it is then off, and `unmerge` undoes it.

        Raises:
            MethodError: the method is not linear in the weight.
        """
        raise MethodError(
            f"what {type(self).__name__} adds is no change of weights, so it cannot merge; keep "
            "the adapter beside the base"
        )

    def unmerge(self) -> None:
        """Undo `merge`: the base weights are again exactly what they were."""
        raise MethodError(f"{type(self).__name__} cannot merge, so there is nothing to unmerge")

    def detach(self) -> None:  # noqa: B027  # nothing to do where nothing was hung
        """Remove every child and hook; the model is the plain base again."""

    @property
    def turn(self) -> int:
        """When it merges among the attachments of one model; see `Child.turn`."""
        return 0

    def trains_itself(self) -> frozenset[str]:
        """Return the base parameters whose values it replaces by ones of its own, by name."""
        return frozenset()

    def changes(self) -> frozenset[str]:
        """Return the base parameters that it acts on, by name: what its merge would write."""
        return self.trains_itself()

    def penalty(self) -> Tensor | None:
        """Return a term () that is added to the mean loss (orthogonality, L0), or None."""
        return None

    def on_step(self, step: int, total: int) -> None:  # noqa: B027  # most methods need none
        """Act after optimiser step `step` of `total` (rank reallocation, temperature)."""

    def extra_state(self) -> dict[str, JSON]:
        """Return what besides the trainables decides the steps to come."""
        return {}

    def load_extra_state(self, state: Mapping[str, JSON]) -> None:  # noqa: B027  # most methods need none
        """Take over a saved `extra_state`."""

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Look on, inside a `with` block, for what `findings` tells."""
        yield

    def findings(self) -> dict[str, JSON]:
        """Return what it has become, by name, for the evidence of a run."""
        return {}

    def export_peft(self) -> PeftFiles:
        """Return the adapter in PEFT's layout.

        Raises:
            MethodError: PEFT has no format for it.
        """
        raise MethodError(f"PEFT has no format for {type(self).__name__}; use save() instead")


class Method(Settings):
    """Hyper-parameters of a method. `attach` puts it on a model."""

    default_learning_rate: ClassVar[float]
    base_dtype: ClassVar[Literal["auto", "float32"]] = "auto"
    """What the base is best loaded in: float32 where every weight trains, so nothing is rounded."""
    needs_every_step: ClassVar[bool] = False
    """Whether a run that stops early would leave something else than the method promises."""
    peft_type: ClassVar[str | None] = None
    """PEFT's name of the method, `peft_type` of its configuration; then `attach_peft` reads it."""

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> Attachment:
        """Put the method on `model` and return what was put there.

        The base is frozen by the caller. `name` tells several adapters on one model apart.

        Raises:
            MethodError: the method cannot work on this model; the message says why.
        """
        raise NotImplementedError

    @classmethod
    def attach_peft(
        cls,
        files: PeftFiles,
        model: PreTrainedModel,
        sites: Sites,
        *,
        recorded: Method | None,
        name: str,
    ) -> tuple[Method, Attachment]:
        """Put an adapter in PEFT's layout on `model`, with its values; also what `save` wrote.

        Called for files of this class's `peft_type`. Everything is checked before anything is
        attached, so that an error leaves the model as it was.

        Args:
            files: PEFT's configuration and tensors.
            model: the base model, perhaps with other adapters on it.
            sites: its map.
            recorded: the method as tunesmith.json has it, or None where PEFT wrote the files.
            name: name of the adapter.

        Returns:
            The method (`recorded`, or what describes the configuration best) and its attachment.

        Raises:
            AdapterError: the configuration means something that cannot be read, or names or
                shapes do not fit this model.
            MethodError: the name is taken.
        """
        raise NotImplementedError
