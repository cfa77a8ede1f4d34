"""Adapters that AdapterHub's `adapters` package saved, as methods of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from tunesmith.errors import AdapterError
from tunesmith.methods.adapterhub_bottleneck import attach_bottleneck
from tunesmith.methods.adapterhub_files import CONFIG, HubAdapter, read_adapterhub
from tunesmith.methods.adapterhub_lora import attach_ia3, attach_lora
from tunesmith.methods.adapterhub_prefix import attach_prefix
from tunesmith.methods.parts import Part
from tunesmith.methods.tuned import TunedModel, require_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.contract import Attachment, Method


def load_adapterhub(
    model: PreTrainedModel | TunedModel, directory: str | Path, *, name: str | None = None
) -> TunedModel:
    """Put an adapter that AdapterHub saved on `model`, with its values.

    Args:
        model: its base model, or a tuned one, which then has this adapter besides.
        directory: what AdapterHub's `save_adapter` wrote.
        name: name to give it; None keeps its own.

    Raises:
        AdapterError: a file is damaged, the adapter computes what no method here does, or it does
            not fit this model; the model is then as it was before.
        MethodError: the name is taken, or cannot name an adapter.
    """
    hub = read_adapterhub(directory)
    own = name or hub.name
    require_name(own)
    tuned = model if isinstance(model, TunedModel) else TunedModel(model)
    if hub.model_type != tuned.sites.model_type:
        raise AdapterError(
            f"{directory} was made on a model of type {hub.model_type} and this is one of type "
            f"{tuned.sites.model_type}; load its own base model"
        )
    with tuned.attaching():
        tuned.put(Part(own, *_attach(hub, tuned, own)))
    return tuned


def _attach(hub: HubAdapter, tuned: TunedModel, name: str) -> tuple[Method, Attachment]:
    """Attach what computes the same as `hub`, with its values."""
    kind = hub.config["architecture"]
    if kind is None:
        return attach_bottleneck(hub, tuned.model, tuned.sites, name=name)
    if kind == "prefix_tuning":
        return attach_prefix(hub, tuned.model, tuned.sites, name=name)
    if kind == "lora" and hub.config.get("composition_mode", "add") == "add":
        return attach_lora(hub, tuned.model, tuned.sites, name=name)
    if kind == "lora":
        return attach_ia3(hub, tuned.model, tuned.sites, name=name)
    why = _REFUSED.get(kind, "bottleneck adapters, compacter, lora, ia3 and prefix_tuning can be")
    raise AdapterError(f"{CONFIG}: architecture {kind!r} cannot be read; {why}")


_REFUSED: Final = {
    "union": "the gates of a union such as UniPELT are means over the whole sequence there, what "
    "comes later and padding included, and no model that generates can compute those",
    "prompt_tuning": "AdapterHub puts the prompt behind the norm of the embeddings and gives it no "
    "positions; train it anew with method: prompt_tuning",
}
