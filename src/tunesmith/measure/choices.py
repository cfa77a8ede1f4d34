"""Choosing among given replies by their likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from tunesmith.errors import DataError
from tunesmith.models.encoder_decoder import after_start, start_token
from tunesmith.models.modes import evaluating
from tunesmith.models.output_head import OutputHead, output_head
from tunesmith.ops.linear_cross_entropy import token_log_probs
from tunesmith.rollout.generate import room_after
from tunesmith.types import IGNORE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel


def choose(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
) -> list[int]:
    """Return for each prompt the index of the reply in `choices` that the model finds likeliest.

    A reply's likelihood is that of all its tokens. The end of the turn belongs to them, so that a
    reply that begins like another is not favoured for being short.

    Args:
        model: any causal language model or encoder-decoder; its mode stays.
        prompts: token ids up to where the reply begins.
        choices: token ids as replies are learned, with the end of the turn; at least one choice.
        batch_size: prompts at once.

    Raises:
        DataError: a prompt is empty or leaves no room for the longest choice.
    """
    return choice_log_probs(model, prompts, choices, batch_size=batch_size).argmax(-1).tolist()


@torch.no_grad()
def choice_log_probs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
) -> Tensor:
    """Return log p(choice | prompt), in nats, (prompts, choices) float32 on the CPU.

    A prompt is computed once; the choices continue from copies of its keys and values, or are
    written to copies of what the encoder made of it.

    Args:
        model: any causal language model or encoder-decoder; its mode stays.
        prompts: token ids, each at least one.
        choices: token ids, each at least one; the same choices for every prompt.
        batch_size: prompts at once; each is continued by all choices at once.

    Raises:
        DataError: a prompt is empty or leaves no room for the longest choice.
    """
    if not choices or not all(choices):
        raise DataError("choosing among replies needs at least one, and none without tokens")
    for index, prompt in enumerate(prompts):
        _require_room(model, prompt, max(map(len, choices)), name=f"prompt {index}")
    head = output_head(model)
    scores = torch.zeros(len(prompts), len(choices))
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            asked = [prompts[i] for i in chosen]
            scores[chosen] = _score(model, head, asked, choices).cpu()
    return scores


def _require_room(
    model: PreTrainedModel, prompt: Sequence[int], longest: int, *, name: str
) -> None:
    """Raise DataError where a choice of `longest` tokens has no room after `prompt`."""
    room = room_after(model, prompt, name=name)
    if room is not None and room < longest:
        raise DataError(
            f"{name} has {len(prompt)} tokens and leaves room for {room} in the model's context, "
            f"but the longest choice has {longest}; shorten the prompt"
        )


def _score(
    model: PreTrainedModel,
    head: OutputHead,
    prompts: list[Sequence[int]],
    choices: Sequence[Sequence[int]],
) -> Tensor:
    """Return log p(choice | prompt) of one batch, (prompts, choices)."""
    device, count = head.weight.device, len(choices)
    replies, reply_mask = _padded(choices, side="right", value=0)
    labels = replies.masked_fill(reply_mask == 0, IGNORE).to(device)
    replies = replies.to(device)
    if model.config.is_encoder_decoder:
        hidden = _written(model, head, prompts, replies)
    else:
        hidden = _continued(head, prompts, replies) * head.scale
    log_probs = token_log_probs(
        hidden.flatten(0, 1),
        head.weight,
        labels.repeat(len(prompts), 1).flatten(),
        bias=head.scaled_bias(),
        softcap=head.softcap,
    )
    return log_probs.view(len(prompts), count, -1).sum(-1)


def _written(
    model: PreTrainedModel, head: OutputHead, prompts: list[Sequence[int]], replies: Tensor
) -> Tensor:
    """Return s h (prompts * choices, length, width) where each reply is written to each prompt."""
    count, device = len(replies), replies.device
    ids, mask = (x.to(device) for x in _padded(prompts, side="right", value=0))
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
    encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(count, dim=0)
    written = after_start(replies, start_token(model)).repeat(len(prompts), 1)
    return head.hidden_states(
        {
            "encoder_outputs": encoded,
            "attention_mask": mask.repeat_interleave(count, dim=0),
            "decoder_input_ids": written,
        }
    )


def _continued(head: OutputHead, prompts: list[Sequence[int]], replies: Tensor) -> Tensor:
    """Return h (prompts * choices, length, width) where each reply follows each prompt."""
    count, device = len(replies), replies.device
    ids, mask = (x.to(device) for x in _padded(prompts, side="left", value=0))
    prompt = head.backbone(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
    )
    hidden: Tensor = prompt.last_hidden_state[:, -1:].repeat_interleave(count, dim=0)
    if replies.shape[1] > 1:
        rest = _continue(head, prompt.past_key_values, mask, replies[:, :-1])
        hidden = torch.cat((hidden, rest), dim=1)
    return hidden


def _continue(head: OutputHead, cache: Cache, mask: Tensor, replies: Tensor) -> Tensor:
    """Return hidden states (prompts * choices, length, width) of each reply after each prompt.

    Padding on the right of a reply is left unmasked: only what comes after it could see it, and
    that is padding too.
    """
    prompts, (count, length) = len(mask), replies.shape
    cache.batch_repeat_interleave(count)
    mask = mask.repeat_interleave(count, dim=0)
    start = mask.sum(-1, keepdim=True)
    output = head.backbone(
        input_ids=replies.repeat(prompts, 1),
        attention_mask=torch.cat((mask, mask.new_ones(len(mask), length)), dim=1),
        position_ids=start + torch.arange(length, device=mask.device),
        past_key_values=cache,
        use_cache=True,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _padded(rows: Sequence[Sequence[int]], *, side: str, value: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, (rows, longest) int64."""
    tensors = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in tensors]
    ids = pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
    return ids, pad_sequence(ones, batch_first=True, padding_side=side)
