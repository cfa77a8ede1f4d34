"""Supervised fine-tuning: the likelihood of the replies that the data holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.models.output_head import output_head
from tunesmith.objectives.contract import Objective
from tunesmith.ops.linear_cross_entropy import (
    linear_cross_entropy_and_correct,
    token_log_probs_and_correct,
)
from tunesmith.types import IGNORE, LossTerms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.types import Batch


class SampleLosses(NamedTuple):
    """What each sample of a batch adds to the loss."""

    nats: Tensor
    """(samples,) float32: its summed loss."""
    tokens: Tensor
    """(samples,) int64: its supervised tokens."""


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
        if "supervised_positions" not in batch:
            batch = self.prepared(batch)
        positions, targets = batch["supervised_positions"], batch["supervised_targets"]
        total, correct = linear_cross_entropy_and_correct(
            parts.hidden_states(batch).flatten(0, 1).index_select(0, positions),
            parts.weight,
            targets,
            bias=parts.scaled_bias(),
            softcap=parts.softcap,
            all_supervised=True,
        )
        return LossTerms(total, len(targets), {"accuracy": correct.to(total.dtype)})

    def prepared(self, batch: Batch) -> Batch:
        """Return `batch` with where its supervised positions are: finding them waits for a GPU."""
        targets = next_tokens(batch).flatten()
        positions = (targets != IGNORE).nonzero().squeeze(-1)
        found = {"supervised_positions": positions, "supervised_targets": targets[positions]}
        return batch | found

    def loss_by_sample(
        self, model: PreTrainedModel, batch: Batch
    ) -> tuple[LossTerms, SampleLosses]:
        """Return what `loss` does, and each sample's share of it, in the order of the samples."""
        parts = output_head(model)
        targets = next_tokens(batch)
        log_probs, correct = token_log_probs_and_correct(
            parts.hidden_states(batch).flatten(0, 1),
            parts.weight,
            targets.flatten(),
            bias=parts.scaled_bias(),
            softcap=parts.softcap,
        )
        nats = _by_sample(-log_probs.view_as(targets), batch)
        tokens = _by_sample(targets != IGNORE, batch)
        metrics = {"accuracy": correct.to(nats.dtype)}
        return LossTerms(nats.sum(), int(tokens.sum()), metrics), SampleLosses(nats, tokens)

    def count(self, batch: Batch) -> int:
        """Return the number of tokens that `loss` sums over."""
        return int((next_tokens(batch) != IGNORE).sum())


def _by_sample(values: Tensor, batch: Batch) -> Tensor:
    """Return the sums over each sample, (samples,), of values (batch, length)."""
    if "cu_seq_lens_q" not in batch:
        return values.sum(dim=1)
    inner = batch["cu_seq_lens_q"][1:-1].cpu()  # where tensor_split wants it
    return torch.stack([part.sum() for part in values.flatten().tensor_split(inner.long())])


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
