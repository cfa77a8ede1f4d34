"""Rows of a source as something else, bad ones counted or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

from tunesmith.data.formats import bad, stop_at
from tunesmith.data.rows import BadRow, RawRow
from tunesmith.data.sources import Located, read
from tunesmith.data.table import Reading
from tunesmith.errors import DataError

T = TypeVar("T")


def converted(
    located: Located,
    convert: Callable[[RawRow], T],
    *,
    on_bad_row: Literal["stop", "skip"],
    reading: Reading,
) -> Iterator[T]:
    """Yield what `convert` makes of each row of a source that can be used.

    Args:
        located: the source.
        convert: raises DataError for a row that it cannot use.
        on_bad_row: whether such a row stops the run or is left out.
        reading: where rows and bad ones are counted.

    Raises:
        DataError: a row is bad and `on_bad_row` is stop.
    """
    for raw in read(located):
        reading.rows += 1
        made = _made_or_bad(raw, convert)
        if not isinstance(made, BadRow):
            yield made
        elif on_bad_row == "stop":
            raise stop_at(made)
        else:
            reading.skip(made.message)


def all_converted(located: Located, convert: Callable[[RawRow], T]) -> Iterator[T]:
    """Yield what `convert` makes of each row of a source, all of which have to be good.

    Raises:
        DataError: a row is bad; it is named.
    """
    for raw in read(located):
        made = _made_or_bad(raw, convert)
        if isinstance(made, BadRow):
            raise DataError(made.message)
        yield made


def _made_or_bad(raw: RawRow | BadRow, convert: Callable[[RawRow], T]) -> T | BadRow:
    if isinstance(raw, BadRow):
        return raw
    try:
        return convert(raw)
    except DataError as error:
        return bad(raw, error)
