"""Learned keys and values in front of a layer's own: what prefix tuning and P-tuning v2 share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tunesmith.errors import MethodError
from tunesmith.methods.child import Child, ChildAttachment, require_rows
from tunesmith.methods.gate import Gate
from tunesmith.models.attention import ExtraKeyValues
from tunesmith.models.attention_layers import require_routed, route_attention, unroute_attention
from tunesmith.models.attention_own import register_extra
from tunesmith.models.context import TakesPositions

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from tunesmith.models.attention_layers import AttentionLayer
    from tunesmith.models.family import Stack
    from tunesmith.models.sites import Sites


class InAttention(Child, ExtraKeyValues):
    """A child of an attention layer that the attention function asks for keys and values."""

    attention_before: str
    """Name of the attention that the model had before any such child."""

    def register_on(self, parent: nn.Module) -> RemovableHandle:
        """Register the check that the attention function is still ours, or what stands for it."""
        return register_extra(parent, self) or parent.register_forward_pre_hook(self.check)

    def check(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise MethodError where switched on but never asked."""
        if self.enabled:
            require_routed(module)


class InFront(InAttention):
    """Keys and values in front of the tokens' own, the same for every row that sees them."""

    by_row: ClassVar[bool] = True

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
        self.token_gate: Gate | None = None
        """How much each token makes of them; None is all."""
        self._reader: tuple[LayerInput, ...] = ()  # in a tuple: it is no part of this module

    def gate_by(self, gate: Gate, reader: LayerInput) -> None:
        """Scale keys and values by `gate` of what `reader` has seen from now on."""
        self.token_gate, self._reader = gate, (reader,)

    def token_gates(self) -> Tensor | None:
        """Return G (batch, length, 1), or None without a gate."""
        return None if self.token_gate is None else self.token_gate(self._reader[0].take())

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return K and V."""
        return self.K, self.V


class LayerInput(Child):
    """Keeps what goes into an attention layer until the gate of its prefix has taken it."""

    by_row: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def register_on(self, parent: nn.Module) -> RemovableHandle:
        """Register the hook that sees what goes into `parent`."""
        return parent.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the hidden states (batch, length, width)."""
        if self.enabled:
            self.seen = args[0] if args else kwargs["hidden_states"]

    def take(self) -> Tensor:
        """Return what was seen, and keep it no longer."""
        seen, self.seen = self.seen, None
        assert seen is not None, "a layer has its input before it attends"  # noqa: S101
        return seen


class ShiftedPositions(Child, TakesPositions):
    """Lets the tokens' positions begin after a prefix, as in [PREFIX; x; y].

    Args:
        length: of the prefix.
        places: how many positions the model has embeddings for, or None where it computes them.
        names: of the arguments of the module it hangs under.
    """

    by_row: ClassVar[bool] = True

    def __init__(self, length: int, places: int | None, names: list[str]) -> None:
        super().__init__()
        self.length = length
        self.places = places
        self.names = names

    def positions_taken(self) -> int:
        """Return the prefix's length."""
        return self.length

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
        # Of segments side by side the longest counts, for each begins anew.
        reach = inputs.get("max_length_q") or past + tokens.shape[1]
        if self.places is not None and self.length + reach > self.places:
            raise MethodError(
                f"method.length: a prefix of {self.length} and {int(reach)} tokens are more than "
                f"the {self.places} positions of this model; use shorter samples or a shorter one"
            )
        positions = inputs.get("position_ids")
        if positions is None:
            positions = _positions(tokens, inputs.get("attention_mask"), past)
        shift: Tensor | int = self.length
        if self.row_mask is not None:
            require_rows(self.row_mask, len(tokens))
            shift = self.length * self.row_mask.to(tokens.device)[:, None]
        inputs["position_ids"] = positions + shift
        return (), inputs


def _positions(tokens: Tensor, mask: Any, past: int) -> Tensor:
    """Return the position of each of the `tokens` (batch, length, ...), not counting padding."""
    length = tokens.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return (torch.arange(length, device=tokens.device) + past)[None]


def stack_path(sites: Sites, stack: Stack | None = None) -> str:
    """Return the path of the module that runs the blocks of a stack one after the other.

    A head may call it past the backbone, as OPT's does, so hooks for all blocks belong here. An
    encoder alone embeds outside of it, so there it is the backbone.

    Args:
        sites: the model's map.
        stack: which one, where there are two; None is the first, the encoder.
    """
    if sites.encoder_only:
        return sites.backbone
    first = next(block for block in sites.blocks if stack in {None, block.stack})
    return ".".join(first.path.split(".")[:-2])


def room_for(
    model: PreTrainedModel, sites: Sites, length: int, *, attribute: str
) -> dict[str, Child]:
    """Return by path the child that lets the text's positions begin after a prefix of `length`.

    There is none for an encoder: every token sees every other, so there is no order in which a
    prefix would come first, and the text keeps the positions that the model was trained with, [CLS]
    the first. (Where a prefix is handed to BERT as a cache, as P-tuning v2's authors and PEFT do,
    the text moves by its length, as after a cache it must.)

    There is none for an encoder-decoder. T5 has no positions but distances between tokens, and in
    BART a prefix comes before three texts of two kinds: each text keeps the positions that the
    model was trained with, as in Li & Liang's own BART, and the prefix takes none of them.

    Raises:
        MethodError: the prefix leaves no room in the model's context.
    """
    if model.config.is_encoder_decoder or sites.encoder_only:
        return {}
    return {join(stack_path(sites), attribute): positions_after(model, sites, length)}


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
        others = [x.attention_before for x in model.modules() if isinstance(x, InAttention)]
        before = route_attention(model)
        # Whichever of several goes last gives back what the first one found.
        self._before = others[0] if others else before
        for child in children.values():
            if isinstance(child, InAttention):
                child.attention_before = self._before
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
