"""One attention implementation for all: transformers' sdpa, which also keeps segments apart.

It is registered with transformers under the name "tunesmith". Batches without segments go straight
to sdpa. Batches with segments (`cu_seq_lens_q`, see `types.Batch`) go to `segment_attention`, and
no (tokens x tokens) mask is ever built for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.errors import ModelError
from tunesmith.ops.segment_attention import segment_attention, uses_varlen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME: Final = "tunesmith"


def attention(  # noqa: PLR0917 - transformers' own signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return what transformers' attention functions return: (batch, length, heads, head_dim).

    Args:
        module: the attention layer.
        query: (batch, heads, length, head_dim).
        key: (batch, kv_heads, kv_length, head_dim).
        value: as `key`.
        attention_mask: bool, True is kept; None is causal or full, as `module` says. Not looked at
            where the batch has segments.
        dropout: of the attention weights.
        scaling: of the scores.
        is_causal: instead of what `module` says.
        kwargs: what the model was called with besides, `cu_seq_lens_q` among it.

    Raises:
        ModelError: the layer caps its scores or has sinks, which sdpa would leave out.
    """
    for unsupported in ("softcap", "s_aux"):
        if kwargs.get(unsupported) is not None:
            raise ModelError(
                f"model.attention: {type(module).__name__} uses {unsupported}, which the attention "
                f"'{NAME}' does not compute; use eager"
            )
    if kwargs.get("cu_seq_lens_q") is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    on_gpu = uses_varlen(query, value, dropout=dropout)
    out = segment_attention(
        query,
        key,
        value,
        kwargs["cu_seq_lens_q" if on_gpu else "cu_seq_lens_k"],
        scaling=scaling,
        dropout=dropout,
        causal=bool(module.is_causal if is_causal is None else is_causal),
        window=kwargs.get("sliding_window") or None,
        max_length=kwargs.get("max_length_q"),
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def enable_segments(model: PreTrainedModel) -> bool:
    """Give `model` the attention "tunesmith" and return whether it keeps segments apart.

    Proved by a probe: two segments in one row against each alone, also under a short sliding window
    where the model has one. Where the proof fails the model is as it was before.
    """
    before = model.config._attn_implementation
    if before == NAME:
        return True
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        return False  # the architecture has its own attention path
    hook = model.base_model.register_forward_pre_hook(_leave_out_the_mask, with_kwargs=True)
    try:
        proved = _keeps_segments_apart(model)
    except (ModelError, RuntimeError, ValueError, TypeError, KeyError):
        proved = False
    if not proved:
        hook.remove()
        model.set_attn_implementation(before)
    return proved


def _leave_out_the_mask(
    backbone: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Keep transformers from building a (tokens x tokens) mask where the batch has segments.

    From positions that start anew it would guess the segments by itself. A mask of four dimensions
    is handed to the attention function as it is, which does not look at it.
    """
    if kwargs.get("cu_seq_lens_q") is None:
        return None
    device = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device
    changed = {
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        # Once for all layers: the variable-length kernel reads it on the GPU, the loop on the CPU.
        "cu_seq_lens_q": kwargs["cu_seq_lens_q"].to(device, non_blocking=True),
        "use_cache": False,
    }
    return args, kwargs | changed


_LENGTHS: Final = [9, 7]
_WINDOW: Final = 3
_TOLERANCE: Final = 0.1
"""Of the difference that seeing the other segment makes; rounding in bfloat16 stays far below."""
_LAYERS: Final = {"full_attention", "sliding_attention"}
"""Layer types whose segments the attention function can tell apart."""


def _keeps_segments_apart(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config().to_dict()
    chunked = config.get("attention_chunk_size") is not None
    if (
        chunked
        or config.get("is_encoder_decoder")
        or set(config.get("layer_types") or ()) - _LAYERS
    ):
        return False
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
    for holder in holders:
        holder.sliding_window = _WINDOW
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
    return ((7 * steps + 3) % embedding.shape[0])[None]


def _hidden(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    return model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state.float()
