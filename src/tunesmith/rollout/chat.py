"""A reply as it comes into being."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from jinja2 import TemplateError
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tunesmith.errors import DataError
from tunesmith.models.encoder_decoder import read_ids, start_token
from tunesmith.models.modes import evaluating
from tunesmith.rollout.generate import end_of_turn, room_after

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_UNFINISHED: Final = "\ufffd"
"""What a tokenizer decodes the first bytes of a longer character to."""


def stream_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the assistant's reply to `messages` in pieces of text, as soon as each is certain.

    A piece never ends within a character, so bytes of Chinese or emoji come when complete. The
    pieces joined are the reply without special tokens.

    Args:
        model: any causal language model or encoder-decoder; in eval mode until the iteration ends
            or is closed.
        tokenizer: has a chat template.
        messages: dicts with `role` and `content`, the last one the user's.
        max_new_tokens: longest reply, in tokens; shorter where the context ends before.
        temperature: 0 takes the most likely token, otherwise tokens are sampled.
        top_p: sample among the most likely tokens that together have this probability.
        top_k: sample among so many most likely tokens; 0 is all.
        seed: of the sampling.

    Raises:
        DataError: the chat template refuses the conversation, such as one with a system turn, or it
            leaves no room in the model's context.
    """
    prompt = _prompt(model, tokenizer, messages)
    limit = room_after(model, prompt, name="the conversation")
    room = max_new_tokens if limit is None else min(max_new_tokens, limit)
    sampler = _Sampler(temperature, top_p=top_p, top_k=top_k, seed=seed, device=model.device)
    stops, ids, said, text = end_of_turn(tokenizer), [], "", ""
    with evaluating(model):
        for token in _tokens(model, prompt, sampler, room):
            if token in stops:
                break
            ids.append(token)
            # All of it each time: a tokenizer may decode a token differently after others.
            text = tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            if text.startswith(said) and not text.endswith(_UNFINISHED) and text != said:
                yield text[len(said) :]
                said = text
    if text != said:
        yield text[len(said) :]


def _prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]]
) -> list[int]:
    """Return what the model reads before it replies."""
    try:
        if model.config.is_encoder_decoder:
            return read_ids(tokenizer, messages)
        ids: list[int] = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"the chat template refuses a conversation of the turns {roles} ({error}); leave out "
            "what it has no place for"
        ) from error
    return ids


class _Sampler:
    """Chooses the next token, as transformers' generate() would."""

    def __init__(
        self, temperature: float, *, top_p: float, top_k: int, seed: int, device: torch.device
    ) -> None:
        self.greedy = temperature == 0
        self.generator = torch.Generator(device).manual_seed(seed)
        self.warpers = [] if self.greedy else [TemperatureLogitsWarper(float(temperature))]
        if top_k > 0:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next token, (1, 1) int64, for logits (1, vocab)."""
        if self.greedy:
            return logits.argmax(-1, keepdim=True)
        scores = logits.float()
        for warp in self.warpers:
            scores = warp(None, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)


def _tokens(
    model: PreTrainedModel, prompt: Sequence[int], sampler: _Sampler, count: int
) -> Iterator[int]:
    ids, cache = torch.tensor([list(prompt)], device=model.device), None
    own: dict[str, Any] = {"logits_to_keep": 1}
    name = "input_ids"
    if model.config.is_encoder_decoder:
        with torch.no_grad():
            own = {"encoder_outputs": model.get_encoder()(input_ids=ids)}
        name, ids = "decoder_input_ids", torch.full_like(ids[:, :1], start_token(model))
    for _ in range(count):
        # Not around the yield: there it would hold in the caller's code too.
        with torch.no_grad():
            output = model(**{name: ids}, past_key_values=cache, use_cache=True, **own)
            ids, cache = sampler(output.logits[:, -1]), output.past_key_values
        yield int(ids)
