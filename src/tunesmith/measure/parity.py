"""Whether a model in two states computes the same."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import torch

from tunesmith.models.modes import evaluating

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Parity(NamedTuple):
    """How far two states' logits are apart."""

    difference: float
    """Largest absolute difference of two logits."""
    largest: float
    """Largest absolute logit in the first state, to judge the difference by."""

    def within(self, tolerance: float) -> bool:
        """Return whether the difference is at most `tolerance` of the largest logit (or of 1)."""
        return self.difference <= tolerance * max(1.0, self.largest)


@torch.no_grad()
def logit_parity(
    model: PreTrainedModel,
    ids: Tensor,
    one: AbstractContextManager[object],
    other: AbstractContextManager[object],
) -> Parity:
    """Compare the logits of `model` inside `one` with those inside `other`.

    For example `logit_parity(model, ids, nullcontext(), tuned.merged())`, or `tuned.disabled()`
    for the first. Dropout is off; the model's mode stays.

    Args:
        model: any model that returns logits.
        ids: (batch, length) int64, few enough that two sets of logits fit in memory.
        one: brings the model into the first state, and back.
        other: the same for the second state.
    """
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    logits = []
    with evaluating(model):
        for state in (one, other):
            with state:
                logits.append(model(**inputs, use_cache=False).logits.float())
    difference = float((logits[0] - logits[1]).abs().max())
    return Parity(difference, float(logits[0].abs().max()))
