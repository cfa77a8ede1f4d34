"""Prefix tuning: learned keys and values in front of every layer's (Li & Liang 2021).

arXiv:2101.00190, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods.child import Child, require_free
from tunesmith.methods.contract import Method, PeftFiles
from tunesmith.methods.peft_format import PeftConfig, common_config, read_peft_config
from tunesmith.methods.prefix import (
    AttentionAttachment,
    InFront,
    Prefix,
    ShiftedPositions,
    join,
    random_key_values,
    room_for,
    stack_path,
)
from tunesmith.methods.tensors import check_against, whole
from tunesmith.models.attention_layers import (
    PLACES,
    AttentionLayer,
    Place,
    attention_layers,
    key_values,
)
from tunesmith.models.loading import load_tokenizer
from tunesmith.models.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.sites import Sites

Pair = tuple[Tensor, Tensor]


class PrefixTuning(Method):
    """Train keys and values that every token sees in front of the text: z = [PREFIX; x; y].

    In an encoder-decoder z = [PREFIX; x; PREFIX'; y] (section 4.2): one prefix before what the
    encoder reads, and PREFIX' before what the decoder sees, that is in its self-attention and in
    its attention over the encoder, each with keys and values of its own as in the authors' code.
    """

    default_learning_rate: ClassVar[float] = 2e-2
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"

    name: Literal["prefix_tuning"] = "prefix_tuning"
    """Learned keys and values in front of the text, in every layer."""
    length: int = Field(default=10, ge=1)
    """Number of prefix positions; the paper's best is 10 for tables to text and 200 for
    summarisation. With `text` it is at most that."""
    init: Literal["vocabulary", "text", "random"] | None = None
    """Start: the model's own keys and values of randomly drawn tokens, or of `text`, so that it is
    the base with those in its context (section 7.4); or random. None takes random where
    reparametrised, otherwise vocabulary."""
    text: str | None = None
    """Where init is text: what the prefix starts as, such as a description of the task."""
    reparametrise: bool = False
    """Compute the prefix by a two-layer network while training, as the paper does to steady it from
    a random start; dropped when saved. From the model's own keys and values it is not needed."""
    hidden: int = Field(default=512, ge=1)
    """Width inside that network."""
    places: Annotated[list[Place], Field(min_length=1)] | Literal["all"] = "all"
    """Which attention has a prefix: the encoder's, the decoder's, and in an encoder-decoder the
    decoder's over the encoder (cross); all takes those that the model has."""

    @model_validator(mode="after")
    def _starts_consistently(self) -> Self:
        """Refuse a start that cannot be had."""
        if self.reparametrise and self.init not in {None, "random"}:
            raise ValueError("reparametrise: a network starts random; use init: random or neither")
        if (self.init == "text") != (self.text is not None):
            raise ValueError("init: text and text: ... belong together; give both or neither")
        return self

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> PrefixAttachment:
        """Hang a prefix under every attention layer.

        Raises:
            MethodError: the attention cannot be extended, the model has no such place, the prefix
                is longer than the context, or the name is taken.
        """
        base = cast("PreTrainedModel", model)
        layers = self._layers(base, sites)
        if not self.reparametrise:
            prefixes = _prefixes(layers, self._start(base, layers))
            return _hang(base, sites, prefixes, name=name)
        embedding = base.get_input_embeddings().weight
        encoder = Encoder(self, embedding.shape[1], layers).to(embedding.device)
        encoded = {layer.path: EncodedPrefix(encoder, i) for i, layer in enumerate(layers)}
        return _hang(base, sites, encoded, name=name, encoder=encoder)

    def _layers(self, model: PreTrainedModel, sites: Sites) -> list[AttentionLayer]:
        """Return the attention layers that get a prefix."""
        layers = attention_layers(model, sites)
        known = [place for place in PLACES if any(layer.place == place for layer in layers)]
        wanted = known if self.places == "all" else self.places
        if missing := [place for place in wanted if place not in known]:
            raise MethodError(
                f"method.places: a {sites.model_type} has no attention in the place "
                f"'{missing[0]}'; use {', '.join(known)} or all"
            )
        return [layer for layer in layers if layer.place in wanted]

    def _start(self, model: PreTrainedModel, layers: list[AttentionLayer]) -> list[Pair]:
        """Return the keys and values that the prefix begins as, one pair a layer."""
        if self.init == "random":
            return [random_key_values(layer, self.length, 0.02) for layer in layers]
        if self.text is None:
            vocabulary = model.get_input_embeddings().num_embeddings
            ids = torch.randint(vocabulary, (1, self.length))
        else:
            ids = self._tokens(model, self.text)
        found = key_values(model, ids)
        return [found[layer.path] for layer in layers]

    def _tokens(self, model: PreTrainedModel, text: str) -> Tensor:
        """Return the first `length` tokens of `text`, (1, length) int64."""
        if not model.name_or_path:
            raise MethodError("method.text: this model was loaded from nowhere, so no tokenizer")
        tokenizer = load_tokenizer(ModelSettings(name=model.name_or_path))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: self.length]
        if not ids:
            raise MethodError("method.text: it has no tokens; write some words")
        return torch.tensor([ids])

    @classmethod
    def attach_peft(
        cls,
        files: PeftFiles,
        model: PreTrainedModel,
        sites: Sites,
        *,
        recorded: Method | None,
        name: str,
    ) -> tuple[Method, PrefixAttachment]:
        """Put a prefix in PEFT's layout on `model`; also what `save` wrote.

        Raises:
            AdapterError: it is of another size, or for an encoder-decoder.
            MethodError: the attention cannot be extended, or the name is taken.
        """
        config = read_peft_config(
            files, PeftPrefix, without_effect=_WITHOUT_EFFECT, plain="prefix tuning"
        )
        if model.config.is_encoder_decoder or sites.encoder_only:
            raise AdapterError(f"{files.file}: {_not_pefts(model)}, so it cannot be read")
        if config.num_transformer_submodules not in {None, 1}:
            raise AdapterError(
                f"{files.file}: num_transformer_submodules {config.num_transformer_submodules} is "
                "for encoder-decoder models, whose prefixes cannot be read"
            )
        layers = attention_layers(model, sites)
        width = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
        shape = torch.Size([config.num_virtual_tokens, width])
        check_against({_EMBEDDINGS: shape}, files.tensors)
        pairs = _unpacked(files.tensors[_EMBEDDINGS], layers)
        method = recorded or cls(length=config.num_virtual_tokens)
        return method, _hang(model, sites, _prefixes(layers, pairs), name=name)


