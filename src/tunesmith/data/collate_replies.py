"""Replies that were sampled, with a number or more for each of their tokens, to batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tunesmith.data.collate import Collator
from tunesmith.data.rows import TokenRow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tunesmith.types import Batch


@dataclass(frozen=True, eq=False)
class ReplyRow:
    """A prompt and its reply, whose tokens are the supervised ones."""

    row: TokenRow
    values: Mapping[str, NDArray[np.float32]]
    """By name, (reply tokens,) float32 each."""
    texts: tuple[TokenRow, ...] = ()
    """Learned from beside it."""
    text_scale: float | None = None
    """See `tunesmith.objectives.replies`; none where no texts are learned from."""

    @property
    def tokens(self) -> int:
        """Tokens of the reply."""
        return int(self.row.supervised.sum())


def reply_row(prompt: list[int], reply: list[int]) -> ReplyRow:
    """Return a prompt and its reply, without values."""
    ids = np.array([*prompt, *reply], dtype=np.int32)
    supervised = np.arange(len(ids)) >= len(prompt)
    return ReplyRow(TokenRow(ids, supervised, (len(ids),)), {})


class ReplyCollator:
    """Makes a batch of replies: the usual one, and beside it what `objectives.replies` says."""

    def __init__(self, pad_token_id: int, padding: Literal["free", "right"]) -> None:
        self.plain = Collator(pad_token_id, padding)
        self.padding = padding

    def __call__(self, rows: list[Any]) -> Batch:  # beside collators of other rows
        """Return the batch of `rows`, each a `ReplyRow`, all with the same values."""
        batch = self.plain([row.row for row in rows])
        lengths = torch.tensor([row.tokens for row in rows])
        batch["replies"] = len(rows)
        batch["reply"] = torch.arange(len(rows)).repeat_interleave(lengths)
        for name in rows[0].values:
            batch[name] = torch.from_numpy(np.concatenate([row.values[name] for row in rows]))
        if rows[0].text_scale is not None:
            batch["text_scale"] = rows[0].text_scale
        if texts := [text for row in rows for text in row.texts]:
            batch["texts"] = self.plain(texts)
        return batch
