"""Token after token with a cache that grows."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import Cache, PreTrainedModel

    from tunesmith.rollout.draw import Drawing, Drawn


class Decoder(Protocol):
    """A batch of rows on its way; made with its prompts, after which the first token is drawn."""

    drawn: Drawn
    """Of the newest step, for the rows that are still there."""

    def advance(self) -> Drawn:
        """Append the tokens of the newest step, draw the next ones and return them."""

    def keep(self, rows: Tensor) -> bool:
        """Go on with `rows` (kept,) int64 alone, and return whether that is possible."""


class Padded:
    """Prompts as a batch, padded on the left, (rows, length) int64."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        pad_token_id: int,
        device: torch.device,
    ) -> None:
        length = max(map(len, prompts))
        ids = [[pad_token_id] * (length - len(p)) + list(p) for p in prompts]
        mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
        self.ids = torch.tensor(ids, device=device)
        self.mask = torch.tensor(mask, device=device)
        self.seeds = torch.tensor(list(seeds), dtype=torch.int64, device=device)
        self._prompts = [tuple(prompt) for prompt in prompts]

    @property
    def positions(self) -> Tensor:
        """Place of each token in its row's own text, (rows, length) int64; 0 in padding."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def different(self) -> tuple[Tensor, Tensor]:
        """Return the first row of each prompt (prompts,), and of which of those each row is."""
        numbers: dict[tuple[int, ...], int] = {}
        of = [numbers.setdefault(prompt, len(numbers)) for prompt in self._prompts]
        firsts = [of.index(number) for number in numbers.values()]
        return torch.tensor(firsts, device=self.ids.device), torch.tensor(
            of, device=self.ids.device
        )


class GrowingDecoder:
    """Any causal language model: every step appends to the cache; finished rows can leave."""

    def __init__(self, model: PreTrainedModel, drawing: Drawing, rows: Padded) -> None:
        self._model, self._drawing = model, drawing
        self._seeds, self._mask = rows.seeds, rows.mask
        self._step = torch.zeros((), dtype=torch.int64, device=rows.ids.device)
        self._cache: Cache | None = None
        with dense_head(model):
            self.drawn = self._forward(rows.ids, rows.positions)
        self._position = rows.positions[:, -1:]

    def advance(self) -> Drawn:
        """Append the tokens of the newest step, draw the next ones and return them."""
        self._step += 1
        self._position = self._position + 1
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        self.drawn = self._forward(self.drawn.tokens[:, None], self._position)
        return self.drawn

    def keep(self, rows: Tensor) -> bool:
        """Go on with `rows` alone."""
        if self._cache is not None:
            self._cache.batch_select_indices(rows)
        self._mask, self._seeds = self._mask[rows], self._seeds[rows]
        self._position = self._position[rows]
        self.drawn = type(self.drawn)(*(value[rows] for value in self.drawn))
        return True

    def keys_and_values(self) -> list[Tensor]:
        """Return what is kept of the tokens that were read, two tensors a layer."""
        layers = [] if self._cache is None else self._cache.layers
        kept = [layer for layer in layers if isinstance(layer, DynamicLayer)]
        return [tensor for layer in kept for tensor in (layer.keys, layer.values)]

    def _forward(self, ids: Tensor, positions: Tensor) -> Drawn:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **({"position_ids": positions} if takes_positions(self._model) else {}),
        )
        self._cache = output.past_key_values
        return self._drawing(output.logits[:, -1], self._seeds, self._step)


@contextmanager
def dense_head(model: PreTrainedModel) -> Iterator[None]:
    """Lay the states that the head reads side by side, inside a `with` block.

    They are a slice of those of whole prompts, of which PyTorch would make a product for each row,
    and for each a copy of the head's weight.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    try:
        yield
    finally:
        handle.remove()


def takes_positions(model: PreTrainedModel) -> bool:
    """Return whether the model's forward is told the place of each token."""
    return "position_ids" in inspect.signature(model.forward).parameters
