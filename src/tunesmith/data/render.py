"""From a sample to tokens and the mask of what is supervised, through the chat template.

Where each assistant turn begins and ends in the rendered text comes from the template's
`{% generation %}` markers, or, in a template without them, from rendering the conversation turn by
turn. Either way the places are characters of the very text that is tokenised, and are carried to
tokens through the tokenizer's offsets, so marked and unmarked templates give the same mask. Three
things are then checked in every row: the tokens of a turn are one run, they cover the turn, and the
run ends with the end-of-turn token.

A turn's run always ends with its end-of-turn token: it is taken in where a generation block leaves
it out, and the line break that some templates write behind it is left out where a block takes it in
(generation stops before it). Nothing is ever decided by the padding token, which often is the
end-of-turn token too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tunesmith.data.conversation import Conversation, Sample, Text
from tunesmith.data.rows import Prompt, TokenRow, Values
from tunesmith.errors import DataError

_MARKERS: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINKING: Final = re.compile(r"</?think(?:ing)?>")
_NO_END: Final = (
    "the chat template writes no end-of-turn token after the assistant's turn, so the model could "
    "not learn to stop; set `model.chat_template: chatml`, or mend the template"
)


class Span(NamedTuple):
    """Characters [start, stop) of a rendered conversation: one assistant turn."""

    start: int
    stop: int


class Encoded(NamedTuple):
    """A text as tokens, and where each token lies in it."""

    text: str
    ids: NDArray[np.int32]
    """(length,) int32."""
    starts: NDArray[np.int64]
    """(length,) int64: first character of each token."""
    ends: NDArray[np.int64]
    """(length,) int64: character behind each token."""


class Renderer:
    """Turns samples into rows of tokens for one tokenizer.

    Raises:
        DataError: the tokenizer gives no offsets, without which no mask can be verified.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        supervise: Literal["assistant", "all"] = "assistant",
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} gives no character offsets, which masks are made "
                "from; expected a tokenizer with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.supervise = supervise
        added = tokenizer.added_tokens_decoder
        self._special = set(tokenizer.all_special_ids) | {i for i in added if added[i].special}
        self._ending: set[int] | None = None

    def row(self, sample: Sample) -> TokenRow:
        """Return a sample as tokens, uncut, and what of it is supervised.

        Raises:
            DataError: no assistant turn, or the template cannot render this row so that its turns
                can be told apart; the message has no place in it.
        """
        if isinstance(sample, Text):
            return self._text_row(sample.text)
        if self.supervise == "all":
            ids = self._encode(self._render(sample, sample.messages)).ids
            return TokenRow(ids, np.ones(len(ids), bool), (len(ids),))
        if sample.reply_at is None:
            roles = ", ".join(str(message["role"]) for message in sample.messages)
            raise DataError(
                f"has no assistant turn to learn from (its turns: {roles}); leave the row out, or "
                "set `data.supervise: all`"
            )
        text, spans = self._spans(sample)
        encoded = self._encode(text)
        mask = np.zeros(len(encoded.ids), bool)
        turns = assistant_turns(sample.messages)
        if any(m["content"] or m.get("tool_calls") for m in turns):
            for span in spans:
                mask[self._run(encoded, span)] = True
        size = len(encoded.ids)
        if sample.messages[-1].get("unfinished"):
            size = self._run(encoded, spans[-1]).stop - 1  # without what ends the turn
        return TokenRow(encoded.ids[:size], mask[:size], (size,))

    def prompt(self, sample: Sample) -> Prompt | None:
        """Return what comes before the last reply, and the reply; None where nothing asks."""
        if isinstance(sample, Text) or sample.reply_at is None:
            return None
        before, reply = sample.messages[: sample.reply_at], sample.messages[sample.reply_at]
        if not before:
            return None
        text = self._render(sample, before, header=True)
        reference = str(reply["content"])
        if reply.get("tool_calls"):
            said = {key: value for key, value in reply.items() if key != "weight"}
            whole, spans = self._spans(replace(sample, messages=(*before, said)))
            encoded = self._encode(whole)
            # Without special tokens, as the model's own replies are read: Mistral's calls begin
            # with one.
            ids = encoded.ids[self._run(encoded, spans[-1])].tolist()
            reference = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return Prompt(self._encode(text).ids.tolist(), [reference], list(before))

    def reply(self, text: str) -> list[int]:
        """Return the tokens that `text` is learned as where it is a reply, the turn's end included.

        They are not always those of the text alone: many tokenizers write a first word as if a
        space stood before it, and some templates put words of their own before a reply.

        Raises:
            DataError: the template leaves it out, or writes no end of the turn.
        """
        asked: Values = {"role": "user", "content": "?"}
        row = self.row(Conversation((asked, {"role": "assistant", "content": text})))
        ids: list[int] = row.input_ids[row.supervised].tolist()
        return ids

    def asked(self, sample: Conversation) -> list[int]:
        """Return the tokens of all turns, with the header of the assistant's turn to come.

        Raises:
            DataError: the template cannot render them, or leaves tools or tool calls out.
        """
        if sample.tools or any(message.get("tool_calls") for message in sample.messages):
            self._check_tools(sample, self._render(sample, sample.messages))
        text = self._render(sample, sample.messages, header=True)
        ids: list[int] = self._encode(text).ids.tolist()
        return ids

    def _text_row(self, text: str) -> TokenRow:
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError("the tokenizer has no end-of-text token (eos_token), which text needs")
        if ids[-1:] != [eos]:
            ids.append(eos)
        return TokenRow(np.array(ids, np.int32), np.ones(len(ids), bool), (len(ids),))

    def _template(self, sample: Conversation) -> str:
        try:
            return str(self.tokenizer.get_chat_template(tools=_list(sample.tools)))
        except ValueError as error:
            raise DataError(
                "the tokenizer has no chat template, which conversations need; set "
                "`model.chat_template` to chatml, plain or a Jinja file"
            ) from error

    def _render(
        self, sample: Conversation, messages: Sequence[Values], *, header: bool = False
    ) -> str:
        """Return messages as the template writes them; `header` opens an assistant turn."""
        return self._rendered(sample, messages, header=header)[0]

    def _rendered(
        self,
        sample: Conversation,
        messages: Sequence[Values],
        *,
        header: bool = False,
        marked: bool = False,
    ) -> tuple[str, list[Span]]:
        try:
            texts, marks = render_jinja_template(
                conversations=[list(messages)],
                tools=_list(sample.tools),
                chat_template=self._template(sample),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=header,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses the row: {error}") from error
        return texts[0], [Span(*mark) for mark in marks[0]] if marked else []

    def _encode(self, text: str) -> Encoded:
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        return Encoded(
            text, np.array(encoding["input_ids"], np.int32), offsets[:, 0], offsets[:, 1]
        )

    def _spans(self, sample: Conversation) -> tuple[str, list[Span]]:
        """Return the rendered conversation and the characters of each turn that is learned."""
        marked = _MARKERS.search(self._template(sample)) is not None
        text, spans = self._rendered(sample, sample.messages, marked=marked)
        self._check_tools(sample, text)
        _check_words(sample, text)
        if not marked:
            return text, self._spans_by_prefix(sample, text)
        silent = [turn.get("weight") == 0 for turn in assistant_turns(sample.messages)]
        if len(spans) < len(silent):
            raise DataError(
                f"the chat template marks only {len(spans)} of the row's {len(silent)} assistant "
                "turns with {% generation %}; mend the template, or remove all markers from it"
            )
        if not any(silent):
            return text, spans
        if len(spans) != len(silent):
            raise DataError(
                f"the chat template marks {len(spans)} runs for {len(silent)} assistant turns, so "
                "a turn of weight 0 cannot be told apart; mend the template"
            )
        return text, [span for span, quiet in zip(spans, silent, strict=True) if not quiet]

    def _spans_by_prefix(self, sample: Conversation, text: str) -> list[Span]:
        """Find the learned turns by rendering the conversation up to and including each.

        One of weight 0 is not looked for: a template may write it otherwise than a last turn.
        """
        spans = []
        for index, message in enumerate(sample.messages):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            start = self._start(sample, index, text)
            upto = self._render(sample, sample.messages[: index + 1])
            stop = _common(text, upto)
            # Some templates close the whole conversation with one more token; that is no rewriting.
            whole = all(words in text[start:stop] for words in _said(message))
            if stop <= start or (stop < len(upto) and not whole):
                raise _rewritten(index)
            spans.append(Span(start, stop))
        return spans

    def _start(self, sample: Conversation, index: int, text: str) -> int:
        """Return where the assistant's turn `index` begins, behind its header."""
        if index == 0:
            # Nothing comes before that could be rendered: another reply shows where it begins.
            first, *rest = sample.messages
            other = "a" if str(first["content"]).lstrip()[:1] != "a" else "b"
            return _common(text, self._render(sample, [first | {"content": other}, *rest]))
        before = sample.messages[:index]
        opened = self._render(sample, before, header=True)
        if text.startswith(opened):
            return len(opened)
        # The header may hold what a finished turn does not, such as an opened thinking block.
        if not text.startswith(self._render(sample, before)):
            raise _rewritten(index)
        return _common(text, opened)

    def _run(self, encoded: Encoded, span: Span) -> slice:
        """Return the tokens of a turn: all that its characters touch, up to its end-of-turn token.

        Raises:
            DataError: they are no run, do not cover the turn, or nothing ends the turn.
        """
        start = self._behind_header(encoded, span.start)
        stop = self._whole_tokens(encoded, span.stop)
        inside = (encoded.starts < stop) & (encoded.ends > start)
        # Tokenizers that trim offsets give a token of white space the width 0.
        inside |= (
            (encoded.starts == encoded.ends) & (encoded.starts >= start) & (encoded.starts < stop)
        )
        tokens = np.flatnonzero(inside)
        if len(tokens) == 0:
            first = int(np.searchsorted(encoded.starts, start))
            return slice(first, self._end_of_turn(encoded, first, first - 1) + 1)
        first, last = int(tokens[0]), int(tokens[-1])
        before = encoded.text[start : encoded.starts[first]]
        behind = encoded.text[encoded.ends[last] : stop]
        if last - first + 1 != len(tokens) or (before + behind).strip():
            raise DataError(
                f"the tokenizer's offsets do not cover the assistant's turn at characters "
                f"{start} to {stop}, so no mask can be made"
            )
        return slice(first, self._end_of_turn(encoded, first, last) + 1)

    def _behind_header(self, encoded: Encoded, start: int) -> int:
        """Return `start`, or the end of the header's token where it reaches over white space there.

        Phi-3's `<|assistant|>` takes in all white space behind it, the reply's own too.
        """
        token = int(np.searchsorted(encoded.starts, start)) - 1
        if token < 0 or encoded.ids[token] not in self._special:
            return start
        end = int(encoded.ends[token])
        return end if end > start and not encoded.text[start:end].strip() else start

    def _whole_tokens(self, encoded: Encoded, stop: int) -> int:
        """Return `stop`, or the start of the special token that it lies in.

        A span found by comparing texts may end inside the next turn's first token: `<` of `<|`.
        """
        token = int(np.searchsorted(encoded.starts, stop)) - 1
        split = token >= 0 and encoded.ends[token] > stop
        return int(encoded.starts[token]) if split and encoded.ids[token] in self._special else stop

    def _end_of_turn(self, encoded: Encoded, first: int, last: int) -> int:
        """Return the index of the token that ends the turn whose tokens are [first, last]."""
        ids, text = encoded.ids, encoded.text
        closing: list[int] = []
        for index in range(last, first - 1, -1):
            if int(ids[index]) in self._special:
                closing.append(index)
            elif text[encoded.starts[index] : encoded.ends[index]].strip():
                break
        # Generation stops at the first token that ends a turn, whatever the template adds to it.
        ending = [index for index in closing if int(ids[index]) in self._ending_ids()]
        if closing:
            return min(ending) if ending else max(closing)
        for index in range(last + 1, len(ids)):
            if int(ids[index]) in self._ending_ids():
                return index
            if text[encoded.starts[index] : encoded.ends[index]].strip():
                break
        raise DataError(_NO_END)

    def _ending_ids(self) -> set[int]:
        """Return what ends an assistant turn: the template's first token behind it, and eos."""
        if self._ending is None:
            probe = Conversation(
                ({"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"})
            )
            encoded = self._encode(self._render(probe, probe.messages))
            behind = encoded.starts >= encoded.text.rindex("reply") + len("reply")
            special = [token for token in encoded.ids[behind].tolist() if token in self._special]
            eos = self.tokenizer.eos_token_id
            self._ending = set(special[:1]) | (set() if eos is None else {eos})
        return self._ending

    def _check_tools(self, sample: Conversation, text: str) -> None:
        """Raise if the template leaves tools or tool calls out, as templates do that know none."""
        calls: list[Any] = [message.get("tool_calls") for message in sample.messages]
        called = [call["function"]["name"] for some in calls for call in some or ()]
        plain = [_without_calls(message) for message in sample.messages] if called else []
        lost: str | None = None
        if sample.tools and self._render(replace(sample, tools=None), sample.messages) == text:
            lost = "the row's tools"
        elif called and self._render(sample, plain) == text:
            lost = f"the tool call '{called[0]}'"
        if lost is not None:
            raise DataError(
                f"the chat template leaves out {lost}; use a model or a `model.chat_template` that "
                "knows tools"
            )


def _check_words(sample: Conversation, text: str) -> None:
    """Raise if the template leaves out a system turn, or words that are to be learned.

    Thinking before an earlier reply may go: templates drop it as the model will find it dropped.
    """
    for index, message in enumerate(sample.messages):
        learned = message["role"] == "assistant" and message.get("weight") != 0
        *thoughts, said = _THINKING.split(str(message["content"]))
        wanted = {"a reply's text": [said] if learned else []}
        if index == sample.reply_at and learned:
            thoughts += [str(message.get(key) or "") for key in ("reasoning_content", "thinking")]
            wanted["the reply's thinking"] = thoughts
        if message["role"] == "system":
            wanted = {"the system turn": [str(message["content"])]}
        lost = [(what, w) for what, words in wanted.items() for w in words if not _holds(text, w)]
        if lost:
            what, words = lost[0]
            raise DataError(
                f"the chat template leaves out {what} ({words.strip()[:40]!r}), so the model would "
                "not see it; use a `model.chat_template` that writes it, or take it out of the row"
            )


def _holds(text: str, words: str) -> bool:
    """Return whether a text holds words, whatever white space a template puts around them."""
    return words.strip() in text or "".join(words.split()) in "".join(text.split())


def _said(message: Values) -> list[str]:
    """Return what a turn shows wherever it is written: its text, or the names of what it calls."""
    calls: Any = message.get("tool_calls") or []
    return [str(message["content"]).strip(), *(call["function"]["name"] for call in calls)]


def _without_calls(message: Values) -> Values:
    return {key: value for key, value in message.items() if key != "tool_calls"}


def assistant_turns(messages: Sequence[Values]) -> list[Values]:
    """Return the messages that the assistant says."""
    return [message for message in messages if message["role"] == "assistant"]


def _list(tools: tuple[Values, ...] | None) -> list[Values] | None:
    return None if tools is None else list(tools)


def _common(first: str, second: str) -> int:
    """Return how many characters two texts share at their start."""
    if first.startswith(second):
        return len(second)
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _rewritten(index: int) -> DataError:
    return DataError(
        f"the chat template rewrites turn {index + 1} once further turns follow (as templates do "
        "that drop earlier thinking), so what the model says there cannot be told apart; use a "
        "template with {% generation %} markers (`model.chat_template`), or one reply a row and "
        "`weight: 0` at the turns before it"
    )
