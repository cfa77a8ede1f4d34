"""Whether the files that a finished run learned from are what they were then."""

from __future__ import annotations

import glob
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tunesmith.data.files import reader_of
from tunesmith.data.sources import hash_of_files, locate
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunesmith.data.settings import DataSettings, Source

MARK: Final = "# data "
"""Begins the line of a file of settings that says what the data was."""


def data_line(data: DataSettings) -> str:
    """Return a comment with a hash of what the files of the run's rows hold.

    Empty where there is nothing to compare: streamed rows are not read beforehand, and what zoo,
    Hub and generators name does not change.
    """
    sources = [*data.train, *data.pretraining, *data.evaluation]
    found = None if data.streaming else data_hash(sources)
    return "" if found is None else f"{MARK}{found}\n"


def data_hash(sources: Iterable[Source]) -> str | None:
    """Return a hash of the bytes of the sources' local files; None where one is not to be had."""
    digest, any_file = hashlib.sha256(), False
    for source in sources:
        path = Path(source.path).expanduser()
        if not (path.exists() or glob.has_magic(source.path) or reader_of(path)):
            continue  # a name
        try:
            located = locate(source)
        except DataError:
            return None
        stats = [path.stat() for path in located.files]
        state = tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
        digest.update(_content(located.files, state).encode())
        any_file = True
    return digest.hexdigest() if any_file else None


@lru_cache(maxsize=256)
def _content(files: tuple[Path, ...], state: tuple[tuple[int, int], ...]) -> str:
    """Return the hash of files that are in a state, which is asked for again and again."""
    del state
    return hash_of_files(files)


def same_data(before: str, now: str) -> bool:
    """Return whether two texts say the same of the data, as far as both say something."""
    said = [[line for line in text.splitlines() if line.startswith(MARK)] for text in (before, now)]
    return not all(said) or said[0] == said[1]
