"""Where rows come from: a path, a generator, a zoo name or a Hub id, looked up in this order."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from tunesmith.data.files import READERS, FileRow, reader_of
from tunesmith.data.hub import fingerprint, read_hub
from tunesmith.data.problems import generated_file, is_generated
from tunesmith.data.rows import START, BadRow, Position, RawRow
from tunesmith.data.settings import Source
from tunesmith.errors import DataError
from tunesmith.models.zoo import DATASETS, near, zoo_dataset

SKIP_HINT: Final = "; `data.on_bad_row: skip` leaves such rows out and counts them"
_SPLIT: Final = re.compile(
    r"(?P<split>train|test|val|dev|eval)(ing|idation|id|uation)?(set)?", re.IGNORECASE
)
_NO_DATA: Final = {"dataset_info.json", "dataset_infos.json", "readme.txt", "license.txt"}
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Located:
    """A source whose files are found; without files it is a Hub data set."""

    source: Source
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """What messages and reports call it: as the user wrote it."""
        return self.source.path


def locate(source: Source) -> Located:
    """Return the files behind a source; nothing is read yet.

    Raises:
        DataError: no file, zoo name or possible Hub id is meant, or a folder holds no data.
    """
    path = Path(source.path).expanduser()
    if is_generated(source.path) and not path.exists():
        return Located(source, (generated_file(source.path, source.split),))
    if path.is_file():
        return Located(source, (_known(path),))
    if path.is_dir():
        return Located(source, _folder(path, source.split))
    if glob.has_magic(source.path):
        return Located(source, _matching(str(path)))
    if source.path in DATASETS:
        return Located(source, _folder(zoo_dataset(source.path), source.split or "train"))
    if reader_of(path) is not None or not _HUB_ID.fullmatch(source.path):
        raise DataError(f"data: there is no file or folder '{source.path}'{_zoo_hint(source.path)}")
    return Located(source, ())


def _zoo_hint(name: str) -> str:
    family = name.partition("/")[0]
    return near(name, DATASETS) if any(known.startswith(family) for known in DATASETS) else ""


def _known(path: Path) -> Path:
    if reader_of(path) is None:
        raise DataError(f"{path}: unknown kind of file; expected {', '.join(READERS)} (or .gz)")
    return path


def _matching(pattern: str) -> tuple[Path, ...]:
    files = tuple(Path(name) for name in sorted(glob.glob(pattern, recursive=True)))
    if not files:
        raise DataError(f"data: no file matches '{pattern}'")
    return tuple(_known(file) for file in files if file.is_file())


def _folder(folder: Path, split: str | None) -> tuple[Path, ...]:
    """Return a folder's data files in the order of their names; of one split, where it has some."""
    inside = (path for path in sorted(folder.rglob("*")) if not _hidden(path, folder))
    files = [path for path in inside if path.is_file() and reader_of(path) is not None]
    files = [path for path in files if path.name.lower() not in _NO_DATA]
    if not files:
        raise DataError(f"{folder}: the folder holds no {', '.join(READERS)} file")
    if split is None and not any(split_of(path.name) for path in files):
        return tuple(files)
    # Reading a folder's test files beside its training files would train on the test.
    wanted = split or "train"
    chosen = [path for path in files if path.name.split(".")[0] == wanted]
    kind = split_of(wanted)
    chosen = chosen or [path for path in files if kind and split_of(path.name) == kind]
    if not chosen:
        names = ", ".join(path.name for path in files[:9])
        raise DataError(f"{folder}: no file of split '{wanted}'; the folder holds {names}")
    return tuple(chosen)


def split_of(name: str) -> str | None:
    """Return the split a file name speaks of (train, test, val, dev, eval), or None."""
    matches = (_SPLIT.fullmatch(word) for word in re.split(r"[-_. ]", name))
    return next((match["split"].lower() for match in matches if match), None)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def read(
    located: Located, start: Position = START, *, streaming: bool = False
) -> Iterator[RawRow | BadRow]:
    """Yield the rows of a source from `start` on, between what it skips and its limit.

    Args:
        located: what `locate` found.
        start: the `end` of the last row that was read.
        streaming: of a Hub data set, fetch rows while reading instead of the whole before it.

    Raises:
        DataError: a file cannot be read at all, or has no rows.
    """
    skip, limit = located.source.skip, located.source.limit
    rows = _hub_rows(located, start, streaming) if not located.files else _file_rows(located, start)
    if limit is not None:
        rows = islice(rows, max(0, skip + limit - start.total))
    # Read and left out, so that places in the source are the same whatever is skipped.
    yield from (row for row in rows if row.end.total > skip) if skip else rows


def _hub_rows(located: Located, start: Position, streaming: bool) -> Iterator[RawRow | BadRow]:
    rows = read_hub(located.source, start.row, streaming=streaming)
    yield from _placed(rows, located.name, 0, start.total)


def _file_rows(located: Located, start: Position) -> Iterator[RawRow | BadRow]:
    count = start.total
    for number in range(start.file, len(located.files)):
        path = located.files[number]
        offset, row = (start.offset, start.row) if number == start.file else (0, 0)
        empty = row == 0
        for item in _placed(_guarded(path, offset, row), str(path), number, count):
            empty = False
            count = item.end.total
            yield item
        if empty:
            raise DataError(f"{path}: the file is empty; expected at least one row")


def _guarded(path: Path, offset: int, row: int) -> Iterator[FileRow]:
    """Yield a file's rows; damaged archives and unreadable files become a DataError."""
    reader = reader_of(path)
    assert reader is not None  # noqa: S101 - locate() lets no other file through
    try:
        yield from reader(path, offset, row)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _placed(rows: Iterator[FileRow], name: str, file: int, count: int) -> Iterator[RawRow | BadRow]:
    """Yield file rows with their place; what is no mapping becomes a bad row."""
    for total, (number, offset, value, problem) in enumerate(rows, start=count + 1):
        place, end = f"{name}, row {number}", Position(file, offset, number, total)
        if problem is not None:
            yield BadRow(problem, place, end)
        elif isinstance(value, dict):
            yield RawRow(value, place, end)
        else:
            shown = f"{type(value).__name__} ({json.dumps(value, ensure_ascii=False)[:60]})"
            yield BadRow(f"is a {shown}, expected a mapping of columns to values", place, end)


def content_hash(located: Located) -> str:
    """Return a hash of the bytes of all files (of a Hub data set: its revision), in order."""
    if not located.files:
        return hashlib.sha256(fingerprint(located.source).encode()).hexdigest()
    return hash_of_files(located.files)


def hash_of_files(files: Iterable[Path]) -> str:
    """Return a hash of the bytes of all files, in order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
