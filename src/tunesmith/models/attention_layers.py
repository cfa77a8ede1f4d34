"""The attention layers of a model, found by running it and seeing which ones ask for attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.errors import MethodError
from tunesmith.models.attention import NAME, ExtraKeyValues, attention, has_segments
from tunesmith.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.sites import Sites


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer, one a block."""

    path: str
    """Path of the layer in the model."""
    heads: int
    kv_heads: int
    key_dim: int
    """Width of one head's keys (and queries)."""
    value_dim: int
    """Width of one head's values."""
    device: torch.device
    """Where it computes."""


class _Call(NamedTuple):
    """What one attention layer handed to the attention function."""

    layer: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    capped: bool


def attention_layers(model: PreTrainedModel, sites: Sites) -> list[AttentionLayer]:
    """Return the attention layer of every block, from one forward pass over two tokens.

    Raises:
        MethodError: a block's attention does not go through the attention function exactly once,
            or runs another implementation than sdpa, which keys and values could not be added to.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    # A mask of four dimensions is taken as it is, and positions are not computed from it: nothing
    # looks into it, as a model on the meta device could not.
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=ids.device)
    positions = torch.arange(2, device=ids.device)[None]
    calls = _calls(model, ids, attention_mask=mask, position_ids=positions)
    _require_sdpa(model, calls)
    names = {id(module): name for name, module in model.named_modules()}
    found = [(names[id(call.layer)], call) for call in calls]
    layers = []
    for block in sites.blocks:
        inside = [(path, call) for path, call in found if path.startswith(f"{block.path}.")]
        if len(inside) != 1:
            raise MethodError(
                f"method.name: the attention of {block.path} in this {type(model).__name__} asks "
                f"for attention {len(inside)} times where once was expected; {_INSTEAD}"
            )
        path, call = inside[0]
        layers.append(
            AttentionLayer(
                path,
                heads=call.query.shape[1],
                kv_heads=call.key.shape[1],
                key_dim=call.key.shape[3],
                value_dim=call.value.shape[3],
                device=call.query.device,
            )
        )
    return layers


def key_values(model: PreTrainedModel, input_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the keys and values of `input_ids` (1, length) in every attention layer, by its path.

    Keys are as they are compared with queries, so with their positions 0, 1, ... in them.

    Returns:
        Pairs of (kv_heads, length, head_dim), float32.
    """
    names = {id(module): name for name, module in model.named_modules()}
    calls = _calls(model, input_ids.to(model.get_input_embeddings().weight.device))
    return {names[id(call.layer)]: (call.key[0].float(), call.value[0].float()) for call in calls}


_INSTEAD = "methods that add keys and values cannot work on it: use lora or another method"


def _calls(model: PreTrainedModel, input_ids: Tensor, **inputs: Any) -> list[_Call]:
    """Return what the attention layers ask the attention function for in one forward pass."""
    with _recorded(model) as calls, evaluating(model), torch.no_grad():
        model.base_model(input_ids=input_ids, use_cache=False, **inputs)
    return calls


@contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[list[_Call]]:
    """Record the calls of the attention function of `model` inside a `with` block."""
    calls: list[_Call] = []

    def record(  # noqa: PLR0917 - transformers' own signature
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        calls.append(_Call(module, query, key, value, options.get("softcap") is not None))
        return attention(module, query, key, value, attention_mask, **options)

    before = route_attention(model)
    ALL_ATTENTION_FUNCTIONS[NAME] = record
    try:
        yield calls
    finally:
        del ALL_ATTENTION_FUNCTIONS[NAME]
        model.set_attn_implementation(before)


def _require_sdpa(model: PreTrainedModel, calls: list[_Call]) -> None:
    """Raise MethodError where the attention "tunesmith" would not compute the model's own bits."""
    own = model.config._attn_implementation
    if own in {NAME, "sdpa"} or (own == "eager" and all(call.capped for call in calls)):
        return
    raise MethodError(
        f"model.attention: this model runs the attention {own!r}, and keys and values are added to "
        "sdpa; use auto"
    )


def route_attention(model: PreTrainedModel) -> str:
    """Give `model` the attention "tunesmith" and return the name of the one it had.

    Raises:
        MethodError: the architecture does not let its attention be chosen.
    """
    before: str = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise MethodError(
            f"method.name: {type(model).__name__} has attention code of its own, so {_INSTEAD}"
        )
    return before


def unroute_attention(model: PreTrainedModel, before: str) -> None:
    """Give `model` the attention called `before` again, unless something still needs ours."""
    if has_segments(model) or any(isinstance(x, ExtraKeyValues) for x in model.modules()):
        return
    model.set_attn_implementation(before)


def require_routed(layer: nn.Module) -> None:
    """Check that `layer` takes its attention from here, without which nothing would be added.

    Raises:
        MethodError: somebody chose another attention after the method was attached.
    """
    own = layer.config._attn_implementation  # type: ignore[union-attr]  # each has it, to ask us
    if own != NAME:
        raise MethodError(
            f"the model's attention was changed to {own!r} after a method was attached that adds "
            f"keys and values to it; call model.set_attn_implementation({NAME!r})"
        )
