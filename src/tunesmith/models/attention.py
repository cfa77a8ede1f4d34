"""One attention implementation for all: transformers' sdpa, and what sdpa does not do.

It is registered with transformers under the name "tunesmith". Batches without segments go straight
to sdpa. Batches with segments (`cu_seq_lens_q`, see `types.Batch`) go to `segment_attention`, and
no (tokens x tokens) mask is ever built for them. Children of an attention layer that are
`ExtraKeyValues` add keys and values to it, in either case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.errors import MethodError, ModelError
from tunesmith.models.attention_choice import Asked, AttentionChoice, SupposedChoice
from tunesmith.models.families import first_position
from tunesmith.models.gated_keys import Sections
from tunesmith.models.segments_proof import keeps_segments_apart, may_keep_segments_apart
from tunesmith.ops.capped_attention import capped_attention
from tunesmith.ops.equal_segments import equal_segments
from tunesmith.ops.one_query_attention import is_newest_token, one_query_attention
from tunesmith.ops.segment_attention import segment_attention, uses_varlen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME: Final = "tunesmith"


class ExtraKeyValues:
    """Keys and values that a method adds to an attention layer, as a child module of it.

    They are added inside the attention function and not to the cache, so nothing is cached twice
    and gradient checkpointing computes them again like everything else.
    """

    enabled: bool
    row_mask: Tensor | None = None
    """The rows of the batch that see them, (batch,) bool; None is all."""
    separate: bool = False
    """Whether they have a softmax of their own, times `gate`, instead of joining the tokens'."""

    def key_values(self, layer: nn.Module, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, (1 or batch, kv_heads, extra, head_dim) in `query`'s dtype."""
        raise NotImplementedError

    def gate(self) -> Tensor:
        """Return the strength of each head, (heads,), where they are `separate`."""
        raise NotImplementedError

    def token_gates(self) -> Tensor | None:
        """Return how much each token makes of them, (batch, length, 1), or None: all of them.

        Keys and values both, where they are not `separate`.
        """
        return None


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
        kwargs: what the model was called with besides, `cu_seq_lens_q` among it, and T5's
            `position_bias` (1, heads, length, kv_length), which is 0 for what has no position: the
            keys that a method adds. Where the mask has ALiBi's bias in it, its `alibi_slopes`
            (heads,) give those keys theirs, at the places before the text.

    Raises:
        ModelError: the layer has sinks, or within segments adds a position bias to its scores,
            which is not computed.
    """
    segments = kwargs.get("cu_seq_lens_q") is not None
    for unsupported in ("s_aux", "position_bias") if segments else ("s_aux",):
        if kwargs.get(unsupported) is not None:
            raise ModelError(
                f"model.attention: {type(module).__name__} uses {unsupported}, which the attention "
                f"'{NAME}' does not compute; use eager"
            )
    tokens = query
    joining = [(x, x.token_gates()) for x in extras_of(module) if not x.separate]
    sections = Sections([gates[:, None] for _, gates in joining if gates is not None])
    if sections.gates:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = sections.query(query), sections.place(key), sections.place(value)
    prefix = _joined(joining, module, tokens, sections)
    options = {"dropout": dropout, "scaling": scaling, **kwargs}
    if segments:
        causal = bool(module.is_causal if is_causal is None else is_causal)
        out = _within_segments(query, key, value, prefix, causal=causal, **options)
    else:
        if prefix is not None:
            causal = _is_causal(module, is_causal)
            attention_mask = _mask_after(prefix[0], query, key, attention_mask, causal=causal)
            attention_mask = _only_their_rows(prefix.seen, attention_mask, key.shape[2])
            key, value = (torch.cat(x, dim=2) for x in zip(prefix[:2], (key, value), strict=True))
            if (bias := kwargs.get("position_bias")) is not None:
                options["position_bias"] = F.pad(bias, (prefix.key.shape[2], 0))
            slopes = kwargs.get("alibi_slopes")
            if slopes is not None and attention_mask is not None:
                attention_mask = _in_front_of_all(attention_mask, slopes, prefix.key.shape[2])
            is_causal = False
        out = _attend(module, query, key, value, attention_mask, is_causal=is_causal, **options)
    if sections.gates:
        out = sections.output(out)
    return with_separate(out, module, tokens, **options), None


def _in_front_of_all(mask: Tensor, slopes: Tensor, extra: int) -> Tensor:
    """Return the additive mask with ALiBi's bias of its first `extra` keys, at -extra to -1."""
    places = torch.arange(-extra, 0, device=mask.device, dtype=mask.dtype)
    bias = slopes.to(mask.dtype)[:, None] * places
    return mask + F.pad(bias, (0, mask.shape[-1] - extra))[None, :, None]


def extras_of(layer: nn.Module) -> list[ExtraKeyValues]:
    """Return what adds keys and values to an attention layer now."""
    return [x for x in layer.children() if isinstance(x, ExtraKeyValues) and x.enabled]


def with_separate(out: Tensor, layer: nn.Module, query: Tensor, **options: Any) -> Tensor:
    """Return attention's output `out` plus what comes of the extras that are separate.

    Args:
        out: (batch, length, heads, head_dim).
        layer: the attention layer.
        query: (batch, heads, length, head_dim).
        options: what the attention function was called with besides.
    """
    for extra in extras_of(layer):
        if extra.separate:
            pair = _expanded(extra.key_values(layer, query), query)
            own = options | {"dropout": 0.0, "position_bias": None}
            beside = _attend(layer, query, *pair, None, is_causal=False, **own)
            out = out + extra.gate().to(out.dtype)[:, None] * beside
    return out


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    """Return what sdpa would take the layer for."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


class _Prefix(NamedTuple):
    """Keys and values of several extras side by side, (batch, kv_heads, extra, head_dim)."""

    key: Tensor
    value: Tensor
    seen: Tensor | None
    """Which of them each row sees, (batch, extra) bool; None is all."""


def _joined(
    joining: list[tuple[ExtraKeyValues, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    sections: Sections,
) -> _Prefix | None:
    """Return the keys and values of all extras side by side, or None where there are none."""
    if not joining:
        return None
    extras, pairs, section = [extra for extra, _ in joining], [], 0
    for extra, gates in joining:
        K, V = _expanded(extra.key_values(module, query), query)
        section += gates is not None
        own = section if gates is not None else 0
        pairs.append((sections.place(K, own), sections.place(V, own)))
    seen = None
    if any(extra.row_mask is not None for extra in extras):
        both = zip(extras, pairs, strict=True)
        parts = [_rows(x, query)[:, None].expand(-1, k.shape[2]) for x, (k, _) in both]
        seen = torch.cat(parts, dim=1)
    key, value = torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2)
    return _Prefix(key, value, seen)


def _rows(extra: ExtraKeyValues, query: Tensor) -> Tensor:
    """Return the rows of the batch that see `extra`, (batch,) bool."""
    batch = query.shape[0]
    if extra.row_mask is None:
        return torch.ones(batch, dtype=torch.bool, device=query.device)
    if len(extra.row_mask) != batch:
        raise MethodError(
            f"rows: {len(extra.row_mask)} rows were given adapters and this batch has {batch}; "
            "give one name a row, without packed samples and beam search"
        )
    return extra.row_mask.to(query.device)


def _only_their_rows(seen: Tensor | None, mask: Tensor | None, tokens: int) -> Tensor | None:
    """Return the mask over [prefix | tokens] where each row sees of the prefix what is its own."""
    if seen is None:
        return mask
    shown = F.pad(seen, (0, tokens), value=True)[:, None, None]
    if mask is None:
        return shown
    if mask.dtype == torch.bool:
        return mask & shown
    return mask.masked_fill(~shown, torch.finfo(mask.dtype).min)


def _expanded(pair: tuple[Tensor, Tensor], query: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values once for each row of the batch."""
    k, v = pair
    return k.expand(query.shape[0], -1, -1, -1), v.expand(query.shape[0], -1, -1, -1)


def _mask_after(
    prefix: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, *, causal: bool
) -> Tensor | None:
    """Return the mask over [prefix | tokens]: all see the prefix, the rest is as it was."""
    if mask is None and causal and query.shape[2] > 1:
        # No mask means causal from the first key on: a static cache has more keys than queries,
        # and its empty places are at the end.
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = seen.tril()[None, None]
    if mask is None:
        return None
    return F.pad(mask, (prefix.shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)


def _within_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: _Prefix | None,
    *,
    causal: bool,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    """Return (1, tokens, heads, head_dim), every segment as if it were alone."""
    window = kwargs.get("sliding_window") or None
    slides = window is not None and prefix is not None
    softcap = kwargs.get("softcap")
    capped = softcap is not None
    pair = None if prefix is None else prefix[:2]
    shared: dict[str, Any] = {
        "scaling": scaling,
        "dropout": dropout,
        "causal": causal,
        "prefix": pair,
    }
    length = None if capped else _dense_length(query, window, kwargs)
    if length is not None:
        dense = equal_segments(
            query, key, value, length, backend=kwargs["segments_backend"], **shared
        )
        return dense.transpose(1, 2)
    on_gpu = uses_varlen(query, value, dropout=dropout, slides=slides, capped=capped)
    out = segment_attention(
        query,
        key,
        value,
        # A graph has no use for the CPU's: it cannot look at them.
        kwargs["cu_seq_lens_q" if on_gpu or torch.compiler.is_compiling() else "cu_seq_lens_k"],
        window=window,
        max_length=kwargs.get("max_length_q"),
        softcap=softcap,
        **shared,
    )
    return out.transpose(1, 2).contiguous()


def _dense_length(query: Tensor, window: int | None, kwargs: dict[str, Any]) -> int | None:
    """Return the length of all segments where they are to be taken as a dense batch.

    A method may have lengthened them, so what the batch was like before does not say it.
    """
    longest, segments = kwargs.get("max_length_q"), kwargs["cu_seq_lens_q"].shape[0] - 1
    if kwargs.get("segments_backend", "varlen") == "varlen" or longest is None:
        return None
    seen = window is None or window >= longest
    return longest if seen and segments * longest == query.shape[2] else None


def _attend(  # noqa: PLR0917 - transformers' own signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Tensor:
    """Return (batch, length, heads, head_dim), by sdpa or, where scores are capped, written out."""
    if is_newest_token(query, key, attention_mask, options):
        scale = options.get("scaling")
        return one_query_attention(query, key, value, attention_mask, scaling=scale).transpose(1, 2)
    if options.get("softcap") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    causal = _is_causal(module, options["is_causal"]) and query.shape[2] > 1
    if attention_mask is None and causal:
        attention_mask = _mask_after(key[:, :, :0], query, key, None, causal=True)
    own = {name: options[name] for name in ("scaling", "softcap", "dropout")}
    out = capped_attention(query, key, value, attention_mask, **own)
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def enable_segments(model: PreTrainedModel, asked: Asked = "auto") -> bool:
    """Give `model` the attention "tunesmith" and return whether it keeps segments apart.

    Proved by a probe: two segments in one row against each alone, also under a short sliding window
    where the model has one. Where the proof fails the model is as it was before.

    Args:
        model: with any attention.
        asked: the kernel for segments of equal length on CUDA; auto measures which is fastest.
    """
    before = model.config._attn_implementation
    if has_segments(model):
        return True
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        return False  # the architecture has its own attention path
    hook = model.base_model.register_forward_pre_hook(
        _SegmentInputs(AttentionChoice(model, asked)), with_kwargs=True
    )
    try:
        proved = keeps_segments_apart(model)
    except (ModelError, RuntimeError, ValueError, TypeError, KeyError):
        proved = False
    if not proved:
        hook.remove()
        model.set_attn_implementation(before)
    return proved


def suppose_segments(model: PreTrainedModel) -> bool:
    """Give a model without weights what `enable_segments` would, and return whether it may have it.

    Nothing can be proved where nothing can be computed; for a plan. With a sliding window the
    attention reads where segments end, which a plan's batch does not say.
    """
    slides = getattr(model.config.get_text_config(), "sliding_window", None)
    if slides or not may_keep_segments_apart(model):
        return False
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(before)
        return False
    model.base_model.register_forward_pre_hook(
        _SegmentInputs(SupposedChoice(model)), with_kwargs=True
    )
    return True


def has_segments(model: PreTrainedModel) -> bool:
    """Return whether `enable_segments` was here."""
    hooks = model.base_model._forward_pre_hooks.values()
    return any(isinstance(hook, _SegmentInputs) for hook in hooks)


class _SegmentInputs:
    """A hook that prepares a batch with segments, before the backbone sees it."""

    def __init__(self, choice: AttentionChoice) -> None:
        self.choice = choice

    def __call__(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the changed inputs, or None where there are no segments."""
        if kwargs.get("cu_seq_lens_q") is None:
            return None
        changed = _without_mask(backbone, args, kwargs)
        tokens = kwargs["position_ids"].shape[-1]
        trains = backbone.training and torch.is_grad_enabled()
        if (trains or self.choice.always) and kwargs.get("max_length_q"):
            changed["segments_backend"] = self.choice.backend(
                len(kwargs["cu_seq_lens_q"]) - 1,
                kwargs["max_length_q"],
                tokens,
                kwargs["position_ids"].device,
            )
        return args, kwargs | changed


def _without_mask(
    backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Keep transformers from building a (tokens x tokens) mask where the batch has segments.

    From positions that start anew it would guess the segments by itself. A mask of four dimensions
    is handed to the attention function as it is, which does not look at it. Positions of segments
    count from 0 in every batch; RoBERTa's own count from behind the padding's.
    """
    device = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device
    changed: dict[str, Any] = {
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        # Once for all layers: the variable-length kernel reads it on the GPU, the loop on the CPU.
        "cu_seq_lens_q": kwargs["cu_seq_lens_q"].to(device, non_blocking=True),
        "use_cache": False,
    }
    if first := first_position(backbone.config):
        changed["position_ids"] = kwargs["position_ids"] + first
    return changed
