"""Gradient checkpointing of a block: what is computed again in the backward pass, what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tunesmith.engine.host_copies import HostCopies

if TYPE_CHECKING:
    from torch import nn

Mode = Literal["selective", "attention", "full", "offload"]
Recompute: TypeAlias = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]
"""Runs call(*args, **kwargs) and arranges what its backward pass finds."""

ATTENTION: Final = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
    }
)
"""Operations that are attention as a whole, whose time grows with the square of the length."""
PRODUCTS: Final = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_mm",
        "aten::_grouped_mm",
        "tunesmith::scaled_product",
    }
)
"""Matrix products; with attention, the operations whose results cost most to compute twice."""


def recompute_of(mode: Mode) -> Recompute:
    """Return what runs a block so that its backward pass recomputes as `mode` says.

    All give the gradients that keeping everything gives (Chen et al. 2016, arXiv:1604.06174):
    full keeps the block's input, offload keeps it in the host's memory, attention keeps besides
    what attention returns, and selective what matrix products and attention return (Korthikanti et
    al. 2022, arXiv:2205.05198).
    """
    if mode == "offload":
        return offloaded(HostCopies())
    if mode == "full":
        return _full
    return partial(_keeping, ATTENTION if mode == "attention" else ATTENTION | PRODUCTS)


def _full(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return checkpoint(partial(call, **kwargs), *args, use_reentrant=False)


def _keeping(
    kept: frozenset[str], call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    return checkpoint(partial(call, **kwargs), *args, use_reentrant=False, context_fn=contexts)


def _policy(
    kept: frozenset[str], context: Any, operation: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    del context
    keep = operation.name().partition(".")[0] in kept and not _drops(operation, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _drops(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether attention drops weights: left out, it leaves its numbers to later dropout."""
    names = [argument.name for argument in operation._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p"))


def offloaded(copies: HostCopies) -> Recompute:
    """Return what keeps a block's first argument, its hidden states, in `copies` meanwhile."""

    def run(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            return _full(call, args, kwargs)
        hidden, *others = args
        away = copies.send(hidden)
        first = [hidden]
        del args

        def body(place: Tensor) -> Any:
            del place
            # The forward pass takes the tensor itself, and lets it go; the second time the copy.
            return call(first.pop() if first else away.fetch(), *others, **kwargs)

        # An argument on the device makes checkpoint keep that device's random state.
        return checkpoint(body, hidden.new_empty(0), use_reentrant=False)

    return run


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Leave the cache of keys and values off: training has no use for it.

    What fills a cache can neither be computed twice nor be one graph, and transformers says so at
    every start where its default, which even encoders have, is left on.
    """
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    if cached:
        config.use_cache = False
    try:
        yield
    finally:
        if cached:
            config.use_cache = cached
