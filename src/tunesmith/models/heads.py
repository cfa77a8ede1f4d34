"""Classification heads: which modules they are, how they start, which hidden state they read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.types import Batch

HeadKind = Literal["sequence_classification", "token_classification"]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]

LOADERS: Final[dict[str, Any]] = {
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
}
_CLASSES: Final[dict[HeadKind, set[str]]] = {
    "sequence_classification": set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()),
    "token_classification": set(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values()),
}
_INITIALIZER_RANGE: Final = 0.02
"""Standard deviation of new weights where the config says none (BERT's)."""


@dataclass(frozen=True)
class Head:
    """The head that a model is to be loaded with."""

    kind: HeadKind
    labels: tuple[str, ...]
    """Names of the outputs, in their order; one for a regression."""
    problem: Problem = "single_label_classification"
    """What the model's config records about the outputs."""
    seed: int = 0
    """Decides the weights of a head that the files do not hold."""

    def config(self) -> dict[str, Any]:
        """Return what transformers has to know of the head, by keys of a model's config."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": self.problem,
        }


def head_kind(model: nn.Module) -> HeadKind | None:
    """Return which classification head `model` has, or None where it has none."""
    name = type(model).__name__
    return next((kind for kind, names in _CLASSES.items() if name in names), None)


def head_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the modules with weights between the hidden states and the classes.

    The pooler is one of them, though BERT keeps it inside the backbone and DeBERTa does not: so a
    head is the same part of every architecture. Empty where the model is no classifier.
    """
    if head_kind(model) is None:
        return ()
    backbone = model.base_model
    paths = [
        name
        for name, child in model.named_children()
        if child is not backbone and any(True for _ in child.parameters())
    ]
    inside = f"{model.base_model_prefix}."
    poolers = [inside + name for name, _ in backbone.named_children() if name == "pooler"]
    return (*poolers, *paths)


def start_head(model: PreTrainedModel, names: Collection[str], seed: int) -> None:
    """Give the head's parameters `names` their starting values, the same ones on every device.

    Weights are normal with the config's `initializer_range`, scales 1 and biases 0, as
    transformers starts them; but out of a generator of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    std = model.config.to_dict().get("initializer_range", _INITIALIZER_RANGE)
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        if parameter.ndim > 1:
            value = torch.randn(parameter.shape, generator=generator) * std
        else:
            value = torch.full(parameter.shape, float(name.endswith("weight")))
        parameter.data.copy_(value)


def reads_last_token(model: PreTrainedModel) -> bool:
    """Return whether the head is a map of the last real token's hidden state: a decoder's."""
    return head_kind(model) == "sequence_classification" and _score(model) is not None


def _score(model: nn.Module) -> nn.Module | None:
    """Return a decoder's head, which transformers calls `score` in every decoder."""
    return dict(model.named_children()).get("score")


def head_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits of a batch's texts, (batch, classes), or tokens, (batch, length, classes).

    A decoder's text is read at its last real token, found by the attention mask or the bounds of
    its segment. (transformers looks for the last token that is not the pad token, which is another
    one where a text ends with that token, as with pad == eos, or where `inputs_embeds` is given.)

    Args:
        model: with a classification head.
        batch: model inputs, `labels` and `class_weights` apart.

    Returns:
        float32.
    """
    score = _score(model)
    if score is None or head_kind(model) == "token_classification":
        logits: Tensor = model(**_inputs(batch)).logits
        return logits.float()
    return _scored(model, score, batch, last_tokens(batch))


def head_logits_at(model: PreTrainedModel, batch: Batch, places: tuple[Tensor, Tensor]) -> Tensor:
    """Return the logits at some tokens of a decoder's texts, (tokens, classes) float32.

    Args:
        model: with a head that is a map of single hidden states.
        batch: model inputs, `labels` and `class_weights` apart.
        places: the texts, and the position of each token in its text, (tokens,) int64 each.

    Raises:
        ModelError: the head reads texts as a whole.
    """
    score = _score(model)
    if score is None:
        raise ModelError(
            f"{type(model).__name__} reads a text as a whole, so its steps have no rewards of "
            "their own; use a decoder"
        )
    texts, positions = places
    if "cu_seq_lens_q" in batch:
        starts = batch["cu_seq_lens_q"].to(positions.device, torch.int64)
        return _scored(model, score, batch, (torch.zeros_like(texts), starts[texts] + positions))
    return _scored(model, score, batch, (texts, positions))


def _inputs(batch: Batch) -> Batch:
    return {key: v for key, v in batch.items() if key not in {"labels", "class_weights"}}


def _scored(
    model: PreTrainedModel, score: nn.Module, batch: Batch, places: tuple[Tensor, Tensor]
) -> Tensor:
    hidden = model.base_model(**_inputs(batch), use_cache=False).last_hidden_state
    scored: Tensor = score(hidden[places])
    return scored.float()


def last_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return row and column of each text's last real token, (texts,) int64 each."""
    ids: Tensor = batch["input_ids"]
    if "cu_seq_lens_q" in batch:
        columns = batch["cu_seq_lens_q"][1:].to(ids.device, torch.int64) - 1
        return torch.zeros_like(columns), columns
    rows = torch.arange(len(ids), device=ids.device)
    if "attention_mask" not in batch:
        return rows, torch.full_like(rows, ids.shape[1] - 1)
    places = torch.arange(ids.shape[1], device=ids.device)
    return rows, (batch["attention_mask"] * places).argmax(dim=1)
