"""How much text fits into a model, besides what methods put before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

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
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return None if positions is None else positions - _behind_padding(model)


def _behind_padding(model: PreTrainedModel) -> int:
    """Return how many rows of its table of positions a model leaves out.

    RoBERTa and what descends from it count from behind the row of the padding token.
    """
    tables = [x for name, x in model.named_modules() if name.endswith("position_embeddings")]
    padding = [x.padding_idx for x in tables if isinstance(x, nn.Embedding)]
    return max((row + 1 for row in padding if row is not None), default=0)


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens of text the model can attend over, or None where nothing limits it.

    A prefix or a prompt that is switched on has its positions already.
    """
    positions = positions_of(model)
    if positions is None:
        return None
    standing = [x for x in model.modules() if isinstance(x, TakesPositions) and x.enabled]
    return positions - sum(x.positions_taken() for x in standing)


def longest_row(model: PreTrainedModel) -> int | None:
    """Return how many tokens a row may have; None where positions are computed, not looked up."""
    config = model.config.get_text_config().to_dict()
    computed = config.get("rope_parameters") or config.get("rope_theta")
    return None if computed else context_length(model)
