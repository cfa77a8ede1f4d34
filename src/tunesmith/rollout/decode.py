"""Token after token with a cache: one that grows, or one of a fixed size in a CUDA graph."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer

from tunesmith.models.context import TakesPositions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.rollout.draw import Drawing, Drawn

FIXED_CACHE: Final = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "granite", "phi3", "gpt2"}
)
"""Model types whose forward is known to do the same with a cache of fixed size."""
_COLUMNS: Final = 128
"""By which the visible part of a fixed cache grows: a graph each, none reads much emptiness."""


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

    @property
    def positions(self) -> Tensor:
        """Place of each token in its row's own text, (rows, length) int64; 0 in padding."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)


class GrowingDecoder:
    """Any causal language model: every step appends to the cache; finished rows can leave."""

    def __init__(self, model: PreTrainedModel, drawing: Drawing, rows: Padded) -> None:
        self._model, self._drawing = model, drawing
        self._seeds, self._mask = rows.seeds, rows.mask
        self._step = torch.zeros((), dtype=torch.int64, device=rows.ids.device)
        self._cache: Cache | None = None
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


class _VisibleLayer(StaticLayer):
    """A layer's keys and values of a fixed size, of which attention reads the first part only."""

    visible: int

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values behind the others, and return what is visible."""
        keys, values = super().update(*args, **kwargs)
        return keys[:, :, : self.visible], values[:, :, : self.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns the mask has, and the first one."""
        del query_length
        return self.visible, 0


class FixedDecoder:
    """Models of `FIXED_CACHE`: nothing changes its size or place, so a step is one CUDA graph.

    The visible part of the cache grows by `_COLUMNS`, with a graph each: attention would otherwise
    read the empty places of the whole cache in every step.
    """

    def __init__(
        self, model: PreTrainedModel, drawing: Drawing, rows: Padded, *, room: int, graphs: bool
    ) -> None:
        count, length = rows.ids.shape
        device = rows.ids.device
        self._model, self._drawing, self._seeds = model, drawing, rows.seeds
        columns = -(-(length + room) // _COLUMNS) * _COLUMNS
        layers = model.config.get_text_config().num_hidden_layers
        self._layers = [_VisibleLayer(max_cache_len=columns) for _ in range(layers)]
        self._cache = Cache(layers=list(self._layers))
        self._used = length
        self._see(length)
        output = model(
            input_ids=rows.ids,
            attention_mask=rows.mask,
            position_ids=rows.positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self.drawn = drawing(output.logits[:, -1], rows.seeds, self._step)
        # What a graph reads and writes, always at the same place in memory.
        self._mask = torch.zeros(count, 1, 1, columns, dtype=torch.bool, device=device)
        self._mask[:, 0, 0, :length] = rows.mask.bool()
        self._column = torch.full((1,), length, dtype=torch.int64, device=device)
        self._position = rows.positions[:, -1:].clone()
        self._tokens, self._log_probs = (value.clone() for value in self.drawn)
        self._graphs: dict[int, torch.cuda.CUDAGraph] | None = {} if graphs else None

    def advance(self) -> Drawn:
        """Append the tokens of the newest step, draw the next ones and return them."""
        self._used += 1
        visible = self._see(self._used)
        if self._graphs is None:
            self._advance()
        else:
            if visible not in self._graphs:
                self._graphs[visible] = self._captured()
            self._graphs[visible].replay()
        # Copies: the next replay writes to the same place.
        self.drawn = type(self.drawn)(self._tokens.clone(), self._log_probs.clone())
        return self.drawn

    def keep(self, rows: Tensor) -> bool:
        """Return False: all rows stay, since the graph is of their number."""
        del rows
        return False

    def _see(self, columns: int) -> int:
        visible = -(-columns // _COLUMNS) * _COLUMNS
        for layer in self._layers:
            layer.visible = visible
        return visible

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Return a step as a graph; capturing runs nothing, but libraries must be warm."""
        if not self._graphs:
            self._warm_up()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self._advance()
        return graph

    def _warm_up(self) -> None:
        """Take the step beside the main stream, and put back all that it changed."""
        state = [self._step, self._column, self._position, self._mask, self._tokens]
        state += [self._log_probs, *(layer.cumulative_length for layer in self._layers)]
        before = [tensor.clone() for tensor in state]
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self._advance()
        torch.cuda.current_stream().wait_stream(beside)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    def _advance(self) -> None:
        self._step += 1
        self._position += 1
        self._mask.index_fill_(3, self._column, True)
        output = self._model(
            input_ids=self._tokens[:, None],
            attention_mask=self._mask[..., : self._layers[0].visible],
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        drawn = self._drawing(output.logits[:, -1], self._seeds, self._step)
        self._tokens.copy_(drawn.tokens)
        self._log_probs.copy_(drawn.log_probs)
        self._column += 1


def takes_positions(model: PreTrainedModel) -> bool:
    """Return whether the model's forward is told the place of each token."""
    return "position_ids" in inspect.signature(model.forward).parameters


def fixed_cache_serves(model: PreTrainedModel) -> bool:
    """Return whether `FixedDecoder` does what `GrowingDecoder` does on this model as it is now.

    A sliding window, and a method that stands before the text, count columns in their own way.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    before = any(isinstance(x, TakesPositions) and x.enabled for x in model.modules())
    masks = config._attn_implementation in {"sdpa", "eager", "tunesmith"}
    own = config.model_type in FIXED_CACHE and kinds == {"full_attention"}
    return own and masks and not slides and not before
