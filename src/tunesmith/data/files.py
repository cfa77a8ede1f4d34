"""Reading files row by row, from any place in them, without holding them in memory.

A reader is called with a path, the offset to start at and the number of the row before it, and
yields every row in order. A row that cannot be read comes as a `BadRow`; what makes the whole file
unreadable is raised. Text that is not UTF-8 is decoded to lone surrogates, which stay in their row
and make that row bad later (`conversation.check_text`), so that one wrong byte costs one row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from tunesmith.errors import DataError
from tunesmith.types import JSON

BOM: Final = b"\xef\xbb\xbf"
PARQUET_BATCH: Final = 256
_FREE: Final = {"arguments", "parameters"}
"""Keys of tool calls and tool definitions under which every tool has keys of its own."""
LONGEST_FIELD: Final = 1 << 26
"""Bytes a CSV field may have; csv's own limit of 128 KiB is short for documents."""


class FileRow(NamedTuple):
    """One row of a file: its value, or why there is none."""

    row: int
    """Counted from 1: the line of JSONL and text files, the data row of the others."""
    offset: int
    """Where the next row begins."""
    value: JSON = None
    problem: str | None = None


Reader: TypeAlias = Callable[[Path, int, int], Iterator[FileRow]]


def read_jsonl(path: Path, offset: int = 0, row: int = 0) -> Iterator[FileRow]:
    """Yield one JSON value a line; blank lines are stepped over."""
    for number, end, line in _lines(path, offset, row):
        if line.strip():
            yield _parsed(number, end, line)


def _parsed(row: int, offset: int, line: str) -> FileRow:
    try:
        return FileRow(row, offset, json.loads(line))
    except json.JSONDecodeError as error:
        return FileRow(row, offset, problem=_json_problem(error))
    except RecursionError:
        return FileRow(row, offset, problem="is JSON nested too deeply to read")


def _json_problem(error: json.JSONDecodeError) -> str:
    return f"is broken JSON ({error.msg} at character {error.pos + 1})"


def read_text(path: Path, offset: int = 0, row: int = 0) -> Iterator[FileRow]:
    """Yield one document a line as {"text": line}; blank lines are stepped over."""
    for number, end, line in _lines(path, offset, row):
        if text := line.strip():
            yield FileRow(number, end, {"text": text})


def read_json(path: Path, offset: int = 0, row: int = 0) -> Iterator[FileRow]:
    """Yield the values of an array, or of the one list in an object; the file is read whole.

    A file with one object a line is read as JSONL, whatever its name.

    Raises:
        DataError: the JSON is broken (the row is named), or there is no one list in it.
    """
    with _open(path) as file:
        text = _decode(file.read().removeprefix(BOM))
    try:
        rows = _one_list(json.loads(text), path)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and error.msg == "Extra data":
            yield from read_jsonl(path, offset, row)
            return
        where = f", row {_broken_element(text)}" if text.lstrip().startswith("[") else ""
        raise DataError(
            f"{path}{where}: {_json_problem(error)}, and nothing after it can be read; mend it, or "
            "write one object a line (.jsonl), where a broken row can be skipped"
        ) from error
    for number, value in enumerate(rows[row:], start=row + 1):
        yield FileRow(number, number, value)


def _one_list(document: JSON, path: Path) -> list[JSON]:
    if isinstance(document, list):
        return document
    keys = list(document) if isinstance(document, dict) else []
    lists = [v for v in document.values() if isinstance(v, list)] if keys else []  # type: ignore[union-attr]
    if len(lists) != 1:
        found = f"an object with keys {', '.join(keys)}" if keys else type(document).__name__
        raise DataError(
            f"{path}: expected an array of rows or an object with one list in it, found {found}"
        )
    return lists[0]


