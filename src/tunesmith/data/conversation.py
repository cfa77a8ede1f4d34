"""The one shape that every format becomes: a conversation, or plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from tunesmith.data.rows import Values
from tunesmith.errors import DataError
from tunesmith.types import JSON

ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Role names of the formats to the four that chat templates know."""
CALLS: Final = {"function_call", "tool_call"}
_KEPT: Final = ("name", "tool_call_id", "reasoning_content", "thinking")
"""Further keys of a message that templates read. OpenAI's `weight: 0` is kept besides: such a turn
is read but not learned from."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns as chat templates take them: role, content, and tool_calls with parsed arguments."""

    messages: tuple[Values, ...]
    tools: tuple[Values, ...] | None = None

    @property
    def reply_at(self) -> int | None:
        """Index of the last assistant turn, or None where there is none."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return turns[-1] if turns else None

    @property
    def prompt_hash(self) -> int:
        """64 bits that are equal for rows which ask the same: all before the last reply."""
        return _hash([self.tools, self.messages[: self.reply_at]])


@dataclass(frozen=True, slots=True)
class Text:
    """A document without turns."""

    text: str

    @property
    def prompt_hash(self) -> int:
        """64 bits that are equal for equal documents."""
        return _hash(self.text)


Sample: TypeAlias = Conversation | Text


def _hash(content: object) -> int:
    text = json.dumps(content, ensure_ascii=True, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def check_text(text: str, where: str) -> str:
    """Return `text` if a tokenizer can take it as it is.

    Raises:
        DataError: it holds bytes that are not UTF-8, or a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = "a byte that is not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"
        raise DataError(
            f"{where} holds {what} at character {error.start + 1}; save the file as UTF-8"
        ) from error
    return text


def as_text(value: JSON, where: str) -> str:
    """Return a cell as text: strings as they are, anything else as JSON.

    Raises:
        DataError: it is null, or no text a tokenizer can take.
    """
    if value is None:
        raise DataError(f"{where} is null; expected text")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return check_text(text, where)


def conversation(
    turns: Sequence[Values], *, tools: JSON = None, system: str | None = None
) -> Conversation:
    """Return turns as a conversation, with `system` in front where they have no system turn."""
    messages = list(turns)
    if system is not None and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(tuple(messages), tool_definitions(tools))


def message(turn: JSON, number: int, *, role_key: str, content_key: str) -> Values:
    """Return one turn of a row in the canonical form.

    Args:
        turn: as the file has it.
        number: of the turn in its row, from 1, for messages.
        role_key: where the role stands: `role` (OpenAI), `from` (ShareGPT).
        content_key: where the text stands: `content`, `value`.

    Raises:
        DataError: no mapping, no known role, no content, or broken tool calls.
    """
    where = f"turn {number}"
    if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
        raise DataError(f"{where} has no text under '{role_key}'; it is {_short(turn)}")
    given = str(turn[role_key]).lower()
    if given not in ROLES:
        raise DataError(f"{where} has the unknown role '{given}'; use one of {', '.join(ROLES)}")
    content, calls = turn.get(content_key), _calls_of(turn, where)
    if given in CALLS:
        content, calls = None, [_call(call, where) for call in _listed(_loaded(content, where))]
    if content is None and not calls:
        raise DataError(f"{where} ({given}) has no '{content_key}'")
    result: Values = {"role": ROLES[given], "content": _content(content, where)}
    result |= {key: turn[key] for key in _KEPT if turn.get(key) is not None}
    check_text(json.dumps([result, calls], ensure_ascii=False, default=str), where)
    if turn.get("weight") == 0:
        result["weight"] = 0
    return result | ({"tool_calls": calls} if calls else {})


def _content(content: JSON, where: str) -> str:
    """Return a message's text; OpenAI's list of parts is joined."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return as_text(content, where)
    parts = [part if isinstance(part, dict) else {} for part in content]
    strange = [part.get("type") for part in parts if part.get("type") != "text"]
    if strange:
        raise DataError(f"{where} has a content part of type {strange[0]!r}; only text is learnt")
    return "".join(as_text(part.get("text"), where) for part in parts)


def _calls_of(turn: Mapping[str, JSON], where: str) -> list[JSON]:
    calls = turn.get("tool_calls") or turn.get("function_call")
    return [_call(call, where) for call in _listed(calls)] if calls else []


def _call(call: JSON, where: str) -> JSON:
    """Return a tool call in OpenAI's form, with the arguments as a mapping, as templates want."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where} has a tool call without a name: {_short(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _loaded(arguments or "{}", where)
    result: dict[str, JSON] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if isinstance(call, dict) and isinstance(call.get("id"), str):
        result["id"] = call["id"]
    return result


def tool_definitions(tools: JSON) -> tuple[Values, ...] | None:
    """Return a row's tools (a list, or a list as JSON text) in OpenAI's form; None for none.

    Raises:
        DataError: the text is not JSON, or a tool has no name.
    """
    if not tools:
        return None
    found: list[Values] = []
    for tool in _listed(_loaded(tools, "'tools'")):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError(f"'tools' holds a tool without a name: {_short(tool)}")
        found.append({"type": "function", "function": inner})
    check_text(json.dumps(found, ensure_ascii=False, default=str), "'tools'")
    return tuple(found) or None


def _loaded(value: JSON, where: str) -> JSON:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg}): {_short(value)}") from None


def _listed(value: JSON) -> list[JSON]:
    return value if isinstance(value, list) else [value]


def _short(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:80]
