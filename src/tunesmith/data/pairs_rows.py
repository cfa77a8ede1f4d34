"""Rows of judged replies: what a file says, in the one shape that every layout becomes.

A row is one prompt and one or more replies to it, each a whole conversation that ends in its reply.
Known are: chosen and rejected as text, as a message or as messages, with the prompt beside them
(`prompt`, `instruction` and `input`, `messages`, `conversations`) or inside them, whole dialogues
as Anthropic's HH writes them, replies with a score each, and single replies with a label. A reply
given as a message may be `unfinished: true`, as samples are that were full before they ended: no
end of the turn is learned from it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, cast

from tunesmith.data.conversation import Conversation, as_text, conversation, message
from tunesmith.data.converted import converted
from tunesmith.data.formats import renamed
from tunesmith.data.rows import Values
from tunesmith.data.settings import Source
from tunesmith.data.sources import Located
from tunesmith.data.table import Reading
from tunesmith.errors import DataError
from tunesmith.types import JSON

Judgement = Literal["pairs", "labels", "scores", "steps"]
"""What is known of replies: which is better, whether one is good, a number, whether each step of
one is right."""

_HH_TURN: Final = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")
_HH_ROLES: Final = {"Human": "user", "Assistant": "assistant"}
_REPLIES: Final = ("replies", "completions", "responses")
_LABELS: Final = ("label", "kto_tag")
_SCORES: Final = ("score", "label", "reward")


@dataclass(frozen=True, slots=True)
class Judged:
    """One prompt with its replies, and what is known of them."""

    replies: tuple[Conversation, ...]
    """Each ends in its reply; the first is the chosen one where there are two without scores."""
    place: str
    """File and row, for messages."""
    scores: tuple[float, ...] = ()
    """One a reply, the larger the better; empty where none are known."""
    good: bool | None = None
    """Of a single reply, where it is labelled."""
    steps: tuple[tuple[str, float], ...] = ()
    """Of a single reply, its pieces and 1.0 for each right one, else 0.0."""

    @property
    def prompt_hash(self) -> int:
        """64 bits that are equal for rows which ask the same."""
        return self.replies[0].prompt_hash

    @property
    def pairs(self) -> list[tuple[int, int, float]]:
        """(better, worse, difference of their scores) of all pairs of replies that differ."""
        if not self.scores:
            return [(0, 1, 0.0)] if len(self.replies) == 2 else []
        s = self.scores
        every = [(i, j) for i in range(len(s)) for j in range(len(s))]
        return [(i, j, s[i] - s[j]) for i, j in every if s[i] > s[j]]

    @property
    def unfinished(self) -> bool:
        """Whether a reply was cut off before its turn ended."""
        return any(reply.messages[-1].get("unfinished") for reply in self.replies)

    @property
    def equal(self) -> bool:
        """Whether all replies say the same, so that none can be better."""
        said = {json.dumps(reply.messages[-1], sort_keys=True) for reply in self.replies}
        return len(said) < 2


def read_judged(
    located: Located, judgement: Judgement, *, on_bad_row: Literal["stop", "skip"]
) -> tuple[list[Judged], Reading]:
    """Return the rows of a source, and what reading met with.

    Raises:
        DataError: a row is bad and `on_bad_row` is stop, or no row is left.
    """
    source = located.source
    if source.prompt is not None or source.format != "auto":
        setting = "prompt and completion" if source.prompt is not None else "format"
        raise DataError(
            f"{source.path}: `{setting}` lays out conversations, and rows of {judgement} are "
            "recognised by their columns; name those with `columns`: {chosen: ..., rejected: ...}"
        )
    reading = Reading(located.name, judgement)
    rows = list(
        converted(
            located,
            lambda raw: judged_of(
                renamed(raw.values, source.columns), judgement, source, place=raw.place
            ),
            on_bad_row=on_bad_row,
            reading=reading,
        )
    )
    if judgement == "labels":
        rows = [single for row in rows for single in labelled_apart(row)]
    if not rows:
        raise DataError(f"{located.name}: none of {reading.rows} rows is left to learn from")
    return rows, reading


def judged_of(row: Values, judgement: Judgement, source: Source, *, place: str) -> Judged:
    """Return one row of a file.

    Raises:
        DataError: a column is missing or holds what it cannot; the row is not named.
    """
    if judgement == "steps":
        return _with_steps(row, source, place)
    if judgement == "scores":
        said = _single(row, source, judgement)
        return Judged((said,), place, (_number(_first(row, _SCORES, judgement), "score"),))
    if judgement == "labels" and not ("chosen" in row and "rejected" in row):
        label = _first(row, _LABELS, judgement)
        return Judged((_single(row, source, judgement),), place, good=_flag(label))
    found = _compared(row, source, place)
    if "chosen" in row and found.scores and found.scores[0] < found.scores[1]:
        better, worse = found.scores
        raise DataError(
            f"'rejected' scores {worse:g} and 'chosen' {better:g}, so its columns and its scores "
            "disagree about which reply is the better one"
        )
    return found


def replies_of(row: Values, source: Source) -> list[Conversation]:
    """Return every reply of a row with its prompt, whatever is known of it.

    Raises:
        DataError: there is none; the row is not named.
    """
    if "chosen" in row and "rejected" in row:
        return list(_compared(row, source, "").replies)
    name = next((name for name in _REPLIES if isinstance(row.get(name), list)), None)
    if name is not None:
        asked = _asked(row)
        return [_said(reply, asked, (row, name), source) for reply in cast("list[JSON]", row[name])]
    return [_single(row, source, "scores")]


def labelled_apart(row: Judged) -> list[Judged]:
    """Return the replies of a pair as rows of their own, the better one good, the other not."""
    if row.good is not None or row.equal or len(row.pairs) == 0:
        return [row]
    better, worse, _ = max(row.pairs, key=lambda pair: pair[2])
    return [
        Judged((row.replies[better],), row.place, good=True),
        Judged((row.replies[worse],), row.place, good=False),
    ]


def _compared(row: Values, source: Source, place: str) -> Judged:
    if "chosen" in row and "rejected" in row:
        asked = _asked(row)
        both = tuple(
            _said(row[name], asked, (row, name), source) for name in ("chosen", "rejected")
        )
        return Judged(both, place, _scores_of_pair(row))
    name = next((name for name in _REPLIES if name in row), None)
    if name is None:
        raise DataError(
            "has no columns 'chosen' and 'rejected' (nor 'replies' and 'scores'); its columns are "
            f"{', '.join(row)}; name them with `columns`"
        )
    replies, scores = row[name], row.get("scores")
    if not isinstance(replies, list) or not isinstance(scores, list) or len(replies) < 2:
        raise DataError(f"'{name}' and 'scores' must be lists of two or more replies and numbers")
    if len(replies) != len(scores):
        raise DataError(f"has {len(replies)} {name} and {len(scores)} scores; expected one each")
    asked = _asked(row)
    found = tuple(_said(reply, asked, (row, name), source) for reply in replies)
    return Judged(found, place, tuple(_number(score, "scores") for score in scores))


def _asked(row: Values) -> list[Values] | None:
    """Return the turns before the reply; None where they stand inside the replies."""
    for name, keys in (("conversations", ("from", "value")), ("messages", ("role", "content"))):
        if isinstance(row.get(name), list):
            return _turns(cast("list[JSON]", row[name]), keys)
    if "instruction" in row:
        given = row.get("input")
        parts = [as_text(row["instruction"], "'instruction'")]
        parts += [as_text(given, "'input'")] if given else []
        return [{"role": "user", "content": "\n\n".join(parts)}]
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return _turns(prompt, ("role", "content"))
    if prompt is None:
        return None
    text = as_text(prompt, "'prompt'")
    return dialogue(text) or [{"role": "user", "content": text}]


def _turns(turns: Sequence[JSON], keys: tuple[str, str]) -> list[Values]:
    first = turns[0] if turns else None
    if isinstance(first, dict) and keys[0] not in first:
        keys = ("from", "value") if "from" in first else ("role", "content")
    return [
        message(turn, number, role_key=keys[0], content_key=keys[1])
        for number, turn in enumerate(turns, start=1)
    ]


def _said(
    reply: JSON, asked: list[Values] | None, place: tuple[Values, str], source: Source
) -> Conversation:
    """Return the prompt and one reply to it, which stands at `place`: a row and its column."""
    row, column = place
    turns = [reply] if isinstance(reply, dict) else reply
    if isinstance(turns, list):
        said = _turns(turns, ("role", "content"))
        # Some data sets repeat the prompt inside chosen and rejected.
        inside = bool(said) and said[0]["role"] != "assistant"
        messages = said if inside else [*(asked or []), *said]
    else:
        text = as_text(reply, f"'{column}'")
        whole = dialogue(text)
        if asked is None and not whole:
            raise DataError(
                f"has no prompt beside '{column}', which is neither a list of turns nor a "
                "'Human: ... Assistant: ...' dialogue; name the prompt's column with `columns`"
            )
        messages = whole if asked is None else [*asked, {"role": "assistant", "content": text}]
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"'{column}' does not end with an assistant turn; expected a reply")
    # What the assistant said before the reply is read and not learned from.
    earlier = [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages[:-1]]
    last = {key: value for key, value in messages[-1].items() if key != "weight"}
    final = turns[-1] if isinstance(turns, list) else None
    if isinstance(final, dict) and final.get("unfinished"):
        last["unfinished"] = True
    system = row.get("system")
    return conversation(
        [*earlier, last],
        tools=row.get("tools"),
        system=as_text(system, "'system'") if system else source.system,
    )


def dialogue(text: str) -> list[Values]:
    r"""Return the turns of `\n\nHuman: ...\n\nAssistant: ...`, or none where it is no such text."""
    marks = list(_HH_TURN.finditer(text))
    if not marks or marks[0].start() != 0 or not text.startswith("\n\n"):
        return []
    stops = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": _HH_ROLES[mark.group(1)], "content": text[mark.end() : stop].strip()}
        for mark, stop in zip(marks, stops, strict=True)
    ]


def _single(row: Values, source: Source, judgement: Judgement) -> Conversation:
    for column in ("messages", "conversations"):
        if isinstance(row.get(column), list):
            return _said(row[column], None, (row, column), source)
    name = next((n for n in ("completion", "reply", "response", "output") if n in row), None)
    if name is None:
        raise DataError(
            f"has no reply, which {judgement} judge; its columns are {', '.join(row)}; name the "
            "columns with `columns`: {prompt: ..., completion: ...}"
        )
    return _said(row[name], _asked(row), (row, name), source)


def _with_steps(row: Values, source: Source, place: str) -> Judged:
    name = "completions" if "completions" in row else "steps"
    steps, labels = row.get(name), row.get("labels")
    if not isinstance(steps, list) or not isinstance(labels, list) or not steps:
        raise DataError("has no lists 'completions' and 'labels': a process reward needs both")
    if len(steps) != len(labels):
        raise DataError(f"has {len(steps)} steps and {len(labels)} labels; expected one each")
    texts = [as_text(step, f"'{name}'") for step in steps]
    if not all(text.strip() for text in texts):
        raise DataError(f"'{name}' has an empty step; expected text")
    said = _said("\n".join(texts), _asked(row) or [], (row, name), source)
    pairs = zip(texts, labels, strict=True)
    return Judged((said,), place, steps=tuple((t, float(_flag(label))) for t, label in pairs))


def _scores_of_pair(row: Values) -> tuple[float, ...]:
    inside = row.get("metadata")
    beside: Values = inside if isinstance(inside, dict) else {}
    for names in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        for values in (row, beside):
            if all(values.get(name) is not None for name in names):
                return tuple(_number(values[name], name) for name in names)
    margin = row.get("margin")
    return () if margin is None else (_number(margin, "margin"), 0.0)


def _first(row: Values, names: Sequence[str], judgement: Judgement) -> JSON:
    found = [row[name] for name in names if row.get(name) is not None]
    if not found:
        raise DataError(
            f"has no column '{names[0]}', which {judgement} need; its columns are "
            f"{', '.join(row)}; name it with `columns`"
        )
    return found[0]


def _number(value: JSON, column: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"'{column}' is {json.dumps(value)[:60]}; expected a finite number")
    return number


def _flag(value: JSON) -> bool:
    known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    key = value.lower() if isinstance(value, str) else value
    if not isinstance(key, bool | int | str) or key not in known:
        raise DataError(f"a label is {json.dumps(value)[:60]}; expected true or false")
    return known[key]


def swapped(row: Judged, reply: Judged) -> Conversation:
    """Return the prompt of `row` with the reply of another row: a pair that does not belong."""
    own = row.replies[0]
    return replace(own, messages=(*own.messages[:-1], reply.replies[0].messages[-1]))