def _broken_element(text: str) -> int:
    """Return the number, from 1, of the first array element that cannot be parsed."""
    decoder, place, count = json.JSONDecoder(), text.index("[") + 1, 0
    while True:
        place = _skip(text, place)
        try:
            _, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            return count + 1
        count += 1
        place = _skip(text, place)
        if not text.startswith(",", place):
            return count
        place += 1


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def read_csv(path: Path, offset: int = 0, row: int = 0) -> Iterator[FileRow]:
    """Yield the rows of a comma-separated file with a header line, as strings."""
    yield from _separated(path, offset, row, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def read_tsv(path: Path, offset: int = 0, row: int = 0) -> Iterator[FileRow]:
    """Yield the rows of a tab-separated file with a header line, as strings.

    Quotes are ordinary characters, as IANA's text/tab-separated-values says and as most corpora
    have it: a sentence may begin with a quote that is never closed.
    """
    yield from _separated(path, offset, row, delimiter="\t", quoting=csv.QUOTE_NONE)


class _Tracked:
    """Lines of a binary file as text, with the offset after the last one given out."""

    def __init__(self, file: gzip.GzipFile | io.BufferedReader) -> None:
        self.file = file
        self.offset = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        start = self.offset
        self.offset += len(line)
        return _decode(line.removeprefix(BOM) if start == 0 else line)

    def seek(self, offset: int) -> None:
        self.file.seek(offset)
        self.offset = offset


def _separated(path: Path, offset: int, row: int, **dialect: Any) -> Iterator[FileRow]:
    csv.field_size_limit(LONGEST_FIELD)
    with _open(path) as file:
        lines = _Tracked(file)
        reader = csv.reader(lines, strict=True, **dialect)
        header = _header(next(reader, []), path, dialect["delimiter"])
        if offset:
            lines.seek(offset)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row += 1
                yield FileRow(row, lines.offset, problem=f"is broken CSV ({error})")
                continue
            if fields:
                row += 1
                yield _fields(row, lines.offset, header, fields)


def _header(names: list[str], path: Path, delimiter: str) -> list[str]:
    if names and (len(set(names)) < len(names) or not all(name.strip() for name in names)):
        raise DataError(
            f"{path}: the header {names} has an empty or repeated column name; the first line has "
            "to name the columns"
        )
    # Spreadsheets write semicolons where the decimal sign is a comma.
    other = next((sign for sign in ",;\t|" if len(names) == 1 and sign in names[0]), None)
    if other is not None:
        raise DataError(
            f"{path}: the header {names[0]!r} is parted by {other!r}, and this suffix means "
            f"{delimiter!r}; save it as .csv with commas or as .tsv with tabs"
        )
    return names


def _fields(row: int, offset: int, header: list[str], fields: list[str]) -> FileRow:
    if len(fields) != len(header):
        problem = f"has {len(fields)} fields where the header names {len(header)}"
        return FileRow(row, offset, problem=problem)
    return FileRow(row, offset, dict(zip(header, fields, strict=True)))


def read_parquet(path: Path, offset: int = 0, row: int = 0) -> Iterator[FileRow]:
    """Yield the rows of a Parquet file, a few hundred decoded at a time.

    Raises:
        DataError: it is no Parquet file, or a damaged one.
    """
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            first = 0
            for group in range(file.metadata.num_row_groups):
                past = first + file.metadata.row_group(group).num_rows
                if past > row:
                    for values in _group_rows(file, group, row - first):
                        row += 1
                        yield FileRow(row, row, values)
                first = past
    except (arrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def _group_rows(file: Any, group: int, skip: int) -> Iterator[JSON]:
    for batch in file.iter_batches(PARQUET_BATCH, row_groups=[group]):
        if skip < batch.num_rows:
            yield from map(without_padding, batch.slice(skip).to_pylist())
        skip = max(0, skip - batch.num_rows)


def without_padding(value: JSON, *, free: bool = False) -> JSON:
    """Return a value of an Arrow table without the keys that its tool calls never had.

    A struct of Arrow has the keys of all rows, so that each call comes with the arguments of every
    tool, and each tool with the parameters of all others, those that are not its own as null.

    Args:
        value: a row, or a part of one.
        free: whether it lies in arguments or parameters, whose keys differ from row to row.
    """
    if isinstance(value, list):
        return [without_padding(item, free=free) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: without_padding(item, free=free or key in _FREE)
        for key, item in value.items()
        if item is not None or not free
    }


READERS: Final[dict[str, Reader]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_text,
}
"""Reader by suffix; all but Parquet also with .gz behind."""


def reader_of(path: Path) -> Reader | None:
    """Return the reader for a file's suffix, or None where nobody knows it."""
    return READERS.get(kind_of(path))


def kind_of(path: Path) -> str:
    """Return the suffix that says how a file is read; empty where it has none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    zipped = path.suffix.lower() == ".gz"
    file = gzip.open(path, "rb") if zipped else path.open("rb")  # noqa: SIM115 - callers close it
    if file.peek(2)[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        file.close()
        raise DataError(f"{path}: is UTF-16 text, expected UTF-8; save it as UTF-8")
    return file


def _lines(path: Path, offset: int, row: int) -> Iterator[tuple[int, int, str]]:
    with _open(path) as file:
        lines = _Tracked(file)
        if offset:
            lines.seek(offset)
        for number, line in enumerate(lines, start=row + 1):
            yield number, lines.offset, line


def _decode(content: bytes) -> str:
    return content.decode("utf-8", errors="surrogateescape")
