"""Tokenizer facts made explicit: padding, the end of a turn, the chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jinja2 import TemplateError

from tunesmith.errors import ModelError
from tunesmith.models.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TEMPLATES: Final = Path(__file__).parent / "templates"
BUILT_IN: Final = ("chatml", "plain", "text")
"""Templates that `model.chat_template` may name."""
_PADDING: Final = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|vision_pad|>")
"""Tokens that models reserve for padding without always saying so."""
_MARKER: Final = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE: Final = "tunesmith"
"""Stands for a turn's content when the template is asked what follows it."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What training and generation must know of a tokenizer, decided once."""

    pad_token_id: int
    """May equal the end-of-turn id; masks therefore go by length and never by this id."""
    end_of_turn_ids: tuple[int, ...]
    """What ends an assistant's turn: first the template's token, then the tokenizer's eos."""
    template: str
    """Source of the chat template: `model`, `built-in chatml`, `built-in plain`, `file PATH`."""
    marks_assistant: bool
    """Whether the template marks the assistant's turns with {% generation %}."""


def built_in_template(name: str) -> str:
    """Return the text of a built-in chat template (a file of templates/, without `.jinja`)."""
    # Files end with a newline; the rendered chat must not.
    return (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
    settings: ModelSettings,
    *,
    chats: bool = True,
    reads_apart: bool = False,
) -> TokenizerFacts:
    """Give `tokenizer` a chat template and a pad token if it lacks them, and return the facts.

    Calling it again changes nothing. A template named in the settings replaces the model's; where
    neither is there, ChatML is taken if its markers are tokens, else plain text. A tokenizer that
    does not chat, of a classifier, needs padding only and keeps the template it has. One of an
    encoder-decoder, whose prompt is read apart from the reply, takes the bare text of the turns.

    Raises:
        ModelError: a template file is missing or broken, or nothing can serve as padding.
    """
    _set_padding(tokenizer)
    if not chats:
        return TokenizerFacts(tokenizer.pad_token_id, (), "none", False)
    source = _set_template(tokenizer, settings, reads_apart=reads_apart)
    return TokenizerFacts(
        pad_token_id=tokenizer.pad_token_id,
        end_of_turn_ids=_end_of_turn_ids(tokenizer),
        template=source,
        marks_assistant=_MARKER.search(str(tokenizer.chat_template)) is not None,
    )


def _set_template(
    tokenizer: PreTrainedTokenizerFast, settings: ModelSettings, *, reads_apart: bool
) -> str:
    wanted = settings.chat_template
    if wanted is None and tokenizer.chat_template is not None:
        return _source_of(tokenizer.chat_template)
    if wanted is None and reads_apart:
        wanted = "text"
    elif wanted is None:
        markers = {"<|im_start|>", "<|im_end|>"}
        wanted = "chatml" if markers <= tokenizer.get_vocab().keys() else "plain"
    if wanted in BUILT_IN:
        tokenizer.chat_template = built_in_template(wanted)
        return f"built-in {wanted}"
    try:
        tokenizer.chat_template = Path(wanted).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"model.chat_template: '{wanted}' is neither a built-in template "
            f"({', '.join(BUILT_IN)}) nor a readable text file"
        ) from error
    return f"file {wanted}"


def _source_of(template: str | dict[str, str]) -> str:
    built_in = {built_in_template(name): f"built-in {name}" for name in BUILT_IN}
    return built_in.get(template, "model") if isinstance(template, str) else "model"


def _set_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    if tokenizer.pad_token_id is not None:
        return
    vocabulary = tokenizer.get_vocab()
    reserved = (token for token in _PADDING if token in vocabulary)
    token = next(reserved, tokenizer.eos_token or tokenizer.unk_token)
    if token is None:
        raise ModelError(
            "model.tokenizer: it has no pad, eos or unk token, so batches cannot be padded; set "
            "pad_token in its tokenizer_config.json"
        )
    tokenizer.pad_token = token


def _end_of_turn_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the special token that follows an assistant's turn, then eos, each once."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise ModelError(
            f"model.chat_template: it cannot render a user turn and an assistant turn ({error}); "
            f"set model.chat_template to {' or '.join(BUILT_IN)}, or to a file"
        ) from error
    after = text[text.rfind(_PROBE) + len(_PROBE) :]
    special = {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    ends = [token_id for token_id in ids if token_id in special][:1]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise ModelError(
            "model.chat_template: no special token ends an assistant's turn and the tokenizer has "
            "no eos token, so generation would never stop; set eos_token in tokenizer_config.json"
        )
    return tuple(ends)
