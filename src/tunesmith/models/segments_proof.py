"""A probe: does a model keep the segments of one row apart?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS: Final = [9, 7]
_WINDOW: Final = 3
_TOLERANCE: Final = 0.1
"""Of the difference that seeing the other segment makes; rounding in bfloat16 stays far below."""
_LAYERS: Final = {"full_attention", "sliding_attention"}
"""Layer types whose segments the attention function can tell apart."""


def may_keep_segments_apart(model: PreTrainedModel) -> bool:
    """Return whether the config speaks of no attention that knows no segments."""
    config = model.config.get_text_config().to_dict()
    chunked = config.get("attention_chunk_size") is not None
    others = set(config.get("layer_types") or ()) - _LAYERS
    return not (chunked or config.get("is_encoder_decoder") or others)


def keeps_segments_apart(model: PreTrainedModel) -> bool:
    """Return whether two segments in one row come out as each alone, with short windows too."""
    if not may_keep_segments_apart(model):
        return False
    config = model.config.get_text_config().to_dict()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if not config.get("sliding_window"):
                return _probe(model)
            whole = _separately(model)
            with _short_window(model):
                # A window that changes nothing was not reached by the probe, so proves nothing.
                return _probe(model) and not torch.equal(_separately(model), whole)
    finally:
        model.train(was_training)


@contextmanager
def _short_window(model: PreTrainedModel) -> Iterator[None]:
    """Make every sliding window shorter than the probe's segments, inside a `with` block."""
    config = model.config.get_text_config()
    holders = [config, *(module for module in model.modules() if _has_window(module))]
    before = [holder.sliding_window for holder in holders]
    for holder, window in zip(holders, before, strict=True):
        # ModernBERT's layers count the token itself, which its config does not.
        holder.sliding_window = _WINDOW + window - before[0]
    try:
        yield
    finally:
        for holder, window in zip(holders, before, strict=True):
            holder.sliding_window = window


def _has_window(module: nn.Module) -> bool:
    return isinstance(vars(module).get("sliding_window"), int)


def _probe(model: PreTrainedModel) -> bool:
    """Return whether two segments in one row come out as each alone."""
    bounds = torch.tensor([0, _LENGTHS[0], sum(_LENGTHS)], dtype=torch.int32)
    ids = _probe_ids(model)
    together = _hidden(
        model,
        ids,
        position_ids=torch.cat([torch.arange(n, device=ids.device) for n in _LENGTHS])[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(_LENGTHS),
        max_length_k=max(_LENGTHS),
    )
    alone = _separately(model)
    mixing = (_hidden(model, ids) - alone).abs().max()
    return bool((together - alone).abs().max() < _TOLERANCE * mixing)


def _separately(model: PreTrainedModel) -> Tensor:
    parts = torch.split(_probe_ids(model), _LENGTHS, dim=1)
    return torch.cat([_hidden(model, part) for part in parts], dim=1)


def _probe_ids(model: PreTrainedModel) -> Tensor:
    embedding = model.get_input_embeddings().weight
    steps = torch.arange(sum(_LENGTHS), device=embedding.device)
    ids = (7 * steps + 3) % embedding.shape[0]
    # Padding would have no position in RoBERTa.
    padding = model.config.get_text_config().pad_token_id
    if padding is None:
        return ids[None]
    return torch.where(ids == padding, (ids + 1) % embedding.shape[0], ids)[None]


def _hidden(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    return model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state.float()
