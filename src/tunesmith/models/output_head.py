"""How a language model's logits come out of its hidden states: those of a decoder, where two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tunesmith.errors import ModelError
from tunesmith.models.encoder_decoder import run_both
from tunesmith.models.modes import evaluating
from tunesmith.types import HEAD_ONLY

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.types import Batch


class OutputHead(NamedTuple):
    """Logits = c tanh(s (h W^T + b) / c), with s = 1 and no c for most models."""

    backbone: Callable[..., Any]
    """The model without its head; its `last_hidden_state` is h, of the decoder where two."""
    weight: Tensor
    """(vocab, width)."""
    bias: Tensor | None
    """(vocab,)."""
    scale: float
    softcap: float | None

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return s h, (batch, length, width), for the model inputs in `batch` but its labels.

        For an encoder-decoder the length is that of what it writes.
        """
        inputs = {key: value for key, value in batch.items() if key not in HEAD_ONLY}
        hidden: Tensor = self.backbone(**inputs, use_cache=False).last_hidden_state
        return hidden if self.scale == 1.0 else hidden * self.scale

    def scaled_bias(self) -> Tensor | None:
        """Return s b, which belongs to `hidden_states`."""
        return self.bias if self.bias is None or self.scale == 1.0 else self.bias * self.scale


def output_head(model: PreTrainedModel) -> OutputHead:
    """Return the parts of `model` that its logits are computed from.

    Raises:
        ModelError: the model has no linear output embedding over a backbone, or an adapter acts on
            it.
    """
    head = model.get_output_embeddings()
    backbone = _backbone(model)
    if backbone is None or not isinstance(head, torch.nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear language-model head over a backbone, which "
            "training on token log-probabilities needs; use a causal language model or an "
            "encoder-decoder"
        )
    # No method here hangs on a head, but PEFT's do.
    if any(vars(child).get("enabled", True) for child in head.children()):
        raise ModelError(
            f"an adapter acts on the head of this {type(model).__name__}, and the loss reads the "
            "head's own weight past it; merge the adapter into the base (model.adapter, or "
            "export_model) and go on from there"
        )
    scale, softcap = _scale_and_softcap(model)
    bias = _added_to_logits(model) if head.bias is None else head.bias
    return OutputHead(backbone, head.weight, bias, scale, softcap)


def _backbone(model: PreTrainedModel) -> Callable[..., Any] | None:
    """Return what gives the hidden states, or None where the model has no head over anything."""
    if model.base_model is not model:
        return model.base_model
    return partial(run_both, model) if model.config.is_encoder_decoder else None


def _added_to_logits(model: PreTrainedModel) -> Tensor | None:
    """Return BART's bias (vocab,) that is no parameter of the head, if there is one."""
    bias = dict(model.named_buffers(recurse=False)).get("final_logits_bias")
    return None if bias is None else bias[0]


def _scale_and_softcap(model: PreTrainedModel) -> tuple[float, float | None]:
    config = model.config.get_text_config().to_dict()
    scale = config.get("logit_scale") or 1.0  # Cohere; MPT may say how instead of how much
    if not isinstance(scale, int | float):
        raise ModelError(f"logit_scale: {scale!r} of {type(model).__name__} is not a number")
    scale *= config.get("lm_head_multiplier") or 1.0  # Falcon-H1
    scale /= config.get("logits_scaling") or 1.0  # Granite
    scales = {"t5": config.get("scale_decoder_outputs"), "umt5": True}  # T5 1.0, not 1.1
    if scales.get(config["model_type"]):
        scale *= config["d_model"] ** -0.5
    return scale, config.get("final_logit_softcapping")  # Gemma 2


@torch.no_grad()
def check_output_head(model: PreTrainedModel, *, tolerance: float = 2e-2) -> float:
    """Return how far `output_head`'s logits are from the model's own, relative to the largest.

    Runs the model twice on three tokens; a head that does more than `OutputHead` knows is found
    here and not in a model that learned something else.

    Args:
        model: in any mode; dropout is off meanwhile.
        tolerance: largest difference allowed, relative to the largest logit; wide enough for
            bfloat16, far too narrow for a missed scale or cap.

    Raises:
        ModelError: the logits differ.
    """
    head = output_head(model)
    ids = torch.arange(3, device=head.weight.device)[None]
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with evaluating(model):
        expected = model(**inputs, use_cache=False).logits.float()
        # A head that trains is float32 over a backbone that may not be.
        hidden = head.hidden_states(inputs).to(head.weight.dtype)
    logits = torch.nn.functional.linear(hidden, head.weight, head.scaled_bias()).float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    largest = expected.abs().max().clamp(min=1e-6)
    difference = float((logits - expected).abs().max() / largest)
    if difference > tolerance:
        raise ModelError(
            f"the head of {type(model).__name__} does more than a linear map, a scale and a soft "
            f"cap (its logits differ by {difference:.1%}), so its loss would be wrong; use another "
            "model"
        )
    return difference
