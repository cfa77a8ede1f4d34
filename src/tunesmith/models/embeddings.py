"""One vector a text: the hidden states of a frozen model, pooled over the text's own tokens."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor

from tunesmith.models.heads import last_tokens
from tunesmith.models.loading import locate

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from tunesmith.models.settings import ModelSettings
    from tunesmith.types import Batch

Pooling = Literal["cls", "mean", "last"]
"""A text's first token, the mean of its tokens, its last token."""

_DECIDE: Final = ("config.json", "*.safetensors", "*.py")
"""Files of a model directory that decide its hidden states."""


@torch.no_grad()
def embed(model: PreTrainedModel, batch: Batch, pooling: Pooling) -> Tensor:
    """Return one vector a text from the last layer, (texts, width) float32.

    Padding has no part in it, on whichever side it stands.

    Args:
        model: in eval mode; a head it has is not used.
        batch: padded rows with `attention_mask` (texts, length); `labels` and `class_weights` are
            left out.
        pooling: which tokens stand for a text.
    """
    inputs = {key: v for key, v in batch.items() if key not in {"labels", "class_weights"}}
    hidden = model.base_model(**inputs).last_hidden_state.float()
    return pool(hidden, batch["attention_mask"], pooling)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return (texts, width) of hidden states (texts, length, width), by the rows' real tokens.

    Args:
        hidden: float32; what stands at padding may be anything.
        mask: (texts, length), 1 for real tokens, at least one a text.
        pooling: which of them.
    """
    if pooling == "mean":
        # Not a product with the mask: padding may hold values that are not finite.
        kept = hidden.masked_fill(mask[..., None] == 0, 0.0)
        return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True)
    if pooling == "last":
        return hidden[last_tokens({"input_ids": mask, "attention_mask": mask})]
    # argmax gives the first of equal values.
    rows = torch.arange(len(mask), device=mask.device)
    return hidden[rows, mask.argmax(dim=1)]


def fingerprint(settings: ModelSettings) -> str:
    """Return a hash of the files that decide what the model computes, and of how they are loaded.

    Raises:
        ModelError: nothing of this name.
        SetupError: a zoo model that is not cached and cannot be fetched.
    """
    place = locate(settings.name, settings)
    how = f"{settings.quantize} {settings.double_quantize} {settings.products}"
    found = hashlib.sha256(how.encode())
    for path in [place] if place.is_file() else _files(place):
        with path.open("rb") as file:
            found.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _files(directory: Path) -> list[Path]:
    return sorted(path for pattern in _DECIDE for path in directory.glob(pattern))
