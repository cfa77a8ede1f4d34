"""LLaMA-Adapter: prompts behind gates that start at zero (Zhang et al. 2023).

arXiv:2303.16199, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from tunesmith.errors import MethodError
from tunesmith.methods.child import require_free
from tunesmith.methods.contract import Method
from tunesmith.methods.prefix import AttentionAttachment, InAttention
from tunesmith.models.attention_layers import AttentionLayer, attention_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.families import Columns
    from tunesmith.models.sites import Block, Sites


class LlamaAdapter(Method):
    """Train prompts P_l in the top L layers: h + tanh(g_l) softmax(q K_l^T / sqrt(C)) V_l."""

    default_learning_rate: ClassVar[float] = 9e-3

    name: Literal["llama_adapter"] = "llama_adapter"
    """Prompts in the top layers, behind gates that start at zero."""
    length: int = Field(default=10, ge=1)
    """Prompt length K."""
    layers: int | None = Field(default=None, ge=1)
    """In how many layers, counted from the last (L). None is all but the two lowest, the paper's 30
    of 32."""

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> GatedAttachment:
        """Hang prompts and gates under the attention layers.

        Raises:
            MethodError: the attention cannot be extended, the model has fewer layers, or the name
                is taken.
        """
        base = cast("PreTrainedModel", model)
        layers = attention_layers(base, sites)
        top = max(1, len(layers) - 2) if self.layers is None else self.layers
        if top > len(layers):
            raise MethodError(
                f"method.layers: {top} is more than the {len(layers)} layers of this model; use at "
                f"most {len(layers)}"
            )
        children = {}
        for layer, block in list(zip(layers, sites.blocks, strict=True))[-top:]:
            require_free(model, layer.path, f"llama_adapter_{name}", name)
            projections = _projections(layer, block)
            prompt = GatedPrompt(self.length, _width(block), layer, projections)
            children[f"{layer.path}.llama_adapter_{name}"] = prompt.to(layer.device)
        return GatedAttachment(base, children)


class Projections(NamedTuple):
    """How a layer makes keys and values, as paths inside it."""

    key: tuple[str, Columns | None]
    """The projection, and which of its output columns are keys."""
    value: tuple[str, Columns | None]
    norm: str | None
    """The keys' own norm, for models that have one."""


def _projections(layer: AttentionLayer, block: Block) -> Projections:
    """Return how `layer` makes keys and values."""
    sites = {site.name: site for site in block.sites}
    inside = f"{layer.path}."
    key, value = (
        (sites[name].module.removeprefix(inside), sites[name].columns)
        for name in ("attention.k", "attention.v")
    )
    norm = next((n for n in block.norms if n.endswith(("k_norm", "k_layernorm"))), None)
    return Projections(key, value, None if norm is None else norm.removeprefix(inside))


def _width(block: Block) -> int:
    """Return the width of what goes into a block's keys."""
    return next(site.in_features for site in block.sites if site.name == "attention.k")


class GatedPrompt(InAttention):
    """One layer's prompt P_l and gates g_l, float32 (section 3.2).

    Keys K_l = W_k P_l and values V_l = W_v P_l come from the layer's own frozen projections; they
    have no position. g_l = 0 keeps the model what it was until the first step.

    Args:
        length: of the prompt.
        width: of the hidden states.
        layer: the attention layer's sizes.
        projections: how it makes keys and values.
    """

    separate = True

    def __init__(
        self, length: int, width: int, layer: AttentionLayer, projections: Projections
    ) -> None:
        super().__init__()
        self.sizes = layer
        self.projections = projections
        # Standard normal, as in the authors' code.
        self.P = nn.Parameter(torch.randn(length, width, dtype=torch.float32))
        self.g = nn.Parameter(torch.zeros(layer.heads, dtype=torch.float32))

    def gate(self) -> Tensor:
        """Return tanh(g_l), (heads,), between -1 and 1."""
        return torch.tanh(self.g)

    def key_values(self, layer: nn.Module, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return K_l and V_l, (1, kv_heads, length, head_dim), in `query`'s dtype."""
        key, value, norm = self.projections
        P = self.P.to(query.dtype)[None]
        k = layer.get_submodule(key[0])(P)
        v = k if value[0] == key[0] else layer.get_submodule(value[0])(P)
        K, V = _columns(k, key[1]), _columns(v, value[1])
        if norm is None:
            return self._heads(K).to(query.dtype), self._heads(V).to(query.dtype)
        own = layer.get_submodule(norm)
        # Over the whole width in OLMo 2, over each head in all others.
        over_width = any(p.shape[-1] == K.shape[-1] for p in own.parameters(recurse=False))
        K = self._heads(own(K)) if over_width else own(self._heads(K))
        return K.to(query.dtype), self._heads(V).to(query.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        """Return (1, kv_heads, length, head_dim) of (1, length, kv_heads * head_dim)."""
        return x.reshape(*x.shape[:2], self.sizes.kv_heads, -1).transpose(1, 2)


def _columns(x: Tensor, columns: Columns | None) -> Tensor:
    """Return the given columns of `x` (..., out), all where None."""
    if columns is None:
        return x
    return torch.cat([x[..., start:stop] for start, stop in columns], dim=-1)


class GatedAttachment(AttentionAttachment):
    """Gated prompts on one model."""
