"""Rows put before the first block: what prompt tuning and P-tuning share.

The backbone sees a longer sequence, and its output is cut to the rows it was asked for, so labels,
logits and losses stay as they are. The rows are in the key-value cache like any token.

They stand behind the padding that is before a text, as `after_padding` says. They go where token
embeddings go: in an encoder that is before the positions are added and the sum
is normalised, so a row is dealt with as a token. Rows take the first positions and the text goes on
after them; a pooler still reads the text's first token, [CLS].

In an encoder-decoder the rows go before what the encoder reads. Its output stays as long as it is,
since the decoder attends to all of it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tunesmith.errors import MethodError
from tunesmith.methods.after_padding import at, leading_padding, places_of_text, put_in
from tunesmith.methods.child import Child, require_free, require_rows
from tunesmith.methods.prefix import join, stack_path
from tunesmith.methods.row_prompts import Choice, behind_prompts, with_prompts
from tunesmith.methods.segment_rows import grown_places, with_rows
from tunesmith.methods.tensors import whole
from tunesmith.models.context import TakesPositions
from tunesmith.models.families import first_position

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from tunesmith.models.sites import Sites


STATIC: Final = (
    "a prompt before the input makes the sequence longer than a static cache was made for; "
    "generate with the dynamic cache"
)


class InputRows(Child, TakesPositions):
    """Hangs under the backbone and puts `rows()` before the tokens, or before every segment."""

    by_row: ClassVar[bool] = True

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.attended = False
        """Whether a decoder attends to the output, which then keeps the rows."""
        self._tokens: Tensor | None = None
        """Places of the tokens in the longer sequence, (length,) or (batch, length) int64."""
        self.chosen: list[bool] = []
        """The rows of the batch that it acts in, where it does not act in all."""

    def choose_rows(self, mask: Tensor | None) -> None:
        """Act in the rows (batch,) bool of the batches to come; None is all rows again."""
        super().choose_rows(mask)
        self.chosen = [] if mask is None else mask.tolist()

    @property
    def acts_by_row(self) -> bool:
        """Whether it acts, and in some rows only."""
        return self.enabled and self.row_mask is not None

    def rows(self) -> Tensor:
        """Return the rows (count, width), float32."""
        raise NotImplementedError

    def positions_taken(self) -> int:
        """Return the number of rows."""
        return self.count

    @torch.no_grad()
    def final(self) -> Tensor:
        """Return the rows as they are saved, whole and on the CPU, also of a sharded model."""
        return whole(self.rows())

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
        self._tokens = None
        if not self.enabled:
            return None
        names = list(inspect.signature(module.forward).parameters)
        inputs = dict(zip(names, args, strict=False)) | kwargs
        cache = inputs.get("past_key_values")
        if cache is not None and cache.is_compileable:
            raise MethodError(STATIC)
        if self.row_mask is not None:
            return self._before_by_row(module, inputs, positions="position_ids" in names)
        if cache is not None and cache.get_seq_length() > 0:
            return (), inputs | _after_the_rows(inputs, self.count)
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = module.get_input_embeddings()(inputs["input_ids"])  # type: ignore[operator]
        rows = self.rows().to(embeds.dtype)
        if inputs.get("cu_seq_lens_q") is not None:
            grown = grown_places(inputs, embeds, self.count)
            self._tokens = grown.tokens
            return (), inputs | with_rows(inputs, embeds, rows, grown)
        padding = _padding(inputs, embeds)
        self._tokens = places_of_text(padding, self.count, embeds.shape[1])
        return (), inputs | _longer(inputs, embeds, rows, padding)

    def _before_by_row(
        self, module: nn.Module, inputs: dict[str, Any], *, positions: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the backbone's arguments with each row's own prompts in them."""
        together = [x for x in module.children() if isinstance(x, InputRows) and x.acts_by_row]
        if together[0] is not self:
            return None  # the first one acts for all, so that the batch grows once
        choice = Choice([x.chosen for x in together], [x.count for x in together])
        tokens = inputs.get("input_ids")
        embeds = inputs.get("inputs_embeds")
        text: Tensor = tokens if embeds is None else embeds  # type: ignore[assignment]  # has one
        require_rows(choice.chosen[0], len(text))
        if inputs.get("cu_seq_lens_q") is not None:
            raise MethodError("rows: a prompt is put before whole rows, and this batch is packed")
        seen = choice.seen(text.device)
        cache = inputs.get("past_key_values")
        if cache is not None and (past := cache.get_seq_length()) > 0:
            return (), inputs | behind_prompts(inputs, text, seen, past=past, positions=positions)
        if embeds is None:
            embeds = module.get_input_embeddings()(tokens)  # type: ignore[operator]
        prompts = choice.aligned([x.rows().to(embeds.dtype) for x in together])
        padding = _padding(inputs, embeds)
        self._tokens = places_of_text(padding, seen.shape[1], embeds.shape[1])
        start = first_position(module.config)
        return (), inputs | with_prompts(
            inputs, embeds, prompts, seen, positions=positions, start=start
        )

    def after(self, module: nn.Module, args: tuple[Any, ...], output: ModelOutput) -> ModelOutput:
        """Return the backbone's output with the rows cut out of it."""
        if self._tokens is None or self.attended:
            return output
        places, self._tokens = self._tokens, None
        output["last_hidden_state"] = at(output["last_hidden_state"], places)
        if output.get("pooler_output") is not None:  # it was pooled from the first row
            output["pooler_output"] = module.pooler(output["last_hidden_state"])  # type: ignore[operator]
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(at(h, places) for h in output.hidden_states)
        return output


