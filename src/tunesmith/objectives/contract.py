"""What an objective is: it says what it needs and what the loss of a batch is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tunesmith.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from tunesmith.types import Batch, LossTerms


class Objective(Settings):
    """Settings of an objective, and its loss."""

    head: ClassVar[Literal["causal_lm", "sequence_classification", "token_classification"]]
    """The head the model carries."""

    def loss(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Return the summed loss of `batch`, its count and further metrics, not yet divided."""
        raise NotImplementedError

    def common(self) -> Callable[[Mapping[str, float]], Batch] | None:
        """Return what tells every micro-batch of the whole effective batch; None for most losses.

        It makes keys of a batch out of the means of `loss`'s metrics over all micro-batches and
        processes. They come of one more forward, without gradients, where there are several.
        """
        return None

    def prepared(self, batch: Batch) -> Batch:
        """Return `batch`, still on the CPU, with what `loss` would otherwise wait for a GPU for."""
        return batch

    def count(self, batch: Batch) -> float:
        """Return what the summed loss of `batch` is divided by, without running the model."""
        raise NotImplementedError
