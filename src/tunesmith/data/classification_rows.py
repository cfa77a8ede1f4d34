"""Rows of labelled texts: what a file says, in the one shape that every kind becomes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from tunesmith.data.conversation import Text, as_text
from tunesmith.data.converted import converted
from tunesmith.data.formats import fill, renamed
from tunesmith.data.rows import RawRow, Values
from tunesmith.data.settings import Source
from tunesmith.data.sources import Located
from tunesmith.data.table import Reading
from tunesmith.errors import DataError
from tunesmith.types import JSON

Kind = Literal["single", "multi", "regression", "tokens"]
"""What a row is labelled with: a class, a list of classes, a number, a class for each word."""

Target: TypeAlias = str | float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled row."""

    text: str
    target: Target
    """A label; labels; a number; of words, a label each."""
    place: str
    """File and row, for messages."""
    pair: str | None = None
    """A second text, where two are judged together."""
    words: tuple[str, ...] = ()
    """The words of `text`, where each has a label."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels of the row; none where the target is a number."""
        if isinstance(self.target, float):
            return ()
        return (self.target,) if isinstance(self.target, str) else self.target

    @property
    def text_hash(self) -> int:
        """64 bits that are equal for rows with equal texts."""
        return Text(json.dumps([self.text, self.pair])).prompt_hash


def read_examples(
    located: Located, kind: Kind, *, on_bad_row: Literal["stop", "skip"]
) -> tuple[list[Example], Reading]:
    """Return the rows of a source, and what reading met with.

    Raises:
        DataError: a row is bad and `on_bad_row` is stop, or no row is left.
    """
    reading = Reading(located.name, "tokens and tags" if kind == "tokens" else "text and label")
    source = located.source
    _require_rows_of_text(source)
    examples = list(
        converted(
            located,
            lambda raw: example_of(raw, source, kind),
            on_bad_row=on_bad_row,
            reading=reading,
        )
    )
    if not examples:
        raise DataError(f"{located.name}: none of {reading.rows} rows is left to learn from")
    return examples, reading


def _require_rows_of_text(source: Source) -> None:
    """Raise for what a source may say about conversations only."""
    if source.format not in {"auto", "text_label"} or source.system is not None:
        setting = "system" if source.system is not None else f"format {source.format}"
        raise DataError(
            f"{source.path}: {setting} makes conversations, and classification learns rows with "
            "the columns text and label; name them with `columns`: {text: ..., label: ...}"
        )


def example_of(raw: RawRow, source: Source, kind: Kind) -> Example:
    """Return one row of a file as an example.

    Raises:
        DataError: a column is missing or holds what it cannot; the row is not named.
    """
    if kind == "tokens":
        return _labelled_words(renamed(raw.values, source.columns), raw.place)
    if source.prompt is not None and source.completion is not None:
        row: Values = {
            "text": fill(source.prompt, raw.values),
            "label": fill(source.completion, raw.values),
        }
    else:
        row = renamed(raw.values, source.columns)
    _require_columns(row, ("text", "label"))
    pair = row.get("text_pair")
    return Example(
        _text(row["text"], "text"),
        _TARGETS[kind](row["label"]),
        raw.place,
        None if pair is None else _text(pair, "text_pair"),
    )


def _require_columns(row: Values, needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in row]
    if missing:
        raise DataError(
            f"has no column '{missing[0]}'; its columns are {', '.join(row)}; name the one that is "
            f"meant with `columns`: {{{missing[0]}: ...}}"
        )


def _text(value: JSON, column: str) -> str:
    text = as_text(value, f"'{column}'")
    if not text.strip():
        raise DataError(f"'{column}' is empty; expected text")
    return text


def _label(value: JSON) -> str:
    """Return a label as text; a number or true stands for itself."""
    if isinstance(value, float) and math.isnan(value):
        raise DataError("'label' is nan; expected a label")
    if isinstance(value, list | dict):
        raise DataError(
            f"'label' is {_shown(value)}; expected one label (objective.kind: multi takes a list)"
        )
    text = as_text(value, "'label'").strip()
    if not text:
        raise DataError("'label' is empty; expected a label")
    return text


def _labels(value: JSON) -> tuple[str, ...]:
    """Return a list of labels, or the list that a text holds as JSON."""
    if not isinstance(value := _loaded(value), list):
        raise DataError(
            f"'label' is {_shown(value)} and not a list of labels, which objective.kind: multi "
            'needs; write ["a", "b"]'
        )
    return tuple(dict.fromkeys(_label(item) for item in value))


def _number(value: JSON) -> float:
    shown = _shown(value)
    try:
        number = float(value) if not isinstance(value, bool) else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(
            f"'label' is {shown}, and objective.kind: regression needs a number; use kind: single "
            "to learn labels"
        ) from None
    if not math.isfinite(number):
        raise DataError(f"'label' is {shown}; a regression needs a finite number")
    return number


_TARGETS: Final[dict[str, Callable[[JSON], Target]]] = {
    "single": _label,
    "multi": _labels,
    "regression": _number,
}


def _labelled_words(row: Values, place: str) -> Example:
    """Return a row of words and their labels: two lists of equal length."""
    _require_columns(row, ("tokens", "tags"))
    words, tags = words_of(row["tokens"]), _list(row["tags"], "tags")
    if len(words) != len(tags):
        raise DataError(f"has {len(words)} tokens and {len(tags)} tags; expected one tag a token")
    return Example(" ".join(words), tuple(_label(tag) for tag in tags), place, words=words)


def words_of(value: JSON) -> tuple[str, ...]:
    """Return the words that a cell of `tokens` holds.

    Raises:
        DataError: it holds no list, or an empty one, or what is no text.
    """
    words = _list(value, "tokens")
    if not words:
        raise DataError("'tokens' is empty; expected words")
    return tuple(as_text(word, "'tokens'") for word in words)


def _list(value: JSON, column: str) -> list[JSON]:
    if not isinstance(value := _loaded(value), list):
        raise DataError(f"'{column}' is {_shown(value)} and not a list; expected one entry a word")
    return value


def _loaded(value: JSON) -> JSON:
    """Return the list that a text (of a CSV file, say) holds as JSON; else the value as it is."""
    if isinstance(value, str) and value.strip().startswith("["):
        with suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


def _shown(value: JSON) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:60]
