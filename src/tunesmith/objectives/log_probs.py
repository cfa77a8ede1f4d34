"""Log-probabilities of whole replies, for the objectives that compare them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from tunesmith.models.output_head import output_head
from tunesmith.objectives.sft import next_tokens
from tunesmith.ops.linear_cross_entropy import token_log_probs
from tunesmith.types import IGNORE, PAIR_KEYS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.types import Batch


class ReplyLogProbs(NamedTuple):
    """Of each reply of a batch."""

    sums: Tensor
    """(sequences,) float32: log p(y|x) = sum over the reply's tokens, in nats."""
    lengths: Tensor
    """(sequences,) float32: |y|, tokens that are summed; at least 1."""

    @property
    def means(self) -> Tensor:
        """The means a token, log p(y|x) / |y|, (sequences,)."""
        return self.sums / self.lengths


def reply_log_probs(model: PreTrainedModel, batch: Batch) -> ReplyLogProbs:
    """Return log p of the supervised tokens of each sequence, given all before them.

    The head runs at supervised positions only; the logits never exist whole.

    Args:
        model: a causal language model.
        batch: padded rows, or segments side by side; see `tunesmith.types.Batch`.

    Raises:
        ModelError: the model has no linear language-model head.
    """
    parts = output_head(model)
    targets = next_tokens(batch)
    tokens = token_log_probs(
        parts.hidden_states(model_inputs(batch)).flatten(0, 1),
        parts.weight,
        targets.flatten(),
        bias=parts.scaled_bias(),
        softcap=parts.softcap,
    )
    places, count = sequences(batch)
    sums = tokens.new_zeros(count).index_add(0, places, tokens)
    counted = (targets.flatten() != IGNORE).to(tokens.dtype)
    lengths = counted.new_zeros(count).index_add(0, places, counted)
    return ReplyLogProbs(sums, lengths.clamp(min=1))


def model_inputs(batch: Batch) -> Batch:
    """Return what of a batch the model takes."""
    return {key: value for key, value in batch.items() if key not in PAIR_KEYS}


def sequences(batch: Batch) -> tuple[Tensor, int]:
    """Return which sequence each position belongs to, (batch x length,) int64, and their number."""
    ids: Tensor = batch["input_ids"]
    if "cu_seq_lens_q" in batch:
        starts = batch["cu_seq_lens_q"][:-1].to(ids.device)
        marks = torch.zeros(ids.shape[1], dtype=torch.int64, device=ids.device)
        marks[starts.long()] = 1
        return marks.cumsum(0) - 1, len(starts)
    rows = torch.arange(len(ids), device=ids.device)
    return rows.repeat_interleave(ids.shape[1]), len(ids)