_EMBEDDINGS = "prompt_embeddings"
_WITHOUT_EFFECT = (
    *("token_dim", "num_attention_heads", "num_layers", "init_weights"),
    *("encoder_hidden_size", "prefix_projection"),  # PEFT saves what the projection gives
)


def _not_pefts(model: PreTrainedModel) -> str:
    """Return why PEFT's layout cannot hold ours, which takes no position of the text."""
    if model.config.is_encoder_decoder:
        return (
            "PEFT's prefix of an encoder-decoder is in the decoder's self-attention only, where it "
            "takes positions of the text"
        )
    return "PEFT's prefix of an encoder is a cache, which takes positions of the text"


class PeftPrefix(PeftConfig):
    """What is read of PEFT's PrefixTuningConfig."""

    num_virtual_tokens: int
    num_transformer_submodules: int | None = None


class Encoder(Child):
    """P[i, :] = MLP(P'[i, :]): all layers' keys and values from one small matrix (section 4.3).

    Args:
        method: length and hidden width.
        width: of the embeddings, the width of P'.
        layers: what to compute keys and values for.
    """

    by_row: ClassVar[bool] = True

    def __init__(self, method: PrefixTuning, width: int, layers: list[AttentionLayer]) -> None:
        super().__init__()
        self.layers = layers
        self.sizes = [layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers]
        self.P = nn.Parameter(torch.randn(method.length, width))
        self.inner = nn.Linear(width, method.hidden, dtype=torch.float32)
        self.outer = nn.Linear(method.hidden, sum(self.sizes), dtype=torch.float32)

    def register_on(self, parent: nn.Module) -> None:
        """Register nothing: the prefixes ask."""

    def prefix(self, index: int) -> Pair:
        """Return K and V (kv_heads, length, head_dim) of layer `index`, float32.

        Each layer computes its own rows of the network, so that a block stays complete in itself:
        recomputed, compiled and sharded like any other.
        """
        start = sum(self.sizes[:index])
        rows = slice(start, start + self.sizes[index])
        with torch.autocast(self.P.device.type, enabled=False):
            hidden = torch.tanh(self.inner(self.P))
            flat = F.linear(hidden, self.outer.weight[rows], self.outer.bias[rows])
        return _unpacked(flat, [self.layers[index]])[0]


