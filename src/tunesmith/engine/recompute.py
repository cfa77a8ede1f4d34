"""Gradient checkpointing: recompute activations instead of keeping them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from tunesmith.engine.settings import EngineSettings


@runtime_checkable
class Recomputable(Protocol):
    """What transformers' PreTrainedModel offers, without its two seconds of import."""

    supports_gradient_checkpointing: bool

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
        """Recompute in the backward pass from now on."""

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""

    def disable_input_require_grads(self) -> None:
        """Let the embeddings' output need no gradient."""


@contextmanager
def recomputing(model: nn.Module, settings: EngineSettings) -> Iterator[None]:
    """Recompute activations in the backward pass, where `engine.checkpointing` says so.

    Raises:
        ModelError: the architecture has no blocks that it could recompute.
    """
    if settings.checkpointing == "none":
        yield
        return
    if not isinstance(model, Recomputable) or not model.supports_gradient_checkpointing:
        raise ModelError(
            f"engine.checkpointing: 'full' is not supported by {type(model).__name__}; use none "
            "and a smaller train.batch_size"
        )
    with warnings.catch_warnings():
        # The new name of this method is younger than the oldest transformers that is supported.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Only reentrant checkpointing needs the embeddings' gradient; here it would drive the
        # backward through blocks below the lowest one that trains.
        model.disable_input_require_grads()
        # A cache cannot be recomputed, and transformers says so at every start where its default,
        # which even encoders have, is left as it is.
        config: Any = getattr(model, "config", None)
        cached = getattr(config, "use_cache", None)
        if cached:
            config.use_cache = False
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()
            if cached:
                config.use_cache = cached
