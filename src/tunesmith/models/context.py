"""How much text fits into a model, besides what methods put before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TakesPositions:
    """A module that stands before the text and takes positions of the context away from it."""

    enabled: bool

    def positions_taken(self) -> int:
        """Return how many."""
        raise NotImplementedError


def positions_of(model: PreTrainedModel) -> int | None:
    """Return how many positions the model has, or None where nothing limits them."""
    config = model.config.get_text_config()
    # Not every architecture has the attribute: Bloom's ALiBi, for one, needs no limit.
    return getattr(config, "max_position_embeddings", None)


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens of text the model can attend over, or None where nothing limits it.

    A prefix or a prompt that is switched on has its positions already.
    """
    positions = positions_of(model)
    if positions is None:
        return None
    standing = [x for x in model.modules() if isinstance(x, TakesPositions) and x.enabled]
    return positions - sum(x.positions_taken() for x in standing)