class EncodedPrefix(InFront):
    """The prefix of one layer, as the encoder has it."""

    def __init__(self, encoder: Encoder, index: int) -> None:
        super().__init__()
        self.encoder = (encoder,)  # in a tuple, so that its parameters have one name only
        self.index = index

    def pair(self) -> Pair:
        """Return K and V, (kv_heads, length, head_dim), float32."""
        return self.encoder[0].prefix(self.index)


class PrefixAttachment(AttentionAttachment):
    """A prefix on one model."""

    identity_at_start: ClassVar[bool] = False

    def export_peft(self) -> PeftFiles:
        """Return the prefix in PEFT's layout, without the network that computed it.

        Raises:
            MethodError: keys and values differ in width, which PEFT has no format for.
        """
        prefixes = [x for x in self.children.values() if isinstance(x, InFront)]
        with torch.no_grad():
            pairs = [(whole(K), whole(V)) for K, V in (x.pair() for x in prefixes)]
        if not any(isinstance(child, ShiftedPositions) for child in self.children.values()):
            raise MethodError(f"{_not_pefts(self.model)}; use save() instead")
        (kv_heads, length, width), others = pairs[0][0].shape, [x for pair in pairs for x in pair]
        if any(x.shape != (kv_heads, length, width) for x in others):
            raise MethodError(
                "PEFT has no format for a prefix whose keys and values differ in width between "
                "them or between layers; use save() instead"
            )
        config = common_config(self.model, "PREFIX_TUNING") | {
            "num_virtual_tokens": length,
            "token_dim": kv_heads * width,
            "num_attention_heads": kv_heads,
            "num_layers": len(pairs),
            "num_transformer_submodules": 1,
            "prefix_projection": False,
            "encoder_hidden_size": None,
        }
        return PeftFiles(config, {_EMBEDDINGS: _packed(pairs)})


def _packed(pairs: list[Pair]) -> Tensor:
    """Return (length, layers * 2 * kv_heads * head_dim): at each position every layer's K and V."""
    return torch.cat([x.transpose(0, 1).flatten(1) for pair in pairs for x in pair], dim=1)


def _unpacked(flat: Tensor, layers: list[AttentionLayer]) -> list[Pair]:
    """Return each layer's K and V (kv_heads, length, head_dim), undoing `_packed`."""
    shapes = [(layer.kv_heads, d) for layer in layers for d in (layer.key_dim, layer.value_dim)]
    parts = torch.split(flat, [kv_heads * width for kv_heads, width in shapes], dim=1)
    split = [
        part.reshape(-1, *shape).transpose(0, 1) for part, shape in zip(parts, shapes, strict=True)
    ]
    return list(zip(split[::2], split[1::2], strict=True))


def _prefixes(layers: list[AttentionLayer], pairs: list[Pair]) -> dict[str, Prefix]:
    """Return prefixes that are `pairs`, by the path of their layer."""
    return {
        layer.path: Prefix(*pair).to(layer.device)
        for layer, pair in zip(layers, pairs, strict=True)
    }


def _hang(
    model: PreTrainedModel,
    sites: Sites,
    prefixes: Mapping[str, InFront],
    *,
    name: str,
    encoder: Encoder | None = None,
) -> PrefixAttachment:
    """Hang `prefixes` under their layers, and what moves the text's positions behind them."""
    attribute = f"prefix_tuning_{name}"
    children: dict[str, Child] = {}
    for path, prefix in prefixes.items():
        require_free(model, path, attribute, name)
        children[f"{path}.{attribute}"] = prefix
    length = next(iter(prefixes.values())).pair()[0].shape[1]
    children |= room_for(model, sites, length, attribute=f"{attribute}_positions")
    if encoder is not None:
        children[join(stack_path(sites), attribute)] = encoder
    return PrefixAttachment(model, children)
