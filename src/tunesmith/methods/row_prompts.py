"""Prompts before the input where every row of the batch has its own, of its own length.

All rows grow by the longest prompt, behind the padding that is before the text. A shorter one
stands at the right, next to the text, and what is left of it is padding: attention does not see it,
and it takes no position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.errors import MethodError
from tunesmith.methods.after_padding import leading_padding, put_in


class Choice(NamedTuple):
    """Which prompts each row has."""

    chosen: Sequence[Sequence[bool]]
    """By prompt and row. Of several, the later stands first."""
    counts: Sequence[int]
    """Length of each prompt."""

    def lengths(self) -> list[int]:
        """Return how many positions of prompt each row has."""
        rows = zip(*self.chosen, strict=True)
        return [sum(n for n, on in zip(self.counts, row, strict=True) if on) for row in rows]

    def seen(self, device: torch.device) -> Tensor:
        """Return which of the added positions are a prompt, (batch, longest) bool."""
        lengths = torch.tensor(self.lengths(), device=device)
        longest = max(self.lengths())
        return torch.arange(longest, device=device) >= longest - lengths[:, None]

    def aligned(self, prompts: Sequence[Tensor]) -> Tensor:
        """Return each row's prompts (batch, longest, width), with zeros in front.

        Args:
            prompts: (count, width) each.
        """
        longest = max(self.lengths())
        rows = []
        for row in zip(*self.chosen, strict=True):
            own = [P for P, on in zip(prompts, row, strict=True) if on]
            whole = torch.cat([*reversed(own), prompts[0][:0]])
            rows.append(F.pad(whole, (0, 0, longest - len(whole), 0)))
        return torch.stack(rows)


def with_prompts(
    inputs: Mapping[str, Any],
    embeds: Tensor,
    prompts: Tensor,
    seen: Tensor,
    *,
    positions: bool,
    start: int = 0,
) -> dict[str, Any]:
    """Return the arguments that change when the prompts come in.

    Args:
        inputs: what the backbone was called with.
        embeds: of the text (batch, length, width).
        prompts: (batch, longest, width).
        seen: (batch, longest) bool.
        positions: whether the backbone takes position_ids.
        start: the first position of a text where they are not given.
    """
    mask = _mask(inputs, embeds.shape[:2], embeds.device)
    padding = leading_padding(mask)
    changed = {
        "input_ids": None,
        "inputs_embeds": put_in(prompts, embeds, padding),
        "attention_mask": put_in(seen.to(mask.dtype), mask, padding),
    }
    if (kinds := inputs.get("token_type_ids")) is not None:
        kinds = kinds.expand(len(mask), -1)
        changed["token_type_ids"] = put_in(kinds.new_zeros(seen.shape), kinds, padding)
    if positions:
        text = _positions(inputs, mask, start=start)
        # A prefix may have moved the text: the prompt begins where the text began.
        first = text.masked_fill(mask == 0, torch.iinfo(text.dtype).max).amin(1, keepdim=True)
        before = (seen.long().cumsum(1) - 1).clamp(min=0) + first
        after = text + seen.sum(1, keepdim=True)
        changed["position_ids"] = put_in(before, after, padding)
    return changed


def behind_prompts(
    inputs: Mapping[str, Any], new: Tensor, seen: Tensor, *, past: int, positions: bool
) -> dict[str, Any]:
    """Return the arguments that change once the prompts are in the cache.

    Args:
        inputs: what the backbone was called with.
        new: the tokens that come (batch, length, ...).
        seen: (batch, longest) bool.
        past: how much is in the cache, prompts and what pads them among it.
        positions: whether the backbone takes position_ids.
    """
    text = past - seen.shape[1] + new.shape[1]
    mask = _mask(inputs, (new.shape[0], text), new.device)
    changed = {"attention_mask": put_in(seen.to(mask.dtype), mask, leading_padding(mask))}
    if positions:
        own = _positions(inputs, mask)[:, -new.shape[1] :]
        changed["position_ids"] = own + seen.sum(1, keepdim=True)
    return changed


def _mask(inputs: Mapping[str, Any], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the mask over the text (batch, length)."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones(shape, dtype=torch.int64, device=device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise MethodError(
            "rows: prompts of different lengths need an attention mask (batch, length); generate "
            "with the dynamic cache"
        )
    return mask


def _positions(inputs: Mapping[str, Any], mask: Tensor, *, start: int = 0) -> Tensor:
    """Return the positions of the text (batch, length), not counting padding where none given."""
    positions: Tensor | None = inputs.get("position_ids")
    if positions is None:
        return (mask.long().cumsum(1) - 1).clamp(min=0) + start
    return positions.expand(len(mask), -1)
