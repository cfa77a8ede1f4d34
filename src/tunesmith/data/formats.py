"""Recognising how a row is laid out, and turning it into a conversation or text."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from tunesmith.data.conversation import Sample, Text, as_text, conversation, message
from tunesmith.data.rows import BadRow, RawRow, Values
from tunesmith.data.settings import FormatName, Source
from tunesmith.data.sources import SKIP_HINT, Located, read
from tunesmith.errors import DataError
from tunesmith.types import JSON


@dataclass(frozen=True)
class Format:
    """One layout of rows that people use."""

    keys: tuple[str, ...]
    """Columns that a row must have."""
    optional: tuple[str, ...]
    """Columns that are used where a row has them."""
    convert: Callable[[Values, str | None], Sample]
    """Called with the row and the default system turn."""


def _alpaca(row: Values, system: str | None) -> Sample:
    """Stanford Alpaca's rows; LLaMA-Factory adds `system` and `history` ([[asked, said], ...])."""
    instruction, given = as_text(row["instruction"], "'instruction'"), row.get("input")
    asked = "\n\n".join(filter(None, [instruction, as_text(given, "'input'") if given else ""]))
    turns: list[Values] = []
    for pair in _turns(row["history"], "history") if row.get("history") else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("'history' is not a list of [asked, said] pairs")
        turns += _exchange(pair[0], pair[1], "'history'")
    turns += [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": as_text(row["output"], "'output'")},
    ]
    return conversation(turns, tools=row.get("tools"), system=_system(row, system))


def _sharegpt(row: Values, system: str | None) -> Sample:
    turns = _turns(row["conversations"], "conversations")
    first = turns[0]
    # Some data sets name the column as ShareGPT does and write the turns as OpenAI does.
    openai = isinstance(first, dict) and "role" in first
    keys = ("role", "content") if openai else ("from", "value")
    return _from_turns(row, turns, keys, system)


def _messages(row: Values, system: str | None) -> Sample:
    return _from_turns(row, _turns(row["messages"], "messages"), ("role", "content"), system)


def _from_turns(
    row: Values, turns: list[JSON], keys: tuple[str, str], system: str | None
) -> Sample:
    messages = [
        message(turn, number, role_key=keys[0], content_key=keys[1])
        for number, turn in enumerate(turns, start=1)
    ]
    return conversation(messages, tools=row.get("tools"), system=_system(row, system))


