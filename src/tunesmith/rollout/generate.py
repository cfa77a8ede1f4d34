"""Replies to many prompts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from tunesmith.errors import DataError
from tunesmith.models.chat import prepare_tokenizer
from tunesmith.models.context import context_length, positions_of
from tunesmith.models.encoder_decoder import start_token
from tunesmith.models.modes import evaluating
from tunesmith.models.settings import ModelSettings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the new token ids for each prompt, in the given order.

    Prompts of similar length share a batch, padded on the left, or on the right where an encoder
    reads them. The model's own sampling defaults (temperature, repetition penalty, ...) do not act;
    its mode and the global random state stay.

    Args:
        model: any causal language model or encoder-decoder, with or without methods attached.
        tokenizer: gives the padding token, and the end of a turn where `stop_ids` is None.
        prompts: token ids, each at least one.
        max_new_tokens: longest reply, in tokens; shorter where the context ends before.
        batch_size: prompts at once.
        temperature: 0 takes the most likely token, otherwise tokens are sampled.
        top_p: sample among the most likely tokens that together have this probability.
        top_k: sample among so many most likely tokens; 0 is all.
        seed: of the sampling; replies also depend on which prompts share a batch.
        stop_ids: tokens that end a reply and are its last token; by default the end of a turn.

    Raises:
        DataError: a prompt is empty or leaves no room in the model's context.
    """
    for index, prompt in enumerate(prompts):
        room_after(model, prompt, name=f"prompt {index}")
    stops = end_of_turn(tokenizer) if stop_ids is None else tuple(stop_ids)
    sampling = _sampling(temperature, top_p=top_p, top_k=top_k)
    written_after = start_token(model) if model.config.is_encoder_decoder else None
    replies: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    with evaluating(model), _without_own_defaults(model), _seeded(seed, model.device):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            room = room_after(model, prompts[chosen[0]], name="the longest prompt")
            settings = GenerationConfig(
                **sampling,
                max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room),
                eos_token_id=list(stops),
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
                disable_compile=True,
                decoder_start_token_id=written_after,
            )
            for index, reply in zip(
                chosen, _continue(model, [prompts[i] for i in chosen], settings), strict=True
            ):
                replies[index] = _until(reply, stops)
    return replies


def room_after(model: PreTrainedModel, prompt: Sequence[int], *, name: str) -> int | None:
    """Return how many tokens a reply to `prompt` may have, or None where nothing limits it.

    Raises:
        DataError: the prompt is empty or leaves no room in the model's context.
    """
    limit = context_length(model)
    if limit is not None and model.config.is_encoder_decoder:
        # What is read and what is written are as long as the context, each for itself.
        require_room(prompt, limit + 1, name=name)
        return positions_of(model)
    require_room(prompt, limit, name=name)
    return None if limit is None else limit - len(prompt)


def require_room(prompt: Sequence[int], limit: int | None, *, name: str) -> None:
    """Raise DataError if `prompt` is empty or leaves no room for a reply within `limit`."""
    if not prompt:
        raise DataError(f"{name} has no tokens; a reply needs at least one to follow")
    if limit is not None and len(prompt) >= limit:
        raise DataError(
            f"{name} has {len(prompt)} tokens, but the model's context holds {limit}, reply "
            "included; shorten the prompt"
        )


def end_of_turn(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the tokens that end an assistant's turn."""
    return prepare_tokenizer(tokenizer, ModelSettings()).end_of_turn_ids


def _sampling(temperature: float, *, top_p: float, top_k: int) -> dict[str, float]:
    if temperature == 0:
        return {"do_sample": False}
    # Transformers refuses a whole number as temperature.
    heat = float(temperature)
    return {"do_sample": True, "temperature": heat, "top_p": top_p, "top_k": top_k}


@torch.no_grad()
def _continue(
    model: PreTrainedModel, prompts: list[Sequence[int]], settings: GenerationConfig
) -> list[list[int]]:
    apart = model.config.is_encoder_decoder
    side = "right" if apart else "left"

    def padded(rows: list[Tensor], value: int) -> Tensor:
        batch = pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
        return batch.to(model.device)

    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = padded(rows, settings.pad_token_id)
    # The mask goes by length: the padding token may also be a token of the text.
    mask = padded([torch.ones_like(row) for row in rows], 0)
    output = model.generate(
        ids,
        attention_mask=mask,
        generation_config=settings,
        # Processes write different prompts, and those without any would be waited for in vain;
        # transformers would have all wait for all as soon as FSDP is about, weights whole or not.
        synced_gpus=False,
    )
    # A decoder's output begins with what it was given: the prompt, or the token it starts from.
    given = 1 if apart else ids.shape[1]
    return output[:, given:].tolist()


def _until(reply: list[int], stops: Sequence[int]) -> list[int]:
    """Return `reply` up to and with its first stop token; what follows is padding."""
    end = next((place for place, token in enumerate(reply) if token in stops), len(reply))
    return reply[: end + 1]


@contextmanager
def _without_own_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's generation_config, from which generate() fills what it is not told."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, which generate() samples from, and restore them after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
