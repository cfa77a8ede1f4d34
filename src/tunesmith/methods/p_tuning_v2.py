"""P-tuning v2: deep prompts in every layer (Liu et al. 2022, arXiv:2110.07602)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field
from torch import nn

from tunesmith.methods.child import Child, require_free
from tunesmith.methods.contract import Method
from tunesmith.methods.prefix import (
    AttentionAttachment,
    Prefix,
    random_key_values,
    room_for,
)
from tunesmith.models.attention_layers import attention_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.sites import Sites


class PTuningV2(Method):
    """Train prompts as keys and values in every layer: h_i attends to [P_i; h_i].

    An encoder-decoder has them in the self-attention of both stacks and not in the cross attention,
    whose keys are no layer of the decoder.
    """

    default_learning_rate: ClassVar[float] = 2e-2

    name: Literal["p_tuning_v2"] = "p_tuning_v2"
    """Deep prompts, independent in every layer."""
    length: int = Field(default=20, ge=1)
    """Prompt length n. Simple classification does with fewer than 20, tagging and reading wants
    about 100 (section 4.2 of the paper)."""
    std: float = Field(default=0.02, gt=0)
    """Standard deviation of the start. Keys near zero take the same share of attention from every
    token and values near zero add nothing, so the model starts close to the base."""

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> PromptsAttachment:
        """Hang prompts under every attention layer.

        Raises:
            MethodError: the attention cannot be extended, the prompts are longer than the context,
                or the name is taken.
        """
        base = cast("PreTrainedModel", model)
        attribute = f"p_tuning_v2_{name}"
        children: dict[str, Child] = {}
        layers = [x for x in attention_layers(base, sites) if x.place != "cross"]
        for layer in layers:
            require_free(model, layer.path, attribute, name)
            start = random_key_values(layer, self.length, self.std)
            children[f"{layer.path}.{attribute}"] = Prefix(*start)
        children |= room_for(base, sites, self.length, attribute=attribute)
        return PromptsAttachment(base, children)


class PromptsAttachment(AttentionAttachment):
    """Deep prompts on one model."""

    identity_at_start: ClassVar[bool] = False
