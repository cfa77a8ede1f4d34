"""Rows that are put before every segment of a packed batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Grown(NamedTuple):
    """Where everything goes in the longer sequence."""

    tokens: Tensor
    """Places of the tokens (length,) int64."""
    rows: Tensor
    """Places of the added rows (segments x count,) int64."""


def grown_places(inputs: dict[str, Any], embeds: Tensor, count: int) -> Grown:
    """Return the places in the longer sequence: the rows go before every segment."""
    length, device = embeds.shape[1], embeds.device
    starts = inputs["cu_seq_lens_q"][:-1].to("cpu", torch.int64)
    segment = torch.bucketize(torch.arange(length), starts, right=True)
    tokens = torch.arange(length) + segment * count
    first = starts + torch.arange(len(starts)) * count
    rows = (first[:, None] + torch.arange(count)).flatten()
    return Grown(tokens.to(device), rows.to(device))


def with_rows(inputs: dict[str, Any], embeds: Tensor, rows: Tensor, grown: Grown) -> dict[str, Any]:
    """Return the arguments that change when the rows come in before every segment.

    The mask is not among them: attention looks at the bounds of segments and at no mask.
    """
    batch, length, width = embeds.shape
    count = rows.shape[0]
    segments = len(grown.rows) // count
    total = length + len(grown.rows)
    whole = embeds.new_zeros(batch, total, width).index_copy(1, grown.tokens, embeds)
    prompt = rows.repeat(segments, 1).expand(batch, -1, -1)
    changed: dict[str, Any] = {
        "input_ids": None,
        "inputs_embeds": whole.index_copy(1, grown.rows, prompt),
    }
    if (positions := inputs.get("position_ids")) is not None:
        # The rows begin where their segment began, which goes on after them.
        starts = grown.rows[::count] - count * torch.arange(segments, device=positions.device)
        own = torch.arange(count, dtype=positions.dtype, device=positions.device)
        before = positions.index_select(1, starts)[..., None] + own
        longer = positions.new_zeros(len(positions), total)
        longer = longer.index_copy(1, grown.tokens, positions + count)
        changed["position_ids"] = longer.index_copy(1, grown.rows, before.flatten(1))
    if (kinds := inputs.get("token_type_ids")) is not None:
        longer = kinds.new_zeros(len(kinds), total)
        changed["token_type_ids"] = longer.index_copy(1, grown.tokens, kinds)
    for side in ("q", "k"):
        if (bounds := inputs.get(f"cu_seq_lens_{side}")) is not None:
            changed[f"cu_seq_lens_{side}"] = bounds + count * torch.arange(
                len(bounds), dtype=bounds.dtype, device=bounds.device
            )
            changed[f"max_length_{side}"] = inputs[f"max_length_{side}"] + count
    return changed
