"""The attention layers of a model, found by running it and seeing which ones ask for attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.errors import MethodError
from tunesmith.models.attention import NAME, ExtraKeyValues, attention, has_segments
from tunesmith.models.attention_own import asked_by, own_layers
from tunesmith.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.sites import Block, Sites

Place = Literal["encoder", "decoder", "cross"]
"""Where attention is asked for: among an encoder's tokens, among a decoder's, or by a decoder's
tokens of the encoder's."""
PLACES: Final[tuple[Place, ...]] = ("encoder", "decoder", "cross")


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer: one a block, and two where a decoder attends to its encoder as well."""

    path: str
    """Path of the layer in the model."""
    place: Place
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
    """Return the attention layers of every block, from one forward pass over two tokens.

    They come in the order of the blocks, each block's own attention before its cross attention.

    Raises:
        MethodError: a block's attention does not go through the attention function exactly once
            (and once more for cross attention), or runs another implementation than sdpa, which
            keys and values could not be added to.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    calls = _calls(model, ids, **_unread(model, ids))
    _require_sdpa(model, calls)
    names = {id(module): name for name, module in model.named_modules()}
    found = [(names[id(call.layer)], call) for call in calls]
    layers = []
    for block in sites.blocks:
        inside = [(path, call) for path, call in found if path.startswith(f"{block.path}.")]
        expected = 1 if block.cross_out is None else 2
        if len(inside) != expected:
            raise MethodError(
                f"method.name: the attention of {block.path} in this {type(model).__name__} asks "
                f"for attention {len(inside)} times where {expected} was expected; {_INSTEAD}"
            )
        layers += [_layer(path, _place(block, path), call) for path, call in inside]
    return layers


def _unread(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return a mask and positions for `ids` (1, length) that nothing looks into.

    A mask of four dimensions is taken as it is, and positions are not computed from it, which a
    model on the meta device could not.
    """
    length = ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device)
    if own_layers(model):
        mask = mask[0, :, 0]  # DeBERTa multiplies its embeddings by the mask
    if model.config.is_encoder_decoder:
        return {"attention_mask": mask, "decoder_attention_mask": mask}
    positions = torch.arange(length, device=ids.device)[None]
    return {"attention_mask": mask, "position_ids": positions}


def _layer(path: str, place: Place, call: _Call) -> AttentionLayer:
    return AttentionLayer(
        path,
        place,
        heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        key_dim=call.key.shape[3],
        value_dim=call.value.shape[3],
        device=call.query.device,
    )


def _place(block: Block, path: str) -> Place:
    """Return the place of the attention layer at `path` in `block`."""
    crosses = block.cross_out is not None and block.cross_out.startswith(f"{path}.")
    return "cross" if crosses else block.stack


def key_values(model: PreTrainedModel, input_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the keys and values of `input_ids` (1, length) in every attention layer, by its path.

    Keys are as they are compared with queries, so with their positions 0, 1, ... in them. An
    encoder-decoder reads and writes the ids.

    Returns:
        Pairs of (kv_heads, length, head_dim), float32.
    """
    names = {id(module): name for name, module in model.named_modules()}
    ids = input_ids.to(model.get_input_embeddings().weight.device)
    # On the meta device keys and values have a shape only, and no mask can be computed.
    calls = _calls(model, ids, **_unread(model, ids) if ids.is_meta else {})
    return {names[id(call.layer)]: (call.key[0].float(), call.value[0].float()) for call in calls}


_INSTEAD = "methods that add keys and values cannot work on it: use lora or another method"


def _calls(model: PreTrainedModel, input_ids: Tensor, **inputs: Any) -> list[_Call]:
    """Return what the attention layers ask the attention function for in one forward pass."""
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids
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

    def record_own(layer: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        del output
        asked = asked_by(layer, args, kwargs)
        calls.append(_Call(layer, asked.query, asked.key, asked.value, capped=False))

    before = route_attention(model)
    own = own_layers(model)
    hooks = [layer.register_forward_hook(record_own, with_kwargs=True) for layer in own]
    ALL_ATTENTION_FUNCTIONS[NAME] = record
    try:
        yield calls
    finally:
        del ALL_ATTENTION_FUNCTIONS[NAME]
        for hook in hooks:
            hook.remove()
        if not own:
            model.set_attn_implementation(before)


def _require_sdpa(model: PreTrainedModel, calls: list[_Call]) -> None:
    """Raise MethodError where the attention "tunesmith" would not compute the model's own bits."""
    if own_layers(model):
        return
    own = model.config._attn_implementation
    if own in {NAME, "sdpa"} or (own == "eager" and all(call.capped for call in calls)):
        return
    raise MethodError(
        f"model.attention: this model runs the attention {own!r}, and keys and values are added to "
        "sdpa; use auto"
    )


def route_attention(model: PreTrainedModel) -> str:
    """Give `model` the attention "tunesmith" and return the name of the one it had.

    DeBERTa keeps its own, and each layer is told of what is added by a hook.

    Raises:
        MethodError: the architecture does not let its attention be chosen.
    """
    before: str = model.config._attn_implementation
    if own_layers(model):
        return before
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise MethodError(
            f"method.name: {type(model).__name__} has attention code of its own, so {_INSTEAD}"
        )
    return before


def unroute_attention(model: PreTrainedModel, before: str) -> None:
    """Give `model` the attention called `before` again, unless something still needs ours."""
    needed = has_segments(model) or any(isinstance(x, ExtraKeyValues) for x in model.modules())
    if needed or own_layers(model):
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
