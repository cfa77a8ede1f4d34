"""AdapterHub's prefix tuning, as ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from tunesmith.errors import AdapterError
from tunesmith.methods.adapterhub_files import CONFIG
from tunesmith.methods.prefix import Prefix
from tunesmith.methods.prefix_tuning import PrefixTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.adapterhub_files import HubAdapter
    from tunesmith.methods.contract import Attachment, Method
    from tunesmith.models.sites import Sites

_ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
}
_ROTARY: Final = ("llama", "mistral")
"""Decoders whose positions are rotations that AdapterHub has prefixes for."""


def attach_prefix(
    hub: HubAdapter, model: PreTrainedModel, sites: Sites, *, name: str
) -> tuple[Method, Attachment]:
    """Put the prefix of `hub` on the model, as keys and values without a network.

    In a decoder the text has positions from 0 on there and after the prefix here. Where a position
    p is a rotation R(p), the two agree for keys R(length) k, since R(p + length) q then scores them
    as R(p) q scores k. Encoders keep their positions in both.

    Raises:
        AdapterError: it is of another kind or size, or its positions cannot be kept.
        MethodError: the name is taken, or the prefix is longer than the context.
    """
    hub.require({"use_gating": False, "leave_out": []})
    decoder = not sites.encoder_only
    if decoder and sites.model_type not in _ROTARY:
        raise AdapterError(
            f"{CONFIG}: beside AdapterHub's prefix the text of a {sites.model_type} has positions "
            "from 0 on, and here they begin after it; train it anew with method: prefix_tuning"
        )
    length = int(hub.config["prefix_length"])
    method = PrefixTuning(length=length, init="random")
    attachment = method.attach(model, sites, name=name)
    paths = [p for p, child in attachment.children.items() if isinstance(child, Prefix)]
    heads, _, width = attachment.trainable()[f"{paths[0]}.K"].shape
    flat = _flat(hub)
    if flat.numel() != length * 2 * len(paths) * heads * width:
        raise AdapterError(f"{CONFIG}: its prefix is for other sizes; load its own base model")
    by_layer = flat.view(length, len(paths), 2, heads, width).permute(1, 2, 3, 0, 4)
    state: dict[str, Tensor] = {}
    for path, (K, V) in zip(paths, by_layer, strict=True):
        state[f"{path}.K"] = _rotated(model, K, length) if decoder else K
        state[f"{path}.V"] = V
    attachment.load_state_dict({key: x.contiguous() for key, x in state.items()})
    return method, attachment


def _flat(hub: HubAdapter) -> Tensor:
    """Return all keys and values: length, layers, K and V, heads, head_dim, in one row."""
    at = f"prefix_tunings.{hub.name}.self_prefix."  # once, and in every layer once more
    found = {key.partition(at)[2]: x for key, x in hub.tensors.items() if at in key}
    if hub.config["flat"] and list(found) == ["control_trans"]:
        return found["control_trans"]
    act = _ACTIVATIONS.get(hub.config["non_linearity"])
    names = [f"control_trans.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]
    if hub.config["flat"] or act is None or set(found) != {"wte.weight", *names}:
        raise AdapterError(
            f"{CONFIG}: its prefix is neither flat nor a network with {', '.join(_ACTIVATIONS)} in "
            "front of self-attention, so it cannot be read"
        )
    W1, b1, W2, b2 = (found[name] for name in names)
    return F.linear(act(F.linear(found["wte.weight"], W1, b1)), W2, b2).flatten()


def _rotated(model: PreTrainedModel, K: Tensor, positions: int) -> Tensor:
    """Return the keys K (kv_heads, length, head_dim) moved on by so many positions."""
    rotary = model.base_model.get_submodule("rotary_emb")
    cos, sin = rotary(K, torch.tensor([[positions]]))
    return K * cos[0] + rotate_half(K) * sin[0]