class LongerEncoder(Child):
    """Hangs under a decoder and lets it attend to the rows that were put before the encoder."""

    def register_on(self, parent: nn.Module) -> RemovableHandle:
        """Register the hook on what goes into the decoder."""
        return parent.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the decoder's arguments with a mask as long as what the encoder gave."""
        mask = kwargs.get("encoder_attention_mask")
        if mask is None:
            return None
        count = kwargs["encoder_hidden_states"].shape[1] - mask.shape[-1]
        return (args, kwargs | {"encoder_attention_mask": _longer_mask(mask, count)})


def input_children(
    model: PreTrainedModel, sites: Sites, rows: InputRows, *, attribute: str, name: str
) -> dict[str, Child]:
    """Return by path what puts `rows` before the input of `model`.

    Raises:
        MethodError: the adapter's name is taken.
    """
    stack = stack_path(sites)
    require_free(model, stack, attribute, name)
    children: dict[str, Child] = {join(stack, attribute): rows}
    if model.config.is_encoder_decoder:
        rows.attended = True
        decoder = stack_path(sites, "decoder")
        children[join(decoder, attribute)] = LongerEncoder()
    return children


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


def _padding(inputs: dict[str, Any], embeds: Tensor) -> Tensor:
    """Return how much padding is before each text, (batch, 1) int64; none without a mask."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return leading_padding(mask)
    return torch.zeros(len(embeds), 1, dtype=torch.int64, device=embeds.device)


def _longer(
    inputs: dict[str, Any], embeds: Tensor, rows: Tensor, padding: Tensor
) -> dict[str, Any]:
    """Return the arguments that change when the rows come in, behind each text's padding."""
    batch, count = len(embeds), len(rows)
    changed: dict[str, Any] = {
        "input_ids": None,
        "inputs_embeds": put_in(rows.expand(batch, -1, -1), embeds, padding),
    }
    if (mask := inputs.get("attention_mask")) is not None:
        changed["attention_mask"] = _longer_mask(mask, count)
    if (positions := inputs.get("position_ids")) is not None:
        # The rows begin where the text began, which goes on after them.
        first = _first(positions, mask)
        own = torch.arange(count, dtype=positions.dtype, device=positions.device)
        changed["position_ids"] = put_in(
            (first + own).expand(batch, -1), (positions + count).expand(batch, -1), padding
        )
    if (kinds := inputs.get("token_type_ids")) is not None:
        changed["token_type_ids"] = put_in(
            kinds.new_zeros(batch, count), kinds.expand(batch, -1), padding
        )
    return changed


def _first(positions: Tensor, mask: Any) -> Tensor:
    """Return the first position of each text, (batch or 1, 1), which need not be 0.

    RoBERTa counts from behind the padding's position, and a prefix may have moved the text.
    """
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        positions = positions.masked_fill(mask == 0, torch.iinfo(positions.dtype).max)
    return positions.amin(dim=1, keepdim=True)


def _after_the_rows(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the arguments that change once the rows are in the cache."""
    changed = {}
    if (mask := inputs.get("attention_mask")) is not None:
        changed["attention_mask"] = _longer_mask(mask, count)
    if (positions := inputs.get("position_ids")) is not None:
        changed["position_ids"] = positions + count
    return changed


def _longer_mask(mask: Tensor, count: int) -> Tensor:
    """Return the mask (batch, length) with `count` rows that all see, behind the padding.

    Raises:
        MethodError: the mask is made for a cache of fixed size.
    """
    if count == 0:
        return mask
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise MethodError(STATIC)
    return put_in(mask.new_ones(len(mask), count), mask, leading_padding(mask))
