"""Attention that never asks the attention function: DeBERTa's, Falcon's, BLOOM's.

Falcon and BLOOM compute attention inside the layer and give its output to a linear map, `dense`.
What is added goes in between: a hook on `dense` computes attention once more over [extra | tokens]
and puts it in the place of what the layer computed, which is then not used (in eager mode that
costs the scores a second time; compiled, it is dead code and falls away). With ALiBi (Press et al.
2022, arXiv:2108.12409) extra keys stand before the text: those of a prefix of n at -n to -1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
from transformers.models.falcon import modeling_falcon as falcon
from transformers.models.falcon.modeling_falcon import FalconAttention

from tunesmith.models import attention_deberta
from tunesmith.models.attention import ExtraKeyValues, attention, extras_of, with_separate

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

Own: TypeAlias = "BloomAttention | FalconAttention"
_KINDS = (BloomAttention, DisentangledSelfAttention, FalconAttention)


class AttentionInputs(NamedTuple):
    """What one layer computes attention from."""

    query: Tensor
    """(batch, heads, length, head_dim)."""
    key: Tensor
    """(batch, kv_heads, kv_length, head_dim)."""
    value: Tensor
    mask: Tensor | None
    """(batch, 1 or heads, length, kv_length), with ALiBi's bias in it; bool or additive."""
    scaling: float
    dropout: float
    slopes: Tensor | None
    """Of ALiBi's bias (heads,)."""


def own_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of `model` that compute attention by code of their own."""
    return [module for module in model.modules() if isinstance(module, _KINDS)]


def asked_by(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AttentionInputs | attention_deberta.Disentangled:
    """Return what `layer`, called with these arguments, computes attention from."""
    if isinstance(layer, DisentangledSelfAttention):
        return attention_deberta.asked_by(layer, args, kwargs)
    return _asked(layer, args, kwargs)


def _asked(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionInputs:
    """Return what a Falcon's or a BLOOM's layer computes attention from."""
    ask = _falcon if isinstance(layer, FalconAttention) else _bloom
    return ask(layer, *args, **kwargs)


def register_extra(layer: nn.Module, extra: ExtraKeyValues) -> RemovableHandle | None:
    """Let a layer with attention of its own see `extra`; None where it asks the function itself."""
    if isinstance(layer, BloomAttention | FalconAttention):
        return _BeforeDense(layer, extra)  # type: ignore[return-value]  # it has remove()
    return attention_deberta.register_extra(layer, extra)


class _BeforeDense:
    """Puts attention with what is added into `dense`.

    The hooks are methods, so that a copy of the model has those of its own layer.

    Args:
        layer: the attention layer.
        extra: what is added. Each has such hooks, and the first one's act for all.
    """

    def __init__(self, layer: Own, extra: ExtraKeyValues) -> None:
        self.layer = layer
        self.extra = extra
        self.seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handles = (
            layer.register_forward_pre_hook(self.before, with_kwargs=True),
            # First, so that others see the input that `dense` has.
            layer.dense.register_forward_pre_hook(self.instead, prepend=True),
        )

    def remove(self) -> None:
        """Remove both hooks."""
        for handle in self._handles:
            handle.remove()

    def acts(self) -> bool:
        """Return whether this is the first extra of its layer that is switched on."""
        extras = extras_of(self.layer)
        return bool(extras) and extras[0] is self.extra

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the layer is called with."""
        self.seen = (args, kwargs) if self.acts() else None

    def instead(self, dense: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """Return what goes into `dense` in the place of `args`, (batch, length, width)."""
        if self.seen is None:
            return None
        seen, self.seen = self.seen, None
        layer = self.layer
        asked = _asked(layer, *seen)
        options: dict[str, Any] = {
            "scaling": asked.scaling,
            "dropout": asked.dropout,
            "alibi_slopes": asked.slopes,
        }
        if all(extra.separate for extra in extras_of(layer)):
            own = args[0].reshape(*args[0].shape[:-1], layer.num_heads, -1)
            return (with_separate(own, layer, asked.query, **options).flatten(2),)
        q, k, v = asked.query, asked.key, asked.value
        out, _ = attention(layer, q, k, v, asked.mask, is_causal=False, **options)
        return (out.flatten(2),)


def _falcon(
    layer: FalconAttention,
    hidden_states: Tensor,
    *,
    alibi: Tensor | None = None,
    attention_mask: Tensor | None = None,
    layer_past: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **unused: Any,
) -> AttentionInputs:
    """Return what Falcon attends with; where it has ALiBi, the bias is in its mask already."""
    q, k, v = (x.transpose(1, 2) for x in layer._split_heads(layer.query_key_value(hidden_states)))
    if position_embeddings is not None and alibi is None:
        q, k = falcon.apply_rotary_pos_emb(q, k, *position_embeddings)
    k, v = _with_past(layer, layer_past, k, v)
    drops = layer.training and alibi is not None
    dropout = layer.attention_dropout.p if drops else 0.0
    scale = layer.inv_norm_factor
    slopes = None if alibi is None else scale * falcon.build_alibi_tensor(*_one_step(layer, q))
    return AttentionInputs(q, k, v, attention_mask, scale, dropout, _last(slopes))


def _bloom(
    layer: BloomAttention,
    hidden_states: Tensor,
    residual: Tensor,
    *,
    alibi: Tensor,
    attention_mask: Tensor | None = None,
    layer_past: Any = None,
    **unused: Any,
) -> AttentionInputs:
    """Return what BLOOM attends with."""
    q, k, v = layer._reshape(layer.query_key_value(hidden_states))
    k, v = _with_past(layer, layer_past, k, v)
    mask = alibi.reshape(-1, layer.num_heads, *alibi.shape[1:])
    if attention_mask is not None:
        mask = mask + attention_mask
    dropout = layer.attention_dropout.p if layer.training else 0.0
    slopes = bloom.build_alibi_tensor(*_one_step(layer, q))
    return AttentionInputs(q, k, v, mask, layer.inv_norm_factor, dropout, _last(slopes))


def _one_step(layer: Own, q: Tensor) -> tuple[Tensor, int, torch.dtype]:
    """Return the arguments for ALiBi's bias of two tokens: the second one's is the slope."""
    return torch.ones(1, 2, device=q.device), layer.num_heads, q.dtype


def _last(bias: Tensor | None) -> Tensor | None:
    """Return the bias of the last token (heads,)."""
    return None if bias is None else bias[:, 0, -1]


def _with_past(layer: Own, past: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return all keys and values: the layer itself has just put its own into the cache."""
    if past is None:
        return k, v
    cached = past.layers[layer.layer_idx]
    return cached.keys, cached.values
