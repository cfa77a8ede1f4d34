"""Supervised fine-tuning: the likelihood of the replies that the data holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch.nn.functional as F

from tunesmith.models.output_head import output_head
from tunesmith.objectives.contract import Objective
from tunesmith.ops.linear_cross_entropy import linear_cross_entropy_and_correct
from tunesmith.types import IGNORE, LossTerms

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.types import Batch


class SFT(Objective):
    """Minimise -log p(token | tokens before it) over the supervised tokens."""

    name: Literal["sft"] = "sft"

    head: ClassVar[Literal["causal_lm"]] = "causal_lm"

    def loss(self, model: PreTrainedModel, batch: Batch) -> LossTerms:
        """Return the summed loss in nats, the number of supervised tokens, and right guesses.

        The head runs at supervised positions only; the logits never exist whole.

        Raises:
            ModelError: the model has no linear language-model head.
        """
        parts = output_head(model)
        targets = next_tokens(batch)
        total, correct = linear_cross_entropy_and_correct(
            parts.hidden_states(batch).flatten(0, 1),
            parts.weight,
            targets.flatten(),
            bias=parts.scaled_bias(),
            softcap=parts.softcap,
        )
        count = int((targets != IGNORE).sum())
        return LossTerms(total, count, {"accuracy": correct.to(total.dtype)})

    def count(self, batch: Batch) -> int:
        """Return the number of tokens that `loss` sums over."""
        return int((next_tokens(batch) != IGNORE).sum())


def next_tokens(batch: Batch) -> Tensor:
    """Return what each position has to predict, (batch, length) int64, IGNORE where nothing.

    What an encoder-decoder writes is in `labels` as it is to be predicted. In all others the first
    token of a segment or of a left-padded row has nothing before it that it could be
    predicted from, so it is never a target.
    """
    if "decoder_input_ids" in batch:
        written: Tensor = batch["labels"]
        return written
    targets: Tensor = batch["labels"][:, 1:]
    if "attention_mask" in batch:
        targets = targets.masked_fill(batch["attention_mask"][:, :-1] == 0, IGNORE)
    elif "position_ids" in batch:
        targets = targets.masked_fill(batch["position_ids"][:, 1:] == 0, IGNORE)
    return F.pad(targets, (0, 1), value=IGNORE)
