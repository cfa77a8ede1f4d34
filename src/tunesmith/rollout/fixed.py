"""Token after token with a cache of fixed size: on CUDA the whole step is one graph."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer

from tunesmith.models.context import TakesPositions
from tunesmith.models.quantize_linear import multiplies_in_float8
from tunesmith.ops.torch_errors import is_of_compiler
from tunesmith.rollout.compiled import CompiledDrawing, compiled_blocks
from tunesmith.rollout.decode import dense_head

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.rollout.decode import Padded
    from tunesmith.rollout.draw import Drawing, Drawn

logger = logging.getLogger(__name__)

FIXED_CACHE: Final = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "granite", "phi3", "gpt2"}
)
"""Model types whose forward is known to do the same with a cache of fixed size."""
_COLUMNS: Final = 128
"""The cache's size is a multiple of this, so that there are few of them to compile for."""


class FixedLayer(StaticLayer):
    """A layer's keys and values of a fixed size, written wherever `place` says.

    Args:
        columns: how many tokens a row has room for.
        place: (1,) int64: the column of the newest token, for all layers.
        of: (rows,) int64: which of the different prompts each row has.
    """

    is_initialized: bool

    def __init__(self, columns: int, place: Tensor, of: Tensor) -> None:
        super().__init__(max_cache_len=columns)
        self.place = place
        self._of = of

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the prompts' keys and values, or write the newest token's and return all.

        Args:
            key_states: (rows, kv_heads, length, head_dim).
            value_states: as `key_states`.
            args: the layer's number, of which this has no need.
            kwargs: what else transformers says.
        """
        del args, kwargs
        if not self.is_initialized:
            # The prompts see each other alone, without the room behind them.
            self.keys, self.values = self._with_room(key_states), self._with_room(value_states)
            self.is_initialized = True
            return key_states, value_states
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def _with_room(self, states: Tensor) -> Tensor:
        _, heads, length, width = states.shape
        all_of_them = states.new_zeros(len(self._of), heads, self.max_cache_len, width)
        all_of_them[:, :, :length] = states[self._of]
        return all_of_them

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns the prompts' mask has, and the first one."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: positions and masks are given, and nothing asks for more than the prompts."""
        return 0


class FixedDecoder:
    """Models of `FIXED_CACHE`: nothing changes its size or its place in memory.

    Empty columns are left out by the mask, so one graph serves all steps.

    Args:
        model: in eval mode.
        drawing: how tokens are chosen.
        rows: the prompts.
        room: longest reply.
        graphs: take the step as a CUDA graph.
        compiled: compile the blocks, and the drawing, for the step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drawing: Drawing,
        rows: Padded,
        *,
        room: int,
        graphs: bool,
        compiled: bool = False,
    ) -> None:
        count, length = rows.ids.shape
        device = rows.ids.device
        self._model, self._seeds, self._graphs = model, rows.seeds, graphs
        # Float8 products in a compiled step of decoding have not been tried.
        self._compiled = compiled and not multiplies_in_float8(model)
        self._drawing = drawing
        self._draw: CompiledDrawing | Drawing = (
            CompiledDrawing(drawing) if self._compiled else drawing
        )
        columns = -(-(length + room) // _COLUMNS) * _COLUMNS
        # A prompt of several rows is read once.
        firsts, of = rows.different()
        # What a step reads and writes, always at the same place in memory.
        self._column = torch.full((1,), length - 1, dtype=torch.int64, device=device)
        layers = model.config.get_text_config().num_hidden_layers
        self._layers = [FixedLayer(columns, self._column, of) for _ in range(layers)]
        self._cache = Cache(layers=list(self._layers))
        with dense_head(model):
            output = model(
                input_ids=rows.ids[firsts],
                attention_mask=rows.mask[firsts],
                position_ids=rows.positions[firsts],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._mask = torch.zeros(count, 1, 1, columns, dtype=torch.bool, device=device)
        self._mask[:, 0, 0, :length] = rows.mask.bool()
        self._position = rows.positions[:, -1:].clone()
        self.drawn = drawing(output.logits[:, -1][of], rows.seeds, self._step)
        self._tokens, self._log_probs = (value.clone() for value in self.drawn)
        self._take: Callable[[], None] | None = None

    def advance(self) -> Drawn:
        """Append the tokens of the newest step, draw the next ones and return them."""
        if self._take is None:
            self._take = self._prepared()
        self._take()
        # Copies: the next step writes to the same place.
        self.drawn = type(self.drawn)(self._tokens.clone(), self._log_probs.clone())
        return self.drawn

    def keep(self, rows: Tensor) -> bool:
        """Return False: all rows stay, since the graph is of their number."""
        del rows
        return False

    def keys_and_values(self) -> list[Tensor]:
        """Return what tokens are kept in, two tensors a layer."""
        return [tensor for layer in self._layers for tensor in (layer.keys, layer.values)]

    def _prepared(self) -> Callable[[], None]:
        """Return what takes a step."""
        if self._compiled and not self._compiles():
            self._compiled, self._draw = False, self._drawing
        if not self._graphs:
            return self._step_once
        if not self._compiled:
            self._try_out()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step_once()
        return graph.replay

    def _compiles(self) -> bool:
        try:
            self._try_out()
        except Exception as error:
            if not is_of_compiler(error):
                raise
            said = next(iter(str(error).splitlines()), "")
            logger.warning("roll-outs: a step is not compiled and runs as it is: %s", said)
            return False
        return True

    def _try_out(self) -> None:
        """Take the step, and put back all that it changed: what is built on the way is then there.

        Beside the main stream, as PyTorch asks for before a capture. What it wrote to the cache,
        the first step writes again.
        """
        state = [self._step, self._column, self._position, self._mask]
        state += [self._tokens, self._log_probs]
        before = [tensor.clone() for tensor in state]
        try:
            with _beside(self._tokens.device):
                self._step_once()
        finally:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

    def _step_once(self) -> None:
        if not self._compiled:
            self._advance()
            return
        with compiled_blocks(self._model, self._cache, self._layers):
            self._advance()

    def _advance(self) -> None:
        self._step += 1
        self._column += 1
        self._position += 1
        self._mask.index_fill_(3, self._column, True)
        output = self._model(
            input_ids=self._tokens[:, None],
            attention_mask=self._mask,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        drawn = self._draw(output.logits[:, -1], self._seeds, self._step)
        self._tokens.copy_(drawn.tokens)
        self._log_probs.copy_(drawn.log_probs)


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Work on a stream of its own inside a `with` block, where the device has streams."""
    if device.type != "cuda":
        yield
        return
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        yield
    torch.cuda.current_stream().wait_stream(beside)


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
