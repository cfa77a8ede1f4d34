"""The policy's view of replies in a batch, and sums over tokens and over replies.

A batch of replies is a batch of `tunesmith.types.Batch` whose labels are the replies' tokens, with,
for each of these in row-major order, (tokens,): `reply`, int64, whose it is, counted from 0 in the
batch, and what else the objective needs. `replies` is their number. Where texts are learned from
beside them, `texts` is a batch of these, absent where this batch has none, and `text_scale` is what
the sum of their nats is multiplied by, so that it is a mean once it is divided like the replies'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from tunesmith.models.output_head import output_head
from tunesmith.objectives.sft import next_tokens
from tunesmith.ops.linear_cross_entropy import token_log_probs, token_log_probs_and_entropy
from tunesmith.types import IGNORE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.types import Batch

OF_REPLIES: Final = frozenset(
    {
        "replies",
        "reply",
        "old_log_probs",
        "reference_log_probs",
        "advantages",
        "returns",
        "old_values",
        "texts",
        "text_scale",
    }
)
"""What a batch holds besides the model's inputs."""


class Policy(NamedTuple):
    """What the model makes of the replies' tokens."""

    log_probs: Tensor
    """(tokens,) float32: log p of each token at temperature 1, in nats."""
    entropy: Tensor | None
    """(tokens,) float32: of the distribution that it was drawn from, where asked for."""
    hidden: Tensor
    """(tokens, width): the state that predicted it."""


def model_inputs(batch: Batch) -> Batch:
    """Return the batch without what only objectives read."""
    return {key: value for key, value in batch.items() if key not in OF_REPLIES}


def policy_of(model: PreTrainedModel, batch: Batch, *, entropy: bool = False) -> Policy:
    """Return what `model` makes of the replies in `batch`; the logits never exist whole."""
    head = output_head(model)
    hidden, targets = states_of(model, batch)
    options: dict[str, Any] = {"bias": head.scaled_bias(), "softcap": head.softcap}
    if entropy:
        both = token_log_probs_and_entropy(hidden, head.weight, targets, **options)
        return Policy(both.log_probs, both.entropy, hidden)
    return Policy(token_log_probs(hidden, head.weight, targets, **options), None, hidden)


def states_of(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the states that predict the replies' tokens, (tokens, width), and those tokens."""
    targets = next_tokens(batch)
    chosen = targets != IGNORE
    return output_head(model).hidden_states(model_inputs(batch))[chosen], targets[chosen]


def by_reply(values: Tensor, batch: Batch) -> Tensor:
    """Return the sum of `values` (tokens,) over each reply, (replies,)."""
    return values.new_zeros(batch["replies"]).index_add(0, batch["reply"], values)


def reply_weights(batch: Batch) -> Tensor:
    """Return 1 / tokens of its reply for each token, (tokens,) float32."""
    reply: Tensor = batch["reply"]
    lengths = by_reply(torch.ones_like(reply, dtype=torch.float32), batch)
    return 1.0 / lengths[reply]


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """Return k3 of KL(old || new) at tokens that the old policy drew: r - 1 - log r >= 0."""
    return torch.expm1(log_ratio) - log_ratio