def _prompt_completion(row: Values, system: str | None) -> Sample:
    """Strings, or lists of messages (then the prompt's turns come before the completion's)."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        turns = _turns(prompt, "prompt", role="user")
        turns = turns + _turns(completion, "completion", role="assistant")
        return _from_turns(row, turns, ("role", "content"), system)
    turns_ = _exchange(prompt, completion, None)
    return conversation(turns_, tools=row.get("tools"), system=_system(row, system))


def _text_label(row: Values, system: str | None) -> Sample:
    turns: list[Values] = [
        {"role": "user", "content": as_text(row["text"], "'text'")},
        {"role": "assistant", "content": as_text(row["label"], "'label'")},
    ]
    return conversation(turns, system=_system(row, system))


def _text(row: Values, system: str | None) -> Sample:
    return Text(as_text(row["text"], "'text'"))


FORMATS: Final[dict[FormatName, Format]] = {
    "messages": Format(("messages",), ("tools", "system"), _messages),
    "sharegpt": Format(("conversations",), ("tools", "system"), _sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history", "tools"), _alpaca),
    "prompt_completion": Format(("prompt", "completion"), ("tools", "system"), _prompt_completion),
    "text_label": Format(("text", "label"), ("system",), _text_label),
    "text": Format(("text",), (), _text),
}
"""In the order in which they are tried: the first whose keys a row has is its format."""


def _turns(value: JSON, column: str, *, role: str = "") -> list[JSON]:
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"'{column}' is not a list of turns, or an empty one")
    return value


def _exchange(asked: JSON, said: JSON, column: str | None) -> list[Values]:
    return [
        {"role": "user", "content": as_text(asked, column or "'prompt'")},
        {"role": "assistant", "content": as_text(said, column or "'completion'")},
    ]


def _system(row: Values, default: str | None) -> str | None:
    own = row.get("system")
    return as_text(own, "'system'") if own else default


@dataclass(frozen=True)
class Layout:
    """How the rows of one source become samples."""

    name: str
    """Format name, or `template` where the source gives templates."""
    source: Source

    def convert(self, values: Values) -> Sample:
        """Return one row as a conversation or text.

        Raises:
            DataError: the row lacks a column or holds what cannot be text.
        """
        if self.source.prompt is not None and self.source.completion is not None:
            turns: list[Values] = [
                {"role": "user", "content": fill(self.source.prompt, values)},
                {"role": "assistant", "content": fill(self.source.completion, values)},
            ]
            return conversation(turns, system=self.source.system)
        row = renamed(values, self.source.columns)
        form = FORMATS[self.name]  # type: ignore[index]
        missing = [key for key in form.keys if key not in row]
        if missing:
            raise DataError(
                f"has no column '{missing[0]}', which format {self.name} needs; its columns are "
                f"{', '.join(row)}"
            )
        return form.convert(row, self.source.system)


def layout_of(located: Located) -> Layout:
    """Return the layout of a source, recognised by the keys of its first readable row.

    Raises:
        DataError: no known format has these keys; the message shows them and the formats.
    """
    source = located.source
    if source.prompt is not None:
        return Layout("template", source)
    if source.format != "auto":
        return Layout(source.format, source)
    first = _first(read(located, streaming=True), located.name)
    keys = set(renamed(first.values, source.columns))
    for name, form in FORMATS.items():
        if keys >= set(form.keys):
            return Layout(name, source)
    known = "; ".join(f"{name}: {', '.join(form.keys)}" for name, form in FORMATS.items())
    raise DataError(
        f"{first.place}: no known format has the keys {', '.join(first.values) or '(none)'}; known "
        f"are {known}. Rename with `columns`, or give `prompt` and `completion` templates"
    )


def _first(rows: Iterable[RawRow | BadRow], name: str) -> RawRow:
    bad: BadRow | None = None
    for row in rows:
        if isinstance(row, RawRow):
            return row
        bad = bad or row
    raise DataError(bad.message if bad else f"{name}: has no rows")


def renamed(values: Values, columns: dict[str, str]) -> Values:
    """Return a row with the file's column names replaced by ours, {ours: theirs}.

    Raises:
        DataError: the row has no such column.
    """
    if not columns:
        return values
    missing = [theirs for theirs in columns.values() if theirs not in values]
    if missing:
        raise DataError(
            f"has no column '{missing[0]}', which `columns` names; its columns are "
            f"{', '.join(values)}"
        )
    rest = {key: value for key, value in values.items() if key not in columns.values()}
    return rest | {ours: values[theirs] for ours, theirs in columns.items()}


def fill(template: str, values: Values) -> str:
    """Return a template with each `{column}` replaced by the row's cell; `{{` is a brace.

    Raises:
        DataError: a column is missing or null, or the template is malformed.
    """
    pieces: list[str] = []
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"the template {template!r} is malformed ({error}); write a brace as `{{{{`"
        ) from None
    for literal, column, _, _ in parsed:
        pieces.append(literal)
        if column is None:
            continue
        if column not in values:
            raise DataError(
                f"the template names the column '{column}'; the columns are {', '.join(values)}"
            )
        pieces.append(as_text(values[column], f"'{column}'"))
    return "".join(pieces)


def bad(row: RawRow, error: DataError) -> BadRow:
    """Return a row that could not be converted as a bad one."""
    return BadRow(str(error), row.place, row.end)


def stop_at(row: BadRow) -> DataError:
    """Return the error with which a bad row stops a run."""
    return DataError(row.message + SKIP_HINT)
