"""The few shapes that rooms hand to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

IGNORE: Final = -100
"""Label of a position that is not supervised (the value PyTorch's cross-entropy skips)."""
LOWER_IS_BETTER: Final = frozenset(
    {"loss", "perplexity", "mse", "divergence", "absolute_error", "calibration_error"}
)
"""Metrics of which less is better; of all others, more is, or neither."""

Batch: TypeAlias = dict[str, Any]
"""What a collator makes of rows and a model's forward takes, plus `labels`.

Keys for token objectives, all int64 unless said:
  input_ids, labels, position_ids: (batch, length); `labels[b, t]` is `input_ids[b, t]` where
    supervised, else IGNORE (the shift by one happens in the loss).
  Padded batches: attention_mask (batch, length), 1 = real token.
  Encoder-decoders: input_ids and attention_mask are of what is read (batch, read length), and
    decoder_input_ids and labels of what is written (batch, written length); `labels[b, t]` is what
    position t has to predict, IGNORE behind the end.
  Padding-free batches (batch = 1, segments side by side): cu_seq_lens_q and cu_seq_lens_k
    (segments + 1,) int32 on the CPU, max_length_q and max_length_k int; no attention_mask.

For classification `labels` are of texts: (texts,) int64, (texts, classes) float32 where a text has
  several, (texts,) float32 for a regression; or of tokens, (batch, length) int64, else IGNORE.
  token_type_ids (batch, length) int64 where the tokenizer tells two texts apart;
  class_weights (classes,) float32 where classes are weighted.

For judged replies each sequence (row or segment) is a prompt with one reply, and beside them are:
  winners, losers: (pairs,) int64, of each pair the better and the worse sequence;
  margins: (pairs,) float32, the difference of their scores, 0 where there are none;
  pair_weights: (pairs,) float32, 1 over the pairs of the same prompt;
  matched, mismatched: (replies,) int64, labelled sequences, and each one's prompt with the reply
    of another row; good: (replies,) bool;
  scores: (replies,) float32, of a single reply each;
  step_sequences, step_positions: (steps,) int64, the sequence of each step's last token and its
    place there; step_labels: (steps,) float32;
  reference: (sequences,) float32, log p of each reply under the frozen model;
  z0: () float32, KTO's reference point, where more replies than the batch's speak for it.
"""

PAIR_KEYS: Final = frozenset(
    {
        "winners",
        "losers",
        "margins",
        "pair_weights",
        "matched",
        "mismatched",
        "good",
        "scores",
        "step_sequences",
        "step_positions",
        "step_labels",
        "reference",
        "z0",
        "teacher",
    }
)
"""What a batch of judged replies, or of a distillation, has besides the model's inputs."""

HEAD_ONLY: Final = frozenset(
    {
        "labels",
        "supervised_positions",
        "supervised_targets",
        "teacher_tokens",
        "teacher_log_probs",
        "teacher_vocab",
    }
)
"""Parts of a batch that the model's backbone does not see: what its head is asked for.

An objective may find, on the CPU, where the supervised positions are, so that nobody waits for a
GPU to say it: supervised_positions (n,) int64 into the flattened (batch * length) positions, and
supervised_targets (n,) int64, what each has to predict.

A distillation whose teacher's word was kept has it at these n positions, in their order:
teacher_tokens (n, k) int32, the teacher's k likeliest tokens; teacher_log_probs (n, k + 1) float32,
log p of each and of all others together ((n, k) where there are no others); teacher_vocab int, how
many tokens p is over."""

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


class LossTerms(NamedTuple):
    """Sum, count, divide once: what an objective makes of a batch."""

    total: Tensor
    """() float32: the loss summed over this batch, not yet divided."""
    # Hides tuple.count, which nobody asks of a loss; pytrees (FSDP) know named tuples only.
    count: float  # type: ignore[assignment]
    """What `total` is divided by, summed over the whole effective batch (supervised tokens, texts,
    or the weights of texts)."""
    metrics: dict[str, Tensor]
    """Further sums over the batch, detached, divided by the same count when reported."""


class Proof(NamedTuple):
    """One check of a run: what was claimed, whether it holds, and what was seen."""

    name: str
    passed: bool
    detail: str


R = TypeVar("R")


class RowStream(Protocol[R]):
    """An endless, resumable order of rows: epoch after epoch, each in its own order.

    Every process asks for the same global rows and keeps its share, so the order does not depend
    on the number of processes, the micro-batch or the accumulation.
    """

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows in one epoch, or None where the source streams and nobody knows."""

    @property
    def epoch(self) -> float:
        """Epochs taken so far, with the fraction where `rows_per_epoch` is known."""

    def take(self, count: int) -> list[R]:
        """Return the next `count` rows, going on into the next epoch where one ends."""

    def state_dict(self) -> dict[str, JSON]:
        """Return all that decides the rows to come."""

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        """Go to the place where `state` was taken."""


Collate: TypeAlias = Callable[[list[R]], Batch]
