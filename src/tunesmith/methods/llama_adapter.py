"""LLaMA-Adapter: prompts behind gates that start at zero (Zhang et al. 2023).

arXiv:2303.16199, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods.child import require_free
from tunesmith.methods.contract import Method, PeftFiles
from tunesmith.methods.peft_format import PREFIX, PeftConfig, common_config, read_peft_config
from tunesmith.methods.prefix import AttentionAttachment, InAttention
from tunesmith.methods.tensors import check_against, copy_into, whole
from tunesmith.models.attention_layers import AttentionLayer, attention_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.family import Columns
    from tunesmith.models.sites import Block, Sites


class LlamaAdapter(Method):
    """Train prompts P_l in the top L layers: h + tanh(g_l) softmax(q K_l^T / sqrt(C)) V_l.

    In an encoder-decoder these are layers of the decoder, and h is what its self-attention gives.
    """

    default_learning_rate: ClassVar[float] = 3e-2
    peft_type: ClassVar[str | None] = "ADAPTION_PROMPT"

    name: Literal["llama_adapter"] = "llama_adapter"
    """Prompts in the top layers, behind gates that start at zero."""
    length: int = Field(default=10, ge=1)
    """Prompt length K."""
    layers: int | None = Field(default=None, ge=1)
    """In how many layers, counted from the last (L). None is all but the two lowest, the paper's 30
    of 32."""

    gate: Literal["head", "layer"] = "head"
    """tanh(g) for each head, as in the authors' code; or one plain g a layer, which is what PEFT
    computes, so that it can be exported for it."""

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> GatedAttachment:
        """Hang prompts and gates under the attention layers.

        Raises:
            MethodError: the attention cannot be extended, the model has fewer layers, or the name
                is taken.
        """
        base = cast("PreTrainedModel", model)
        stack = sites.blocks[-1].stack
        blocks = [block for block in sites.blocks if block.stack == stack]
        layers = [layer for layer in attention_layers(base, sites) if layer.place == stack]
        top = max(1, len(layers) - 2) if self.layers is None else self.layers
        if top > len(layers):
            raise MethodError(
                f"method.layers: {top} is more than the {len(layers)} layers of this model; use at "
                f"most {len(layers)}"
            )
        children = {}
        for layer, block in list(zip(layers, blocks, strict=True))[-top:]:
            require_free(model, layer.path, f"llama_adapter_{name}", name)
            projections = _projections(layer, block)
            prompt = GatedPrompt(self, _width(block), layer, projections)
            children[f"{layer.path}.llama_adapter_{name}"] = prompt.to(layer.device)
        return GatedAttachment(base, children)

    @classmethod
    def attach_peft(
        cls,
        files: PeftFiles,
        model: PreTrainedModel,
        sites: Sites,
        *,
        recorded: Method | None,
        name: str,
    ) -> tuple[Method, GatedAttachment]:
        """Put an adaption prompt in PEFT's layout on `model`; also what `save` wrote.

        Raises:
            AdapterError: it is of another size, or for a model on which PEFT computes otherwise.
            MethodError: the attention cannot be extended, or the name is taken.
        """
        config = read_peft_config(
            files, PeftAdaptionPrompt, without_effect={"target_modules"}, plain="LLaMA-Adapter"
        )
        if sites.model_type not in _AS_PEFT:
            raise AdapterError(
                f"{files.file}: PEFT's adaption prompts on a {sites.model_type} are added after "
                f"the output projection, which is not the paper's; they can be read for "
                f"{' and '.join(_AS_PEFT)}"
            )
        made = cls(length=config.adapter_len, layers=config.adapter_layers, gate="layer")
        method = recorded if isinstance(recorded, LlamaAdapter) else made
        attachment = method.attach(model, sites, name=name)
        try:
            attachment.load_peft(files)
        except AdapterError:
            attachment.detach()
            raise
        return method, attachment


class PeftAdaptionPrompt(PeftConfig):
    """What is read of PEFT's AdaptionPromptConfig."""

    adapter_len: int = Field(ge=1)
    adapter_layers: int = Field(ge=1)


