"""DeBERTa's attention: keys and values added to layers that never ask the attention function.

DeBERTa computes score(i, j) = (q_i k_j + q_i r_ij + k_j r'_ij) / sqrt(3 d) in code of its own (He
et al. 2021, arXiv:2006.03654, section 3.1), where r and r' are projected embeddings of the relative
position. A forward hook on the layer computes the same once more over [extra | tokens] and puts it
in the place of the layer's own output. Extra keys have no position, so the last two terms are 0
for them. The layer's own output is then not used: in eager mode it costs a forward pass of the
attention scores; compiled, it is dead code and falls away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from tunesmith.models.attention import ExtraKeyValues, attention, extras_of, with_separate

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Disentangled(NamedTuple):
    """What one layer computes attention from."""

    query: Tensor
    """(batch, heads, length, head_dim)."""
    key: Tensor
    value: Tensor
    mask: Tensor
    """(batch, heads, length, length), additive: the terms of the positions, and the mask."""
    scaling: float


def asked_by(layer: DisentangledSelfAttention, args: tuple[Any, ...], kwargs: Any) -> Disentangled:
    """Return what `layer`, called with these arguments, computes attention from."""
    return _asked(layer, *args, **kwargs)


def _asked(  # noqa: PLR0917 - transformers' own signature
    layer: DisentangledSelfAttention,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> Disentangled:
    del output_attentions
    reading = hidden_states if query_states is None else query_states
    heads = layer.num_attention_heads
    q, k, v = (
        layer.transpose_for_scores(x, heads)
        for x in (
            layer.query_proj(reading),
            layer.key_proj(hidden_states),
            layer.value_proj(hidden_states),
        )
    )
    terms = 1 + len({"c2p", "p2c"} & set(layer.pos_att_type))
    positions = q.new_zeros(())
    if layer.relative_attention:
        embeddings = layer.pos_dropout(rel_embeddings)
        positions = layer.disentangled_attention_bias(q, k, relative_pos, embeddings, terms)
        positions = positions.unflatten(0, (-1, heads)).to(q.dtype)
    mask = positions.masked_fill(~attention_mask.bool(), torch.finfo(q.dtype).min)
    q, k, v = (x.unflatten(0, (-1, heads)) for x in (q, k, v))
    return Disentangled(q, k, v, mask, (q.shape[-1] * terms) ** -0.5)


def register_extra(layer: nn.Module, extra: ExtraKeyValues) -> RemovableHandle | None:
    """Let a layer with attention of its own see `extra`; None where it asks the function itself."""
    if not isinstance(layer, DisentangledSelfAttention):
        return None

    return layer.register_forward_hook(_Instead(extra).act, with_kwargs=True)


class _Instead:
    """Puts attention with what is added in the place of a layer's output.

    The hook is a method, so that a copy of the model has that of its own extra.

    Args:
        extra: what is added. Each has such a hook, and the first one's acts for all.
    """

    def __init__(self, extra: ExtraKeyValues) -> None:
        self.extra = extra

    def act(
        self,
        layer: DisentangledSelfAttention,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: tuple[Tensor, Tensor | None],
    ) -> tuple[Tensor, None] | None:
        """Return the layer's output, or None where another extra's hook acts or all are off."""
        extras = extras_of(layer)
        if not extras or extras[0] is not self.extra:
            return None
        return _extended(layer, args, kwargs, output[0])


def _extended(
    layer: DisentangledSelfAttention, args: tuple[Any, ...], kwargs: Any, output: Tensor
) -> tuple[Tensor, None]:
    """Return the layer's output (batch, length, width) with the extras in it."""
    asked = asked_by(layer, args, kwargs)
    options = {"scaling": asked.scaling, "dropout": layer.dropout.p if layer.training else 0.0}
    if all(extra.separate for extra in extras_of(layer)):
        own = output.view(*output.shape[:-1], layer.num_attention_heads, -1)
        return with_separate(own, layer, asked.query, **options).flatten(2), None
    # Added keys come in front, and an additive mask is 0 for them.
    out, _ = attention(
        layer, asked.query, asked.key, asked.value, asked.mask, is_causal=False, **options
    )
    return out.flatten(2), None
