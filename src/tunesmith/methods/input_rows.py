"""Rows put before the first block: what prompt tuning and P-tuning share.

The backbone sees a longer sequence, and its output is cut to the rows it was asked for, so labels,
logits and losses stay as they are. The rows are in the key-value cache like any token.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tunesmith.errors import MethodError
from tunesmith.methods.child import Child

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


STATIC: Final = (
    "a prompt before the input makes the sequence longer than a static cache was made for; "
    "generate with the dynamic cache"
)


class Grown(NamedTuple):
    """Where everything goes in the longer sequence, (batch, ...) alike for all rows."""

    tokens: Tensor
    """Places of the tokens (length,) int64."""
    rows: Tensor
    """Places of the added rows (segments x count,) int64."""


class InputRows(Child):
    """Hangs under the backbone and puts `rows()` before the tokens, or before every segment."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self._grown: Grown | None = None

    def rows(self) -> Tensor:
        """Return the rows (count, width), float32."""
        raise NotImplementedError

    def register_on(self, parent: nn.Module) -> RemovableHandle | None:
        """Register both hooks on the backbone; the later of two adapters is undone first."""
        # Both go by one handle: the second removes the first with it.
        before = parent.register_forward_pre_hook(self.before, with_kwargs=True)
        after = parent.register_forward_hook(self.after, prepend=True)
        return _Both(before, after)  # type: ignore[return-value]  # it has what is used: remove()

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the backbone's arguments with the rows in them."""
        self._grown = None
        if not self.enabled:
            return None
        names = list(inspect.signature(module.forward).parameters)
        inputs = dict(zip(names, args, strict=False)) | kwargs
        cache = inputs.get("past_key_values")
        if cache is not None and cache.is_compileable:
            raise MethodError(STATIC)
        if cache is not None and cache.get_seq_length() > 0:
            return (), inputs | _after_the_rows(inputs, self.count)
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = module.get_input_embeddings()(inputs["input_ids"])  # type: ignore[operator]
        self._grown = _places(inputs, embeds, self.count)
        longer = _longer(inputs, embeds, self.rows().to(embeds.dtype), self._grown)
        return (), inputs | longer

    def after(self, module: nn.Module, args: tuple[Any, ...], output: ModelOutput) -> ModelOutput:
        """Return the backbone's output with the rows cut out of it."""
        if self._grown is None:
            return output
        places, self._grown = self._grown.tokens, None
        output["last_hidden_state"] = output["last_hidden_state"].index_select(1, places)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(h.index_select(1, places) for h in output.hidden_states)
        return output


class _Both:
    """Removes two hooks."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove them."""
        for handle in self._handles:
            handle.remove()


def require_room(model: PreTrainedModel, count: int, key: str) -> None:
    """Check that `count` rows leave room for tokens.

    Raises:
        MethodError: the model's context is not longer.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and count >= longest:
        raise MethodError(
            f"method.{key}: {count} rows leave no room for tokens in a context of {longest}; "
            "use fewer"
        )


def _places(inputs: dict[str, Any], embeds: Tensor, count: int) -> Grown:
    """Return the places in the longer sequence: the rows go before every segment."""
    length, device = embeds.shape[1], embeds.device
    starts = torch.zeros(1, dtype=torch.int64)
    if (bounds := inputs.get("cu_seq_lens_q")) is not None:
        starts = bounds[:-1].to("cpu", torch.int64)
    segment = torch.bucketize(torch.arange(length), starts, right=True)
    tokens = torch.arange(length) + segment * count
    first = starts + torch.arange(len(starts)) * count
    rows = (first[:, None] + torch.arange(count)).flatten()
    return Grown(tokens.to(device), rows.to(device))


def _longer(inputs: dict[str, Any], embeds: Tensor, rows: Tensor, grown: Grown) -> dict[str, Any]:
    """Return the arguments that change when the rows come in."""
    batch, length, width = embeds.shape
    count = rows.shape[0]
    segments = len(grown.rows) // count
    total = length + len(grown.rows)
    whole = embeds.new_zeros(batch, total, width).index_copy(1, grown.tokens, embeds)
    prompt = rows.repeat(segments, 1).expand(batch, -1, -1)
    changed: dict[str, Any] = {
        "input_ids": None,
        "inputs_embeds": whole.index_copy(1, grown.rows, prompt),
    }
    # Where the batch has segments, attention looks at their bounds and at no mask.
    if (mask := inputs.get("attention_mask")) is not None and "cu_seq_lens_q" not in inputs:
        changed["attention_mask"] = _longer_mask(mask, count)
    if (positions := inputs.get("position_ids")) is not None:
        # 0, 1, ... for the rows, and the tokens go on after them.
        before = torch.arange(count, device=positions.device).repeat(segments)
        longer = positions.new_zeros(len(positions), total)
        longer = longer.index_copy(1, grown.tokens, positions + count)
        changed["position_ids"] = longer.index_copy(
            1, grown.rows, before.to(positions.dtype).expand(len(positions), -1)
        )
    if (kinds := inputs.get("token_type_ids")) is not None:
        longer = kinds.new_zeros(len(kinds), total)
        changed["token_type_ids"] = longer.index_copy(1, grown.tokens, kinds)
    for side in ("q", "k"):
        if (bounds := inputs.get(f"cu_seq_lens_{side}")) is not None:
            changed[f"cu_seq_lens_{side}"] = bounds + count * torch.arange(
                len(bounds), dtype=bounds.dtype, device=bounds.device
            )
            changed[f"max_length_{side}"] = inputs[f"max_length_{side}"] + count
    return changed


def _after_the_rows(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the arguments that change once the rows are in the cache."""
    changed = {}
    if (mask := inputs.get("attention_mask")) is not None:
        changed["attention_mask"] = _longer_mask(mask, count)
    if (positions := inputs.get("position_ids")) is not None:
        changed["position_ids"] = positions + count
    return changed


def _longer_mask(mask: Tensor, count: int) -> Tensor:
    """Return the mask (batch, length) with `count` rows that all see.

    Raises:
        MethodError: the mask is made for a cache of fixed size.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise MethodError(STATIC)
    return torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