_AS_PEFT = ("llama", "mistral")
"""Model types on which PEFT computes what the paper says."""


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
        method: length of the prompt and kind of gate.
        width: of the hidden states.
        layer: the attention layer's sizes.
        projections: how it makes keys and values.
    """

    separate = True

    def __init__(
        self, method: LlamaAdapter, width: int, layer: AttentionLayer, projections: Projections
    ) -> None:
        super().__init__()
        self.sizes = layer
        self.projections = projections
        # Standard normal, as in the authors' code.
        self.P = nn.Parameter(torch.randn(method.length, width, dtype=torch.float32))
        self.one = method.gate == "layer"
        self.g = nn.Parameter(torch.zeros(1 if self.one else layer.heads, dtype=torch.float32))

    def gate(self) -> Tensor:
        """Return tanh(g_l) or, one a layer, g_l; (heads,)."""
        return self.g.expand(self.sizes.heads) if self.one else torch.tanh(self.g)

    def key_values(self, layer: nn.Module, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return K_l and V_l, (1, kv_heads, length, head_dim), in `query`'s dtype."""
        key, value, norm = self.projections
        P = self.P.to(query.dtype)[None]
        k = layer.get_submodule(key[0])(P)
        v = k if value[0] == key[0] else layer.get_submodule(value[0])(P)
        K, V = _columns(k, key[1]), _columns(v, value[1])
        if norm is None:
            return self._keys(K).to(query.dtype), self._values(V).to(query.dtype)
        own = layer.get_submodule(norm)
        # Over the whole width in OLMo 2, over each head in all others.
        over_width = any(p.shape[-1] == K.shape[-1] for p in own.parameters(recurse=False))
        K = self._keys(own(K)) if over_width else own(self._keys(K))
        return K.to(query.dtype), self._values(V).to(query.dtype)

    def _keys(self, x: Tensor) -> Tensor:
        """Return (1, kv_heads, length, key_dim) of (1, length, key heads * key_dim)."""
        return _heads(x, self.sizes.key_dim, self.sizes.kv_heads)

    def _values(self, x: Tensor) -> Tensor:
        """Return (1, kv_heads, length, value_dim) of (1, length, value heads * value_dim)."""
        return _heads(x, self.sizes.value_dim, self.sizes.kv_heads)


def _heads(x: Tensor, head_dim: int, heads: int) -> Tensor:
    """Return (1, heads, length, head_dim) of (1, length, fewer or as many heads * head_dim)."""
    own = x.reshape(*x.shape[:-1], -1, head_dim).transpose(1, 2)
    # Falcon hands attention the keys and values of each group once for every query in it.
    return own.repeat_interleave(heads // own.shape[1], dim=1)


def _columns(x: Tensor, columns: Columns | None) -> Tensor:
    """Return the given columns of `x` (..., out), all where None."""
    if columns is None:
        return x
    return torch.cat([x[..., start:stop] for start, stop in columns], dim=-1)


class GatedAttachment(AttentionAttachment):
    """Gated prompts on one model."""

    children: dict[str, GatedPrompt]  # type: ignore[assignment]  # the only kind there is

    def export_peft(self) -> PeftFiles:
        """Return the prompts as PEFT writes them.

        Raises:
            MethodError: the gates are one a head, or PEFT computes something else on this model.
        """
        if self.model.config.model_type not in _AS_PEFT:
            raise MethodError(
                f"PEFT's adaption prompts are the paper's on {' and '.join(_AS_PEFT)} only, not on "
                f"a {self.model.config.model_type}; use save() instead"
            )
        if not all(child.one for child in self.children.values()):
            raise MethodError(
                "PEFT has one plain gate a layer where this has one a head; train with gate: layer "
                "to export, or use save()"
            )
        config = common_config(self.model, "ADAPTION_PROMPT") | {
            "adapter_layers": len(self.children),
            "adapter_len": len(next(iter(self.children.values())).P),
            "target_modules": "self_attn",
        }
        tensors = {}
        for name, child in self._peft_names().items():
            tensors[f"{name}.adaption_prompt"] = whole(child.P)[None]
            tensors[f"{name}.adaption_gate"] = whole(child.g)
        return PeftFiles(config, tensors)

    def load_peft(self, files: PeftFiles) -> None:
        """Take over what PEFT wrote.

        Raises:
            AdapterError: names or shapes differ.
        """
        targets = {}
        for name, child in self._peft_names().items():
            targets[f"{name}.adaption_prompt"] = child.P[None]
            targets[f"{name}.adaption_gate"] = child.g
        check_against({name: target.shape for name, target in targets.items()}, files.tensors)
        for name, child in self._peft_names().items():
            copy_into(child.P, files.tensors[f"{name}.adaption_prompt"][0])
            copy_into(child.g, files.tensors[f"{name}.adaption_gate"])

    def _peft_names(self) -> dict[str, GatedPrompt]:
        """Return the children by what PEFT calls their layers."""
        return {
            f"{PREFIX}{path.rpartition('.')[0]}": child for path, child in self.children.items()
        }
