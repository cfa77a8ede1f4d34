"""Hub data sets, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tunesmith.data.files import FileRow, without_padding
from tunesmith.data.settings import Source
from tunesmith.errors import DataError


def read_hub(source: Source, row: int = 0, *, streaming: bool = False) -> Iterator[FileRow]:
    """Yield the rows of one split of a Hub data set after the first `row` ones.

    Labels that the data set keeps as numbers with names are given by their names.

    Raises:
        DataError: the Hub cannot be reached, or has no such data set, subset or split.
    """
    rows = _load(source, streaming=streaming)
    names = _names_of_labels(rows.features or {})
    for number, values in enumerate(rows.skip(row), start=row + 1):
        named = {name: _named(value, names.get(name)) for name, value in values.items()}
        yield FileRow(number, number, without_padding(named))


def _names_of_labels(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the labels' names of the columns that hold labels or lists of them."""
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: list(kind.names) for name, kind in inner.items() if hasattr(kind, "int2str")}


def _named(value: Any, names: list[str] | None) -> Any:
    """Return the name of a label, or of each of a list; -1 is the library's word for none."""
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if value >= 0 else None


def fingerprint(source: Source) -> str:
    """Return what changes when the rows of the split do: the name of its prepared Arrow files.

    `datasets` names the folder of prepared files after the hash of the Hub revision and of the
    loading arguments.
    """
    rows = _load(source, streaming=False)
    return ",".join(sorted(str(file["filename"]) for file in rows.cache_files)) + str(len(rows))


def _load(source: Source, *, streaming: bool) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    split = source.split or "train"
    try:
        return datasets.load_dataset(
            source.path, source.subset, split=split, streaming=streaming, revision=source.revision
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{_nowhere(source)} has no public data set of this name (a private one needs "
            "`hf auth login`)"
        ) from error
    except (ConnectionError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise DataError(
            f"{_nowhere(source)} cannot be reached to look for it; check the path, or connect (and "
            "unset HF_HUB_OFFLINE)"
        ) from error
    except (ValueError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"Hub data set '{source.path}', split '{split}': {reason}") from error


def _nowhere(source: Source) -> str:
    return f"data: '{source.path}' is no file, folder or zoo name, and the Hub"
