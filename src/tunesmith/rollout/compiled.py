"""The step of decoding, compiled: one graph for all blocks, and one for drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from tunesmith.models.sites import decoder_blocks
from tunesmith.ops.compile_workers import start_compile_workers

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Cache, PreTrainedModel

    from tunesmith.rollout.draw import Drawing, Drawn

_RECOMPILE_LIMIT: Final = 64
"""Graphs of one piece of code: kinds of block, numbers of rows, sizes of the cache."""


BACKEND = "inductor"
"""PyTorch's compiler; `eager` captures graphs and runs them as they are."""


def _graph_of(function: Callable[..., Any]) -> Callable[..., Any]:
    if BACKEND == "inductor":
        start_compile_workers()
    return torch.compile(function, fullgraph=True, backend=BACKEND)


class _DecodingBlock:
    """What is called in the place of one block: it sees its own layer of the cache alone.

    A block asks the cache for a layer by number, which would be another graph for each.
    """

    def __init__(self, block: nn.Module, cache: Cache, layer: object) -> None:
        self._block, self._cache, self._layer = block, cache, layer
        self._call = _graph_of(_whole)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        own = [self._layer if value is self._cache else value for value in args]
        named = {k: self._layer if v is self._cache else v for k, v in kwargs.items()}
        return self._call(self._block, *own, **named)


def _whole(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a block with its own hooks, which belong into the graph; one code for all blocks."""
    return block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


class CompiledDrawing:
    """A `Drawing` as one graph."""

    def __init__(self, drawing: Drawing) -> None:
        self._drawing = drawing
        self._call = _graph_of(_draw)

    def __call__(self, logits: Tensor, seeds: Tensor, step: Tensor) -> Drawn:
        """Draw a token for each row, see `Drawing`."""
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
            return self._call(self._drawing, logits, seeds, step)


def _draw(drawing: Drawing, logits: Tensor, seeds: Tensor, step: Tensor) -> Drawn:
    return drawing(logits, seeds, step)


@contextmanager
def compiled_blocks(
    model: PreTrainedModel, cache: Cache, layers: Sequence[object]
) -> Iterator[None]:
    """Run the blocks of `model` compiled inside a `with` block, each with its own layer of `cache`.

    Args:
        model: any whose architecture is in the table.
        cache: what the model is called with.
        layers: of the cache, one a block.
    """
    blocks = decoder_blocks(model)
    before = [block._compiled_call_impl for block in blocks]
    with torch._dynamo.config.patch(
        recompile_limit=_RECOMPILE_LIMIT,
        accumulated_recompile_limit=8 * _RECOMPILE_LIMIT,
        skip_nnmodule_hook_guards=False,  # a method may hang on some of the blocks only
    ):
        for block, layer in zip(blocks, layers, strict=True):
            # Where PyTorch's own Module.compile puts a compiled call.
            block._compiled_call_impl = _DecodingBlock(block, cache, layer)
        try:
            yield
        finally:
            for block, call in zip(blocks, before, strict=True):
                block._compiled_call_impl = call
