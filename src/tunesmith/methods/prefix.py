"""Learned keys and values in front of a layer's own: what prefix tuning and P-tuning v2 share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.errors import MethodError
from tunesmith.methods.child import Child, ChildAttachment
from tunesmith.models.attention import ExtraKeyValues
from tunesmith.models.attention_layers import require_routed, route_attention, unroute_attention

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from tunesmith.models.attention_layers import AttentionLayer
    from tunesmith.models.sites import Sites


class InAttention(Child, ExtraKeyValues):
    """A child of an attention layer that the attention function asks for keys and values."""

    def register_on(self, parent: nn.Module) -> RemovableHandle:
        """Register the check that the attention function is still ours."""
        return parent.register_forward_pre_hook(self.check)

    def check(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise MethodError where switched on but never asked."""
        if self.enabled:
            require_routed(module)


class InFront(InAttention):
    """Keys and values in front of the tokens' own, the same for every row."""

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return K and V, (kv_heads, length, head_dim), float32."""
        raise NotImplementedError

    def key_values(self, layer: nn.Module, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return K and V in `query`'s dtype, with a dimension for the batch."""
        K, V = self.pair()
        return K[None].to(query.dtype), V[None].to(query.dtype)


class Prefix(InFront):
    """K and V as they are trained.

    Args:
        K: (kv_heads, length, key_dim), their start.
        V: (kv_heads, length, value_dim), their start.
    """

    def __init__(self, K: Tensor, V: Tensor) -> None:
        super().__init__()
        self.K = nn.Parameter(K.to(torch.float32, copy=True).contiguous())
        self.V = nn.Parameter(V.to(torch.float32, copy=True).contiguous())

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return K and V."""
        return self.K, self.V


class ShiftedPositions(Child):
    """Lets the tokens' positions begin after a prefix, as in [PREFIX; x; y].

    Args:
        length: of the prefix.
        places: how many positions the model has embeddings for, or None where it computes them.
        names: of the arguments of the module it hangs under.
    """

    def __init__(self, length: int, places: int | None, names: list[str]) -> None:
        super().__init__()
        self.length = length
        self.places = places
        self.names = names

    def register_on(self, parent: nn.Module) -> RemovableHandle:
        """Register the hook that changes what goes into the stack of blocks."""
        return parent.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments with every position `length` later, or None while off."""
        if not self.enabled:
            return None
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        reach = past + tokens.shape[1]
        if self.places is not None and self.length + reach > self.places:
            raise MethodError(
                f"method.length: a prefix of {self.length} and {int(reach)} tokens are more than "
                f"the {self.places} positions of this model; use shorter samples or a shorter one"
            )
        positions = inputs.get("position_ids")
        if positions is None:
            positions = _positions(tokens, inputs.get("attention_mask"), past)
        inputs["position_ids"] = positions + self.length
        return (), inputs


def _positions(tokens: Tensor, mask: Any, past: int) -> Tensor:
    """Return the position of each of the `tokens` (batch, length, ...), not counting padding."""
    length = tokens.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return (torch.arange(length, device=tokens.device) + past)[None]


def stack_path(sites: Sites) -> str:
    """Return the path of the module that runs the blocks one after the other.

    A head may call it past the backbone, as OPT's does, so hooks for all blocks belong here.
    """
    return ".".join(sites.blocks[0].path.split(".")[:-2])


def positions_after(model: PreTrainedModel, sites: Sites, length: int) -> ShiftedPositions:
    """Return the child of the stack of blocks that makes room for a prefix.

    Raises:
        MethodError: the prefix leaves no room in the model's context.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)  # ALiBi models have none
    if limit is not None and length >= limit:
        raise MethodError(
            f"method.length: a prefix of {length} leaves no room in this model's context of "
            f"{limit} tokens; use at most {limit - 1}, better a few tens"
        )
    stack, tokens = model.get_submodule(stack_path(sites)), model.get_input_embeddings()
    others = [x for x in stack.modules() if isinstance(x, nn.Embedding) and x is not tokens]
    names = list(inspect.signature(stack.forward).parameters)
    return ShiftedPositions(length, limit if others else None, names)


class AttentionAttachment(ChildAttachment):
    """Children inside attention layers; while they are there the model's attention is ours."""

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, children: Mapping[str, Child]) -> None:
        self._before = route_attention(model)
        super().__init__(model, children)

    def detach(self) -> None:
        """Remove every child and hook, and give the model its own attention back."""
        super().detach()
        unroute_attention(self.model, self._before)


def random_key_values(layer: AttentionLayer, length: int, std: float) -> tuple[Tensor, Tensor]:
    """Return keys and values (kv_heads, length, head_dim) drawn from N(0, std^2)."""
    K, V = (
        std * torch.randn(layer.kv_heads, length, width, device=layer.device)
        for width in (layer.key_dim, layer.value_dim)
    )
    return K, V


def join(*parts: str) -> str:
    """Return a path out of its parts, of which the first may be empty."""
    return ".".join(part for part in parts if part)
