"""What is different about a model that reads with one stack of blocks and writes with another."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError
from tunesmith.models.families_seq2seq import SEQ2SEQ

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def holds_encoder_decoder(directory: Path) -> bool:
    """Return whether the model in `directory` is an encoder-decoder, from its config.json.

    A GGUF file, or a directory whose config.json cannot be read, is none.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(config.get("is_encoder_decoder", config.get("model_type") in SEQ2SEQ))


def start_token(model: PreTrainedModel) -> int:
    """Return the token that the decoder starts from.

    Raises:
        ModelError: the model does not say.
    """
    for config in (model.config, model.generation_config):
        token: int | None = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return token
    raise ModelError(
        f"model.name: the config.json of this {type(model).__name__} has no "
        "decoder_start_token_id, which the decoder starts from; add it"
    )


def read_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Return what the encoder reads: the turns as the chat template writes them.

    The tokenizer puts its special tokens around the whole: `</s>` behind it for T5.
    """
    text = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=False, return_dict=False
    )
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def written_ids(tokenizer: PreTrainedTokenizerBase, reply: str) -> list[int]:
    """Return what the decoder is to write: `reply` as the tokenizer makes targets, and eos.

    Raises:
        ModelError: the tokenizer has no eos token, so that replies would never end.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            "model.tokenizer: it has no end-of-text token (eos_token), which a decoder ends its "
            "replies with; set eos_token in tokenizer_config.json"
        )
    ids: list[int] = tokenizer(text_target=reply, verbose=False)["input_ids"]
    # mBART's first models write the language behind it, which is what their decoder starts from.
    return ids if eos in ids[-2:] else [*ids, eos]


def after_start(written: Tensor, start: int) -> Tensor:
    """Return what the decoder sees where it has to predict `written` (batch, length)."""
    shifted = written.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted


def run_both(
    model: PreTrainedModel,
    *,
    decoder_input_ids: Tensor,
    attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
    encoder_outputs: Any = None,
    **options: Any,
) -> Any:
    """Return the decoder's output, for models such as T5 that have no module without the head.

    Args:
        model: the whole model.
        decoder_input_ids: (batch, written) int64.
        attention_mask: of what is read, (batch, read).
        input_ids: what is read, (batch, read) int64.
        encoder_outputs: what the encoder made of it, instead.
        options: of the decoder, such as `use_cache`.
    """
    if encoder_outputs is None:
        encoder_outputs = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
    return model.get_decoder()(
        input_ids=decoder_input_ids,
        encoder_hidden_states=encoder_outputs.last_hidden_state,
        encoder_attention_mask=attention_mask,
        **options,
    )
