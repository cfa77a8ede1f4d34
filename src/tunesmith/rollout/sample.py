"""Replies to learn from: sampled in batches, with the log-probability of each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np
import torch

from tunesmith.errors import ModelError
from tunesmith.models.context import context_length
from tunesmith.models.modes import evaluating, prepared
from tunesmith.rollout.decode import GrowingDecoder, Padded
from tunesmith.rollout.draw import Drawing
from tunesmith.rollout.fixed import FixedDecoder, fixed_cache_serves
from tunesmith.rollout.generate import require_room

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from tunesmith.rollout.decode import Decoder

Decoding = Literal["auto", "growing", "fixed"]
_LOOK_EVERY: Final = 16
"""Steps between two looks at what has ended, for each of which the host waits for the device."""
_PLAIN: Final = Drawing()


class Reply(NamedTuple):
    """What the model wrote to one prompt."""

    tokens: list[int]
    """With the token that ended it; at least one."""
    log_probs: list[float]
    """Of each token at temperature 1, in nats, as the sampling forward computed it."""
    ended: bool
    """Whether it ended by itself, and not because it was full."""


@dataclass(frozen=True)
class Stops:
    """What ends a reply."""

    tokens: frozenset[int] = frozenset()
    """Any of these; it is the reply's last token."""
    strings: tuple[str, ...] = ()
    """Any of these within the reply's text; the token that completes it is the reply's last."""
    text: Callable[[Sequence[int]], str] | None = None
    """What tokens say; needed for `strings`."""

    def end_of(self, tokens: Sequence[int]) -> int | None:
        """Return how many of `tokens` are the reply's, or None where it goes on after them."""
        ends = [place + 1 for place, token in enumerate(tokens) if token in self.tokens][:1]
        if self.strings and self._said(tokens):
            # The text grows as a whole: a token may be written differently after others.
            low, high = 1, len(tokens)
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self._said(tokens[:middle]) else (middle + 1, high)
            ends.append(low)
        return min(ends, default=None)

    def may_end(self, new: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return in which rows of `new` (rows, tokens) `end_of` may find something, (rows,)."""
        if self.strings:
            return np.ones(len(new), np.bool_)
        return np.asarray(np.isin(new, list(self.tokens)).any(axis=1))

    def _said(self, tokens: Sequence[int]) -> bool:
        assert self.text is not None  # noqa: S101 - whoever gives strings gives this
        said = self.text(tokens)
        return any(string in said for string in self.strings)


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    stops: Stops,
    pad_token_id: int,
    drawing: Drawing = _PLAIN,
    batch_size: int = 64,
    decoding: Decoding = "auto",
    compiled: bool = False,
) -> list[Reply]:
    """Return a reply to each prompt, in the given order.

    A row's noise comes from its own seed, so the same model, prompt and seed give the same reply
    whichever rows share the batch, in whichever order. (A forward over a batch of another shape
    rounds otherwise, which can change a token where a number lies on the very border of two.) The
    model's mode and all random generators stay as they are.

    Args:
        model: a causal language model, with or without methods attached.
        prompts: token ids, at least one each.
        seeds: one a prompt, any 64 bits.
        max_new_tokens: longest reply; shorter where the context ends before.
        stops: what ends a reply.
        pad_token_id: stands in padding, and is never looked at.
        drawing: temperature, top_p and top_k.
        batch_size: prompts at once.
        decoding: growing appends to the cache, and finished rows leave the batch; fixed has a
            cache of one size, on CUDA with the whole step as one graph; auto takes the second on
            CUDA where the model allows it.
        compiled: with a fixed cache, compile the step, which takes some seconds the first time.

    Raises:
        DataError: a prompt is empty or leaves no room in the model's context.
        ModelError: an encoder-decoder, or `fixed` on a model that does not allow it.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"roll-outs are sampled from a causal language model; {type(model).__name__} is an "
            "encoder-decoder"
        )
    limit = context_length(model)
    for index, prompt in enumerate(prompts):
        require_room(prompt, limit, name=f"prompt {index}")
    replies: dict[int, Reply] = {}
    with evaluating(model), torch.no_grad(), prepared(model):
        for chosen, room in _batches(prompts, batch_size, max_new_tokens, limit):
            rows = Padded(
                [prompts[index] for index in chosen],
                [seeds[index] for index in chosen],
                pad_token_id=pad_token_id,
                device=model.device,
            )
            fixed = is_fixed(model, decoding, model.device.type)
            decoder: Decoder = (
                FixedDecoder(
                    model,
                    drawing,
                    rows,
                    room=room,
                    graphs=model.device.type == "cuda",
                    compiled=compiled,
                )
                if fixed
                else GrowingDecoder(model, drawing, rows)
            )
            replies |= zip(chosen, _written(decoder, len(chosen), room, stops), strict=True)
    return [replies[index] for index in range(len(prompts))]


def _batches(
    prompts: Sequence[Sequence[int]], batch_size: int, max_new_tokens: int, limit: int | None
) -> Iterator[tuple[list[int], int]]:
    """Give the numbers of the prompts that share a batch, and the tokens that each has room for.

    Prompts of like length are together, for less padding; and none has less room than alone, which
    would be another reply.
    """

    def room(index: int) -> int:
        left = max_new_tokens if limit is None else limit - len(prompts[index])
        return min(max_new_tokens, left)

    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for tokens, alike in groupby(order, key=room):
        members = list(alike)
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size], tokens


def is_fixed(model: PreTrainedModel, decoding: Decoding, device: str) -> bool:
    """Return whether the cache is of fixed size where `model` writes on such a device.

    Raises:
        ModelError: `fixed` is asked for on a model that does not allow it.
    """
    serves = fixed_cache_serves(model)
    if decoding == "fixed" and not serves:
        raise ModelError(
            f"decoding: fixed is not for {type(model).__name__} with these methods; use auto"
        )
    return decoding == "fixed" or (decoding == "auto" and device == "cuda" and serves)


def _written(decoder: Decoder, count: int, room: int, stops: Stops) -> list[Reply]:
    """Return the replies of a batch of `count` rows, at most `room` tokens each."""
    tokens = np.zeros((count, room), np.int64)
    log_probs = np.zeros((count, room), np.float32)
    ends: dict[int, int] = {}
    there, new, seen = np.arange(count), [decoder.drawn], 0
    look_every = 1 if decoder.drawn.tokens.device.type == "cpu" else _LOOK_EVERY
    for step in range(1, room + 1):
        if step % look_every == 0 or step == room:
            tokens[there, seen:step] = torch.stack([x.tokens for x in new], 1).cpu().numpy()
            log_probs[there, seen:step] = torch.stack([x.log_probs for x in new], 1).cpu().numpy()
            for row in there[stops.may_end(tokens[there, seen:step])].tolist():
                end = None if row in ends else stops.end_of(tokens[row, :step].tolist())
                ends |= {} if end is None else {row: end}
            alive = [place for place, row in enumerate(there.tolist()) if row not in ends]
            if not alive:
                break
            # Half of them at least: each departure copies the cache of those that stay.
            if len(alive) <= len(there) // 2:
                kept = torch.tensor(alive, device=decoder.drawn.tokens.device)
                there = there[alive] if decoder.keep(kept) else there
            new, seen = [], step
        if step < room:
            new.append(decoder.advance())
    return [
        Reply(
            tokens[row, : ends.get(row)].tolist(),
            log_probs[row, : ends.get(row)].tolist(),
            row in ends,
        )
        for row in range(count)
    ]
